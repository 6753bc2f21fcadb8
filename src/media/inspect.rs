//! What a file of ours, or any file of these formats, says about itself.
//!
//! Files come from anywhere: every length in them is checked against what is there, and
//! nothing is read that is not needed.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::output::Format;
use super::{inspect_mp4, png};
use crate::{Error, ErrorKind, Result};

/// Most bytes of text that are kept.
const MAX_COMMENT: usize = 1 << 20;

/// The properties of a video or image file.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaInfo {
    /// The container.
    pub format: Format,
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Number of frames.
    pub frames: u64,
    /// Seconds from the first frame to the end of the last; `None` for a PNG.
    pub duration: Option<f64>,
    /// The text that [`super::Metadata`] put there.
    pub comment: Option<String>,
}

impl MediaInfo {
    /// Frames per second, on average.
    pub fn frame_rate(&self) -> Option<f64> {
        self.duration.filter(|&seconds| seconds > 0.0).map(|seconds| self.frames as f64 / seconds)
    }
}

/// Why a file could not be understood.
pub(super) enum Unreadable {
    /// The file system failed.
    Io(io::Error),
    /// The content is damaged or not what it seemed; the text says how.
    Content(&'static str),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Unreadable::Content("the file ends too early")
        } else {
            Unreadable::Io(error)
        }
    }
}

/// Reads the properties of an MP4, PNG, GIF or y4m file; the content decides which it is.
///
/// A file that is none of these or is damaged gives [`ErrorKind::Input`].
pub fn inspect(path: &Path) -> Result<MediaInfo> {
    let failed = |e| Error::io("cannot read", path, e);
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::input(format!("{} is not a regular file", path.display())));
    }
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    inspect_reader(&mut reader).map_err(|e| match e {
        Unreadable::Io(e) => failed(e),
        Unreadable::Content(reason) => {
            Error::new(ErrorKind::Input, format!("cannot understand {}: {reason}", path.display()))
        }
    })
}

fn inspect_reader(reader: &mut (impl BufRead + Seek)) -> Result<MediaInfo, Unreadable> {
    let mut magic = Vec::new();
    reader.by_ref().take(12).read_to_end(&mut magic)?;
    reader.rewind()?;
    match &magic[..] {
        [0x89, b'P', b'N', b'G', ..] => inspect_png(reader),
        [b'G', b'I', b'F', b'8', ..] => inspect_gif(reader),
        [b'Y', b'U', b'V', b'4', ..] => inspect_y4m(reader),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => inspect_mp4::inspect(reader, MAX_COMMENT),
        _ => Err(Unreadable::Content("it is no mp4, PNG, GIF or y4m file")),
    }
}

fn inspect_png(reader: &mut (impl BufRead + Seek)) -> Result<MediaInfo, Unreadable> {
    // Only the header and the texts are read, but the decoder also counts a row of pixels.
    let limits = ::png::Limits { bytes: 2 * MAX_COMMENT };
    let png = ::png::Decoder::new_with_limits(reader, limits)
        .read_info()
        .map_err(|_| Unreadable::Content("the PNG file is damaged"))?;
    let info = png.info();
    let comment = info.utf8_text.iter().find(|chunk| chunk.keyword == png::COMMENT);
    let comment = comment.and_then(|chunk| {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(MAX_COMMENT).ok()?;
        chunk.get_text().ok()
    });
    Ok(MediaInfo {
        format: Format::Png,
        width: info.width,
        height: info.height,
        frames: 1,
        duration: None,
        comment,
    })
}

fn inspect_y4m(reader: &mut (impl BufRead + Seek)) -> Result<MediaInfo, Unreadable> {
    const BAD: Unreadable = Unreadable::Content("the y4m header is damaged");
    let mut line = Vec::new();
    reader.by_ref().take(1024).read_until(b'\n', &mut line)?;
    let header = line.len() as u64;
    let line = std::str::from_utf8(&line).ok().and_then(|l| l.strip_suffix('\n')).ok_or(BAD)?;
    let field = |tag| line.split(' ').skip(1).find_map(|field| field.strip_prefix(tag));
    let side =
        |tag| field(tag).and_then(|v: &str| v.parse::<u32>().ok()).filter(|v| *v > 0).ok_or(BAD);
    let (width, height) = (side('W')?, side('H')?);
    let (num, den) = field('F').and_then(|rate| rate.split_once(':')).ok_or(BAD)?;
    let (num, den) = (num.parse::<u32>().map_err(|_| BAD)?, den.parse::<u32>().map_err(|_| BAD)?);
    if num == 0 {
        return Err(BAD);
    }
    if field('C').is_some_and(|layout| !layout.starts_with("420") || layout.starts_with("420p")) {
        return Err(Unreadable::Content("only 8-bit 4:2:0 y4m is understood"));
    }
    let luma = u64::from(width) * u64::from(height);
    let chroma = u64::from(width.div_ceil(2)) * u64::from(height.div_ceil(2));
    let frame = "FRAME\n".len() as u64 + luma.saturating_add(2 * chroma);
    let frames = reader.seek(SeekFrom::End(0))?.saturating_sub(header) / frame;
    Ok(MediaInfo {
        format: Format::Y4m,
        width,
        height,
        frames,
        duration: Some(frames as f64 * f64::from(den) / f64::from(num)),
        comment: None,
    })
}

/// Walks over the blocks of a GIF (version 89a, section numbers below) without decoding them.
fn inspect_gif(reader: &mut (impl BufRead + Seek)) -> Result<MediaInfo, Unreadable> {
    const IMAGE: u8 = 0x2C;
    const EXTENSION: u8 = 0x21;
    const TRAILER: u8 = 0x3B;
    const GRAPHIC_CONTROL: u8 = 0xF9;
    const COMMENT: u8 = 0xFE;
    let screen: [u8; 13] = array(reader)?;
    let [w0, w1, h0, h1] = [screen[6], screen[7], screen[8], screen[9]];
    skip_palette(reader, screen[10])?;
    let (mut frames, mut hundredths, mut comment) = (0, 0u64, None);
    loop {
        match array::<1>(reader)?[0] {
            TRAILER => break,
            IMAGE => {
                let descriptor: [u8; 9] = array(reader)?;
                skip_palette(reader, descriptor[8])?;
                array::<1>(reader)?; // LZW code size
                sub_blocks(reader, 0)?;
                frames += 1;
            }
            EXTENSION => {
                let label = array::<1>(reader)?[0];
                let data = sub_blocks(reader, MAX_COMMENT)?;
                match (label, &data[..]) {
                    (GRAPHIC_CONTROL, [_, low, high, ..]) => {
                        hundredths += u64::from(u16::from_le_bytes([*low, *high]));
                    }
                    (COMMENT, text) if comment.is_none() => {
                        comment = Some(String::from_utf8_lossy(text).into_owned());
                    }
                    _ => {}
                }
            }
            _ => return Err(Unreadable::Content("the GIF file is damaged")),
        }
    }
    Ok(MediaInfo {
        format: Format::Gif,
        width: u16::from_le_bytes([w0, w1]).into(),
        height: u16::from_le_bytes([h0, h1]).into(),
        frames,
        duration: Some(hundredths as f64 / 100.0),
        comment,
    })
}

/// The next `N` bytes.
pub(super) fn array<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Skips the colour table that `flags` announces (sections 18 and 20).
fn skip_palette(reader: &mut impl Read, flags: u8) -> io::Result<()> {
    if flags & 0x80 == 0 {
        return Ok(());
    }
    let mut palette = [0; 3 * 256];
    reader.read_exact(&mut palette[..3 << ((flags & 7) + 1)])
}

/// Reads data sub-blocks up to their end (section 15); the first `keep` bytes are returned.
fn sub_blocks(reader: &mut impl Read, keep: usize) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let mut block = [0; 255];
    loop {
        let length = array::<1>(reader)?[0] as usize;
        if length == 0 {
            return Ok(kept);
        }
        reader.read_exact(&mut block[..length])?;
        kept.extend_from_slice(&block[..length.min(keep - kept.len().min(keep))]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_after_a_magic_number_are_survived(
            magic in 0usize..4,
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let magics: [&[u8]; 4] = [
                b"\x89PNG\r\n\x1a\n",
                b"GIF89a",
                b"YUV4MPEG2 W64 H64 F24:1\n",
                b"\0\0\0\x10ftypisom\0\0\0\0",
            ];
            let file = [magics[magic], &bytes].concat();
            // Any answer will do: the test is that there is one.
            let _ = inspect_reader(&mut Cursor::new(file));
        }
    }

    #[test]
    fn huge_sizes_in_a_y4m_header_are_survived() {
        let file = format!("YUV4MPEG2 W{0} H{0} F1:1\n", u32::MAX);
        let info = inspect_reader(&mut Cursor::new(file)).ok().unwrap();
        assert_eq!((info.width, info.frames), (u32::MAX, 0));
    }
}
