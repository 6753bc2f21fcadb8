//! The operations a graph may hold, one definition each: meaning, what is read and written,
//! and whether the output may take the place of an input.
//!
//! Shapes are inferred and checked in `shape.rs`, what an op costs is in `cost.rs`, the CPU
//! meaning is in `exec/cpu`.

use std::ops::Range;
use std::sync::Arc;

use super::WeightId;

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))`.
    GeluErf,
    /// `x · σ(1.702·x)`.
    QuickGelu,
}

/// A run of consecutive rows that belong to one sample of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowGroup {
    /// Number of rows.
    pub rows: usize,
    /// Row of the modulation table that applies to them.
    pub sample: usize,
}

/// What a matrix product does with its result before storing it.
#[derive(Debug, Clone)]
pub enum Epilogue {
    /// `y = x·Wᵀ + b`.
    Store,
    /// `y = act(x·Wᵀ + b)`.
    Activate(Activation),
    /// `y ← y + x·Wᵀ + b`.
    Accumulate,
    /// `y ← y + gate · (x·Wᵀ + b)`, the gate being columns
    /// `gate_column .. gate_column + N` of the modulation table (second input) in the row
    /// of the group's sample.
    GatedAccumulate {
        /// First column of the gate.
        gate_column: usize,
        /// Which rows belong to which sample.
        groups: Arc<[RowGroup]>,
    },
    /// `y = x·Wᵀ + b`, and then of each part with a norm the heads as [`Op::HeadNormRope`] has
    /// them, its table being the second input.
    NormHeads(HeadNorms),
}

/// RMS norms of the heads that a matrix product gives.
#[derive(Debug, Clone)]
pub struct HeadNorms {
    /// For each part of the product the weight `[size]` of its heads' norm, if it has one.
    pub weights: Vec<Option<WeightId>>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Queries `queries` attend to every key in `keys`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the query (and output) tensor.
    pub queries: Range<usize>,
    /// Rows of the key and value tensors; ranges do not overlap.
    pub keys: Vec<Range<usize>>,
}

/// Multi-head attention over ranges of packed rows.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Number of heads; the head size is the number of columns over this.
    pub heads: usize,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// Which queries see which keys.
    pub segments: Arc<[Segment]>,
    /// Within a segment, query `i` sees key `j` only if `j ≤ i` (positions counted from
    /// the start of the segment's queries and of its keys).
    pub causal: bool,
    /// Added to the scores.
    pub relative_bias: Option<RelativeBias>,
}

/// T5's bias of the scores by relative position (Raffel et al., arXiv 1910.10683, 2.1):
/// half of the buckets for each direction; of these half exact, the others logarithmic.
#[derive(Debug, Clone, Copy)]
pub struct RelativeBias {
    /// Table `[buckets, heads]`.
    pub table: WeightId,
    /// Number of buckets, a multiple of four.
    pub buckets: usize,
    /// Distance from which on all positions share the last bucket.
    pub max_distance: usize,
}

impl RelativeBias {
    /// The bucket of a relative position `key − query`.
    pub fn bucket(&self, relative: i64) -> usize {
        let side = self.buckets / 2;
        let exact = side / 2;
        let start = if relative > 0 { side } else { 0 };
        let n = relative.unsigned_abs() as usize;
        if n < exact {
            return start + n;
        }
        let octaves = (self.max_distance as f64 / exact as f64).ln();
        let logarithmic = (n as f64 / exact as f64).ln() / octaves * (side - exact) as f64;
        start + (exact + logarithmic as usize).min(side - 1)
    }
}

/// Depth-to-space rearrangements that a convolution applies while storing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// Stored as computed.
    None,
    /// Channel `(c, p1, p2)` goes to row `2y + p1`, column `2x + p2`, channel `c`.
    Space,
    /// Channel `(c, p)` goes to frame `2t + p`, channel `c`; at the start of a video the
    /// first frame of the result is left out.
    Time {
        /// Whether to leave out the first frame.
        drop_first: bool,
    },
    /// Channel `(c, p)` of one `p` goes to frame `t`, channel `c`; those of the other are not
    /// computed: one of the two frames that `Time` makes of each.
    OneOfTime {
        /// Whether `p` is 1.
        second: bool,
    },
}

/// A causal 3-D convolution: height and width padded by zeros on both sides, time by the
/// carried frames (or zeros) in front.
#[derive(Debug, Clone)]
pub struct ConvSpec {
    /// Weight `[out, in, kt, kh, kw]`.
    pub weight: WeightId,
    /// Bias `[out]`.
    pub bias: WeightId,
    /// Kernel extent in time, height, width: 1 or 3 each.
    pub kernel: [usize; 3],
    /// Stride in time, height, width.
    pub stride: [usize; 3],
    /// Rearrangement of the result.
    pub shuffle: Shuffle,
    /// Whether the second input is added to the result.
    pub residual: bool,
    /// Whether this window continues a video: then the frames in front are those carried
    /// from the window before, else they are zeros.
    pub continues: bool,
    /// Whether what is carried becomes the last frames of this window: not where another
    /// convolution of the same frames follows.
    pub moves_on: bool,
}

impl ConvSpec {
    /// Frames put in front of the input: `kt − 1` zeros where a video starts, the carried
    /// frames where it continues.
    pub fn front_frames(&self) -> usize {
        if self.continues { self.carried_frames() } else { self.kernel[0] - 1 }
    }

    /// Which half of the channels is computed, if not all are: of each two the first or the second.
    pub fn half(&self) -> Option<usize> {
        match self.shuffle {
            Shuffle::OneOfTime { second } => Some(usize::from(second)),
            _ => None,
        }
    }

    /// Frames of the extended input (front and new) that the next window needs: those the
    /// next output frame still reads, `kt − stride`.
    pub fn carried_frames(&self) -> usize {
        self.kernel[0].saturating_sub(self.stride[0])
    }
}

/// An operation. Inputs are listed in order; `→` names the output.
#[derive(Debug, Clone)]
pub enum Op {
    /// ids `[n]` → rows of `table` (plus row `i` of `positions` for id `i`), `[n, d]`.
    Embedding {
        /// Token table `[vocabulary, d]`.
        table: WeightId,
        /// Learned positions `[max, d]`.
        positions: Option<WeightId>,
    },
    /// x `[n, k]` (and the modulation table for a gate) → `[n, ΣN]`: the products with
    /// several weights `[N, k]` side by side.
    Linear {
        /// Weights and their biases.
        parts: Vec<(WeightId, Option<WeightId>)>,
        /// What happens to the result.
        epilogue: Epilogue,
    },
    /// q, k, v → `[queries, heads · size]`: softmax(scale · q·kᵀ + bias) · v per head.
    Attention(AttentionSpec),
    /// x → (x − mean) / √(variance + eps) · weight + bias over each row.
    LayerNorm {
        /// Weight `[d]`.
        weight: WeightId,
        /// Bias `[d]`.
        bias: WeightId,
        /// Added to the variance.
        eps: f32,
    },
    /// x, modulation → LN(x) · (1 + scale) + shift, no affine weights (adaptive norm).
    LayerNormModulate {
        /// Added to the variance.
        eps: f32,
        /// First column of the shift in the modulation table.
        shift_column: usize,
        /// First column of the scale.
        scale_column: usize,
        /// Which rows belong to which sample.
        groups: Arc<[RowGroup]>,
    },
    /// x → x · rsqrt(mean(x²) + eps) · weight over each row.
    RmsNorm {
        /// Weight `[d]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
    },
    /// table `[n, head/2 · 2]` of (cos, sin) pairs; updates x `[n, heads · size]` in place:
    /// RMS norm of every head, then rotation of the pairs (2k, 2k+1). Models have it as
    /// [`Epilogue::NormHeads`].
    HeadNormRope {
        /// Weight `[size]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
        /// Number of heads.
        heads: usize,
    },
    /// x → act(x).
    Activate(Activation),
    /// x `[n, 2m]` → gelu_tanh(x[.., ..m]) · x[.., m..], `[n, m]`.
    GatedGelu,
    /// timesteps `[n]` → `[n, dim]`: cos then sin of `t · exp(−ln 10000 · k / (dim/2))`.
    TimestepEmbedding,
    /// latents `[t, h, w, c]` → `[t·h/2·w/2, 4c]`, 2×2 patches row by row.
    Patchify {
        /// Order within a patch: channel, row, column if true, else row, column, channel.
        channels_first: bool,
    },
    /// tokens `[n, 4c]` in (row, column, channel) order → `[t, h, w, c]`.
    Unpatchify,
    /// Updates x `[t·h·w, d]` in place: adds the centred crop of the position table for a
    /// stage of `stage` tokens, resized bilinearly to the clip's grid.
    AddPositionTable {
        /// Table `[1, max·max, d]`.
        table: WeightId,
        /// Side of the square table.
        max_size: usize,
        /// Rows and columns of tokens of the current stage.
        stage: [usize; 2],
        /// Rows and columns of tokens of this clip.
        grid: [usize; 2],
    },
    /// velocity `[b, h, w, c]` and scalars `[2]` (guidance, σ difference); updates x in
    /// place: `x ← x + Δσ · (v₀ + g·(v₁ − v₀))`, or `x + Δσ·v₀` for one sample.
    GuidedEuler,
    /// words `[4]` (see [`crate::sampler::Draw::words`]) → seeded noise
    /// `[frames, height, width, 16]` in f32, every value from its own coordinates.
    NormalNoise {
        /// Latent frames.
        frames: usize,
        /// Latent rows.
        height: usize,
        /// Latent columns.
        width: usize,
        /// Whether the 2×2 blocks `e` of each channel become `√(4/3)·(e − mean(e))`; height
        /// and width are even then.
        block: bool,
    },
    /// latents `[t, h, w, 16]` → `[t, h/2, w/2, 16]`: the mean of each 2×2 block (bilinear
    /// resizing by one half) times `factor`.
    HalveBilinear {
        /// Factor on the means.
        factor: f32,
    },
    /// latents x `[t, h, w, 16]`, noise `[t, 2h, 2w, 16]` → `alpha·x + beta·noise`, every
    /// value of x repeated in a 2×2 block.
    DoubleRenoise {
        /// Factor on the latents.
        alpha: f32,
        /// Factor on the noise.
        beta: f32,
    },
    /// x `[t, h, w, c]` (and the residual) → causal convolution.
    Conv3d(ConvSpec),
    /// x `[t, h, w, c]` → group norm with the statistics of one frame, then SiLU if asked.
    GroupNorm {
        /// Weight `[c]`.
        weight: WeightId,
        /// Bias `[c]`.
        bias: WeightId,
        /// Number of channel groups.
        groups: usize,
        /// Added to the variance.
        eps: f32,
        /// Whether SiLU follows.
        silu: bool,
    },
}

/// The ops' names, once: a variant without a name does not compile, and the list of names
/// cannot lack one.
macro_rules! names {
    ($($variant:pat => $name:literal),* $(,)?) => {
        impl Op {
            /// The names of all ops.
            pub const NAMES: &[&str] = &[$($name),*];

            /// The field's name of the op, for profiles and messages.
            pub fn name(&self) -> &'static str {
                match self {
                    $($variant => $name),*
                }
            }
        }
    };
}

names! {
    Op::Embedding { .. } => "embedding",
    Op::Linear { .. } => "linear",
    Op::Attention(_) => "attention",
    Op::LayerNorm { .. } => "layer_norm",
    Op::LayerNormModulate { .. } => "layer_norm_modulate",
    Op::RmsNorm { .. } => "rms_norm",
    Op::HeadNormRope { .. } => "head_norm_rope",
    Op::Activate(_) => "activate",
    Op::GatedGelu => "gated_gelu",
    Op::TimestepEmbedding => "timestep_embedding",
    Op::Patchify { .. } => "patchify",
    Op::Unpatchify => "unpatchify",
    Op::AddPositionTable { .. } => "add_position_table",
    Op::GuidedEuler => "guided_euler",
    Op::NormalNoise { .. } => "normal_noise",
    Op::HalveBilinear { .. } => "halve_bilinear",
    Op::DoubleRenoise { .. } => "double_renoise",
    Op::Conv3d(_) => "conv3d",
    Op::GroupNorm { .. } => "group_norm",
}

impl Op {
    /// Whether the op reads its output before writing it.
    pub fn updates_output(&self) -> bool {
        matches!(
            self,
            Op::Linear { epilogue: Epilogue::Accumulate | Epilogue::GatedAccumulate { .. }, .. }
                | Op::HeadNormRope { .. }
                | Op::AddPositionTable { .. }
                | Op::GuidedEuler
        )
    }

    /// Whether a fresh output may take the memory of the first input when that input is
    /// not needed any more: true only where every element (or every row, held in registers
    /// or cache while it is reduced) is read before it is written.
    pub fn may_reuse_input(&self) -> bool {
        matches!(
            self,
            Op::LayerNorm { .. }
                | Op::LayerNormModulate { .. }
                | Op::RmsNorm { .. }
                | Op::Activate(_)
                | Op::GroupNorm { .. }
        )
    }
}

impl Segment {
    /// Number of (query, key) pairs, masked ones of a causal segment included.
    pub fn pairs(&self) -> u64 {
        let keys: usize = self.keys.iter().map(ExactSizeIterator::len).sum();
        self.queries.len() as u64 * keys as u64
    }
}

#[cfg(test)]
mod tests {
    use super::{RelativeBias, WeightId};

    #[test]
    fn relative_buckets() {
        let bias = RelativeBias { table: WeightId(0), buckets: 32, max_distance: 128 };
        // Positions at which the formula steps, worked out by hand.
        for (relative, bucket) in
            [(0, 0), (1, 17), (-1, 1), (7, 23), (-7, 7), (8, 24), (-8, 8), (16, 26), (-64, 14)]
        {
            assert_eq!(bias.bucket(relative), bucket, "relative position {relative}");
        }
        assert_eq!(bias.bucket(-127), 15);
        assert_eq!(bias.bucket(5000), 31);
    }
}
