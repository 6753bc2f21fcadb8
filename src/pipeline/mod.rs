//! The way through: request → text → sampler → decoder → media. The library's front door.
//!
//! ```no_run
//! use pyraflow::checkpoint::{Checkpoint, StoreOptions};
//! use pyraflow::exec::Cpu;
//! use pyraflow::pipeline::{Output, Pipeline, Quiet, Request};
//!
//! # fn main() -> pyraflow::Result<()> {
//! let checkpoint = Checkpoint::open("pyramid-flow-sd3".as_ref(), Some("384p"))?;
//! let pipeline =
//!     Pipeline::open(checkpoint, Box::new(Cpu::new()), &StoreOptions::default(), &mut Quiet)?;
//! let mut request = Request::new(pipeline.checkpoint(), "a fox runs through snow", None);
//! request.seed = 7;
//! pipeline.generate(&request, &Output::to("fox.mp4".as_ref())?, &mut Quiet)?;
//! # Ok(())
//! # }
//! ```

mod entrance;
mod extend;
mod generate;
mod latents;
mod measure;
mod memory;
mod modulation;
mod networks;
mod plan;
mod predict;
mod preview;
mod progress;
mod prompts;
mod request;
mod room;
mod saved;
mod settings;
mod state;
mod stream;
mod tiles;
mod transformer;
mod vae;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

pub use generate::{Output, Timings};
pub use latents::{LatentsFile, read_latents, write_latents};
pub use measure::{Ceilings, Measured, OpTime, PhaseTime, WeightsOf, measure, random_weights};
pub use networks::Networks;
pub use plan::{PhasePlan, plan};
pub use predict::{Machine, Predicted};
pub use preview::{LatentRgb, LatentRgbFit};
pub use progress::{Event, Phase, Quiet, Reporter};
pub use prompts::{EncodedPrompt, PromptTokens, Tokenizers};
pub use request::{
    FRAME_RATE, FirstImage, Preset, Request, SIZE_MULTIPLE, Tiling, units_of_frames,
    units_of_seconds,
};
pub use saved::SavedRun;
pub use state::{State, units_folder};
pub use tiles::Volume;
pub use transformer::{Transformer, geometry, modulation_layout, record_step};
pub use vae::{Vae, pixels_of};

use watch::{EachUnit, Watch};

use crate::checkpoint::{Checkpoint, Component, ComponentWeights, StoreOptions};
use crate::exec::Backend;
use crate::media::Frame;
use crate::models::{ExpectedWeight, clip, t5, vae as vae_model};
use crate::sampler::{
    Latent, LatentScaling, LatentShape, NoiseSource, SamplerRequest, sample, sample_posterior,
};
use crate::tensor::WeightSource;
use crate::{Error, ErrorKind, Result};

/// The mapped and checked weights of all components.
pub struct Weights {
    components: HashMap<Component, Arc<ComponentWeights>>,
}

impl Weights {
    /// Maps the weights of the `wanted` components of `checkpoint`, converting them first where
    /// needed, and checks that exactly the expected tensors are there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] listing what is missing, unexpected or wrongly shaped.
    pub fn open(
        checkpoint: &Checkpoint,
        wanted: &[Component],
        store: &StoreOptions,
        reporter: &mut dyn Reporter,
    ) -> Result<Weights> {
        let mut components = HashMap::new();
        for &component in wanted {
            let mut progress = |done, total| {
                let detail = component.to_string();
                reporter.event(&Event::Progress { phase: Phase::Loading, done, total, detail });
                stop_if_cancelled(reporter)
            };
            let weights = checkpoint.open_weights(component, store, &mut progress)?;
            weights.verify(&expected_weights(checkpoint, component)?)?;
            components.insert(component, Arc::new(weights));
        }
        Ok(Weights { components })
    }

    /// Bytes of each component, by name.
    fn sizes(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut sizes: Vec<_> =
            self.components.iter().map(|(c, w)| (c.to_string(), w.total_bytes().into())).collect();
        sizes.sort_by(|a: &(String, serde_json::Value), b| a.0.cmp(&b.0));
        sizes.into_iter().collect()
    }

    /// The weights of `component`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if the family has no such component.
    pub fn get(&self, component: Component) -> Result<Arc<dyn WeightSource>> {
        match self.components.get(&component) {
            Some(weights) => Ok(weights.clone()),
            None => Err(Error::model(format!("the checkpoint has no {component}"))),
        }
    }
}

fn expected_weights(checkpoint: &Checkpoint, component: Component) -> Result<Vec<ExpectedWeight>> {
    match component {
        Component::Transformer => transformer::expected_weights(checkpoint.transformer()),
        Component::Vae => vae_model::expected_weights(checkpoint.vae()?),
        Component::ClipL => clip::expected_weights(checkpoint.clip_l()?),
        Component::ClipG => clip::expected_weights(checkpoint.clip_g()?),
        Component::T5 => t5::expected_weights(checkpoint.t5()?),
    }
}

fn stop_if_cancelled(reporter: &dyn Reporter) -> Result<()> {
    if reporter.cancelled() { Err(Error::interrupted("stopped")) } else { Ok(()) }
}

/// A checkpoint ready to generate videos on a backend.
pub struct Pipeline {
    checkpoint: Checkpoint,
    backend: Box<dyn Backend>,
    weights: Weights,
    /// None if only latents can be decoded.
    tokenizers: Option<Tokenizers>,
    loading_seconds: f64,
}

impl Pipeline {
    /// Maps and checks the whole checkpoint.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when any part of it is missing, damaged or of another
    /// model; [`crate::ErrorKind::Io`] when converted weights cannot be written.
    pub fn open(
        checkpoint: Checkpoint,
        backend: Box<dyn Backend>,
        store: &StoreOptions,
        reporter: &mut dyn Reporter,
    ) -> Result<Pipeline> {
        let start = Instant::now();
        checkpoint.require_complete()?;
        let tokenizers = Some(Tokenizers::open(&checkpoint)?);
        let components = checkpoint.family().components();
        let weights = Weights::open(&checkpoint, components, store, reporter)?;
        let loading_seconds = start.elapsed().as_secs_f64();
        reporter.event(&Event::Finished { phase: Phase::Loading, seconds: loading_seconds });
        Ok(Pipeline { checkpoint, backend, weights, tokenizers, loading_seconds })
    }

    /// Maps and checks the VAE alone: enough to [`Pipeline::decode`].
    ///
    /// # Errors
    /// As [`Pipeline::open`].
    pub fn open_decoder(
        checkpoint: Checkpoint,
        backend: Box<dyn Backend>,
        store: &StoreOptions,
        reporter: &mut dyn Reporter,
    ) -> Result<Pipeline> {
        let start = Instant::now();
        let weights = Weights::open(&checkpoint, &[Component::Vae], store, reporter)?;
        let loading_seconds = start.elapsed().as_secs_f64();
        reporter.event(&Event::Finished { phase: Phase::Loading, seconds: loading_seconds });
        Ok(Pipeline { checkpoint, backend, weights, tokenizers: None, loading_seconds })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The backend.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// The scale and shift between the VAE's latents and the sampler's.
    pub fn latent_scaling(&self) -> LatentScaling {
        match self.checkpoint.family() {
            crate::checkpoint::Family::Sd3 => LatentScaling::SD3,
            crate::checkpoint::Family::Miniflux => LatentScaling::MINIFLUX,
        }
    }

    /// How latents become small pictures, for a VAE where that is known: the built-in model's.
    /// [`LatentRgbFit`] finds it for others, from decoded units.
    pub fn latent_rgb(&self) -> Option<LatentRgb> {
        crate::demo::has_vae(self.checkpoint.dir()).then_some(crate::demo::LATENT_RGB)
    }

    /// Token ids of the prompts the run needs: negative and positive, or the positive one
    /// alone without guidance.
    ///
    /// # Errors
    /// As [`Tokenizers::encode`].
    pub fn tokenize(&self, request: &Request) -> Result<Vec<PromptTokens>> {
        let tokenizers = self.tokenizers.as_ref().ok_or_else(|| {
            Error::usage("only the decoder of this pipeline was opened, which takes no prompts")
        })?;
        let positive = tokenizers.encode(&request.full_prompt())?;
        if request.guidance > 0.0 {
            Ok(vec![tokenizers.encode(&request.negative)?, positive])
        } else {
            Ok(vec![positive])
        }
    }

    /// Encodes prompts.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn encode_prompts(
        &self,
        prompts: &[PromptTokens],
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<EncodedPrompt>> {
        prompts::encode(&*self.backend, &self.checkpoint, &self.weights, prompts, |done, total| {
            reporter.event(&Event::Progress {
                phase: Phase::Text,
                done: done as u64,
                total: total as u64,
                detail: format!("encoder {done}/{total}"),
            });
            stop_if_cancelled(reporter)
        })
    }

    /// The VAE.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn vae(&self) -> Result<Vae<'_>> {
        let weights = self.weights.get(Component::Vae)?;
        Ok(Vae::new(&*self.backend, self.checkpoint.vae()?, weights))
    }

    /// Encodes the first image (of the size of the video, −1 … 1) to the latent of unit 0:
    /// a sample of the posterior, scaled as the transformer expects it.
    ///
    /// # Errors
    /// Those of the backend and of the noise.
    pub fn encode_image(
        &self,
        image: &Volume,
        tiling: Option<Tiling>,
        noise: &mut dyn NoiseSource,
    ) -> Result<Latent> {
        let moments = self.vae()?.encode(image, tiling)?;
        let shape = LatentShape::frame(moments.height, moments.width);
        let mut latent = sample_posterior(&moments.data, &noise.posterior(shape)?)?;
        self.latent_scaling().image_from_vae(&mut latent);
        Ok(latent)
    }

    /// Samples the latents of `request`, going on after the units in `finished` (the first
    /// image's latent among them). Finished units are saved to `saved`, if given.
    ///
    /// # Errors
    /// Those of [`sample`].
    pub fn sample(
        &self,
        request: &Request,
        prompts: &[EncodedPrompt],
        finished: Vec<Latent>,
        noise: &mut dyn NoiseSource,
        saved: Option<&SavedRun>,
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<Latent>> {
        let each_unit = &mut |unit: usize, latent: &Latent, _: &mut dyn Reporter| match saved {
            Some(saved) => saved.save(unit, latent),
            None => Ok(()),
        };
        self.sample_each(request, prompts, finished, noise, each_unit, reporter)
    }

    /// The same; `each_unit` is given every unit as it is finished. Where the device has less
    /// memory left than there was, the units that are not finished are tried again with what
    /// is there.
    fn sample_each(
        &self,
        request: &Request,
        prompts: &[EncodedPrompt],
        mut finished: Vec<Latent>,
        noise: &mut dyn NoiseSource,
        each_unit: EachUnit<'_>,
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<Latent>> {
        /// Tries without a unit finished in between.
        const TRIES: usize = 3;
        let (settings, _) = request.resolve()?;
        let mut tries = 0;
        loop {
            let before = finished.len();
            let mut done = finished.clone();
            let mut keep = |unit: usize, latent: &Latent, reporter: &mut dyn Reporter| {
                each_unit(unit, latent, reporter)?;
                done.push(latent.clone());
                Ok(())
            };
            let sampled =
                self.sample_once(&settings, prompts, finished, noise, &mut keep, reporter);
            let Err(error) = sampled else { return sampled };
            tries = if done.len() > before { 1 } else { tries + 1 };
            if error.kind() != ErrorKind::Memory || tries == TRIES {
                return Err(error);
            }
            let message = format!("planning again after unit {}: {error}", done.len());
            reporter.event(&Event::Warning { message });
            finished = done;
        }
    }

    fn sample_once(
        &self,
        settings: &SamplerRequest,
        prompts: &[EncodedPrompt],
        finished: Vec<Latent>,
        noise: &mut dyn NoiseSource,
        each_unit: EachUnit<'_>,
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<Latent>> {
        let (config, weights) = (self.checkpoint.transformer(), Component::Transformer);
        let weights = self.weights.get(weights)?;
        let mut watch = Watch::new(settings, finished.len(), prompts, each_unit, reporter)?;
        let session = transformer::open(&*self.backend, weights, config, prompts, settings)?;
        let dtype = self.backend.activations();
        let mut denoiser = Transformer::new(config, session, dtype, prompts, settings)?;
        sample(settings, finished, &mut denoiser, noise, &mut watch)
    }

    /// Decodes sampled latents and gives the frames in order to `frames`.
    ///
    /// # Errors
    /// Those of the backend and of `frames`.
    pub fn decode(
        &self,
        latents: &[Latent],
        tiling: Option<Tiling>,
        frames: impl FnMut(Frame) -> Result<()>,
    ) -> Result<()> {
        let scaling = self.latent_scaling();
        let mut unscaled = latents.to_vec();
        for (i, latent) in unscaled.iter_mut().enumerate() {
            scaling.to_vae(i, latent);
        }
        self.vae()?.decode(&unscaled, tiling, frames)
    }
}
