//! What the commands that run networks have in common: the checkpoint, the device, and what is
//! said and shown.

use std::path::{Path, PathBuf};

use pyraflow::checkpoint::{Checkpoint, StoreOptions, Variant};
use pyraflow::exec::Backend;
use pyraflow::media::{Format, OutputTarget};
use pyraflow::pipeline::{Output, Pipeline, State};
use pyraflow::{Error, Result};

use super::device::{Device, MemoryArgs, open_backend};
use super::model::{Located, locate};
use super::preview::{Place, Preview};
use super::progress::{Console, Mode};

/// Most threads that can be asked for: more than any machine has cores, few enough to start
/// at once.
const MAX_THREADS: usize = 1024;

/// Where a command runs and how it reports.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,

    #[command(flatten)]
    memory: MemoryArgs,

    /// CPU threads [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Folder for weights converted to bf16 [default: .pyraflow in the checkpoint, else the
    /// user's cache]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    #[command(flatten)]
    report: ReportArgs,
}

/// How a command reports.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// Print events as JSON lines on standard output instead of progress
    #[arg(long)]
    json: bool,

    /// What is written on standard error: text, or the events of --json, warnings and errors as
    /// JSON lines
    #[arg(long, value_name = "FORM", value_enum, default_value = "text", conflicts_with = "json")]
    log: Log,

    /// Print nothing but errors and warnings
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
}

/// The form of what is written on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Log {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl ReportArgs {
    /// Makes errors from here on appear as asked, and says how to report.
    pub fn mode(&self) -> Mode {
        if self.log == Log::Json {
            super::report_errors_as_json();
        }
        match (self.json, self.log, self.quiet) {
            (true, _, _) => Mode::Json,
            (_, Log::Json, _) => Mode::Log,
            (_, _, true) => Mode::Quiet,
            _ => Mode::People,
        }
    }
}

impl RunArgs {
    /// Makes errors from here on appear as asked, and sets the number of threads.
    pub fn prepare(&self, output: Option<&OutputTarget>) -> Result<()> {
        if self.report.mode() == Mode::Json && output == Some(&OutputTarget::Stdout) {
            return Err(Error::usage("--json and the video cannot both go to standard output"));
        }
        let Some(threads) = self.threads else { return Ok(()) };
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(Error::usage(format!("cannot use {threads} threads"))
                .hint(format!("ask for 1 to {MAX_THREADS}")));
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| Error::usage(format!("cannot use {threads} threads")).because(e))
    }

    /// Opens the device.
    pub fn backend(&self) -> Result<Box<dyn Backend>> {
        open_backend(self.device, &self.memory)
    }

    /// Opens the console.
    pub fn console(&self) -> Result<Console> {
        Console::new(self.report.mode())
    }

    /// Where converted weights go.
    pub fn store(&self) -> StoreOptions {
        self.store.as_ref().map_or_else(StoreOptions::default, StoreOptions::below)
    }
}

/// What can be seen of a video before it is complete.
#[derive(Debug, clap::Args)]
pub struct LookArgs {
    /// Show every stage as a small picture of its latents: as PNG files in a folder, or on the
    /// terminal
    #[arg(long, value_name = "DIR|terminal")]
    pub preview: Option<PathBuf>,

    /// Show the last frame of every finished unit in the preview, too: units are decoded as soon
    /// as they are sampled, to the same video
    #[arg(long, requires = "preview")]
    pub preview_frames: bool,

    /// Let the video be watched while it is made: <FILE>.live.mp4 grows beside an MP4 until that
    /// is complete; y4m on standard output comes unit by unit
    #[arg(long)]
    pub follow: bool,
}

impl LookArgs {
    /// Sets up `output` and the previews of `console`; an unknown VAE has no map to colours, so
    /// that its units are decoded to find one.
    pub fn prepare(
        &self,
        folder: Option<&str>,
        pipeline: &Pipeline,
        output: &mut Output,
        console: &mut Console,
    ) -> Result<()> {
        (output.follow, output.early) = (self.follow, self.follow || self.preview_frames);
        let Some(place) = self.place()? else { return Ok(()) };
        output.early |= pipeline.latent_rgb().is_none();
        let place = match (place, folder) {
            (Place::Folder(parent), Some(name)) => Place::Folder(parent.join(name)),
            (place, _) => place,
        };
        console.show_previews(Some(Preview::new(place, pipeline)?));
        Ok(())
    }

    /// Refuses what cannot be watched, before anything is computed.
    pub fn check(&self, output: &Output) -> Result<()> {
        let mp4 = matches!(&output.target, OutputTarget::File { format: Format::Mp4, .. });
        if self.follow && !mp4 && output.target != OutputTarget::Stdout {
            return Err(Error::usage("this format cannot be watched while it is written")
                .hint("use --follow with an .mp4 file, or with - for y4m on a pipe"));
        }
        Ok(())
    }

    /// Where previews go.
    pub fn place(&self) -> Result<Option<Place>> {
        self.preview.as_deref().map(Place::parse).transpose()
    }
}

/// The checkpoint that was named, or the built-in model.
pub fn model_of(named: Option<&Path>) -> Result<Located> {
    match named {
        Some(model) => locate(model),
        None => Ok(Located::folder(pyraflow::demo::folder()?)),
    }
}

/// Opens the checkpoint that a state was made with: the one named, else where it was then, else
/// the built-in one if it was that.
pub fn checkpoint_of(state: &State, named: Option<&Path>) -> Result<Checkpoint> {
    let variant = state.model().map(|(_, variant)| variant);
    let there = || state.checkpoint().filter(|folder| folder.is_dir());
    let model = match (named, there()) {
        (Some(model), _) => locate(model)?,
        (None, Some(folder)) => Located::folder(folder),
        (None, None) if variant == Some(Variant::P128) => model_of(None)?,
        (None, None) => {
            return Err(Error::model("the checkpoint these latents were made with is not known")
                .hint("name it: --model NAME or DIR"));
        }
    };
    let chosen = match (variant, model.variant()) {
        (Some(made), Some(named)) if made != named => {
            return Err(Error::input(format!(
                "these latents were made with the {made} model, not with the {named} one"
            ))
            .hint("name the model they were made with, or none"));
        }
        (made, named) => made.or(named),
    };
    Checkpoint::open(&model.dir, chosen.map(Variant::name))
}

/// Where the video of a state goes: to what was named, else beside the state's units.
pub fn output_of(state: &State, named: Option<&Path>) -> Result<Output> {
    match named.map(PathBuf::from).or_else(|| state.video()) {
        Some(path) => Output::to(&path),
        None => Err(Error::usage("where should the video go?").hint("name it: -o FILE")),
    }
}
