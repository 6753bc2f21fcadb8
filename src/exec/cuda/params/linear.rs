//! Of matrix products, on every GPU and on Hopper, and of what their ends do with rows and heads.

use bytemuck::{Pod, Zeroable};

use super::TensorMap;
use crate::exec::cuda::driver::Address;
use crate::graph::RowGroup;

/// `kernels/gemm.cu`: x·Wᵀ with its epilogue.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(in crate::exec::cuda) struct Gemm {
    pub x: Address,
    pub weight: Address,
    pub bias: Address,
    pub out: Address,
    pub gate: Address,
    pub ldx: i64,
    pub ldw: i64,
    pub ldo: i64,
    pub ld_gate: i64,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub epilogue: i32,
    pub activation: i32,
    pub out_f32: i32,
    pub groups: RowGroups,
    pub pad: i32,
}

/// `kernels/gemm_sm90.cu`: the same through tensor maps.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(in crate::exec::cuda) struct GemmSm90 {
    pub a: TensorMap,
    pub b: TensorMap,
    /// Of the output; only read where that is bf16.
    pub c: TensorMap,
    pub gemm: Gemm,
    pub heads: Heads,
    /// Rows of its tiles: a multiple of 16, at most what the kernel is made for.
    pub tile_rows: i32,
    pub pad: i32,
    pub tail: [u64; 4],
}

/// What `kernels/gemm_sm90.cu` needs to norm and rotate heads; all zeros where it does not.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(in crate::exec::cuda) struct Heads {
    /// For each `part_columns` columns the weight of their heads' norm, or zero.
    pub weights: [Address; Heads::PARTS],
    pub table: Address,
    pub ld_table: i64,
    pub part_columns: i32,
    pub eps: f32,
}

impl Heads {
    /// Most parts of a product: queries, keys, values.
    pub const PARTS: usize = 3;
    /// The size of the heads.
    pub const SIZE: usize = 64;
}

/// Which sample the rows belong to: up to [`RowGroups::MOST`] runs of rows.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(in crate::exec::cuda) struct RowGroups {
    pub count: i32,
    pub end: [i32; RowGroups::MOST],
    pub sample: [i32; RowGroups::MOST],
}

impl RowGroups {
    /// Two samples with text, history and current frame each are 6.
    pub const MOST: usize = 8;

    /// Neighbouring groups of one sample count once; `None` if there are too many.
    pub fn new(groups: &[RowGroup]) -> Option<RowGroups> {
        let mut out = RowGroups::zeroed();
        let mut end = 0;
        let mut count = 0;
        for group in groups.iter().filter(|g| g.rows > 0) {
            end += group.rows;
            let sample = group.sample as i32;
            if count == 0 || out.sample[count - 1] != sample {
                if count == Self::MOST {
                    return None;
                }
                out.sample[count] = sample;
                count += 1;
            }
            out.end[count - 1] = end as i32;
        }
        out.count = count as i32;
        Some(out)
    }
}
