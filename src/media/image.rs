//! Image files in: PNG, JPEG and WebP to [`Frame`]s.
//!
//! An image file is the one input that strangers make, so its limits are checked before
//! anything is decoded.

use std::fs;
use std::io::{Cursor, ErrorKind as IoErrorKind, Read};
use std::path::Path;

use ::image::metadata::Orientation;
use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use super::Frame;
use crate::{Error, ErrorKind, Result};

/// Most pixels per side of an image that is read.
const MAX_SIDE: u32 = 16384;
/// Most bytes of an image file, and most bytes a decoder may allocate.
const MAX_BYTES: u64 = 512 << 20;

/// How an image of another aspect ratio becomes a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// Fill the frame and cut off what stands out, the same on both sides.
    #[default]
    Crop,
    /// Show the whole image, with black bars.
    Pad,
    /// Change the aspect ratio.
    Stretch,
}

/// Reads an image file as an RGB frame of `width` × `height` pixels.
///
/// The content decides the format, not the name. EXIF orientation is applied, transparency
/// is laid over white, 16-bit, grey, palette and CMYK images become 8-bit RGB; an animation
/// gives its first picture. Resizing is Lanczos3. A file that is no such image, is damaged
/// or is beyond the limits gives [`ErrorKind::Input`].
pub fn load_image(path: &Path, width: u32, height: u32, fit: Fit) -> Result<Frame> {
    if width == 0 || height == 0 {
        return Err(Error::usage(format!("cannot fit an image into {width}x{height} pixels")));
    }
    let file = ImageFile::read(path)?;
    let image = file.decode().map_err(|e| unusable(path, e))?;
    resize(&image, width, height, fit).map_err(|e| e.at(path.display()))
}

/// The size of an image as it will be seen (EXIF orientation applied), from its header alone.
/// Errors as [`load_image`], except for damage in the pixel data.
pub fn probe_image(path: &Path) -> Result<(u32, u32)> {
    let file = ImageFile::read(path)?;
    let mut decoder = file.decoder().map_err(|e| unusable(path, e))?;
    let (width, height) = decoder.dimensions();
    let turned = matches!(
        decoder.orientation().map_err(|e| unusable(path, e))?,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    Ok(if turned { (height, width) } else { (width, height) })
}

/// The bytes of an image file of a format that we read.
struct ImageFile {
    format: ImageFormat,
    bytes: Vec<u8>,
}

impl ImageFile {
    fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path)?;
        let format = ::image::guess_format(&bytes).ok();
        match format {
            Some(format @ (ImageFormat::Png | ImageFormat::WebP)) => Ok(Self { format, bytes }),
            Some(format @ ImageFormat::Jpeg) if jpeg_is_whole(&bytes) => Ok(Self { format, bytes }),
            Some(ImageFormat::Jpeg) => {
                Err(Error::input(format!("{} is a JPEG file that was cut off", path.display()))
                    .hint("copy or download the image again"))
            }
            _ => Err(Error::input(format!("{} is not a PNG, JPEG or WebP image", path.display()))
                .hint("convert it to PNG first")),
        }
    }

    fn decoder(&self) -> Result<impl ImageDecoder + '_, ImageError> {
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_BYTES);
        let mut reader = ImageReader::with_format(Cursor::new(&self.bytes[..]), self.format);
        reader.limits(limits.clone());
        let decoder = reader.into_decoder()?;
        // The decoders know the limits but not who allocates the picture itself.
        limits.reserve(decoder.total_bytes())?;
        Ok(decoder)
    }

    fn decode(&self) -> Result<RgbImage, ImageError> {
        let mut decoder = self.decoder()?;
        let orientation = decoder.orientation()?;
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(if image.color().has_alpha() { over_white(image) } else { image.into_rgb8() })
    }
}

/// The content of a regular file of at most [`MAX_BYTES`].
fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io("cannot read the image", path, e).of_kind(ErrorKind::Input);
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::input(format!("{} is not a regular file", path.display())));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    // One byte more than allowed: a file that grows is noticed too.
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::input(format!(
            "the image {} is larger than {} MiB",
            path.display(),
            MAX_BYTES >> 20
        )));
    }
    Ok(bytes)
}

fn unusable(path: &Path, error: ImageError) -> Error {
    let message = format!("cannot use the image {}", path.display());
    match &error {
        ImageError::Limits(_) => Error::input(message).because(error).hint(format!(
            "images may have {MAX_SIDE} pixels per side and {} MiB when decoded; scale it down",
            MAX_BYTES >> 20
        )),
        ImageError::IoError(e) if e.kind() == IoErrorKind::UnexpectedEof => Error::input(message)
            .because(error)
            .hint("the file was cut off: copy or download it again"),
        _ => Error::input(message).because(error),
    }
}

/// Whether a JPEG file reaches its end marker. The decoder is lenient and would fill what is
/// missing with grey.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    const END: u8 = 0xD9;
    let mut rest = bytes;
    loop {
        // The next marker: inside a scan, FF 00 is data and FF D0..D7 restarts it.
        let Some(at) = rest
            .windows(2)
            .position(|w| w[0] == 0xFF && !matches!(w[1], 0x00 | 0x01 | 0xD0..=0xD8 | 0xFF))
        else {
            return false;
        };
        if rest[at + 1] == END {
            return true;
        }
        let Some(&[high, low]) = rest[at + 2..].first_chunk() else { return false };
        let segment = at + 2 + usize::from(u16::from_be_bytes([high, low]));
        let Some(after) = rest.get(segment..) else { return false };
        rest = after;
    }
}

/// Lays an image with transparency over white: `c·a + 255·(1 − a)`, rounded.
fn over_white(image: DynamicImage) -> RgbImage {
    let rgba = image.into_rgba8();
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    for (out, pixel) in rgb.pixels_mut().zip(rgba.pixels()) {
        let alpha = u32::from(pixel.0[3]);
        for (out, &colour) in out.0.iter_mut().zip(&pixel.0[..3]) {
            *out = ((u32::from(colour) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        }
    }
    rgb
}

fn resize(image: &RgbImage, width: u32, height: u32, fit: Fit) -> Result<Frame> {
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    match fit {
        Fit::Stretch => scale(image, width, height, &options),
        Fit::Crop => scale(image, width, height, &options.fit_into_destination(Some((0.5, 0.5)))),
        Fit::Pad => {
            let ratio = f64::min(
                f64::from(width) / f64::from(image.width()),
                f64::from(height) / f64::from(image.height()),
            );
            let side = |image: u32, frame: u32| {
                ((f64::from(image) * ratio).round() as u32).clamp(1, frame)
            };
            let inner =
                scale(image, side(image.width(), width), side(image.height(), height), &options)?;
            pad(&inner, width, height)
        }
    }
}

fn scale(image: &RgbImage, width: u32, height: u32, options: &ResizeOptions) -> Result<Frame> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::input(format!("cannot resize the image to {width}x{height}: {e}"))
    };
    // The typed interface: the other one compiles this for every kind of pixel.
    let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image.as_raw())
        .map_err(|e| failed(&e))?;
    let mut data = vec![0; width as usize * height as usize * 3];
    let mut target =
        TypedImage::<U8x3>::from_buffer(width, height, &mut data).map_err(|e| failed(&e))?;
    Resizer::new().resize_typed(&source, &mut target, options).map_err(|e| failed(&e))?;
    Frame::new(width, height, data)
}

/// Puts `inner` into the middle of a black frame.
fn pad(inner: &Frame, width: u32, height: u32) -> Result<Frame> {
    let left = ((width - inner.width()) / 2) as usize * 3;
    let top = ((height - inner.height()) / 2) as usize;
    let mut data = vec![0; width as usize * height as usize * 3];
    for (out, row) in data.chunks_exact_mut(width as usize * 3).skip(top).zip(inner.rows()) {
        out[left..left + row.len()].copy_from_slice(row);
    }
    Frame::new(width, height, data)
}
