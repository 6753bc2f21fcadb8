//! The sd3 transformer, `PyramidDiffusionMMDiT`: joint attention over text and image with
//! separate weights, a cropped sin-cos position table in space and rotary positions in time
//! (Pyramid Flow, arXiv 2410.05954; MMDiT, arXiv 2403.03206).

use super::adaptive_norm::{AdaNorm, ModulationLayout};
use super::dit::{Geometry, HEAD_SIZE, Step, StepOutput, Stream};
use super::joint::{Setup, StreamNames, begin_block, joint_block, start, stream_names};
use super::positions::{push_axis, span};
use super::{ExpectedWeight, Record, collect_weights};
use crate::Result;
use crate::checkpoint::MmditConfig;
use crate::graph::{Graph, Op, TensorId};
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
    let layout = modulation_layout(config);
    let (d, text_dim) = (config.width(), config.text_dim);
    let setup = Setup { d, text_dim, eps_qk: QK_EPS, rope: rotary_table(geometry) };
    let (mut step, x, streams) = start(setup, geometry, &layout, dtype);
    let channels = config.in_channels;
    let patch = [d, channels, 2, 2];
    let current = step.embed("pos_embed.proj", x, channels, true, &patch)?;
    step.g.scope("pos_embed");
    add_positions(&mut step, config, x)?;

    for i in 0..config.layers {
        let name = format!("transformer_blocks.{i}");
        let last = i + 1 == config.layers;
        begin_block(&mut step, &name, |step| {
            if last {
                last_block(step, &name, &streams, x)
            } else {
                joint_block(step, &name, &streams, &STREAMS)
            }
        })?;
    }
    step.finish(x, current, output)?;
    Ok(step.g)
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
    let modulation = layout.record(1, 0..1, d, config.pooled_dim, DType::F32)?;
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

/// Text, then image.
const STREAMS: [StreamNames; 2] = stream_names("norm_add_q", "norm_add_k");

/// The last block: text only gives keys and values, and of the image only the current
/// frame goes on, since nothing else reaches the output.
fn last_block(step: &mut Step<'_>, name: &str, streams: &[Stream; 2], x: TensorId) -> Result<()> {
    let (d, geometry) = (step.d, step.geometry);
    let dtype = step.g.tensor(x).dtype;
    let kv = step.g.empty(&[geometry.rows(), 2 * d], dtype);
    let q = step.g.empty(&[geometry.current_rows().len(), d], dtype);
    let ranges = [geometry.text_rows(), geometry.image_rows()];
    let starts = STREAMS.map(|names| step.layout.start(&format!("{name}.{}", names.norm)));
    let text = step.modulate(&streams[0], AdaNorm::continuous(starts[0], d))?;
    let image = step.modulate(&streams[1], AdaNorm::first(starts[1], d))?;
    step.g.side_by_side(2)?;
    for ((names, range), n) in STREAMS.iter().zip(&ranges).zip([text, image]) {
        let [_, to_k, to_v] = names.layers(name);
        let place = step.g.rows(kv, range.clone());
        step.project(n, &[to_k, to_v], range.start, place)?;
    }
    let first = geometry.current_rows().start;
    let current = step.g.rows(image, first - ranges[1].start..ranges[1].len());
    let [to_q, ..] = STREAMS[1].layers(name);
    step.project(current, &[to_q], first, q)?;
    step.g.side_by_side(3)?;
    let [k, v] = [0, d].map(|column| step.g.cols(kv, span(column, d)));
    let attention = step.g.empty(&[geometry.current_rows().len(), d], dtype);
    let segments = geometry.current_attention(geometry.current_rows().start);
    step.attend([q, k, v], segments, attention)?;
    let current =
        Stream { x: step.g.rows(x, geometry.current_rows()), groups: geometry.groups_of_current() };
    let [_, start] = starts;
    let out = format!("{name}.attn.{}", STREAMS[1].out);
    step.add_gated(&current, &out, attention, AdaNorm::first(start, d))?;
    let feed_forward = format!("{name}.{}", STREAMS[1].feed_forward);
    step.feed_forward(&[(&current, feed_forward, AdaNorm::second(start, d))])
}
