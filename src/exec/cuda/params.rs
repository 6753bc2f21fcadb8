//! The one parameter of each kernel, as the kernels declare it: same order, same types, same
//! size (both sides assert it).

mod linear;

use bytemuck::{Pod, Zeroable};

use super::driver::Address;
use crate::graph::Activation;
pub(super) use linear::{Gemm, GemmSm90, Heads, RowGroups};

/// Asserts the size that the kernel's source asserts.
macro_rules! sizes {
    ($($name:ident = $bytes:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<$name>() == $bytes);)*
    };
}

/// `kernels/pointwise.cu`: out = act(x).
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Activate {
    pub x: Address,
    pub out: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ldo: i64,
    pub cols: i32,
    pub activation: i32,
}

/// `kernels/pointwise.cu`: out = gelu_tanh(x[.., ..cols]) · x[.., cols..].
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct GatedGelu {
    pub x: Address,
    pub out: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ldo: i64,
    pub cols: i32,
    pub pad: i32,
}

/// `kernels/pointwise.cu`: rows of a table by id, plus rows of positions.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Embedding {
    pub ids: Address,
    pub table: Address,
    pub positions: Address,
    pub out: Address,
    pub rows: i64,
    pub ldo: i64,
    pub cols: i32,
    pub pad: i32,
}

/// `kernels/pointwise.cu`: sinusoids of timesteps.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Timestep {
    pub timesteps: Address,
    pub out: Address,
    pub rows: i64,
    pub ldo: i64,
    pub cols: i32,
    pub pad: i32,
}

/// Latents to tokens.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Patchify {
    pub x: Address,
    pub out: Address,
    pub frames: i32,
    pub height: i32,
    pub width: i32,
    pub channels: i32,
    pub ldo: i64,
    pub channels_first: i32,
    pub pad: i32,
}

/// Tokens to latents.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Unpatchify {
    pub x: Address,
    pub out: Address,
    pub frames: i32,
    pub height: i32,
    pub width: i32,
    pub channels: i32,
    pub ldx: i64,
}

/// Adds the resized crop of a position table.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Position {
    pub table: Address,
    pub x: Address,
    pub rows: i64,
    pub ldx: i64,
    pub cols: i32,
    pub max_size: i32,
    pub stage_h: i32,
    pub stage_w: i32,
    pub grid_h: i32,
    pub grid_w: i32,
}

/// Guidance and Euler step.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Euler {
    pub velocity: Address,
    pub scalars: Address,
    pub x: Address,
    pub n: i64,
    pub guided: i32,
    pub pad: i32,
}

/// `kernels/noise.cu`: seeded noise.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Noise {
    pub out: Address,
    pub words: Address,
    pub frames: i32,
    pub height: i32,
    pub width: i32,
    pub block: i32,
}

/// `kernels/resize.cu`: half the size; the extents are those of x.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Halve {
    pub x: Address,
    pub out: Address,
    pub frames: i32,
    pub height: i32,
    pub width: i32,
    pub channels: i32,
    pub factor: f32,
    pub pad: i32,
}

/// `kernels/resize.cu`: twice the size, and noise; the extents are those of x.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Renoise {
    pub x: Address,
    pub noise: Address,
    pub out: Address,
    pub frames: i32,
    pub height: i32,
    pub width: i32,
    pub channels: i32,
    pub alpha: f32,
    pub beta: f32,
}

/// Values in −1 … 1 to bytes.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Rgb8 {
    pub x: Address,
    pub out: Address,
    pub not_finite: Address,
    pub n: i64,
}

/// Convolution weights from `[out][in][tap]` to `[out][tap][in]`, `in` padded with zeros, all
/// rows or some.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct PackConv {
    pub weight: Address,
    pub out: Address,
    pub cout: i32,
    pub cin: i32,
    pub taps: i32,
    pub cin_padded: i32,
    /// The output's first row in the weight, and how far its rows lie apart there.
    pub first: i32,
    pub every: i32,
}

/// `kernels/norm.cu`: layer norm with weight and bias.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LayerNorm {
    pub x: Address,
    pub out: Address,
    pub weight: Address,
    pub bias: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ldo: i64,
    pub cols: i32,
    pub eps: f32,
}

/// `kernels/norm.cu`: layer norm with scale and shift from the modulation table.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Modulate {
    pub x: Address,
    pub out: Address,
    pub modulation: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ldo: i64,
    pub ld_modulation: i64,
    pub cols: i32,
    pub eps: f32,
    pub shift_column: i32,
    pub scale_column: i32,
    pub groups: RowGroups,
    pub pad: i32,
}

/// `kernels/norm.cu`: RMS norm.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RmsNorm {
    pub x: Address,
    pub out: Address,
    pub weight: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ldo: i64,
    pub cols: i32,
    pub eps: f32,
}

/// `kernels/norm.cu`: RMS norm of every head, then rotation, in place.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct HeadNormRope {
    pub x: Address,
    pub table: Address,
    pub weight: Address,
    pub rows: i64,
    pub ldx: i64,
    pub ld_table: i64,
    pub heads: i32,
    pub size: i32,
    pub eps: f32,
    pub pad: i32,
}

/// `kernels/group_norm.cu`: group norm per frame, perhaps with SiLU.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct GroupNorm {
    pub x: Address,
    pub out: Address,
    pub weight: Address,
    pub bias: Address,
    pub workspace: Address,
    pub pixels: i64,
    pub frames: i32,
    pub channels: i32,
    pub groups: i32,
    pub chunks: i32,
    pub chunk_pixels: i64,
    pub eps: f32,
    pub silu: i32,
}

/// Some queries of one segment, for all heads: a unit of work of the attention kernels.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable, Debug, PartialEq)]
pub(super) struct AttentionTile {
    /// First row of the queries and of the output.
    pub query: i32,
    pub queries: i32,
    /// Position of the first query within its segment.
    pub position: i32,
    /// The key ranges: `ranges` of them from index `first_range` on.
    pub first_range: i32,
    pub ranges: i32,
    /// Keys in all ranges together.
    pub keys: i32,
    pub pad: [i32; 2],
}

/// Groups of queries of `kernels/attention_sm90.cu` that share loads of keys and values.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable, Debug, PartialEq)]
pub(super) struct AttentionSm90Tile {
    /// First row of each group.
    pub query: [i32; 3],
    pub queries: [i32; 3],
    /// Key tiles from the first on that each group sees.
    pub key_tiles: [i32; 3],
    /// The key ranges: `ranges` of them from index `first_range` on.
    pub first_range: i32,
    pub ranges: i32,
    pub pad: i32,
}

/// Consecutive rows of keys and values.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable, Debug, PartialEq)]
pub(super) struct KeyRange {
    pub start: i32,
    pub count: i32,
}

/// `kernels/attention.cu`: attention by mma.sync.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Attention {
    pub q: Address,
    pub k: Address,
    pub v: Address,
    pub out: Address,
    pub tiles: Address,
    pub ranges: Address,
    pub bias: Address,
    pub ldq: i64,
    pub ldk: i64,
    pub ldv: i64,
    pub ldo: i64,
    pub scale: f32,
    pub heads: i32,
    pub head_size: i32,
    pub causal: i32,
    pub bias_span: i32,
    pub pad: i32,
}

/// A tensor map of the copy engine, as the driver encodes it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct TensorMap {
    pub words: [u64; 16],
}

/// `kernels/attention_sm90.cu`: attention by wgmma.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct AttentionSm90 {
    pub q: TensorMap,
    pub k: TensorMap,
    pub v: TensorMap,
    pub out: Address,
    pub tiles: Address,
    pub ranges: Address,
    pub ldo: i64,
    pub scale: f32,
    pub heads: i32,
    pub tile_count: i32,
    pub pad: i32,
    pub tail: [u64; 2],
}

/// `kernels/conv3d.cu`: causal convolution as implicit GEMM.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Conv {
    pub x: Address,
    pub carried: Address,
    pub weight: Address,
    pub bias: Address,
    pub residual: Address,
    pub out: Address,
    /// Frames, height, width, channels of the input.
    pub input: [i32; 4],
    /// Positions of the kernel in time, height and width, and output channels, before any
    /// shuffle.
    pub extent: [i32; 4],
    pub kernel: [i32; 3],
    pub stride: [i32; 3],
    pub front: i32,
    pub shuffle: i32,
    pub cin_padded: i32,
    /// Width of the copy engine's boxes; only the kernel for sm_90 reads it.
    pub box_width: i32,
}

/// `kernels/conv3d_sm90.cu`: the same through tensor maps.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvSm90 {
    pub x_map: TensorMap,
    pub carried_map: TensorMap,
    pub weight_map: TensorMap,
    pub conv: Conv,
    pub tail: [u64; 1],
}

sizes! {
    Activate = 48,
    GatedGelu = 48,
    Embedding = 56,
    Timestep = 40,
    Patchify = 48,
    Unpatchify = 40,
    Position = 56,
    Euler = 40,
    Noise = 32,
    Halve = 40,
    Renoise = 48,
    Rgb8 = 32,
    PackConv = 40,
    RowGroups = 68,
    LayerNorm = 64,
    Modulate = 144,
    RmsNorm = 56,
    HeadNormRope = 64,
    GroupNorm = 80,
    AttentionTile = 32,
    AttentionSm90Tile = 48,
    KeyRange = 8,
    Attention = 112,
    AttentionSm90 = 448,
    Gemm = 168,
    GemmSm90 = 640,
    Conv = 120,
    ConvSm90 = 512,
}

/// The kernels' number of an activation.
pub(super) fn activation_code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 1,
        Activation::GeluTanh => 2,
        Activation::GeluErf => 3,
        Activation::QuickGelu => 4,
    }
}
