//! PNG out: one frame as one file, several as numbered files.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Encoder, EncodingError, SrgbRenderingIntent};

use super::output::check_file;
use super::pending::{
    ClosedFile, PendingFile, already_there, directory_of, temporary_in, write_error,
};
use super::{Frame, FrameSink, Metadata, VideoSpec};
use crate::{Error, ErrorKind, Result};

/// Where the text of [`Metadata`] is in a PNG file.
pub(super) const COMMENT: &str = "Comment";

/// Writes PNG files, which all get their names at the end.
pub(super) struct PngSink {
    path: PathBuf,
    single: bool,
    comment: Option<String>,
    overwrite: bool,
    written: Vec<ClosedFile>,
}

impl PngSink {
    /// One frame becomes `path`, more become [`numbered`] files.
    pub(super) fn create(
        path: &Path,
        spec: &VideoSpec,
        metadata: &Metadata,
        overwrite: bool,
    ) -> Self {
        PngSink {
            path: path.into(),
            single: spec.frames == 1,
            comment: metadata.comment.clone(),
            overwrite,
            written: Vec::new(),
        }
    }
}

impl FrameSink for PngSink {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        let target = if self.single {
            self.path.clone()
        } else {
            numbered(&self.path, self.written.len() as u64)
        };
        let mut file = PendingFile::create(&target)?;
        encode(&mut file, frame, self.comment.as_deref()).map_err(|e| match e {
            EncodingError::IoError(e) => write_error(&target, e),
            other => Error::new(ErrorKind::Io, format!("cannot write {}", target.display()))
                .because(other),
        })?;
        self.written.push(file.close()?);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.written.into_iter().try_for_each(|file| file.publish(self.overwrite))
    }
}

/// Writes a picture that may be replaced at any time, such as a preview: whole to whoever opens
/// it, but not forced to the disk.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be written.
pub fn write_png(path: &Path, frame: &Frame) -> Result<()> {
    let failed = |e| write_error(path, e);
    let mut bytes = Vec::new();
    encode(&mut bytes, frame, None)
        .map_err(|e| Error::new(ErrorKind::Io, "cannot encode a picture").because(e))?;
    let mut file = temporary_in(directory_of(path)).map_err(failed)?;
    file.write_all(&bytes).map_err(failed)?;
    file.persist(path).map(drop).map_err(|e| failed(e.error))
}

fn encode(file: impl Write, frame: &Frame, comment: Option<&str>) -> Result<(), EncodingError> {
    let mut encoder = Encoder::new(file, frame.width(), frame.height());
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_source_srgb(SrgbRenderingIntent::Perceptual);
    if let Some(comment) = comment {
        encoder.add_itxt_chunk(COMMENT.into(), comment.into())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(frame.data())?;
    writer.finish()
}

/// `name.png` as frame `index`: `name-00012.png`.
fn numbered(path: &Path, index: u64) -> PathBuf {
    let mut name = prefix(path);
    name.push(format!("{index:05}."));
    name.push(extension(path));
    path.with_file_name(name)
}

/// What the names of all frames begin with.
fn prefix(path: &Path) -> OsString {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push("-");
    name
}

fn extension(path: &Path) -> &OsStr {
    path.extension().unwrap_or(OsStr::new("png"))
}

/// Whether `frames` numbered files may be written. Those of an earlier video may only be
/// replaced with `overwrite`, and never leave a longer video's last frames behind: the two
/// would look like one.
pub(super) fn check_sequence(path: &Path, frames: u32, overwrite: bool) -> Result<()> {
    let directory = directory_of(path);
    // The longest name, for what is wrong with any name there.
    check_file(&numbered(path, u64::from(frames) - 1), overwrite)?;
    let entries = fs::read_dir(directory)
        .map_err(|e| Error::io("cannot write to the directory", directory, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("cannot read the directory", directory, e))?;
        let Some(index) = index_of(path, &entry.file_name()) else { continue };
        if index >= u64::from(frames) {
            let name = entry.path();
            return Err(Error::usage(format!(
                "{} is left from a longer video and would seem to be part of this one",
                name.display()
            ))
            .hint("remove it, or choose another name"));
        }
        if !overwrite {
            return Err(already_there(&entry.path()));
        }
        check_file(&entry.path(), overwrite)?;
    }
    Ok(())
}

/// The number of the frame that a file called `name` is, if it is one.
fn index_of(path: &Path, name: &OsStr) -> Option<u64> {
    let prefix = prefix(path);
    let rest = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes())?;
    let digits = rest.strip_suffix(extension(path).as_encoded_bytes())?.strip_suffix(b".")?;
    let digits = std::str::from_utf8(digits).ok()?;
    let index = digits.parse().ok()?;
    (format!("{index:05}") == digits).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_again() {
        let path = Path::new("a dir/cat.v2.png");
        for index in [0, 7, 99_999, 100_000] {
            let name = numbered(path, index);
            assert_eq!(name.parent(), Some(Path::new("a dir")));
            assert_eq!(index_of(path, name.file_name().unwrap()), Some(index));
        }
        assert_eq!(numbered(path, 12), Path::new("a dir/cat.v2-00012.png"));
        for other in
            ["cat.v2.png", "cat.v2-1.png", "cat.v2-+0001.png", "cat.v2-00001.gif", "cat-00001.png"]
        {
            assert_eq!(index_of(path, OsStr::new(other)), None, "{other}");
        }
    }
}
