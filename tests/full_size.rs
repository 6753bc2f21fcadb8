//! Checkpoints of the published size against recordings of the published implementation:
//! our results must be about as near to its f32 as its own bf16 is. A whole run is held to that
//! of the published pipeline in bf16, and to that of its calls in bf16 with latents and
//! timesteps in f32 around them, as ours are.
//!
//! `PYRAFLOW_FULL_SIZE` names a folder that `tools/published_calls.py` wrote, or one that
//! holds several of them; the checkpoints must still lie where they were. Options, after
//! `cargo test --release --test full_size --`: `--json FILE` writes the results,
//! `--only TEXT` runs the calls whose names contain it, `--backend cuda|own|generic|cpu|cpu-bf16`.

#[path = "full_size/calls.rs"]
mod calls;
mod common;
#[path = "full_size/runs.rs"]
mod runs;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use calls::Network;
use common::golden::{Golden, relative_error};
use common::runs::WHOLE_RUN;
use pyraflow::Result;
use pyraflow::checkpoint::{Checkpoint, Component, StoreOptions};
use pyraflow::exec::cuda::Gemm;
use pyraflow::exec::{Backend, Cpu, Cuda, Session};
use pyraflow::tensor::{DType, WeightSource};
use serde::Deserialize;
use serde_json::{Value, json};

/// Our error may be this many times that of the published implementation in bf16.
const RATIO: f64 = 1.25;
/// Relative error allowed to single calls where activations are f32; whole runs have
/// [`WHOLE_RUN`].
const F32_ERROR: f64 = 1e-5;

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
    /// Those of the units of a whole run.
    bf16_unit_errors: Option<Vec<f64>>,
    /// That of a whole run with f32 around the calls, as ours are.
    bf16_calls_error: Option<f64>,
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

/// A component with its weights, and a session on them while single calls go on.
struct Opened {
    component: Component,
    weights: Arc<dyn WeightSource>,
    session: Option<Box<dyn Session>>,
}

/// What a backend made of a recorded call or run, and what it should be.
struct Repeated {
    found: Vec<f32>,
    expected: Vec<f32>,
    /// Of the call; of a run from embeddings to latents, with weights on the device.
    seconds: f64,
    /// Settings and the error of each unit, of a whole run alone.
    run: Option<Value>,
    /// Whether a run that was repeated gave the same latents.
    same_bits: bool,
}

/// A checkpoint on the backend under test, one component at a time.
struct Subject<'a> {
    checkpoint: Checkpoint,
    backend: &'a dyn Backend,
    store: StoreOptions,
    opened: Option<Opened>,
}

impl Subject<'_> {
    fn repeat(&mut self, component: Component, golden: &Golden) -> Result<Repeated> {
        let Subject { checkpoint, backend, store, opened } = self;
        let current = match opened.take() {
            Some(current) if current.component == component => current,
            other => {
                // The last component's memory must be free before there is a next one.
                drop(other);
                let weights = checkpoint.open_weights(component, store, &mut |_, _| Ok(()))?;
                Opened { component, weights: Arc::new(weights), session: None }
            }
        };
        let current = opened.insert(current);
        if runs::is_run(golden) {
            // A run has a session of its own.
            current.session = None;
            return runs::repeat(golden, checkpoint, &current.weights, *backend);
        }
        let session = match &mut current.session {
            Some(session) => session,
            none => none.insert(backend.open(current.weights.clone())?),
        };
        let dtype = backend.activations();
        let mut network = Network { checkpoint, session: &mut **session, dtype, golden };
        let ((found, seconds), expected) = network.call(component)?;
        Ok(Repeated { found, expected, seconds, run: None, same_bits: true })
    }
}

/// Compares the calls recorded in `folder`, prints a line for each, adds it to `results` and
/// returns what is wrong with the ones that do not pass.
fn compare(
    folder: &Path,
    backend: &dyn Backend,
    options: &Options,
    results: &mut Vec<Value>,
) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(folder.join("calls.json")).expect("calls.json");
    let recording: Recording = serde_json::from_str(&text).expect("calls.json");
    let checkpoint = Checkpoint::open(&recording.checkpoint, None)?;
    println!("{}: {} against {}", recording.family, backend.description(), recording.device);
    println!(
        "{:28} {:>10} {:>10} {:>6} {:>9} {:>9}",
        "", "error", "published", "ratio", "s", "published"
    );
    let folder_of_store = tempfile::tempdir().expect("folder");
    let store = StoreOptions::below(folder_of_store.path());
    let mut subject = Subject { checkpoint, backend, store, opened: None };
    let mut wrong = Vec::new();
    for call in recording.calls.iter().filter(|c| c.name.contains(&options.only)) {
        let name = format!("{} {}", recording.family, call.name);
        if let Some(reason) = &call.failed {
            wrong.push(format!("{name} was not recorded: {reason}"));
            continue;
        }
        let file = folder.join(format!("{}.safetensors", call.name));
        let golden = Golden::open(&file).expect("a recording");
        let repeated = subject.repeat(component(&call.component), &golden)?;
        let error = relative_error(&repeated.found, &repeated.expected);
        let (ratio, seconds) = (error / call.bf16_error, repeated.seconds);
        println!(
            "{:28} {error:10.2e} {:10.2e} {ratio:6.3} {seconds:9.4} {:9.4}",
            call.name, call.bf16_error, call.bf16_seconds
        );
        let mut result = json!({
            "family": recording.family, "call": call.name, "error": error, "ratio": ratio, "seconds": seconds,
            "published_bf16_error": call.bf16_error, "published_seconds": call.bf16_seconds,
            "published_device": recording.device,
        });
        let (mut ratios, mut bound) = (vec![("bf16", ratio)], F32_ERROR);
        if let Some(mut run) = repeated.run {
            let calls_error = call.bf16_calls_error.expect("recorded of every run");
            let calls_ratio = error / calls_error;
            println!(
                "{:28} {:>10} {calls_error:10.2e} {calls_ratio:6.3}",
                "  beside its calls in bf16", ""
            );
            run["published_unit_errors"] = json!(call.bf16_unit_errors);
            run["published_calls_error"] = json!(calls_error);
            run["calls_ratio"] = json!(calls_ratio);
            result["run"] = run;
            ratios.push(("its calls in bf16", calls_ratio));
            bound = WHOLE_RUN;
        }
        results.push(result);
        for (of, ratio) in ratios.into_iter().filter(|(_, r)| r.is_nan() || *r > RATIO) {
            wrong.push(format!("{name}: error {error:.2e}, {ratio:.3} times that of {of}"));
        }
        if backend.activations() == DType::F32 && error > bound {
            wrong.push(format!("{name}: error {error:.2e} in f32"));
        }
        if !repeated.same_bits {
            wrong.push(format!("{name}: another repetition gave other bits"));
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
