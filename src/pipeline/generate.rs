//! From a request to a finished file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Event, Phase, Pipeline, Reporter, Request, SavedRun, pixels_of, plan, stop_if_cancelled,
};
use crate::media::{Frame, Metadata, OutputTarget, check_target, load_image, open_sink};
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
            OutputTarget::File { path, .. } => {
                let mut name = path.clone().into_os_string();
                name.push(".units");
                Some(name.into())
            }
        };
        Ok(Output { target, overwrite: false, resume: false, units, keep_units: false })
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
        check_target(&output.target, &spec, output.overwrite)?;
        self.warn_of_untrained_size(request, reporter);
        self.check_memory(request)?;
        let image = request
            .image
            .as_ref()
            .map(|image| load_image(&image.path, request.width, request.height, image.fit))
            .transpose()?;
        let tokens = self.tokenize(request)?;
        // The published negative prompt is nobody's own words: what is lost of it is no news.
        let spoken = if request.negative == PUBLISHED_NEGATIVE { 1 } else { 2 };
        let names = ["prompt", "negative prompt"].into_iter().take(spoken);
        for (name, tokens) in names.zip(tokens.iter().rev()) {
            for loss in tokens.losses() {
                let message = format!("the {name} is too long: {loss}");
                reporter.event(&Event::Warning { message });
            }
        }
        let saved = output
            .units
            .as_ref()
            .map(|folder| SavedRun::new(folder, self.identity(request, image.as_ref())));
        let mut finished = prepare_units(saved.as_ref(), output, request)?;

        let mut timings = Timings { loading: self.loading_seconds, ..Timings::default() };
        let clock = Instant::now();
        let prompts = self.encode_prompts(&tokens, reporter)?;
        timings.text = finish(Phase::Text, clock, reporter);

        let mut noise = PhiloxNoise { seed: request.seed };
        if let (Some(image), true) = (&image, finished.is_empty()) {
            let clock = Instant::now();
            let latent = self.encode_image(&pixels_of(image), request.tiling, &mut noise)?;
            if let Some(saved) = &saved {
                saved.save(0, &latent)?;
            }
            finished.push(latent);
            timings.image = finish(Phase::Image, clock, reporter);
        }
        let clock = Instant::now();
        let latents = self
            .sample(request, &prompts, finished, &mut noise, saved.as_ref(), reporter)
            .map_err(|e| say_what_is_kept(e, saved.as_ref()))?;
        timings.sampling = finish(Phase::Sampling, clock, reporter);

        let clock = Instant::now();
        self.write(request, output, &latents, reporter)
            .map_err(|e| say_what_is_kept(e, saved.as_ref()))?;
        timings.decoding = finish(Phase::Decoding, clock, reporter);
        if let (Some(saved), false) = (&saved, output.keep_units) {
            saved.discard()?;
        }
        Ok(timings)
    }

    /// Decodes the latents and writes the video.
    fn write(
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

    /// The settings that are written into the video.
    pub fn settings(&self, request: &Request) -> Value {
        let mut settings = json!({
            "generator": concat!("pyraflow ", env!("CARGO_PKG_VERSION")),
            "family": self.checkpoint().family(),
            "variant": self.checkpoint().variant(),
            "prompt": request.prompt,
            "suffix": request.suffix,
            "negative": request.negative,
            "width": request.width,
            "height": request.height,
            "units": request.units,
            "steps": request.steps,
            "video_steps": request.video_steps,
            "guidance": request.guidance,
            "video_guidance": request.video_guidance,
            "seed": request.seed,
        });
        if let Some(linear) = request.linear_guidance {
            settings["linear_guidance"] = json!({ "alpha": linear.alpha, "min": linear.min });
        }
        if let Some(tiling) = request.tiling {
            settings["tile"] = json!(tiling.tile);
        }
        if let Some(image) = &request.image {
            let name = image.path.file_name().unwrap_or_default().to_string_lossy();
            settings["image"] = json!({ "file": name, "fit": format!("{:?}", image.fit) });
        }
        settings
    }

    /// What decides the latents of each unit; the length does not, so that an unfinished
    /// run can be resumed at another length.
    fn identity(&self, request: &Request, image: Option<&Frame>) -> Value {
        let mut identity = self.settings(request);
        let weights: serde_json::Map<String, Value> = self
            .weights
            .components
            .iter()
            .map(|(component, w)| (component.to_string(), w.total_bytes().into()))
            .collect();
        if let Some(fields) = identity.as_object_mut() {
            fields.remove("units");
            fields.remove("tile");
            fields.insert("weight_bytes".into(), Value::Object(sorted(weights)));
            fields.insert("device".into(), self.backend().name().into());
            if let Some(image) = image {
                let hash: String =
                    Sha256::digest(image.data()).iter().map(|b| format!("{b:02x}")).collect();
                fields.insert("image_sha256".into(), hash.into());
            }
        }
        identity
    }

    fn warn_of_untrained_size(&self, request: &Request, reporter: &mut dyn Reporter) {
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

    /// Refuses what cannot fit into the device's memory.
    fn check_memory(&self, request: &Request) -> Result<()> {
        let networks = super::Networks::of(self.checkpoint())?;
        let phases = plan(&networks, request, self.backend(), None)?;
        let need = |p: &super::PhasePlan| match self.backend().copies_weights() {
            true => p.device_bytes,
            false => p.memory_bytes(),
        };
        let Some(largest) = phases.iter().max_by_key(|p| need(p)) else { return Ok(()) };
        match self.backend().free_memory() {
            Some(available) if need(largest) > available => {
                let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
                Err(Error::memory(format!(
                    "{} needs {:.2} GiB at least, {:.2} GiB can be had",
                    largest.name,
                    gib(need(largest)),
                    gib(available)
                ))
                .hint("make the video smaller or shorter; `pyraflow plan` shows what it takes"))
            }
            _ => Ok(()),
        }
    }
}

fn sorted(map: serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let mut fields: Vec<_> = map.into_iter().collect();
    fields.sort_by(|a, b| a.0.cmp(&b.0));
    fields.into_iter().collect()
}

/// The units to go on from, with their folder ready for more.
fn prepare_units(
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
        (ErrorKind::Interrupted, Some(saved)) => error
            .hint(format!("finished units are in {}; --resume goes on", saved.folder().display())),
        _ => error,
    }
}

fn finish(phase: Phase, clock: Instant, reporter: &mut dyn Reporter) -> f64 {
    let seconds = clock.elapsed().as_secs_f64();
    reporter.event(&Event::Finished { phase, seconds });
    seconds
}
