//! The choice of a tile for the matrix products of sm_90, linear layers and convolutions
//! alike: their kernels share one main loop (`kernels/lib/gemm_sm90.cuh`).

use std::fmt;

use serde::Serialize;

use crate::exec::cuda::kernels::blocks;
use crate::{Error, Result};

/// What one block computes at a time, and how long it takes for that on an H200.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
    /// Blocks of a cluster: 2 take neighbouring rows and share what they load of the columns.
    pub cluster: usize,
    /// Blocks that share a tile, each with its part of the inner dimension.
    pub split: usize,
    /// Whether the consumers of a block take tiles in turn, one storing while the other
    /// multiplies, instead of sharing each.
    pub in_turn: bool,
    /// Nanoseconds before the first product.
    pub start: usize,
    /// Nanoseconds of one step of the main loop.
    pub step: usize,
    /// Nanoseconds of the end of a tile: the last products, the epilogue, the stores.
    pub end: usize,
}

/// What a product is for one tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Units {
    /// Tiles (pairs of tiles for a cluster of 2) that its rows make.
    pub down: usize,
    /// Tiles that its columns make.
    pub across: usize,
    /// Inner dimension.
    pub depth: usize,
}

impl Units {
    pub fn count(&self) -> usize {
        self.down * self.across
    }

    /// Of all products of a launch.
    fn total(units: &[Units]) -> usize {
        units.iter().map(Units::count).sum()
    }
}

impl fmt::Display for Tile {
    /// As in the names of the kernels.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = if self.cluster == 2 { "_pair" } else { "" };
        write!(f, "{}x{}{pair}", self.rows, self.columns)?;
        if self.split == 1 { Ok(()) } else { write!(f, "_split{}", self.split) }
    }
}

impl Tile {
    /// Inner dimension of one step of the main loop.
    const DEPTH: usize = 64;

    /// What a product of so many rows, columns and values of the inner dimension is for it.
    pub fn units(&self, rows: usize, columns: usize, depth: usize) -> Units {
        let down = rows.div_ceil(self.rows * self.cluster);
        Units { down, across: columns.div_ceil(self.columns), depth }
    }

    /// Rows of each tile of a product of so many: as equal as warps of 16 rows allow. The copy engine
    /// is slow where boxes reach beyond the last row.
    pub fn height(&self, rows: usize) -> usize {
        let tiles = rows.div_ceil(self.rows * self.cluster) * self.cluster;
        rows.div_ceil(tiles).next_multiple_of(16)
    }

    /// Clusters that run at once.
    fn clusters(&self, multiprocessors: usize) -> usize {
        multiprocessors / (self.cluster * self.split)
    }

    /// Whether it can be used for these products: blocks that share a tile have no second one, and
    /// each needs a part of its inner dimension. Every row of tiles reads all columns once more:
    /// with a third nothing is gained.
    pub fn fits(&self, multiprocessors: usize, units: &[Units]) -> bool {
        let suits = |of: &Units| of.down <= 2 && of.depth >= self.split * Tile::DEPTH;
        let few = Units::total(units) <= self.clusters(multiprocessors);
        self.split == 1 || (few && units.iter().all(suits))
    }

    /// Nanoseconds of `tiles` tiles, one after another, whose inner dimensions sum up to `steps`
    /// steps. Tiles taken in turn hide their ends, as far as they are not longer than two
    /// consumers can hide.
    fn nanoseconds(&self, tiles: usize, steps: usize) -> usize {
        let main = steps * self.step;
        let tiles_take = match self.in_turn {
            true => main.max(tiles * self.end / 4) + self.end,
            false => main + tiles * self.end,
        };
        self.start + tiles_take
    }
}

/// The tile that finishes first, and the grid of blocks that stay and take one tile after
/// another. `units` gives what each product is for a tile.
///
/// `tools/fit_tiles.py` fits the times of tiles to the same model: its `work` must agree with `cost`
/// here, its `nanoseconds` and `fits` with those of [`Tile`].
pub(super) fn cheapest<'a>(
    tiles: impl Iterator<Item = &'a Tile>,
    multiprocessors: usize,
    units: impl Fn(&Tile) -> Vec<Units>,
) -> Result<(&'a Tile, [u32; 3])> {
    let clusters = |tile: &Tile| tile.clusters(multiprocessors);
    let count = |tile: &Tile| Units::total(&units(tile));
    let cost = |tile: &&Tile| {
        let rounds = count(tile).div_ceil(clusters(tile));
        let steps = |of: &Units| of.count() * of.depth.div_ceil(Tile::DEPTH).div_ceil(tile.split);
        let all: usize = units(tile).iter().map(steps).sum();
        tile.nanoseconds(rounds, (rounds * all).div_ceil(count(tile).max(1)))
    };
    let fitting = tiles.filter(|tile| tile.fits(multiprocessors, &units(tile)));
    let tile = fitting.min_by_key(cost).ok_or_else(|| Error::device("no tile fits the product"))?;
    let blocks_that_stay = count(tile).min(clusters(tile)) * tile.cluster * tile.split;
    Ok((tile, [blocks(blocks_that_stay, 1)?, 1, 1]))
}
