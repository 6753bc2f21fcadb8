//! Videos out: what is written is right, and complete or absent.

use std::fs;
use std::path::Path;

use mp4_atom::{Avc1, Codec, Colr, Decode, Ftyp, Header, Moov, StszSamples};
use openh264::decoder::{DecodedYUV, Decoder};
use openh264::formats::YUVSource;
use pyraflow::media::{Format, Frame, Metadata, OutputTarget, VideoSpec, inspect, open_sink};
use pyraflow::{ErrorKind, Result};
use tempfile::TempDir;

const COMMENT: &str = r#"{"prompt":"a cat — 猫 🐈","seed":7}"#;

fn spec(frames: u32) -> VideoSpec {
    VideoSpec { width: 128, height: 64, fps_num: 24, fps_den: 1, frames }
}

/// Soft colours that drift from frame to frame.
fn frame(index: u32) -> Frame {
    let wave = |p: f64| (128.0 + 100.0 * (p + f64::from(index) / 8.0).sin()) as u8;
    Frame::from_fn(128, 64, |x, y| {
        let (x, y) = (f64::from(x) / 20.0, f64::from(y) / 15.0);
        [wave(x), wave(y), wave(x + y)]
    })
    .unwrap()
}

fn comment(text: &str) -> Metadata {
    Metadata { comment: Some(text.into()) }
}

fn write(path: &Path, frames: u32, text: &str, overwrite: bool) -> Result<()> {
    let target = OutputTarget::parse(path)?;
    let mut sink = open_sink(&target, &spec(frames), &comment(text), overwrite)?;
    (0..frames).try_for_each(|index| sink.push(&frame(index)))?;
    sink.finish()
}

/// The boxes at the top of a file: kind, content.
fn boxes(bytes: &[u8]) -> Vec<(String, &[u8])> {
    let mut rest = bytes;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let header = Header::decode(&mut rest).unwrap();
        let (body, after) = rest.split_at(header.size.unwrap());
        found.push((header.kind.to_string(), body));
        rest = after;
    }
    found
}

fn index_of(bytes: &[u8]) -> Moov {
    let mut rest = bytes;
    Ftyp::decode(&mut rest).unwrap();
    Moov::decode(&mut rest).unwrap()
}

fn sample_entry(moov: &Moov) -> &Avc1 {
    match &moov.trak[0].mdia.minf.stbl.stsd.codecs[..] {
        [Codec::Avc1(entry)] => entry,
        other => panic!("{other:?}"),
    }
}

/// The samples that the index finds in the file.
fn samples<'a>(bytes: &'a [u8], moov: &Moov) -> Vec<&'a [u8]> {
    let table = &moov.trak[0].mdia.minf.stbl;
    let StszSamples::Different { sizes } = &table.stsz.samples else { panic!("equal sizes") };
    let chunks = &table.stco.as_ref().unwrap().entries;
    let mut sizes = sizes.iter();
    let mut found = Vec::new();
    for (number, &offset) in (1..).zip(chunks) {
        let entry = table.stsc.entries.iter().rfind(|e| e.first_chunk <= number).unwrap();
        let mut at = offset as usize;
        for &size in sizes.by_ref().take(entry.samples_per_chunk as usize) {
            found.push(&bytes[at..at + size as usize]);
            at += size as usize;
        }
    }
    assert_eq!(sizes.next(), None, "samples outside of all chunks");
    found
}

#[test]
fn mp4_has_its_index_first_and_all_of_it_right() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.mp4");
    write(&path, 60, COMMENT, false).unwrap();
    let bytes = fs::read(&path).unwrap();
    let top = boxes(&bytes);
    assert_eq!(top.iter().map(|b| &b.0[..]).collect::<Vec<_>>(), ["ftyp", "moov", "mdat"]);

    let moov = index_of(&bytes);
    assert_eq!((moov.mvhd.timescale, moov.mvhd.duration), (24_000, 60_000));
    assert_eq!((moov.mvhd.creation_time, moov.mvhd.modification_time), (0, 0));
    let [track] = &moov.trak[..] else { panic!("one track") };
    assert!(track.edts.is_none() && track.tkhd.enabled && track.tkhd.in_movie);
    assert_eq!((track.tkhd.width.integer(), track.tkhd.height.integer()), (128, 64));
    assert_eq!((track.mdia.mdhd.timescale, track.mdia.mdhd.duration), (24_000, 60_000));

    let table = &track.mdia.minf.stbl;
    let [timing] = &table.stts.entries[..] else { panic!("one duration") };
    assert_eq!((timing.sample_count, timing.sample_delta), (60, 1000));
    assert!(table.ctts.is_none() && table.co64.is_none());
    let keys = &table.stss.as_ref().unwrap().entries;
    assert_eq!(keys[..], [1, 49]);

    let samples = samples(&bytes, &moov);
    assert_eq!(samples.len(), 60);
    assert_eq!(samples.iter().map(|s| s.len()).sum::<usize>(), top[2].1.len());
    for (number, sample) in (1..).zip(&samples) {
        // The type of the first unit: 5 is a key frame, 1 any other.
        let kind = sample[4] & 0x1F;
        assert_eq!(kind == 5, keys.contains(&number), "sample {number} is of type {kind}");
    }
}

#[test]
fn mp4_says_the_same_about_colour_in_the_container_and_in_the_stream() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.mp4");
    write(&path, 2, COMMENT, false).unwrap();
    let moov = index_of(&fs::read(&path).unwrap());
    let entry = sample_entry(&moov);
    assert_eq!((entry.visual.width, entry.visual.height, entry.visual.depth), (128, 64, 24));
    let Some(Colr::Nclx {
        colour_primaries,
        transfer_characteristics,
        matrix_coefficients,
        full_range_flag,
    }) = entry.colr
    else {
        panic!("{:?}", entry.colr)
    };
    let container =
        [colour_primaries, transfer_characteristics, matrix_coefficients].map(u32::from);
    assert_eq!((container, full_range_flag), ([1, 1, 1], false));

    let avcc = &entry.avcc;
    let [sps] = &avcc.sequence_parameter_sets[..] else { panic!("one SPS") };
    assert_eq!(avcc.picture_parameter_sets.len(), 1);
    assert_eq!(avcc.length_size, 4);
    assert_eq!(avcc.avc_profile_indication, 100);
    assert_eq!(
        [avcc.avc_profile_indication, avcc.profile_compatibility, avcc.avc_level_indication],
        sps[1..4]
    );
    let stream = Sps::read(sps);
    let ext = avcc.ext.as_ref().unwrap();
    assert_eq!(u32::from(ext.chroma_format), stream.chroma_format);
    assert_eq!([ext.bit_depth_luma, ext.bit_depth_chroma].map(u32::from), stream.bit_depths);
    assert_eq!(stream.size, [128, 64]);
    assert_eq!((stream.colour, stream.full_range), (container, false));
}

/// What a sequence parameter set says (Rec. ITU-T H.264, 7.3.2.1.1 and E.1.1).
struct Sps {
    chroma_format: u32,
    bit_depths: [u32; 2],
    size: [u32; 2],
    full_range: bool,
    colour: [u32; 3],
}

impl Sps {
    fn read(unit: &[u8]) -> Self {
        // Without the emulation prevention: 00 00 03 stands for 00 00.
        let mut bytes: Vec<u8> = Vec::new();
        for &byte in unit {
            if !(byte == 3 && bytes.ends_with(&[0, 0])) {
                bytes.push(byte);
            }
        }
        let mut bits = Bits(bytes.iter().flat_map(|b| (0..8).rev().map(move |i| b >> i & 1)));
        bits.take(32); // header, profile, constraints, level
        bits.golomb(); // id
        let chroma_format = bits.golomb();
        let bit_depths = [bits.golomb() + 8, bits.golomb() + 8];
        assert_eq!(bits.take(2), 0, "no lossless mode, no scaling matrix");
        bits.golomb(); // bits of frame numbers
        match bits.golomb() {
            0 => drop(bits.golomb()),
            order => assert_eq!(order, 2, "order of pictures"),
        }
        bits.golomb(); // reference frames
        bits.take(1);
        let mut size = [(bits.golomb() + 1) * 16, (bits.golomb() + 1) * 16];
        assert_eq!(bits.take(1), 1, "frames, not fields");
        bits.take(1);
        if bits.take(1) == 1 {
            let [left, right, top, bottom] = std::array::from_fn(|_| bits.golomb());
            size = [size[0] - 2 * (left + right), size[1] - 2 * (top + bottom)];
        }
        assert_eq!(bits.take(1), 1, "usability information is there");
        assert_eq!(bits.take(2), 0, "no aspect ratio, no overscan");
        assert_eq!(bits.take(1), 1, "video signal type is there");
        bits.take(3); // format
        let full_range = bits.take(1) == 1;
        assert_eq!(bits.take(1), 1, "colour description is there");
        let colour = std::array::from_fn(|_| bits.take(8));
        Sps { chroma_format, bit_depths, size, full_range, colour }
    }
}

struct Bits<I>(I);

impl<I: Iterator<Item = u8>> Bits<I> {
    fn take(&mut self, count: u32) -> u32 {
        (0..count).fold(0, |value, _| value << 1 | u32::from(self.0.next().unwrap()))
    }

    fn golomb(&mut self) -> u32 {
        let zeros = self.0.by_ref().take_while(|&bit| bit == 0).count() as u32;
        (1 << zeros) - 1 + self.take(zeros)
    }
}

#[test]
fn mp4_decodes_to_the_frames() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.mp4");
    write(&path, 30, COMMENT, false).unwrap();
    let bytes = fs::read(&path).unwrap();
    let moov = index_of(&bytes);
    let avcc = &sample_entry(&moov).avcc;
    let mut decoder = Decoder::new().unwrap();
    let start_code = [0, 0, 0, 1];
    let headers = [&avcc.sequence_parameter_sets[0], &avcc.picture_parameter_sets[0]];
    let mut packet: Vec<u8> = headers.iter().flat_map(|h| [&start_code, &h[..]].concat()).collect();
    for (index, sample) in (0..).zip(samples(&bytes, &moov)) {
        let mut rest = sample;
        while let Some((length, after)) = rest.split_first_chunk() {
            let (unit, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            packet.extend([&start_code, unit].concat());
            rest = after;
        }
        let decoded = decoder.decode(&packet).unwrap().expect("a picture per sample");
        packet.clear();
        assert_near(&decoded, &frame(index));
    }
}

/// Compares the means of 2×2 pixels, which chroma holds, by the formula of BT.709, limited
/// range, in floating point.
fn assert_near(decoded: &DecodedYUV<'_>, want: &Frame) {
    let (luma_stride, chroma_stride, _) = decoded.strides();
    let (columns, rows) = (want.width() as usize / 2, want.height() as usize / 2);
    let mut squares = [0.0; 3];
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        let corners = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(y, x)| (2 * row + y, 2 * column + x));
        let luma = corners.map(|(y, x)| f64::from(decoded.y()[y * luma_stride + x]));
        let y = (luma.iter().sum::<f64>() / 4.0 - 16.0) / 219.0;
        let chroma = row * chroma_stride + column;
        let cb = (f64::from(decoded.u()[chroma]) - 128.0) / 224.0;
        let cr = (f64::from(decoded.v()[chroma]) - 128.0) / 224.0;
        let (r, b) = (y + 1.5748 * cr, y + 1.8556 * cb);
        let g = (y - 0.2126 * r - 0.0722 * b) / 0.7152;
        for (channel, got) in [r, g, b].into_iter().enumerate() {
            let pixels = corners.map(|(y, x)| want.pixel(x as u32, y as u32).unwrap()[channel]);
            let mean = pixels.into_iter().map(f64::from).sum::<f64>() / 4.0;
            squares[channel] += (got * 255.0 - mean).powi(2);
        }
    }
    let psnr = squares.map(|sum| 10.0 * (255f64.powi(2) * (rows * columns) as f64 / sum).log10());
    // The encoder's own test asks for 42 dB in each plane; the largest gain of the matrix,
    // 255 · √(219⁻² + (1.8556 / 224)²) = 2.4 for blue, takes 7.6 dB of that.
    assert!(psnr.iter().all(|&db| db > 42.0 - 7.6), "{psnr:.1?} dB");
}

#[test]
fn the_same_frames_give_the_same_files() {
    let directory = TempDir::new().unwrap();
    for extension in ["mp4", "gif", "y4m"] {
        let [a, b] = ["a", "b"].map(|n| directory.path().join(n).with_extension(extension));
        write(&a, 5, COMMENT, false).unwrap();
        write(&b, 5, COMMENT, false).unwrap();
        assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "{extension}");
    }
}

#[test]
fn files_tell_what_they_are() {
    let directory = TempDir::new().unwrap();
    let long = "x".repeat(3000);
    for (format, frames, duration) in [
        (Format::Mp4, 1, Some(1.0 / 24.0)),
        (Format::Mp4, 48, Some(2.0)),
        (Format::Gif, 48, Some(2.0)),
        (Format::Y4m, 48, Some(2.0)),
        (Format::Png, 1, None),
    ] {
        for text in [COMMENT, &long] {
            let path = directory.path().join("a").with_extension(format.name());
            write(&path, frames, text, true).unwrap();
            let info = inspect(&path).unwrap();
            assert_eq!(info.format, format);
            assert_eq!((info.width, info.height, info.frames), (128, 64, u64::from(frames)));
            assert_eq!(info.duration, duration);
            assert_eq!(info.frame_rate().map(f64::round), duration.map(|_| 24.0));
            let kept = (format != Format::Y4m).then_some(text);
            assert_eq!(info.comment.as_deref(), kept, "{format:?}");
        }
    }
    let silent = directory.path().join("silent.mp4");
    let target = OutputTarget::parse(&silent).unwrap();
    let mut sink = open_sink(&target, &spec(1), &Metadata::default(), false).unwrap();
    sink.push(&frame(0)).unwrap();
    sink.finish().unwrap();
    assert_eq!(inspect(&silent).unwrap().comment, None);
}

#[test]
fn damaged_files_are_refused_and_never_panic() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("damaged");
    for extension in ["mp4", "gif", "png"] {
        let whole = directory.path().join("a").with_extension(extension);
        write(&whole, 1, COMMENT, false).unwrap();
        let bytes = fs::read(&whole).unwrap();
        // Every byte of the part with the structure, turned over.
        for at in 0..bytes.len().min(1500) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xFF;
            fs::remove_file(&path).ok();
            fs::write(&path, &damaged).unwrap();
            if let Err(e) = inspect(&path) {
                assert_eq!(e.kind(), ErrorKind::Input, "{extension}, byte {at}: {e}");
            }
        }
        for length in [0, 3, 9, 40] {
            fs::remove_file(&path).ok();
            fs::write(&path, &bytes[..length]).unwrap();
            let error = inspect(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Input, "{extension}, {length} bytes");
        }
    }
    assert_eq!(inspect(directory.path()).unwrap_err().kind(), ErrorKind::Input);
    assert_eq!(inspect(&directory.path().join("none")).unwrap_err().kind(), ErrorKind::Io);
}

/// Boxes within boxes within boxes, as deep as a file can hold them.
#[test]
fn endless_nesting_in_an_mp4_is_survived() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("deep.mp4");
    let depth = 100_000u32;
    for kind in [b"trak", b"meta", b"udta"] {
        let mut bytes = b"\0\0\0\x10ftypisom\0\0\0\0".to_vec();
        bytes.extend([&(8 * depth + 8).to_be_bytes()[..], b"moov"].concat());
        for level in 0..depth {
            bytes.extend([&(8 * (depth - level)).to_be_bytes()[..], kind].concat());
        }
        fs::write(&path, bytes).unwrap();
        assert_eq!(inspect(&path).unwrap_err().kind(), ErrorKind::Input);
    }
}
