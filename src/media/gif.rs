//! Animated GIF out.

use std::path::Path;

use gif::{Encoder, EncodingError, Extension, Repeat};

use super::pending::{PendingFile, write_error};
use super::{Frame, FrameSink, Metadata, VideoSpec};
use crate::{Error, ErrorKind, Result};

/// How much of a frame the palette search looks at, 1 (all) to 30; 10 is the crate's advice.
const PALETTE_SPEED: i32 = 10;

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
        let mut picture = gif::Frame::from_rgb_speed(width, height, frame.data(), PALETTE_SPEED);
        picture.delay = delay(self.pushed, &self.spec);
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
