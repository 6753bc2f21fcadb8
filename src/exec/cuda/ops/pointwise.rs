//! Element-wise ops: one thread takes one vector of 8 elements, or one element where rows
//! do not divide.

use super::{Prepare, in_eights, int};
use crate::Result;
use crate::exec::cuda::kernels::{BLOCK, blocks};
use crate::exec::cuda::params;
use crate::exec::cuda::weights::{Form, Key};
use crate::graph::{Activation, WeightId};
use crate::tensor::DType;

/// The grid for `elements`, `vector` of them to a thread.
fn grid(elements: usize, vector: usize) -> Result<[u32; 3]> {
    Ok([blocks(elements / vector, BLOCK as usize)?, 1, 1])
}

pub(super) fn activate(p: &mut Prepare<'_>, activation: Activation) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let parameters = params::Activate {
        x: x.address,
        out: out.address,
        rows: out.rows as i64,
        ldx: x.stride as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        activation: params::activation_code(activation),
    };
    let (name, vector) = if in_eights(&[x, out]) { ("activate_v8", 8) } else { ("activate_v1", 1) };
    p.launch(name, grid(out.rows * out.cols, vector)?, &parameters)
}

pub(super) fn gated_gelu(p: &mut Prepare<'_>) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let parameters = params::GatedGelu {
        x: x.address,
        out: out.address,
        rows: out.rows as i64,
        ldx: x.stride as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        pad: 0,
    };
    let (name, vector) =
        if in_eights(&[x, out]) { ("gated_gelu_v8", 8) } else { ("gated_gelu_v1", 1) };
    p.launch(name, grid(out.rows * out.cols, vector)?, &parameters)
}

pub(super) fn embedding(
    p: &mut Prepare<'_>,
    table: WeightId,
    positions: Option<WeightId>,
) -> Result<()> {
    let (ids, out) = (p.input(0, DType::U32)?, p.output(DType::Bf16)?);
    let weight = |w| p.weight(&Key::new(p.graph, &[w], Form::Bf16));
    let parameters = params::Embedding {
        ids: ids.address,
        table: weight(table)?,
        positions: positions.map_or(Ok(0), weight)?,
        out: out.address,
        rows: out.rows as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        pad: 0,
    };
    let (name, vector) = if in_eights(&[out]) { ("embedding_v8", 8) } else { ("embedding_v1", 1) };
    p.launch(name, grid(out.rows * out.cols, vector)?, &parameters)
}

pub(super) fn timestep_embedding(p: &mut Prepare<'_>) -> Result<()> {
    let (t, out) = (p.input(0, DType::F32)?, p.output(DType::Bf16)?);
    let parameters = params::Timestep {
        timesteps: t.address,
        out: out.address,
        rows: out.rows as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        pad: 0,
    };
    p.launch("timestep_embedding", grid(out.rows * out.cols / 2, 1)?, &parameters)
}

pub(super) fn patchify(p: &mut Prepare<'_>, channels_first: bool) -> Result<()> {
    let (x, out) = (p.input(0, DType::F32)?, p.output(DType::Bf16)?);
    let &[frames, height, width, channels] = p.input_shape(0) else { unreachable!("4-D by shape") };
    let parameters = params::Patchify {
        x: x.address,
        out: out.address,
        frames: int(frames)?,
        height: int(height)?,
        width: int(width)?,
        channels: int(channels)?,
        ldo: out.stride as i64,
        channels_first: i32::from(channels_first),
        pad: 0,
    };
    p.launch("patchify", grid(out.rows * out.cols, 1)?, &parameters)
}

pub(super) fn unpatchify(p: &mut Prepare<'_>) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::F32)?);
    let &[frames, height, width, channels] = p.output_shape() else { unreachable!("4-D by shape") };
    let parameters = params::Unpatchify {
        x: x.address,
        out: out.address,
        frames: int(frames)?,
        height: int(height)?,
        width: int(width)?,
        channels: int(channels)?,
        ldx: x.stride as i64,
    };
    p.launch("unpatchify", grid(out.rows * out.cols, 1)?, &parameters)
}

pub(super) fn add_position_table(
    p: &mut Prepare<'_>,
    table: WeightId,
    max_size: usize,
    stage: [usize; 2],
    clip: [usize; 2],
) -> Result<()> {
    let x = p.output(DType::Bf16)?;
    let parameters = params::Position {
        table: p.weight(&Key::new(p.graph, &[table], Form::F32))?,
        x: x.address,
        rows: x.rows as i64,
        ldx: x.stride as i64,
        cols: int(x.cols)?,
        max_size: int(max_size)?,
        stage_h: int(stage[0])?,
        stage_w: int(stage[1])?,
        grid_h: int(clip[0])?,
        grid_w: int(clip[1])?,
    };
    let (name, vector) =
        if in_eights(&[x]) { ("add_position_table_v8", 8) } else { ("add_position_table_v1", 1) };
    p.launch(name, grid(x.rows * x.cols, vector)?, &parameters)
}

pub(super) fn guided_euler(p: &mut Prepare<'_>) -> Result<()> {
    let (velocity, scalars) = (p.input(0, DType::F32)?, p.input(1, DType::F32)?);
    let x = p.output(DType::F32)?;
    let n = x.rows * x.cols;
    let parameters = params::Euler {
        velocity: velocity.address,
        scalars: scalars.address,
        x: x.address,
        n: n as i64,
        guided: i32::from(velocity.rows == 2 * x.rows),
        pad: 0,
    };
    p.launch("guided_euler", grid(n, 1)?, &parameters)
}
