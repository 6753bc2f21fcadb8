//! What a run tells about itself while it goes on.

use std::fmt;

use serde::Serialize;

use crate::media::Frame;
use crate::sampler::Latent;

/// The parts of a run, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Finding, converting and mapping weights.
    Loading,
    /// Encoding the prompts.
    Text,
    /// Encoding the first image.
    Image,
    /// Denoising, unit by unit.
    Sampling,
    /// Turning latents into frames and writing them.
    Decoding,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Loading => "loading",
            Phase::Text => "text",
            Phase::Image => "image",
            Phase::Sampling => "sampling",
            Phase::Decoding => "decoding",
        })
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Something the user should know although the run goes on.
    Warning {
        /// What.
        message: String,
    },
    /// `done` of `total` parts of the phase are done; parts are bytes for loading, frames
    /// for decoding and cost (tokens times steps) for sampling.
    Progress {
        /// The phase.
        phase: Phase,
        /// Parts done.
        done: u64,
        /// Parts in all.
        total: u64,
        /// Where exactly: "unit 3/16 stage 2/3".
        detail: String,
    },
    /// A phase is over.
    Finished {
        /// The phase.
        phase: Phase,
        /// Its wall time.
        seconds: f64,
    },
}

/// Is told what happens, and may stop it.
pub trait Reporter {
    /// Called for every event, often; must be quick.
    fn event(&mut self, event: &Event);

    /// Whether the run should stop as soon as it can; asked at least at every step and
    /// every few frames.
    fn cancelled(&self) -> bool {
        false
    }

    /// Whether [`stage_finished`](Self::stage_finished) is to be called. A GPU is waited for at
    /// the end of every stage then, rather than at that of every unit.
    fn wants_stages(&self) -> bool {
        false
    }

    /// A stage (0 to 2) of a unit is done, with `latent`: of the stage's size, scaled as the
    /// sampler has it. Must be quick; the sampler waits. Called where
    /// [`wants_stages`](Self::wants_stages) says so.
    fn stage_finished(&mut self, unit: usize, stage: usize, latent: &Latent) {
        let _ = (unit, stage, latent);
    }

    /// A unit was decoded to these frames while sampling goes on; `latent` is scaled as the
    /// VAE has it. Only runs with [`super::Output::early`] decode units one by one.
    fn unit_decoded(&mut self, unit: usize, latent: &Latent, frames: &[Frame]) {
        let _ = (unit, latent, frames);
    }
}

/// A reporter that says nothing and never stops a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Reporter for Quiet {
    fn event(&mut self, _: &Event) {}
}
