//! Animated GIF out.

use std::path::Path;

use gif::{Encoder, EncodingError, Extension, Repeat};

use super::pending::{PendingFile, write_error};
use super::{Frame, FrameSink, Metadata, VideoSpec};
use crate::{Error, ErrorKind, Result};

/// Most pixels of a frame that the palette is made from.
const PALETTE_PIXELS: usize = 1 << 15;
/// How many of those the quantiser looks at, 1 (all) to 30 (few).
const PALETTE_SPEED: i32 = 3;

/// Writes one GIF; every frame has its own palette of 256 colours.
pub(super) struct GifSink {
    encoder: Encoder<PendingFile>,
    spec: VideoSpec,
    pushed: u32,
    overwrite: bool,
}

impl GifSink {
    /// Starts the file.
    pub(super) fn create(
        path: &Path,
        spec: &VideoSpec,
        metadata: &Metadata,
        overwrite: bool,
    ) -> Result<Self> {
        let failed = |e| gif_error(path, e);
        let (width, height) = sides(spec.width, spec.height)?;
        let mut encoder =
            Encoder::new(PendingFile::create(path)?, width, height, &[]).map_err(failed)?;
        encoder.set_repeat(Repeat::Infinite).map_err(failed)?;
        if let Some(comment) = &metadata.comment {
            encoder
                .write_raw_extension(Extension::Comment.into(), &[comment.as_bytes()])
                .map_err(failed)?;
        }
        Ok(GifSink { encoder, spec: *spec, pushed: 0, overwrite })
    }
}

impl FrameSink for GifSink {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        let (width, height) = sides(frame.width(), frame.height())?;
        let palette = palette_of(frame);
        let picture = gif::Frame {
            width,
            height,
            delay: delay(self.pushed, &self.spec),
            buffer: indices(frame, &palette).into(),
            palette: Some(palette.into_flattened()),
            ..gif::Frame::default()
        };
        self.pushed += 1;
        let result = self.encoder.write_frame(&picture);
        result.map_err(|e| gif_error(self.encoder.get_ref().target(), e))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let target = self.encoder.get_ref().target().to_path_buf();
        let file = self.encoder.into_inner().map_err(|e| gif_error(&target, e))?;
        file.commit(self.overwrite)
    }
}

/// The at most 256 colours that stand for all of a frame: the crate's neural quantiser,
/// trained on as many pixels as are enough for it.
fn palette_of(frame: &Frame) -> Vec<[u8; 3]> {
    let pixels = frame.data().as_chunks::<3>().0;
    let step = pixels.len().div_ceil(PALETTE_PIXELS);
    let sample: Vec<u8> = pixels.iter().step_by(step).flatten().copied().collect();
    let count = (sample.len() / 3) as u16; // PALETTE_PIXELS at most
    let quantised = gif::Frame::from_rgb_speed(count, 1, &sample, PALETTE_SPEED);
    quantised.palette.unwrap_or_default().as_chunks().0.to_vec()
}

/// The nearest colour of the palette for every pixel. It is searched once for each colour of
/// five bits per channel: a palette of 256 is coarser than that.
fn indices(frame: &Frame, palette: &[[u8; 3]]) -> Vec<u8> {
    let mut found: Vec<Option<u8>> = vec![None; 1 << 15];
    let nearest = |rgb: &[u8; 3]| {
        let distance = |colour: &[u8; 3]| -> u32 {
            colour.iter().zip(rgb).map(|(a, b)| u32::from(a.abs_diff(*b)).pow(2)).sum()
        };
        let best = (0..palette.len()).min_by_key(|&i| distance(&palette[i]));
        best.unwrap_or_default() as u8
    };
    let pixels = frame.data().as_chunks::<3>().0.iter();
    pixels
        .map(|rgb| {
            let key = rgb.iter().fold(0, |key, &c| key << 5 | usize::from(c >> 3));
            *found[key].get_or_insert_with(|| nearest(rgb))
        })
        .collect()
}

/// How long frame `index` is shown, in hundredths of a second. GIF has no finer unit, so 24
/// frames per second are a mix of 4 and 5 that never drifts from the true time.
fn delay(index: u32, spec: &VideoSpec) -> u16 {
    let end_of = |frames: u64| {
        let (num, den) = (u64::from(spec.fps_num), u64::from(spec.fps_den));
        (frames * 100 * den + num / 2) / num
    };
    let index = u64::from(index);
    u16::try_from(end_of(index + 1) - end_of(index)).unwrap_or(u16::MAX)
}

fn sides(width: u32, height: u32) -> Result<(u16, u16)> {
    match (u16::try_from(width), u16::try_from(height)) {
        (Ok(width), Ok(height)) => Ok((width, height)),
        _ => Err(Error::usage(format!("{width}x{height} is too large for a GIF"))),
    }
}

fn gif_error(path: &Path, error: EncodingError) -> Error {
    match error {
        EncodingError::Io(e) => write_error(path, e),
        other => {
            Error::new(ErrorKind::Io, format!("cannot write {}", path.display())).because(other)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_add_up_to_the_true_time() {
        for (fps_num, fps_den) in [(24, 1), (8, 1), (30000, 1001)] {
            let spec = VideoSpec { width: 1, height: 1, fps_num, fps_den, frames: 241 };
            let mut shown = 0.0;
            for index in 0..spec.frames {
                shown += f64::from(delay(index, &spec)) / 100.0;
                let due = f64::from(index + 1) * f64::from(fps_den) / f64::from(fps_num);
                assert!((shown - due).abs() <= 0.005 + 1e-9, "frame {index}: {shown} {due}");
            }
        }
    }
}
