//! `pyraflow generate`.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};

use pyraflow::checkpoint::Checkpoint;
use pyraflow::media::Format;
use pyraflow::pipeline::{Output, Pipeline, Request, read_latents};
use pyraflow::{Error, Result};

use super::args::VideoArgs;
use super::batch::{self, BatchArgs};
use super::session::{LookArgs, RunArgs, model_of};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) video: VideoArgs,

    #[command(flatten)]
    pub(super) batch: BatchArgs,

    /// A model that was pulled, such as miniflux-768p or OWNER/NAME, or the folder of a
    /// checkpoint in the published layout [default: the small built-in model]
    #[arg(long, value_name = "NAME|DIR", env = "PYRAFLOW_MODEL")]
    pub(super) model: Option<PathBuf>,

    /// Which transformer of the checkpoint: 384p, 768p or image [default: by size]
    #[arg(long, value_name = "NAME")]
    pub(super) variant: Option<String>,

    /// Where the video goes: .mp4, .png, .gif, .y4m, or - for y4m on standard output; a folder
    /// with --prompts [default: video.mp4, or the folder videos]
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,

    /// Replace an existing output
    #[arg(short = 'y', long)]
    pub(super) overwrite: bool,

    /// Seed of the noise [default: a random one, which is printed]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(super) seed: Option<u64>,

    /// Go on with an interrupted run of the same settings
    #[arg(long)]
    resume: bool,

    /// Keep the latents of all units in <FILE>.units when the video is complete
    #[arg(long)]
    pub(super) keep_units: bool,

    /// Begin with these latents, as --save-latents writes them, and go on with the prompt
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    latents: Option<PathBuf>,

    /// Write all latents to a safetensors file
    #[arg(long, value_name = "FILE")]
    save_latents: Option<PathBuf>,

    /// Write settings, device and seconds of each phase to <FILE>.json
    #[arg(long)]
    sidecar: bool,

    #[command(flatten)]
    pub(super) look: LookArgs,

    #[command(flatten)]
    pub(super) run: RunArgs,
}

/// Generates a video, or those of a file of prompts.
pub fn run(args: &Args) -> Result<()> {
    if let Some(prompts) = &args.batch.prompts {
        for (name, given) in [
            ("--resume", args.resume),
            ("--latents", args.latents.is_some()),
            ("--save-latents", args.save_latents.is_some()),
            ("--sidecar", args.sidecar),
        ] {
            if given {
                return Err(Error::usage(format!("{name} is for a single video"))
                    .hint("--prompts resumes by itself, and writes settings to its results"));
            }
        }
        return batch::run(args, prompts);
    }
    args.batch.check_single()?;
    let path = args.output.clone().unwrap_or_else(|| "video.mp4".into());
    let mut output = Output::to(&path)?;
    args.run.prepare(Some(&output.target))?;
    if (args.resume || args.keep_units) && output.units.is_none() {
        return Err(Error::usage("no units are kept of a video on standard output")
            .hint("name a file with --output to use --resume or --keep-units"));
    }
    if args.sidecar && output.units.is_none() {
        return Err(Error::usage("a video on standard output has nothing beside it")
            .hint("name a file with --output to use --sidecar"));
    }
    (output.overwrite, output.resume) = (args.overwrite, args.resume);
    output.keep_units = args.keep_units;
    output.latents.clone_from(&args.save_latents);
    output.sidecar = args.sidecar.then(|| sidecar_of(&path));
    let prompt = args.video.prompt()?;
    args.video.check_prompt(&prompt)?;
    args.look.place()?;
    let model = model_of(args.model.as_deref())?;
    let variant = model.choose(args.variant.as_deref(), args.video.variant_of_size())?;
    let checkpoint = Checkpoint::open(&model.dir, variant.as_deref())?;
    let request = request(args, &checkpoint, &prompt)?;
    // Before the weights are touched: converting them can take minutes.
    let (_, spec) = request.resolve()?;
    request.check_positions(checkpoint.transformer())?;
    output.check(&spec)?;
    args.look.check(&output)?;
    let backend = args.run.backend()?;

    let mut console = args.run.console()?;
    if args.model.is_none() {
        console.tell(
            "using the small built-in model (coloured shapes, 128x128); --model names another",
        );
    }
    console.start(&request, &path, &backend.description())?;
    let pipeline = Pipeline::open(checkpoint, backend, &args.run.store(), &mut console)?;
    args.look.prepare(None, &pipeline, &mut output, &mut console)?;
    let timings = pipeline.generate(&request, &output, &mut console)?;
    console.done(&path, &spec, &timings, pipeline.backend().first_run())
}

fn request(args: &Args, checkpoint: &Checkpoint, prompt: &str) -> Result<Request> {
    let mut request = Request::new(checkpoint, prompt, args.video.first_image());
    args.video.apply(&mut request, checkpoint.variant())?;
    request.seed = args.seed.unwrap_or_else(random_seed);
    if let Some(path) = &args.latents {
        // A video goes on in its own size.
        let file = read_latents(path)?;
        if let (Some(latent), None) = (file.units.first(), args.video.size) {
            (request.width, request.height) =
                (latent.shape().width as u32 * 8, latent.shape().height as u32 * 8);
            args.video.check_trained(&request, checkpoint.variant())?;
        }
        request.latents = Some(path.clone());
    }
    Ok(request)
}

/// `out.mp4.json`.
fn sidecar_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".json");
    name.into()
}

/// Formats by name, for `--format`.
pub(super) fn format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| "expected mp4, png, gif or y4m".into())
}

/// A seed that differs from run to run: the standard library's hash keys are random.
fn random_seed() -> u64 {
    // Short enough to be typed again.
    RandomState::new().build_hasher().finish() % 1_000_000_000
}
