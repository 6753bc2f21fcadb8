//! An MP4 that can be watched while it is written: movie fragments (ISO/IEC 14496-12, 8.8).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use mp4_atom::{
    Encode, Ftyp, Mfhd, Moof, Moov, Mvex, Stco, Stsc, Stsz, Tfdt, Tfhd, Traf, Trex, Trun,
    TrunEntry, TrunSamples,
};

use super::pending::write_error;
use crate::{Error, ErrorKind, Result};

/// Flags of samples (8.8.3.1): whether they depend on others, and whether they are no key.
const KEY: u32 = 2 << 24;
const NOT_KEY: u32 = 1 << 24 | 1 << 16;

/// The file, beside the output. It is removed when dropped.
pub(super) struct LiveFile {
    path: PathBuf,
    file: File,
    frame_ticks: u32,
    /// Fragments so far.
    fragments: u32,
    /// Frames in them.
    frames: u64,
    entries: Vec<TrunEntry>,
    data: Vec<u8>,
}

/// `name.mp4` as it grows: `name.live.mp4`.
pub(super) fn live_path(path: &Path) -> PathBuf {
    path.with_extension("live.mp4")
}

impl LiveFile {
    /// Starts the file; `frame_ticks` is how long a frame lasts.
    pub(super) fn create(path: &Path, frame_ticks: u32) -> Result<LiveFile> {
        let path = live_path(path);
        // A new file, should a player still show that of an earlier run.
        if path.is_file() {
            fs::remove_file(&path).map_err(|e| write_error(&path, e))?;
        }
        let file = File::create_new(&path).map_err(|e| write_error(&path, e))?;
        let (entries, data) = (Vec::new(), Vec::new());
        Ok(LiveFile { path, file, frame_ticks, fragments: 0, frames: 0, entries, data })
    }

    /// Adds a coded frame.
    pub(super) fn push(&mut self, sample: &[u8], key: bool) -> Result<()> {
        self.entries.push(TrunEntry {
            duration: None,
            size: Some(u32::try_from(sample.len()).map_err(invalid)?),
            flags: Some(if key { KEY } else { NOT_KEY }),
            cts: None,
        });
        self.data.extend_from_slice(sample);
        Ok(())
    }

    /// Writes what was added as a fragment. `moov` makes the index of a video without samples,
    /// which the first fragment needs before it.
    pub(super) fn settle(&mut self, moov: impl FnOnce() -> Result<(Ftyp, Moov)>) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        if self.fragments == 0 {
            let (ftyp, mut moov) = moov()?;
            empty(&mut moov, self.frame_ticks);
            ftyp.encode(&mut bytes).map_err(invalid)?;
            moov.encode(&mut bytes).map_err(invalid)?;
        }
        self.fragments += 1;
        let frames = self.entries.len() as u64;
        // The position of the samples depends on the size of what stands before them.
        let entries = std::mem::take(&mut self.entries);
        let length = encoded(&self.moof(&entries, 0))?.len();
        let offset = i32::try_from(length + 8).map_err(invalid)?;
        bytes.extend(encoded(&self.moof(&entries, offset))?);
        let size = u32::try_from(self.data.len() + 8).map_err(invalid)?;
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(b"mdat");
        bytes.append(&mut self.data);
        self.frames += frames;
        self.file.write_all(&bytes).map_err(|e| write_error(&self.path, e))
    }

    fn moof(&self, entries: &[TrunEntry], offset: i32) -> Moof {
        let ticks = self.frames * u64::from(self.frame_ticks);
        Moof {
            mfhd: Mfhd { sequence_number: self.fragments },
            traf: vec![Traf {
                tfhd: Tfhd {
                    track_id: 1,
                    default_sample_duration: Some(self.frame_ticks),
                    default_base_is_moof: true,
                    ..Tfhd::default()
                },
                tfdt: Some(Tfdt { base_media_decode_time: ticks }),
                trun: vec![Trun {
                    data_offset: Some(offset),
                    samples: TrunSamples::Explicit(entries.to_vec()),
                }],
                ..Traf::default()
            }],
        }
    }
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        // Complete or given up, the output has its own name; this one has served.
        let _ = fs::remove_file(&self.path);
    }
}

/// Makes of an index one whose samples are in fragments.
fn empty(moov: &mut Moov, frame_ticks: u32) {
    moov.mvex = Some(Mvex {
        mehd: None,
        trex: vec![Trex {
            track_id: 1,
            default_sample_description_index: 1,
            default_sample_duration: frame_ticks,
            default_sample_size: 0,
            default_sample_flags: 0,
        }],
    });
    moov.mvhd.duration = 0;
    for track in &mut moov.trak {
        (track.tkhd.duration, track.mdia.mdhd.duration) = (0, 0);
        let table = &mut track.mdia.minf.stbl;
        table.stts.entries.clear();
        (table.stss, table.co64) = (None, None);
        table.stsc = Stsc::default();
        table.stsz = Stsz::default();
        table.stco = Some(Stco { entries: Vec::new() });
    }
}

fn encoded(moof: &Moof) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    moof.encode(&mut bytes).map_err(invalid)?;
    Ok(bytes)
}

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Io, "cannot make a fragment of the mp4").because(reason)
}
