//! MP4 out: one H.264 track (ISO/IEC 14496-12 and -15), index first so that it plays while
//! it loads.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use mp4_atom::{
    Atom, Avc1, Avcc, AvccExt, Co64, Codec, Colr, Desc, Dinf, Dref, DrefEntry, Encode, FixedPoint,
    Ftyp, Hdlr, Ilst, Matrix, Mdat, Mdhd, Mdia, Meta, Minf, Moov, Mvhd, Pasp, Stbl, Stco, Stsc,
    StscEntry, Stsd, Stss, Stsz, StszSamples, Stts, SttsEntry, Tkhd, Tool, Trak, Udta, Url, Visual,
    Vmhd,
};

use super::h264::{AvcEncoder, ParameterSets};
use super::live::LiveFile;
use super::pending::{PendingFile, directory_of, write_error};
use super::yuv::Yuv420;
use super::{Frame, FrameSink, Metadata, VideoSpec};
use crate::{Error, ErrorKind, Result};

/// Longer and shorter side that the encoder takes at most.
pub(super) const MAX_SIDES: (u32, u32) = (3840, 2160);
/// Shorter side that the encoder takes at least.
pub(super) const MIN_SIDE: u32 = 16;
/// Colour primaries, transfer and matrix of BT.709 in ISO/IEC 23091-2, as in the bit stream.
const BT709: u16 = 1;
/// Clock ticks per second for each unit of `fps_num`: a frame lasts `1000 · fps_den` ticks.
const TICKS: u32 = 1000;

/// Writes one MP4. Coded samples wait in an unnamed file on the same disk until their number
/// and sizes are known, for the index comes first.
pub(super) struct Mp4Sink {
    path: PathBuf,
    spec: VideoSpec,
    comment: Option<String>,
    overwrite: bool,
    encoder: AvcEncoder,
    planes: Yuv420,
    samples: BufWriter<File>,
    sizes: Vec<u32>,
    /// Numbers of the key frames, from 1.
    keys: Vec<u32>,
    live: Option<LiveFile>,
}

impl Mp4Sink {
    /// Opens the encoder and the file for the samples.
    pub(super) fn create(
        path: &Path,
        spec: &VideoSpec,
        metadata: &Metadata,
        overwrite: bool,
    ) -> Result<Self> {
        let samples =
            tempfile::tempfile_in(directory_of(path)).map_err(|e| write_error(path, e))?;
        Ok(Mp4Sink {
            path: path.into(),
            spec: *spec,
            comment: metadata.comment.clone(),
            overwrite,
            encoder: AvcEncoder::new(spec)?,
            planes: Yuv420::new(spec.width, spec.height),
            samples: BufWriter::with_capacity(1 << 20, samples),
            sizes: Vec::new(),
            keys: Vec::new(),
            live: None,
        })
    }

    fn track(&self) -> Track<'_> {
        Track {
            spec: &self.spec,
            parameters: self.encoder.parameters(),
            sizes: &self.sizes,
            keys: &self.keys,
        }
    }
}

impl FrameSink for Mp4Sink {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        self.planes.fill(frame);
        let sample = self.encoder.encode(&self.planes)?;
        self.samples.write_all(&sample.data).map_err(|e| write_error(&self.path, e))?;
        self.sizes.push(u32::try_from(sample.data.len()).map_err(invalid)?);
        if sample.key {
            self.keys.push(self.sizes.len() as u32);
        }
        match &mut self.live {
            Some(live) => live.push(&sample.data, sample.key),
            None => Ok(()),
        }
    }

    fn settle(&mut self) -> Result<()> {
        let Some(mut live) = self.live.take() else { return Ok(()) };
        live.settle(|| {
            let layout = Layout { data: 0, wide: false };
            Ok((file_type(), moov_box(&self.track(), self.comment.as_deref(), layout)?))
        })?;
        self.live = Some(live);
        Ok(())
    }

    fn show_early(&mut self) -> Result<()> {
        let ticks = self.track().frame_ticks()?;
        self.live = Some(LiveFile::create(&self.path, ticks)?);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let failed = |e| write_error(&self.path, e);
        let track = self.track();
        let data_size = track.data_size();
        let head = head(&track, self.comment.as_deref())?;
        let mut samples = self.samples.into_inner().map_err(|e| failed(e.into_error()))?;
        samples.rewind().map_err(failed)?;
        let mut file = PendingFile::create(&self.path)?;
        file.write_all(&head).map_err(failed)?;
        let copied = io::copy(&mut samples, &mut file).map_err(failed)?;
        if copied != data_size {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        file.commit(self.overwrite)
    }
}

/// What the index is made from.
struct Track<'a> {
    spec: &'a VideoSpec,
    parameters: &'a ParameterSets,
    sizes: &'a [u32],
    keys: &'a [u32],
}

/// Where the chunks of samples are, in a file whose index has not been written yet.
#[derive(Clone, Copy)]
struct Layout {
    /// Position of the first sample.
    data: u64,
    /// Whether positions take 64 bits.
    wide: bool,
}

impl Track<'_> {
    fn frames(&self) -> u32 {
        self.sizes.len() as u32
    }

    fn data_size(&self) -> u64 {
        self.sizes.iter().map(|&size| u64::from(size)).sum()
    }

    fn timescale(&self) -> Result<u32> {
        self.spec.fps_num.checked_mul(TICKS).ok_or_else(|| invalid("frame rate"))
    }

    fn frame_ticks(&self) -> Result<u32> {
        self.spec.fps_den.checked_mul(TICKS).ok_or_else(|| invalid("frame rate"))
    }

    fn duration(&self) -> Result<u64> {
        Ok(u64::from(self.frames()) * u64::from(self.frame_ticks()?))
    }

    /// Samples per chunk: a second of video.
    fn chunk(&self) -> u32 {
        self.spec.fps_num.div_ceil(self.spec.fps_den).max(1)
    }

    fn chunk_offsets(&self, data: u64) -> Vec<u64> {
        let chunks = self.sizes.chunks(self.chunk() as usize);
        chunks
            .scan(data, |next, chunk| {
                let here = *next;
                *next += chunk.iter().map(|&size| u64::from(size)).sum::<u64>();
                Some(here)
            })
            .collect()
    }
}

fn file_type() -> Ftyp {
    Ftyp {
        major_brand: b"isom".into(),
        minor_version: 512,
        compatible_brands: [b"isom", b"iso2", b"avc1", b"mp41"].map(Into::into).to_vec(),
    }
}

/// Everything before the samples: `ftyp`, `moov` and the header of `mdat`.
fn head(track: &Track, comment: Option<&str>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file_type().encode(&mut bytes).map_err(invalid)?;
    let mdat = mdat_header(track.data_size());
    // The positions in the index depend on its size, which depends on how wide they are.
    let data_with = |wide| -> Result<u64> {
        let mut moov = Vec::new();
        moov_box(track, comment, Layout { data: 0, wide })?.encode(&mut moov).map_err(invalid)?;
        Ok((bytes.len() + moov.len() + mdat.len()) as u64)
    };
    let mut layout = Layout { data: data_with(true)?, wide: true };
    if layout.data + track.data_size() <= u64::from(u32::MAX) {
        layout = Layout { data: data_with(false)?, wide: false };
    }
    moov_box(track, comment, layout)?.encode(&mut bytes).map_err(invalid)?;
    bytes.extend_from_slice(&mdat);
    Ok(bytes)
}

/// The header of a `mdat` box with `size` bytes of content.
fn mdat_header(size: u64) -> Vec<u8> {
    let kind = <[u8; 4]>::from(Mdat::KIND);
    match u32::try_from(size + 8) {
        Ok(size) => [size.to_be_bytes(), kind].concat(),
        Err(_) => {
            let mut header = [1u32.to_be_bytes(), kind].concat();
            header.extend_from_slice(&(size + 16).to_be_bytes());
            header
        }
    }
}

/// The index. Times of creation stay zero: the same video is the same file.
fn moov_box(track: &Track, comment: Option<&str>, layout: Layout) -> Result<Moov> {
    let VideoSpec { width, height, .. } = *track.spec;
    let sides = (u16::try_from(width).map_err(invalid)?, u16::try_from(height).map_err(invalid)?);
    let identity = Matrix { a: 1 << 16, d: 1 << 16, w: 1 << 30, ..Matrix::default() };
    let (timescale, duration) = (track.timescale()?, track.duration()?);
    Ok(Moov {
        mvhd: Mvhd {
            timescale,
            duration,
            rate: FixedPoint::from(1),
            volume: FixedPoint::from(1),
            matrix: identity.clone(),
            next_track_id: 2,
            ..Mvhd::default()
        },
        trak: vec![Trak {
            tkhd: Tkhd {
                track_id: 1,
                duration,
                enabled: true,
                in_movie: true,
                matrix: identity,
                width: sides.0.into(),
                height: sides.1.into(),
                ..Tkhd::default()
            },
            mdia: Mdia {
                mdhd: Mdhd { timescale, duration, language: "und".into(), ..Mdhd::default() },
                hdlr: Hdlr { handler: b"vide".into(), name: "VideoHandler".into() },
                minf: Minf {
                    vmhd: Some(Vmhd::default()),
                    dinf: Dinf { dref: Dref { entries: vec![DrefEntry::Url(Url::default())] } },
                    stbl: sample_table(track, sides, layout)?,
                    ..Minf::default()
                },
            },
            ..Trak::default()
        }],
        udta: Some(user_data(comment)),
        ..Moov::default()
    })
}

fn sample_table(track: &Track, sides: (u16, u16), layout: Layout) -> Result<Stbl> {
    let offsets = track.chunk_offsets(layout.data);
    let (stco, co64) = if layout.wide {
        (None, Some(Co64 { entries: offsets }))
    } else {
        let entries = offsets.into_iter().map(u32::try_from).collect::<Result<_, _>>();
        (Some(Stco { entries: entries.map_err(invalid)? }), None)
    };
    Ok(Stbl {
        stsd: Stsd { codecs: vec![Codec::Avc1(sample_entry(track.parameters, sides)?)] },
        stts: Stts {
            entries: vec![SttsEntry {
                sample_count: track.frames(),
                sample_delta: track.frame_ticks()?,
            }],
        },
        stss: Some(Stss { entries: track.keys.to_vec() }),
        stsc: chunk_sizes(track.frames(), track.chunk()),
        stsz: Stsz { samples: StszSamples::Different { sizes: track.sizes.to_vec() } },
        stco,
        co64,
        ..Stbl::default()
    })
}

/// All chunks have `chunk` samples but the last, which has the rest.
fn chunk_sizes(frames: u32, chunk: u32) -> Stsc {
    let (full, rest) = (frames / chunk, frames % chunk);
    let entry = |first_chunk, samples_per_chunk| StscEntry {
        first_chunk,
        samples_per_chunk,
        sample_description_index: 1,
    };
    let mut entries = Vec::new();
    if full > 0 {
        entries.push(entry(1, chunk));
    }
    if rest > 0 {
        entries.push(entry(full + 1, rest));
    }
    Stsc { entries }
}

fn sample_entry(parameters: &ParameterSets, sides: (u16, u16)) -> Result<Avc1> {
    let mut avcc = Avcc::new(&parameters.sps, &parameters.pps).map_err(invalid)?;
    // Profile High says here what its parameter set says: 4:2:0, 8 bits.
    avcc.ext = Some(AvccExt::default());
    Ok(Avc1 {
        visual: Visual {
            data_reference_index: 1,
            width: sides.0,
            height: sides.1,
            ..Visual::default()
        },
        avcc,
        colr: Some(Colr::Nclx {
            colour_primaries: BT709,
            transfer_characteristics: BT709,
            matrix_coefficients: BT709,
            full_range_flag: false,
        }),
        pasp: Some(Pasp { h_spacing: 1, v_spacing: 1 }),
        ..Avc1::default()
    })
}

/// The list of tags that players show, `moov/udta/meta/ilst`.
fn user_data(comment: Option<&str>) -> Udta {
    let text = |text: &str| text.to_string();
    let mut meta =
        Meta { hdlr: Hdlr { handler: b"mdir".into(), name: String::new() }, items: Vec::new() };
    meta.push(Ilst {
        desc: comment.map(|comment| Desc {
            country_indicator: 0,
            language_indicator: 0,
            text: text(comment),
        }),
        ctoo: Some(Tool {
            country_indicator: 0,
            language_indicator: 0,
            text: concat!("pyraflow ", env!("CARGO_PKG_VERSION")).into(),
        }),
        ..Ilst::default()
    });
    Udta { meta: Some(meta), ..Udta::default() }
}

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Io, "cannot make the index of the mp4").because(reason)
}

#[cfg(test)]
mod tests {
    use mp4_atom::Decode;

    use super::*;

    const SPEC: VideoSpec =
        VideoSpec { width: 1280, height: 768, fps_num: 24, fps_den: 1, frames: 0 };

    fn parsed(sizes: &[u32]) -> (Stbl, u64) {
        let parameters = ParameterSets { sps: vec![0x67, 100, 0, 40, 1], pps: vec![0x68, 1] };
        let track = Track { spec: &SPEC, parameters: &parameters, sizes, keys: &[1] };
        let bytes = head(&track, Some("{}")).unwrap();
        let mut rest = &bytes[..];
        Ftyp::decode(&mut rest).unwrap();
        let mut moov = Moov::decode(&mut rest).unwrap();
        // The header of mdat is all that is left, and says how much follows.
        let header = mp4_atom::Header::decode(&mut rest).unwrap();
        assert_eq!(header.kind, Mdat::KIND);
        assert_eq!(header.size, Some(track.data_size() as usize));
        assert!(rest.is_empty());
        (moov.trak.remove(0).mdia.minf.stbl, bytes.len() as u64)
    }

    #[test]
    fn chunks_hold_a_second_and_follow_each_other() {
        let sizes: Vec<u32> = (1..=60).collect();
        let (table, start) = parsed(&sizes);
        assert_eq!(table.co64, None);
        let offsets = table.stco.unwrap().entries;
        let before =
            |samples: usize| start + sizes[..samples].iter().map(|s| u64::from(*s)).sum::<u64>();
        assert_eq!(
            offsets.iter().map(|o| u64::from(*o)).collect::<Vec<_>>(),
            [0, 24, 48].map(before)
        );
        let chunks: Vec<_> =
            table.stsc.entries.iter().map(|e| (e.first_chunk, e.samples_per_chunk)).collect();
        assert_eq!(chunks, [(1, 24), (3, 12)]);
    }

    #[test]
    fn more_than_four_gibibytes_take_wide_positions() {
        let size = 100 << 20;
        let (table, start) = parsed(&[size; 50]);
        assert_eq!(table.stco, None);
        let offset = |samples: u64| start + samples * u64::from(size);
        assert_eq!(table.co64.unwrap().entries, [0, 24, 48].map(offset));
        let (table, _) = parsed(&[size; 40]);
        assert!(table.co64.is_none() && table.stco.is_some());
    }
}
