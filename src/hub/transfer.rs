//! One file: asked about, downloaded in as many parts as it takes, and held to its hash.

use std::fs::{self, File};
use std::io::{ErrorKind as IoKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{Ask, Client, Fault, Linked, Reply, Retry, clean_etag};
use super::hash::{CHUNK, Digest, Hasher, read_into};
use super::manifest::ManifestFile;
use super::monitor::Monitor;
use super::names::{RepoId, encode_path};
use crate::{Error, ErrorKind, Result};

/// How often a request is repeated that brings nothing new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tries {
    /// Repetitions before giving up; a request that brings at least one byte starts the
    /// count anew.
    pub most: u32,
    /// Pause before the first; each later one is twice as long, up to half a minute.
    pub pause: Duration,
}

impl Default for Tries {
    fn default() -> Self {
        Tries { most: 5, pause: Duration::from_secs(1) }
    }
}

impl Tries {
    fn pause_before(&self, repetition: u32) -> Duration {
        const LONGEST: Duration = Duration::from_secs(30);
        self.pause.saturating_mul(1 << repetition.saturating_sub(1).min(16)).min(LONGEST)
    }

    /// Calls `send` until it succeeds, fails for good or has failed too often.
    pub(super) fn repeat<T>(
        &self,
        monitor: &Monitor,
        mut send: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T> {
        let mut failed = 0;
        loop {
            monitor.check()?;
            match send() {
                Ok(value) => return Ok(value),
                Err(fault) => {
                    failed += 1;
                    self.wait(failed, fault, monitor)?;
                }
            }
        }
    }

    /// Waits before repetition number `failed`, or returns the error if there is none.
    fn wait(&self, failed: u32, fault: Fault, monitor: &Monitor) -> Result<()> {
        if failed > self.most {
            return Err(fault.error.at(format_args!("given up after {failed} tries")));
        }
        match fault.retry {
            Retry::No => Err(fault.error),
            Retry::Soon => monitor.sleep(self.pause_before(failed)),
            Retry::After(pause) => monitor.sleep(pause),
        }
    }
}

/// A file as the server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Want {
    /// Its path in the repository.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// The name of its blob: the server's entity tag.
    pub blob: String,
    /// What its contents must hash to.
    pub digest: Digest,
    /// Whether the tag came from the hub's `X-Linked-Etag`; otherwise it is that of the file
    /// itself.
    linked: bool,
}

/// The address of a file below the hub's.
fn address(repo: &RepoId, commit: &str, path: &str) -> String {
    format!("/{repo}/resolve/{}/{}", encode_path(commit), encode_path(path))
}

/// Asks the server about a file and holds the answer to what is pinned.
pub(super) fn about(
    client: &Client<'_>,
    repo: &RepoId,
    commit: &str,
    file: &ManifestFile,
) -> Result<Want, Fault> {
    let reply = client.send(&address(repo, commit, &file.path), repo, Ask::About, &|linked| {
        linked.etag.is_some() && linked.size.is_some()
    })?;
    let linked = reply.linked.etag.is_some();
    let etag = reply.linked.etag.clone().or_else(|| reply.header("etag").map(clean_etag));
    let length = || reply.header("content-length")?.trim().parse().ok();
    let bytes = reply.linked.size.or_else(length);
    let broken = |what: String| {
        Fault::fatal(
            Error::network(format!("{}: {what}", reply.place))
                .hint("check HF_ENDPOINT: this server does not answer as a hub does"),
        )
    };
    let Some(bytes) = bytes else {
        return Err(broken("the server does not say how long the file is".to_owned()));
    };
    let offered = etag.as_deref().and_then(Digest::of_etag);
    let digest = match (&file.sha256, offered) {
        (Some(pinned), Some(Digest::Sha256(offered))) if *pinned != offered => {
            return Err(Fault::fatal(not_the_pinned(&reply.place, pinned, &offered)));
        }
        (Some(pinned), _) => Digest::Sha256(pinned.clone()),
        (None, Some(offered)) => offered,
        (None, None) => {
            return Err(broken("the server gives no hash to hold the file to".to_owned()));
        }
    };
    if let Some(pinned) = file.bytes.filter(|&pinned| pinned != bytes) {
        let offered = format!("{bytes} bytes");
        let pinned = format!("{pinned} bytes");
        return Err(Fault::fatal(not_the_pinned(&reply.place, &pinned, &offered)));
    }
    let path = file.path.clone();
    Ok(Want { path, bytes, blob: digest.name().to_owned(), digest, linked })
}

fn not_the_pinned(place: &str, pinned: &str, offered: &str) -> Error {
    Error::network(format!(
        "{place} is not the published file: expected {pinned}, offered {offered}"
    ))
    .hint(
        "nothing was replaced. Check HF_ENDPOINT; to take what this server has, on its own \
             word, pull it as OWNER/NAME",
    )
}

/// Why a download did not go to its end.
enum Cut {
    /// What came is kept.
    Fault(Fault),
    /// What came is useless.
    Restart(Error),
    /// The file is another one now.
    Changed(Error),
}

impl From<Fault> for Cut {
    fn from(fault: Fault) -> Cut {
        Cut::Fault(fault)
    }
}

impl From<Error> for Cut {
    fn from(error: Error) -> Cut {
        Cut::Fault(Fault::fatal(error))
    }
}

/// How a download ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fetched {
    /// The file is whole at `partial`, and its hash is right.
    Whole,
    /// The server has another file of that name now; ask about it again.
    Changed,
}

/// One download.
pub(super) struct Transfer<'a> {
    pub client: &'a Client<'a>,
    pub repo: &'a RepoId,
    pub commit: &'a str,
    pub tries: Tries,
    pub monitor: &'a Monitor,
}

impl Transfer<'_> {
    /// Downloads `want` to `partial`, going on with what is there. The caller holds the
    /// blob's lock.
    ///
    /// # Errors
    /// [`ErrorKind::Network`], or [`ErrorKind::Io`] for the disk; what came is kept unless
    /// it is wrong.
    pub fn fetch(&self, want: &Want, partial: &Path) -> Result<Fetched> {
        /// Times that a file is started anew: once for parts that do not fit together.
        const RESTARTS: u32 = 1;
        let mut file = Partial::open(partial, want, self.monitor)?;
        let (mut failed, mut restarts) = (0, 0);
        let mut in_parts = file.len > 0;
        loop {
            self.monitor.check()?;
            let error = if file.len == want.bytes {
                match file.check(want)? {
                    None => return Ok(Fetched::Whole),
                    Some(error) => {
                        // What came in one piece would come again as it is.
                        restarts += if in_parts { 1 } else { RESTARTS + 1 };
                        error
                    }
                }
            } else {
                in_parts |= file.len > 0;
                let before = file.len;
                match self.part(want, &mut file) {
                    Ok(()) => continue,
                    Err(Cut::Fault(fault)) => {
                        failed = if file.len > before { 0 } else { failed + 1 };
                        if failed == 0 && fault.retry == Retry::Soon {
                            continue;
                        }
                        self.tries.wait(failed.max(1), fault, self.monitor)?;
                        continue;
                    }
                    Err(Cut::Changed(error)) if restarts > 0 => return Err(error),
                    Err(Cut::Changed(_)) => {
                        self.monitor.take_back(file.len);
                        drop(file);
                        super::cache::remove_if_there(partial)?;
                        return Ok(Fetched::Changed);
                    }
                    Err(Cut::Restart(error)) => {
                        restarts += 1;
                        error
                    }
                }
            };
            if restarts > RESTARTS {
                drop(file);
                super::cache::remove_if_there(partial)?;
                return Err(error);
            }
            self.monitor.take_back(file.len);
            file.clear(want)?;
            in_parts = false;
        }
    }

    /// One request, appended to what is there.
    fn part(&self, want: &Want, file: &mut Partial) -> Result<(), Cut> {
        let address = address(self.repo, self.commit, &want.path);
        // If it is another file now, where that lies is of no interest.
        let changed = |linked: &Linked| {
            want.linked && linked.etag.as_ref().is_some_and(|tag| *tag != want.blob)
        };
        let reply = self.client.send(&address, self.repo, Ask::From(file.len), &changed);
        let reply = match reply {
            // The range is beyond the end: what is there is not of this file.
            Err(fault) if file.len > 0 && fault.status == Some(416) => {
                return Err(Cut::Restart(fault.error));
            }
            other => other?,
        };
        let place = reply.place.clone();
        let tag = if want.linked {
            reply.linked.etag.clone()
        } else {
            reply.header("etag").map(clean_etag)
        };
        if let Some(tag) = tag.filter(|tag| *tag != want.blob) {
            let error = Error::network(format!(
                "{place} is another file than it was a moment ago ({tag}, before {})",
                want.blob
            ));
            return Err(Cut::Changed(error.hint("pull again when the repository is at rest")));
        }
        let skip = self.check_range(&reply, want, file.len)?;
        self.read(reply, skip, want, file)
    }

    /// Checks that the answer is the part that was asked for. Returns how many bytes of it
    /// are there already: a server that ignores ranges sends everything.
    fn check_range(&self, reply: &Reply, want: &Want, start: u64) -> Result<u64, Cut> {
        let place = &reply.place;
        let broken = |what: String| {
            let error = Error::network(format!("{place}: {what}"));
            error.hint("a proxy or mirror may be broken: check HF_ENDPOINT, then pull again")
        };
        if reply.response.status().as_u16() == 206 {
            let range = reply.header("content-range").unwrap_or("nothing");
            return match parse_range(range) {
                Some((first, total)) if first == start && total.is_none_or(|t| t == want.bytes) => {
                    Ok(0)
                }
                _ => Err(Cut::Restart(broken(format!(
                    "asked for the bytes from {start} on of {}, the answer is {range:?}",
                    want.bytes
                )))),
            };
        }
        let length: Option<u64> =
            reply.header("content-length").and_then(|l| l.trim().parse().ok());
        match length {
            Some(length) if length != want.bytes => Err(Cut::Fault(Fault::passing(broken(
                format!("the file should have {} bytes, the answer has {length}", want.bytes),
            )))),
            _ => Ok(start),
        }
    }

    fn read(
        &self,
        reply: Reply,
        mut skip: u64,
        want: &Want,
        file: &mut Partial,
    ) -> Result<(), Cut> {
        let Reply { response, place, .. } = reply;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        let mut at = file.len - skip;
        loop {
            self.monitor.check()?;
            let count = match body.read(&mut buffer) {
                Ok(count) => count,
                Err(e) if e.kind() == IoKind::Interrupted => continue,
                Err(e) => return Err(cut_off(&place, at, want, Some(e)).into()),
            };
            if count == 0 {
                let whole = file.len == want.bytes;
                return if whole { Ok(()) } else { Err(cut_off(&place, at, want, None).into()) };
            }
            at += count as u64;
            let known = usize::try_from(skip).map_or(count, |skip| skip.min(count));
            skip -= known as u64;
            let new = &buffer[known..count];
            if file.len + new.len() as u64 > want.bytes {
                let error = Error::network(format!(
                    "{place} sends more than the {} bytes that the file has",
                    want.bytes
                ));
                let hint = "a proxy or mirror may be broken: check HF_ENDPOINT, then pull again";
                return Err(Cut::Restart(error.hint(hint)));
            }
            file.append(new)?;
            self.monitor.add(new.len() as u64);
        }
    }
}

fn cut_off(place: &str, at: u64, want: &Want, cause: Option<std::io::Error>) -> Fault {
    let error =
        Error::network(format!("{place}: the connection ended after {at} of {} bytes", want.bytes));
    let error = match cause {
        Some(cause) => error.because(cause),
        None => error,
    };
    Fault::passing(error.hint("pull again to go on; what is there is kept"))
}

/// First byte and total length of a `Content-Range`.
fn parse_range(header: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let possible = first <= last && total.is_none_or(|total| last < total);
    possible.then_some((first, total))
}

/// A file that grows.
struct Partial {
    file: File,
    path: PathBuf,
    len: u64,
    hasher: Hasher,
}

impl Partial {
    /// Opens what an earlier download left and hashes it.
    fn open(path: &Path, want: &Want, monitor: &Monitor) -> Result<Partial> {
        let failed = |e| Error::io("cannot open", path, e);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        }
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        let there = file.metadata().map_err(failed)?.len();
        let mut partial = if there > want.bytes {
            let mut partial = Partial {
                file,
                path: path.to_owned(),
                len: 0,
                hasher: want.digest.hasher(want.bytes),
            };
            partial.clear(want)?;
            partial
        } else {
            let mut hasher = want.digest.hasher(want.bytes);
            let len = read_into(&mut file, path, &mut hasher, &mut |_| monitor.check())?;
            Partial { file, path: path.to_owned(), len, hasher }
        };
        // Reading has left the file at its end, where writing begins.
        partial.file.seek(std::io::SeekFrom::Start(partial.len)).map_err(failed)?;
        monitor.keep(partial.len);
        Ok(partial)
    }

    fn clear(&mut self, want: &Want) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|e| Error::io("cannot clear", &self.path, e))?;
        self.len = 0;
        self.hasher = want.digest.hasher(want.bytes);
        Ok(())
    }

    /// Writes what the disk takes, and keeps count of it.
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let written = match self.file.write(bytes) {
                Ok(0) => Err(IoKind::WriteZero.into()),
                Err(e) if e.kind() == IoKind::Interrupted => continue,
                other => other,
            };
            let written = written.map_err(|e| disk_error(&self.path, e))?;
            self.hasher.update(&bytes[..written]);
            self.len += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Flushes the whole file; an error if it has another hash than wanted.
    fn check(&mut self, want: &Want) -> Result<Option<Error>> {
        let found = self.hasher.clone().finish();
        if found != want.digest.name() {
            let error = Error::network(format!(
                "{} was not downloaded right: its hash is {found}, expected {}",
                want.path,
                want.digest.name()
            ));
            return Ok(Some(error.hint(
                "it was thrown away; pull again, and if that does not help, check HF_ENDPOINT \
                 and the proxy settings",
            )));
        }
        self.file.sync_all().map_err(|e| disk_error(&self.path, e))?;
        Ok(None)
    }
}

/// A failed write of a download.
fn disk_error(path: &Path, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("cannot write {}", path.display()))
        .because(error)
        .hint("free some space or set HF_HUB_CACHE to another disk, then pull again; what is there is kept")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes */10",
            "bytes 9-5/10",
            "bytes 5-10/10",
            "items 5-9/10",
            "bytes 5-9",
            "bytes -1-9/10",
        ] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        let tries = Tries::default();
        assert_eq!(tries.pause_before(1), Duration::from_secs(1));
        assert_eq!(tries.pause_before(3), Duration::from_secs(4));
        assert_eq!(tries.pause_before(60), Duration::from_secs(30));
    }
}
