//! Finds the object: two colours, a soft mask, the largest connected piece.

use super::{Frame, median};

/// Two colours nearer than this (of 441) are one: there is no object.
const LEAST_CONTRAST: f32 = 60.0;
/// A piece with fewer pixels than this share of the frame is dirt.
const LEAST_AREA: f32 = 0.003;
/// One pixel in so many is enough to find the colours.
const SAMPLE: usize = 29;
/// Rounds of two-means clustering; it settles within a few.
const ROUNDS: usize = 8;

/// A clip taken apart into background and object.
pub struct Scene {
    /// The object in the frames where it was found.
    pub objects: Vec<Object>,
    /// Distance between the colours of object and background.
    pub contrast: f32,
}

/// The object in one frame.
pub struct Object {
    /// Index of the frame.
    pub frame: usize,
    pub width: usize,
    pub height: usize,
    /// Coverage of each pixel, 0 to 1; 0 outside the piece and its rim.
    pub mask: Vec<f32>,
    /// Centre of gravity of the mask, in pixels (pixel centres at whole numbers).
    pub centre: [f32; 2],
    /// Sum of the mask, in pixels.
    pub area: f32,
    /// Mean colour of the fully covered pixels.
    pub rgb: [f32; 3],
    /// Whether it touches the edge of the image, so that a part may be out of sight.
    pub cut: bool,
}

impl Scene {
    /// Takes `frames` apart; `None` where there are no frames or no object stands out.
    pub fn read(frames: &[Frame]) -> Option<Scene> {
        let background = background(frames)?;
        let object = object_colour(frames, background)?;
        let contrast = distance(object, background);
        if contrast < LEAST_CONTRAST {
            return None;
        }
        let objects = frames
            .iter()
            .enumerate()
            .filter_map(|(index, frame)| find(index, frame, background, object))
            .collect();
        Some(Scene { objects, contrast })
    }
}

/// The median colour of a band along the edges of all frames.
fn background(frames: &[Frame]) -> Option<[f32; 3]> {
    let first = frames.first()?;
    let (w, h) = (first.width, first.height);
    let band = (w.min(h) / 24).max(1);
    let mut channels = [const { Vec::new() }; 3];
    for frame in frames {
        for (i, pixel) in frame.pixels().enumerate() {
            let (x, y) = (i % w, i / w);
            if x < band || y < band || x >= w - band || y >= h - band {
                for (channel, value) in channels.iter_mut().zip(pixel) {
                    channel.push(value);
                }
            }
        }
    }
    Some(channels.map(median))
}

/// Two-means clustering with one mean held at the background: starts from the pixels that
/// differ most, so that a small object counts as much as a large one.
fn object_colour(frames: &[Frame], background: [f32; 3]) -> Option<[f32; 3]> {
    let pixels: Vec<[f32; 3]> = frames.iter().flat_map(|f| f.pixels().step_by(SAMPLE)).collect();
    let mut distances: Vec<f32> = pixels.iter().map(|p| distance(*p, background)).collect();
    let far = distances.len() - 1 - distances.len() / 400;
    let (_, &mut far, _) = distances.select_nth_unstable_by(far, f32::total_cmp);
    let mut object = mean(pixels.iter().filter(|p| distance(**p, background) >= 0.8 * far))?;
    for _ in 0..ROUNDS {
        let near = |p: &&[f32; 3]| distance(**p, object) < distance(**p, background);
        object = mean(pixels.iter().filter(near))?;
    }
    Some(object)
}

/// The largest piece of `frame` that is nearer to `object` than to `background`.
fn find(index: usize, frame: &Frame, background: [f32; 3], object: [f32; 3]) -> Option<Object> {
    let (w, h) = (frame.width, frame.height);
    // Place between the two colours, stretched so that texture and noise at either end
    // vanish while the half-way line, the edge of the object, stays.
    let axis = difference(object, background);
    let scale = 2.0 / dot(axis, axis);
    let offset = scale * dot(background, axis) + 0.5;
    let place = |p| (scale * dot(p, axis) - offset).clamp(0.0, 1.0);
    let mut mask: Vec<f32> = frame.pixels().map(place).collect();
    let piece = largest_piece(&mask, w, h)?;
    if (piece.iter().filter(|&&inside| inside).count() as f32) < LEAST_AREA * (w * h) as f32 {
        return None;
    }
    let mut cut = false;
    let (mut area, mut sum) = (0.0f32, [0.0f32; 2]);
    for (i, m) in mask.iter_mut().enumerate() {
        // The piece counts with the rim that it covers in part.
        let mut near = piece[i];
        if !near && *m > 0.0 {
            neighbours(i, w, h, |n| near |= piece[n]);
        }
        if !near {
            *m = 0.0;
            continue;
        }
        let (x, y) = (i % w, i / w);
        cut |= piece[i] && (x == 0 || y == 0 || x == w - 1 || y == h - 1);
        area += *m;
        sum = [sum[0] + *m * x as f32, sum[1] + *m * y as f32];
    }
    let covered = frame.pixels().zip(&mask).filter(|(_, m)| **m >= 1.0).map(|(p, _)| p);
    let covered: Vec<_> = covered.collect();
    let rgb = mean(covered.iter()).unwrap_or(object);
    let centre = [sum[0] / area, sum[1] / area];
    Some(Object { frame: index, width: w, height: h, mask, centre, area, rgb, cut })
}

/// The pixels of the largest 8-connected piece of `mask` above one half.
fn largest_piece(mask: &[f32], w: usize, h: usize) -> Option<Vec<bool>> {
    let mut seen = vec![false; mask.len()];
    let mut best = Vec::new();
    for start in 0..mask.len() {
        if seen[start] || mask[start] <= 0.5 {
            continue;
        }
        seen[start] = true;
        let mut piece = vec![start];
        let mut next = 0;
        while next < piece.len() {
            let at = piece[next];
            next += 1;
            neighbours(at, w, h, |n| {
                if !seen[n] && mask[n] > 0.5 {
                    seen[n] = true;
                    piece.push(n);
                }
            });
        }
        if piece.len() > best.len() {
            best = piece;
        }
    }
    if best.is_empty() {
        return None;
    }
    let mut inside = vec![false; mask.len()];
    best.into_iter().for_each(|i| inside[i] = true);
    Some(inside)
}

/// Calls `visit` with each of the up to eight neighbours of pixel `at`.
fn neighbours(at: usize, w: usize, h: usize, mut visit: impl FnMut(usize)) {
    let (x, y) = (at % w, at / w);
    for ny in y.saturating_sub(1)..=(y + 1).min(h - 1) {
        for nx in x.saturating_sub(1)..=(x + 1).min(w - 1) {
            if (nx, ny) != (x, y) {
                visit(ny * w + nx);
            }
        }
    }
}

fn difference(a: [f32; 3], b: [f32; 3]) -> [f32; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

fn dot(a: [f32; 3], b: [f32; 3]) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn distance(a: [f32; 3], b: [f32; 3]) -> f32 {
    let d = difference(a, b);
    dot(d, d).sqrt()
}

fn mean<'a>(pixels: impl Iterator<Item = &'a [f32; 3]>) -> Option<[f32; 3]> {
    let (mut count, mut sum) = (0u32, [0.0f64; 3]);
    for pixel in pixels {
        count += 1;
        sum.iter_mut().zip(pixel).for_each(|(s, p)| *s += f64::from(*p));
    }
    (count > 0).then(|| sum.map(|s| (s / f64::from(count)) as f32))
}
