//! Pulling a model: look, ask, download, link, convert.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::Hub;
use super::cache::{RepoCache, remove_if_there};
use super::client::Client;
use super::events::{Event, Meter, Outcome, Stage, Watcher};
use super::lock::Lock;
use super::manifest::{Manifest, ManifestFile};
use super::monitor::{Monitor, interrupted};
use super::names::is_commit;
use super::record::{FileRecord, Record, modified};
use super::transfer::{Fetched, Transfer, Tries, Want, about};
use super::work::in_parallel;
use crate::{Error, ErrorKind, Result};

/// How to pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullOptions {
    /// Keep published weight files beside their converted form. Without this, those that
    /// pyraflow downloaded are removed when their conversion is written and read back.
    pub keep_original: bool,
    /// Convert weights to bf16. Needs all files of a checkpoint.
    pub convert: bool,
    /// Files downloaded at the same time.
    pub jobs: usize,
    /// How stubborn to be.
    pub tries: Tries,
}

impl Default for PullOptions {
    fn default() -> Self {
        PullOptions { keep_original: false, convert: true, jobs: 4, tries: Tries::default() }
    }
}

/// What a pull did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// Files that were downloaded.
    pub downloaded: usize,
    /// Bytes of published files that were removed after their conversion.
    pub removed: u64,
}

impl Hub {
    /// Brings everything of `manifest` into the cache. What is there is not fetched again; an
    /// interrupted pull goes on where it stopped. Of two pulls of the same repository one
    /// waits for the other.
    ///
    /// # Errors
    /// [`ErrorKind::Network`] if the server cannot be reached, refuses, or sends what it
    /// should not; [`ErrorKind::Io`] if the cache cannot be written or has no room;
    /// [`ErrorKind::Model`] for hostile names, or if the files are no checkpoint;
    /// [`ErrorKind::Interrupted`] when `watcher` says so. What was downloaded is kept.
    pub fn pull(
        &self,
        manifest: &Manifest,
        options: &PullOptions,
        watcher: &mut dyn Watcher,
    ) -> Result<Pulled> {
        manifest.check()?;
        if !is_commit(&manifest.revision) {
            return Err(Error::usage(format!("{:?} is no commit", manifest.revision)));
        }
        let cache = self.repo_cache(&manifest.repo);
        let _lock = wait_for_all(&cache, manifest, watcher)?;
        let snapshot = cache.snapshot(&manifest.revision);
        let record = Record::read(&snapshot);
        let pulled = Pulled { folder: snapshot.clone(), downloaded: 0, removed: 0 };
        let mut pull =
            Pull { hub: self, manifest, options, watcher, cache, snapshot, record, pulled };
        pull.run()?;
        Ok(pull.pulled)
    }
}

fn wait_for_all(cache: &RepoCache, manifest: &Manifest, watcher: &mut dyn Watcher) -> Result<Lock> {
    let mut told = false;
    cache.lock_all(&mut || {
        if !std::mem::replace(&mut told, true) {
            watcher.event(&Event::Waiting { held: manifest.repo.to_string() });
        }
        if watcher.cancelled() { Err(interrupted()) } else { Ok(()) }
    })
}

/// A pull that goes on.
pub(super) struct Pull<'a> {
    pub hub: &'a Hub,
    pub manifest: &'a Manifest,
    pub options: &'a PullOptions,
    pub watcher: &'a mut dyn Watcher,
    pub cache: RepoCache,
    pub snapshot: PathBuf,
    pub record: Record,
    pub pulled: Pulled,
}

impl Pull<'_> {
    fn run(&mut self) -> Result<()> {
        let missing = self.survey()?;
        if !missing.is_empty() {
            self.fetch(&missing)?;
        }
        if let Some(reference) = &self.manifest.reference {
            self.cache.set_reference(reference, &self.manifest.revision)?;
        }
        self.record.write(&self.snapshot)?;
        if self.options.convert { self.convert() } else { Ok(()) }
    }

    /// Downloads files and links them.
    fn fetch(&mut self, missing: &[ManifestFile]) -> Result<()> {
        let Pull { hub, manifest, options, .. } = *self;
        if hub.settings().offline {
            let names: Vec<&str> = missing.iter().map(|file| file.path.as_str()).collect();
            return Err(Error::network(format!(
                "HF_HUB_OFFLINE is set, but these files of {} are missing: {}",
                manifest.repo,
                names.join(", ")
            ))
            .hint("unset HF_HUB_OFFLINE and pull again"));
        }
        let client = Client::new(hub.settings());
        let mut wants = self.ask(&client, missing)?;
        // The largest first, so that no file is left to go on alone at the end.
        wants.sort_by(|a, b| (b.bytes, &a.path).cmp(&(a.bytes, &b.path)));
        self.note_intent(&wants)?;
        let left = self.check_space(&wants)?;
        let present = manifest.files.len() - wants.len();
        let (repo, commit) = (manifest.repo.to_string(), manifest.revision.clone());
        self.watcher.event(&Event::Start {
            repo,
            commit,
            files: wants.len(),
            bytes: left,
            present,
        });

        let monitor = Monitor::default();
        let mut meter = Meter::new(Stage::Downloading, wants.iter().map(|want| want.bytes).sum());
        let transfer = Transfer {
            client: &client,
            repo: &manifest.repo,
            commit: &manifest.revision,
            tries: options.tries,
            monitor: &monitor,
        };
        let Pull { cache, snapshot, record, watcher, pulled, .. } = self;
        let pinned = |path: &str| manifest.files.iter().find(|file| file.path == path);
        let watcher = std::cell::RefCell::new(watcher);
        let result = in_parallel(
            &wants,
            options.jobs,
            &monitor,
            |want| obtain(&transfer, cache, want, pinned(&want.path)),
            |_, (want, outcome)| {
                cache.link(&manifest.revision, &want.path, &want.blob)?;
                pulled.downloaded += usize::from(outcome == Outcome::Downloaded);
                note_checked(record, cache, &want, outcome);
                record.write(snapshot)?;
                let Want { path, bytes, blob: hash, .. } = want;
                watcher.borrow_mut().event(&Event::File { path, bytes, hash, outcome });
                Ok(())
            },
            || {
                let mut watcher = watcher.borrow_mut();
                meter.show(monitor.done(), monitor.kept(), "", &mut ***watcher);
                if watcher.cancelled() { Err(interrupted()) } else { Ok(()) }
            },
        );
        if result.is_ok() {
            meter.end(&mut ***watcher.borrow_mut());
        }
        result
    }

    /// Asks the server about all files.
    fn ask(&mut self, client: &Client<'_>, missing: &[ManifestFile]) -> Result<Vec<Want>> {
        let Pull { manifest, options, ref watcher, .. } = *self;
        let monitor = Monitor::default();
        let mut wants = Vec::with_capacity(missing.len());
        in_parallel(
            missing,
            options.jobs,
            &monitor,
            |file| {
                let ask = || about(client, &manifest.repo, &manifest.revision, file);
                options.tries.repeat(&monitor, ask)
            },
            |_, want| {
                wants.push(want);
                Ok(())
            },
            || if watcher.cancelled() { Err(interrupted()) } else { Ok(()) },
        )?;
        Ok(wants)
    }

    /// Notes which files will be pyraflow's own, before any of them is there: a killed pull
    /// would forget it otherwise.
    fn note_intent(&mut self, wants: &[Want]) -> Result<()> {
        for want in wants {
            let there = self.cache.blob(&want.blob).is_file();
            let known = self.record.files.get(&want.path).filter(|file| file.blob == want.blob);
            let ours = known.map_or(!there, |file| file.ours);
            let file = FileRecord {
                blob: want.blob.clone(),
                bytes: want.bytes,
                ours,
                checked: None,
                converted: false,
            };
            self.record.files.insert(want.path.clone(), file);
        }
        self.record.write(&self.snapshot)
    }

    /// Refuses to begin what does not fit on the disk. Returns the bytes still to come.
    fn check_space(&self, wants: &[Want]) -> Result<u64> {
        /// For links, folders and the file system itself.
        const MARGIN: u64 = 16 << 20;
        let mut blobs: Vec<&Want> = wants.iter().collect();
        blobs.sort_by_key(|want| &want.blob);
        blobs.dedup_by_key(|want| &want.blob);
        let length = |path: &Path| fs::metadata(path).ok().map(|m| m.len());
        let left = |want: &&Want| {
            let whole = length(&self.cache.blob(&want.blob));
            let there = whole.or_else(|| length(&self.cache.partial(&want.blob))).unwrap_or(0);
            want.bytes.saturating_sub(there)
        };
        let needed: u64 = blobs.iter().map(left).sum();
        let root = self.cache.root();
        let space = rustix::fs::statvfs(root)
            .map_err(|e| Error::io("cannot ask for the free space of", root, e.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if needed > 0 && needed.saturating_add(MARGIN) > free {
            return Err(Error::new(
                ErrorKind::Io,
                format!("{} has {free} bytes free, {needed} are to be downloaded", root.display()),
            )
            .hint("free some space, or set HF_HUB_CACHE to a folder on another disk"));
        }
        Ok(needed)
    }
}

/// Downloads a file unless its blob is there and whole.
fn obtain(
    transfer: &Transfer<'_>,
    cache: &RepoCache,
    want: &Want,
    pinned: Option<&ManifestFile>,
) -> Result<(Want, Outcome)> {
    /// A commit does not change; a server on which it does twice is not worth a third try.
    const CHANGES: usize = 2;
    let monitor = transfer.monitor;
    let mut want = want.clone();
    for _ in 0..=CHANGES {
        let _lock = cache.lock_blob(&want.blob, &mut || monitor.check())?;
        let blob = cache.blob(&want.blob);
        let partial = cache.partial(&want.blob);
        let mut step = |_| monitor.check();
        if blob.is_file() {
            if want.digest.matches(&blob, &mut step)? {
                monitor.keep(want.bytes);
                return Ok((want, Outcome::Present));
            }
            remove_if_there(&blob)?;
        }
        if transfer.fetch(&want, &partial)? == Fetched::Whole {
            fs::rename(&partial, &blob).map_err(|e| Error::io("cannot rename to", &blob, e))?;
            // Makes the new name last through a power failure where the file system can.
            let _ = blob.parent().map(|folder| File::open(folder).and_then(|f| f.sync_all()));
            return Ok((want, Outcome::Downloaded));
        }
        let file = pinned.cloned().unwrap_or_else(|| ManifestFile {
            path: want.path.clone(),
            bytes: None,
            sha256: None,
        });
        let ask = || about(transfer.client, transfer.repo, transfer.commit, &file);
        want = transfer.tries.repeat(monitor, ask)?;
    }
    Err(Error::network(format!("{} of {} keeps changing", want.path, transfer.repo))
        .hint("pull again when the repository is at rest"))
}

/// Notes that a file's hash was found right.
pub(super) fn note_checked(record: &mut Record, cache: &RepoCache, want: &Want, outcome: Outcome) {
    let checked = fs::metadata(cache.blob(&want.blob)).ok().map(|m| modified(&m));
    let known = record.files.get(&want.path).is_some_and(|file| file.ours);
    let ours = known || outcome == Outcome::Downloaded;
    let (blob, bytes) = (want.blob.clone(), want.bytes);
    let file = FileRecord { blob, bytes, ours, checked, converted: false };
    record.files.insert(want.path.clone(), file);
}
