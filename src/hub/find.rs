//! Which models are in the cache, and where.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Hub;
use super::cache::RepoCache;
use super::manifest::{ModelName, PublishedModel};
use super::names::{RepoId, is_commit};
use crate::checkpoint::{OWN_FOLDER, Summary, Variant, missing_parts};
use crate::{Error, Result};

/// How much of a model is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// All that text to video needs.
    Complete,
    /// Some of it.
    Partial,
    /// Nothing.
    Absent,
}

/// A model and what there is of it.
#[derive(Debug, Clone, Serialize)]
pub struct Installed {
    /// Its name for `--model`.
    pub name: String,
    /// How much of it is there.
    pub state: State,
    /// Its folder, if there is one.
    pub folder: Option<PathBuf>,
    /// What its files take, those shared with another variant included.
    pub bytes: u64,
    /// What is missing, as paths below the folder.
    pub missing: Vec<String>,
}

impl Hub {
    /// The folder of a complete model in the cache.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if it is not there, or not all of it.
    pub fn locate(&self, name: &ModelName) -> Result<PathBuf> {
        let (folder, missing) = self.find(name)?;
        if missing.is_empty() {
            return Ok(folder);
        }
        Err(Error::model(format!(
            "{name} is incomplete in {}; missing: {}",
            folder.display(),
            missing.join(", ")
        ))
        .hint(format!("fetch the rest with: pyraflow pull {name}")))
    }

    /// The folder of a model in the cache, complete or not.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if nothing of it is there.
    pub fn folder_of(&self, name: &ModelName) -> Result<PathBuf> {
        Ok(self.find(name)?.0)
    }

    /// The published models and what there is of each, then other checkpoints in the cache.
    pub fn installed(&self) -> Vec<Installed> {
        let mut all: Vec<Installed> =
            PublishedModel::ALL.iter().map(|&model| self.published_state(model)).collect();
        let mut others: Vec<RepoId> = fs::read_dir(&self.settings().cache)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| RepoId::of_folder(entry.file_name().to_str()?))
            .filter(|repo| PublishedModel::ALL.iter().all(|model| model.repo() != *repo))
            .collect();
        others.sort_by_key(RepoId::to_string);
        all.extend(others.iter().filter_map(|repo| self.repo_state(repo)));
        all
    }

    /// The folder of a model, and what is missing in it.
    fn find(&self, name: &ModelName) -> Result<(PathBuf, Vec<String>)> {
        match name {
            ModelName::Published(model) => self.find_published(*model),
            ModelName::Repo(repo, revision) => self.find_repo(repo, revision),
        }
        .ok_or_else(|| {
            Error::model(format!("{name} is not in {}", self.settings().cache.display()))
                .hint(format!("fetch it with: pyraflow pull {name}"))
        })
    }

    fn published_state(&self, model: PublishedModel) -> Installed {
        let name = model.to_string();
        let Some((folder, missing)) = self.find_published(model) else {
            return Installed {
                name,
                state: State::Absent,
                folder: None,
                bytes: 0,
                missing: Vec::new(),
            };
        };
        let state = if missing.is_empty() { State::Complete } else { State::Partial };
        let bytes = size_of_model(&folder, Some(model.variant));
        Installed { name, state, folder: Some(folder), bytes, missing }
    }

    fn repo_state(&self, repo: &RepoId) -> Option<Installed> {
        let (folder, missing) = self.find_repo(repo, "main")?;
        let state = if missing.is_empty() { State::Complete } else { State::Partial };
        let bytes = size_of_model(&folder, None);
        Some(Installed { name: repo.to_string(), state, folder: Some(folder), bytes, missing })
    }

    /// The snapshot with most of a published model, and what it lacks: that of the pinned
    /// commit, else the one that is `main`, else any.
    fn find_published(&self, model: PublishedModel) -> Option<(PathBuf, Vec<String>)> {
        let cache = self.repo_cache(&model.repo());
        let mut commits = vec![model.manifest().revision];
        commits.extend(cache.reference("main"));
        commits.extend(cache.commits());
        let folders = commits.iter().map(|commit| cache.snapshot(commit));
        let there = folders.filter(|folder| folder.join(model.variant.folder()).is_dir());
        there
            .map(|folder| {
                let missing = missing_parts(&folder, model.family, model.variant);
                (folder, missing)
            })
            .min_by_key(|(_, missing)| missing.len())
    }

    fn find_repo(&self, repo: &RepoId, revision: &str) -> Option<(PathBuf, Vec<String>)> {
        let cache = self.repo_cache(repo);
        let folder = cache.snapshot(&commit_of(&cache, revision)?);
        let summary = Summary::read(&folder);
        (!summary.variants.is_empty()).then_some((folder, summary.missing))
    }
}

/// The commit that a revision is in the cache.
pub(super) fn commit_of(cache: &RepoCache, revision: &str) -> Option<String> {
    if is_commit(revision) {
        return Some(revision.to_owned());
    }
    // Without a reference, the only commit there is must be it.
    cache.reference(revision).or_else(|| match cache.commits().as_slice() {
        [only] if revision == "main" => Some(only.clone()),
        _ => None,
    })
}

/// What the files of a model take: those in the folders that the variant needs, and their
/// converted forms.
fn size_of_model(folder: &Path, variant: Option<Variant>) -> u64 {
    let belongs = |name: &str| {
        let transformer = Variant::ALL.iter().find(|v| v.folder() == name);
        transformer.is_none_or(|t| variant.is_none_or(|variant| variant == *t))
    };
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for part in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = part.file_name().to_string_lossy().into_owned();
        for file in fs::read_dir(part.path()).into_iter().flatten().flatten() {
            let file_name = file.file_name().to_string_lossy().into_owned();
            let of = if name == OWN_FOLDER {
                file_name.strip_suffix(".safetensors").unwrap_or_default().to_owned()
            } else {
                name.clone()
            };
            // Two names may be one blob.
            let Ok(path) = fs::canonicalize(file.path()) else { continue };
            if belongs(&of) && seen.insert(path.clone()) {
                bytes += fs::metadata(path).map_or(0, |m| if m.is_file() { m.len() } else { 0 });
            }
        }
    }
    bytes
}
