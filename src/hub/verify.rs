//! Reading everything again: hashes, checksums and values.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::hash::{Digest, sha256_of};
use super::manifest::{Manifest, PublishedModel};
use super::record::Record;
use crate::checkpoint::{OWN_FOLDER, Summary, open_stored, stored_file};
use crate::tensor::{DType, WeightView};
use crate::{Error, Result};

/// What was found out about a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileCheck {
    /// Its path below the checkpoint's folder.
    pub path: String,
    /// What was found.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Whether a file is what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// It is.
    Right {
        /// By what: the published hash, the server's, or the conversion's checksum.
        by: &'static str,
    },
    /// Nothing is known to hold it to.
    Unknown {
        /// Its SHA-256.
        sha256: String,
    },
    /// It is something else.
    Damaged {
        /// Why.
        reason: String,
    },
    /// It is not there.
    Missing,
}

impl FileCheck {
    /// Whether this file stands in the way of a run.
    pub fn failed(&self) -> bool {
        matches!(self.verdict, Verdict::Damaged { .. } | Verdict::Missing)
    }
}

const PUBLISHED: &str = "published sha256";
const SERVER: &str = "the server's hash";
const STORED: &str = "checksum of the conversion";

/// Checks all files of the checkpoint in `folder`, and with `values` all its weights for NaN
/// and infinity. `manifest` says what should be there; without it, what is there is checked.
/// `step` is told of the bytes read, out of all. What is damaged is fetched by the next pull.
///
/// # Errors
/// [`crate::ErrorKind::Model`] if there is no checkpoint; [`crate::ErrorKind::Io`] if a file
/// cannot be read; what `step` returns. Damage is in the result.
pub fn verify_folder(
    folder: &Path,
    manifest: Option<&Manifest>,
    values: bool,
    step: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Vec<FileCheck>> {
    let summary = Summary::read(folder);
    if manifest.is_none() && summary.components.is_empty() {
        return Err(Error::model(format!("{} holds no checkpoint", folder.display()))
            .hint("name the folder that holds diffusion_transformer_768p or the like"));
    }
    let record = Record::read(folder);
    let names = names(folder, manifest, &record);
    let stored: Vec<String> = stored_names(folder)
        .into_iter()
        .filter(|of| manifest.is_none_or(|manifest| manifest.folders().contains(&of.as_str())))
        .collect();
    let length = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
    let passes = if values { 2 } else { 1 };
    let total = names.keys().map(|name| length(&folder.join(name))).sum::<u64>()
        + passes * stored.iter().map(|of| length(&stored_file(folder, of))).sum::<u64>()
        + if values { summary.components.iter().map(|c| c.bytes).sum() } else { 0 };
    let mut done = 0;
    let mut step = |bytes: u64| {
        done += bytes;
        step(done.min(total), total)
    };
    let mut checks = Vec::new();
    for (path, digest) in &names {
        let file = folder.join(path);
        let verdict = if file.is_file() {
            check_file(&file, path, digest.as_ref(), &mut step)?
        } else if record.files.get(path).is_some_and(|r| r.converted)
            && stored.contains(&path.split('/').next().unwrap_or_default().to_owned())
        {
            continue; // Its converted form stands for it, below.
        } else {
            Verdict::Missing
        };
        checks.push(FileCheck { path: path.clone(), verdict });
    }
    for of in &stored {
        let path = stored_file(folder, of);
        let verdict = check_stored(&path, values, &mut step);
        step(length(&path))?;
        let path = format!("{OWN_FOLDER}/{of}.safetensors");
        checks.push(FileCheck { path, verdict: verdict? });
    }
    forget_damaged(folder, record, &checks);
    if values {
        check_published_values(folder, &summary, &mut checks, &mut step)?;
    }
    Ok(checks)
}

/// Makes the next pull look at files again that an earlier one found right.
fn forget_damaged(folder: &Path, mut record: Record, checks: &[FileCheck]) {
    let before = record.clone();
    for check in checks.iter().filter(|check| check.failed()) {
        let own = check.path.strip_prefix(OWN_FOLDER).and_then(|p| p.strip_prefix('/'));
        let of = own.and_then(|name| name.strip_suffix(".safetensors"));
        for (path, file) in &mut record.files {
            if *path == check.path || of.is_some() && path.split('/').next() == of {
                (file.checked, file.converted) = (None, false);
            }
        }
    }
    if record != before {
        // Where that cannot be written nothing can be pulled either.
        let _ = record.write(folder);
    }
}

/// The files to check, and what each must hash to where that is known.
fn names(
    folder: &Path,
    manifest: Option<&Manifest>,
    record: &Record,
) -> BTreeMap<String, Option<(Digest, &'static str)>> {
    let mut names: BTreeMap<String, Option<(Digest, &'static str)>> = BTreeMap::new();
    match manifest {
        Some(manifest) => {
            for file in &manifest.files {
                let pinned = file.sha256.clone().map(|hash| (Digest::Sha256(hash), PUBLISHED));
                names.insert(file.path.clone(), pinned);
            }
        }
        None => {
            for part in names_in(folder).into_iter().filter(|name| name != OWN_FOLDER) {
                for file in names_in(&folder.join(&part)) {
                    let path = format!("{part}/{file}");
                    if folder.join(&path).is_file() {
                        names.insert(path, None);
                    }
                }
            }
            names.extend(record.files.keys().map(|path| (path.clone(), None)));
        }
    }
    for (path, digest) in &mut names {
        if digest.is_none() {
            // A link to a blob says its hash; so does the record of a pull.
            let link = fs::read_link(folder.join(path)).ok();
            let blob = link.as_ref().and_then(|target| target.file_name()?.to_str());
            let known = blob.or_else(|| Some(record.files.get(path)?.blob.as_str()));
            *digest = known.and_then(Digest::of_etag).map(|digest| (digest, SERVER));
        }
    }
    names
}

fn check_file(
    file: &Path,
    path: &str,
    expected: Option<&(Digest, &'static str)>,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Verdict> {
    if let Some((digest, by)) = expected {
        return Ok(if digest.matches(file, step)? {
            Verdict::Right { by }
        } else {
            Verdict::Damaged { reason: format!("its hash is not {}", digest.name()) }
        });
    }
    let sha256 = sha256_of(file, step)?;
    let published = PublishedModel::ALL.iter().any(|model| {
        let files = model.manifest().files;
        files.iter().any(|f| f.path == path && f.sha256.as_ref() == Some(&sha256))
    });
    Ok(if published { Verdict::Right { by: PUBLISHED } } else { Verdict::Unknown { sha256 } })
}

fn check_stored(
    path: &Path,
    values: bool,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Verdict> {
    let checked = open_stored(path).and_then(|weights| weights.check_contents().map(|()| weights));
    let weights = match checked {
        Ok(weights) => weights,
        Err(error) => return Ok(Verdict::Damaged { reason: error.to_string() }),
    };
    let bad = if values { scan(weights.iter(), step)? } else { None };
    Ok(bad.map_or(Verdict::Right { by: STORED }, |reason| Verdict::Damaged { reason }))
}

/// Scans the weights that are used as they were published.
fn check_published_values(
    folder: &Path,
    summary: &Summary,
    checks: &mut Vec<FileCheck>,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    use crate::checkpoint::{Checkpoint, Component};
    for (index, variant) in summary.variants.iter().enumerate() {
        let Ok(checkpoint) = Checkpoint::open(folder, Some(variant.name())) else { continue };
        let parts = checkpoint.family().components().iter();
        for &component in parts.filter(|&&c| index == 0 || c == Component::Transformer) {
            // What cannot be opened was found damaged or missing above.
            let Ok(weights) = checkpoint.source_weights(component) else { continue };
            let paths: Vec<String> = weights
                .paths()
                .filter_map(|path| Some(path.strip_prefix(folder).ok()?.to_str()?.to_owned()))
                .collect();
            if paths.iter().any(|path| path.starts_with(OWN_FOLDER)) {
                continue;
            }
            if let Some(reason) = scan(weights.iter(), step)? {
                let path = paths.join(", ");
                checks.retain(|check| !paths.contains(&check.path));
                checks.push(FileCheck { path, verdict: Verdict::Damaged { reason } });
            }
        }
    }
    Ok(())
}

/// Looks for NaN and infinity; says where they are.
fn scan<'w>(
    tensors: impl Iterator<Item = (&'w str, WeightView<'w>)>,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Option<String>> {
    const NAMED: usize = 5;
    let mut bad = Vec::new();
    for (name, view) in tensors {
        let count = not_finite(&view);
        if count > 0 {
            bad.push(format!("{count} of {} values of {name}", view.len()));
        }
        step(view.bytes.len() as u64)?;
    }
    let more = bad.len().saturating_sub(NAMED);
    bad.truncate(NAMED);
    let more = if more > 0 { format!(" and {more} more tensors") } else { String::new() };
    Ok((!bad.is_empty()).then(|| format!("NaN or infinite: {}{more}", bad.join(", "))))
}

/// Values of a tensor that are NaN or infinite: those whose exponent has all bits set.
fn not_finite(view: &WeightView<'_>) -> usize {
    let half = |mask: u16| {
        let bits = view.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        bits.filter(|bits| bits & mask == mask).count()
    };
    match view.dtype {
        DType::Bf16 => half(0x7f80),
        DType::F16 => half(0x7c00),
        DType::F32 => view
            .bytes
            .chunks_exact(4)
            .filter(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite())
            .count(),
        DType::U32 => 0,
    }
}

/// The parts whose converted form lies in the checkpoint's own folder.
fn stored_names(folder: &Path) -> Vec<String> {
    let names = names_in(&folder.join(OWN_FOLDER)).into_iter();
    names.filter_map(|name| Some(name.strip_suffix(".safetensors")?.to_owned())).collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_counted_in_every_type() {
        let values = [1.0f32, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 65504.0, -0.0, 1e-7];
        let f16: Vec<u8> =
            values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let bf16: Vec<u8> =
            values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let f32: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (dtype, bytes) in [(DType::F16, &f16), (DType::Bf16, &bf16), (DType::F32, &f32)] {
            let view = WeightView { dtype, shape: &[values.len()], bytes };
            assert_eq!(not_finite(&view), 3, "{dtype}");
        }
    }
}
