//! Causal convolutions.

use super::hopper::{self, Tile, Units};
use super::{Prepare, int};
use crate::Result;
use crate::exec::cuda::kernels::blocks;
use crate::exec::cuda::session::Place;
use crate::exec::cuda::step::Work;
use crate::exec::cuda::weights::{conv_bias_key, conv_key, padded_channels};
use crate::exec::cuda::{params, tensor_map};
use crate::graph::{ConvSpec, Shuffle};
use crate::tensor::DType;

pub(super) fn conv3d(p: &mut Prepare<'_>, spec: &ConvSpec) -> Result<()> {
    let (x, out) = (p.input(0, DType::Bf16)?, p.output(DType::Bf16)?);
    let residual = if spec.residual { p.input(1, DType::Bf16)?.address } else { 0 };
    let state = p.node.state.map(|s| (p.place)(s)).transpose()?;
    let &[frames, height, width, channels] = p.input_shape(0) else { unreachable!("4-D by shape") };
    let rows = p.graph.weights()[spec.weight.index()].shape[0];
    let cout = if spec.half().is_some() { rows / 2 } else { rows };
    let front = spec.front_frames();
    let [kt, _, _] = spec.kernel;
    let [st, sh, sw] = spec.stride;
    let extent = [(frames + front - kt) / st + 1, (height - 1) / sh + 1, (width - 1) / sw + 1];
    let carried = state.filter(|_| spec.continues).map_or(0, |s| s.address);
    let ints = |values: [usize; 3]| -> Result<[i32; 3]> {
        Ok([int(values[0])?, int(values[1])?, int(values[2])?])
    };
    let parameters = params::Conv {
        x: x.address,
        carried,
        weight: p.weight(&conv_key(p.graph, spec))?,
        bias: p.weight(&conv_bias_key(p.graph, spec))?,
        residual,
        out: out.address,
        input: [int(frames)?, int(height)?, int(width)?, int(channels)?],
        extent: [int(extent[0])?, int(extent[1])?, int(extent[2])?, int(cout)?],
        kernel: ints(spec.kernel)?,
        stride: ints(spec.stride)?,
        front: int(front)?,
        shuffle: match spec.shuffle {
            // Of the weights there is no more than this half.
            Shuffle::None | Shuffle::OneOfTime { .. } => 0,
            Shuffle::Space => 1,
            Shuffle::Time { drop_first: false } => 2,
            Shuffle::Time { drop_first: true } => 3,
        },
        cin_padded: int(padded_channels(channels))?,
        box_width: 0,
    };
    select(p, &parameters)?;
    if let Some(state) = state.filter(|_| spec.moves_on) {
        carry(p, x, state, frames, front, spec);
    }
    Ok(())
}

/// Launches the kernel for this convolution.
fn select(p: &mut Prepare<'_>, conv: &params::Conv) -> Result<()> {
    if p.kernels.hopper && fits_hopper(conv) {
        return launch_hopper(p, conv);
    }
    let positions = conv.extent[..3].iter().map(|&n| n as usize).product();
    let (name, rows, columns) = generic_tile(conv, positions, p.kernels.multiprocessors);
    let tiles = usize::div_ceil(positions, rows) * (conv.extent[3] as usize).div_ceil(columns);
    p.launch(name, [blocks(tiles, 1)?, 1, 1], conv)
}

/// The tiles of `kernels/conv3d_sm90.cu`.
const HOPPER_TILES: [Tile; 4] =
    [tile(128, 256, 2, 583), tile(256, 128, 1, 583), tile(128, 128, 1, 333), tile(128, 64, 1, 250)];

/// A tile whose steps take so many nanoseconds: where there is no limit of memory what the tensor
/// cores take, 2048 products a cycle at 1755 MHz.
const fn tile(rows: usize, columns: usize, cluster: usize, step: usize) -> Tile {
    Tile { rows, columns, cluster, split: 1, in_turn: false, start: 0, step, end: 2280 }
}

/// Whether the kernels for sm_90 take this convolution: stores are of 8 channels to one
/// place of the output, and an inner dimension of 64 channels should not be mostly padding.
fn fits_hopper(conv: &params::Conv) -> bool {
    let [.., cin] = conv.input;
    let together = match conv.shuffle {
        0 => 8,
        1 => 32,
        _ => 16,
    };
    cin % 64 == 0 && conv.extent[3] % together == 0
}

fn launch_hopper(p: &mut Prepare<'_>, conv: &params::Conv) -> Result<()> {
    let extent = conv.extent.map(|n| n as usize);
    let input = conv.input.map(|n| n as usize);
    let [_, stride_y, stride_x] = conv.stride.map(|n| n as usize);
    let [frames, height, width, cout] = extent;
    let taps: usize = conv.kernel.iter().map(|&n| n as usize).product();
    let depth = taps * conv.cin_padded as usize;
    let boxes = |rows: usize, box_width: usize| {
        width.div_ceil(box_width) * height.div_ceil(rows / box_width)
    };
    let box_width = |rows| best_box_width(rows, [stride_y, stride_x], |w| boxes(rows, w));
    let units = |tile: &Tile| {
        let boxes = boxes(tile.rows, box_width(tile.rows)).div_ceil(tile.cluster);
        vec![Units { down: frames * boxes, across: cout.div_ceil(tile.columns), depth }]
    };
    let multiprocessors = p.kernels.multiprocessors as usize;
    let (tile, grid) = hopper::cheapest(HOPPER_TILES.iter(), multiprocessors, units)?;
    let box_width = box_width(tile.rows);
    let video = |address, frames| {
        let [_, height, width, channels] = input;
        let extent_of_box = [tile.rows / box_width, box_width];
        let extents = [frames, height, width, channels];
        tensor_map::video(address, extents, extent_of_box, [stride_y, stride_x])
    };
    let weight =
        Place { address: conv.weight, rows: cout, cols: depth, stride: depth, dtype: DType::Bf16 };
    let parameters = params::ConvSm90 {
        x_map: video(conv.x, input[0])?,
        // Never read where nothing is carried, but it must be a map of something.
        carried_map: match conv.carried {
            0 => video(conv.x, input[0])?,
            carried => video(carried, conv.front as usize)?,
        },
        weight_map: tensor_map::matrix(weight, tile.columns / tile.cluster)?,
        conv: params::Conv { box_width: int(box_width)?, ..*conv },
        tail: [0; 1],
    };
    p.launch(&format!("conv3d_sm90_{tile}"), grid, &parameters)
}

/// The width of the boxes of `rows` pixels, a power of two, that cover the output with the
/// fewest boxes; among equals the nearest to 8, with which each line of a box fills one unit of
/// the swizzle (up to a tenth faster than 16).
fn best_box_width(rows: usize, strides: [usize; 2], boxes: impl Fn(usize) -> usize) -> usize {
    let widths = (2..).map(|power| 1 << power).take_while(|&width| width <= rows);
    // The copy engine's boxes, skipped pixels included, are at most 256 wide and high.
    let fits = |&width: &usize| width * strides[1] <= 256 && rows / width * strides[0] <= 256;
    widths.filter(fits).min_by_key(|&width| (boxes(width), width.abs_diff(8))).unwrap_or(16)
}

/// The tile of `kernels/conv3d.cu` for `positions` of the kernel.
fn generic_tile(
    conv: &params::Conv,
    positions: usize,
    multiprocessors: u32,
) -> (&'static str, usize, usize) {
    let [.., cin] = conv.input;
    let cout = conv.extent[3] as usize;
    let fills = |rows: usize, columns: usize| {
        positions.div_ceil(rows) * cout.div_ceil(columns) >= multiprocessors as usize
    };
    match () {
        () if cin % 8 != 0 && cout <= 32 => ("conv3d_any_128x32", 128, 32),
        () if cin % 8 != 0 => ("conv3d_any_128x64", 128, 64),
        () if cout <= 16 => ("conv3d_128x16", 128, 16),
        () if cout <= 32 => ("conv3d_128x32", 128, 32),
        () if fills(512, 128) && cout > 64 => ("conv3d_256x128", 256, 128),
        () if fills(128, 128) && cout > 64 => ("conv3d_128x128", 128, 128),
        () if fills(128, 64) => ("conv3d_128x64", 128, 64),
        () => ("conv3d_64x64", 64, 64),
    }
}

/// Keeps the last frames of the extended input (front and new) for the next window.
fn carry(
    p: &mut Prepare<'_>,
    x: Place,
    state: Place,
    frames: usize,
    front: usize,
    spec: &ConvSpec,
) {
    let frame = x.rows / frames * x.cols * x.dtype.bytes();
    let keep = spec.carried_frames();
    for slot in 0..keep {
        let to = state.address + (slot * frame) as u64;
        // Position in the extended input; before `front` it is a frame carried in.
        let position = frames + front - keep + slot;
        let work = match position.checked_sub(front) {
            Some(new) => Work::Copy { to, from: x.address + (new * frame) as u64, bytes: frame },
            // Slots move towards the front, so the source has not been overwritten, and by
            // whole frames, so the two do not overlap.
            None if spec.continues => {
                let from = state.address + (position * frame) as u64;
                Work::Copy { to, from, bytes: frame }
            }
            None => Work::Clear { to, bytes: frame },
        };
        p.push(work);
    }
}
