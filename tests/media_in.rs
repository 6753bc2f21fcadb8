//! Image files in: every kind of image gives the right RGB, every bad one a clean error.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, RgbImage};
use png::{BitDepth, ColorType};
use pyraflow::ErrorKind;
use pyraflow::media::{Fit, Frame, load_image, probe_image};
use tempfile::TempDir;

const RED: [u8; 3] = [220, 30, 40];
const GREEN: [u8; 3] = [20, 200, 60];
const BLUE: [u8; 3] = [30, 60, 210];
const GREY: [u8; 3] = [130, 130, 130];

fn file(directory: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A PNG file of raw samples; `more` adds chunks to the header.
fn png_bytes(
    (width, height): (u32, u32),
    (color, depth): (ColorType, BitDepth),
    samples: &[u8],
    more: impl FnOnce(&mut png::Encoder<'_, &mut Vec<u8>>),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    more(&mut encoder);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(samples).unwrap();
    writer.finish().unwrap();
    bytes
}

fn rgb_png(frame: &Frame) -> Vec<u8> {
    let size = (frame.width(), frame.height());
    png_bytes(size, (ColorType::Rgb, BitDepth::Eight), frame.data(), |_| ())
}

/// Four colours, one per quarter: no two orientations of it look the same.
fn quarters(width: u32, height: u32) -> Frame {
    Frame::from_fn(width, height, |x, y| match (x < width / 2, y < height / 2) {
        (true, true) => RED,
        (false, true) => GREEN,
        (true, false) => BLUE,
        (false, false) => GREY,
    })
    .unwrap()
}

fn jpeg_bytes(frame: &Frame) -> Vec<u8> {
    let image = RgbImage::from_raw(frame.width(), frame.height(), frame.data().to_vec()).unwrap();
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, 100).encode_image(&image).unwrap();
    bytes.into_inner()
}

fn webp_bytes(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    WebPEncoder::new_lossless(&mut bytes)
        .encode(frame.data(), frame.width(), frame.height(), ExtendedColorType::Rgb8)
        .unwrap();
    bytes
}

/// The JPEG file with an EXIF segment that holds nothing but an orientation, 1 to 8.
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let tiff: &[u8] = &[
        b'I',
        b'I',
        42,
        0,
        8,
        0,
        0,
        0, // little endian, first directory at 8
        1,
        0, // one entry
        0x12,
        0x01,
        3,
        0,
        1,
        0,
        0,
        0,
        orientation,
        0,
        0,
        0, // 0x0112, one SHORT
        0,
        0,
        0,
        0, // no further directory
    ];
    let payload = [b"Exif\0\0", tiff].concat();
    let length = u16::try_from(payload.len() + 2).unwrap().to_be_bytes();
    [&jpeg[..2], &[0xFF, 0xE1], &length, &payload, &jpeg[2..]].concat()
}

/// Reads the file at its own size, which must be `size`.
fn read(path: &Path, size: (u32, u32)) -> Frame {
    assert_eq!(probe_image(path).unwrap(), size, "{}", path.display());
    load_image(path, size.0, size.1, Fit::Stretch).unwrap()
}

fn assert_near(got: &Frame, want: &Frame, tolerance: u8) {
    assert_eq!((got.width(), got.height()), (want.width(), want.height()));
    let worst = got.data().iter().zip(want.data()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(worst <= Some(tolerance), "a sample is off by {worst:?}");
}

fn assert_refused(path: &Path, reason: &str) {
    for error in [probe_image(path).unwrap_err(), load_image(path, 64, 64, Fit::Crop).unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn lossless_formats_are_exact() {
    let directory = TempDir::new().unwrap();
    let frame =
        Frame::from_fn(37, 23, |x, y| [(x * 7) as u8, (y * 11) as u8, (x * y) as u8]).unwrap();
    for (name, bytes) in [("a.png", rgb_png(&frame)), ("a.webp", webp_bytes(&frame))] {
        assert_eq!(read(&file(&directory, name, &bytes), (37, 23)), frame, "{name}");
    }
}

#[test]
fn the_content_decides_the_format_not_the_name() {
    let directory = TempDir::new().unwrap();
    let frame = quarters(32, 16);
    assert_eq!(read(&file(&directory, "png.jpg", &rgb_png(&frame)), (32, 16)), frame);
    assert_eq!(read(&file(&directory, "webp", &webp_bytes(&frame)), (32, 16)), frame);
    assert_near(&read(&file(&directory, "jpeg.png", &jpeg_bytes(&frame)), (32, 16)), &frame, 3);
}

#[test]
fn every_exif_orientation_is_turned_upright() {
    let directory = TempDir::new().unwrap();
    let (w, h) = (48, 32);
    let stored = quarters(w, h);
    let jpeg = jpeg_bytes(&stored);
    for orientation in 1..=8 {
        // Where the stored pixel for column x, row y of the upright picture is (EXIF 2.32,
        // 4.6.4: which side of the scene the stored first row and column are).
        let from = |x: u32, y: u32| match orientation {
            1 => (x, y),
            2 => (w - 1 - x, y),
            3 => (w - 1 - x, h - 1 - y),
            4 => (x, h - 1 - y),
            5 => (y, x),
            6 => (y, h - 1 - x),
            7 => (w - 1 - y, h - 1 - x),
            _ => (w - 1 - y, x),
        };
        let (width, height) = if orientation < 5 { (w, h) } else { (h, w) };
        let upright = Frame::from_fn(width, height, |x, y| {
            let (x, y) = from(x, y);
            stored.pixel(x, y).unwrap()
        });
        let name = format!("{orientation}.jpg");
        let path = file(&directory, &name, &with_orientation(&jpeg, orientation));
        assert_near(&read(&path, (width, height)), &upright.unwrap(), 3);
    }
}

#[test]
fn grey_sixteen_bit_and_palette_become_rgb() {
    let directory = TempDir::new().unwrap();
    let cases = [
        (
            "grey",
            png_bytes((2, 1), (ColorType::Grayscale, BitDepth::Eight), &[7, 250], |_| ()),
            [[7; 3], [250; 3]],
        ),
        (
            "grey-1",
            png_bytes((2, 1), (ColorType::Grayscale, BitDepth::One), &[0b0100_0000], |_| ()),
            [[0; 3], [255; 3]],
        ),
        (
            // 0x80FF is 128.498 of 255, 0x8180 is 128.999.
            "grey-16",
            png_bytes(
                (2, 1),
                (ColorType::Grayscale, BitDepth::Sixteen),
                &[0x80, 0xFF, 0x81, 0x80],
                |_| (),
            ),
            [[128; 3], [129; 3]],
        ),
        (
            "rgb-16",
            png_bytes(
                (2, 1),
                (ColorType::Rgb, BitDepth::Sixteen),
                &[0, 0, 0x33, 0x33, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0x66, 0x66],
                |_| (),
            ),
            [[0, 0x33, 255], [255, 0, 0x66]],
        ),
        (
            "palette",
            png_bytes((2, 1), (ColorType::Indexed, BitDepth::Two), &[0b0110_0000], |encoder| {
                encoder.set_palette([RED, GREEN, BLUE].concat());
            }),
            [GREEN, BLUE],
        ),
    ];
    for (name, bytes, want) in cases {
        let got = read(&file(&directory, name, &bytes), (2, 1));
        assert_eq!(got.data(), want.as_flattened(), "{name}");
    }
}

#[test]
fn transparency_is_laid_over_white() {
    let directory = TempDir::new().unwrap();
    let rgba = png_bytes(
        (3, 1),
        (ColorType::Rgba, BitDepth::Eight),
        &[10, 20, 30, 255, 10, 20, 30, 0, 10, 20, 30, 51],
        |_| (),
    );
    let got = read(&file(&directory, "rgba.png", &rgba), (3, 1));
    // 51 is a fifth: 0.2 · 10 + 0.8 · 255 = 206.
    assert_eq!(got.data(), [10, 20, 30, 255, 255, 255, 206, 208, 210]);
    let palette = png_bytes((2, 1), (ColorType::Indexed, BitDepth::Eight), &[0, 1], |encoder| {
        encoder.set_palette([RED, GREEN].concat());
        encoder.set_trns(&[0u8, 255][..]);
    });
    let got = read(&file(&directory, "palette.png", &palette), (2, 1));
    assert_eq!(got.data(), [[255; 3], GREEN].as_flattened());
    let grey = png_bytes(
        (2, 1),
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen),
        &[0, 0, 0xFF, 0xFF, 0, 0, 0, 0],
        |_| (),
    );
    assert_eq!(read(&file(&directory, "grey.png", &grey), (2, 1)).data(), [0, 0, 0, 255, 255, 255]);
}

#[test]
fn cmyk_jpeg_becomes_rgb() {
    // 16x8, made with Pillow at quality 100: left (0, 255, 255, 0), right (255, 0, 0, 51).
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/media/cmyk.jpg");
    let want =
        Frame::from_fn(16, 8, |x, _| if x < 8 { [255, 0, 0] } else { [0, 204, 204] }).unwrap();
    assert_near(&read(&path, (16, 8)), &want, 4);
}

#[test]
fn fits() {
    let directory = TempDir::new().unwrap();
    // Wide: the outer quarters are red, the middle half is green over blue.
    let frame = Frame::from_fn(256, 64, |x, y| match (x, y) {
        (..64 | 192.., _) => RED,
        (_, ..32) => GREEN,
        _ => BLUE,
    });
    let path = file(&directory, "wide.png", &rgb_png(&frame.unwrap()));
    let load = |fit| load_image(&path, 64, 64, fit).unwrap();
    assert_eq!(Fit::default(), Fit::Crop);
    // Crop shows the middle 64 columns at their own size.
    let halves = |y| if y < 32 { GREEN } else { BLUE };
    assert_eq!(load(Fit::Crop), Frame::from_fn(64, 64, |_, y| halves(y)).unwrap());
    // Stretch shows everything, four columns in one.
    let stretched = load(Fit::Stretch);
    assert_eq!([stretched.pixel(2, 2), stretched.pixel(61, 61)], [Some(RED); 2]);
    assert_eq!([stretched.pixel(32, 2), stretched.pixel(32, 61)], [Some(GREEN), Some(BLUE)]);
    // Pad shows 64x16 of picture between black bars of 24 rows.
    let padded = load(Fit::Pad);
    for y in (0..24).chain(40..64) {
        assert_eq!(padded.pixel(32, y), Some([0; 3]), "row {y}");
    }
    assert_eq!([padded.pixel(2, 24), padded.pixel(61, 39)], [Some(RED); 2]);
    assert_eq!([padded.pixel(32, 25), padded.pixel(32, 38)], [Some(GREEN), Some(BLUE)]);
}

#[test]
fn extreme_shapes_are_resized() {
    let directory = TempDir::new().unwrap();
    for (width, height) in [(1, 1), (1, 900), (900, 1), (3, 2)] {
        let frame = Frame::from_fn(width, height, |_, _| RED).unwrap();
        let path = file(&directory, "thin.png", &rgb_png(&frame));
        for fit in [Fit::Crop, Fit::Stretch] {
            let got = load_image(&path, 128, 64, fit).unwrap();
            assert_eq!(got, Frame::from_fn(128, 64, |_, _| RED).unwrap(), "{width}x{height}");
        }
        let got = load_image(&path, 128, 64, Fit::Pad).unwrap();
        assert_eq!(got.pixel(63, 31), Some(RED), "{width}x{height}");
    }
    let path = file(&directory, "thin.png", &rgb_png(&quarters(2, 2)));
    assert_eq!(load_image(&path, 0, 64, Fit::Crop).unwrap_err().kind(), ErrorKind::Usage);
}

/// Every prefix of the file is refused, or gives the whole picture.
#[test]
fn truncated_files_never_give_a_wrong_picture() {
    let directory = TempDir::new().unwrap();
    let frame =
        Frame::from_fn(40, 40, |x, y| [(x * 6) as u8, (y * 6) as u8, (x * y) as u8]).unwrap();
    for (name, bytes) in [
        ("png", rgb_png(&frame)),
        ("webp", webp_bytes(&frame)),
        ("jpeg", with_orientation(&jpeg_bytes(&frame), 1)),
    ] {
        let path = file(&directory, name, &bytes);
        let whole = load_image(&path, 40, 40, Fit::Stretch).unwrap();
        let handle = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut refused = 0;
        for length in (0..bytes.len()).rev() {
            handle.set_len(length as u64).unwrap();
            match load_image(&path, 40, 40, Fit::Stretch) {
                Ok(got) => assert_eq!(got, whole, "{name}, {length} of {} bytes", bytes.len()),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Input, "{e}");
                    refused += 1;
                }
            }
        }
        // A PNG may lack its end chunk (12 bytes and a checksum) and still be all there.
        assert!(refused + 20 > bytes.len(), "{name}: {refused} of {}", bytes.len());
    }
}

#[test]
fn bombs_are_refused_by_their_header() {
    let directory = TempDir::new().unwrap();
    // Two bytes of samples behind a header that announces far more.
    let announce = |width, height, color| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(color);
        encoder.set_depth(BitDepth::Sixteen);
        let mut writer = encoder.write_header().unwrap();
        writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9C]).unwrap();
        drop(writer);
        bytes
    };
    for (name, bytes) in [
        ("side.png", announce(30_000, 30_000, ColorType::Grayscale)),
        ("long.png", announce(16_385, 1, ColorType::Grayscale)),
        ("bytes.png", announce(16_384, 16_384, ColorType::Rgba)),
        ("side.jpg", with_jpeg_size(&jpeg_bytes(&quarters(16, 16)), 60_000, 60_000)),
        ("bytes.jpg", with_jpeg_size(&jpeg_bytes(&quarters(16, 16)), 16_384, 16_384)),
    ] {
        let path = file(&directory, name, &bytes);
        assert_refused(&path, "cannot use the image");
        let hint = probe_image(&path).unwrap_err().hint_text().map(str::to_string);
        assert!(hint.is_some_and(|h| h.contains("16384 pixels per side")), "{name}");
    }
}

/// The JPEG file with other sides in its frame header.
fn with_jpeg_size(jpeg: &[u8], width: u16, height: u16) -> Vec<u8> {
    let mut bytes = jpeg.to_vec();
    let header = bytes.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    bytes[header + 5..header + 7].copy_from_slice(&height.to_be_bytes());
    bytes[header + 7..header + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = TempDir::new().unwrap();
    for (name, bytes) in [
        ("empty.png", &b""[..]),
        ("text.jpg", b"a picture of a cat"),
        ("gif.png", b"GIF89a\x01\0\x01\0\0\0\0;"),
        ("heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ] {
        assert_refused(&file(&directory, name, bytes), "is not a PNG, JPEG or WebP image");
    }
    let folder = directory.path().join("folder");
    fs::create_dir(&folder).unwrap();
    assert_refused(&folder, "is not a regular file");
    assert_refused(&directory.path().join("missing.png"), "cannot read the image");
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_without_waiting_for_it() {
    let directory = TempDir::new().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_refused(&pipe, "is not a regular file");
}
