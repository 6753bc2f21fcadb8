//! Causal 3-D convolution as a matrix product: for a piece of an output row the patches
//! under the kernel are laid side by side (im2col) and multiplied with the packed weights.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Run;
use super::linear::{Operand, gemm_into};
use super::memory::{Mat, MatMut, round};
use crate::Result;
use crate::graph::{ConvSpec, Shuffle};
use crate::tensor::{DType, WeightView};

/// Floats of patches per task: bounds its scratch to about a core's L2 cache.
const PATCH_FLOATS: usize = 128 * 1024;

thread_local! {
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Weights `[out, in, kt, kh, kw]` as a matrix `[kt·kh·kw·in, out]`, the order in which
/// patches of channels-last frames lie.
pub(super) fn pack(weight: &WeightView<'_>) -> Vec<f32> {
    let (out, inner) = (weight.shape[0], weight.shape[1]);
    let taps: usize = weight.shape[2..].iter().product();
    let source = weight.to_f32();
    let mut packed = vec![0.0; source.len()];
    for o in 0..out {
        for i in 0..inner {
            for tap in 0..taps {
                packed[(tap * inner + i) * out + o] = source[(o * inner + i) * taps + tap];
            }
        }
    }
    packed
}

pub(super) fn conv3d(run: &Run<'_>, spec: &ConvSpec) -> Result<()> {
    let x = run.input(0)?;
    let &[frames, height, width, channels] = run.input_shape(0) else {
        unreachable!("4-D by shape")
    };
    let name = &run.planned.graph.weights()[spec.weight.index()].name;
    let weight = &run.session.packed[name];
    let state = run.node.state.map(|s| run.session.place(run.planned, s)).transpose()?;
    let front = spec.front_frames();
    let [_, kh, kw] = spec.kernel;
    let [st, sh, sw] = spec.stride;
    let extent =
        [(frames + front - spec.kernel[0]) / st + 1, (height - 1) / sh + 1, (width - 1) / sw + 1];
    debug_assert!((kh == 1 || kh == 3) && (kw == 1 || kw == 3));
    let kernel = Kernel {
        x,
        carried: state.filter(|_| spec.continues),
        front,
        input: [height, width, channels],
        extent,
        spec,
        weight,
        bias: run.weight_f32(spec.bias)?,
        residual: if spec.residual { Some(run.input(1)?) } else { None },
        out: run.output()?,
        out_width: run.output_shape()[2],
        out_height: run.output_shape()[1],
        dtype: run.output_dtype(),
    };
    kernel.run();
    if let Some(state) = state.filter(|_| spec.moves_on) {
        carry(&x, state, frames, front, spec);
    }
    Ok(())
}

/// Keeps the last frames of the extended input (front and new) for the next window.
fn carry(x: &Mat, state: Mat, frames: usize, front: usize, spec: &ConvSpec) {
    let pixels = x.rows / frames;
    let keep = spec.carried_frames();
    // SAFETY: the convolution that read the state has ended, and no other node names it.
    let mut state = unsafe { state.writable() };
    for slot in 0..keep {
        // Position in the extended input; before `front` it is a frame carried in.
        let position = frames + front - keep + slot;
        for p in 0..pixels {
            let to = slot * pixels + p;
            if let Some(frame) = position.checked_sub(front) {
                state.row(to).copy_from_slice(x.row(frame * pixels + p));
            } else if spec.continues {
                // Slots move towards the front, so the source has not been overwritten.
                let source = state.row(position * pixels + p).to_vec();
                state.row(to).copy_from_slice(&source);
            } else {
                state.row(to).fill(0.0);
            }
        }
    }
}

struct Kernel<'a> {
    x: Mat,
    carried: Option<Mat>,
    front: usize,
    /// Height, width and channels of the input.
    input: [usize; 3],
    /// Positions of the kernel in time, height and width.
    extent: [usize; 3],
    spec: &'a ConvSpec,
    weight: &'a [f32],
    bias: Vec<f32>,
    residual: Option<Mat>,
    out: MatMut,
    out_width: usize,
    out_height: usize,
    dtype: DType,
}

impl Kernel<'_> {
    fn run(&self) {
        let [_, height, width] = self.extent;
        let patch = self.weight.len() / self.bias.len();
        let positions: usize = self.extent.iter().product();
        let piece = (PATCH_FLOATS / patch).clamp(16, 1024);
        debug_assert_eq!(positions % (height * width), 0);
        let starts: Vec<usize> = (0..positions).step_by(piece).collect();
        starts.into_par_iter().for_each(|start| {
            SCRATCH.with_borrow_mut(|(patches, products)| {
                let range = start..(start + piece).min(positions);
                self.piece(range, patch, patches, products);
            });
        });
    }

    fn piece(
        &self,
        positions: Range<usize>,
        patch: usize,
        patches: &mut Vec<f32>,
        products: &mut Vec<f32>,
    ) {
        let (m, n) = (positions.len(), self.bias.len());
        patches.resize(m * patch, 0.0);
        products.resize(m * n, 0.0);
        for (row, position) in patches.chunks_exact_mut(patch).zip(positions.clone()) {
            self.gather(position, row);
        }
        let lhs = Operand { start: patches.as_ptr(), column: 1, row: patch };
        let rhs = Operand { start: self.weight.as_ptr(), column: 1, row: n };
        // SAFETY: the vectors were sized for these extents just above, and the packed
        // weight is `patch × n`.
        unsafe { gemm_into([m, n, patch], products.as_mut_ptr(), n, false, lhs, rhs) };
        for (values, position) in products.chunks_exact_mut(n).zip(positions) {
            values.iter_mut().zip(&self.bias).for_each(|(v, b)| *v += b);
            self.store(position, values);
        }
    }

    fn split(&self, position: usize) -> [usize; 3] {
        let [_, height, width] = self.extent;
        [position / (height * width), position / width % height, position % width]
    }

    /// Lays the values under the kernel at `position` side by side.
    fn gather(&self, position: usize, patch: &mut [f32]) {
        let [height, width, channels] = self.input;
        let [kt, kh, kw] = self.spec.kernel;
        let stride = self.spec.stride;
        let [t, y, x] = self.split(position);
        let mut taps = patch.chunks_exact_mut(channels);
        for dt in 0..kt {
            for dy in 0..kh {
                let row = (y * stride[1] + dy).checked_sub(kh / 2).filter(|&r| r < height);
                for dx in 0..kw {
                    let column = (x * stride[2] + dx).checked_sub(kw / 2).filter(|&c| c < width);
                    let Some(tap) = taps.next() else { return };
                    let source = row.zip(column).and_then(|(r, c)| {
                        self.pixel(t * stride[0] + dt, r * width + c, height * width)
                    });
                    match source {
                        Some(source) => tap.copy_from_slice(source),
                        None => tap.fill(0.0),
                    }
                }
            }
        }
    }

    /// A pixel of the extended input, or nothing in the zeros before a video's start.
    fn pixel(&self, extended_frame: usize, pixel: usize, pixels: usize) -> Option<&[f32]> {
        match extended_frame.checked_sub(self.front) {
            Some(frame) => Some(self.x.row(frame * pixels + pixel)),
            None => self.carried.as_ref().map(|c| c.row(extended_frame * pixels + pixel)),
        }
    }

    /// Adds the residual and stores the channels of one position where the shuffle puts
    /// them.
    fn store(&self, position: usize, values: &[f32]) {
        let [t, y, x] = self.split(position);
        let pixels = self.out_height * self.out_width;
        match self.spec.shuffle {
            Shuffle::None => self.put(position, values.len(), |c| values[c]),
            Shuffle::Space => {
                for (p1, p2) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let row = t * pixels + (2 * y + p1) * self.out_width + 2 * x + p2;
                    self.put(row, values.len() / 4, |c| values[c * 4 + p1 * 2 + p2]);
                }
            }
            Shuffle::OneOfTime { second } => {
                // The other half is computed for nothing, which costs no memory.
                let p = usize::from(second);
                self.put(position, values.len() / 2, |c| values[c * 2 + p]);
            }
            Shuffle::Time { drop_first } => {
                for p in 0..2 {
                    let Some(frame) = (2 * t + p).checked_sub(usize::from(drop_first)) else {
                        continue;
                    };
                    let row = frame * pixels + y * self.out_width + x;
                    self.put(row, values.len() / 2, |c| values[c * 2 + p]);
                }
            }
        }
    }

    fn put(&self, row: usize, channels: usize, value: impl Fn(usize) -> f32) {
        // SAFETY: every output row belongs to one position of the kernel, so to one task.
        let place = unsafe { self.out.piece(row, 0..channels) };
        for (c, out) in place.iter_mut().enumerate() {
            *out = value(c) + self.residual.as_ref().map_or(0.0, |r| r.row(row)[c]);
        }
        round(self.dtype, place);
    }
}
