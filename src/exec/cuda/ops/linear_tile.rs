//! Linear layers in one tile, whatever suits them best: for measurements, to which the times that
//! the choice goes by are fitted (`tools/fit_tiles.py`).

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::hopper::Tile;
use super::linear::{HOPPER_TILES, HOPPER_TILES_F32, kernel_of};

/// A tile of the kernels that compute linear layers on GPUs of compute capability 9.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearTile(Tile);

/// A kernel with its tile, as files of measurements have it.
#[derive(Serialize)]
struct Described {
    kernel: String,
    f32_out: bool,
    #[serde(flatten)]
    tile: Tile,
}

impl LinearTile {
    /// Every tile: those for results in bf16, then those that only results in f32 have.
    pub fn all() -> Vec<LinearTile> {
        let bf16 = HOPPER_TILES.map(LinearTile);
        let f32 = HOPPER_TILES_F32.map(LinearTile);
        let has = |tile: &LinearTile| bf16.iter().any(|other| other.name() == tile.name());
        bf16.into_iter().chain(f32.into_iter().filter(|tile| !has(tile))).collect()
    }

    /// Every kernel with its tile and the nanoseconds that the choice goes by, in the order in
    /// which equals are preferred.
    pub fn kernels() -> impl Serialize {
        let of = |f32_out| {
            move |tile: Tile| Described { kernel: kernel_of(&tile, f32_out), f32_out, tile }
        };
        let bf16 = HOPPER_TILES.into_iter().map(of(false));
        bf16.chain(HOPPER_TILES_F32.into_iter().map(of(true))).collect::<Vec<_>>()
    }

    /// This tile of `tiles`, or all of them where it is none of them.
    pub(super) fn among(self, tiles: &[Tile]) -> &[Tile] {
        let found = tiles.iter().find(|tile| tile.to_string() == self.name());
        found.map_or(tiles, std::slice::from_ref)
    }

    fn name(&self) -> String {
        self.0.to_string()
    }
}

impl fmt::Display for LinearTile {
    /// As in the names of the kernels: `128x128_pair`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LinearTile {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = Self::all();
        let found = all.iter().find(|tile| tile.name() == name);
        found.copied().ok_or_else(|| {
            let names: Vec<_> = all.iter().map(LinearTile::name).collect();
            format!("no tile {name:?}: {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn tile(name: &str) -> LinearTile {
        name.parse().expect("the name of a tile")
    }

    #[test]
    fn tiles_go_by_the_names_of_their_kernels() {
        let names: Vec<_> = LinearTile::all().iter().map(LinearTile::to_string).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        for (parsed, name) in LinearTile::all().iter().zip(&names) {
            assert_eq!(name.parse(), Ok(*parsed));
        }
        for unknown in ["", "all", "64", "64x64_pair", "gemm_sm90_64x64", "64x64 "] {
            let refused = unknown.parse::<LinearTile>().expect_err(unknown);
            assert_eq!(refused, format!("no tile {unknown:?}: {}", names.join(", ")));
        }
    }

    #[test]
    fn a_forced_tile_leaves_lists_without_it_alone() {
        let among = |name, tiles: &[Tile]| -> Vec<String> {
            tile(name).among(tiles).iter().map(Tile::to_string).collect()
        };
        let names = |tiles: &[Tile]| -> Vec<String> { tiles.iter().map(Tile::to_string).collect() };
        assert_eq!(among("64x64", &HOPPER_TILES), ["64x64"]);
        assert_eq!(among("64x64", &HOPPER_TILES_F32), names(&HOPPER_TILES_F32));
        assert_eq!(among("128x128", &HOPPER_TILES), names(&HOPPER_TILES));
        assert_eq!(among("128x128", &HOPPER_TILES_F32), ["128x128"]);
        assert_eq!(among("128x64", &HOPPER_TILES), ["128x64"]);
        assert_eq!(among("128x64", &HOPPER_TILES_F32), ["128x64"]);
    }

    /// What `tools/fit_tiles.py` reads.
    #[test]
    fn kernels_are_described_with_their_times() {
        let described = serde_json::to_value(LinearTile::kernels()).expect("plain values");
        let described = described.as_array().expect("a list");
        assert_eq!(described.len(), HOPPER_TILES.len() + HOPPER_TILES_F32.len());
        let pair = &described[0];
        assert_eq!(pair["kernel"], "gemm_sm90_128x128_pair");
        assert_eq!(pair["f32_out"], false);
        for (field, value) in [
            ("rows", HOPPER_TILES[0].rows),
            ("columns", HOPPER_TILES[0].columns),
            ("cluster", HOPPER_TILES[0].cluster),
            ("start", HOPPER_TILES[0].start),
            ("step", HOPPER_TILES[0].step),
            ("end", HOPPER_TILES[0].end),
        ] {
            assert_eq!(pair[field], value, "{field}");
        }
        assert_eq!(pair["in_turn"], true);
        assert_eq!(described[HOPPER_TILES.len()]["kernel"], "gemm_sm90_128x128_f32");
    }
}
