//! The cache's layout, shared with Hugging Face's own tools:
//! `models--OWNER--NAME/{blobs,refs,snapshots}`. Blobs are named by their hash; a snapshot
//! holds links to them under the names that files have in a commit.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::lock::{self, Lock};
use super::names::{RepoId, is_commit};
use crate::{Error, Result};

/// One repository's part of the cache.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub fn new(cache: &Path, repo: &RepoId) -> RepoCache {
        let folder = repo.folder();
        RepoCache { root: cache.join(&folder), locks: cache.join(".locks").join(&folder) }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    /// Where a blob grows while it is downloaded.
    pub fn partial(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{name}.incomplete"))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// All commits of which something is there.
    pub fn commits(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("snapshots")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_commit(name))
            .collect();
        names.sort();
        names
    }

    /// The commit that a branch or tag was when it was last asked for.
    pub fn reference(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join("refs").join(name)).ok()?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    pub fn set_reference(&self, name: &str, commit: &str) -> Result<()> {
        if self.reference(name).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.root.join("refs").join(name), commit.as_bytes())
    }

    /// Held while a blob is downloaded, by any client.
    pub fn lock_blob(&self, name: &str, waiting: &mut dyn FnMut() -> Result<()>) -> Result<Lock> {
        lock::lock(&self.locks.join(format!("{name}.lock")), waiting)
    }

    /// Held while the repository is pulled or removed, by pyraflow alone.
    pub fn lock_all(&self, waiting: &mut dyn FnMut() -> Result<()>) -> Result<Lock> {
        lock::lock(&self.locks.join("pyraflow.lock"), waiting)
    }

    /// [`RepoCache::lock_all`] without waiting.
    pub fn try_lock_all(&self) -> Result<Option<Lock>> {
        lock::try_lock(&self.locks.join("pyraflow.lock"))
    }

    /// The blob that a file of a snapshot is, by its name.
    pub fn blob_of(&self, commit: &str, path: &str) -> Option<String> {
        let target = fs::read_link(self.snapshot(commit).join(path)).ok()?;
        let name = target.file_name()?.to_str()?;
        self.blob(name).is_file().then(|| name.to_owned())
    }

    /// Makes a file of a snapshot a link to a blob.
    pub fn link(&self, commit: &str, path: &str, blob: &str) -> Result<()> {
        if self.blob_of(commit, path).as_deref() == Some(blob) {
            return Ok(());
        }
        let link = self.snapshot(commit).join(path);
        let folder = link.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        // Relative, so that the cache can be moved.
        let up = "../".repeat(2 + path.matches('/').count());
        let failed = |e| Error::io("cannot link", &link, e);
        // Not in the snapshot, where one that a killed run left would count as a file. Links
        // are made by the one pull that holds the repository.
        let temporary = self.root.join(".link");
        let _ = fs::remove_file(&temporary);
        symlink(format!("{up}blobs/{blob}"), &temporary).map_err(failed)?;
        fs::rename(&temporary, &link).map_err(|e| {
            let _ = fs::remove_file(&temporary);
            failed(e)
        })
    }

    /// Removes a file of a snapshot, and its blob if no other file is that blob. Where the link
    /// is gone the blob is taken to be the one `recorded`: a run that was killed in between has
    /// left that. Returns how many bytes that frees.
    pub fn unlink(&self, commit: &str, path: &str, recorded: Option<&str>) -> Result<u64> {
        let link = self.snapshot(commit).join(path);
        let target = fs::read_link(&link).ok();
        let name = target.and_then(|t| Some(t.file_name()?.to_str()?.to_owned()));
        let own = fs::symlink_metadata(&link).map_or(0, |m| if m.is_file() { m.len() } else { 0 });
        let name = match fs::symlink_metadata(&link) {
            Ok(_) => name,
            Err(_) => recorded.map(String::from),
        };
        remove_if_there(&link)?;
        match name {
            Some(name) if !self.used_blobs().contains(&name) => {
                let blob = self.blob(&name);
                let bytes = fs::metadata(&blob).map_or(0, |m| m.len());
                remove_if_there(&blob)?;
                Ok(bytes)
            }
            _ => Ok(own),
        }
    }

    /// The names of all blobs that some snapshot links to.
    pub fn used_blobs(&self) -> BTreeSet<String> {
        let mut used = BTreeSet::new();
        let mut folders = vec![self.root.join("snapshots")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind) if kind.is_symlink() => {
                        let target = fs::read_link(entry.path()).ok();
                        used.extend(target.and_then(|t| Some(t.file_name()?.to_str()?.to_owned())));
                    }
                    _ => {}
                }
            }
        }
        used
    }
}

/// Removes a file that may be gone already.
pub(super) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot remove", path, e))
        }
        _ => Ok(()),
    }
}

/// Writes a small file, whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
    let failed = |e| Error::io("cannot write", path, e).hint("free some space, then pull again");
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_links_to_blobs_and_lets_go_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), &"a/b".parse().unwrap());
        let (first, second) = ("1".repeat(40), "2".repeat(40));
        write_whole(&cache.blob("x"), b"12345").unwrap();
        for (commit, path) in [(&first, "d/one"), (&first, "two"), (&second, "d/one")] {
            cache.link(commit, path, "x").unwrap();
            cache.link(commit, path, "x").unwrap();
            assert_eq!(fs::read(cache.snapshot(commit).join(path)).unwrap(), b"12345");
        }
        assert_eq!(cache.commits(), [first.clone(), second.clone()]);
        // As the layout is published, to the letter.
        let link = folder.path().join(format!("models--a--b/snapshots/{first}/d/one"));
        assert_eq!(fs::read_link(link).unwrap(), Path::new("../../../blobs/x"));

        assert_eq!(cache.unlink(&first, "d/one", None).unwrap(), 0);
        assert_eq!(cache.unlink(&first, "two", None).unwrap(), 0);
        assert_eq!(cache.unlink(&second, "d/one", None).unwrap(), 5);
        assert!(!cache.blob("x").exists());
        assert_eq!(cache.unlink(&second, "d/one", None).unwrap(), 0, "twice is no error");

        // Killed after the link was removed and before the blob was.
        write_whole(&cache.blob("x"), b"12345").unwrap();
        cache.link(&first, "two", "x").unwrap();
        assert_eq!(cache.unlink(&second, "d/one", Some("x")).unwrap(), 0, "another's blob");
        fs::remove_file(cache.snapshot(&first).join("two")).unwrap();
        assert_eq!(cache.unlink(&second, "d/one", None).unwrap(), 0);
        assert_eq!(cache.unlink(&second, "d/one", Some("x")).unwrap(), 5);
        assert!(!cache.blob("x").exists());

        cache.set_reference("main", &second).unwrap();
        assert_eq!(cache.reference("main"), Some(second));
        write_whole(&cache.root().join("refs/odd"), b"../../x").unwrap();
        assert_eq!(cache.reference("odd"), None);
    }
}
