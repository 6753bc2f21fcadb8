//! Attention.

use super::{Prepare, int};
use crate::exec::cuda::kernels::{Kernels, blocks};
use crate::exec::cuda::tables::groups;
use crate::exec::cuda::{params, tensor_map};
use crate::graph::AttentionSpec;
use crate::tensor::DType;
use crate::{Error, Result};

/// Which kernel computes an attention node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::exec::cuda) enum Variant {
    /// Head size 64 by wgmma, for sm_90.
    Hopper,
    /// Head size 64.
    Heads64,
    /// Head size 64 with a causal mask or a bias.
    Masked64,
    /// Head size 16, with or without a mask or a bias.
    Masked16,
    /// Any head size up to 512.
    Wide,
}

impl Variant {
    /// The kernel for heads of `size` on this GPU.
    pub fn choose(kernels: &Kernels, spec: &AttentionSpec, size: usize) -> Result<Variant> {
        let masked = spec.causal || spec.relative_bias.is_some();
        match (size, masked) {
            (64, false) if kernels.hopper => Ok(Variant::Hopper),
            (64, false) => Ok(Variant::Heads64),
            (64, true) => Ok(Variant::Masked64),
            (16, _) => Ok(Variant::Masked16),
            (8..=512, false) if size.is_multiple_of(8) => Ok(Variant::Wide),
            _ => Err(Error::device(format!(
                "there is no attention kernel for heads of {size}{}",
                if masked { " with a mask or a bias" } else { "" }
            ))),
        }
    }

    /// Queries of one block; `None` where it takes groups of several segments.
    pub fn queries(self) -> Option<usize> {
        match self {
            Variant::Hopper => None,
            Variant::Heads64 => Some(128),
            Variant::Masked64 | Variant::Masked16 | Variant::Wide => Some(64),
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Variant::Hopper => "attention_sm90_64",
            Variant::Heads64 => "attention_64",
            Variant::Masked64 => "attention_64_masked",
            Variant::Masked16 => "attention_16_masked",
            Variant::Wide => "attention_wide",
        }
    }
}

pub(super) fn attention(p: &mut Prepare<'_>, spec: &AttentionSpec) -> Result<()> {
    let tables = p.tables.attention(p.index).copied();
    let tables = tables.ok_or_else(|| Error::device("attention without its tables"))?;
    let [q, k, v] = [p.input(0, DType::Bf16)?, p.input(1, DType::Bf16)?, p.input(2, DType::Bf16)?];
    let out = p.output(DType::Bf16)?;
    for place in [q, k, v, out] {
        if !place.stride.is_multiple_of(8) || !place.address.is_multiple_of(16) {
            return Err(Error::device("attention needs rows that are aligned to 16 bytes"));
        }
    }
    let items = blocks(tables.tile_count * spec.heads, 1)?;
    let kernel = tables.variant.kernel();
    if tables.variant == Variant::Hopper {
        let parameters = params::AttentionSm90 {
            q: tensor_map::matrix(q, groups::QUERIES)?,
            k: tensor_map::matrix(k, groups::KEYS)?,
            v: tensor_map::matrix(v, groups::KEYS)?,
            out: out.address,
            tiles: tables.tiles,
            ranges: tables.ranges,
            ldo: out.stride as i64,
            scale: spec.scale,
            heads: int(spec.heads)?,
            tile_count: int(tables.tile_count)?,
            pad: 0,
            tail: [0; 2],
        };
        // Blocks stay and take one item after the other.
        let grid = [items.min(p.kernels.multiprocessors), 1, 1];
        return p.launch(kernel, grid, &parameters);
    }
    let parameters = params::Attention {
        q: q.address,
        k: k.address,
        v: v.address,
        out: out.address,
        tiles: tables.tiles,
        ranges: tables.ranges,
        bias: tables.bias,
        ldq: q.stride as i64,
        ldk: k.stride as i64,
        ldv: v.stride as i64,
        ldo: out.stride as i64,
        scale: spec.scale,
        heads: int(spec.heads)?,
        head_size: int(q.cols / spec.heads)?,
        causal: i32::from(spec.causal),
        bias_span: int(tables.bias_span)?,
        pad: 0,
    };
    p.launch(kernel, [blocks(tables.tile_count, 1)?, int(spec.heads)? as u32, 1], &parameters)
}
