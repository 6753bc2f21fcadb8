//! Where a video goes, and the one interface to write it.

use std::fs;
use std::io::{IsTerminal, stdout};
use std::path::{MAIN_SEPARATOR_STR, Path, PathBuf};

use super::pending::{already_there, directory_of, temporary_in};
use super::{Frame, gif, mp4, png, y4m};
use crate::{Error, ErrorKind, Result};

/// A file format for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// H.264 in MP4, what every player and browser shows.
    Mp4,
    /// PNG: one frame is one file, more are numbered files `name-00000.png`, ….
    Png,
    /// Animated GIF, 256 colours per frame, repeated for ever.
    Gif,
    /// Raw 4:2:0 video (YUV4MPEG2), BT.709, limited range.
    Y4m,
}

impl Format {
    const ALL: [Format; 4] = [Format::Mp4, Format::Png, Format::Gif, Format::Y4m];

    /// The name, which is also the file name extension.
    pub fn name(self) -> &'static str {
        match self {
            Format::Mp4 => "mp4",
            Format::Png => "png",
            Format::Gif => "gif",
            Format::Y4m => "y4m",
        }
    }

    /// The format of that name, in upper or lower case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(name))
    }
}

/// Where frames go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputTarget {
    /// Raw y4m on standard output.
    Stdout,
    /// A file, or for several PNG frames the name that their numbers are added to.
    File {
        /// The name.
        path: PathBuf,
        /// What is written.
        format: Format,
    },
}

impl OutputTarget {
    /// `-` is standard output; the extension of any other path decides the format.
    pub fn parse(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(OutputTarget::Stdout);
        }
        // A path that ends in a separator means a directory, though Rust sees a name in it.
        let directory =
            path.as_os_str().as_encoded_bytes().ends_with(MAIN_SEPARATOR_STR.as_bytes());
        let format = path.extension().and_then(|e| e.to_str()).and_then(Format::from_name);
        match format.filter(|_| !directory) {
            Some(format) => Ok(OutputTarget::File { path: path.into(), format }),
            None => Err(Error::usage(format!("cannot tell the format of {}", path.display()))
                .hint("end the name in .mp4, .png, .gif or .y4m, or use - for y4m on a pipe")),
        }
    }
}

/// The shape of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoSpec {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Frames per second are `fps_num / fps_den`.
    pub fps_num: u32,
    /// See `fps_num`.
    pub fps_den: u32,
    /// How many frames there will be, exactly.
    pub frames: u32,
}

/// What a file says about how it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Any text, JSON for instance; y4m has no place for it.
    pub comment: Option<String>,
}

/// Takes the frames of one video, in order.
pub trait FrameSink: Send {
    /// Adds a frame.
    fn push(&mut self, frame: &Frame) -> Result<()>;

    /// Makes what was pushed so far visible to a viewer, where [`FrameSink::show_early`] was
    /// asked for; called after each unit.
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    /// Shows frames before the output is complete: an MP4 grows beside the output in
    /// `<name>.live.mp4`, which is removed in the end; frames on standard output are written
    /// in any case. To be called before the first frame.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for formats that cannot be watched while they are written.
    fn show_early(&mut self) -> Result<()> {
        Err(Error::usage("this format cannot be watched while it is written")
            .hint("name an .mp4 file, or use - for y4m on a pipe"))
    }

    /// Completes the output. A sink that is dropped before leaves no file.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Decides, before any computation, whether `spec` can be written to `target`.
///
/// A wrong request (an existing file without `overwrite`, a directory, a size that the format
/// cannot hold) is [`ErrorKind::Usage`]; a directory that is missing or cannot be written to
/// is [`ErrorKind::Io`].
pub fn check_target(target: &OutputTarget, spec: &VideoSpec, overwrite: bool) -> Result<()> {
    let format = match target {
        OutputTarget::Stdout => Format::Y4m,
        OutputTarget::File { format, .. } => *format,
    };
    check_spec(format, spec)?;
    match target {
        OutputTarget::Stdout if stdout().is_terminal() => {
            Err(Error::usage("standard output is a terminal, not a place for a video")
                .hint("pipe it into a player, or name a file"))
        }
        OutputTarget::Stdout => Ok(()),
        OutputTarget::File { path, format: Format::Png } if spec.frames > 1 => {
            png::check_sequence(path, spec.frames, overwrite)?;
            check_directory(path)
        }
        OutputTarget::File { path, .. } => {
            check_file(path, overwrite)?;
            check_directory(path)
        }
    }
}

/// Opens the sink for a video; [`check_target`] is part of it.
pub fn open_sink(
    target: &OutputTarget,
    spec: &VideoSpec,
    metadata: &Metadata,
    overwrite: bool,
) -> Result<Box<dyn FrameSink>> {
    check_target(target, spec, overwrite)?;
    let sink: Box<dyn FrameSink> = match target {
        OutputTarget::Stdout => Box::new(y4m::StreamSink::new(stdout(), spec)?),
        OutputTarget::File { path, format } => {
            // A link stays a link: what it points to is replaced.
            let path = &fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            match format {
                Format::Mp4 => Box::new(mp4::Mp4Sink::create(path, spec, metadata, overwrite)?),
                Format::Gif => Box::new(gif::GifSink::create(path, spec, metadata, overwrite)?),
                Format::Y4m => Box::new(y4m::FileSink::create(path, spec, overwrite)?),
                Format::Png => Box::new(png::PngSink::create(path, spec, metadata, overwrite)),
            }
        }
    };
    Ok(Box::new(Checked { sink, spec: *spec, pushed: 0 }))
}

/// Whether any file of `format` can hold `spec`.
fn check_spec(format: Format, spec: &VideoSpec) -> Result<()> {
    let VideoSpec { width, height, fps_num, fps_den, frames } = *spec;
    if frames == 0 {
        return Err(Error::usage("a video needs at least one frame"));
    }
    // Bounds that every frame rate in use is far inside of, and no computation overflows at.
    if !(1..=1_000_000).contains(&fps_num) || !(1..=10_000).contains(&fps_den) {
        return Err(Error::usage(format!("{fps_num}/{fps_den} frames per second are no rate")));
    }
    let most = if format == Format::Mp4 { mp4::MAX_SIDES } else { (16384, 16384) };
    let sides = (width.max(height), width.min(height));
    if sides.1 == 0 || sides.0 > most.0 || sides.1 > most.1 {
        return Err(Error::usage(format!(
            "a frame of {width}x{height} does not fit into {}, which holds up to {}x{}",
            format.name(),
            most.0,
            most.1
        )));
    }
    let subsampled = matches!(format, Format::Mp4 | Format::Y4m);
    if subsampled && (width % 2 != 0 || height % 2 != 0) {
        return Err(Error::usage(format!(
            "{} needs an even width and height, not {width}x{height}",
            format.name()
        )));
    }
    if format == Format::Mp4 && sides.1 < mp4::MIN_SIDE {
        return Err(Error::usage(format!(
            "{width}x{height} is too small for mp4, which needs {} pixels per side",
            mp4::MIN_SIDE
        )));
    }
    Ok(())
}

/// Whether a file called `path` may be created or replaced.
pub(super) fn check_file(path: &Path, overwrite: bool) -> Result<()> {
    let there = match path.symlink_metadata() {
        Ok(link) if link.is_symlink() => fs::metadata(path),
        other => other,
    };
    match there {
        Ok(found) if found.is_dir() => {
            Err(Error::usage(format!("{} is a directory", path.display()))
                .hint("name a file in it"))
        }
        Ok(found) if !found.is_file() => {
            Err(Error::usage(format!("{} is not a regular file", path.display()))
                .hint("use - to write y4m to a pipe"))
        }
        Ok(_) if !overwrite => Err(already_there(path)),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !path.is_symlink() => Ok(()),
        // A name that is too long, a link to nothing, a directory that may not be searched.
        Err(e) => Err(Error::io("cannot write", path, e)),
    }
}

/// Decides, before any computation, whether a file other than a video can be written.
///
/// # Errors
/// As [`check_target`].
pub fn check_file_target(path: &Path, overwrite: bool) -> Result<()> {
    check_file(path, overwrite)?;
    check_directory(path)
}

/// Whether files can be made where `path` will be, by making one.
fn check_directory(path: &Path) -> Result<()> {
    let directory = directory_of(path);
    match temporary_in(directory) {
        Ok(_removed) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot write to the directory", directory, e)
                .hint(format!("make it first: mkdir -p {}", directory.display())))
        }
        Err(e) => Err(Error::io("cannot write to the directory", directory, e)),
    }
}

/// Holds a sink to its [`VideoSpec`].
struct Checked {
    sink: Box<dyn FrameSink>,
    spec: VideoSpec,
    pushed: u32,
}

impl FrameSink for Checked {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        let VideoSpec { width, height, frames, .. } = self.spec;
        if (frame.width(), frame.height()) != (width, height) {
            return Err(Error::input(format!(
                "frame {} is {}x{}, the video is {width}x{height}",
                self.pushed,
                frame.width(),
                frame.height()
            )));
        }
        if self.pushed == frames {
            return Err(Error::input(format!("more frames than the {frames} announced")));
        }
        self.pushed += 1;
        self.sink.push(frame)
    }

    fn settle(&mut self) -> Result<()> {
        self.sink.settle()
    }

    fn show_early(&mut self) -> Result<()> {
        self.sink.show_early()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        if self.pushed != self.spec.frames {
            return Err(Error::new(
                ErrorKind::Io,
                format!("only {} of {} frames were made", self.pushed, self.spec.frames),
            ));
        }
        self.sink.finish()
    }
}
