//! The bf16 store: each component once more, as one safetensors file made for streaming.
//!
//! Published files are F32, F16, in shards, or pickles. The first use converts a component to
//! one bf16 file; from then on mapping is loading.
//!
//! * **Order**: see [`super::order`]. Blocks are contiguous; q, k and v are adjacent.
//! * **Alignment**: the safetensors format forbids holes, so alignment comes from order. The
//!   header is padded so that the first tensor starts at a multiple of 64 bytes, and tensors
//!   whose size is no multiple of 64 bytes come last, outside their block. All others are
//!   therefore aligned to 64 bytes, in memory too, since maps start on pages. Of the published
//!   weights only the VAE's `decoder.conv_out.conv.bias` and `post_quant_conv.conv.bias` come
//!   last; every tensor is aligned to its element size in any case (see `plan`).
//! * **Values**: rounded to nearest, ties to even; NaN stays NaN, infinities stay, and what
//!   rounds beyond the largest finite bf16 (3.39e38) becomes infinite as IEEE 754 says.
//!   `pos_embed.pos_embed` alone keeps F32: it is a table of sines and cosines that is cut
//!   and resized before it is used, and the reference values were made with it in F32.
//! * **Safety**: written under a temporary name, flushed, read back against a checksum, then
//!   renamed. Two processes that convert at once both finish and one file wins. A later use
//!   compares names, lengths and modification times of the source files recorded in the
//!   header, and converts again if any differs.

mod location;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crc32fast::Hasher;
use half::bf16;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::formats::{WeightFiles, open_safetensors, safetensors_metadata};
use super::mapped::{MappedFile, Stamp};
use super::order::OrderKey;
use super::weights::ComponentWeights;
use crate::tensor::{DType, WeightSource, WeightView};
use crate::{Error, ErrorKind, Result};

pub use location::StoreOptions;

/// Changes when the same source would give another file.
const VERSION: u32 = 1;
/// The key of our record among a safetensors file's metadata.
const RECORD: &str = "pyraflow";
/// Alignment of tensors, in bytes.
const ALIGN: usize = 64;
/// Elements converted at a time.
const CHUNK: usize = 1 << 18;
/// The table that keeps F32.
const F32_TABLE: &str = "pos_embed.pos_embed";

/// Told how many bytes of how many are written; an error stops the conversion and leaves
/// nothing behind.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// What the header says about the file's origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    sources: Vec<SourceFile>,
    /// Checksum of everything after the header, against accidents. (Against tampering there
    /// is none: whoever can write here can write the published files too.)
    crc32: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SourceFile {
    name: String,
    #[serde(flatten)]
    stamp: Stamp,
}

/// A tensor as it will be stored.
#[derive(Debug)]
struct Planned<'a> {
    name: &'a str,
    view: WeightView<'a>,
    dtype: DType,
}

impl Planned<'_> {
    fn bytes(&self) -> usize {
        self.view.len() * self.dtype.bytes()
    }
}

/// Opens a component in bf16: the source itself, a stored file that is still valid, or one
/// that is written now. `name` is the component's folder in the `checkpoint` folder.
pub(super) fn open(
    source: ComponentWeights,
    files: &WeightFiles,
    checkpoint: &Path,
    name: &str,
    options: &StoreOptions,
    progress: Progress<'_>,
) -> Result<ComponentWeights> {
    let plan = plan(&source);
    let converted = plan.iter().all(|tensor| tensor.dtype == tensor.view.dtype);
    if converted && matches!(files, WeightFiles::Safetensors(_)) {
        drop(plan);
        return Ok(source);
    }
    let sources: Vec<SourceFile> = source
        .files()
        .iter()
        .map(|file| SourceFile {
            name: file.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
            stamp: file.stamp(),
        })
        .collect();
    let folders = options.folders(checkpoint)?;
    let file_name = format!("{name}.safetensors");
    for folder in &folders {
        if let Some(stored) = reopen(&folder.join(&file_name), &source, &plan, &sources) {
            return Ok(stored);
        }
    }

    let size = plan.iter().map(Planned::bytes).sum::<usize>() as u64;
    let (folder, mut file) = location::create_in_first(&folders, name, size, source.label())?;
    write(&source, &plan, sources.clone(), file.as_file_mut(), progress)
        .map_err(|e| e.at(format_args!("{} in bf16, in {}", source.label(), folder.display())))?;
    source.check_unchanged()?;
    reopen(file.path(), &source, &plan, &sources)
        .ok_or_else(|| Error::model("its header does not read back as it was written"))
        .and_then(|written| written.check_contents())
        .map_err(|e| e.of_kind(ErrorKind::Io).at(format_args!("{} in bf16", source.label())))?;
    let path = folder.join(&file_name);
    file.persist(&path).map_err(|e| Error::io("cannot rename to", &path, e.error))?;
    // Makes the new name last through a power failure where the file system can.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    ComponentWeights::from_shards(source.label(), vec![open_safetensors(&path)?])
}

/// Opens a converted file by itself. What it was made from may be gone.
pub(crate) fn open_stored(path: &Path) -> Result<ComponentWeights> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    ComponentWeights::from_shards(name, vec![open_safetensors(path)?])
}

impl ComponentWeights {
    /// Compares the contents of a converted file with the checksum made when it was written;
    /// published files hold none and pass. Reads everything.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if the contents were changed or damaged.
    pub fn check_contents(&self) -> Result<()> {
        for file in self.files() {
            let Some(record) = read_record(file) else { continue };
            file.read_ahead();
            let mut hash = Hasher::new();
            let mut at = data_start(file.bytes());
            for chunk in file.bytes()[at..].chunks(4 * CHUNK) {
                hash.update(chunk);
                file.release(at..at + chunk.len());
                at += chunk.len();
            }
            if hex(hash.finalize()) != record.crc32 {
                return Err(Error::model(format!("{} is damaged", file.path().display()))
                    .hint("delete it: it is made again from the published files"));
            }
        }
        Ok(())
    }
}

/// Decides type and order of all tensors.
///
/// Tensors of whole 64-byte lines come first, so all of them are aligned; then the others,
/// larger elements first, so that each is at least aligned to its element size.
fn plan(source: &ComponentWeights) -> Vec<Planned<'_>> {
    let mut plan: Vec<_> = source
        .iter()
        .map(|(name, view)| {
            let keeps_f32 = name == F32_TABLE && view.dtype != DType::Bf16;
            let dtype = if keeps_f32 { DType::F32 } else { DType::Bf16 };
            Planned { name, view, dtype }
        })
        .collect();
    plan.sort_by_cached_key(|tensor| {
        let ragged = !tensor.bytes().is_multiple_of(ALIGN);
        (ragged, ragged && tensor.dtype != DType::F32, OrderKey::of(tensor.name))
    });
    plan
}

/// The stored file at `path` if it is whole and was made from these very source files.
fn reopen(
    path: &Path,
    source: &ComponentWeights,
    plan: &[Planned<'_>],
    sources: &[SourceFile],
) -> Option<ComponentWeights> {
    let shard = path.is_file().then(|| open_safetensors(path).ok())??;
    let record = read_record(&shard.file)?;
    let stored = ComponentWeights::from_shards(source.label(), vec![shard]).ok()?;
    let same = record.version == VERSION
        && record.sources == sources
        && stored.len() == plan.len()
        && plan.iter().all(|tensor| {
            stored
                .weight(tensor.name)
                .is_ok_and(|view| view.dtype == tensor.dtype && view.shape == tensor.view.shape)
        });
    same.then_some(stored)
}

fn read_record(file: &MappedFile) -> Option<Record> {
    serde_json::from_str(safetensors_metadata(file).get(RECORD)?).ok()
}

/// Where the tensors of a safetensors file begin; the caller knows that it is one.
fn data_start(bytes: &[u8]) -> usize {
    let header = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n) as usize);
    header + size_of::<u64>()
}

/// Writes header and tensors; holds one chunk in memory.
fn write(
    source: &ComponentWeights,
    plan: &[Planned<'_>],
    sources: Vec<SourceFile>,
    file: &mut File,
    progress: Progress<'_>,
) -> Result<()> {
    let failed = |e| {
        Error::new(ErrorKind::Io, "cannot write the converted weights")
            .because(e)
            .hint("free some space, or name another folder with --store")
    };
    // The checksum is known last but its length is, so the header is written twice.
    let mut record = Record { version: VERSION, sources, crc32: hex(0) };
    file.write_all(&header(plan, &record)?).map_err(failed)?;
    let total = plan.iter().map(Planned::bytes).sum::<usize>() as u64;
    let mut done = 0u64;
    let mut hash = Hasher::new();
    let (mut floats, mut bytes) = (Vec::new(), Vec::new());
    progress(0, total)?;
    for tensor in plan {
        for start in (0..tensor.view.len()).step_by(CHUNK) {
            let len = CHUNK.min(tensor.view.len() - start);
            convert(tensor, start, len, &mut floats, &mut bytes);
            hash.update(&bytes);
            file.write_all(&bytes).map_err(failed)?;
            done += bytes.len() as u64;
            progress(done, total)?;
        }
        source.release(tensor.name);
    }
    record.crc32 = hex(hash.finalize());
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&header(plan, &record)?).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// Converts `len` elements from `start` on into `bytes`.
fn convert(
    tensor: &Planned<'_>,
    start: usize,
    len: usize,
    floats: &mut Vec<f32>,
    bytes: &mut Vec<u8>,
) {
    bytes.clear();
    let view = &tensor.view;
    if tensor.dtype == view.dtype {
        let size = tensor.dtype.bytes();
        bytes.extend_from_slice(&view.bytes[start * size..(start + len) * size]);
        return;
    }
    floats.resize(len, 0.0);
    view.widen(start, floats);
    match tensor.dtype {
        DType::F32 => bytes.extend_from_slice(bytemuck::cast_slice(floats)),
        _ => bytes.extend(floats.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
    }
}

/// The length field and the JSON header, padded so that the data begins on a line.
fn header(plan: &[Planned<'_>], record: &Record) -> Result<Vec<u8>> {
    let mut end = 0;
    let tensors = plan.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes();
        let dtype = match tensor.dtype {
            DType::F32 => Dtype::F32,
            _ => Dtype::BF16,
        };
        let shape = tensor.view.shape.to_vec();
        (tensor.name.to_owned(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let failed = || Error::model("cannot describe the converted weights");
    let record = serde_json::to_string(record).map_err(|e| failed().because(e))?;
    let metadata = HashMap::from([(RECORD.to_owned(), record)]);
    let metadata =
        Metadata::new(Some(metadata), tensors.collect()).map_err(|e| failed().because(e))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| failed().because(e))?;
    let length = size_of::<u64>();
    json.resize((length + json.len()).next_multiple_of(ALIGN) - length, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Always eight digits, so that the header's length does not depend on the checksum.
fn hex(checksum: u32) -> String {
    format!("{checksum:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_rounds_to_nearest_even_and_keeps_what_is_not_finite() {
        let half_ulp = |bits: u16, low: u16| f32::from_bits(u32::from(bits) << 16 | u32::from(low));
        let cases = [
            (1.0, 0x3f80),
            (half_ulp(0x3f80, 0x8000), 0x3f80), // a tie goes to the even neighbour below
            (half_ulp(0x3f81, 0x8000), 0x3f82), // and above
            (half_ulp(0x3f80, 0x8001), 0x3f81),
            (half_ulp(0x3fff, 0x8000), 0x4000), // carries into the exponent
            (half_ulp(0x0000, 0x8001), 0x0001), // subnormal
            (-0.0, 0x8000),
            (f32::INFINITY, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
            (half_ulp(0x7f7f, 0x7fff), 0x7f7f),
            (f32::MAX, 0x7f80),
        ];
        let values: Vec<f32> =
            cases.iter().map(|c| c.0).chain([f32::from_bits(0x7f80_0001)]).collect();
        let view = WeightView {
            dtype: DType::F32,
            shape: &[values.len()],
            bytes: bytemuck::cast_slice(&values),
        };
        let tensor = Planned { name: "t", view, dtype: DType::Bf16 };
        let mut bytes = Vec::new();
        convert(&tensor, 0, values.len(), &mut Vec::new(), &mut bytes);
        let bits: Vec<u16> = bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        for ((value, expected), got) in cases.iter().zip(&bits) {
            assert_eq!(got, expected, "{value:e}: {got:04x}");
        }
        // A NaN whose payload lies in the lower half must not turn into an infinity.
        assert!(bf16::from_bits(bits[cases.len()]).is_nan());
    }
}
