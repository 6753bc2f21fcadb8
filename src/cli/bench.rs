//! `pyraflow bench`.

use std::path::PathBuf;

use pyraflow::checkpoint::{Checkpoint, StoreOptions};
use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cpu, anonymous_memory};
use pyraflow::pipeline::{
    Ceilings, Measured, Networks, PhaseTime, Quiet, Request, Weights, WeightsOf, measure,
    random_weights,
};
use pyraflow::{Error, Result};
use serde_json::{Value, json};

use super::args::VideoArgs;
use super::device::{Device, MemoryArgs, open_gpu, rate};
use super::model::locate;
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

    /// Read the weights of the checkpoint, instead of using random ones
    #[arg(long)]
    weights: bool,

    #[command(flatten)]
    memory: MemoryArgs,

    /// Slow copies between host and GPU down to so many GB/s each way, as a slower bus would
    #[arg(long, value_name = "GB/S", value_parser = rate)]
    link: Option<f64>,

    /// Make so many clips one after the other, and tell the memory after each
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clips: u32,

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
    let backend = backend(args)?;
    super::say(&format!(
        "{family}, {}x{}, {} latent frames, {} weights, on {}",
        request.width,
        request.height,
        request.units,
        if args.weights { "the checkpoint's" } else { "random" },
        backend.description()
    ));
    super::say(&phase_line("phase", "seconds", "loading", "TFLOP/s", "memory GiB"));
    let done = |phase: &PhaseTime| super::say(&line_of(phase));
    let weights = weights(args, &networks)?;
    let ceilings = Ceilings::measure(&*backend)?;
    let measured = measure(&networks, &weights, &request, &*backend, ceilings, done)?;
    super::print(&table(&measured))?;
    let mut memory = vec![clip_memory(&*backend)];
    for _ in 1..args.clips {
        let again = measure(&networks, &weights, &request, &*backend, ceilings, |_| ())?;
        if again.digest != measured.digest {
            return Err(Error::numeric("the same clip came out otherwise the second time"));
        }
        memory.push(clip_memory(&*backend));
    }
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
        "weights": if args.weights { "checkpoint" } else { "random" },
        "max_vram": args.memory.max_vram.map(|size| size.0),
        "max_host": args.memory.max_host.map(|size| size.0),
        "link_gbytes_per_second": args.link,
        "steps": request.steps,
        "video_steps": request.video_steps,
        "guidance": request.guidance,
        "measured": measured,
        "memory_after_clips": memory,
    });
    std::fs::write(path, format!("{report:#}\n")).map_err(|e| Error::io("cannot write", path, e))
}

/// The weights of the checkpoint, or random ones.
fn weights(args: &Args, networks: &Networks) -> Result<Box<WeightsOf<'static>>> {
    if !args.weights {
        return Ok(Box::new(random_weights(networks)));
    }
    let by_size = args.video.variant_of_size();
    let model = locate(&args.model)?;
    let variant = model.choose(args.variant.as_deref(), by_size)?;
    let checkpoint = Checkpoint::open(&model.dir, variant.as_deref())?;
    let wanted = checkpoint.family().components();
    let weights = Weights::open(&checkpoint, wanted, &StoreOptions::default(), &mut Quiet)?;
    Ok(Box::new(move |component| weights.get(component)))
}

/// What is still free on the device, and what the process holds of the host's memory.
fn clip_memory(backend: &dyn Backend) -> Value {
    json!({ "device_free": backend.free_memory(), "host_anonymous": anonymous_memory() })
}

/// The device, with at most the memory and on a bus as slow as asked for.
fn backend(args: &Args) -> Result<Box<dyn Backend>> {
    let Some(gpu) = open_gpu(args.device)? else { return Ok(Box::new(Cpu::new())) };
    let mut gpu = args.memory.limit(gpu);
    if let Some(link) = args.link {
        gpu = gpu.with_link(link * 1e9)?;
    }
    Ok(Box::new(gpu))
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
    if let Some(Ceilings { flops, bytes }) = measured.ceilings {
        let (flops, bytes) = (flops / 1e12, bytes / 1e9);
        text += &format!("\nfloors: a large product {flops:.0} TFLOP/s, a copy {bytes:.0} GB/s\n");
    }
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
        let bytes = format!("{:.0} GB/s", op.bytes as f64 / op.seconds / 1e9);
        let share =
            op.floor.map(|floor| format!("{:.0}% of its floor", 100.0 * floor / op.seconds));
        text += &format!(
            "  {:<22}{:>5}{:>10.3} ms {rate:>13}{bytes:>12}  {}\n",
            op.op,
            op.nodes,
            op.seconds * 1e3,
            share.unwrap_or_default()
        );
    }
    text
}
