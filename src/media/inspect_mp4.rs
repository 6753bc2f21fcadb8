//! The index of an MP4 file, as far as [`super::inspect()`] needs it.
//!
//! Boxes are found by their own short walk rather than by decoding the whole index: boxes may
//! nest without end in a hostile file, and most of what is there is of no interest.

use std::io::{Read, Seek, SeekFrom};

use mp4_atom::{
    Atom, DecodeAtom, Desc, FourCC, Hdlr, Header, Ilst, Mdhd, Mdia, Meta, Minf, Moov, ReadFrom,
    Stbl, Stsd, Stsz, StszSamples, Trak, Udta,
};

use super::inspect::{MediaInfo, Unreadable};
use super::output::Format;

/// Most bytes of an index that are read: that of a ten-second video is a few thousand.
const MAX_INDEX: u64 = 64 << 20;

const DAMAGED: Unreadable = Unreadable::Content("the index of the mp4 file is damaged");

/// Reads the index, wherever in the file it is.
pub(super) fn inspect(
    reader: &mut (impl Read + Seek),
    max_comment: usize,
) -> Result<MediaInfo, Unreadable> {
    let index = find_index(reader)?;
    let mut tracks = children(&index).filter(|(kind, _)| *kind == Trak::KIND).map(|(_, body)| body);
    let video = tracks.find_map(Track::read);
    let track = video.ok_or(Unreadable::Content("the mp4 file has no video track"))?;
    let comment = at(&index, &[Udta::KIND, Meta::KIND])
        // A `meta` box begins with its version, four bytes.
        .and_then(|meta| at(meta.get(4..)?, &[Ilst::KIND, Desc::KIND]))
        .and_then(leaf::<Desc>)
        .map(|description| description.text)
        .filter(|text| text.len() <= max_comment);
    Ok(MediaInfo {
        format: Format::Mp4,
        width: track.width,
        height: track.height,
        frames: track.frames,
        duration: track.duration,
        comment,
    })
}

/// The content of the `moov` box.
fn find_index(reader: &mut (impl Read + Seek)) -> Result<Vec<u8>, Unreadable> {
    while let Some(header) = Option::<Header>::read_from(reader).map_err(|e| match e {
        mp4_atom::Error::Io(e) => Unreadable::from(e),
        _ => DAMAGED,
    })? {
        // A box without a size is the last one.
        let Some(size) = header.size.map(|size| size as u64) else { break };
        if header.kind != Moov::KIND {
            let size = i64::try_from(size).map_err(|_| DAMAGED)?;
            reader.seek(SeekFrom::Current(size)).map_err(|_| DAMAGED)?;
            continue;
        }
        if size > MAX_INDEX {
            return Err(DAMAGED);
        }
        let mut index = Vec::new();
        reader.take(size).read_to_end(&mut index)?;
        return if index.len() as u64 == size { Ok(index) } else { Err(DAMAGED) };
    }
    Err(Unreadable::Content("the mp4 file has no index"))
}

/// What a video track says about itself.
struct Track {
    width: u32,
    height: u32,
    frames: u64,
    duration: Option<f64>,
}

impl Track {
    /// `None` if the track is not a video or is damaged.
    fn read(body: &[u8]) -> Option<Self> {
        let media = at(body, &[Mdia::KIND])?;
        if leaf::<Hdlr>(at(media, &[Hdlr::KIND])?)?.handler != FourCC::new(b"vide") {
            return None;
        }
        let time = leaf::<Mdhd>(at(media, &[Mdhd::KIND])?)?;
        let table = at(media, &[Minf::KIND, Stbl::KIND])?;
        let frames = match leaf::<Stsz>(at(table, &[Stsz::KIND])?)?.samples {
            StszSamples::Identical { count, .. } => u64::from(count),
            StszSamples::Different { sizes } => sizes.len() as u64,
        };
        // Version and number of entries, then a sample entry of any codec: 6 + 2 + 16 bytes,
        // width and height (ISO/IEC 14496-12, 12.1.3).
        let (_, entry) = children(at(table, &[Stsd::KIND])?.get(8..)?).next()?;
        let &[w0, w1, h0, h1] = entry.get(24..)?.first_chunk()?;
        Some(Track {
            width: u16::from_be_bytes([w0, w1]).into(),
            height: u16::from_be_bytes([h0, h1]).into(),
            frames,
            duration: (time.timescale > 0)
                .then(|| time.duration as f64 / f64::from(time.timescale)),
        })
    }
}

/// The boxes that `bytes` consist of, up to the first that is damaged.
fn children(mut bytes: &[u8]) -> impl Iterator<Item = (FourCC, &[u8])> {
    std::iter::from_fn(move || {
        let (size, rest) = bytes.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        // 64-bit sizes are for the samples; no box of an index needs one.
        let size = (u32::from_be_bytes(*size) as usize).checked_sub(8)?;
        let (body, rest) = rest.split_at_checked(size)?;
        bytes = rest;
        Some((FourCC::from(*kind), body))
    })
}

/// The content of the box at `path` below `bytes`.
fn at<'a>(bytes: &'a [u8], path: &[FourCC]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |bytes, kind| {
        children(bytes).find(|(child, _)| child == kind).map(|(_, body)| body)
    })
}

/// The meaning of a box that has no children.
fn leaf<A: Atom>(body: &[u8]) -> Option<A> {
    A::decode_atom(&Header { kind: A::KIND, size: Some(body.len()) }, &mut &*body).ok()
}
