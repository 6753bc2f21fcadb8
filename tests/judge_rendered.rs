//! Checks the judge of the demo model on clips whose contents are known: a small renderer
//! of this test's own draws every combination of shape, colour and motion, clean and spoilt
//! in the ways a video autoencoder spoils.

use std::f32::consts::TAU;

mod judge;

use judge::{Colour, Frame, Motion, Shape, Verdict, clip};

const SIZE: usize = 128;
/// The share of right answers asked for in every attribute.
const RIGHT: f64 = 0.99;

/// What a clip shows.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Content {
    shape: Shape,
    colour: Colour,
    motion: Motion,
}

/// Every combination that can be seen: a circle that spins looks like one that stays.
fn combinations() -> Vec<Content> {
    let mut all = Vec::new();
    for &shape in Shape::ALL {
        for &colour in Colour::ALL {
            for &motion in Motion::ALL {
                if (shape, motion) != (Shape::Circle, Motion::Spins) {
                    all.push(Content { shape, colour, motion });
                }
            }
        }
    }
    all
}

/// SplitMix64: enough randomness for drawing clips.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Nearly normal: a sum of four uniform numbers, scaled to deviation 1.
    fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.between(-1.0, 1.0)).sum::<f32>() * 0.75f32.sqrt()
    }

    fn index(&mut self, count: usize) -> usize {
        (self.bits() % count as u64) as usize
    }
}

/// Where the object is and how it lies in one frame.
#[derive(Clone, Copy)]
struct Pose {
    x: f32,
    y: f32,
    radius: f32,
    angle: f32,
}

/// The poses of a motion over `frames` frames. Objects that travel far come from beyond the
/// edge of the image and leave it in part.
fn poses(motion: Motion, frames: usize, random: &mut Random) -> Vec<Pose> {
    let seconds = frames as f32 / 24.0;
    let radius = random.between(16.0, 30.0);
    let tilt = random.between(-0.3, 0.3);
    let middle = random.between(52.0, 76.0);
    let across = random.between(22.0, 44.0) * seconds;
    let factor = random.between(1.4, 1.9);
    let speed = random.between(2.0, 3.5) * if random.index(2) == 0 { 1.0 } else { -1.0 };
    let (height, beat) = (random.between(22.0, 36.0), random.between(1.2, 1.6));
    (0..frames)
        .map(|frame| {
            let part = frame as f32 / (frames - 1) as f32;
            let way = across * (part - 0.5);
            let mut pose = Pose { x: middle, y: middle, radius, angle: tilt };
            match motion {
                Motion::Right => pose.x += way,
                Motion::Left => pose.x -= way,
                Motion::Down => pose.y += way,
                Motion::Up => pose.y -= way,
                Motion::Grows => pose.radius *= factor.powf(part - 0.5),
                Motion::Shrinks => pose.radius *= factor.powf(0.5 - part),
                Motion::Spins => pose.angle += speed * part * seconds,
                Motion::Bounces => {
                    let phase = (part * seconds * beat).fract();
                    pose.y += height * (0.5 - 4.0 * phase * (1.0 - phase));
                }
            }
            pose
        })
        .collect()
}

/// The corners of `shape` in the image, the first one straight up when it lies level; none
/// for a circle.
fn corners(shape: Shape, pose: Pose) -> Vec<(f32, f32)> {
    let (count, inner) = match shape {
        Shape::Circle => (0, 1.0),
        Shape::Square => (4, 1.0),
        Shape::Triangle => (3, 1.0),
        Shape::Star => (10, 0.42),
    };
    (0..count)
        .map(|i| {
            let (sin, cos) = (pose.angle + i as f32 / count as f32 * TAU).sin_cos();
            let r = pose.radius * if i % 2 == 0 { 1.0 } else { inner };
            (pose.x + r * sin, pose.y - r * cos)
        })
        .collect()
}

/// Whether the polygon with these corners, or the circle when there are none, covers a
/// point.
fn covers(corners: &[(f32, f32)], pose: Pose, x: f32, y: f32) -> bool {
    if corners.is_empty() {
        return (x - pose.x).hypot(y - pose.y) <= pose.radius;
    }
    // An odd number of sides lies to the right of a point inside.
    let mut inside = false;
    for (i, &(ax, ay)) in corners.iter().enumerate() {
        let (bx, by) = corners[(i + 1) % corners.len()];
        if (ay > y) != (by > y) && x < ax + (y - ay) / (by - ay) * (bx - ax) {
            inside = !inside;
        }
    }
    inside
}

/// A paint that people call by the colour's name; several shades of it.
fn paint(colour: Colour, random: &mut Random) -> [f32; 3] {
    let base = match colour {
        Colour::Red => [220.0, 30.0, 30.0],
        Colour::Orange => [245.0, 140.0, 10.0],
        Colour::Yellow => [245.0, 230.0, 30.0],
        Colour::Green => [30.0, 180.0, 50.0],
        Colour::Cyan => [30.0, 215.0, 230.0],
        Colour::Blue => [35.0, 70.0, 230.0],
        Colour::Purple => [150.0, 40.0, 210.0],
        Colour::White => [240.0, 240.0, 240.0],
    };
    let light = random.between(0.88, 1.05);
    base.map(|c| (c * light).min(255.0))
}

/// Colours as numbers, so that several spoilings round only once.
type Picture = Vec<[f32; 3]>;

/// A dark background: plain, checkered, striped or shaded.
struct Background {
    kind: usize,
    base: f32,
    depth: f32,
    cell: usize,
}

impl Background {
    fn draw(random: &mut Random) -> Background {
        Background {
            kind: random.index(4),
            base: random.between(15.0, 70.0),
            depth: random.between(8.0, 20.0),
            cell: 8 + random.index(12),
        }
    }

    fn at(&self, x: usize, y: usize) -> f32 {
        let place = match self.kind {
            0 => 0.0,
            1 => ((x / self.cell + y / self.cell) % 2) as f32,
            2 => (x / self.cell % 2) as f32,
            _ => (x + y) as f32 / (2 * SIZE) as f32,
        };
        self.base + self.depth * place
    }

    fn picture(&self) -> Picture {
        (0..SIZE * SIZE).map(|i| [self.at(i % SIZE, i / SIZE); 3]).collect()
    }
}

/// Offsets of the samples within a pixel.
const THIRDS: [f32; 3] = [-1.0 / 3.0, 0.0, 1.0 / 3.0];

/// Draws a clip with 3×3 samples per pixel.
fn render(content: Content, frames: usize, random: &mut Random) -> Vec<Picture> {
    let background = Background::draw(random).picture();
    let paint = paint(content.colour, random);
    poses(content.motion, frames, random)
        .into_iter()
        .map(|pose| {
            let corners = corners(content.shape, pose);
            let mut picture = background.clone();
            let range = |middle: f32| {
                let bound = |at: f32| at.clamp(0.0, SIZE as f32) as usize;
                bound(middle - pose.radius - 1.0)..bound(middle + pose.radius + 2.0)
            };
            for (y, x) in range(pose.y).flat_map(|y| range(pose.x).map(move |x| (y, x))) {
                let hit = |dx: f32, dy: f32| covers(&corners, pose, x as f32 + dx, y as f32 + dy);
                let row = |dy: f32| THIRDS.iter().filter(|dx| hit(**dx, dy)).count();
                let cover = THIRDS.iter().map(|dy| row(*dy)).sum::<usize>() as f32 / 9.0;
                for (value, paint) in picture[y * SIZE + x].iter_mut().zip(paint) {
                    *value += cover * (paint - *value);
                }
            }
            picture
        })
        .collect()
}

/// Adds noise of about 25 dB.
fn noise(pictures: &mut [Picture], random: &mut Random) {
    for value in pictures.iter_mut().flatten().flatten() {
        *value += 14.0 * random.normal();
    }
}

/// Averages `2 * reach + 1` pixels along both axes.
fn blur(pictures: &mut [Picture], reach: usize) {
    for picture in pictures {
        for (step, line) in [(1, SIZE), (SIZE, 1)] {
            let old = picture.clone();
            for at in 0..SIZE {
                for along in 0..SIZE {
                    let (low, high) = (along.saturating_sub(reach), (along + reach).min(SIZE - 1));
                    let sum =
                        |c: usize| (low..=high).map(|k| old[at * line + k * step][c]).sum::<f32>();
                    picture[at * line + along * step] =
                        [0, 1, 2].map(|c| sum(c) / (high - low + 1) as f32);
                }
            }
        }
    }
}

/// Pulls the pixels of every 8×8 block towards their mean and shifts the block's colour.
fn blocks(pictures: &mut [Picture], random: &mut Random) {
    for picture in pictures {
        for block in 0..(SIZE / 8) * (SIZE / 8) {
            let (left, top) = (block % (SIZE / 8) * 8, block / (SIZE / 8) * 8);
            let pixels = || (0..64).map(move |i| (top + i / 8) * SIZE + left + i % 8);
            let mean = [0, 1, 2].map(|c| pixels().map(|i| picture[i][c]).sum::<f32>() / 64.0);
            let shift = [0, 1, 2].map(|_| 10.0 * random.normal());
            for i in pixels() {
                picture[i] = [0, 1, 2].map(|c| 0.7 * picture[i][c] + 0.3 * mean[c] + shift[c]);
            }
        }
    }
}

/// Moves every frame by up to a pixel, as generated objects tremble.
fn tremble(pictures: &mut [Picture], random: &mut Random) {
    for picture in pictures {
        let shift = random.index(3) * SIZE + random.index(3);
        picture.rotate_left(shift);
    }
}

fn frames(pictures: &[Picture]) -> Vec<Frame> {
    let byte = |value: &f32| value.round().clamp(0.0, 255.0) as u8;
    pictures
        .iter()
        .map(|p| Frame { width: SIZE, height: SIZE, rgb: p.iter().flatten().map(byte).collect() })
        .collect()
}

/// Draws every `step`th combination, spoils it and judges it.
fn verdicts(
    seed: u64,
    step: usize,
    spoil: impl Fn(&mut [Picture], &mut Random),
) -> Vec<(Content, Verdict)> {
    combinations()
        .into_iter()
        .step_by(step)
        .enumerate()
        .map(|(i, content)| {
            let mut random = Random(seed.wrapping_mul(1000) + i as u64);
            let length = [17, 25, 33][random.index(3)];
            let mut pictures = render(content, length, &mut random);
            spoil(&mut pictures, &mut random);
            (content, judge::judge(&frames(&pictures)))
        })
        .collect()
}

/// The shares of right colours, shapes and motions.
fn shares<'a>(pairs: impl Iterator<Item = (&'a Content, &'a Verdict)> + Clone) -> [f64; 3] {
    let share = |right: fn(&Content, &Verdict) -> bool| {
        let all = pairs.clone().count();
        pairs.clone().filter(|(c, v)| right(c, v)).count() as f64 / all as f64
    };
    [
        share(|c, v| v.colour == Some(c.colour)),
        share(|c, v| v.shape == Some(c.shape)),
        share(|c, v| v.motion == Some(c.motion)),
    ]
}

fn assert_right(verdicts: &[(Content, Verdict)]) {
    let shares = shares(verdicts.iter().map(|(c, v)| (c, v)));
    let wrong: Vec<_> = verdicts
        .iter()
        .filter(|(c, v)| {
            (v.colour, v.shape, v.motion) != (Some(c.colour), Some(c.shape), Some(c.motion))
        })
        .collect();
    assert!(shares.iter().all(|s| *s >= RIGHT), "{shares:?} (colour, shape, motion): {wrong:#?}");
}

#[test]
fn clean_clips_are_read_right_and_other_clips_labels_are_not() {
    let verdicts = verdicts(1, 1, |_, _| ());
    assert_right(&verdicts);
    // 101 has no factor in common with the 248 combinations: all words get mixed.
    let others = (0..verdicts.len()).map(|i| (i * 101 + 57) % verdicts.len());
    let pairs: Vec<_> = verdicts.iter().zip(others).map(|((_, v), o)| (verdicts[o].0, v)).collect();
    let [colour, shape, motion] = shares(pairs.iter().map(|(c, v)| (c, *v)));
    assert!((0.04..0.22).contains(&colour), "colour {colour}: chance is 1 in 8");
    assert!((0.15..0.36).contains(&shape), "shape {shape}: chance is 1 in 4");
    assert!((0.04..0.22).contains(&motion), "motion {motion}: chance is 1 in 8");
}

#[test]
fn noisy_clips_are_read_right() {
    assert_right(&verdicts(2, 3, noise));
}

#[test]
fn blurred_and_trembling_clips_are_read_right() {
    assert_right(&verdicts(3, 3, |pictures, random| {
        blur(pictures, 2);
        tremble(pictures, random);
    }));
}

#[test]
fn blocky_clips_are_read_right() {
    assert_right(&verdicts(4, 3, |pictures, random| {
        blur(pictures, 1);
        blocks(pictures, random);
    }));
}

#[test]
fn nothing_is_read_from_a_clip_without_an_object() {
    let mut random = Random(5);
    let background = Background { kind: 1, base: 40.0, depth: 20.0, cell: 16 };
    let mut pictures = vec![background.picture(); 17];
    noise(&mut pictures, &mut random);
    let verdict = judge::judge(&frames(&pictures));
    assert_eq!(
        verdict,
        Verdict { colour: None, shape: None, motion: None, measures: None },
        "noise on a checkered background shows nothing"
    );
    assert_eq!(judge::judge(&[]), verdict);
}

#[test]
fn an_object_that_stays_has_no_motion_and_one_of_another_shape_no_shape() {
    let mut random = Random(6);
    let content = Content { shape: Shape::Square, colour: Colour::Green, motion: Motion::Right };
    let mut still = vec![render(content, 17, &mut random).swap_remove(0); 17];
    noise(&mut still, &mut random);
    let verdict = judge::judge(&frames(&still));
    assert_eq!((verdict.shape, verdict.motion), (Some(Shape::Square), None));

    // A bar of 80 by 16 pixels.
    let bar = |i: usize| (24..104).contains(&(i % SIZE)) && (56..72).contains(&(i / SIZE));
    let picture: Picture =
        (0..SIZE * SIZE).map(|i| if bar(i) { [30.0, 60.0, 230.0] } else { [30.0; 3] }).collect();
    let verdict = judge::judge(&frames(&vec![picture; 17]));
    assert_eq!((verdict.colour, verdict.shape), (Some(Colour::Blue), None));
}

#[test]
fn clips_are_read_from_files() -> pyraflow::Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut random = Random(7);
    let content = Content { shape: Shape::Star, colour: Colour::Orange, motion: Motion::Bounces };
    let drawn = frames(&render(content, 25, &mut random));
    let write = |name: &str, bytes: Vec<u8>| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file written");
        path
    };

    let header =
        format!("{{'descr': '|u1', 'fortran_order': False, 'shape': (25, {SIZE}, {SIZE}, 3), }}\n");
    let mut npy = b"\x93NUMPY\x01\x00".to_vec();
    npy.extend((header.len() as u16).to_le_bytes());
    npy.extend(header.bytes());
    npy.extend(drawn.iter().flat_map(|f| &f.rgb));
    assert_eq!(clip::read(&write("clip.npy", npy.clone()))?, drawn);
    npy.pop();
    assert!(clip::read(&write("short.npy", npy)).is_err(), "a byte is missing");

    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("a folder made");
    for (i, frame) in drawn.iter().enumerate() {
        let (rgb, side) = (frame.rgb.clone(), SIZE as u32);
        let image = image::RgbImage::from_raw(side, side, rgb).expect("a whole image");
        image.save(images.join(format!("clip-{i:05}.png"))).expect("an image written");
    }
    assert_eq!(clip::read(&images)?, drawn);

    for (chroma, at_least) in [("444", 45.0), ("420jpeg", 28.0)] {
        let bytes = y4m(&drawn, chroma);
        let read = clip::read(&write("clip.y4m", bytes.clone()))?;
        assert_eq!(read.len(), drawn.len());
        for (read, drawn) in read.iter().zip(&drawn) {
            let psnr = clip::psnr(read, drawn).expect("the same size");
            assert!(psnr > at_least, "{chroma}: {psnr} dB");
        }
        let verdict = judge::judge(&read);
        assert_eq!(verdict.colour, Some(content.colour));
        assert_eq!(verdict.shape, Some(content.shape));
        assert_eq!(verdict.motion, Some(content.motion));
        let cut = clip::read(&write("short.y4m", bytes[..bytes.len() - 1].to_vec()));
        assert!(cut.is_err(), "a byte is missing");
    }
    Ok(())
}

/// Writes limited-range BT.709; chroma of halved planes is that of the pixels around it.
fn y4m(frames: &[Frame], chroma: &str) -> Vec<u8> {
    let mut bytes = format!("YUV4MPEG2 W{SIZE} H{SIZE} F24:1 Ip A1:1 C{chroma}\n").into_bytes();
    let step = if chroma == "444" { 1 } else { 2 };
    for frame in frames {
        bytes.extend(b"FRAME\n");
        let pixels: Vec<[f32; 3]> = frame.pixels().collect();
        let luma = |[r, g, b]: [f32; 3]| 0.2126 * r + 0.7152 * g + 0.0722 * b;
        bytes.extend(pixels.iter().map(|p| (16.0 + luma(*p) * 219.0 / 255.0).round() as u8));
        for (channel, range) in [(2, 1.8556), (0, 1.5748)] {
            for y in (0..SIZE).step_by(step) {
                for x in (0..SIZE).step_by(step) {
                    let around = (y..y + step).flat_map(|y| (x..x + step).map(move |x| (x, y)));
                    let sum: f32 = around
                        .map(|(x, y)| pixels[y * SIZE + x])
                        .map(|p| (p[channel] - luma(p)) / range)
                        .sum();
                    let value = 128.0 + sum / (step * step) as f32 * 224.0 / 255.0;
                    bytes.push(value.round() as u8);
                }
            }
        }
    }
    bytes
}
