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

    /// Cycles of one tile over an inner dimension of `depth`, about: the tensor cores of a
    /// multiprocessor finish 2048 products a cycle, the second-level cache delivers some 40
    /// bytes, and a tile's end takes about 2500.
    fn cycles(&self, depth: usize) -> usize {
        let products = self.rows * self.columns * Self::DEPTH / 2048;
        let bytes = 2 * Self::DEPTH * (self.rows + self.columns / self.cluster);
        depth.div_ceil(Self::DEPTH) * products.max(bytes / 40) + 2500
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
    let clusters = |tile: &Tile| multiprocessors / tile.cluster;
    let cost = |tile: &&Tile| units(tile).div_ceil(clusters(tile)) * tile.cycles(depth);
    let tile = tiles.min_by_key(cost).ok_or_else(|| Error::device("no tile fits the product"))?;
    let count = units(tile).min(clusters(tile)) * tile.cluster;
    Ok((tile, [blocks(count, 1)?, 1, 1]))
}
