//! The published tiling: overlapping tiles, each encoded or decoded by itself, blended over
//! a quarter of their side.

use std::collections::BTreeMap;

use super::Tiling;
use crate::Result;
use crate::models::vae::FACTOR;
use crate::sampler::Latent;

/// A video or latents on the host: `[frames, height, width, channels]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Volume {
    /// Number of frames.
    pub frames: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Values per pixel.
    pub channels: usize,
    /// The values, channels last.
    pub data: Vec<f32>,
}

impl Volume {
    /// Zeros.
    pub fn zeros(frames: usize, height: usize, width: usize, channels: usize) -> Volume {
        let data = vec![0.0; frames * height * width * channels];
        Volume { frames, height, width, channels, data }
    }

    /// A latent.
    pub fn of_latent(latent: &Latent) -> Volume {
        let shape = latent.shape();
        Volume {
            frames: shape.frames,
            height: shape.height,
            width: shape.width,
            channels: crate::sampler::CHANNELS,
            data: latent.data().to_vec(),
        }
    }

    /// Adds frames of the same extent at the end; an empty volume takes on their extent.
    pub(super) fn append(&mut self, more: &Volume) {
        (self.height, self.width, self.channels) = (more.height, more.width, more.channels);
        self.frames += more.frames;
        self.data.extend_from_slice(&more.data);
    }

    fn row(&self, frame: usize, y: usize, x: usize, pixels: usize) -> &[f32] {
        let start = ((frame * self.height + y) * self.width + x) * self.channels;
        &self.data[start..start + pixels * self.channels]
    }

    fn row_mut(&mut self, frame: usize, y: usize, x: usize, pixels: usize) -> &mut [f32] {
        let start = ((frame * self.height + y) * self.width + x) * self.channels;
        &mut self.data[start..start + pixels * self.channels]
    }

    /// The rectangle of `height` × `width` pixels at (`y`, `x`) of every frame.
    pub(super) fn crop(&self, y: usize, x: usize, height: usize, width: usize) -> Volume {
        let mut out = Volume::zeros(self.frames, height, width, self.channels);
        for frame in 0..self.frames {
            for row in 0..height {
                let source = self.row(frame, y + row, x, width);
                out.row_mut(frame, row, 0, width).copy_from_slice(source);
            }
        }
        out
    }

    /// Copies the top-left `height` × `width` of `tile` to (`y`, `x`).
    fn paste(&mut self, tile: &Volume, y: usize, x: usize, height: usize, width: usize) {
        for frame in 0..self.frames {
            for row in 0..height {
                let source = tile.row(frame, row, 0, width);
                self.row_mut(frame, y + row, x, width).copy_from_slice(source);
            }
        }
    }

    /// Blends the first rows with the last rows of the tile above.
    fn blend_below(&mut self, above: &Volume, most: usize) {
        let extent = most.min(above.height).min(self.height);
        let width = self.width.min(above.width);
        for frame in 0..self.frames {
            for y in 0..extent {
                let weight = y as f32 / extent as f32;
                let other = above.row(frame, above.height - extent + y, 0, width);
                mix(self.row_mut(frame, y, 0, width), other, weight);
            }
        }
    }

    /// Blends the first columns with the last columns of the tile to the left.
    fn blend_right_of(&mut self, left: &Volume, most: usize) {
        let extent = most.min(left.width).min(self.width);
        for frame in 0..self.frames {
            for y in 0..self.height.min(left.height) {
                for x in 0..extent {
                    let weight = x as f32 / extent as f32;
                    let other = left.row(frame, y, left.width - extent + x, 1);
                    mix(self.row_mut(frame, y, x, 1), other, weight);
                }
            }
        }
    }
}

/// `own ← other · (1 − weight) + own · weight`.
fn mix(own: &mut [f32], other: &[f32], weight: f32) {
    for (own, other) in own.iter_mut().zip(other) {
        *own = other * (1.0 - weight) + *own * weight;
    }
}

/// Tiles of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileSize {
    /// Height and width.
    pub extent: [usize; 2],
    /// How many there are.
    pub count: usize,
}

/// Where tiles lie, in pixels of the input, and what they contribute to the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileGrid {
    /// Height and width of the input.
    extent: [usize; 2],
    /// Side of a tile in the input.
    tile: usize,
    /// Output pixels per input pixel, as a fraction.
    scale: (usize, usize),
}

impl TileGrid {
    /// Tiles over latents of `height` × `width`.
    pub fn decoding(height: usize, width: usize, tiling: Tiling) -> TileGrid {
        TileGrid { extent: [height, width], tile: tiling.tile / FACTOR, scale: (FACTOR, 1) }
    }

    /// Tiles over pixels of `height` × `width`.
    pub fn encoding(height: usize, width: usize, tiling: Tiling) -> TileGrid {
        TileGrid { extent: [height, width], tile: tiling.tile, scale: (1, FACTOR) }
    }

    /// The only tile over latents of `extent`, or those of `tiling`.
    pub fn over_latents(extent: [usize; 2], tiling: Option<Tiling>) -> Vec<TileSize> {
        let grid = |tiling| TileGrid::decoding(extent[0], extent[1], tiling);
        tiling.map_or_else(|| vec![TileSize { extent, count: 1 }], |tiling| grid(tiling).sizes())
    }

    /// The only tile over pixels of `extent`, or those of `tiling`.
    pub fn over_pixels(extent: [usize; 2], tiling: Option<Tiling>) -> Vec<TileSize> {
        let grid = |tiling| TileGrid::encoding(extent[0], extent[1], tiling);
        tiling.map_or_else(|| vec![TileSize { extent, count: 1 }], |tiling| grid(tiling).sizes())
    }

    /// The sizes that tiles have in the input, the largest last.
    fn sizes(&self) -> Vec<TileSize> {
        let mut counts: BTreeMap<[usize; 2], usize> = BTreeMap::new();
        for y in self.starts(0) {
            for x in self.starts(1) {
                let size = [(y, 0), (x, 1)].map(|(at, i)| self.tile.min(self.extent[i] - at));
                *counts.entry(size).or_default() += 1;
            }
        }
        counts.into_iter().map(|(extent, count)| TileSize { extent, count }).collect()
    }

    fn starts(&self, axis: usize) -> Vec<usize> {
        (0..self.extent[axis]).step_by(self.tile * 3 / 4).collect()
    }

    fn scaled(&self, pixels: usize) -> usize {
        pixels * self.scale.0 / self.scale.1
    }
}

/// Runs `compute(y, x, height, width)` for every tile and puts the results together.
pub(super) fn assemble(
    grid: &TileGrid,
    mut compute: impl FnMut(usize, usize, usize, usize) -> Result<Volume>,
) -> Result<Volume> {
    let blend = grid.scaled(grid.tile) / 4;
    let keep = grid.scaled(grid.tile) - blend;
    let [out_height, out_width] = grid.extent.map(|e| grid.scaled(e));
    let mut out = Volume::default();
    let mut above: Vec<Volume> = Vec::new();
    for (i, y) in grid.starts(0).into_iter().enumerate() {
        let mut row: Vec<Volume> = Vec::new();
        for (j, x) in grid.starts(1).into_iter().enumerate() {
            let height = grid.tile.min(grid.extent[0] - y);
            let width = grid.tile.min(grid.extent[1] - x);
            let mut tile = compute(y, x, height, width)?;
            if let Some(above) = above.get(j) {
                tile.blend_below(above, blend);
            }
            if let Some(left) = row.last() {
                tile.blend_right_of(left, blend);
            }
            if out.data.is_empty() {
                out = Volume::zeros(tile.frames, out_height, out_width, tile.channels);
            }
            let (top, side) = (i * keep, j * keep);
            let height = keep.min(tile.height).min(out_height - top);
            let width = keep.min(tile.width).min(out_width - side);
            out.paste(&tile, top, side, height, width);
            row.push(tile);
        }
        above = row;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::{TileGrid, TileSize, Volume, assemble};
    use crate::pipeline::Tiling;

    #[test]
    fn sizes_of_tiles() {
        let of = |tiling| TileGrid::over_latents([96, 160], tiling);
        let told = |sizes: Vec<TileSize>| -> Vec<_> {
            sizes.into_iter().map(|s| (s.extent, s.count)).collect()
        };
        assert_eq!(told(of(None)), [([96, 160], 1)]);
        // Every 24 latents a tile of 32, cut at the edges.
        let cut = [([24, 16], 1), ([24, 32], 6), ([32, 16], 3), ([32, 32], 18)];
        assert_eq!(told(of(Some(Tiling { tile: 256 }))), cut);
    }

    #[test]
    fn tiles_of_the_identity_give_it_back() {
        // Encoding with no change of size: blending equal values changes nothing, and every
        // output pixel must be covered, edge tiles smaller than the blend included.
        for (height, width) in [(32, 32), (33, 70), (95, 24), (7, 130)] {
            let mut source = Volume::zeros(2, height, width, 3);
            source.data.iter_mut().enumerate().for_each(|(i, v)| *v = i as f32 + 1.0);
            let grid = TileGrid {
                scale: (1, 1),
                ..TileGrid::encoding(height, width, Tiling { tile: 32 })
            };
            let out = assemble(&grid, |y, x, h, w| Ok(source.crop(y, x, h, w))).expect("tiles");
            let close = out.data.iter().zip(&source.data).all(|(a, b)| (a - b).abs() < 1e-2);
            assert!(close && out.data.len() == source.data.len(), "{height}x{width}");
        }
    }
}
