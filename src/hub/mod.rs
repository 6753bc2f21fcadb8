//! Models by name: fetched from Hugging Face's hub into its cache, checked, converted,
//! listed and removed.
//!
//! The cache is that of Hugging Face's own tools, layout, variables and locks included, so
//! what they downloaded is used and what is downloaded here they can use. Nothing from the
//! network is believed: names are checked before they become paths, and a file gets its
//! name only when its contents have the hash that is pinned here, or, where none is, that
//! the server gave.

mod cache;
mod client;
mod convert;
mod events;
mod find;
mod hash;
mod listing;
mod lock;
mod manifest;
mod monitor;
mod names;
mod pull;
mod record;
mod remove;
mod settings;
mod survey;
mod transfer;
mod verify;
mod work;

pub use events::{Event, Outcome, Stage, Watcher};
pub use find::{Installed, State};
pub use manifest::{Manifest, ManifestFile, ModelName, PublishedModel};
pub use names::RepoId;
pub use pull::{PullOptions, Pulled};
pub use remove::Removed;
pub use settings::{PUBLIC_ENDPOINT, Settings, Token};
pub use transfer::Tries;
pub use verify::{FileCheck, Verdict, verify_folder};

use crate::checkpoint::OWN_FOLDER;

/// A hub and the cache of what was fetched from it.
#[derive(Debug, Clone)]
pub struct Hub {
    settings: Settings,
}

impl Hub {
    /// With these settings.
    pub fn new(settings: Settings) -> Hub {
        Hub { settings }
    }

    /// With the settings of this process, see [`Settings::from_env`].
    ///
    /// # Errors
    /// Those of [`Settings::from_env`].
    pub fn from_env() -> crate::Result<Hub> {
        Ok(Hub::new(Settings::from_env()?))
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn repo_cache(&self, repo: &RepoId) -> cache::RepoCache {
        cache::RepoCache::new(&self.settings.cache, repo)
    }
}
