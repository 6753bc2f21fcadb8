//! Single calls of the transformers and of the VAE against tensors measured from the
//! published implementation.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::golden::{Golden, channels_last, check, relative_error};
use common::goldens;
use common::runs::checkpoint;
use pyraflow::checkpoint::{Checkpoint, Component, TransformerConfig};
use pyraflow::exec::{Backend, Cpu, GraphId, Session};
use pyraflow::models::dit::{Clip, Geometry, StepOutput};
use pyraflow::models::vae::{Window, record_decoder, record_encoder};
use pyraflow::models::{flux, mmdit};
use pyraflow::tensor::{DType, WeightSource};

/// Relative error allowed for a single call.
const SINGLE_CALL: f64 = 1e-5;

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

/// Rounding to bf16 must show, and must not do more harm than a few roundings in a row:
/// each costs up to 2⁻⁹ of a value.
fn check_bf16(what: &str, found: &[f32], golden: &[f32]) {
    const ROUNDING: f64 = 1.0 / 512.0;
    let error = relative_error(found, golden);
    println!("{what} in bf16: relative error {error:.2e}");
    assert!(error > ROUNDING / 16.0 && error < ROUNDING * 16.0, "{what} in bf16: {error:e}");
}

fn transformer_calls(folder: &Path, golden: &Golden) {
    let variant = golden.setting("variant");
    let checkpoint = checkpoint(folder, variant);
    let weights = weights(&checkpoint, Component::Transformer);
    let (mask_shape, mask) = golden.tensor("prompt_mask");
    let (embeds_shape, embeds) = golden.tensor("prompt_embeds");
    let (samples, padded, width) = (mask_shape[0], mask_shape[1], embeds_shape[2]);
    let mut text_tokens = Vec::new();
    let mut text = Vec::new();
    for sample in 0..samples {
        let rows: Vec<usize> = (0..padded).filter(|t| mask[sample * padded + t] != 0.0).collect();
        text_tokens.push(rows.len());
        for t in rows {
            let start = (sample * padded + t) * width;
            text.extend_from_slice(&embeds[start..start + width]);
        }
    }
    let (_, pooled) = golden.tensor("pooled");

    // Once as it is, once with freed memory poisoned, where a use after the end of a
    // tensor's planned life would show, and once as a device stores it.
    for backend in [Cpu::new(), Cpu::new().poisoning(), Cpu::rounding_to_bf16()] {
        let dtype = backend.activations();
        let mut session = backend.open(weights.clone()).expect("session");
        let calls = calls(golden);
        assert!(!calls.is_empty(), "{} holds no call", golden.path.display());
        for call in calls {
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
            let table = layout.record(samples, d, pooled_dim, dtype).expect("graph");
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
            let velocity = run(&mut *session, step, "velocity");
            let (shape, expected) = golden.tensor(&format!("{call}.out"));
            let expected = channels_last(&shape, &expected).1;
            let what = format!("{} {call}", checkpoint.family());
            match dtype {
                DType::F32 => check(&what, &velocity, &expected, SINGLE_CALL),
                _ => check_bf16(&what, &velocity, &expected),
            }
        }
    }
}

#[test]
fn transformers_agree_with_the_published_ones() {
    for family in ["sd3", "flux"] {
        let folder = goldens().join(family);
        match Golden::open(&folder.join("transformer.safetensors")) {
            Some(golden) => transformer_calls(&folder, &golden),
            None => println!("skipped: {} holds no transformer golden", folder.display()),
        }
    }
}

struct Vae {
    golden: Golden,
    checkpoint: Checkpoint,
    session: Box<dyn Session>,
}

impl Vae {
    fn open() -> Option<Vae> {
        let golden = Golden::open(&goldens().join("vae.safetensors"))?;
        let folder = goldens().join(golden.setting("checkpoint").expect("checkpoint name"));
        let checkpoint = checkpoint(&folder, None);
        let session = Cpu::new().open(weights(&checkpoint, Component::Vae)).expect("session");
        Some(Vae { golden, checkpoint, session })
    }

    /// Encodes or decodes `name` in windows of these lengths (the last one repeated).
    fn through(&mut self, name: &str, windows: &[usize], decode: bool) -> Vec<f32> {
        let (shape, values) = self.golden.tensor(name);
        let ([frames, height, width, channels], values) = channels_last(&shape, &values);
        let config = self.checkpoint.vae().expect("VAE configuration").clone();
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
            };
            let graph = if decode {
                record_decoder(&config, window, DType::F32)
            } else {
                record_encoder(&config, window, DType::F32)
            };
            let graph = self.session.add(graph.expect("graph")).expect("plan");
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

    fn expected(&self, name: &str) -> Vec<f32> {
        let (shape, values) = self.golden.tensor(name);
        channels_last(&shape, &values).1
    }
}

#[test]
fn vae_agrees_with_the_published_one() {
    let Some(mut vae) = Vae::open() else {
        println!("skipped: {} holds no VAE golden", goldens().display());
        return;
    };
    let whole = usize::MAX;
    let windows = |vae: &Vae, name: &str| vae.golden.json(name).unwrap_or(vec![whole]);
    let decode_windows: Vec<usize> = windows(&vae, "decode_windows");
    let encode_windows: Vec<usize> = windows(&vae, "encode_windows");
    let mut compared = 0;
    for (input, output, windows, decode) in [
        ("image", "image.moments", vec![whole], false),
        ("video", "video.moments", vec![whole], false),
        ("video", "video.moments", encode_windows, false),
        ("z", "z.decoded", vec![whole], true),
        ("z", "z.decoded", decode_windows, true),
        ("z_first", "z_first.decoded", vec![whole], true),
    ] {
        if !vae.golden.has(input) || !vae.golden.has(output) {
            continue;
        }
        let found = vae.through(input, &windows, decode);
        let what = format!("{output} in windows of {windows:?}");
        check(&what, &found, &vae.expected(output), SINGLE_CALL);
        compared += 1;
    }
    assert!(compared > 0, "{} holds nothing to compare", vae.golden.path.display());
}
