//! Norms.

use bytemuck::Pod;

use super::linear::row_groups;
use super::{Prepare, in_eights, int};
use crate::Result;
use crate::exec::cuda::kernels::{Kernels, blocks};
use crate::exec::cuda::params;
use crate::exec::cuda::session::Place;
use crate::exec::cuda::step::Parameters;
use crate::exec::cuda::weights::vector_key;
use crate::graph::{Graph, Node, Op, RowGroup, WeightId};
use crate::tensor::DType;

/// Most norms of one launch, as `kernels/norm.cu` has it.
pub(super) const TOGETHER: usize = 4;

/// Rows of a block of the row norms: one warp takes a row.
const ROWS: usize = 4;

fn variant(aligned: bool, eights: &'static str, single: &'static str) -> &'static str {
    if aligned { eights } else { single }
}

pub(super) fn vector(p: &Prepare<'_>, weight: WeightId) -> Result<u64> {
    p.weight(&vector_key(p.graph, weight))
}

fn grid(rows: usize) -> Result<[u32; 3]> {
    Ok([blocks(rows, ROWS)?, 1, 1])
}

pub(super) fn layer_norm(
    p: &mut Prepare<'_>,
    weight: WeightId,
    bias: WeightId,
    eps: f32,
) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let parameters = params::LayerNorm {
        x: x.address,
        out: out.address,
        weight: vector(p, weight)?,
        bias: vector(p, bias)?,
        rows: out.rows as i64,
        ldx: x.stride as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        eps,
    };
    let name = variant(in_eights(&[x, out]), "layer_norm_v8", "layer_norm_v1");
    p.launch(name, grid(out.rows)?, &parameters)
}

pub(super) fn layer_norm_modulate(
    p: &mut Prepare<'_>,
    eps: f32,
    [shift_column, scale_column]: [usize; 2],
    groups: &[RowGroup],
) -> Result<()> {
    let (x, modulation) = (p.input(0, DType::Bf16)?, p.input(1, DType::F32)?);
    let out = p.output(DType::Bf16)?;
    let parameters = params::Modulate {
        x: x.address,
        out: out.address,
        modulation: modulation.address,
        rows: out.rows as i64,
        ldx: x.stride as i64,
        ldo: out.stride as i64,
        ld_modulation: modulation.stride as i64,
        cols: int(out.cols)?,
        eps,
        shift_column: int(shift_column)?,
        scale_column: int(scale_column)?,
        groups: row_groups(groups)?,
        pad: 0,
    };
    let vectors_aligned = modulation.address.is_multiple_of(16)
        && [modulation.stride, shift_column, scale_column].iter().all(|n| n.is_multiple_of(4));
    let aligned = vectors_aligned && in_eights(&[x, out]);
    p.waiting.modulated.push(Modulated { parameters, aligned });
    Ok(())
}

/// A layer norm with scale and shift, and whether it can go in pieces of 8.
pub(in crate::exec::cuda) struct Modulated {
    parameters: params::Modulate,
    aligned: bool,
}

/// Appends one launch of all.
pub(super) fn launch_modulated(p: &mut Prepare<'_>, norms: &[Modulated]) -> Result<()> {
    let aligned = norms.iter().all(|norm| norm.aligned);
    let name = variant(aligned, "layer_norm_modulate_v8", "layer_norm_modulate_v1");
    let problems: Vec<_> = norms.iter().map(|n| (n.parameters, n.parameters.rows)).collect();
    launch_rows(p, name, &problems)
}

/// Appends one launch of problems of so many rows.
fn launch_rows<T: Pod>(p: &mut Prepare<'_>, name: &str, problems: &[(T, i64)]) -> Result<()> {
    let units = |(problem, rows): &(T, i64)| Ok((*problem, int((*rows as usize).div_ceil(ROWS))?));
    let problems = problems.iter().map(units).collect::<Result<Vec<_>>>()?;
    let total = problems.iter().map(|(_, units)| *units as usize).sum();
    p.launch_with(name, [blocks(total, 1)?, 1, 1], Parameters::group::<T, TOGETHER>(&problems))
}

pub(super) fn rms_norm(p: &mut Prepare<'_>, weight: WeightId, eps: f32) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let parameters = params::RmsNorm {
        x: x.address,
        out: out.address,
        weight: vector(p, weight)?,
        rows: out.rows as i64,
        ldx: x.stride as i64,
        ldo: out.stride as i64,
        cols: int(out.cols)?,
        eps,
    };
    let name = variant(in_eights(&[x, out]), "rms_norm_v8", "rms_norm_v1");
    p.launch(name, grid(out.rows)?, &parameters)
}

pub(super) fn head_norm_rope(
    p: &mut Prepare<'_>,
    weight: WeightId,
    eps: f32,
    heads: usize,
) -> Result<()> {
    let (table, x) = (p.input(0, DType::F32)?, p.output(DType::Bf16)?);
    debug_assert_eq!(table.cols * heads, x.cols);
    norm_heads(p, x, table, weight, eps)
}

/// Lets the norm and rotation of all heads of `x`, each as wide as `table`, wait for the others
/// of its group.
pub(super) fn norm_heads(
    p: &mut Prepare<'_>,
    x: Place,
    table: Place,
    weight: WeightId,
    eps: f32,
) -> Result<()> {
    let parameters = params::HeadNormRope {
        x: x.address,
        table: table.address,
        weight: vector(p, weight)?,
        rows: x.rows as i64,
        ldx: x.stride as i64,
        ld_table: table.stride as i64,
        heads: int(x.cols / table.cols)?,
        size: int(table.cols)?,
        eps,
        pad: 0,
    };
    p.waiting.head_norms.push(HeadNorm(parameters));
    Ok(())
}

/// The heads of some rows.
pub(in crate::exec::cuda) struct HeadNorm(params::HeadNormRope);

/// Appends one launch of all.
pub(super) fn launch_head_norms(p: &mut Prepare<'_>, norms: &[HeadNorm]) -> Result<()> {
    let problems: Vec<_> = norms.iter().map(|norm| (norm.0, norm.0.rows)).collect();
    launch_rows(p, "head_norm_rope", &problems)
}

/// How the pixels of each frame are divided among the blocks of a group norm.
struct Chunks {
    frames: usize,
    pixels: usize,
    chunks: usize,
    chunk_pixels: usize,
}

impl Chunks {
    /// What `kernels/group_norm.cu` recommends: whole batches of its threads, about 8
    /// blocks to a multiprocessor for two frames. How many frames there are must not matter,
    /// so that a frame's statistics are the same to the bit whichever come with it.
    fn of(shape: &[usize], multiprocessors: u32) -> Chunks {
        let &[frames, height, width, channels] = shape else { unreachable!("4-D by shape") };
        let pixels = height * width;
        let batch = 8 * (256 / channels.div_ceil(8)).max(1);
        let batches = 2 * pixels.div_ceil(batch) / (8 * multiprocessors as usize);
        let chunk_pixels = batch * batches.clamp(1, 16);
        Chunks { frames, pixels, chunks: pixels.div_ceil(chunk_pixels), chunk_pixels }
    }

    fn scratch_bytes(&self, groups: usize) -> usize {
        8 * self.frames * groups * (self.chunks + 1)
    }
}

/// Bytes of scratch memory that `node` needs.
pub(super) fn scratch_bytes(graph: &Graph, node: &Node, kernels: &Kernels) -> usize {
    match node.op {
        Op::GroupNorm { groups, .. } => {
            let shape = &graph.tensor(node.inputs[0]).shape;
            Chunks::of(shape, kernels.multiprocessors).scratch_bytes(groups)
        }
        _ => 0,
    }
}

pub(super) fn group_norm(
    p: &mut Prepare<'_>,
    [weight, bias]: [WeightId; 2],
    groups: usize,
    eps: f32,
    silu: bool,
) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let chunks = Chunks::of(p.input_shape(0), p.kernels.multiprocessors);
    let parameters = params::GroupNorm {
        x: x.address,
        out: out.address,
        weight: vector(p, weight)?,
        bias: vector(p, bias)?,
        workspace: p.scratch,
        pixels: chunks.pixels as i64,
        frames: int(chunks.frames)?,
        channels: int(x.cols)?,
        groups: int(groups)?,
        chunks: int(chunks.chunks)?,
        chunk_pixels: chunks.chunk_pixels as i64,
        eps,
        silu: i32::from(silu),
    };
    let frames = blocks(chunks.frames, 1)?;
    let grid = [blocks(chunks.chunks, 1)?, frames, 1];
    p.launch("group_norm_sums", grid, &parameters)?;
    p.launch("group_norm_finish", [frames, 1, 1], &parameters)?;
    let name = variant(in_eights(&[x, out]), "group_norm_apply_v8", "group_norm_apply_v1");
    p.launch(name, grid, &parameters)
}
