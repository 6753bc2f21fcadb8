//! The sd3 transformer, `PyramidDiffusionMMDiT`: joint attention over text and image with
//! separate weights, a cropped sin-cos position table in space and rotary positions in time
//! (Pyramid Flow, arXiv 2410.05954; MMDiT, arXiv 2403.03206).

use super::dit::{AdaNorm, Geometry, HEAD_SIZE, ModulationLayout, Step, StepOutput, Stream};
use super::positions::{push_axis, span};
use super::{ExpectedWeight, Record, collect_weights};
use crate::Result;
use crate::checkpoint::MmditConfig;
use crate::graph::{Epilogue, Graph, Op, TensorId};
use crate::tensor::DType;

/// Epsilon of the query and key norms.
const QK_EPS: f32 = 1e-5;

/// Where each norm's vectors lie in the modulation table.
pub fn modulation_layout(config: &MmditConfig) -> ModulationLayout {
    let d = config.width();
    let mut layout = ModulationLayout::default();
    for i in 0..config.layers {
        let last = i + 1 == config.layers;
        layout.add(format!("transformer_blocks.{i}.norm1"), 6 * d);
        let context = if last { 2 * d } else { 6 * d };
        layout.add(format!("transformer_blocks.{i}.norm1_context"), context);
    }
    layout.add("norm_out".into(), 2 * d);
    layout
}

/// Records one call of the transformer. Inputs: `text` `[rows of text, text width]`,
/// `modulation` `[samples, columns]`, `clip{i}` and `current` latents (channels last).
///
/// # Errors
/// [`crate::ErrorKind::Input`] for a geometry that cannot be packed.
pub fn record_step(
    config: &MmditConfig,
    geometry: &Geometry,
    output: StepOutput,
    dtype: DType,
) -> Result<Graph> {
    geometry.validate()?;
    let d = config.width();
    let layout = modulation_layout(config);
    let mut g = Graph::new();
    let text = g.input("text", &[geometry.text_rows().len(), config.text_dim], dtype);
    let modulation = g.input("modulation", &[geometry.samples(), layout.columns()], DType::F32);
    let rope = g.constant("rope", &[geometry.rows(), HEAD_SIZE], rotary_table(geometry));
    let x = g.empty(&[geometry.rows(), d], dtype);
    let mut step = Step { g, geometry, layout: &layout, d, eps_qk: QK_EPS, modulation, rope };

    step.g.scope("context_embedder");
    let parts = vec![step.g.linear_weights("context_embedder", d, config.text_dim)];
    let text_x = step.g.rows(x, geometry.text_rows());
    step.g.push_into(Op::Linear { parts, epilogue: Epilogue::Store }, &[text], text_x)?;
    step.g.scope("pos_embed");
    let channels = config.in_channels;
    let patch = [d, channels, 2, 2];
    let current = step.embed_latents("pos_embed.proj", x, channels, true, &patch)?;
    add_positions(&mut step, config, x)?;

    let streams = [
        Stream { x: text_x, groups: geometry.groups_of_text() },
        Stream { x: step.g.rows(x, geometry.image_rows()), groups: geometry.groups_of_image() },
    ];
    for i in 0..config.layers {
        let name = format!("transformer_blocks.{i}");
        let last = i + 1 == config.layers;
        begin_block(&mut step, &name, |step| {
            if last { last_block(step, &name, &streams, x) } else { block(step, &name, &streams) }
        })?;
    }
    step.finish(x, current, output)?;
    Ok(step.g)
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

/// Every weight of the component.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &MmditConfig) -> Result<Vec<ExpectedWeight>> {
    let clip = super::dit::Clip { frames: 1, height: 2, width: 2 };
    let geometry = Geometry {
        text_tokens: vec![1],
        history: Vec::new(),
        current: clip,
        separate_latents: false,
    };
    let mut step = record_step(config, &geometry, StepOutput::Velocity, DType::F32)?;
    // The last block has text queries in the files although nothing uses their result.
    let last = format!("transformer_blocks.{}.attn", config.layers - 1);
    let d = config.width();
    step.linear_weights(&format!("{last}.add_q_proj"), d, d);
    step.weight(&format!("{last}.norm_add_q.weight"), &[HEAD_SIZE]);
    let layout = modulation_layout(config);
    let modulation = layout.record(1, d, config.pooled_dim, DType::F32)?;
    Ok(collect_weights(&[step, modulation]))
}

/// Rotation by time over the whole head; text has time 0.
fn rotary_table(geometry: &Geometry) -> Vec<f32> {
    let mut table = Vec::with_capacity(geometry.rows() * HEAD_SIZE);
    geometry.for_each_row_block(|clip, rows| {
        let (start, per_frame) = clip.map_or((0, rows), |(c, time)| (time, c.frame_tokens()));
        for frame in 0..rows / per_frame {
            let mut row = Vec::with_capacity(HEAD_SIZE);
            push_axis(&mut row, (start + frame) as f64, HEAD_SIZE);
            (0..per_frame).for_each(|_| table.extend_from_slice(&row));
        }
    });
    table
}

fn add_positions(step: &mut Step<'_>, config: &MmditConfig, x: TensorId) -> Result<()> {
    let max_size = config.pos_embed_max_size;
    let shape = [1, max_size * max_size, step.d];
    let table = step.g.weight("pos_embed.pos_embed", &shape);
    let stage = step.geometry.current.grid();
    let mut blocks = Vec::new();
    let mut row = 0;
    step.geometry.for_each_row_block(|clip, rows| {
        if let Some((clip, _)) = clip {
            blocks.push((clip.grid(), span(row, rows)));
        }
        row += rows;
    });
    for (grid, rows) in blocks {
        let place = step.g.rows(x, rows);
        let op = Op::AddPositionTable { table, max_size, stage, grid };
        step.g.push_into(op, &[place], place)?;
    }
    Ok(())
}

/// The names of the projections and norms of one stream's attention.
pub(super) struct StreamNames {
    pub norm: &'static str,
    pub qkv: [&'static str; 3],
    pub norm_q: &'static str,
    pub norm_k: &'static str,
    pub out: &'static str,
    pub feed_forward: &'static str,
}

/// Text, then image.
const STREAMS: [StreamNames; 2] = [
    StreamNames {
        norm: "norm1_context",
        qkv: ["add_q_proj", "add_k_proj", "add_v_proj"],
        norm_q: "norm_add_q",
        norm_k: "norm_add_k",
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
];

fn block(step: &mut Step<'_>, name: &str, streams: &[Stream; 2]) -> Result<()> {
    joint_block(step, name, streams, &STREAMS)
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
    for ((stream, names), range) in streams.iter().zip(names).zip(&ranges) {
        let start = step.layout.start(&format!("{name}.{}", names.norm));
        let n = step.modulate(stream, AdaNorm::first(start, d))?;
        let place = step.g.rows(qkv, range.clone());
        step.project(n, &names.qkv.map(|p| format!("{name}.attn.{p}")), place)?;
        for (column, norm) in [(0, names.norm_q), (d, names.norm_k)] {
            let heads = step.g.cols(place, span(column, d));
            step.norm_heads(heads, range.start, &format!("{name}.attn.{norm}.weight"))?;
        }
    }
    let [q, k, v] = [0, d, 2 * d].map(|column| step.g.cols(qkv, span(column, d)));
    let attention = step.g.empty(&[rows, d], dtype);
    step.attend([q, k, v], geometry.attention(), attention)?;
    for ((stream, names), range) in streams.iter().zip(names).zip(ranges) {
        let start = step.layout.start(&format!("{name}.{}", names.norm));
        let part = step.g.rows(attention, range);
        let out = format!("{name}.attn.{}", names.out);
        step.add_gated(stream, &out, part, AdaNorm::first(start, d))?;
        let feed_forward = format!("{name}.{}", names.feed_forward);
        step.feed_forward(stream, &feed_forward, AdaNorm::second(start, d))?;
    }
    Ok(())
}

/// The last block: text only gives keys and values, and of the image only the current
/// frame goes on, since nothing else reaches the output.
fn last_block(step: &mut Step<'_>, name: &str, streams: &[Stream; 2], x: TensorId) -> Result<()> {
    let (d, geometry) = (step.d, step.geometry);
    let dtype = step.g.tensor(x).dtype;
    let kv = step.g.empty(&[geometry.rows(), 2 * d], dtype);
    let q = step.g.empty(&[geometry.current_rows().len(), d], dtype);
    let ranges = [geometry.text_rows(), geometry.image_rows()];
    for (s, range) in ranges.iter().enumerate() {
        let names = &STREAMS[s];
        let start = step.layout.start(&format!("{name}.{}", names.norm));
        let norm = if s == 0 { AdaNorm::continuous(start, d) } else { AdaNorm::first(start, d) };
        let n = step.modulate(&streams[s], norm)?;
        let place = step.g.rows(kv, range.clone());
        let [to_q, to_k, to_v] = names.qkv.map(|p| format!("{name}.attn.{p}"));
        step.project(n, &[to_k, to_v], place)?;
        let keys = step.g.cols(place, 0..d);
        step.norm_heads(keys, range.start, &format!("{name}.attn.{}.weight", names.norm_k))?;
        if s == 1 {
            let first = geometry.current_rows().start;
            let current = step.g.rows(n, first - range.start..range.len());
            step.project(current, &[to_q], q)?;
            step.norm_heads(q, first, &format!("{name}.attn.{}.weight", names.norm_q))?;
        }
    }
    let [k, v] = [0, d].map(|column| step.g.cols(kv, span(column, d)));
    let attention = step.g.empty(&[geometry.current_rows().len(), d], dtype);
    let segments = geometry.current_attention(geometry.current_rows().start);
    step.attend([q, k, v], segments, attention)?;
    let current =
        Stream { x: step.g.rows(x, geometry.current_rows()), groups: geometry.groups_of_current() };
    let start = step.layout.start(&format!("{name}.norm1"));
    step.add_gated(
        &current,
        &format!("{name}.attn.to_out.0"),
        attention,
        AdaNorm::first(start, d),
    )?;
    step.feed_forward(&current, &format!("{name}.ff"), AdaNorm::second(start, d))
}
