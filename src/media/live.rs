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

#[cfg(test)]
mod tests {
    use mp4_atom::{Atom, Decode, Header, Mdat};

    use super::super::mp4::Mp4Sink;
    use super::super::{Frame, FrameSink, Metadata, VideoSpec};
    use super::*;

    const SPEC: VideoSpec =
        VideoSpec { width: 64, height: 64, fps_num: 24, fps_den: 1, frames: 17 };

    /// Sizes and flags of the samples of each fragment, and all samples.
    fn fragments(mut file: &[u8]) -> (Vec<Vec<TrunEntry>>, Vec<u8>) {
        let whole = file;
        Ftyp::decode(&mut file).expect("ftyp");
        let moov = Moov::decode(&mut file).expect("moov");
        let stbl = &moov.trak[0].mdia.minf.stbl;
        assert!(moov.mvex.is_some() && stbl.stts.entries.is_empty());
        assert_eq!(stbl.stsd.codecs.len(), 1, "the decoder's parameters");
        let (mut fragments, mut data, mut frames) = (Vec::new(), Vec::new(), 0);
        while !file.is_empty() {
            let start = whole.len() - file.len();
            let moof = Moof::decode(&mut file).expect("moof");
            let traf = &moof.traf[0];
            assert_eq!(moof.mfhd.sequence_number as usize, fragments.len() + 1);
            assert!(traf.tfhd.default_base_is_moof);
            let ticks = traf.tfdt.as_ref().expect("a time").base_media_decode_time;
            assert_eq!(ticks, frames * 1000);
            let mdat = Header::decode(&mut file).expect("mdat");
            assert_eq!(mdat.kind, Mdat::KIND);
            let offset = traf.trun[0].data_offset.expect("an offset") as usize;
            assert_eq!(start + offset, whole.len() - file.len(), "where the samples are");
            let entries: Vec<TrunEntry> = traf.trun[0].samples.iter().collect();
            let size: u32 = entries.iter().map(|e| e.size.expect("a size")).sum();
            let (samples, rest) = file.split_at(size as usize);
            assert_eq!(mdat.size, Some(size as usize));
            data.extend_from_slice(samples);
            file = rest;
            frames += entries.len() as u64;
            fragments.push(entries);
        }
        (fragments, data)
    }

    #[test]
    fn every_unit_is_a_fragment_with_the_samples_of_the_final_file() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.mp4");
        let metadata = Metadata { comment: Some("{}".into()) };
        let create = || Mp4Sink::create(&path, &SPEC, &metadata, false).expect("a sink");
        let picture = |i: u32| {
            let at = move |x, y| [(x * 3 + i * 9) as u8, (y * 3) as u8, 90];
            Frame::from_fn(64, 64, at).expect("a frame")
        };
        let mut sink = create();
        sink.show_early().expect("a live file");
        let live = live_path(&path);
        assert_eq!(live.file_name().and_then(|n| n.to_str()), Some("a.live.mp4"));
        for frame in 0..17 {
            sink.push(&picture(frame)).expect("pushed");
            if frame % 8 == 0 {
                sink.settle().expect("settled");
                let (fragments, _) = fragments(&fs::read(&live).expect("the live file"));
                assert_eq!(fragments.len() as u32, frame / 8 + 1);
            }
        }
        let (fragments, data) = fragments(&fs::read(&live).expect("the live file"));
        assert_eq!(fragments.iter().map(Vec::len).collect::<Vec<_>>(), [1, 8, 8]);
        assert_eq!(fragments[0][0].flags, Some(KEY));
        assert_eq!(fragments[1][3].flags, Some(NOT_KEY));
        Box::new(sink).finish().expect("finished");
        assert!(!live.exists());
        let followed = fs::read(&path).expect("the file");
        assert!(followed.ends_with(&data), "the same samples");

        let plain = folder.path().join("b.mp4");
        let mut sink = Mp4Sink::create(&plain, &SPEC, &metadata, false).expect("a sink");
        (0..17).for_each(|frame| sink.push(&picture(frame)).expect("pushed"));
        Box::new(sink).finish().expect("finished");
        assert!(fs::read(&plain).expect("the file") == followed);
    }
}
