//! Small tables that attention kernels read: which queries see which keys, and T5's bias
//! expanded to one value per head and distance.

pub(super) mod groups;

use std::collections::HashMap;
use std::sync::Arc;

use super::driver::{Address, Context, DeviceMemory};
use super::kernels::Kernels;
use super::memory::Spare;
use super::ops::attention::Variant;
use super::params::{AttentionTile, KeyRange};
use super::upload::Uploader;
use super::weights::DeviceWeights;
use crate::Result;
use crate::graph::{AttentionSpec, Graph, Op, Plan, Segment};

/// Where the tables of one attention node lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionTables {
    pub variant: Variant,
    pub tiles: Address,
    pub tile_count: usize,
    pub ranges: Address,
    /// Zero where there is no bias.
    pub bias: Address,
    /// Values of the bias of one head: of the distances `-(n−1) ..= n−1`.
    pub bias_span: usize,
}

/// Least bytes of a graph's tables: they grow with the history, and memory that grows is waited for.
const LEAST: usize = 1 << 20;

/// The tables of a graph on the device.
pub(super) struct Tables {
    memory: DeviceMemory,
    by_node: HashMap<usize, AttentionTables>,
}

impl Tables {
    /// Makes and uploads the tables of all attention nodes; nodes with the same segments
    /// share theirs. Memory is taken from `spare`.
    pub fn new(
        graph: &Graph,
        kernels: &Kernels,
        weights: &DeviceWeights,
        context: &Arc<Context>,
        spare: &mut Spare,
        uploader: &mut Uploader,
    ) -> Result<Tables> {
        let mut bytes = Vec::new();
        let mut by_node = HashMap::new();
        let mut shared: HashMap<_, AttentionTables> = HashMap::new();
        for (index, node) in graph.nodes().iter().enumerate() {
            let Op::Attention(spec) = &node.op else { continue };
            let size = graph.tensor(node.inputs[0]).cols() / spec.heads;
            let variant = Variant::choose(kernels, spec, size)?;
            let bias_weight = spec.relative_bias.map(|b| b.table);
            let key = (Arc::as_ptr(&spec.segments).cast::<Segment>(), variant, bias_weight);
            let tables = match shared.get(&key) {
                Some(tables) => *tables,
                None => {
                    let tables = append(&mut bytes, graph, weights, spec, variant)?;
                    shared.insert(key, tables);
                    tables
                }
            };
            by_node.insert(index, tables);
        }
        let needed = if bytes.is_empty() { 0 } else { bytes.len().max(LEAST) };
        let memory = spare.take(context, needed, needed.next_power_of_two(), "attention tables")?;
        uploader.bring(&bytes, memory.address())?;
        for tables in by_node.values_mut() {
            tables.tiles += memory.address();
            tables.ranges += memory.address();
            if tables.bias_span > 0 {
                tables.bias += memory.address();
            }
        }
        Ok(Tables { memory, by_node })
    }

    /// What they lie in, for others.
    pub fn into_memory(self) -> DeviceMemory {
        self.memory
    }

    /// The tables of the attention node `index`.
    pub fn attention(&self, index: usize) -> Option<&AttentionTables> {
        self.by_node.get(&index)
    }
}

/// Appends the tables of one node to `bytes`; the addresses are still offsets.
fn append(
    bytes: &mut Vec<u8>,
    graph: &Graph,
    weights: &DeviceWeights,
    spec: &AttentionSpec,
    variant: Variant,
) -> Result<AttentionTables> {
    let (tiles, tile_count, ranges) = match variant.queries() {
        None => {
            let (tiles, ranges) = groups::tiles(&spec.segments);
            (bytemuck::cast_slice(&tiles).to_vec(), tiles.len(), ranges)
        }
        Some(queries) => {
            let (tiles, ranges) = tiles(&spec.segments, queries);
            (bytemuck::cast_slice(&tiles).to_vec(), tiles.len(), ranges)
        }
    };
    let (bias, bias_span) = match spec.relative_bias {
        Some(relative) => {
            let view = weights.host(&graph.weights()[relative.table.index()].name)?;
            expand_bias(spec, |distance, head| {
                let mut value = [0.0];
                view.widen(relative.bucket(distance) * spec.heads + head, &mut value);
                value[0]
            })
        }
        None => (Vec::new(), 0),
    };
    let mut push = |data: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(Plan::ALIGNMENT as usize), 0);
        let offset = bytes.len() as Address;
        bytes.extend_from_slice(data);
        offset
    };
    Ok(AttentionTables {
        variant,
        tiles: push(&tiles),
        tile_count,
        ranges: push(bytemuck::cast_slice(&ranges)),
        bias: if bias.is_empty() { 0 } else { push(bytemuck::cast_slice(&bias)) },
        bias_span,
    })
}

/// A multiple of what a warp does: pieces of whole groups leave none of them with little to do.
const GROUP: usize = 64;

/// Pieces of up to `queries` queries, of nearly the same size within a segment, those with the
/// most keys first: blocks start in this order, so the short ones fill the gaps at the end.
fn tiles(segments: &[Segment], queries: usize) -> (Vec<AttentionTile>, Vec<KeyRange>) {
    let mut tiles = Vec::new();
    let mut ranges: Vec<KeyRange> = Vec::new();
    for segment in segments {
        let first_range = ranges.len() as i32;
        ranges.extend(
            segment
                .keys
                .iter()
                .filter(|r| !r.is_empty())
                .map(|r| KeyRange { start: r.start as i32, count: r.len() as i32 }),
        );
        let count = ranges.len() as i32 - first_range;
        let keys: usize = segment.keys.iter().map(ExactSizeIterator::len).sum();
        let pieces = segment.queries.len().div_ceil(queries).max(1);
        let size = segment.queries.len().div_ceil(pieces).next_multiple_of(GROUP);
        for start in segment.queries.clone().step_by(size.clamp(1, queries)) {
            tiles.push(AttentionTile {
                query: start as i32,
                queries: size.min(segment.queries.end - start) as i32,
                position: (start - segment.queries.start) as i32,
                first_range,
                ranges: count,
                keys: keys as i32,
                pad: [0; 2],
            });
        }
    }
    tiles.sort_by_key(|t| (std::cmp::Reverse(t.keys), t.query));
    (tiles, ranges)
}

/// `[head][distance]` with distances `-(n−1) ..= n−1`, `n` being the longest segment's
/// number of queries or keys.
fn expand_bias(spec: &AttentionSpec, value: impl Fn(i64, usize) -> f32) -> (Vec<f32>, usize) {
    let longest = spec
        .segments
        .iter()
        .map(|s| s.queries.len().max(s.keys.iter().map(ExactSizeIterator::len).sum()));
    let n = longest.max().unwrap_or(1).max(1) as i64;
    let heads = 0..spec.heads;
    let values = heads.flat_map(|head| (1 - n..n).map(move |d| (d, head)));
    (values.map(|(d, head)| value(d, head)).collect(), 2 * n as usize - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_query_once_longest_first() {
        let segments = [
            Segment { queries: 0..5, keys: vec![0..5, 9..9, 20..30] },
            Segment { queries: 40..177, keys: vec![0..5, 30..60] },
        ];
        let (tiles, ranges) = tiles(&segments, 64);
        assert_eq!(ranges.len(), 4);
        let spans: Vec<_> = tiles
            .iter()
            .map(|t| (t.query, t.queries, t.position, t.first_range, t.ranges))
            .collect();
        let second = [(40, 64, 0, 2, 2), (104, 64, 64, 2, 2), (168, 9, 128, 2, 2)];
        assert_eq!(spans[..3], second);
        assert_eq!(spans[3], (0, 5, 0, 0, 2));
        assert_eq!((tiles[0].keys, tiles[3].keys), (35, 15));
    }
}
