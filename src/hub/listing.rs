//! What files a repository has.

use std::io::Read;

use serde::Deserialize;

use super::Hub;
use super::client::{Ask, Client, Fault, connection};
use super::manifest::{Manifest, ModelName, checkpoint_files};
use super::monitor::Monitor;
use super::names::{RepoId, check_file, encode_path, is_commit};
use super::record::Record;
use super::transfer::Tries;
use crate::checkpoint::Variant;
use crate::{Error, Result};

/// Longest listing read: thousands of files.
const MAX_LISTING: u64 = 16 << 20;

#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// The files of a model: the pinned ones of a published model, else what the server
    /// lists now (when offline: what was pulled). `variant` picks one of the transformers
    /// of a repository; a published name has picked one already.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Network`] if the server cannot be asked or does not know the
    /// repository; [`crate::ErrorKind::Model`] if that is no checkpoint or has a file whose
    /// name leads elsewhere; [`crate::ErrorKind::Usage`] if `variant` contradicts the name.
    pub fn manifest(&self, name: &ModelName, variant: Option<Variant>) -> Result<Manifest> {
        let (repo, revision) = match name {
            ModelName::Published(model) => {
                return match variant {
                    Some(other) if other != model.variant => Err(Error::usage(format!(
                        "{model} has no {other} model; leave the variant out"
                    ))),
                    _ => Ok(model.manifest()),
                };
            }
            ModelName::Repo(repo, revision) => (repo, revision),
        };
        if self.settings().offline {
            return self.pulled_manifest(repo, revision, variant);
        }
        let client = Client::new(self.settings());
        let listing =
            Tries::default().repeat(&Monitor::default(), || listing(&client, repo, revision))?;
        let all: Vec<String> = listing.siblings.into_iter().map(|s| s.rfilename).collect();
        // One such name, and nothing of this repository is to be believed.
        all.iter().try_for_each(|name| check_file(name))?;
        let files = checkpoint_files(&all, variant);
        if !files.iter().any(|file| super::manifest::is_transformer(&file.path)) {
            let what = variant.map_or(String::new(), |v| format!(" with a {v} model"));
            return Err(Error::model(format!("{repo} holds no Pyramid Flow checkpoint{what}"))
                .hint("a checkpoint has a folder diffusion_transformer_384p or the like"));
        }
        let reference = (listing.sha != *revision).then(|| revision.clone());
        Ok(Manifest { repo: repo.clone(), revision: listing.sha, reference, files })
    }

    /// What an earlier pull of the repository fetched.
    fn pulled_manifest(
        &self,
        repo: &RepoId,
        revision: &str,
        variant: Option<Variant>,
    ) -> Result<Manifest> {
        let cache = self.repo_cache(repo);
        let commit =
            if is_commit(revision) { Some(revision.to_owned()) } else { cache.reference(revision) };
        let record = commit.as_ref().map(|commit| Record::read(&cache.snapshot(commit)));
        let (Some(commit), Some(record)) = (commit, record.filter(|r| !r.files.is_empty())) else {
            return Err(Error::network(format!(
                "{repo} was not pulled yet, and HF_HUB_OFFLINE is set"
            ))
            .hint("unset HF_HUB_OFFLINE and pull again"));
        };
        let all: Vec<String> = record.files.into_keys().collect();
        all.iter().try_for_each(|name| check_file(name))?;
        let files = checkpoint_files(&all, variant);
        Ok(Manifest { repo: repo.clone(), revision: commit, reference: None, files })
    }
}

fn listing(client: &Client<'_>, repo: &RepoId, revision: &str) -> Result<Listing, Fault> {
    // A branch may have a `/` in its name, which this address takes escaped only.
    let revision = encode_path(revision).replace('/', "%2F");
    let path = format!("/api/models/{repo}/revision/{revision}");
    let reply = client.send(&path, repo, Ask::From(0), &|_| false)?;
    let place = reply.place;
    let mut text = Vec::new();
    let body = reply.response.into_body().into_reader();
    body.take(MAX_LISTING).read_to_end(&mut text).map_err(|e| connection(&place, e.into()))?;
    let listing: Listing = serde_json::from_slice(&text).map_err(|e| {
        Fault::fatal(
            Error::network(format!("{place} does not list the files of {repo}"))
                .because(e)
                .hint("check HF_ENDPOINT: this server does not answer as a hub does"),
        )
    })?;
    if !is_commit(&listing.sha) {
        return Err(Fault::fatal(Error::network(format!(
            "{place} names no commit of {repo}, but {:?}",
            listing.sha
        ))));
    }
    Ok(listing)
}
