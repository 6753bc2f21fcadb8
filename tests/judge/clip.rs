//! Reads clips: numbered images, YUV4MPEG2 and NumPy arrays.

use std::path::Path;

use pyraflow::{Error, Result};

/// One image, 8 bits per channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub width: usize,
    pub height: usize,
    /// Red, green, blue of each pixel, rows from the top.
    pub rgb: Vec<u8>,
}

impl Frame {
    /// The pixels in order of storage.
    pub fn pixels(&self) -> impl Iterator<Item = [f32; 3]> + '_ {
        self.rgb.chunks_exact(3).map(|p| [f32::from(p[0]), f32::from(p[1]), f32::from(p[2])])
    }
}

/// Peak signal-to-noise ratio of two images in dB; infinite for equal ones, `None` for
/// different sizes.
pub fn psnr(a: &Frame, b: &Frame) -> Option<f64> {
    if (a.width, a.height) != (b.width, b.height) {
        return None;
    }
    let squares: u64 =
        a.rgb.iter().zip(&b.rgb).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    let mean = squares as f64 / a.rgb.len() as f64;
    Some(10.0 * (255.0 * 255.0 / mean).log10())
}

/// Reads a clip: a folder of `.png` images in the order of their names, or by the ending
/// of its name `.y4m` (4:2:0 or 4:4:4, BT.709, limited range unless it says full) or `.npy`
/// (bytes, frames × height × width × 3).
///
/// # Errors
/// When the file cannot be read or is not such a clip, or holds no frame.
pub fn read(path: &Path) -> Result<Vec<Frame>> {
    let bytes = || std::fs::read(path).map_err(|e| Error::io("cannot read", path, e));
    let at = |e: Error| e.at(path.display());
    let frames = match path.extension().and_then(|e| e.to_str()) {
        _ if path.is_dir() => folder(path)?,
        Some("y4m") => y4m(&bytes()?).map_err(at)?,
        Some("npy") => npy(&bytes()?).map_err(at)?,
        _ => return Err(at(bad("a clip is a folder of images or ends in .y4m or .npy"))),
    };
    let Some(first) = frames.first() else { return Err(at(bad("no frames"))) };
    if frames.iter().any(|f| (f.width, f.height) != (first.width, first.height)) {
        return Err(at(bad("the frames have different sizes")));
    }
    Ok(frames)
}

/// Reads one image.
///
/// # Errors
/// When the file cannot be read or is not an image.
pub fn image(path: &Path) -> Result<Frame> {
    let image = image::open(path)
        .map_err(|e| Error::input(format!("cannot read {}", path.display())).because(e))?
        .into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Frame { width, height, rgb: image.into_raw() })
}

fn folder(path: &Path) -> Result<Vec<Frame>> {
    let failed = |e| Error::io("cannot read", path, e);
    let mut images = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|e| e == "png") {
            images.push(file);
        }
    }
    images.sort();
    images.iter().map(|file| image(file)).collect()
}

fn bad(message: &str) -> Error {
    Error::input(message)
}

/// Splits off a line, without its end.
fn line(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|b| *b == b'\n')?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]))
}

/// How the planes of a frame are laid out.
struct Planes {
    width: usize,
    height: usize,
    /// Whether chroma has half the width and half the height.
    halved: bool,
    /// Whether levels use all of 0 to 255.
    full: bool,
}

fn y4m(bytes: &[u8]) -> Result<Vec<Frame>> {
    let (header, mut rest) = line(bytes).ok_or_else(|| bad("no YUV4MPEG2 header"))?;
    let mut tags = header.split(' ');
    if tags.next() != Some("YUV4MPEG2") {
        return Err(bad("no YUV4MPEG2 header"));
    }
    let mut planes = Planes { width: 0, height: 0, halved: true, full: false };
    for tag in tags {
        let size = || tag[1..].parse().ok().filter(|n| (1..=8192).contains(n));
        match tag.as_bytes().first() {
            Some(b'W') => planes.width = size().ok_or_else(|| bad("bad width"))?,
            Some(b'H') => planes.height = size().ok_or_else(|| bad("bad height"))?,
            Some(b'C') => match &tag[1..] {
                "420" | "420jpeg" | "420mpeg2" | "420paldv" => planes.halved = true,
                "444" => planes.halved = false,
                other => return Err(bad(&format!("cannot read chroma {other:?}"))),
            },
            _ => planes.full |= tag == "XCOLORRANGE=FULL",
        }
    }
    if planes.width == 0 || planes.height == 0 {
        return Err(bad("the header gives no size"));
    }
    let luma = planes.width * planes.height;
    let chroma = planes.chroma_width() * planes.chroma_height();
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let (mark, data) = line(rest).ok_or_else(|| bad("broken frame header"))?;
        if !mark.starts_with("FRAME") || data.len() < luma + 2 * chroma {
            return Err(bad(&format!("frame {} is broken or cut short", frames.len())));
        }
        let (y, data) = data.split_at(luma);
        let (u, data) = data.split_at(chroma);
        let (v, data) = data.split_at(chroma);
        frames.push(planes.rgb(y, u, v));
        rest = data;
    }
    Ok(frames)
}

impl Planes {
    fn chroma_width(&self) -> usize {
        if self.halved { self.width.div_ceil(2) } else { self.width }
    }

    fn chroma_height(&self) -> usize {
        if self.halved { self.height.div_ceil(2) } else { self.height }
    }

    /// One frame in RGB by the equations of BT.709.
    fn rgb(&self, y: &[u8], u: &[u8], v: &[u8]) -> Frame {
        let (offset, luma_range, chroma_range) =
            if self.full { (0.0, 255.0, 255.0) } else { (16.0, 219.0, 224.0) };
        let mut rgb = Vec::with_capacity(3 * y.len());
        for (i, luma) in y.iter().enumerate() {
            let (px, py) = (i % self.width, i / self.width);
            let l = (f32::from(*luma) - offset) / luma_range;
            let [cb, cr] = [u, v].map(|plane| (self.chroma(plane, px, py) - 128.0) / chroma_range);
            let r = l + 1.5748 * cr;
            let g = l - 0.1873 * cb - 0.4681 * cr;
            let b = l + 1.8556 * cb;
            rgb.extend([r, g, b].map(|c| (c * 255.0).round().clamp(0.0, 255.0) as u8));
        }
        Frame { width: self.width, height: self.height, rgb }
    }

    /// Chroma at luma pixel (x, y); samples of halved planes lie amid their four pixels and
    /// are interpolated.
    fn chroma(&self, plane: &[u8], x: usize, y: usize) -> f32 {
        let (w, h) = (self.chroma_width(), self.chroma_height());
        if !self.halved {
            return f32::from(plane[y * w + x]);
        }
        let nearest_two = |at: usize, count: usize| {
            let other = if at.is_multiple_of(2) { (at / 2).saturating_sub(1) } else { at / 2 + 1 };
            [at / 2, other.min(count - 1)]
        };
        let ([x0, x1], [y0, y1]) = (nearest_two(x, w), nearest_two(y, h));
        let row = |y: usize| 3.0 * f32::from(plane[y * w + x0]) + f32::from(plane[y * w + x1]);
        (3.0 * row(y0) + row(y1)) / 16.0
    }
}

fn npy(bytes: &[u8]) -> Result<Vec<Frame>> {
    if bytes.len() < 10 || &bytes[..6] != b"\x93NUMPY" {
        return Err(bad("not a NumPy file"));
    }
    // Version 1 has a 2-byte length of the header, later ones 4 bytes.
    let (start, length) = match (bytes[6], bytes.get(8..12)) {
        (1, _) => (10, usize::from(u16::from_le_bytes([bytes[8], bytes[9]]))),
        (_, Some(&[a, b, c, d])) => (12, u32::from_le_bytes([a, b, c, d]) as usize),
        _ => return Err(bad("the header is cut short")),
    };
    let (header, data) =
        bytes[start..].split_at_checked(length).ok_or_else(|| bad("the header is cut short"))?;
    let header = String::from_utf8_lossy(header);
    if !header.contains("'|u1'") || !header.contains("'fortran_order': False") {
        return Err(bad("not an array of bytes in row order"));
    }
    let shape = header.split(['(', ')']).nth(1).unwrap_or_default();
    let shape: Vec<usize> = shape.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let [count, height, width, 3] = shape[..] else {
        return Err(bad("the shape is not frames x height x width x 3"));
    };
    let size = [count, height, width, 3].iter().try_fold(1usize, |a, b| a.checked_mul(*b));
    if size != Some(data.len()) || data.is_empty() {
        return Err(bad("the data does not have the size that the shape says"));
    }
    let frames = data.chunks_exact(3 * width * height);
    Ok(frames.map(|rgb| Frame { width, height, rgb: rgb.to_vec() }).collect())
}
