//! First images of every kind: the right video, or a refusal that names the file.

use std::fs;
use std::io::Cursor;

use image::{DynamicImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbImage};

use crate::harness::{Bench, Generate};
use crate::works::frames;

/// A picture without any symmetry.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, ((x / 8 + y / 4) % 2 * 200) as u8])
    })
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut data = Cursor::new(Vec::new());
    image.into().write_to(&mut data, format).expect("encoded");
    data.into_inner()
}

fn from_image(name: &str) -> Generate {
    Generate::new().set("--image", name)
}

#[test]
fn an_image_becomes_the_first_frame() {
    let bench = Bench::new();
    bench.write("in.png", encoded(picture(64, 64), ImageFormat::Png));
    bench.generate(&from_image("in.png").flag("--json")).ok();
    let other = Generate::new();
    assert!(frames(&bench, &from_image("in.png")) != frames(&bench, &other));
    // A prompt is not needed with an image; a second frame is.
    let run = bench.generate(&from_image("in.png").no_prompt().set("-o", "silent.mp4")).ok();
    run.check(run.stderr.contains("wrote silent.mp4: 9 frames"), "a video");
    bench.refuses(&from_image("in.png").set("--units", "1").flag("-y"), 3, &["2 to 4096"]);
    let settings = bench.run(["inspect", "out.mp4"]).ok().text();
    assert!(settings.contains("in.png"), "{settings}");
}

#[test]
fn the_three_fits_differ() {
    let bench = Bench::new();
    bench.write("in.png", encoded(picture(128, 64), ImageFormat::Png));
    let fits = ["crop", "pad", "stretch"];
    let [crop, pad, stretch] =
        fits.map(|fit| frames(&bench, &from_image("in.png").set("--fit", fit)));
    assert!(crop != pad && pad != stretch && stretch != crop);
    assert!(frames(&bench, &from_image("in.png")) == crop, "crop is what happens by itself");
    bench.refuses(&from_image("in.png").set("--fit", "squeeze"), 2, &["crop", "pad", "stretch"]);
}

#[test]
fn an_upright_image_makes_an_upright_video() {
    let bench = Bench::new();
    bench.write("in.png", encoded(picture(64, 96), ImageFormat::Png));
    let plan = ["plan", "--model", "sd3-384p", "--image", "in.png", "--units", "2", "--json"];
    let plan: serde_json::Value = serde_json::from_str(&bench.run(plan).ok().text()).expect("JSON");
    assert_eq!((&plan["width"], &plan["height"]), (&384.into(), &640.into()));
    assert_eq!(plan["phases"][1]["name"], "image");
}

#[test]
fn the_smallest_and_thinnest_images_work() {
    let bench = Bench::new();
    for (width, height) in [(1, 1), (1, 300), (300, 1)] {
        bench.write("in.png", encoded(picture(width, height), ImageFormat::Png));
        for fit in ["crop", "pad", "stretch"] {
            frames(&bench, &from_image("in.png").set("--fit", fit));
        }
    }
}

#[test]
fn depth_and_colour_type_do_not_matter() {
    let bench = Bench::new();
    let rgb = picture(64, 64);
    bench.write("in.png", encoded(rgb.clone(), ImageFormat::Png));
    let wanted = frames(&bench, &from_image("in.png"));
    let deep: ImageBuffer<Rgb<u16>, Vec<u16>> =
        ImageBuffer::from_fn(64, 64, |x, y| Rgb(rgb.get_pixel(x, y).0.map(|v| u16::from(v) * 257)));
    bench.write("deep.png", encoded(deep, ImageFormat::Png));
    assert!(frames(&bench, &from_image("deep.png")) == wanted, "16 bits");
    let opaque = DynamicImage::from(rgb.clone()).to_rgba8();
    bench.write("alpha.png", encoded(opaque, ImageFormat::Png));
    assert!(frames(&bench, &from_image("alpha.png")) == wanted, "alpha");
    bench.write("in.webp", encoded(rgb, ImageFormat::WebP));
    assert!(frames(&bench, &from_image("in.webp")) == wanted, "WebP");
    // The content decides, not the name.
    fs::copy(bench.path("in.png"), bench.path("in.jpg")).expect("a copy");
    assert!(frames(&bench, &from_image("in.jpg")) == wanted, "a wrong extension");

    let grey: ImageBuffer<Luma<u8>, Vec<u8>> =
        ImageBuffer::from_fn(64, 64, |x, y| Luma([(x * 2 + y) as u8]));
    let same = RgbImage::from_fn(64, 64, |x, y| Rgb([grey.get_pixel(x, y).0[0]; 3]));
    bench.write("grey.png", encoded(grey, ImageFormat::Png));
    bench.write("same.png", encoded(same, ImageFormat::Png));
    assert!(frames(&bench, &from_image("grey.png")) == frames(&bench, &from_image("same.png")));
}

#[test]
fn a_photo_is_turned_as_its_camera_says() {
    let bench = Bench::new();
    let photo = encoded(picture(64, 128), ImageFormat::Jpeg);
    // An EXIF block with nothing but orientation 6: turn by 90 degrees clockwise.
    let exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut turned = photo[..2].to_vec();
    turned.extend([0xff, 0xe1]);
    turned.extend((exif.len() as u16 + 2).to_be_bytes());
    turned.extend(exif);
    turned.extend(&photo[2..]);
    bench.write("turned.jpg", turned);
    let upright = image::load_from_memory(&photo).expect("a JPEG").rotate90();
    bench.write("upright.png", encoded(upright, ImageFormat::Png));
    let [photo, wanted] =
        ["turned.jpg", "upright.png"].map(|name| frames(&bench, &from_image(name)));
    assert!(photo == wanted);
}

#[test]
fn images_that_cannot_be_read_are_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.path("folder.png")).expect("a folder");
    bench.write("empty.png", "");
    bench.write("text.png", "hello, I am no image at all");
    bench.write("video.png", b"\0\0\0\x20ftypisom\0\0\0\0isomavc1");
    for name in ["folder.png", "empty.png", "text.png", "video.png", "missing.png", "/dev/zero"] {
        bench.refuses(&from_image(name), 3, &[name]);
    }
    for (name, format) in [
        ("in.png", ImageFormat::Png),
        ("in.jpg", ImageFormat::Jpeg),
        ("in.webp", ImageFormat::WebP),
    ] {
        let whole = encoded(picture(64, 64), format);
        for length in [1, 10, 30, whole.len() / 2] {
            bench.write(name, &whole[..length]);
            bench.refuses(&from_image(name), 3, &[name]);
        }
    }
}

#[test]
fn a_bomb_is_refused_at_its_header() {
    let bench = Bench::new();
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let body = [kind.as_slice(), data].concat();
        let (length, sum) = ((data.len() as u32).to_be_bytes(), crc32fast::hash(&body));
        [length.as_slice(), &body, &sum.to_be_bytes()].concat()
    };
    for side in [30_000u32, 0, u32::MAX / 2] {
        let header = [&side.to_be_bytes()[..], &side.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
        let parts = [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &[])];
        bench.write("in.png", [parts.concat(), chunk(b"IEND", &[])].concat());
        bench.refuses(&from_image("in.png"), 3, &["in.png"]);
    }
}
