//! Checkpoints through the public interface: the golden ones, damaged ones, and the store.

#[path = "checkpoint/bin.rs"]
mod bin;
#[path = "checkpoint/goldens.rs"]
mod goldens;
#[path = "checkpoint/safetensors.rs"]
mod safetensors;
#[path = "checkpoint/store.rs"]
mod store;

use std::fs;
use std::path::{Path, PathBuf};

use pyraflow::checkpoint::{Checkpoint, Component, ComponentWeights};
use tempfile::TempDir;

/// The golden checkpoints there are.
fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let found: Vec<_> =
        ["sd3", "flux"].iter().map(|name| root.join(name)).filter(|dir| dir.is_dir()).collect();
    assert!(!found.is_empty(), "no golden checkpoint in {}", root.display());
    found
}

fn golden(family: &str) -> PathBuf {
    let found = goldens().into_iter().find(|dir| dir.ends_with(family));
    found.unwrap_or_else(|| panic!("no golden checkpoint {family}"))
}

/// A copy of a golden checkpoint to damage, tokenizers left out.
fn copy_of(family: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for folder in fs::read_dir(golden(family)).unwrap().map(|e| e.unwrap().path()) {
        if folder.is_dir() && !folder.file_name().unwrap().to_str().unwrap().contains("tokenizer") {
            let target = copy.path().join(folder.file_name().unwrap());
            fs::create_dir(&target).unwrap();
            for file in fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()) {
                // Read and written, so that read-only goldens give writable copies.
                fs::write(target.join(file.file_name().unwrap()), fs::read(&file).unwrap())
                    .unwrap();
            }
        }
    }
    copy
}

fn components(checkpoint: &Checkpoint) -> Vec<Component> {
    checkpoint.family().components().to_vec()
}

/// Names, shapes and values, widened to f32 bits so that NaN compares too.
fn values(weights: &ComponentWeights) -> Vec<(String, Vec<usize>, Vec<u32>)> {
    weights
        .iter()
        .map(|(name, view)| {
            let bits = view.to_f32().into_iter().map(f32::to_bits).collect();
            (name.to_owned(), view.shape.to_vec(), bits)
        })
        .collect()
}

/// Puts a new file in the place of another. Overwriting would make some file systems wait for
/// the disk each time.
fn replace(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}
