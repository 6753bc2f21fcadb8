//! Weight files written by `torch.save`: a zip archive of a pickle and one stored record of
//! raw numbers per storage, `<prefix>/data.pkl` and `<prefix>/data/<key>`. The prefix is
//! whatever the file was called when it was saved.
//!
//! Records are never compressed, so tensors are used where they lie in the mapped file.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use super::formats::Found;
use super::mapped::MappedFile;
use super::pickle::{self, PickledTensor};
use crate::{Error, Result};

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// Lists the tensors of a `.bin` file.
///
/// # Errors
/// [`crate::ErrorKind::Model`] if it is not such an archive, imports anything but tensors, or
/// a tensor does not lie within its record.
pub(super) fn read(file: &MappedFile) -> Result<Vec<Found>> {
    list(file.bytes()).map_err(|e| e.at(file.path().display()))
}

fn list(bytes: &[u8]) -> Result<Vec<Found>> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| {
        Error::model("not a whole zip archive, as torch.save writes since PyTorch 1.6")
            .because(e)
            .hint("the download may have been interrupted: fetch the file again")
    })?;
    let prefix = find_prefix(&archive)?;
    let pickle = record(&mut archive, bytes, &format!("{prefix}data.pkl"))?;
    check_byte_order(&mut archive, bytes, &prefix)?;

    let mut records = HashMap::new();
    let mut found = Vec::new();
    for (name, tensor) in pickle::read_state_dict(&bytes[pickle])? {
        let key = tensor.storage.key;
        let place = match records.get(key) {
            Some(place) => Range::clone(place),
            None => {
                let place = record(&mut archive, bytes, &format!("{prefix}data/{key}"))?;
                records.insert(key, place.clone());
                place
            }
        };
        found.push(locate(name, tensor, place).map_err(|e| e.at(format_args!("{name:?}")))?);
    }
    Ok(found)
}

/// The one folder that holds `data.pkl`, with its trailing slash.
fn find_prefix(archive: &Archive) -> Result<String> {
    let mut prefixes = archive
        .file_names_raw()
        .filter_map(|name| std::str::from_utf8(name).ok()?.strip_suffix("data.pkl"))
        .filter(|prefix| prefix.ends_with('/'));
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok(prefix.to_owned()),
        (None, _) => {
            Err(Error::model("the archive holds no data.pkl: torch.save did not write it"))
        }
        (Some(_), Some(_)) => Err(Error::model("the archive holds more than one data.pkl")),
    }
}

/// Where the contents of a record lie in the file.
fn record(archive: &mut Archive, bytes: &[u8], name: &str) -> Result<Range<usize>> {
    let broken = |what: &str| Error::model(format!("record {name:?} {what}"));
    let index = archive.index_for_name(name).ok_or_else(|| broken("is missing"))?;
    let entry = archive.by_index_raw(index).map_err(|e| broken("cannot be read").because(e))?;
    if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
        return Err(broken("is compressed or encrypted; torch.save stores records as they are"));
    }
    if entry.size() != entry.compressed_size() {
        return Err(broken("has two sizes"));
    }
    let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
    let len = usize::try_from(entry.size()).ok();
    start
        .zip(len)
        .and_then(|(start, len)| Some(start..start.checked_add(len)?))
        .filter(|range| range.end <= bytes.len())
        .ok_or_else(|| broken("reaches past the end of the file"))
}

/// Files saved before PyTorch 2.1 have no such record and are little endian in practice.
fn check_byte_order(archive: &mut Archive, bytes: &[u8], prefix: &str) -> Result<()> {
    let name = format!("{prefix}byteorder");
    if archive.index_for_name(&name).is_none() {
        return Ok(());
    }
    match &bytes[record(archive, bytes, &name)?] {
        b"little" => Ok(()),
        _ => Err(Error::model("the file was saved on a big-endian machine")),
    }
}

/// Checks that a tensor lies within its record; all arithmetic is on untrusted numbers.
fn locate(name: &str, tensor: PickledTensor<'_>, record: Range<usize>) -> Result<Found> {
    let PickledTensor { storage, offset, shape, strides } = tensor;
    let size = storage.dtype.bytes();
    if storage.len.checked_mul(size) != Some(record.len()) {
        return Err(Error::model(format!(
            "record {:?} has {} bytes, expected {} numbers of {}",
            storage.key,
            record.len(),
            storage.len,
            storage.dtype
        )));
    }
    let outside = || Error::model(format!("its elements lie outside record {:?}", storage.key));
    let len = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(outside)?;
    // The index after its last element. A tensor larger than its storage would be one
    // value repeated, which no saved weight is and which would need memory out of nothing.
    let end = if len == 0 {
        Some(offset)
    } else {
        let mut extents = shape.iter().zip(&strides);
        extents
            .try_fold(offset, |last, (&extent, &stride)| {
                last.checked_add((extent - 1).checked_mul(stride)?)
            })
            .and_then(|last| last.checked_add(1))
    };
    let end = end.filter(|&end| end <= storage.len && len <= storage.len).ok_or_else(outside)?;
    let strides = (!is_contiguous(&shape, &strides)).then_some(strides);
    Ok(Found {
        name: name.to_owned(),
        dtype: storage.dtype,
        shape,
        // Within the record, whose bounds are usize, so these products cannot overflow.
        bytes: record.start + offset * size..record.start + end * size,
        strides,
    })
}

/// Whether the elements lie in row-major order without gaps.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    for (&extent, &stride) in shape.iter().zip(strides).rev() {
        if extent != 1 && stride != expected {
            return shape.contains(&0);
        }
        expected = expected.saturating_mul(extent);
    }
    true
}
