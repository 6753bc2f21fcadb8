//! What several tests share.
#![allow(dead_code)]

pub mod golden;

use std::path::PathBuf;

/// The folder of golden files: `PYRAFLOW_GOLDENS`, or the copy in the repository.
pub fn goldens() -> PathBuf {
    std::env::var_os("PYRAFLOW_GOLDENS")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens").into(), PathBuf::from)
}
