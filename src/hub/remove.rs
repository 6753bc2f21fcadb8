//! Removing a model, and nothing that another one needs.

use std::fs;
use std::path::Path;

use super::Hub;
use super::cache::{RepoCache, remove_if_there};
use super::find::commit_of;
use super::manifest::{ModelName, PublishedModel, is_transformer};
use super::record::Record;
use crate::checkpoint::{OWN_FOLDER, Variant, stored_file};
use crate::{Error, ErrorKind, Result};

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Bytes that are free now.
    pub bytes: u64,
    /// Other models that still use what they shared with this one.
    pub kept_for: Vec<String>,
}

impl Hub {
    /// Removes a model from the cache: of a published one its transformer, and the rest if
    /// no other variant is there; of another repository the whole snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::Model`] if there is nothing of it; [`ErrorKind::Io`] if another process
    /// is pulling it, or something cannot be removed.
    pub fn remove(&self, name: &ModelName) -> Result<Removed> {
        let repo = match name {
            ModelName::Published(model) => model.repo(),
            ModelName::Repo(repo, _) => repo.clone(),
        };
        let cache = self.repo_cache(&repo);
        let nothing = || {
            Error::model(format!("{name} is not in {}", self.settings().cache.display()))
                .hint("pyraflow list shows what is there")
        };
        if !cache.root().is_dir() {
            return Err(nothing());
        }
        let Some(_lock) = cache.try_lock_all()? else {
            return Err(Error::new(ErrorKind::Io, format!("{repo} is being pulled"))
                .hint("wait for that, or stop it, then remove it again"));
        };
        let removed = match name {
            ModelName::Published(model) => remove_published(&cache, *model)?,
            ModelName::Repo(_, revision) => match commit_of(&cache, revision) {
                Some(commit) if cache.snapshot(&commit).is_dir() => {
                    let bytes = remove_snapshot(&cache, &commit, &|_| true)?;
                    Some(Removed { bytes, kept_for: Vec::new() })
                }
                _ => None,
            },
        };
        let mut removed = removed.ok_or_else(nothing)?;
        removed.bytes += clean(&cache)?;
        Ok(removed)
    }
}

fn remove_published(cache: &RepoCache, model: PublishedModel) -> Result<Option<Removed>> {
    let own = model.variant.folder();
    let mut removed: Option<Removed> = None;
    for commit in cache.commits() {
        let snapshot = cache.snapshot(&commit);
        if !snapshot.join(own).is_dir()
            && !Record::read(&snapshot).files.keys().any(|p| in_folder(p, own))
        {
            continue;
        }
        let others: Vec<String> = Variant::available(&snapshot)
            .into_iter()
            .filter(|&variant| variant != model.variant)
            .map(|variant| PublishedModel { variant, ..model }.to_string())
            .collect();
        let belongs = |folder: &str| folder == own || others.is_empty() && !is_transformer(folder);
        let removed = removed.get_or_insert(Removed { bytes: 0, kept_for: Vec::new() });
        removed.bytes += remove_snapshot(cache, &commit, &belongs)?;
        removed.kept_for.extend(others);
    }
    Ok(removed)
}

fn in_folder(path: &str, folder: &str) -> bool {
    path.split('/').next() == Some(folder)
}

/// Removes the folders of a snapshot for which `belongs` says so, with their converted
/// forms, partial downloads and records. Returns how many bytes that frees.
fn remove_snapshot(cache: &RepoCache, commit: &str, belongs: &dyn Fn(&str) -> bool) -> Result<u64> {
    let snapshot = cache.snapshot(commit);
    let mut bytes = 0;
    let length = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
    let mut record = Record::read(&snapshot);
    for folder in names_in(&snapshot) {
        if folder == OWN_FOLDER || !belongs(&folder) {
            continue;
        }
        bytes += remove_tree(cache, commit, &folder)?;
        let stored = stored_file(&snapshot, &folder);
        bytes += length(&stored);
        remove_if_there(&stored)?;
    }
    let gone: Vec<String> = record
        .files
        .keys()
        .filter(|path| belongs(path.split('/').next().unwrap_or_default()))
        .cloned()
        .collect();
    for path in gone {
        if let Some(file) = record.files.remove(&path) {
            // A file that another one still needs may have the same contents.
            if record.files.values().all(|other| other.blob != file.blob) {
                let partial = cache.partial(&file.blob);
                bytes += length(&partial);
                remove_if_there(&partial)?;
            }
        }
    }
    if record.files.is_empty() {
        let own = snapshot.join(OWN_FOLDER);
        for name in names_in(&own) {
            remove_if_there(&own.join(name))?;
        }
        let _ = fs::remove_dir(&own);
        let _ = fs::remove_dir(&snapshot);
    } else {
        record.write(&snapshot)?;
    }
    Ok(bytes)
}

/// Removes a file, or a folder and all in it.
fn remove_tree(cache: &RepoCache, commit: &str, path: &str) -> Result<u64> {
    let full = cache.snapshot(commit).join(path);
    if !fs::symlink_metadata(&full).is_ok_and(|metadata| metadata.is_dir()) {
        return cache.unlink(commit, path, None);
    }
    let mut bytes = 0;
    for name in names_in(&full) {
        bytes += remove_tree(cache, commit, &format!("{path}/{name}"))?;
    }
    fs::remove_dir(&full).map_err(|e| Error::io("cannot remove", &full, e))?;
    Ok(bytes)
}

/// Removes what no snapshot is left to use.
fn clean(cache: &RepoCache) -> Result<u64> {
    if !cache.commits().is_empty() {
        return Ok(0);
    }
    let blobs = cache.root().join("blobs");
    let bytes = names_in(&blobs)
        .iter()
        .filter_map(|name| fs::metadata(blobs.join(name)).ok())
        .map(|metadata| metadata.len())
        .sum();
    fs::remove_dir_all(cache.root()).map_err(|e| Error::io("cannot remove", cache.root(), e))?;
    Ok(bytes)
}

/// The names in a folder, sorted.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
