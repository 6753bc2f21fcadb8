//! Activations, embeddings, patches, the position table and the sampler's step.

use super::Run;
use super::memory::round;
use crate::Result;
use crate::exec::check_ids;
use crate::graph::{Activation, WeightId};

/// Applies an activation in place.
pub(super) fn apply(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Silu => values.iter_mut().for_each(|v| *v *= sigmoid(*v)),
        Activation::QuickGelu => values.iter_mut().for_each(|v| *v *= sigmoid(1.702 * *v)),
        Activation::GeluTanh => values.iter_mut().for_each(|v| *v = gelu_tanh(*v)),
        Activation::GeluErf => values.iter_mut().for_each(|v| {
            *v *= (0.5 * (1.0 + libm::erf(f64::from(*v) * std::f64::consts::FRAC_1_SQRT_2))) as f32;
        }),
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The exponential, in a form that compilers turn into vector instructions: activations and
/// softmax would otherwise take as long as the matrix products around them.
///
/// `eˣ = 2ⁿ · eʳ` with `n = round(x / ln 2)` and `|r| ≤ ln 2 / 2`, where the Taylor series
/// to the seventh power is exact to 6e-9. Arguments beyond those of normal results are
/// taken as the nearest such; NaN stays NaN.
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ leaves the rounded number in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + factor;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    series * f32::from_bits(exponent << 23)
}

fn gelu_tanh(x: f32) -> f32 {
    // 1/2·(1 + tanh(u)) = σ(2u).
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    x * sigmoid(2.0 * SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
}

pub(super) fn activate(run: &Run<'_>, activation: Activation) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    out.par_rows_of(&x, |_, y| {
        apply(activation, y);
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn gated_gelu(run: &Run<'_>) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    out.par_rows(|r, y| {
        let (gate, value) = x.row(r).split_at(y.len());
        for ((y, g), v) in y.iter_mut().zip(gate).zip(value) {
            *y = gelu_tanh(*g) * v;
        }
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn embedding(run: &Run<'_>, table: WeightId, positions: Option<WeightId>) -> Result<()> {
    let (ids, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let table = run.weight(table)?;
    let positions = positions.map(|p| run.weight(p)).transpose()?;
    let ids: &[u32] = bytemuck::cast_slice(ids.flat());
    check_ids(ids, table.shape[0])?;
    let mut position = vec![0.0; out.cols];
    out.for_each_row(|r, y| {
        table.widen(ids[r] as usize * y.len(), y);
        if let Some(positions) = &positions {
            positions.widen(r * y.len(), &mut position);
            y.iter_mut().zip(&position).for_each(|(y, p)| *y += p);
        }
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn timestep_embedding(run: &Run<'_>) -> Result<()> {
    let (t, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    out.for_each_row(|r, y| {
        let half = y.len() / 2;
        for k in 0..half {
            // In f32 as published: angles reach 1000, where rounding shows.
            let frequency = (-(10000f64.ln() as f32) * k as f32 / half as f32).exp();
            let angle = t.flat()[r] * frequency;
            y[k] = angle.cos();
            y[half + k] = angle.sin();
        }
        round(dtype, y);
    });
    Ok(())
}

/// For each element of a patch, its (row, column, channel) and its place among `4c`.
fn patch_places(channels: usize, channels_first: bool) -> impl Fn(usize, usize, usize) -> usize {
    move |py, px, c| {
        if channels_first { c * 4 + py * 2 + px } else { (py * 2 + px) * channels + c }
    }
}

pub(super) fn patchify(run: &Run<'_>, channels_first: bool) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let &[_, height, width, channels] = run.input_shape(0) else { unreachable!("4-D by shape") };
    let place = patch_places(channels, channels_first);
    let per_row = width / 2;
    out.par_rows(|token, y| {
        // Rows of patches follow each other through the frames, since heights are even.
        let (patch_row, patch_column) = (token / per_row, token % per_row);
        for (py, px) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let pixel = x.row((patch_row * 2 + py) * width + patch_column * 2 + px);
            for (c, &v) in pixel.iter().enumerate() {
                y[place(py, px, c)] = v;
            }
        }
        round(dtype, y);
    });
    debug_assert_eq!(x.rows % height, 0);
    Ok(())
}

pub(super) fn unpatchify(run: &Run<'_>) -> Result<()> {
    let (x, mut out, dtype) = (run.input(0)?, run.output()?, run.output_dtype());
    let &[_, _, width, channels] = run.output_shape() else { unreachable!("4-D by shape") };
    let place = patch_places(channels, false);
    out.par_rows(|pixel, y| {
        let (row, column) = (pixel / width, pixel % width);
        let patch = x.row((row / 2) * (width / 2) + column / 2);
        for (c, y) in y.iter_mut().enumerate() {
            *y = patch[place(row % 2, column % 2, c)];
        }
        round(dtype, y);
    });
    Ok(())
}

pub(super) fn add_position_table(
    run: &Run<'_>,
    table: WeightId,
    max_size: usize,
    stage: [usize; 2],
    grid: [usize; 2],
) -> Result<()> {
    let (mut out, dtype) = (run.output()?, run.output_dtype());
    let table = run.weight(table)?;
    let origin = [(max_size - stage[0]) / 2, (max_size - stage[1]) / 2];
    let taps = [bilinear_taps(stage[0], grid[0]), bilinear_taps(stage[1], grid[1])];
    let d = out.cols;
    out.par_rows(|token, y| {
        let (row, column) = (token / grid[1] % grid[0], token % grid[1]);
        let mut corner = vec![0.0; d];
        let mut position = vec![0.0; d];
        for (ty, wy) in taps[0][row] {
            for (tx, wx) in taps[1][column] {
                if wy * wx == 0.0 {
                    continue;
                }
                let entry = (origin[0] + ty) * max_size + origin[1] + tx;
                table.widen(entry * d, &mut corner);
                position.iter_mut().zip(&corner).for_each(|(p, c)| *p += wy * wx * c);
            }
        }
        y.iter_mut().zip(&position).for_each(|(y, p)| *y += p);
        round(dtype, y);
    });
    Ok(())
}

/// The two source indices and weights of each output position when `from` samples are
/// resized to `to` bilinearly with half-pixel centres (`align_corners = false`).
fn bilinear_taps(from: usize, to: usize) -> Vec<[(usize, f32); 2]> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let source = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
            let low = (source as usize).min(from - 1);
            let fraction = source - low as f32;
            [(low, 1.0 - fraction), ((low + 1).min(from - 1), fraction)]
        })
        .collect()
}

pub(super) fn guided_euler(run: &Run<'_>) -> Result<()> {
    let (velocity, scalars) = (run.input(0)?, run.input(1)?);
    let (mut out, dtype) = (run.output()?, run.output_dtype());
    let &[guidance, delta] = scalars.flat() else { unreachable!("two scalars by shape") };
    let guided = velocity.rows == 2 * out.rows;
    let pixels = out.rows;
    out.par_rows(|r, x| {
        for (c, x) in x.iter_mut().enumerate() {
            let first = velocity.row(r)[c];
            let v = if guided {
                first + guidance * (velocity.row(pixels + r)[c] - first)
            } else {
                first
            };
            *x += delta * v;
        }
        round(dtype, x);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exponential_is_exact_to_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in -873_000..=883_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e9) > 0.0 && exp(-1e9) < 1e-37);
        assert!(exp(1e9) > 1e38);
        assert_eq!(exp(0.0), 1.0);
    }
}
