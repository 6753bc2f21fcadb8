//! What is known of a snapshot's files: `.pyraflow/pulled.json` in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::OWN_FOLDER;
use super::cache::write_whole;
use crate::{Error, Result};

const NAME: &str = "pulled.json";

/// The files of a snapshot by their path in the repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(default)]
    pub files: BTreeMap<String, FileRecord>,
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileRecord {
    /// Its blob's name, which is its hash.
    pub blob: String,
    /// Its length.
    pub bytes: u64,
    /// Whether pyraflow downloaded it; what others did is never removed for its size.
    pub ours: bool,
    /// The blob's time of change when its hash was found right, in nanoseconds since 1970.
    pub checked: Option<u64>,
    /// Whether its weights are in the store, so that the file itself need not be there.
    pub converted: bool,
}

impl FileRecord {
    /// Whether the file at `path` is the one that was checked, as far as can be told
    /// without reading it.
    pub fn still_checked(&self, path: &Path) -> bool {
        let now = fs::metadata(path).ok().map(|m| (m.len(), modified(&m)));
        self.checked.is_some_and(|time| now == Some((self.bytes, time)))
    }
}

/// A file's time of change, in nanoseconds since 1970.
pub(super) fn modified(metadata: &fs::Metadata) -> u64 {
    let time = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    time.and_then(|t| u64::try_from(t.as_nanos()).ok()).unwrap_or(0)
}

impl Record {
    /// The record of a snapshot; an empty one if there is none that can be read, which
    /// costs no more than another look at the files.
    pub fn read(snapshot: &Path) -> Record {
        let text = fs::read(snapshot.join(OWN_FOLDER).join(NAME)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Writes the record, whole or not at all.
    pub fn write(&self, snapshot: &Path) -> Result<()> {
        let path = snapshot.join(OWN_FOLDER).join(NAME);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::model("cannot describe the files").because(e))?;
        write_whole(&path, text.as_bytes())
    }
}
