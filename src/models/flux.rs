//! The miniflux transformer, `PyramidFluxTransformer`: joint blocks with separate weights
//! for text and image, then single blocks over both, rotary positions in time and space.

use super::adaptive_norm::{AdaNorm, ModulationLayout};
use super::dit::{Clip, Geometry, HEAD_SIZE, Step, StepOutput, Stream};
use super::joint::{Setup, StreamNames, begin_block, joint_block, start, stream_names};
use super::positions::{interpolate, push_axis, span};
use super::{ExpectedWeight, Record, collect_weights};
use crate::Result;
use crate::checkpoint::FluxConfig;
use crate::graph::{Activation, Epilogue, Graph, Op, TensorId};
use crate::tensor::DType;

/// Epsilon of the query and key norms.
const QK_EPS: f32 = 1e-6;

/// Where each norm's vectors lie in the modulation table.
pub fn modulation_layout(config: &FluxConfig) -> ModulationLayout {
    let d = config.width();
    let mut layout = ModulationLayout::default();
    for i in 0..config.layers {
        layout.add(format!("transformer_blocks.{i}.norm1"), 6 * d);
        layout.add(format!("transformer_blocks.{i}.norm1_context"), 6 * d);
    }
    for i in 0..config.single_layers {
        layout.add(format!("single_transformer_blocks.{i}.norm"), 3 * d);
    }
    layout.add("norm_out".into(), 2 * d);
    layout
}

/// Text, then image. The added norms are named otherwise than in sd3.
const STREAMS: [StreamNames; 2] = stream_names("norm_added_q", "norm_added_k");

/// Records one call of the transformer; inputs as for the sd3 transformer.
///
/// # Errors
/// [`crate::ErrorKind::Input`] for a geometry that cannot be packed.
pub fn record_step(
    config: &FluxConfig,
    geometry: &Geometry,
    output: StepOutput,
    dtype: DType,
) -> Result<Graph> {
    geometry.validate()?;
    let layout = modulation_layout(config);
    let (d, text_dim) = (config.width(), config.text_dim);
    let rope = rotary_table(geometry, config.rope_axes);
    let setup = Setup { d, text_dim, eps_qk: QK_EPS, rope };
    let (mut step, x, streams) = start(setup, geometry, &layout, dtype);
    let patch = config.in_channels;
    let current = step.embed("x_embedder", x, patch / 4, false, &[d, patch])?;

    for i in 0..config.layers {
        let name = format!("transformer_blocks.{i}");
        begin_block(&mut step, &name, |step| joint_block(step, &name, &streams, &STREAMS))?;
    }
    for i in 0..config.single_layers {
        let name = format!("single_transformer_blocks.{i}");
        let last = i + 1 == config.single_layers;
        begin_block(&mut step, &name, |step| single_block(step, &name, x, last))?;
    }
    step.finish(x, current, output)?;
    Ok(step.g)
}

/// Every weight of the component.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &FluxConfig) -> Result<Vec<ExpectedWeight>> {
    let geometry = Geometry {
        text_tokens: vec![1],
        history: Vec::new(),
        current: Clip { frames: 1, height: 2, width: 2 },
        separate_latents: false,
    };
    let step = record_step(config, &geometry, StepOutput::Velocity, DType::F32)?;
    let layout = modulation_layout(config);
    let pooled = config.pooled_dim;
    let modulation = layout.record(1, 0..1, config.width(), pooled, DType::F32)?;
    Ok(collect_weights(&[step, modulation]))
}

/// Rotation by (time, row, column); text is at the origin. The grid of a history clip of
/// lower resolution is the current stage's, resized.
fn rotary_table(geometry: &Geometry, axes: [usize; 3]) -> Vec<f32> {
    let stage = geometry.current.grid();
    let mut table = Vec::with_capacity(geometry.rows() * HEAD_SIZE);
    let mut push = |time: usize, y: f64, x: f64| {
        for (position, dims) in [time as f64, y, x].into_iter().zip(axes) {
            push_axis(&mut table, position, dims);
        }
    };
    geometry.for_each_row_block(|clip, rows| {
        let Some((clip, time)) = clip else {
            (0..rows).for_each(|_| push(0, 0.0, 0.0));
            return;
        };
        let [height, width] = clip.grid();
        let (ys, xs) = (interpolate(stage[0], height), interpolate(stage[1], width));
        for frame in 0..clip.frames {
            for &y in &ys {
                xs.iter().for_each(|&x| push(time + frame, y, x));
            }
        }
    });
    table
}

/// Attention and feed-forward side by side on one modulated input. In the last block only
/// the current frame's tokens go on past the keys and values.
fn single_block(step: &mut Step<'_>, name: &str, x: TensorId, last: bool) -> Result<()> {
    let (d, geometry) = (step.d, step.geometry);
    let dtype = step.g.tensor(x).dtype;
    let norm = AdaNorm::first(step.layout.start(&format!("{name}.norm")), d);
    let all = Stream { x, groups: geometry.groups_of_all() };
    let n = step.modulate(&all, norm)?;
    let (first, segments, groups) = if last {
        let first = geometry.current_rows().start;
        (first, geometry.current_attention(first), geometry.groups_of_current())
    } else {
        (0, geometry.attention(), geometry.groups_of_all())
    };
    let rows = first..geometry.rows();

    let layer = |part: &str, norm: Option<&str>| {
        (format!("{name}.attn.{part}"), norm.map(|norm| format!("{name}.attn.{norm}")))
    };
    let to_q = layer("to_q", Some("norm_q"));
    let [to_k, to_v] = [layer("to_k", Some("norm_k")), layer("to_v", None)];
    let kept = step.g.rows(n, rows.clone());
    let q = step.g.empty(&[rows.len(), d], dtype);
    step.project(kept, &[to_q], first, q)?;
    let kv = step.g.empty(&[geometry.rows(), 2 * d], dtype);
    step.project(n, &[to_k, to_v], 0, kv)?;
    let joined = step.g.empty(&[rows.len(), 5 * d], dtype);
    let hidden = step.g.cols(joined, d..5 * d);
    let parts = vec![step.g.linear_weights(&format!("{name}.proj_mlp"), 4 * d, d)];
    let epilogue = Epilogue::Activate(Activation::GeluTanh);
    step.g.push_into(Op::Linear { parts, epilogue }, &[kept], hidden)?;
    step.g.side_by_side(3)?;

    let [k, v] = [0, d].map(|column| step.g.cols(kv, span(column, d)));
    let attention = step.g.cols(joined, 0..d);
    step.attend([q, k, v], segments, attention)?;

    let stream = Stream { x: step.g.rows(x, rows), groups };
    step.add_gated(&stream, &format!("{name}.proj_out"), joined, norm)
}
