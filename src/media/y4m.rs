//! Raw video: YUV4MPEG2, as other programs read it from a pipe.
//!
//! Colours are BT.709, limited range, chroma in the middle of its four pixels (`C420jpeg`).
//! The format has a tag for the range but none for the matrix: tell the reader, for instance
//! `ffmpeg -colorspace bt709 -i -`.

use std::io::{self, Write};
use std::path::Path;

use super::pending::{PendingFile, write_error};
use super::yuv::Yuv420;
use super::{Frame, FrameSink, VideoSpec};
use crate::{Error, ErrorKind, Result};

/// Writes frames to a pipe.
pub(super) struct StreamSink<W> {
    out: W,
    planes: Yuv420,
}

impl<W: Write + Send> StreamSink<W> {
    /// Writes the header at once.
    pub(super) fn new(mut out: W, spec: &VideoSpec) -> Result<Self> {
        out.write_all(header(spec).as_bytes()).map_err(stream_error)?;
        Ok(StreamSink { out, planes: Yuv420::new(spec.width, spec.height) })
    }
}

impl<W: Write + Send> FrameSink for StreamSink<W> {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        write_frame(&mut self.out, &mut self.planes, frame).map_err(stream_error)
    }

    fn settle(&mut self) -> Result<()> {
        self.out.flush().map_err(stream_error)
    }

    fn show_early(&mut self) -> Result<()> {
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.out.flush().map_err(stream_error)
    }
}

fn stream_error(error: io::Error) -> Error {
    let message = if error.kind() == io::ErrorKind::BrokenPipe {
        "the reader of standard output closed the pipe"
    } else {
        "cannot write to standard output"
    };
    Error::new(ErrorKind::Io, message).because(error)
}

/// Writes frames to a file.
pub(super) struct FileSink {
    file: PendingFile,
    planes: Yuv420,
    overwrite: bool,
}

impl FileSink {
    /// Starts the file with its header.
    pub(super) fn create(path: &Path, spec: &VideoSpec, overwrite: bool) -> Result<Self> {
        let mut file = PendingFile::create(path)?;
        file.write_all(header(spec).as_bytes()).map_err(|e| write_error(path, e))?;
        Ok(FileSink { file, planes: Yuv420::new(spec.width, spec.height), overwrite })
    }
}

impl FrameSink for FileSink {
    fn push(&mut self, frame: &Frame) -> Result<()> {
        write_frame(&mut self.file, &mut self.planes, frame)
            .map_err(|e| write_error(self.file.target(), e))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.file.commit(self.overwrite)
    }
}

fn header(spec: &VideoSpec) -> String {
    let VideoSpec { width, height, fps_num, fps_den, .. } = spec;
    format!(
        "YUV4MPEG2 W{width} H{height} F{fps_num}:{fps_den} Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n"
    )
}

fn write_frame(out: &mut impl Write, planes: &mut Yuv420, frame: &Frame) -> io::Result<()> {
    planes.fill(frame);
    out.write_all(b"FRAME\n")?;
    out.write_all(planes.data())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: VideoSpec = VideoSpec { width: 64, height: 64, fps_num: 24, fps_den: 1, frames: 2 };

    #[test]
    fn a_closed_pipe_is_a_clean_error() {
        let (reader, writer) = io::pipe().unwrap();
        let mut sink = StreamSink::new(writer, &SPEC).unwrap();
        drop(reader);
        let frame = Frame::from_fn(64, 64, |_, _| [9; 3]).unwrap();
        let error = sink.push(&frame).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().starts_with("the reader of standard output closed the pipe"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_is_an_io_error() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = StreamSink::new(full, &SPEC).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().starts_with("cannot write to standard output"));
    }
}
