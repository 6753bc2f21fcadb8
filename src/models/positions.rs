//! Rotary position tables.

use std::ops::Range;

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// Appends (cos, sin) of `position · θ^(−2k/dims)` for the `dims / 2` pairs of one axis
/// (Su et al., arXiv 2104.09864). Angles are f64, as published.
pub(super) fn push_axis(row: &mut Vec<f32>, position: f64, dims: usize) {
    for k in 0..dims / 2 {
        let angle = position * THETA.powf(-((2 * k) as f64) / dims as f64);
        row.push(angle.cos() as f32);
        row.push(angle.sin() as f32);
    }
}

/// Positions `0 .. from` of the current stage's grid, resized linearly with half-pixel
/// centres to the `to` positions of a clip of lower resolution.
pub(super) fn interpolate(from: usize, to: usize) -> Vec<f64> {
    let scale = from as f64 / to as f64;
    let last = from as f64 - 1.0;
    (0..to).map(|i| ((i as f64 + 0.5) * scale - 0.5).clamp(0.0, last)).collect()
}

/// `0..len` moved by `start`.
pub(super) fn span(start: usize, len: usize) -> Range<usize> {
    start..start + len
}
