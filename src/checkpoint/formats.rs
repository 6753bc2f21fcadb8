//! The three forms in which a component's weights are published: one safetensors file,
//! safetensors shards with an index, or a `torch.save` archive.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::mapped::{MappedFile, read_small};
use super::torch_bin;
use crate::tensor::DType;
use crate::{Error, Result};

/// Largest index read (the published one has 20 KB).
const MAX_INDEX: u64 = 16 << 20;

/// A tensor and where it lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// The tensor's bytes; with `strides`, from its first to its last element.
    pub bytes: Range<usize>,
    /// Element strides, where the tensor does not lie row-major without gaps.
    pub strides: Option<Vec<usize>>,
}

/// A mapped file and the tensors used of it.
#[derive(Debug)]
pub(super) struct Shard {
    pub file: MappedFile,
    pub tensors: Vec<Found>,
}

/// The weights of one component on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WeightFiles {
    /// One safetensors file.
    Safetensors(PathBuf),
    /// The index of safetensors shards beside it.
    Sharded(PathBuf),
    /// A `torch.save` archive.
    TorchBin(PathBuf),
}

impl WeightFiles {
    /// Finds the weights in `folder`: `<stem>.safetensors`, else the index of its shards,
    /// else `<bin>`.
    pub fn find(folder: &Path, stem: &str, bin: &str) -> Option<Self> {
        let single = folder.join(format!("{stem}.safetensors"));
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        let bin = folder.join(bin);
        if single.is_file() {
            Some(WeightFiles::Safetensors(single))
        } else if index.is_file() {
            Some(WeightFiles::Sharded(index))
        } else {
            bin.is_file().then_some(WeightFiles::TorchBin(bin))
        }
    }

    /// Maps the files and lists their tensors; reads headers, an index or a pickle only.
    pub fn open(&self) -> Result<Vec<Shard>> {
        match self {
            WeightFiles::Safetensors(path) => Ok(vec![open_safetensors(path)?]),
            WeightFiles::Sharded(index) => open_sharded(index),
            WeightFiles::TorchBin(path) => {
                let file = MappedFile::open(path)?;
                let tensors = torch_bin::read(&file)?;
                Ok(vec![Shard { file, tensors }])
            }
        }
    }

    /// The files that are there, and the names of shards that are not.
    pub fn files(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        match self {
            WeightFiles::Safetensors(path) | WeightFiles::TorchBin(path) => {
                Ok((vec![path.clone()], Vec::new()))
            }
            WeightFiles::Sharded(index) => {
                let shards = read_index(index)?;
                let paths = shards.keys().map(|shard| index.with_file_name(shard));
                let (mut there, missing): (Vec<_>, Vec<_>) = paths.partition(|p| p.is_file());
                there.insert(0, index.clone());
                Ok((there, missing))
            }
        }
    }
}

/// Maps one safetensors file. The `safetensors` crate checks the header: its length against
/// the file and a cap, UTF-8, JSON, overlaps and holes, sizes against shapes and dtypes, and
/// that the file ends where the last tensor does.
pub(super) fn open_safetensors(path: &Path) -> Result<Shard> {
    let file = MappedFile::open(path)?;
    let tensors = list_safetensors(file.bytes()).map_err(|e| e.at(path.display()))?;
    Ok(Shard { file, tensors })
}

fn list_safetensors(bytes: &[u8]) -> Result<Vec<Found>> {
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        let error = Error::model("not a whole safetensors file").because(e);
        match bytes.first_chunk().map(|n| u64::from_le_bytes(*n)) {
            Some(n) if n < bytes.len() as u64 => error,
            _ => error.hint("the download may have been interrupted: fetch the file again"),
        }
    })?;
    let data = header + size_of::<u64>();
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => {
                    return Err(Error::model(format!(
                        "{name:?} is stored as {other}; F32, F16 and BF16 can be read"
                    )));
                }
            };
            let (start, end) = info.data_offsets;
            let bytes = data + start..data + end;
            Ok(Found { name, dtype, shape: info.shape.clone(), bytes, strides: None })
        })
        .collect()
}

/// The free-form entries of a safetensors header.
pub(super) fn safetensors_metadata(file: &MappedFile) -> BTreeMap<String, String> {
    SafeTensors::read_metadata(file.bytes())
        .ok()
        .and_then(|(_, metadata)| metadata.metadata().clone())
        .map(|entries| entries.into_iter().collect())
        .unwrap_or_default()
}

/// The index of a sharded checkpoint: tensor names by shard file.
fn read_index(path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = read_small(path, MAX_INDEX)?;
    let index: Index = serde_json::from_str(&text).map_err(|e| {
        Error::model(format!("{} is not an index of shards", path.display())).because(e)
    })?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        // A shard lies beside its index; a name that could point elsewhere is an attack.
        if shard.contains(['/', '\\', '\0']) || !shard.ends_with(".safetensors") {
            return Err(Error::model(format!(
                "{}: {tensor:?} is said to be in {shard:?}, which is not the name of a shard",
                path.display()
            )));
        }
        shards.entry(shard).or_default().insert(tensor);
    }
    Ok(shards)
}

/// Opens all shards; their tensors must be exactly those that the index says.
fn open_sharded(index: &Path) -> Result<Vec<Shard>> {
    let listed = read_index(index)?;
    let mut missing = Vec::new();
    let mut shards = Vec::new();
    let mut faults = Vec::new();
    for (name, expected) in &listed {
        let path = index.with_file_name(name);
        if !path.is_file() {
            missing.push(name.as_str());
            continue;
        }
        let shard = open_safetensors(&path)?;
        let present: BTreeSet<_> = shard.tensors.iter().map(|t| t.name.clone()).collect();
        faults.extend(expected.difference(&present).map(|t| format!("{t} is not in {name}")));
        faults.extend(
            present.difference(expected).map(|t| format!("{t} is in {name} but not listed there")),
        );
        shards.push(shard);
    }
    if !missing.is_empty() {
        let folder = index.parent().unwrap_or(index);
        return Err(Error::model(format!(
            "{} of {} shards are missing in {}: {}",
            missing.len(),
            listed.len(),
            folder.display(),
            missing.join(", ")
        ))
        .hint("the download is incomplete: fetch the missing files"));
    }
    if !faults.is_empty() {
        return Err(Error::model(format!(
            "{} and its shards disagree: {}",
            index.display(),
            super::shorten(&faults, "; ")
        )));
    }
    Ok(shards)
}
