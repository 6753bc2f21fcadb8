//! `pyraflow plan`.

use std::path::{Path, PathBuf};

use pyraflow::checkpoint::{Checkpoint, Family, Variant};
use pyraflow::exec::Cpu;
use pyraflow::pipeline::{Networks, PhasePlan, Request, plan};
use pyraflow::{Error, Result};
use serde_json::json;

use super::args::{VideoArgs, choose_variant};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    video: VideoArgs,

    /// A checkpoint folder, or the name of a published model: sd3-384p, sd3-768p,
    /// miniflux-384p, miniflux-768p or miniflux-image
    #[arg(long, value_name = "DIR|NAME")]
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
    args.video.apply(&mut request)?;
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
    if let Some((family, variant)) = model.to_str().and_then(published) {
        return Ok((Networks::published(family), family, variant));
    }
    if !model.exists() {
        let error = format!("there is no checkpoint {}", model.display());
        return Err(Error::model(error).hint(
            "name a folder, or one of sd3-384p, sd3-768p, miniflux-384p, miniflux-768p and \
             miniflux-image",
        ));
    }
    let variant = choose_variant(model, variant, video.variant_of_size());
    let checkpoint = Checkpoint::open(model, variant.as_deref())?;
    Ok((Networks::of(&checkpoint)?, checkpoint.family(), checkpoint.variant()))
}

fn published(name: &str) -> Option<(Family, Variant)> {
    let (family, variant) = name.split_once('-')?;
    let family = match family {
        "sd3" => Family::Sd3,
        "miniflux" => Family::Miniflux,
        _ => return None,
    };
    let variant = Variant::from_name(variant)?;
    let exists = match variant {
        Variant::P128 => false,
        Variant::Image => family == Family::Miniflux,
        Variant::P384 | Variant::P768 => true,
    };
    exists.then_some((family, variant))
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
