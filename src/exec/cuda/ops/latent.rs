//! What the sampler does to latents.

use super::{Prepare, int};
use crate::Result;
use crate::exec::cuda::kernels::{BLOCK, blocks};
use crate::exec::cuda::params;
use crate::tensor::DType;

/// Channels that one thread takes.
const VECTOR: usize = 4;

fn grid(threads: usize) -> Result<[u32; 3]> {
    Ok([blocks(threads, BLOCK as usize)?, 1, 1])
}

/// Extents as kernels take them.
fn extents(shape: &[usize]) -> Result<[i32; 4]> {
    let &[frames, height, width, channels] = shape else { unreachable!("4-D by shape") };
    Ok([int(frames)?, int(height)?, int(width)?, int(channels)?])
}

pub(super) fn normal_noise(p: &mut Prepare<'_>, block: bool) -> Result<()> {
    let (words, out) = (p.input(0, DType::U32)?, p.output(DType::F32)?);
    let [frames, height, width, _] = extents(p.output_shape())?;
    let parameters = params::Noise {
        out: out.address,
        words: words.address,
        frames,
        height,
        width,
        block: i32::from(block),
    };
    let pixels = if block { out.rows / 4 } else { out.rows };
    p.launch("normal_noise", grid(pixels * out.cols / VECTOR)?, &parameters)
}

pub(super) fn halve_bilinear(p: &mut Prepare<'_>, factor: f32) -> Result<()> {
    let (x, out) = (p.input(0, DType::F32)?, p.output(DType::F32)?);
    let [frames, height, width, channels] = extents(p.input_shape(0))?;
    let parameters = params::Halve {
        x: x.address,
        out: out.address,
        frames,
        height,
        width,
        channels,
        factor,
        pad: 0,
    };
    p.launch("bilinear_half", grid(out.rows * out.cols / VECTOR)?, &parameters)
}

pub(super) fn double_renoise(p: &mut Prepare<'_>, alpha: f32, beta: f32) -> Result<()> {
    let (x, noise) = (p.input(0, DType::F32)?, p.input(1, DType::F32)?);
    let out = p.output(DType::F32)?;
    let [frames, height, width, channels] = extents(p.input_shape(0))?;
    let parameters = params::Renoise {
        x: x.address,
        noise: noise.address,
        out: out.address,
        frames,
        height,
        width,
        channels,
        alpha,
        beta,
    };
    p.launch("nearest_double_renoise", grid(out.rows * out.cols / VECTOR)?, &parameters)
}
