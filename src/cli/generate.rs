//! `pyraflow generate`.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;

use pyraflow::checkpoint::{Checkpoint, StoreOptions};
use pyraflow::media::OutputTarget;
use pyraflow::pipeline::{Output, Pipeline, Request};
use pyraflow::{Error, Result};

use super::args::VideoArgs;
use super::device::{Device, open_backend};
use super::model::{Located, locate};
use super::progress::{Console, Mode};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    video: VideoArgs,

    /// A model that was pulled, such as miniflux-768p or OWNER/NAME, or the folder of a
    /// checkpoint in the published layout [default: the small built-in model]
    #[arg(long, value_name = "NAME|DIR", env = "PYRAFLOW_MODEL")]
    model: Option<PathBuf>,

    /// Which transformer of the checkpoint: 384p, 768p or image [default: by size]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,

    /// Where the video goes: .mp4, .png, .gif, .y4m, or - for y4m on standard output
    #[arg(short, long, value_name = "FILE", default_value = "video.mp4")]
    output: PathBuf,

    /// Replace an existing output
    #[arg(short = 'y', long)]
    overwrite: bool,

    /// Seed of the noise [default: a random one, which is printed]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,

    /// Go on with an interrupted run of the same settings
    #[arg(long)]
    resume: bool,

    /// Keep the latents of all units in <FILE>.units when the video is complete
    #[arg(long)]
    keep_units: bool,

    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,

    /// CPU threads [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Folder for weights converted to bf16 [default: .pyraflow in the checkpoint, else the
    /// user's cache]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Print events as JSON lines on standard output instead of progress
    #[arg(long)]
    json: bool,

    /// Print nothing but errors and warnings
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
}

/// Most threads that can be asked for: more than any machine has cores, few enough to start
/// at once.
const MAX_THREADS: usize = 1024;

/// Generates a video.
pub fn run(args: Args) -> Result<()> {
    let mut output = Output::to(&args.output)?;
    if args.json && output.target == OutputTarget::Stdout {
        return Err(Error::usage("--json and the video cannot both go to standard output"));
    }
    if (args.resume || args.keep_units) && output.units.is_none() {
        return Err(Error::usage("no units are kept of a video on standard output")
            .hint("name a file with --output to use --resume or --keep-units"));
    }
    (output.overwrite, output.resume) = (args.overwrite, args.resume);
    output.keep_units = args.keep_units;
    if let Some(threads) = args.threads {
        set_threads(threads)?;
    }
    let prompt = args.video.prompt()?;
    if prompt.trim().is_empty() && args.video.image.is_none() {
        return Err(Error::input("there is no prompt")
            .hint("say what to show, as in: pyraflow generate \"a fox runs through snow\""));
    }
    let model = match &args.model {
        Some(model) => locate(model)?,
        None => Located::folder(pyraflow::demo::folder()?),
    };
    let variant = model.choose(args.variant.as_deref(), args.video.variant_of_size())?;
    let checkpoint = Checkpoint::open(&model.dir, variant.as_deref())?;
    let mut request = Request::new(&checkpoint, &prompt, args.video.first_image());
    args.video.apply(&mut request, checkpoint.variant())?;
    request.seed = args.seed.unwrap_or_else(random_seed);
    // Before the weights are touched: converting them can take minutes.
    let (_, spec) = request.resolve()?;
    request.check_positions(checkpoint.transformer())?;
    pyraflow::media::check_target(&output.target, &spec, output.overwrite)?;
    let backend = open_backend(args.device)?;

    let mode = match (args.json, args.quiet) {
        (true, _) => Mode::Json,
        (_, true) => Mode::Quiet,
        _ => Mode::People,
    };
    let mut console = Console::new(mode)?;
    if args.model.is_none() && mode == Mode::People {
        super::say(
            "using the small built-in model (coloured shapes, 128x128); --model names another",
        );
    }
    console.start(&request, &args.output, &backend.description())?;
    let store = args.store.map_or_else(StoreOptions::default, StoreOptions::below);
    let pipeline = Pipeline::open(checkpoint, backend, &store, &mut console)?;
    let timings = pipeline.generate(&request, &output, &mut console)?;
    console.done(&args.output, &spec, &timings)
}

fn set_threads(threads: usize) -> Result<()> {
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Error::usage(format!("cannot use {threads} threads"))
            .hint(format!("ask for 1 to {MAX_THREADS}")));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Error::usage(format!("cannot use {threads} threads")).because(e))
}

/// A seed that differs from run to run: the standard library's hash keys are random.
fn random_seed() -> u64 {
    // Short enough to be typed again.
    RandomState::new().build_hasher().finish() % 1_000_000_000
}
