//! `pyraflow extend` and `pyraflow decode`: from what was saved of a run.

use std::path::PathBuf;

use pyraflow::checkpoint::Checkpoint;
use pyraflow::pipeline::{Output, Pipeline, Request, State, Tiling};
use pyraflow::{Error, Result};

use super::args::Length;
use super::session::{LookArgs, RunArgs, checkpoint_of, output_of};

/// What both commands are told.
#[derive(Debug, clap::Args)]
pub struct StateArgs {
    /// What was saved: a folder of units, the video beside which it is, or a file of latents
    state: PathBuf,

    /// Length of the video in seconds, from its beginning
    #[arg(long, group = "length", value_name = "S", allow_hyphen_values = true)]
    seconds: Option<f64>,

    /// Length in frames, 1 + a multiple of 8
    #[arg(long, group = "length", value_name = "N", allow_negative_numbers = true)]
    frames: Option<u32>,

    /// Length in latent frames; N of them are 8·(N − 1) + 1 frames
    #[arg(long, group = "length", value_name = "N", allow_negative_numbers = true)]
    units: Option<usize>,

    /// A model that was pulled, or the folder of a checkpoint [default: the one that made the
    /// latents]
    #[arg(long, value_name = "NAME|DIR", env = "PYRAFLOW_MODEL")]
    model: Option<PathBuf>,

    /// Where the video goes: .mp4, .png, .gif, .y4m, or - for y4m on standard output [default:
    /// where the units belong]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Replace an existing output
    #[arg(short = 'y', long)]
    overwrite: bool,

    #[command(flatten)]
    run: RunArgs,
}

/// Arguments of `extend`.
#[derive(Debug, clap::Args)]
pub struct ExtendArgs {
    #[command(flatten)]
    state: StateArgs,

    /// Write all latents to a safetensors file
    #[arg(long, value_name = "FILE")]
    save_latents: Option<PathBuf>,

    /// Go on with an interrupted extension of a file of latents; a folder of units is always
    /// gone on with
    #[arg(long)]
    resume: bool,

    /// Take lengths that the model was not made for
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    look: LookArgs,
}

/// Arguments of `decode`.
#[derive(Debug, clap::Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    state: StateArgs,

    /// Decode in tiles of PX pixels (256 if not said), as the published code does
    #[arg(
        long,
        value_name = "PX",
        num_args = 0..=1,
        default_missing_value = "256",
        require_equals = true
    )]
    tile: Option<usize>,
}

impl StateArgs {
    fn open(&self) -> Result<(State, Output)> {
        let state = State::open(&self.state)?;
        let mut output = output_of(&state, self.output.as_deref())?;
        self.run.prepare(Some(&output.target))?;
        output.overwrite = self.overwrite;
        Ok((state, output))
    }

    fn length(&self) -> Result<Option<usize>> {
        Length { seconds: self.seconds, frames: self.frames, units: self.units }.in_units()
    }

    /// The output as it is shown to people.
    fn shown(&self, state: &State) -> PathBuf {
        self.output.clone().or_else(|| state.video()).unwrap_or_default()
    }
}

/// Goes on with a saved run.
pub fn extend(args: &ExtendArgs) -> Result<()> {
    let StateArgs { run, model, .. } = &args.state;
    let (state, mut output) = args.state.open()?;
    output.latents.clone_from(&args.save_latents);
    output.resume = args.resume;
    let mut request = state.request()?;
    request.units = args.state.length()?.unwrap_or(request.units);
    if request.units < state.units() {
        let (asked, there) = (request.units, state.units());
        return Err(Error::input(format!("{there} latent frames are there, {asked} asked for"))
            .hint(format!("ask for --units {there} or more; decode makes shorter videos")));
    }
    let (_, spec) = request.resolve()?;
    output.check(&spec)?;
    args.look.place()?;
    args.look.check(&output)?;
    let checkpoint = checkpoint_of(&state, model.as_deref())?;
    // The size is what it is; a length that was typed may be one too many.
    if args.state.length()?.is_some() && !args.force {
        request.check_trained_length(checkpoint.variant())?;
    }
    let backend = run.backend()?;
    let mut console = run.console()?;
    let shown = args.state.shown(&state);
    console.tell(&format!("{} of {} latent frames are there", state.units(), request.units));
    console.start(&request, &shown, &backend.description())?;
    let pipeline = Pipeline::open(checkpoint, backend, &run.store(), &mut console)?;
    args.look.prepare(None, &pipeline, &mut output, &mut console)?;
    let timings = pipeline.extend(&state, &request, &output, &mut console)?;
    console.done(&shown, &spec, &timings, pipeline.backend().first_run())
}

/// Decodes what was saved.
pub fn decode(args: &DecodeArgs) -> Result<()> {
    let StateArgs { run, model, .. } = &args.state;
    let (state, output) = args.state.open()?;
    let checkpoint = checkpoint_of(&state, model.as_deref())?;
    let request = decoded(args, &state, &checkpoint)?;
    let (_, spec) = request.resolve()?;
    output.check(&spec)?;
    let backend = run.backend()?;
    let mut console = run.console()?;
    let shown = args.state.shown(&state);
    console.start(&request, &shown, &backend.description())?;
    let pipeline = Pipeline::open_decoder(checkpoint, backend, &run.store(), &mut console)?;
    let timings = pipeline.decode_state(&state, &request, &output, &mut console)?;
    console.done(&shown, &spec, &timings, pipeline.backend().first_run())
}

/// The request whose latents are there, or one that only says their size.
fn decoded(args: &DecodeArgs, state: &State, checkpoint: &Checkpoint) -> Result<Request> {
    let mut request = match (state.model(), state.shape()) {
        (Some(_), _) => state.request()?,
        (None, Some(shape)) => {
            let mut request = Request::new(checkpoint, "", None);
            (request.width, request.height) = (shape.width as u32 * 8, shape.height as u32 * 8);
            request
        }
        (None, None) => return Err(Error::input("there are no latents to decode")),
    };
    request.units = args.state.length()?.unwrap_or(state.units());
    if let Some(tile) = args.tile {
        request.tiling = Some(Tiling::new(tile)?);
    }
    Ok(request)
}
