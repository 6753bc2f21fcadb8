//! Names the object's motion by how far each kind of change carries its edge.

use std::f32::consts::TAU;

use super::{Shape, outline::Outline, scene::Object, words};

words! {
    /// A motion word.
    Motion {
        Right = "right", Left = "left", Up = "up", Down = "down", Grows = "grows",
        Shrinks = "shrinks", Spins = "spins", Bounces = "bounces",
    }
}

/// An edge that is carried less than this (in radii) over a clip stands still.
const LEAST_TRAVEL: f32 = 0.2;
/// A turn back by less than this (in radii) is jitter.
const JITTER: f32 = 0.15;

/// How far each kind of change carries the edge of the object over the clip, all in units
/// of its mean radius, so that they can be compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Travel {
    /// Net displacement of the centre to the right.
    pub right: f32,
    /// Net displacement of the centre downwards.
    pub down: f32,
    /// Gain of radius.
    pub growth: f32,
    /// Net angle turned, in radians, less what does not go steadily one way.
    pub turn: f32,
    /// Vertical way there and back: the way of the centre less the net displacement.
    pub bounce: f32,
}

impl Travel {
    /// Follows place, size and, for a shape that shows it, orientation through a clip.
    pub fn measure(objects: &[Object], outlines: &[Outline], shape: Option<Shape>) -> Travel {
        let radius = outlines.iter().map(|o| o.radius).sum::<f32>() / outlines.len().max(1) as f32;
        let x = smooth(&objects.iter().map(|o| o.centre[0]).collect::<Vec<_>>());
        let y = smooth(&objects.iter().map(|o| o.centre[1]).collect::<Vec<_>>());
        // Size is only seen while the object is in sight as a whole.
        let any_whole = outlines.iter().any(|o| o.whole);
        let sizes = outlines.iter().filter(|o| o.whole || !any_whole).map(|o| o.radius);
        let sizes = smooth(&sizes.collect::<Vec<_>>());
        let turn = shape.and_then(Shape::symmetry).map_or(0.0, |n| steady_turn(outlines, n));
        Travel {
            right: net(&x) / radius,
            down: net(&y) / radius,
            growth: net(&sizes) / radius,
            turn,
            bounce: (way(&y, JITTER * radius) - net(&y).abs()).max(0.0) / radius,
        }
    }

    /// The kind of change that carries the edge farthest; `None` where it stands still.
    pub fn motion(&self) -> Option<Motion> {
        let pick = |value: f32, plus, minus| (value.abs(), if value > 0.0 { plus } else { minus });
        [
            pick(self.right, Motion::Right, Motion::Left),
            pick(self.down, Motion::Down, Motion::Up),
            pick(self.growth, Motion::Grows, Motion::Shrinks),
            (self.turn.abs(), Motion::Spins),
            (self.bounce, Motion::Bounces),
        ]
        .into_iter()
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(travel, _)| *travel >= LEAST_TRAVEL)
        .map(|(_, motion)| motion)
    }
}

/// The angle turned over the clip by a shape with `n`-fold symmetry, times the share of the
/// way that it makes up: an orientation that jitters to and fro goes nowhere.
fn steady_turn(outlines: &[Outline], n: usize) -> f32 {
    let period = TAU / n as f32;
    let (mut turned, mut way) = (0.0f32, 0.0f32);
    for pair in outlines.windows(2) {
        let step = pair[1].orientation(n) - pair[0].orientation(n);
        let step = (step + period / 2.0).rem_euclid(period) - period / 2.0;
        turned += step;
        way += step.abs();
    }
    if way > 0.0 { turned * turned.abs() / way } else { 0.0 }
}

/// Averages of three neighbours; the ends as they are.
fn smooth(track: &[f32]) -> Vec<f32> {
    let last = track.len().saturating_sub(1);
    (0..track.len())
        .map(|i| match i {
            i if i == 0 || i == last => track[i],
            i => (track[i - 1] + track[i] + track[i + 1]) / 3.0,
        })
        .collect()
}

/// Last value less the first.
fn net(track: &[f32]) -> f32 {
    track.last().zip(track.first()).map_or(0.0, |(last, first)| last - first)
}

/// The way along `track`, turns of less than `jitter` left out.
fn way(track: &[f32], jitter: f32) -> f32 {
    let Some((&first, rest)) = track.split_first() else { return 0.0 };
    // `turn` is the last turning point, `far` the farthest place from it since.
    let (mut way, mut turn, mut far) = (0.0, first, first);
    for &value in rest {
        if (value - turn).abs() >= (far - turn).abs() && (value - turn) * (far - turn) >= 0.0 {
            far = value;
        } else if (value - far).abs() >= jitter {
            way += (far - turn).abs();
            (turn, far) = (far, value);
        }
    }
    way + (far - turn).abs()
}
