//! Names the object's shape by its outline: the distance from centre to edge around it.

use std::f32::consts::TAU;

use super::{median, scene::Object, words};

words! {
    /// A shape word.
    Shape { Circle = "circle", Square = "square", Triangle = "triangle", Star = "star" }
}

impl Shape {
    /// The number of turns that leave the shape as it was; a circle's cannot be counted.
    pub fn symmetry(self) -> Option<usize> {
        match self {
            Shape::Circle => None,
            Shape::Square => Some(4),
            Shape::Triangle => Some(3),
            Shape::Star => Some(5),
        }
    }

    /// Distance from centre to edge at `angle` from a corner, in units of the distance
    /// from centre to corner.
    fn edge(self, angle: f32) -> f32 {
        let Some(n) = self.symmetry() else { return 1.0 };
        let half = TAU / n as f32 / 2.0;
        // Angle from the nearest corner; the edge runs from there to `inner` at `half`.
        let angle = (angle + half).rem_euclid(2.0 * half) - half;
        let inner = if self == Shape::Star { STAR_INNER } else { half.cos() };
        // The straight line from (1, 0) to inner·(cos half, sin half), in polar form.
        let (x, y) = (inner * half.cos() - 1.0, inner * half.sin());
        y / (y * angle.abs().cos() - x * angle.abs().sin())
    }
}

/// Directions in which an outline is measured: a multiple of 3, 4 and 5.
const RAYS: usize = 120;
/// Inner radius of a star over its outer one; between the classical 0.38 and plump 0.5.
const STAR_INNER: f32 = 0.44;
/// Step along a ray in pixels.
const STEP: f32 = 1.0;
/// An outline that differs by more than this from every shape is none of them.
const MOST_MISFIT: f32 = 0.16;

/// The outline of an object in one frame.
pub struct Outline {
    /// Distance from centre to edge along each ray, in units of `radius`; `None` where the
    /// ray leaves the image before it leaves the object.
    profile: Vec<Option<f32>>,
    /// Radius of a circle as large as the object, in pixels.
    pub radius: f32,
    /// Whether the object is in sight as a whole.
    pub whole: bool,
}

impl Outline {
    /// Measures the outline of `object` from its centre of gravity.
    ///
    /// A ray's length is that of a circular sector with the mask's area along the ray, so
    /// that holes and ragged edges count by their size.
    pub fn trace(object: &Object) -> Outline {
        let radius = (object.area / (TAU / 2.0)).sqrt();
        let profile = (0..RAYS)
            .map(|ray| {
                let (sin, cos) = (ray as f32 * TAU / RAYS as f32).sin_cos();
                let mut sector = 0.0;
                for step in 0.. {
                    let r = (step as f32 + 0.5) * STEP;
                    let (x, y) = (object.centre[0] + r * cos, object.centre[1] + r * sin);
                    match sample(object, x, y) {
                        Some(m) => sector += 2.0 * m * r * STEP,
                        None if object.cut && reaches_edge(object, x, y) => return None,
                        None => break,
                    }
                }
                Some(sector.sqrt() / radius)
            })
            .collect();
        Outline { profile, radius, whole: !object.cut }
    }

    /// Root mean square difference from `shape`, in the orientation that suits it best.
    fn misfit(&self, shape: Shape) -> f32 {
        let turns = shape.symmetry().map_or(1, |n| RAYS / n);
        let model: Vec<f32> =
            (0..RAYS).map(|ray| shape.edge(ray as f32 * TAU / RAYS as f32)).collect();
        let size = (model.iter().map(|m| m * m).sum::<f32>() / RAYS as f32).sqrt();
        let misfits = (0..turns).map(|turn| {
            let (mut sum, mut count) = (0.0, 0);
            for (ray, r) in self.profile.iter().enumerate() {
                if let Some(r) = r {
                    sum += (r - model[(ray + RAYS - turn) % RAYS] / size).powi(2);
                    count += 1;
                }
            }
            (sum / count.max(1) as f32).sqrt()
        });
        misfits.fold(f32::INFINITY, f32::min)
    }

    /// The orientation of a shape with `n`-fold symmetry, in radians modulo `TAU / n`.
    pub fn orientation(&self, n: usize) -> f32 {
        let (mut re, mut im) = (0.0, 0.0);
        for (ray, r) in self.profile.iter().enumerate() {
            let (sin, cos) = ((n * ray) as f32 * TAU / RAYS as f32).sin_cos();
            // A ray out of sight counts as an average one.
            let r = r.unwrap_or(1.0);
            (re, im) = (re + r * cos, im + r * sin);
        }
        im.atan2(re) / n as f32
    }
}

/// The shape that fits best in the middle frame of all, with the median misfit of each of
/// [`Shape::ALL`]. Frames that show the whole object decide where there are any.
pub fn classify(outlines: &[Outline]) -> (Option<Shape>, [f32; 4]) {
    let any_whole = outlines.iter().any(|o| o.whole);
    let usable: Vec<_> = outlines.iter().filter(|o| o.whole || !any_whole).collect();
    let all = [Shape::Circle, Shape::Square, Shape::Triangle, Shape::Star];
    let misfits = all.map(|s| median(usable.iter().map(|o| o.misfit(s)).collect()));
    let best = (0..all.len()).min_by(|a, b| misfits[*a].total_cmp(&misfits[*b]));
    (best.filter(|b| misfits[*b] <= MOST_MISFIT).map(|b| all[b]), misfits)
}

/// The mask between pixels; `None` outside the image.
fn sample(object: &Object, x: f32, y: f32) -> Option<f32> {
    let (w, h) = (object.width, object.height);
    if x < 0.0 || y < 0.0 || x > (w - 1) as f32 || y > (h - 1) as f32 {
        return None;
    }
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(w - 1), (y0 + 1).min(h - 1));
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    let at = |x: usize, y: usize| object.mask[y * w + x];
    let top = at(x0, y0) * (1.0 - fx) + at(x1, y0) * fx;
    let bottom = at(x0, y1) * (1.0 - fx) + at(x1, y1) * fx;
    Some(top * (1.0 - fy) + bottom * fy)
}

/// Whether the object covers the pixel of the image nearest to a point outside it.
fn reaches_edge(object: &Object, x: f32, y: f32) -> bool {
    let (w, h) = (object.width, object.height);
    let x = x.round().clamp(0.0, (w - 1) as f32) as usize;
    let y = y.round().clamp(0.0, (h - 1) as f32) as usize;
    object.mask[y * w + x] > 0.5
}
