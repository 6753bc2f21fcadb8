//! Blocks in which text and image have weights of their own and attend to each other: all of
//! the sd3 transformer and the first blocks of miniflux (MMDiT, arXiv 2403.03206).

use super::adaptive_norm::{AdaNorm, ModulationLayout};
use super::dit::{Geometry, HEAD_SIZE, Step, Stream};
use super::positions::span;
use crate::Result;
use crate::graph::{Graph, TensorId};
use crate::tensor::DType;

/// What the two transformers differ in before their first block.
pub(super) struct Setup {
    /// Width of the tokens.
    pub d: usize,
    /// Width of the T5 states.
    pub text_dim: usize,
    /// Epsilon of the query and key norms.
    pub eps_qk: f32,
    /// (cos, sin) pairs for every row of the batch.
    pub rope: Vec<f32>,
}

/// Declares the inputs `text` and `modulation`. Returns the packed rows, which are still to be
/// written ([`Step::embed`]), and their two streams, text and image.
pub(super) fn start<'a>(
    setup: Setup,
    geometry: &'a Geometry,
    layout: &'a ModulationLayout,
    dtype: DType,
) -> (Step<'a>, TensorId, [Stream; 2]) {
    let Setup { d, text_dim, eps_qk, rope } = setup;
    let mut g = Graph::new();
    let text = g.input("text", &[geometry.text_rows().len(), text_dim], dtype);
    let modulation = g.input("modulation", &[geometry.samples(), layout.columns()], DType::F32);
    let rope = g.constant("rope", &[geometry.rows(), HEAD_SIZE], rope);
    let x = g.empty(&[geometry.rows(), d], dtype);
    let streams = [
        Stream { x: g.rows(x, geometry.text_rows()), groups: geometry.groups_of_text() },
        Stream { x: g.rows(x, geometry.image_rows()), groups: geometry.groups_of_image() },
    ];
    (Step { g, geometry, layout, d, eps_qk, modulation, rope, text }, x, streams)
}

/// Records `record` as a block of the step's graph.
pub(super) fn begin_block(
    step: &mut Step<'_>,
    name: &str,
    record: impl FnOnce(&mut Step<'_>) -> Result<()>,
) -> Result<()> {
    let first = step.g.open_block(name);
    record(step)?;
    step.g.close_block(name, first);
    Ok(())
}

/// The names of the layers of one stream in a block.
#[derive(Clone, Copy)]
pub(super) struct StreamNames {
    pub norm: &'static str,
    pub qkv: [&'static str; 3],
    pub norm_q: &'static str,
    pub norm_k: &'static str,
    pub out: &'static str,
    pub feed_forward: &'static str,
}

impl StreamNames {
    /// The layers for queries, keys and values of the block `name`, with their heads' norms.
    pub fn layers(&self, name: &str) -> [(String, Option<String>); 3] {
        let full = |part: &str| format!("{name}.attn.{part}");
        let [q, k, v] = self.qkv.map(full);
        [(q, Some(full(self.norm_q))), (k, Some(full(self.norm_k))), (v, None)]
    }
}

/// The names for text and for image. The two families agree but for the norms of the
/// text's queries and keys.
pub(super) const fn stream_names(
    text_norm_q: &'static str,
    text_norm_k: &'static str,
) -> [StreamNames; 2] {
    [
        StreamNames {
            norm: "norm1_context",
            qkv: ["add_q_proj", "add_k_proj", "add_v_proj"],
            norm_q: text_norm_q,
            norm_k: text_norm_k,
            out: "to_add_out",
            feed_forward: "ff_context",
        },
        StreamNames {
            norm: "norm1",
            qkv: ["to_q", "to_k", "to_v"],
            norm_q: "norm_q",
            norm_k: "norm_k",
            out: "to_out.0",
            feed_forward: "ff",
        },
    ]
}

/// A block in which text and image attend to each other and both go on.
pub(super) fn joint_block(
    step: &mut Step<'_>,
    name: &str,
    streams: &[Stream; 2],
    names: &[StreamNames; 2],
) -> Result<()> {
    let (d, rows, geometry) = (step.d, step.geometry.rows(), step.geometry);
    let dtype = step.g.tensor(streams[0].x).dtype;
    let qkv = step.g.empty(&[rows, 3 * d], dtype);
    let ranges = [geometry.text_rows(), geometry.image_rows()];
    let starts = names.map(|names| step.layout.start(&format!("{name}.{}", names.norm)));
    let mut normed = Vec::new();
    for (stream, start) in streams.iter().zip(starts) {
        normed.push(step.modulate(stream, AdaNorm::first(start, d))?);
    }
    step.g.side_by_side(2)?;
    for ((names, range), n) in names.iter().zip(&ranges).zip(normed) {
        let place = step.g.rows(qkv, range.clone());
        step.project(n, &names.layers(name), range.start, place)?;
    }
    step.g.side_by_side(2)?;
    let [q, k, v] = [0, d, 2 * d].map(|column| step.g.cols(qkv, span(column, d)));
    let attention = step.g.empty(&[rows, d], dtype);
    step.attend([q, k, v], geometry.attention(), attention)?;
    for (((stream, names), range), start) in streams.iter().zip(names).zip(ranges).zip(starts) {
        let part = step.g.rows(attention, range);
        let out = format!("{name}.attn.{}", names.out);
        step.add_gated(stream, &out, part, AdaNorm::first(start, d))?;
    }
    step.g.side_by_side(2)?;
    let part = |i: usize| {
        let name = format!("{name}.{}", names[i].feed_forward);
        (&streams[i], name, AdaNorm::second(starts[i], d))
    };
    step.feed_forward(&[part(0), part(1)])
}
