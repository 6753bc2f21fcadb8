//! `pyraflow plan`.

use std::path::{Path, PathBuf};

use pyraflow::checkpoint::{Checkpoint, Family, Variant};
use pyraflow::exec::{CONTEXT_BYTES, Cpu, ImaginedGpu, PROCESS_BYTES, lockable};
use pyraflow::hub::PublishedModel;
use pyraflow::pipeline::{Machine, Networks, PhasePlan, Request, plan};
use pyraflow::{Error, Result};
use serde_json::json;

use super::args::VideoArgs;
use super::device::{ByteSize, rate};
use super::model::{locate, wrong_variant};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    video: VideoArgs,

    /// The name of a published model, which need not be there: sd3-384p, sd3-768p,
    /// miniflux-384p, miniflux-768p or miniflux-image; or another model that was pulled, or
    /// a checkpoint folder
    #[arg(long, value_name = "NAME|DIR")]
    model: PathBuf,

    /// Which transformer of the checkpoint: 384p, 768p or image [default: by size]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,

    /// Plan for a GPU of which so much memory may be used, such as 8G, instead of the CPU
    #[arg(long, value_name = "SIZE")]
    max_vram: Option<ByteSize>,

    /// With --max-vram: most memory of the host to use, such as 4G, mapped files not counted;
    /// what fits into neither is in a file [default: as much as is needed]
    #[arg(long, value_name = "SIZE")]
    max_host: Option<ByteSize>,

    /// For the times: GB/s between host and GPU, each way (PCIe 4.0 x16 gives about 25)
    #[arg(long, value_name = "GB/S", value_parser = rate, default_value = "25")]
    link: f64,

    /// For the times: GB/s of the disk with the file for what fits into no memory, each way
    #[arg(long, value_name = "GB/S", value_parser = rate, default_value = "2")]
    disk: f64,

    /// For the times: TFLOP/s of bf16 matrix products that the GPU reaches
    #[arg(long, value_name = "TFLOP/S", value_parser = rate, default_value = "60")]
    tflops: f64,

    /// For the times: GB/s of the GPU's memory
    #[arg(long, value_name = "GB/S", value_parser = rate, default_value = "400")]
    bandwidth: f64,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows what a run takes.
pub fn run(args: &Args) -> Result<()> {
    let (networks, family, variant) = networks(&args.model, args.variant.as_deref(), &args.video)?;
    let image = args.video.first_image();
    let mut request = Request::published(family, variant, &args.video.prompt()?, image);
    args.video.apply(&mut request, variant)?;
    if let Some(ByteSize(limit)) = args.max_vram {
        return for_gpu(args, &networks, &request, limit);
    }
    if args.max_host.is_some() {
        return Err(Error::usage("--max-host limits what a GPU keeps in memory of the host")
            .hint("add --max-vram SIZE, the memory of the GPU to plan for"));
    }
    let phases = plan(&networks, &request, &Cpu::new(), None)?;
    super::print(&if args.json {
        let plan = json!({
            "width": request.width, "height": request.height, "units": request.units,
            "phases": phases,
        });
        format!("{plan:#}\n")
    } else {
        table(&request, &phases)
    })
}

/// Shows what a run takes on a GPU of which `limit` bytes may be used.
fn for_gpu(args: &Args, networks: &Networks, request: &Request, limit: u64) -> Result<()> {
    let machine = Machine {
        flops: args.tflops * 1e12,
        memory: args.bandwidth * 1e9,
        link: args.link * 1e9,
        disk: args.disk * 1e9,
    };
    let host = args.max_host.map(|size| lockable(size.0));
    // What is planned for no memory at all is the smallest there is.
    let smallest = plan(networks, request, &ImaginedGpu { memory: 0, host }, None)?;
    let most = |bytes: fn(&PhasePlan) -> u64| smallest.iter().map(bytes).max().unwrap_or(0);
    let smallest_gpu = CONTEXT_BYTES + most(|phase| phase.device_bytes);
    if smallest_gpu > limit {
        let less = "; a smaller or shorter one, or --tile, takes less";
        return Err(too_little("GPU", limit, "--max-vram", smallest_gpu, less));
    }
    let gpu = ImaginedGpu { memory: limit - CONTEXT_BYTES, host };
    let phases = plan(networks, request, &gpu, Some(&machine))?;
    let pinned = phases.iter().map(|phase| phase.pinned_bytes).max().unwrap_or(0);
    if let Some(ByteSize(limit)) = args.max_host.filter(|_| host.is_some_and(|h| h < pinned)) {
        // All that can wait in the file does.
        return Err(too_little("host", limit, "--max-host", PROCESS_BYTES + pinned, ""));
    }
    super::print(&if args.json {
        let plan = json!({
            "width": request.width, "height": request.height, "units": request.units,
            "max_vram": limit, "max_host": args.max_host.map(|size| size.0),
            "context_bytes": CONTEXT_BYTES, "smallest_max_vram": smallest_gpu,
            "machine": machine, "phases": phases,
        });
        format!("{plan:#}\n")
    } else {
        gpu_table(request, &phases, &machine, smallest_gpu)
    })
}

/// So many bytes of a memory that `option` limits are too little.
fn too_little(which: &str, limit: u64, option: &str, smallest: u64, more: &str) -> Error {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Error::memory(format!("{:.2} GiB of {which} memory are too little", gib(limit))).hint(format!(
        "the smallest {option} for this video is {:.2}G{more}",
        (gib(smallest) * 100.0).ceil() / 100.0
    ))
}

/// The networks of a checkpoint folder, or those of a published model by name.
pub(super) fn networks(
    model: &Path,
    variant: Option<&str>,
    video: &VideoArgs,
) -> Result<(Networks, Family, Variant)> {
    if let Some(model) = model.to_str().and_then(PublishedModel::from_name) {
        let PublishedModel { family, variant: own } = model;
        if let Some(other) = variant.filter(|other| *other != own.name()) {
            return Err(wrong_variant(&model, other));
        }
        return Ok((Networks::published(family), family, own));
    }
    let model = locate(model)?;
    let variant = model.choose(variant, video.variant_of_size())?;
    let checkpoint = Checkpoint::open(&model.dir, variant.as_deref())?;
    Ok((Networks::of(&checkpoint)?, checkpoint.family(), checkpoint.variant()))
}

fn gpu_table(request: &Request, phases: &[PhasePlan], machine: &Machine, smallest: u64) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let mut text = format!(
        "{}x{}, {} latent frames; times for {} GB/s between host and GPU, {} TFLOP/s, {} GB/s of \
         GPU memory\n\n{:<10}{:>10}{:>13}{:>12}{:>13}{:>14}{:>10}{:>11}\n",
        request.width,
        request.height,
        request.units,
        machine.link / 1e9,
        machine.flops / 1e12,
        machine.memory / 1e9,
        "phase",
        "GPU GiB",
        "weights GiB",
        "pinned GiB",
        "scratch GiB",
        "streamed GiB",
        "seconds",
        "slow-down"
    );
    for phase in phases {
        let predicted = phase.predicted.unwrap_or_default();
        text += &format!(
            "{:<10}{:>10.2}{:>13.2}{:>12.2}{:>13.2}{:>14.1}{:>10.1}{:>11.2}\n",
            phase.name,
            gib(CONTEXT_BYTES + phase.device_bytes),
            gib(phase.resident_bytes),
            gib(phase.pinned_bytes),
            gib(phase.scratch_bytes),
            gib(phase.streamed_bytes),
            predicted.seconds,
            predicted.seconds / predicted.resident_seconds.max(f64::MIN_POSITIVE)
        );
    }
    text + &format!(
        "\nGPU: peak, with {:.2} GiB for the driver's context; weights: those that stay on the \
         GPU;\npinned: page-locked host memory; scratch: the file for what fits into no memory, at \
         {} GB/s;\nstreamed: from the host over the whole phase; slow-down: against a GPU with room \
         for\neverything. The smallest --max-vram is {:.2}G.\n",
        gib(CONTEXT_BYTES),
        machine.disk / 1e9,
        (gib(smallest) * 100.0).ceil() / 100.0
    )
}

fn table(request: &Request, phases: &[PhasePlan]) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut text = format!(
        "{}x{}, {} latent frames; activations in f32, as on the CPU\n\n",
        request.width, request.height, request.units
    );
    text += &format!(
        "{:<10}{:>12}{:>14}{:>12}{:>14}{:>12}\n",
        "phase", "arena MiB", "unshared MiB", "inputs MiB", "weights MiB", "TFLOP"
    );
    for phase in phases {
        text += &format!(
            "{:<10}{:>12.1}{:>14.1}{:>12.1}{:>14.1}{:>12.3}\n",
            phase.name,
            mib(phase.arena_bytes),
            mib(phase.unshared_bytes),
            mib(phase.persistent_bytes),
            mib(phase.weight_bytes),
            phase.flops as f64 / 1e12
        );
    }
    text + "\narena: peak of all intermediates; unshared: the same without reuse of memory;\n\
            inputs: with constants and carried frames; weights: in bf16\n"
}
