//! The choice of a tile for the matrix products of sm_90, linear layers and convolutions
//! alike: their kernels share one main loop (`kernels/lib/gemm_sm90.cuh`).

use std::fmt;

use crate::exec::cuda::kernels::blocks;
use crate::{Error, Result};

/// What one block computes at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
    /// Blocks of a cluster: 2 take neighbouring rows and share what they load of the columns.
    pub cluster: usize,
    /// Whether the consumers of a block take tiles in turn, one storing while the other
    /// multiplies, instead of sharing each.
    pub in_turn: bool,
}

impl fmt::Display for Tile {
    /// As in the names of the kernels.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = if self.cluster == 2 { "_pair" } else { "" };
        write!(f, "{}x{}{pair}", self.rows, self.columns)
    }
}

impl Tile {
    /// Inner dimension of one step of the main loop.
    const DEPTH: usize = 64;

    /// Cycles of the end of a tile: the last products, the epilogue, the stores.
    const END: usize = 4000;

    /// Cycles of `tiles` tiles, one after another, over an inner dimension of `depth`, about:
    /// the tensor cores of a multiprocessor finish 2048 products a cycle and the second-level
    /// cache delivers some 56 bytes (many blocks ask for the same at one time). Tiles taken in
    /// turn hide their ends, at the price of some overlap in the main loop.
    fn cycles(&self, tiles: usize, depth: usize) -> usize {
        let products = self.rows * self.columns * Self::DEPTH / 2048;
        let bytes = 2 * Self::DEPTH * (self.rows + self.columns / self.cluster);
        let main = tiles * depth.div_ceil(Self::DEPTH) * products.max(bytes / 56);
        if self.in_turn { main * 21 / 20 + Self::END } else { main + tiles * Self::END }
    }
}

/// The tile that finishes first, and the grid of blocks that stay and take one tile after
/// another. `units` counts tiles (pairs of tiles for a cluster of 2).
pub(super) fn cheapest<'a>(
    tiles: impl Iterator<Item = &'a Tile>,
    multiprocessors: usize,
    depth: usize,
    units: impl Fn(&Tile) -> usize,
) -> Result<(&'a Tile, [u32; 3])> {
    let force = std::env::var("FORCE").unwrap_or_default();
    let tiles = tiles.filter(|t| {
        force.is_empty() || t.columns % 64 != 0 || t.to_string() == force || t.rows > 128
    });
    let clusters = |tile: &Tile| multiprocessors / tile.cluster;
    let cost = |tile: &&Tile| tile.cycles(units(tile).div_ceil(clusters(tile)), depth);
    let tile = tiles.min_by_key(cost).ok_or_else(|| Error::device("no tile fits the product"))?;
    let count = units(tile).min(clusters(tile)) * tile.cluster;
    Ok((tile, [blocks(count, 1)?, 1, 1]))
}
