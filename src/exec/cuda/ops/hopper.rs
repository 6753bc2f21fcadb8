//! The choice of a tile for the matrix products of sm_90, linear layers and convolutions
//! alike: their kernels share one main loop (`kernels/lib/gemm_sm90.cuh`).

use std::fmt;

use crate::exec::cuda::kernels::{Kernels, blocks};
use crate::{Error, Result};

/// What one block computes at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
    /// Blocks of a cluster that take neighbouring rows and share what they load of the columns.
    pub cluster: usize,
    /// Whether the consumers of a block take tiles in turn, one storing while the other
    /// multiplies, instead of sharing each.
    in_turn: bool,
    /// Blocks of a cluster that share the inner dimension of one tile and then end
    /// (`kernels/lib/split_sm90.cuh`); others stay and take one tile after another.
    splits: Option<usize>,
}

impl fmt::Display for Tile {
    /// As in the names of the kernels.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = if self.cluster == 2 { "_pair" } else { "" };
        write!(f, "{}x{}{pair}", self.rows, self.columns)?;
        self.splits.map_or(Ok(()), |splits| write!(f, "_split{splits}"))
    }
}

impl Tile {
    /// Inner dimension of one step of the main loop.
    const DEPTH: usize = 64;

    /// Cycles of the end of a tile: the last products, the epilogue, the stores.
    const END: usize = 4000;

    pub const fn new(rows: usize, columns: usize) -> Tile {
        Tile { rows, columns, cluster: 1, in_turn: false, splits: None }
    }

    /// In clusters of 2.
    pub const fn pair(self) -> Tile {
        Tile { cluster: 2, ..self }
    }

    pub const fn in_turn(self) -> Tile {
        Tile { in_turn: true, ..self }
    }

    pub const fn split(self, splits: usize) -> Tile {
        Tile { splits: Some(splits), ..self }
    }

    pub fn is_split(&self) -> bool {
        self.splits.is_some()
    }

    /// Blocks of a cluster.
    fn blocks(&self) -> usize {
        self.cluster * self.splits.unwrap_or(1)
    }

    /// Cycles of `tiles` tiles, one after another, over an inner dimension of `depth`, about,
    /// where `sharers` tiles of different rows need the same columns. The tensor cores of a
    /// multiprocessor finish 2048 products a cycle, the second-level cache delivers some 56
    /// bytes (many blocks ask for the same at one time), and memory some 24 of what nobody has
    /// asked for before. Tiles taken in turn hide their ends, at the price of some overlap in
    /// the main loop.
    fn cycles(&self, tiles: usize, depth: usize, sharers: usize) -> usize {
        let row = 2 * Self::DEPTH;
        let products = self.rows * self.columns * Self::DEPTH / 2048;
        let cached = row * (self.rows + self.columns / self.cluster) / 56;
        let fresh = row * self.columns / sharers / 24;
        let steps = depth.div_ceil(Self::DEPTH).div_ceil(self.splits.unwrap_or(1));
        let main = tiles * steps * products.max(cached).max(fresh);
        if self.in_turn {
            main * 21 / 20 + Self::END
        } else {
            main + tiles * (Self::END + self.exchange())
        }
    }

    /// Cycles until the blocks that share a tile have met and given each other their sums,
    /// about: some 14 bytes a cycle go from one multiprocessor to others.
    fn exchange(&self) -> usize {
        let sums = 4 * self.rows * self.columns;
        match self.splits {
            None | Some(1) => 0,
            Some(splits) => 1000 + (sums - sums / splits) / 14,
        }
    }
}

/// How much runs at one time where a block takes all of a multiprocessor's shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub multiprocessors: usize,
    /// Clusters of 4 blocks. They do not cross the borders between groups of multiprocessors,
    /// whose sizes differ from one GPU to the next.
    pub clusters_of_4: usize,
}

impl Room {
    pub fn of(kernels: &Kernels) -> Room {
        Room {
            multiprocessors: kernels.multiprocessors as usize,
            clusters_of_4: kernels.clusters_of_4 as usize,
        }
    }

    /// Clusters of so many blocks. Multiprocessors come in pairs.
    fn clusters(&self, blocks: usize) -> usize {
        if blocks <= 2 { self.multiprocessors / blocks } else { self.clusters_of_4 }
    }
}

/// The tile that finishes first, and the grid. `units` counts tiles (pairs of tiles for a
/// cluster of 2), down the rows and along the columns.
pub(super) fn cheapest<'a>(
    tiles: impl Iterator<Item = &'a Tile>,
    room: &Room,
    depth: usize,
    units: impl Fn(&Tile) -> [usize; 2],
) -> Result<(&'a Tile, [u32; 3])> {
    let count = |tile: &Tile| units(tile).iter().product::<usize>();
    let clusters = |tile: &Tile| room.clusters(tile.blocks());
    // Blocks that take one tile only hide nothing of its beginning and end from the next.
    let most = |tile: &Tile| if tile.is_split() { clusters(tile) } else { usize::MAX };
    let fits = |tile: &&Tile| clusters(tile) > 0 && count(tile) <= most(tile);
    let cost = |tile: &&Tile| {
        let sharers = units(tile)[0] * tile.cluster;
        tile.cycles(count(tile).div_ceil(clusters(tile)), depth, sharers)
    };
    let tile = tiles.filter(fits).min_by_key(cost);
    let tile = tile.ok_or_else(|| Error::device("no tile fits the product"))?;
    Ok((tile, [blocks(count(tile).min(clusters(tile)) * tile.blocks(), 1)?, 1, 1]))
}
