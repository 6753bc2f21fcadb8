//! Norms. Sums are taken in f64, so that a large mean does not hide a small variance.

use std::ops::Range;

use rayon::prelude::*;

use super::linear::sample_of;
use super::memory::round;
use super::{Run, pointwise};
use crate::Result;
use crate::graph::{Activation, HeadNorms, RowGroup, WeightId};

fn mean_and_rsqrt(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

fn root_mean_square_inverse(row: &[f32], eps: f32) -> f32 {
    let square = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / row.len() as f64;
    (1.0 / (square + f64::from(eps)).sqrt()) as f32
}

pub(super) fn layer_norm(run: &Run<'_>, weight: WeightId, bias: WeightId, eps: f32) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let (weight, bias) = (run.weight_f32(weight)?, run.weight_f32(bias)?);
    out.par_rows_of(&x, |_, y| {
        let (mean, scale) = mean_and_rsqrt(y, eps);
        for ((y, w), b) in y.iter_mut().zip(&weight).zip(&bias) {
            *y = (*y - mean) * scale * w + b;
        }
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn layer_norm_modulate(
    run: &Run<'_>,
    eps: f32,
    shift_column: usize,
    scale_column: usize,
    groups: &[RowGroup],
) -> Result<()> {
    let (x, modulation) = (run.input(0)?, run.input(1)?);
    let (mut out, dtype) = (run.output()?, run.output_dtype());
    out.par_rows_of(&x, |r, y| {
        let vectors = modulation.row(sample_of(groups, r));
        let (shift, scale) = (&vectors[shift_column..], &vectors[scale_column..]);
        let (mean, inverse) = mean_and_rsqrt(y, eps);
        for ((y, scale), shift) in y.iter_mut().zip(scale).zip(shift) {
            *y = (*y - mean) * inverse * (1.0 + scale) + shift;
        }
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn rms_norm(run: &Run<'_>, weight: WeightId, eps: f32) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let weight = run.weight_f32(weight)?;
    out.par_rows_of(&x, |_, y| {
        let scale = root_mean_square_inverse(y, eps);
        y.iter_mut().zip(&weight).for_each(|(y, w)| *y *= scale * w);
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn head_norm_rope(
    run: &Run<'_>,
    weight: WeightId,
    eps: f32,
    heads: usize,
) -> Result<()> {
    let (table, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let weight = run.weight_f32(weight)?;
    debug_assert_eq!(weight.len() * heads, out.cols);
    out.par_rows(|r, row| {
        norm_and_rotate(row, &weight, eps, table.row(r));
        round(dtype, row);
    });
    Ok(())
}

/// What [`Epilogue::NormHeads`](crate::graph::Epilogue::NormHeads) adds to a product, whose parts
/// lie in `columns`.
pub(super) fn heads_of_parts(
    run: &Run<'_>,
    norms: &HeadNorms,
    columns: &[Range<usize>],
) -> Result<()> {
    let (table, mut out, dtype) = (run.input(1)?, run.output()?, run.output_dtype());
    let load = |norm: &Option<WeightId>| norm.map(|weight| run.weight_f32(weight)).transpose();
    let weights = norms.weights.iter().map(load).collect::<Result<Vec<_>>>()?;
    out.par_rows(|r, row| {
        for (columns, weight) in columns.iter().zip(&weights) {
            if let Some(weight) = weight {
                norm_and_rotate(&mut row[columns.clone()], weight, norms.eps, table.row(r));
            }
        }
        round(dtype, row);
    });
    Ok(())
}

/// Norms the heads of a row, each as long as `weight`, and rotates their pairs by the
/// (cos, sin) pairs of `rotations`.
fn norm_and_rotate(heads: &mut [f32], weight: &[f32], eps: f32, rotations: &[f32]) {
    for head in heads.chunks_exact_mut(weight.len()) {
        let scale = root_mean_square_inverse(head, eps);
        let pairs = head.chunks_exact_mut(2).zip(weight.chunks_exact(2));
        for ((x, w), rotation) in pairs.zip(rotations.chunks_exact(2)) {
            let (a, b) = (x[0] * scale * w[0], x[1] * scale * w[1]);
            let (cos, sin) = (rotation[0], rotation[1]);
            x[0] = a * cos - b * sin;
            x[1] = a * sin + b * cos;
        }
    }
}

pub(super) fn group_norm(
    run: &Run<'_>,
    [weight, bias]: [WeightId; 2],
    groups: usize,
    eps: f32,
    silu: bool,
) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let (weight, bias) = (run.weight_f32(weight)?, run.weight_f32(bias)?);
    let frames = run.input_shape(0)[0];
    let (pixels, channels) = (x.rows / frames, x.cols);
    let affines: Vec<_> = (0..frames)
        .map(|frame| {
            let rows = frame * pixels..(frame + 1) * pixels;
            let statistics = channel_statistics(&x, rows, channels);
            means_and_scales(&statistics, &weight, groups, pixels, eps)
        })
        .collect();
    out.par_rows_of(&x, |r, y| {
        let (means, scales) = &affines[r / pixels];
        for (((y, mean), scale), bias) in y.iter_mut().zip(means).zip(scales).zip(&bias) {
            *y = (*y - mean) * scale + bias;
        }
        if silu {
            pointwise::apply(Activation::Silu, y);
        }
        round(dtype, y);
    });
    Ok(())
}

/// Sum and sum of squares of each channel, about the frame's first pixel: a channel's
/// values are close to it, so squares do not cancel where the mean is large.
fn channel_statistics(
    x: &super::Mat,
    rows: std::ops::Range<usize>,
    channels: usize,
) -> Vec<[f64; 3]> {
    const ROWS: usize = 256;
    let pivot = x.row(rows.start);
    let pieces: Vec<_> = rows.clone().step_by(ROWS).collect();
    let partial = |start: usize| {
        let mut sums = vec![[0.0f64; 2]; channels];
        for r in start..(start + ROWS).min(rows.end) {
            for ((s, &v), &p) in sums.iter_mut().zip(x.row(r)).zip(pivot) {
                let d = f64::from(v - p);
                s[0] += d;
                s[1] += d * d;
            }
        }
        sums
    };
    // Pieces are added in order, so that the result does not depend on the threads.
    let partials: Vec<_> = pieces.into_par_iter().map(partial).collect();
    let mut total: Vec<_> = pivot.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
    for sums in partials {
        for (t, s) in total.iter_mut().zip(sums) {
            t[1] += s[0];
            t[2] += s[1];
        }
    }
    total
}

/// Mean of its group and scale (with the weight) of each channel: the group norm is
/// `(x − mean) · scale + bias`.
fn means_and_scales(
    statistics: &[[f64; 3]],
    weight: &[f32],
    groups: usize,
    pixels: usize,
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let size = statistics.len() / groups;
    let (mut group_means, mut scales) = (Vec::new(), Vec::new());
    for (g, group) in statistics.chunks_exact(size).enumerate() {
        let n = pixels as f64;
        let means: Vec<f64> = group.iter().map(|[pivot, sum, _]| pivot + sum / n).collect();
        let mean = means.iter().sum::<f64>() / size as f64;
        // Variance within each channel plus the spread of the channels' means.
        let spread = group.iter().zip(&means).map(|([_, sum, squares], m)| {
            (squares / n - (sum / n).powi(2)).max(0.0) + (m - mean).powi(2)
        });
        let variance = spread.sum::<f64>() / size as f64;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        for weight in &weight[g * size..(g + 1) * size] {
            group_means.push(mean as f32);
            scales.push((inverse * f64::from(*weight)) as f32);
        }
    }
    (group_means, scales)
}
