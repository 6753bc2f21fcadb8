//! What several test files share; each is compiled with its own copy.
#![allow(dead_code)]

pub mod golden;
pub mod networks;
pub mod runs;

use std::path::PathBuf;

/// The folder of reference data measured from the published implementation.
pub fn goldens() -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    std::env::var_os("PYRAFLOW_GOLDENS").map_or_else(own, PathBuf::from)
}

/// The folder with the tokenizers of the published checkpoints, if there is one.
pub fn vocabularies() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("PYRAFLOW_VOCABULARIES")?);
    folder.is_dir().then_some(folder)
}
