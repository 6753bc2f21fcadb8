//! `pyraflow plan`.

use std::path::{Path, PathBuf};

use pyraflow::Result;
use pyraflow::checkpoint::{Checkpoint, Family, Variant};
use pyraflow::exec::Cpu;
use pyraflow::hub::PublishedModel;
use pyraflow::pipeline::{Networks, PhasePlan, Request, plan};
use serde_json::json;

use super::args::VideoArgs;
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
    let phases = plan(&networks, &request, &Cpu::new())?;
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
