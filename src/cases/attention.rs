//! Attention: packed block-causal segments as the transformers make them, text encoders, the
//! VAE's one wide head, and tails of queries and keys.

use std::sync::Arc;

use super::linear::{FRAMED, place_within};
use super::{Case, Fill, Scale};
use crate::Result;
use crate::graph::{AttentionSpec, Graph, Op, RelativeBias, Segment};
use crate::models::dit::{Clip, Geometry, HEAD_SIZE};
use crate::sampler::history;
use crate::sampler::{LatentShape, STAGES};
use crate::tensor::DType;

/// Where queries, keys and values lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// Columns of one tensor `qkv`.
    Packed,
    /// `q` alone, keys and values columns of one tensor: the last blocks.
    LastBlock,
    /// Three tensors.
    Separate,
    /// As packed, and the result goes to columns of a wider tensor.
    IntoColumns,
}

#[derive(Debug, Clone)]
struct Attention {
    heads: usize,
    size: usize,
    queries: usize,
    keys: usize,
    segments: Arc<[Segment]>,
    layout: Layout,
    scale: f32,
    causal: bool,
    relative: bool,
}

/// Buckets and largest distance of T5.
const RELATIVE: (usize, usize) = (32, 128);

impl Attention {
    fn new(heads: usize, size: usize, segments: Arc<[Segment]>) -> Attention {
        let queries = segments.iter().map(|s| s.queries.end).max().unwrap_or(0);
        let ends = segments.iter().flat_map(|s| s.keys.iter().map(|r| r.end));
        let keys = ends.max().unwrap_or(0);
        Attention {
            heads,
            size,
            queries,
            keys,
            segments,
            layout: if queries == keys { Layout::Packed } else { Layout::LastBlock },
            scale: 1.0 / (size as f32).sqrt(),
            causal: false,
            relative: false,
        }
    }

    /// All queries see all keys.
    fn full(heads: usize, size: usize, queries: usize, keys: usize) -> Attention {
        let keys = std::iter::once(0..keys).collect();
        Attention::new(heads, size, [Segment { queries: 0..queries, keys }].into())
    }

    fn causal(heads: usize, size: usize, tokens: usize) -> Attention {
        Attention { causal: true, ..Attention::full(heads, size, tokens, tokens) }
    }

    fn t5(heads: usize, size: usize, tokens: usize) -> Attention {
        let full = Attention::full(heads, size, tokens, tokens);
        Attention { relative: true, scale: 1.0, ..full }
    }

    /// The VAE's: one head over the pixels of each frame.
    fn frames(size: usize, frames: usize, pixels: usize) -> Attention {
        let frame = |f| f * pixels..(f + 1) * pixels;
        let segment = |f| Segment { queries: frame(f), keys: vec![frame(f)] };
        Attention::new(1, size, (0..frames).map(segment).collect())
    }

    fn with(self, layout: Layout) -> Attention {
        Attention { layout, ..self }
    }

    fn record(&self, g: &mut Graph, dtype: DType) -> Result<()> {
        let d = self.heads * self.size;
        let [q, k, v] = match self.layout {
            Layout::Packed | Layout::IntoColumns => {
                let qkv = g.input("qkv", &[self.queries.max(self.keys), 3 * d], dtype);
                [0, d, 2 * d].map(|column| g.cols(qkv, column..column + d))
            }
            Layout::LastBlock => {
                let q = g.input("q", &[self.queries, d], dtype);
                let kv = g.input("kv", &[self.keys, 2 * d], dtype);
                [q, g.cols(kv, 0..d), g.cols(kv, d..2 * d)]
            }
            Layout::Separate => [("q", self.queries), ("k", self.keys), ("v", self.keys)]
                .map(|(name, rows)| g.input(name, &[rows, d], dtype)),
        };
        let relative_bias = self.relative.then(|| RelativeBias {
            table: g.weight("relative", &[RELATIVE.0, self.heads]),
            buckets: RELATIVE.0,
            max_distance: RELATIVE.1,
        });
        let spec = AttentionSpec {
            heads: self.heads,
            scale: self.scale,
            segments: self.segments.clone(),
            causal: self.causal,
            relative_bias,
        };
        let rows = g.tensor(q).rows();
        let place = match self.layout {
            Layout::IntoColumns => place_within(g, "around", [rows, d], dtype),
            _ => g.empty(&[rows, d], dtype),
        };
        g.mark_output("y", place);
        g.push_into(Op::Attention(spec), &[q, k, v], place)
    }

    fn case(self, name: impl std::fmt::Display) -> Case {
        let outputs: &[&str] = if self.layout == Layout::IntoColumns { &FRAMED } else { &["y"] };
        let name = format!("{name}-h{}x{}", self.heads, self.size);
        Case::new("attention", name, move |g, dtype| self.record(g, dtype))
            .outputs(outputs)
            .fill("relative", Fill::Normal(1.0))
    }
}

/// What stage `stage` sees at full latent size `height × width` after `frames` finished
/// latent frames.
fn geometry(text: &[usize], frames: usize, stage: usize, [height, width]: [usize; 2]) -> Geometry {
    let full = LatentShape { frames: 1, height, width };
    let clip = |frames, level| {
        let shape = history::level_shape(full, level);
        Clip { frames, height: shape.height, width: shape.width }
    };
    let clips = history::clips(frames, stage);
    Geometry {
        text_tokens: text.to_vec(),
        history: clips.into_iter().map(|c| clip(c.frames.len(), c.level)).collect(),
        current: clip(1, stage),
        separate_latents: false,
    }
}

/// A block of the transformers, named by its extents.
fn packed(text: &[usize], frames: usize, stage: usize, size: [usize; 2], heads: usize) -> Case {
    let text_name: Vec<_> = text.iter().map(usize::to_string).collect();
    let [height, width] = size;
    let name =
        format!("packed/text{}-history{frames}-stage{stage}-{height}x{width}", text_name.join("+"));
    let segments = geometry(text, frames, stage, size).attention();
    Attention::new(heads, HEAD_SIZE, segments).case(name)
}

/// The last block: only the current frame asks.
fn last_block(text: &[usize], frames: usize, size: [usize; 2], heads: usize) -> Case {
    let geometry = geometry(text, frames, STAGES - 1, size);
    let segments = geometry.current_attention(geometry.current_rows().start);
    let name = format!("last-block/history{frames}-{}x{}", size[0], size[1]);
    Attention::new(heads, HEAD_SIZE, segments).with(Layout::LastBlock).case(name)
}

pub(super) fn cases(scale: Scale) -> Vec<Case> {
    match scale {
        Scale::Small => small(),
        Scale::Test => test(),
        Scale::Bench => bench(),
    }
}

fn small() -> Vec<Case> {
    let size = [16, 24];
    let into_columns = Attention::new(2, 64, geometry(&[3, 5], 1, 1, size).attention());
    vec![
        packed(&[1, 17], 3, 2, size, 2),
        packed(&[2, 7], 0, 0, size, 1),
        last_block(&[3, 5], 3, size, 2),
        into_columns.with(Layout::IntoColumns).case("into-columns"),
        Attention::full(2, 16, 5, 3).case("full/q5-k3"),
        Attention::full(1, 64, 70, 1).case("full/q70-k1"),
        Attention::full(1, 64, 3, 133).case("full/q3-k133"),
        Attention::causal(2, 64, 17).case("causal/n17"),
        Attention::causal(2, 16, 9).case("causal/n9"),
        Attention::t5(2, 64, 17).case("t5/n17"),
        Attention::t5(2, 16, 9).case("t5/n9"),
        Attention::frames(32, 2, 35).case("frames/2x35"),
        Attention::frames(40, 2, 35).case("frames/2x35"),
        Attention::frames(512, 2, 20).case("frames/2x20"),
    ]
}

fn test() -> Vec<Case> {
    let size = [16, 24];
    let mut cases = Vec::new();
    for text in [[1, 1], [2, 1], [17, 127], [127, 128], [128, 2]] {
        cases.extend([0, 1, 3, 31].map(|frames| packed(&text, frames, 2, size, 2)));
    }
    for heads in [1, 3, 4, 12, 20, 24, 30, 64] {
        cases.push(packed(&[17, 30], 3, 2, size, heads));
    }
    for stage in [0, 1] {
        cases.extend([0, 1, 3].map(|frames| packed(&[9, 33], frames, stage, size, 2)));
    }
    cases.push(packed(&[17], 3, 2, size, 4));
    cases.push(packed(&[5, 1, 40], 3, 2, size, 4));
    cases.push(packed(&[30, 110], 5, 2, [48, 80], 4));
    cases.extend([0, 1, 31].map(|frames| last_block(&[17, 30], frames, size, 24)));
    for heads in [2, 30] {
        let segments = geometry(&[17, 30], 3, 2, size).attention();
        let attention = Attention::new(heads, HEAD_SIZE, segments);
        cases.push(attention.with(Layout::IntoColumns).case("into-columns"));
    }
    for head_size in [16, 64] {
        for (queries, keys) in [
            (1, 1),
            (1, 200),
            (2, 17),
            (63, 65),
            (64, 64),
            (65, 63),
            (70, 1),
            (127, 129),
            (129, 15),
            (128, 128),
            (200, 16),
            (33, 257),
        ] {
            let name = format!("full/q{queries}-k{keys}");
            cases.push(Attention::full(6, head_size, queries, keys).case(name));
        }
        for tokens in [1, 2, 17, 63, 64, 65, 77, 130] {
            cases.push(Attention::causal(4, head_size, tokens).case(format!("causal/n{tokens}")));
        }
        for tokens in [1, 2, 17, 63, 65, 127, 128, 300] {
            cases.push(Attention::t5(4, head_size, tokens).case(format!("t5/n{tokens}")));
        }
    }
    cases.extend([12, 20].map(|heads| Attention::causal(heads, 64, 77).case("clip/n77")));
    cases.push(Attention::t5(64, 64, 128).case("t5/n128"));
    for head_size in [32, 40, 512] {
        for (frames, pixels) in [(1, 1), (1, 64), (2, 35), (3, 130), (1, 561)] {
            let name = format!("frames/{frames}x{pixels}");
            cases.push(Attention::frames(head_size, frames, pixels).case(name));
        }
    }
    cases.extend(structured());
    cases
}

fn structured() -> Vec<Case> {
    let separate = |name: &str| Attention::full(3, 64, 65, 129).with(Layout::Separate).case(name);
    let one_hot = Attention { scale: 90.0, ..Attention::full(1, 64, 64, 64) };
    let packed_segments = || Attention::new(2, 64, geometry(&[9, 20], 3, 2, [16, 24]).attention());
    // Row 4 is text of the first sample, seen by all that belongs to it; columns of q, k, v.
    let nan = |column: usize| Fill::Normal(1.0).with_nan(4 * 3 * 128 + column);
    let causal_nan = Fill::Normal(1.0).with_nan(40 * 3 * 256 + 256 + 65);
    vec![
        // Equal scores: the mean of the values.
        separate("equal-scores").fill("q", Fill::Constant(0.0)),
        separate("values-of-one").fill("v", Fill::Constant(1.0)),
        separate("values-by-row").fill("v", Fill::ConstantRows),
        separate("sharp").fill("q", Fill::Normal(8.0)),
        // Scores far beyond what an exponential without its maximum could take. Almost every
        // query sees one value, so that rounding costs next to nothing: one is allowed.
        separate("huge-scores")
            .fill("q", Fill::Normal(100.0))
            .fill("k", Fill::Normal(10.0))
            .floor(2f64.powi(-9)),
        // The largest score comes last, then first.
        separate("rising").fill("q", Fill::Constant(1.0)).fill("k", rising(129, 192, 1.0)),
        separate("falling").fill("q", Fill::Constant(1.0)).fill("k", rising(129, 192, -1.0)),
        // Each query sees its own value and nothing else.
        one_hot
            .with(Layout::Separate)
            .case("one-hot")
            .fill("q", Fill::Identity)
            .fill("k", Fill::Identity),
        packed_segments().case("nan-in-q").fill("qkv", nan(3)),
        packed_segments().case("nan-in-k").fill("qkv", nan(128 + 64)),
        packed_segments().case("nan-in-v").fill("qkv", nan(256 + 127)),
        Attention::causal(4, 64, 77).case("causal-nan-in-k").fill("qkv", causal_nan),
        Attention::t5(4, 64, 77).case("t5-nan-in-q").fill("qkv", Fill::Normal(1.0).with_nan(65)),
        Attention::frames(40, 2, 65)
            .case("frames-nan-in-v")
            .fill("qkv", Fill::Normal(1.0).with_nan(119)),
        Attention::frames(512, 2, 65)
            .case("frames-nan-in-k")
            .fill("qkv", Fill::Normal(1.0).with_nan(1023)),
    ]
}

/// Rows that rise (or fall) from the first to the last.
fn rising(rows: usize, cols: usize, sign: f32) -> Fill {
    Fill::Values((0..rows * cols).map(|i| sign * 0.0625 * ((i / cols) as f32 - 64.0)).collect())
}

fn bench() -> Vec<Case> {
    // 768p: latents of 96×160; the sixteenth unit of a five-second video sees 15.
    let size = [96, 160];
    let mut cases = Vec::new();
    for heads in [24, 30] {
        for (frames, stage) in [(0, 2), (7, 2), (15, 2), (15, 1), (15, 0)] {
            cases.push(packed(&[30, 110], frames, stage, size, heads));
        }
        cases.push(last_block(&[30, 110], 15, size, heads));
    }
    cases.push(Attention::t5(64, 64, 128).case("t5/n128"));
    cases.push(Attention::causal(12, 64, 77).case("clip/n77"));
    cases.push(Attention::causal(20, 64, 77).case("clip/n77"));
    cases.push(Attention::frames(512, 1, 96 * 160).case("frames/1x15360"));
    cases
}
