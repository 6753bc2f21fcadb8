//! Single calls of the transformers and of the VAE, on any backend, beside the tensors
//! measured from the published implementation.

use std::path::Path;
use std::sync::Arc;

use pyraflow::checkpoint::{Checkpoint, Component, TransformerConfig};
use pyraflow::exec::{Backend, GraphId, Session};
use pyraflow::models::dit::{Clip, Geometry, StepOutput};
use pyraflow::models::vae::{Window, record_decoder, record_encoder};
use pyraflow::models::{flux, mmdit};
use pyraflow::tensor::WeightSource;

use super::golden::{Golden, channels_last};
use super::goldens;
use super::runs::checkpoint;

/// What a backend computed and what it should be.
pub struct Comparison {
    pub what: String,
    pub found: Vec<f32>,
    pub golden: Vec<f32>,
}

fn weights(checkpoint: &Checkpoint, component: Component) -> Arc<dyn WeightSource> {
    Arc::new(checkpoint.source_weights(component).expect("weights"))
}

fn run(session: &mut dyn Session, graph: GraphId, output: &str) -> Vec<f32> {
    session.run(graph).expect("run");
    let id = session.find(graph, output).expect("output");
    session.read(graph, id).expect("read")
}

fn write(session: &mut dyn Session, graph: GraphId, input: &str, data: &[f32]) {
    let id = session.find(graph, input).expect("input");
    session.write(graph, id, data).expect("write");
}

/// The names of the calls in a transformer golden: what stands before `.out`.
fn calls(golden: &Golden) -> Vec<String> {
    let names = golden.names();
    let mut calls: Vec<_> =
        names.iter().filter_map(|n| n.strip_suffix(".out").map(String::from)).collect();
    calls.sort();
    calls
}

fn clip_of(shape: &[usize]) -> Clip {
    Clip { frames: shape[2], height: shape[3], width: shape[4] }
}

/// The text of all samples without its padding, and the tokens of each.
fn text_of(golden: &Golden) -> (Vec<usize>, Vec<f32>) {
    let (mask_shape, mask) = golden.tensor("prompt_mask");
    let (embeds_shape, embeds) = golden.tensor("prompt_embeds");
    let (samples, padded, width) = (mask_shape[0], mask_shape[1], embeds_shape[2]);
    let (mut tokens, mut text) = (Vec::new(), Vec::new());
    for sample in 0..samples {
        let rows: Vec<usize> = (0..padded).filter(|t| mask[sample * padded + t] != 0.0).collect();
        tokens.push(rows.len());
        for t in rows {
            let start = (sample * padded + t) * width;
            text.extend_from_slice(&embeds[start..start + width]);
        }
    }
    (tokens, text)
}

/// Repeats every call of the transformer in `golden` with the checkpoint in `folder`.
pub fn transformer_calls(folder: &Path, golden: &Golden, backend: &dyn Backend) -> Vec<Comparison> {
    let checkpoint = checkpoint(folder, golden.setting("variant"));
    let dtype = backend.activations();
    let mut session = backend.open(weights(&checkpoint, Component::Transformer)).expect("session");
    let (text_tokens, text) = text_of(golden);
    let (_, pooled) = golden.tensor("pooled");
    let calls = calls(golden);
    assert!(!calls.is_empty(), "{} holds no call", golden.path.display());
    let compare = |call: String| {
        let mut clips = Vec::new();
        while golden.has(&format!("{call}.clip{}", clips.len())) {
            clips.push(golden.tensor(&format!("{call}.clip{}", clips.len())));
        }
        let (current, history) = clips.split_last().expect("clips");
        let geometry = Geometry {
            text_tokens: text_tokens.clone(),
            history: history.iter().map(|(shape, _)| clip_of(shape)).collect(),
            current: clip_of(&current.0),
            separate_latents: true,
        };
        let (_, timesteps) = golden.tensor(&format!("{call}.timestep"));
        let (layout, d, step) = match checkpoint.transformer() {
            TransformerConfig::Mmdit(c) => (
                mmdit::modulation_layout(c),
                c.width(),
                mmdit::record_step(c, &geometry, StepOutput::Velocity, dtype),
            ),
            TransformerConfig::Flux(c) => (
                flux::modulation_layout(c),
                c.width(),
                flux::record_step(c, &geometry, StepOutput::Velocity, dtype),
            ),
        };
        let pooled_dim = checkpoint.transformer().pooled_dim();
        let rows = text_tokens.len();
        let table = layout.record(rows, 0..rows, d, pooled_dim, dtype).expect("graph");
        let table = session.add(table).expect("plan");
        write(&mut *session, table, "timesteps", &timesteps);
        write(&mut *session, table, "pooled", &pooled);
        let modulation = run(&mut *session, table, "modulation");

        let step = session.add(step.expect("graph")).expect("plan");
        write(&mut *session, step, "text", &text);
        write(&mut *session, step, "modulation", &modulation);
        for (i, (shape, values)) in history.iter().enumerate() {
            let values = channels_last(shape, values).1;
            write(&mut *session, step, &format!("clip{i}"), &values);
        }
        write(&mut *session, step, "current", &channels_last(&current.0, &current.1).1);
        let found = run(&mut *session, step, "velocity");
        let (shape, expected) = golden.tensor(&format!("{call}.out"));
        let golden = channels_last(&shape, &expected).1;
        Comparison { what: format!("{} {call}", checkpoint.family()), found, golden }
    };
    calls.into_iter().map(compare).collect()
}

struct Vae<'a> {
    golden: &'a Golden,
    checkpoint: Checkpoint,
    backend: &'a dyn Backend,
    session: Box<dyn Session>,
}

impl Vae<'_> {
    /// Encodes or decodes `name` in windows of these lengths (the last one repeated), at most
    /// `at_once` frames at once where a window can be taken in pieces.
    fn through(&mut self, name: &str, windows: &[usize], at_once: usize, decode: bool) -> Vec<f32> {
        let (shape, values) = self.golden.tensor(name);
        let ([frames, height, width, channels], values) = channels_last(&shape, &values);
        let config = self.checkpoint.vae().expect("VAE configuration").clone();
        let dtype = self.backend.activations();
        let mut start = 0;
        let mut out = Vec::new();
        for i in 0.. {
            let frames_now = windows[i.min(windows.len() - 1)].min(frames - start);
            let window = Window {
                frames: frames_now,
                height,
                width,
                continues: start > 0,
                carries: start + frames_now < frames,
                at_once,
            };
            let record = if decode { record_decoder } else { record_encoder };
            let graph = record(&config, window, dtype).expect("graph");
            let graph = self.session.add(graph).expect("plan");
            let pixels = height * width * channels;
            let input = &values[start * pixels..(start + frames_now) * pixels];
            let (from, to) = if decode { ("latents", "video") } else { ("video", "moments") };
            write(&mut *self.session, graph, from, input);
            out.extend(run(&mut *self.session, graph, to));
            self.session.remove(graph);
            start += frames_now;
            if start == frames {
                return out;
            }
        }
        unreachable!("the loop ends with the frames")
    }
}

/// Repeats everything that the VAE golden holds; `None` where there is no such file.
pub fn vae_calls(backend: &dyn Backend) -> Option<Vec<Comparison>> {
    let golden = Golden::open(&goldens().join("vae.safetensors"))?;
    let folder = goldens().join(golden.setting("checkpoint").expect("checkpoint name"));
    let checkpoint = checkpoint(&folder, None);
    let session = backend.open(weights(&checkpoint, Component::Vae)).expect("session");
    let mut vae = Vae { golden: &golden, checkpoint, backend, session };
    let whole = vec![usize::MAX];
    let windows = |name: &str| golden.json(name).unwrap_or(whole.clone());
    let mut comparisons = Vec::new();
    for (input, output, windows, decode) in [
        ("image", "image.moments", whole.clone(), false),
        ("video", "video.moments", whole.clone(), false),
        ("video", "video.moments", windows("encode_windows"), false),
        ("z", "z.decoded", whole.clone(), true),
        ("z", "z.decoded", windows("decode_windows"), true),
        ("z_first", "z_first.decoded", whole.clone(), true),
    ] {
        if !golden.has(input) || !golden.has(output) {
            continue;
        }
        let what = match windows[0] {
            usize::MAX => format!("{output} as a whole"),
            _ => format!("{output} in windows of {windows:?}"),
        };
        let (shape, values) = golden.tensor(output);
        let found = vae.through(input, &windows, usize::MAX, decode);
        for at_once in [1, 2, 4].into_iter().filter(|_| decode) {
            let pieces = vae.through(input, &windows, at_once, decode);
            assert_eq!(pieces.len(), found.len());
            // The CPU's matrix products round otherwise where they have other rows beside them.
            let most = if backend.name() == "cpu" { 1e-5 } else { 0.0 };
            let apart = pieces.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart <= most, "{what}, {at_once} frames at once: {apart} apart");
        }
        comparisons.push(Comparison { what, found, golden: channels_last(&shape, &values).1 });
    }
    assert!(!comparisons.is_empty(), "{} holds nothing to compare", golden.path.display());
    Some(comparisons)
}
