//! Checkpoints of the published size against recordings of the published implementation:
//! our results must be about as near to its f32 as its own bf16 is.
//!
//! `PYRAFLOW_FULL_SIZE` names a folder that `tools/published_calls.py` wrote, or one that
//! holds several of them; the checkpoints must still lie where they were. Options, after
//! `cargo test --release --test full_size --`: `--json FILE` writes the results,
//! `--only TEXT` runs the calls whose names contain it, `--backend cuda|own|generic|cpu|cpu-bf16`.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use common::golden::{Golden, channels_last, relative_error};
use pyraflow::Result;
use pyraflow::checkpoint::{Checkpoint, Component, StoreOptions, TransformerConfig};
use pyraflow::exec::cuda::Gemm;
use pyraflow::exec::{Backend, Cpu, Cuda, GraphId, Session};
use pyraflow::graph::Graph;
use pyraflow::models::dit::{Clip, Geometry, ModulationLayout, StepOutput};
use pyraflow::models::vae::{Window, record_decoder, record_encoder};
use pyraflow::models::{clip, flux, mmdit, t5};
use pyraflow::tensor::DType;
use serde::Deserialize;
use serde_json::json;

/// Our error may be this many times that of the published implementation in bf16.
const RATIO: f64 = 1.25;
/// Relative error allowed where activations are f32.
const F32_ERROR: f64 = 1e-5;
/// Runs that are timed.
const REPEATS: usize = 10;

/// What `published_calls.py` writes beside the tensors.
#[derive(Deserialize)]
struct Recording {
    family: String,
    checkpoint: PathBuf,
    device: String,
    calls: Vec<Call>,
}

#[derive(Deserialize)]
struct Call {
    name: String,
    component: String,
    failed: Option<String>,
    #[serde(default)]
    bf16_error: f64,
    #[serde(default)]
    bf16_seconds: f64,
}

#[derive(Default)]
struct Options {
    json: Option<PathBuf>,
    only: String,
    backend: String,
}

impl Options {
    /// Others are for the harness of other tests, and ignored.
    fn read() -> Options {
        let mut options = Options::default();
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
            match arg.as_str() {
                "--json" => options.json = Some(value().into()),
                "--only" => options.only = value(),
                "--backend" => options.backend = value(),
                _ => {}
            }
        }
        options
    }
}

/// The backend under test: this is where another one goes.
fn backend(name: &str) -> Result<Box<dyn Backend>> {
    Ok(match name {
        "" | "cuda" => Box::new(Cuda::open(None)?),
        "own" => Box::new(Cuda::open(None)?.with_gemm(Gemm::Own)),
        "generic" => Box::new(Cuda::open(None)?.generic()),
        "cpu" => Box::new(Cpu::new()),
        "cpu-bf16" => Box::new(Cpu::rounding_to_bf16()),
        other => panic!("there is no backend {other}"),
    })
}

/// Median seconds of a graph that ran once before.
fn time(session: &mut dyn Session, graph: GraphId) -> Result<f64> {
    let mut times = session.time(graph, REPEATS)?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// An input of a graph.
enum Input<'a> {
    Values(&'a [f32]),
    Ids(&'a [u32]),
}

/// One call on a backend: its tensors, and a session on the weights of its component.
struct Network<'a> {
    checkpoint: &'a Checkpoint,
    session: &'a mut dyn Session,
    dtype: DType,
    golden: &'a Golden,
}

/// What a call gave, and the seconds it takes.
type Outcome = (Vec<f32>, f64);

impl Network<'_> {
    /// Runs `graph` and forgets it.
    fn run(&mut self, graph: Graph, inputs: &[(&str, Input)], output: &str) -> Result<Outcome> {
        let graph = self.session.add(graph)?;
        for (name, input) in inputs {
            let id = self.session.find(graph, name)?;
            match input {
                Input::Values(values) => self.session.write(graph, id, values)?,
                Input::Ids(ids) => self.session.write_ids(graph, id, ids)?,
            }
        }
        self.session.run(graph)?;
        let id = self.session.find(graph, output)?;
        let found = self.session.read(graph, id)?;
        let seconds = time(self.session, graph)?;
        self.session.remove(graph);
        Ok((found, seconds))
    }

    /// The call whose tensors are in `golden`: what it gives, and what it should give.
    fn call(&mut self, component: Component) -> Result<(Outcome, Vec<f32>)> {
        let found = match component {
            Component::Transformer => self.step()?,
            Component::Vae if self.golden.has("latents") => self.decode()?,
            Component::Vae => self.encode()?,
            Component::T5 => {
                let (_, mask) = self.golden.tensor("mask");
                let ids = &self.ids()[..mask.iter().filter(|m| **m != 0.0).count()];
                let graph = t5::record(self.checkpoint.t5()?, &[ids.len()], self.dtype)?;
                self.run(graph, &[("ids", Input::Ids(ids))], "embeds")?
            }
            Component::ClipL | Component::ClipG => {
                let config = match component {
                    Component::ClipL => self.checkpoint.clip_l()?,
                    _ => self.checkpoint.clip_g()?,
                };
                let ids = self.ids();
                let ids = &ids[..clip::pooled_length(&ids)];
                let graph = clip::record(config, ids.len(), self.dtype)?;
                self.run(graph, &[("ids", Input::Ids(ids))], "pooled")?
            }
        };
        let (shape, expected) = self.golden.tensor("out");
        let expected = if shape.len() == 5 { channels_last(&shape, &expected).1 } else { expected };
        Ok((found, expected))
    }

    fn ids(&self) -> Vec<u32> {
        self.golden.tensor("ids").1.iter().map(|&id| id as u32).collect()
    }

    /// The transformer's velocity. The adaptive norms' vectors, which a run computes once for
    /// all its steps, are not timed.
    fn step(&mut self) -> Result<Outcome> {
        let clips = (0..).map(|i| format!("clip{i}")).take_while(|name| self.golden.has(name));
        let clips: Vec<_> = clips
            .map(|name| {
                let (shape, values) = self.golden.tensor(&name);
                let clip = Clip { frames: shape[2], height: shape[3], width: shape[4] };
                (name, clip, channels_last(&shape, &values).1)
            })
            .collect();
        let (current, history) = clips.split_last().expect("clips");
        let (text_tokens, text) = self.text();
        let geometry = Geometry {
            text_tokens,
            history: history.iter().map(|c| c.1).collect(),
            current: current.1,
            separate_latents: false,
        };
        let config = self.checkpoint.transformer();
        let (layout, graph) = record_step(config, &geometry, self.dtype)?;
        let (width, pooled_dim) = (config.width(), config.pooled_dim());
        let rows = geometry.samples();
        let table = layout.record(rows, 0..rows, width, pooled_dim, self.dtype)?;
        let (_, timesteps) = self.golden.tensor("timestep");
        let (_, pooled) = self.golden.tensor("pooled");
        let inputs = [("timesteps", Input::Values(&timesteps)), ("pooled", Input::Values(&pooled))];
        let (modulation, _) = self.run(table, &inputs, "modulation")?;

        let mut inputs = vec![
            ("text", Input::Values(&text)),
            ("modulation", Input::Values(&modulation)),
            ("current", Input::Values(&current.2)),
        ];
        inputs.extend(history.iter().map(|c| (c.0.as_str(), Input::Values(&c.2))));
        self.run(graph, &inputs, "velocity")
    }

    /// Number of text tokens of each sample, and their embeddings without padding.
    fn text(&self) -> (Vec<usize>, Vec<f32>) {
        let (shape, mask) = self.golden.tensor("mask");
        let (_, embeds) = self.golden.tensor("embeds");
        let width = embeds.len() / mask.len();
        let kept = |row: &&[f32]| row.iter().filter(|m| **m != 0.0).count();
        let rows = mask.iter().zip(embeds.chunks_exact(width)).filter(|(m, _)| **m != 0.0);
        (
            mask.chunks_exact(shape[1]).map(|row| kept(&row)).collect(),
            rows.flat_map(|(_, row)| row.iter().copied()).collect(),
        )
    }

    /// Frames, as a run decodes them: one latent at a time. The seconds are those of all windows.
    /// Timing a window spoils the frames it carries, which only a third one would notice.
    fn decode(&mut self) -> Result<Outcome> {
        let (shape, values) = self.golden.tensor("latents");
        let ([frames, height, width, channels], values) = channels_last(&shape, &values);
        let mut out = (Vec::new(), 0.0);
        assert!(frames <= 2, "{frames} latents");
        for (i, latent) in values.chunks_exact(height * width * channels).enumerate() {
            let carries = frames > 1;
            let window = Window { continues: i > 0, carries, ..Window::whole(1, height, width) };
            let graph = record_decoder(self.checkpoint.vae()?, window, self.dtype)?;
            let (video, seconds) =
                self.run(graph, &[("latents", Input::Values(latent))], "video")?;
            out.0.extend(video);
            out.1 += seconds;
        }
        Ok(out)
    }

    fn encode(&mut self) -> Result<Outcome> {
        let (shape, values) = self.golden.tensor("video");
        let ([frames, height, width, _], values) = channels_last(&shape, &values);
        let window = Window::whole(frames, height, width);
        let graph = record_encoder(self.checkpoint.vae()?, window, self.dtype)?;
        self.run(graph, &[("video", Input::Values(&values))], "moments")
    }
}

fn record_step(
    config: &TransformerConfig,
    geometry: &Geometry,
    dtype: DType,
) -> Result<(ModulationLayout, Graph)> {
    Ok(match config {
        TransformerConfig::Mmdit(c) => (
            mmdit::modulation_layout(c),
            mmdit::record_step(c, geometry, StepOutput::Velocity, dtype)?,
        ),
        TransformerConfig::Flux(c) => (
            flux::modulation_layout(c),
            flux::record_step(c, geometry, StepOutput::Velocity, dtype)?,
        ),
    })
}

fn component(name: &str) -> Component {
    match name {
        "transformer" => Component::Transformer,
        "vae" => Component::Vae,
        "clip_l" => Component::ClipL,
        "clip_g" => Component::ClipG,
        "t5" => Component::T5,
        other => panic!("there is no component {other}"),
    }
}

/// The folders with recordings in or below `folder`.
fn recordings(folder: &Path) -> Vec<PathBuf> {
    let below = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut all: Vec<PathBuf> = below.chain([folder.to_path_buf()]).collect();
    all.retain(|f| f.join("calls.json").is_file());
    all.sort();
    all
}

/// Compares the calls recorded in `folder`, prints a line for each, and returns the results;
/// `Err` holds what is wrong with the ones that do not pass.
fn compare(
    folder: &Path,
    backend: &dyn Backend,
    options: &Options,
    results: &mut Vec<serde_json::Value>,
) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(folder.join("calls.json")).expect("calls.json");
    let recording: Recording = serde_json::from_str(&text).expect("calls.json");
    let checkpoint = Checkpoint::open(&recording.checkpoint, None)?;
    println!("{}: {} against {}", recording.family, backend.description(), recording.device);
    println!(
        "{:28} {:>10} {:>10} {:>6} {:>9} {:>9}",
        "", "error", "published", "ratio", "s", "published"
    );
    let store = tempfile::tempdir().expect("folder");
    let stored = StoreOptions::below(store.path());
    let mut opened: Option<(Component, Box<dyn Session>)> = None;
    let mut wrong = Vec::new();
    for call in recording.calls.iter().filter(|c| c.name.contains(&options.only)) {
        let name = format!("{} {}", recording.family, call.name);
        if let Some(reason) = &call.failed {
            wrong.push(format!("{name} was not recorded: {reason}"));
            continue;
        }
        let component = component(&call.component);
        let session = match &mut opened {
            Some((open, session)) if *open == component => session,
            _ => {
                // The last component's memory must be free before there is a next one.
                opened = None;
                let weights = checkpoint.open_weights(component, &stored, &mut |_, _| Ok(()))?;
                &mut opened.insert((component, backend.open(Arc::new(weights))?)).1
            }
        };
        let file = folder.join(format!("{}.safetensors", call.name));
        let golden = Golden::open(&file).expect("a recording");
        let dtype = backend.activations();
        let mut network =
            Network { checkpoint: &checkpoint, session: &mut **session, dtype, golden: &golden };
        let ((found, seconds), expected) = network.call(component)?;
        let error = relative_error(&found, &expected);
        let ratio = error / call.bf16_error;
        println!(
            "{:28} {error:10.2e} {:10.2e} {ratio:6.3} {seconds:9.4} {:9.4}",
            call.name, call.bf16_error, call.bf16_seconds
        );
        results.push(json!({
            "family": recording.family, "call": call.name, "error": error, "ratio": ratio, "seconds": seconds,
            "published_bf16_error": call.bf16_error, "published_seconds": call.bf16_seconds,
            "published_device": recording.device,
        }));
        if ratio.is_nan() || ratio > RATIO {
            wrong.push(format!("{name}: error {error:.2e}, {ratio:.3} times that of bf16"));
        }
        if dtype == DType::F32 && error > F32_ERROR {
            wrong.push(format!("{name}: error {error:.2e} in f32"));
        }
    }
    Ok(wrong)
}

/// The first line a program writes, if it can be run.
fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_string())
}

fn main() -> ExitCode {
    let Some(folder) = std::env::var_os("PYRAFLOW_FULL_SIZE").map(PathBuf::from) else {
        println!("full_size: skipped, PYRAFLOW_FULL_SIZE names no folder of recordings");
        return ExitCode::SUCCESS;
    };
    let options = Options::read();
    let backend = backend(&options.backend).expect("backend");
    let folders = recordings(&folder);
    assert!(!folders.is_empty(), "{} holds no recordings", folder.display());
    let (mut results, mut wrong) = (Vec::new(), Vec::new());
    for folder in &folders {
        match compare(folder, &*backend, &options, &mut results) {
            Ok(found) => wrong.extend(found),
            Err(error) => wrong.push(format!("{}: {error:?}", folder.display())),
        }
    }
    if let Some(path) = &options.json {
        let gpu = ["--query-gpu=name,driver_version", "--format=csv,noheader"];
        let commit = std::env::var("PYRAFLOW_COMMIT").ok();
        let report = json!({
            "backend": backend.description(),
            "gpu_and_driver": first_line("nvidia-smi", &gpu),
            "commit": commit.or_else(|| first_line("git", &["rev-parse", "--short", "HEAD"])),
            "largest_ratio_allowed": RATIO,
            "results": results,
        });
        std::fs::write(path, format!("{report:#}\n")).expect("results");
    }
    if results.is_empty() {
        wrong.push("nothing was compared".into());
    }
    for line in &wrong {
        println!("FAILED {line}");
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
