//! What the sampler does to latents: its own functions, which are the meaning of these ops.

use super::Run;
use super::memory::round;
use crate::Result;
use crate::sampler::{Draw, Latent, LatentShape};

fn input(run: &Run<'_>, i: usize) -> Result<Latent> {
    let &[frames, height, width, _] = run.input_shape(i) else { unreachable!("4-D by shape") };
    Latent::new(LatentShape { frames, height, width }, run.input(i)?.flat().to_vec())
}

fn store(run: &Run<'_>, latent: &Latent) -> Result<()> {
    let (mut out, dtype) = (run.output()?, run.output_dtype());
    let cols = out.cols;
    out.for_each_row(|r, row| {
        row.copy_from_slice(&latent.data()[r * cols..][..cols]);
        round(dtype, row);
    });
    Ok(())
}

pub(super) fn normal_noise(run: &Run<'_>, shape: LatentShape, block: bool) -> Result<()> {
    let words = run.input(0)?;
    let words: &[u32] = bytemuck::cast_slice(words.flat());
    let &[low, high, kind, first] = words else { unreachable!("four words by shape") };
    store(run, &Draw::from_words([low, high, kind, first], block, shape).latent())
}

pub(super) fn halve_bilinear(run: &Run<'_>, factor: f32) -> Result<()> {
    let mut x = input(run, 0)?.halved();
    x.scale(factor);
    store(run, &x)
}

pub(super) fn double_renoise(run: &Run<'_>, alpha: f32, beta: f32) -> Result<()> {
    let mut x = input(run, 0)?.doubled();
    x.renoise(&input(run, 1)?, alpha, beta);
    store(run, &x)
}
