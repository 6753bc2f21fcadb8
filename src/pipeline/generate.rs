//! From a request to a finished file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::latents::{read_latents, write_latents};
use super::saved::write_whole;
use super::settings::Given;
use super::state::{asked, units_folder};
use super::stream::Stream;
use super::{
    Event, Phase, Pipeline, PromptTokens, Reporter, Request, SavedRun, pixels_of, stop_if_cancelled,
};
use crate::media::{
    Frame, Metadata, OutputTarget, VideoSpec, check_file_target, check_target, load_image,
    open_sink,
};
use crate::sampler::{Latent, PhiloxNoise};
use crate::text::PUBLISHED_NEGATIVE;
use crate::{Error, ErrorKind, Result};

/// Where a video goes and what happens to what is there already.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// File or standard output.
    pub target: OutputTarget,
    /// Whether an existing file is replaced.
    pub overwrite: bool,
    /// Whether to go on with the units of an interrupted run.
    pub resume: bool,
    /// Where finished units are kept until the video is complete; `None` keeps none.
    pub units: Option<PathBuf>,
    /// Whether the units stay when the video is complete.
    pub keep_units: bool,
    /// A file for all latents of the run, in the format of [`super::write_latents`].
    pub latents: Option<PathBuf>,
    /// A file for the settings, the device and the seconds of each phase, as JSON.
    pub sidecar: Option<PathBuf>,
    /// Whether each unit is decoded as soon as it is sampled, rather than all of them at the
    /// end: the same frames, with the weights of decoder and transformer in memory at once.
    pub early: bool,
    /// Whether what is decoded early can be watched early, see
    /// [`crate::media::FrameSink::show_early`]; needs `early`.
    pub follow: bool,
}

impl Output {
    /// Writes to `path`, whose extension decides the format, and keeps the units of an
    /// unfinished run in `<path>.units`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when the extension says nothing.
    pub fn to(path: &Path) -> Result<Output> {
        let target = OutputTarget::parse(path)?;
        let units = match &target {
            OutputTarget::Stdout => None,
            OutputTarget::File { path, .. } => Some(units_folder(path)),
        };
        Ok(Output {
            target,
            overwrite: false,
            resume: false,
            units,
            keep_units: false,
            latents: None,
            sidecar: None,
            early: false,
            follow: false,
        })
    }

    /// Whether everything can be written where it should go.
    ///
    /// # Errors
    /// As [`check_target`].
    pub fn check(&self, spec: &VideoSpec) -> Result<()> {
        check_target(&self.target, spec, self.overwrite)?;
        let others = self.latents.iter().chain(&self.sidecar);
        others.into_iter().try_for_each(|path| check_file_target(path, self.overwrite))
    }
}

/// Wall time of each phase in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Mapping (and converting) weights.
    pub loading: f64,
    /// Encoding the prompts.
    pub text: f64,
    /// Encoding the first image.
    pub image: f64,
    /// Denoising.
    pub sampling: f64,
    /// Decoding and writing.
    pub decoding: f64,
}

impl Pipeline {
    /// Generates the video of `request`. Whatever can be found wrong is found before
    /// anything is computed; the output is complete or absent.
    ///
    /// # Errors
    /// See [`ErrorKind`]. After [`ErrorKind::Interrupted`] and most others the units
    /// finished so far are in [`Output::units`], and `resume` goes on from them.
    pub fn generate(
        &self,
        request: &Request,
        output: &Output,
        reporter: &mut dyn Reporter,
    ) -> Result<Timings> {
        let (_, spec) = request.resolve()?;
        output.check(&spec)?;
        self.warn_of_untrained_size(request, reporter);
        self.check_memory(request, output, reporter)?;
        let mut start = Start::read(request)?;
        let tokens = self.tokenize(request)?;
        warn_of_losses(request, &tokens, reporter);
        let given = start.given.clone();
        start.saved = output.units.as_ref().map(|f| self.saved_run(f, request, &given));
        let resumed = prepare_units(start.saved.as_ref(), output, request)?;
        if resumed.len() > start.finished.len() {
            start.finished = resumed;
        } else if let Some(saved) = &start.saved {
            for (unit, latent) in start.finished.iter().enumerate().skip(resumed.len()) {
                saved.save(unit, latent)?;
            }
        }
        self.produce(request, output, &tokens, start, reporter)
    }

    /// The place for the units of `request`.
    pub(super) fn saved_run(&self, folder: &Path, request: &Request, given: &Given) -> SavedRun {
        SavedRun::new(folder, self.identity(request, given))
            .asking(asked(request, self.checkpoint().dir()))
    }

    /// From prompts and what is finished to the video.
    pub(super) fn produce(
        &self,
        request: &Request,
        output: &Output,
        tokens: &[PromptTokens],
        start: Start,
        reporter: &mut dyn Reporter,
    ) -> Result<Timings> {
        let Start { image, mut finished, saved, given } = start;
        let mut timings = Timings { loading: self.loading_seconds, ..Timings::default() };
        let mut noise = PhiloxNoise { seed: request.seed };
        let mut prompts = Vec::new();
        // With all units there, nothing is left to say to the transformer.
        if finished.len() < request.units {
            let clock = Instant::now();
            prompts = self.encode_prompts(tokens, reporter)?;
            timings.text = finish(Phase::Text, clock, reporter);
        }
        if let (Some(image), true) = (&image, finished.is_empty()) {
            let clock = Instant::now();
            let latent = self.encode_image(&pixels_of(image), request.tiling, &mut noise)?;
            if let Some(saved) = &saved {
                saved.save(0, &latent)?;
            }
            finished.push(latent);
            timings.image = finish(Phase::Image, clock, reporter);
        }
        let kept = |e| say_what_is_kept(e, saved.as_ref());
        let mut stream = match output.early {
            true => Some(Stream::open(self, request, output)?),
            false => None,
        };
        let clock = Instant::now();
        if let Some(stream) = &mut stream {
            for (unit, latent) in finished.iter().enumerate() {
                stream.push(unit, latent, reporter).map_err(kept)?;
            }
        }
        let mut each_unit = |unit: usize, latent: &Latent, reporter: &mut dyn Reporter| {
            if let Some(saved) = &saved {
                saved.save(unit, latent)?;
            }
            stream.as_mut().map_or(Ok(()), |stream| stream.push(unit, latent, reporter))
        };
        let mut latents = finished;
        if latents.len() < request.units {
            latents = self
                .sample_each(request, &prompts, latents, &mut noise, &mut each_unit, reporter)
                .map_err(kept)?;
        }
        if let Some(path) = &output.latents {
            write_latents(path, &latents, &self.identity(request, &given)).map_err(kept)?;
        }
        match stream {
            Some(stream) => {
                timings.decoding = stream.finish().map_err(kept)?;
                timings.sampling = clock.elapsed().as_secs_f64() - timings.decoding;
                for (phase, seconds) in
                    [(Phase::Sampling, timings.sampling), (Phase::Decoding, timings.decoding)]
                {
                    reporter.event(&Event::Finished { phase, seconds });
                }
            }
            None => {
                timings.sampling = finish(Phase::Sampling, clock, reporter);
                let clock = Instant::now();
                self.write(request, output, &latents, reporter).map_err(kept)?;
                timings.decoding = finish(Phase::Decoding, clock, reporter);
            }
        }
        if let Some(path) = &output.sidecar {
            let mut sidecar = self.settings(request);
            sidecar["device"] = self.backend().description().into();
            sidecar["seconds"] = serde_json::json!(timings);
            write_whole(path, format!("{sidecar:#}\n").as_bytes()).map_err(kept)?;
        }
        if let (Some(saved), false) = (&saved, output.keep_units) {
            saved.discard()?;
        }
        Ok(timings)
    }

    /// Whether `folder` holds units of this very request.
    pub fn has_units(&self, request: &Request, folder: &Path) -> bool {
        folder.join("run.json").is_file()
            && Start::read(request)
                .is_ok_and(|start| self.saved_run(folder, request, &start.given).is_there())
    }

    /// Decodes the latents and writes the video.
    pub(super) fn write(
        &self,
        request: &Request,
        output: &Output,
        latents: &[Latent],
        reporter: &mut dyn Reporter,
    ) -> Result<()> {
        let (_, spec) = request.resolve()?;
        let metadata = Metadata { comment: Some(self.settings(request).to_string()) };
        let mut sink = open_sink(&output.target, &spec, &metadata, output.overwrite)?;
        let mut done = 0;
        self.decode(latents, request.tiling, |frame| {
            sink.push(&frame)?;
            done += 1;
            reporter.event(&Event::Progress {
                phase: Phase::Decoding,
                done,
                total: u64::from(spec.frames),
                detail: format!("frame {done}/{}", spec.frames),
            });
            stop_if_cancelled(reporter)
        })?;
        sink.finish()
    }

    pub(super) fn warn_of_untrained_size(&self, request: &Request, reporter: &mut dyn Reporter) {
        let variant = self.checkpoint().variant();
        let (width, height) = (request.width as usize, request.height as usize);
        if !variant.fits(width, height, request.units) {
            let sizes: Vec<String> =
                variant.sizes().iter().map(|(w, h)| format!("{w}x{h}")).collect();
            let message = format!(
                "the {variant} model was trained for {} and up to {} frames; {width}x{height} with {} frames may look bad",
                sizes.join(", "),
                crate::models::vae::video_frames(variant.max_latent_frames()),
                crate::models::vae::video_frames(request.units),
            );
            reporter.event(&Event::Warning { message });
        }
    }
}

/// What a run begins with.
#[derive(Default)]
pub(super) struct Start {
    /// The first image, at the size of the video.
    pub image: Option<Frame>,
    /// The units that are finished.
    pub finished: Vec<Latent>,
    /// Where finished units are saved.
    pub saved: Option<SavedRun>,
    /// What the run's files are.
    pub given: Given,
}

impl Start {
    /// Reads the files that `request` names.
    fn read(request: &Request) -> Result<Start> {
        let mut start = Start::default();
        if let Some(image) = &request.image {
            let frame = load_image(&image.path, request.width, request.height, image.fit)?;
            let hash = Sha256::digest(frame.data());
            start.given.image = Some(hash.iter().map(|b| format!("{b:02x}")).collect());
            start.image = Some(frame);
        }
        if let Some(path) = &request.latents {
            let file = read_latents(path)?;
            check_latents(request, &file.units).map_err(|e| e.at(path.display()))?;
            (start.finished, start.given.latents) = (file.units, Some(file.hash));
        }
        Ok(start)
    }
}

/// Whether a video of `request` can begin with these units.
fn check_latents(request: &Request, units: &[Latent]) -> Result<()> {
    let (settings, _) = request.resolve()?;
    if request.image.is_some() {
        return Err(Error::usage("a video begins with an image or with latents, not with both"));
    }
    if units.len() > request.units {
        let (have, frames) = (units.len(), crate::models::vae::video_frames(units.len()));
        return Err(Error::input(format!("there are {have} latent frames already"))
            .hint(format!("ask for --units {have} ({frames} frames) or more")));
    }
    let wanted = settings.unit_shape();
    match units.iter().map(Latent::shape).find(|&shape| shape != wanted) {
        None => Ok(()),
        Some(shape) => {
            let (width, height) = (shape.width * 8, shape.height * 8);
            Err(Error::input(format!(
                "the latents are of {width}x{height}, the video of {}x{}",
                request.width, request.height
            ))
            .hint(format!("add --size {width}x{height}")))
        }
    }
}

fn warn_of_losses(request: &Request, tokens: &[PromptTokens], reporter: &mut dyn Reporter) {
    // The published negative prompt is nobody's own words: what is lost of it is no news.
    let spoken = if request.negative == PUBLISHED_NEGATIVE { 1 } else { 2 };
    let names = ["prompt", "negative prompt"].into_iter().take(spoken);
    for (name, tokens) in names.zip(tokens.iter().rev()) {
        for loss in tokens.losses() {
            let message = format!("the {name} is too long: {loss}");
            reporter.event(&Event::Warning { message });
        }
    }
}

/// The units to go on from, with their folder ready for more.
pub(super) fn prepare_units(
    saved: Option<&SavedRun>,
    output: &Output,
    request: &Request,
) -> Result<Vec<Latent>> {
    let Some(saved) = saved else { return Ok(Vec::new()) };
    if saved.exists() && output.resume {
        let (settings, _) = request.resolve()?;
        let mut units = saved.resume(settings.unit_shape())?;
        units.truncate(request.units);
        return Ok(units);
    }
    if saved.exists() && !output.overwrite {
        return Err(Error::usage(format!(
            "{} holds the units of an unfinished run",
            saved.folder().display()
        ))
        .hint("add --resume to go on with it, or -y to start anew"));
    }
    saved.begin()?;
    Ok(Vec::new())
}

fn say_what_is_kept(error: Error, saved: Option<&SavedRun>) -> Error {
    match (error.kind(), saved) {
        (ErrorKind::Interrupted | ErrorKind::Memory, Some(saved)) => error
            .hint(format!("finished units are in {}; --resume goes on", saved.folder().display())),
        _ => error,
    }
}

pub(super) fn finish(phase: Phase, clock: Instant, reporter: &mut dyn Reporter) -> f64 {
    let seconds = clock.elapsed().as_secs_f64();
    reporter.event(&Event::Finished { phase, seconds });
    seconds
}
