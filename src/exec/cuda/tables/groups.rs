//! The work of the attention kernel for sm_90: tiles of three groups of 64 queries.
//!
//! The frames of a history are short at the lower stages, and a tile of one frame alone would be
//! mostly empty. Each sees what the one before it sees and itself, so that what is left over of
//! frames that follow each other shares tiles: the keys of the last are the tile's, cut where
//! those of each group end.

use std::cmp::Reverse;
use std::ops::Range;

use crate::exec::cuda::params::{AttentionSm90Tile, KeyRange};
use crate::graph::Segment;

/// Groups of a tile, queries of a group and keys of a key tile: `kGroups`, 64 and `kKeys` of
/// `kernels/attention_sm90.cu`.
const GROUPS: usize = 3;
pub(in crate::exec::cuda) const QUERIES: usize = 64;
pub(in crate::exec::cuda) const KEYS: usize = 128;

/// A tile that may get further groups.
#[derive(Default)]
struct Tile {
    /// Queries, and how many key tiles from the first on they see.
    groups: Vec<(Range<usize>, usize)>,
    keys: Vec<Range<usize>>,
}

impl Tile {
    fn key_tiles(&self) -> usize {
        self.keys.iter().map(|range| range.len().div_ceil(KEYS)).sum()
    }

    /// Adds a group that sees `keys`, if there is room and they are those of the groups before
    /// and more.
    fn add(&mut self, queries: &Range<usize>, keys: &[Range<usize>]) -> bool {
        let full = self.groups.len() == GROUPS;
        let Some(more) = beyond(&self.keys, keys).filter(|_| !full) else { return false };
        self.keys.extend(more);
        self.groups.push((queries.clone(), self.key_tiles()));
        true
    }

    /// Key tiles that its groups see: what it costs.
    fn cost(&self) -> usize {
        self.groups.iter().map(|(_, key_tiles)| key_tiles).sum()
    }
}

/// What `keys` have beyond `seen`, if they begin with these. Both may be cut into ranges in any way.
fn beyond(seen: &[Range<usize>], keys: &[Range<usize>]) -> Option<Vec<Range<usize>>> {
    let mut rest = keys.to_vec();
    rest.reverse();
    for range in seen {
        let mut missing = range.clone();
        while !missing.is_empty() {
            let mut next = rest.pop()?;
            if next.start != missing.start {
                return None;
            }
            let common = next.len().min(missing.len());
            (missing.start, next.start) = (missing.start + common, next.start + common);
            if !next.is_empty() {
                rest.push(next);
            }
        }
    }
    rest.reverse();
    Some(rest)
}

/// Tiles of all segments, those that cost most first, so that the others fill the gaps at the end.
pub(super) fn tiles(segments: &[Segment]) -> (Vec<AttentionSm90Tile>, Vec<KeyRange>) {
    let mut tiles: Vec<Tile> = Vec::new();
    let mut open = Tile::default();
    for segment in segments {
        let keys: Vec<_> = segment.keys.iter().filter(|range| !range.is_empty()).cloned().collect();
        if keys.is_empty() {
            continue;
        }
        let starts = segment.queries.clone().step_by(QUERIES);
        let groups: Vec<_> = starts.map(|s| s..segment.queries.end.min(s + QUERIES)).collect();
        let whole = groups.chunks_exact(GROUPS);
        let left_over = whole.remainder();
        for groups in whole {
            let mut tile = Tile { groups: Vec::new(), keys: keys.clone() };
            let key_tiles = tile.key_tiles();
            tile.groups = groups.iter().map(|queries| (queries.clone(), key_tiles)).collect();
            tiles.push(tile);
        }
        for queries in left_over {
            if !open.add(queries, &keys) {
                tiles.push(std::mem::take(&mut open));
                open.add(queries, &keys);
            }
        }
    }
    tiles.push(open);
    tiles.retain(|tile| !tile.groups.is_empty());
    tiles.sort_by_key(|tile| (Reverse(tile.cost()), tile.groups[0].0.start));

    let mut ranges = Vec::new();
    let entry = |tile: &Tile| {
        let mut entry = AttentionSm90Tile {
            first_range: ranges.len() as i32,
            ranges: tile.keys.len() as i32,
            ..bytemuck::Zeroable::zeroed()
        };
        for (i, (queries, key_tiles)) in tile.groups.iter().enumerate() {
            entry.query[i] = queries.start as i32;
            entry.queries[i] = queries.len() as i32;
            entry.key_tiles[i] = *key_tiles as i32;
        }
        let range =
            |keys: &Range<usize>| KeyRange { start: keys.start as i32, count: keys.len() as i32 };
        ranges.extend(tile.keys.iter().map(range));
        entry
    };
    let entries = tiles.iter().map(entry).collect();
    (entries, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::{Clip, Geometry};

    /// What each query sees by the tiles, in order.
    fn seen(segments: &[Segment]) -> Vec<(usize, Vec<usize>)> {
        let (tiles, ranges) = tiles(segments);
        let mut found = Vec::new();
        for tile in &tiles {
            let of_tile = &ranges[tile.first_range as usize..][..tile.ranges as usize];
            let key_tiles: Vec<Range<usize>> = of_tile
                .iter()
                .map(|range| range.start as usize..(range.start + range.count) as usize)
                .flat_map(|keys| keys.clone().step_by(KEYS).map(move |s| s..keys.end.min(s + KEYS)))
                .collect();
            for g in 0..GROUPS {
                let keys: Vec<usize> =
                    key_tiles[..tile.key_tiles[g] as usize].iter().cloned().flatten().collect();
                let queries = tile.query[g] as usize..(tile.query[g] + tile.queries[g]) as usize;
                assert_eq!(queries.is_empty(), keys.is_empty());
                found.extend(queries.map(|query| (query, keys.clone())));
            }
        }
        found.sort();
        found
    }

    fn wanted(segments: &[Segment]) -> Vec<(usize, Vec<usize>)> {
        let of = |segment: &Segment| {
            let keys: Vec<usize> = segment.keys.iter().cloned().flatten().collect();
            segment.queries.clone().map(|query| (query, keys.clone())).collect::<Vec<_>>()
        };
        let mut all: Vec<_> = segments.iter().flat_map(of).filter(|(_, k)| !k.is_empty()).collect();
        all.sort();
        all
    }

    fn history(frames: usize, height: usize, width: usize) -> Geometry {
        let clip = |frames| Clip { frames, height, width };
        Geometry {
            text_tokens: vec![57, 129],
            history: vec![clip(frames), clip(1)],
            current: clip(1),
            separate_latents: false,
        }
    }

    #[test]
    fn every_query_sees_its_keys_once_and_in_order() {
        for (frames, height, width) in [(1, 2, 2), (13, 12, 20), (4, 24, 40), (5, 16, 24)] {
            let segments = history(frames, height, width).attention();
            assert_eq!(seen(&segments), wanted(&segments), "{frames} frames {height}x{width}");
        }
        let segments = [
            Segment { queries: 0..5, keys: vec![0..5, 9..9, 20..30] },
            Segment { queries: 40..300, keys: vec![0..5, 30..60] },
            Segment { queries: 300..301, keys: vec![0..5, 30..60, 61..200] },
            Segment { queries: 301..310, keys: vec![] },
            Segment { queries: 310..320, keys: vec![1..5, 30..60] },
        ];
        assert_eq!(seen(&segments), wanted(&segments));
    }

    #[test]
    fn short_frames_share_tiles() {
        // 60 tokens a frame: text and 14 frames of two samples are 33 groups, of 11 tiles in two
        // runs, and the current frames follow their histories' last tiles where there is room.
        let count = |geometry: &Geometry| tiles(&geometry.attention()).0.len();
        let geometry = history(13, 12, 20);
        let alone = geometry.attention().len();
        assert!(3 * count(&geometry) <= alone + 9, "{} of {alone}", count(&geometry));
        // 960 tokens fill five tiles of their own.
        let geometry = Geometry { text_tokens: vec![1], ..history(1, 48, 80) };
        assert_eq!(count(&geometry), 1 + 3 * 5);
    }

    #[test]
    fn what_is_beyond() {
        assert_eq!(beyond(&[], &[0..1, 5..8]), Some(vec![0..1, 5..8]));
        assert_eq!(beyond(&[0..3, 5..8], &[0..3, 5..8]), Some(vec![]));
        assert_eq!(beyond(&[0..3, 5..6, 6..8], &[0..3, 5..9, 20..22]), Some(vec![8..9, 20..22]));
        assert_eq!(beyond(&[0..3, 5..8], &[0..3, 5..7]), None);
        assert_eq!(beyond(&[0..3, 5..8], &[0..3, 4..9]), None);
        assert_eq!(beyond(&[0..3, 5..8], &[0..4, 5..9]), None);
    }
}
