//! `pyraflow bench`.

use std::path::PathBuf;

use pyraflow::exec::cuda::probe;
use pyraflow::pipeline::{Measured, PhaseTime, Request, measure};
use pyraflow::{Error, Result};
use serde_json::json;

use super::args::VideoArgs;
use super::device::{Device, open_backend};
use super::plan::networks;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    video: VideoArgs,

    /// Which sizes: a published model (sd3-384p, sd3-768p, miniflux-384p, miniflux-768p or
    /// miniflux-image), or a checkpoint folder, of which only the configurations are read
    #[arg(long, value_name = "NAME|DIR")]
    model: PathBuf,

    /// Which transformer of the checkpoint: 384p, 768p or image [default: by size]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,

    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,

    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures a run with random weights.
pub fn run(args: &Args) -> Result<()> {
    if args.video.first_image().is_some() {
        return Err(Error::usage("bench measures text to video; leave --image out"));
    }
    let (networks, family, variant) = networks(&args.model, args.variant.as_deref(), &args.video)?;
    let mut request = Request::published(family, variant, &args.video.prompt()?, None);
    args.video.apply(&mut request, variant)?;
    let backend = open_backend(args.device)?;
    super::say(&format!(
        "{family}, {}x{}, {} latent frames, random weights, on {}",
        request.width,
        request.height,
        request.units,
        backend.description()
    ));
    super::say(&phase_line("phase", "seconds", "loading", "TFLOP/s", "memory GiB"));
    let measured = measure(&networks, &request, &*backend, |phase| super::say(&line_of(phase)))?;
    super::print(&table(&measured))?;
    let Some(path) = &args.json else { return Ok(()) };
    let report = json!({
        "pyraflow": env!("CARGO_PKG_VERSION"),
        "commit": std::env::var("PYRAFLOW_COMMIT").ok(),
        "device": backend.description(),
        "driver": probe::probe().driver.and_then(|d| d.version),
        "family": family,
        "variant": variant,
        "width": request.width,
        "height": request.height,
        "units": request.units,
        "steps": request.steps,
        "video_steps": request.video_steps,
        "guidance": request.guidance,
        "measured": measured,
    });
    std::fs::write(path, format!("{report:#}\n")).map_err(|e| Error::io("cannot write", path, e))
}

fn phase_line(name: &str, seconds: &str, loading: &str, rate: &str, memory: &str) -> String {
    format!("{name:<10}{seconds:>10}{loading:>10}{rate:>10}{memory:>12}")
}

fn line_of(phase: &PhaseTime) -> String {
    let memory = phase.memory.map(|bytes| format!("{:.1}", bytes as f64 / f64::from(1 << 30)));
    phase_line(
        phase.name,
        &format!("{:.2}", phase.seconds),
        &format!("{:.2}", phase.loading),
        &format!("{:.0}", phase.flops as f64 / phase.seconds / 1e12),
        &memory.unwrap_or_default(),
    )
}

/// What the ops take, graph by graph.
fn table(measured: &Measured) -> String {
    let mut text = String::new();
    let mut graph = "";
    for op in &measured.ops {
        if op.graph != graph {
            graph = &op.graph;
            let whole: f64 =
                measured.ops.iter().filter(|o| o.graph == graph).map(|o| o.seconds).sum();
            text += &format!("\n{graph}: {:.2} ms\n", whole * 1e3);
        }
        let rate = match op.flops {
            0 => String::new(),
            flops => format!("{:.0} TFLOP/s", flops as f64 / op.seconds / 1e12),
        };
        text += &format!("  {:<22}{:>5}{:>10.3} ms  {rate}\n", op.op, op.nodes, op.seconds * 1e3);
    }
    text
}
