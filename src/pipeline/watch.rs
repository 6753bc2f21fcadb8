//! Watches the sampler: progress, what happens to finished units, cancelling.

use super::prompts::EncodedPrompt;
use super::transformer::geometry;
use super::{Event, Phase, Reporter};
use crate::Result;
use crate::sampler::{Latent, Observer, STAGES, SamplerRequest, StageGeometry};

/// Is given every unit as it is finished.
pub(super) type EachUnit<'a> = &'a mut dyn FnMut(usize, &Latent, &mut dyn Reporter) -> Result<()>;

/// The observer of a run.
pub(super) struct Watch<'a> {
    reporter: &'a mut dyn Reporter,
    each_unit: EachUnit<'a>,
    text_tokens: Vec<usize>,
    units: usize,
    done: u64,
    total: u64,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        settings: &SamplerRequest,
        finished: usize,
        prompts: &[EncodedPrompt],
        each_unit: EachUnit<'a>,
        reporter: &'a mut dyn Reporter,
    ) -> Result<Watch<'a>> {
        let text_tokens: Vec<usize> = prompts.iter().map(|p| p.tokens).collect();
        let mut total = 0;
        for unit in finished.max(settings.first_unit())..settings.units {
            for stage in 0..STAGES {
                let stage = settings.stage_geometry(unit, stage)?;
                total += step_cost(&stage, &text_tokens) * stage.timesteps.len() as u64;
            }
        }
        let units = settings.units;
        Ok(Watch { reporter, each_unit, text_tokens, units, done: 0, total })
    }
}

/// What a step of this stage costs, about: its tokens.
fn step_cost(stage: &StageGeometry, text_tokens: &[usize]) -> u64 {
    geometry(stage, text_tokens).rows() as u64
}

impl Observer for Watch<'_> {
    fn step_finished(&mut self, stage: &StageGeometry, done: usize) -> Result<()> {
        self.done += step_cost(stage, &self.text_tokens);
        let detail = format!(
            "unit {}/{} stage {}/3 step {done}/{}",
            stage.unit + 1,
            self.units,
            stage.stage + 1,
            stage.timesteps.len()
        );
        let (done, total) = (self.done, self.total);
        self.reporter.event(&Event::Progress { phase: Phase::Sampling, done, total, detail });
        Ok(())
    }

    fn wants_stages(&self) -> bool {
        self.reporter.wants_stages()
    }

    fn stage_finished(&mut self, stage: &StageGeometry, latent: &Latent) -> Result<()> {
        self.reporter.stage_finished(stage.unit, stage.stage, latent);
        Ok(())
    }

    fn unit_finished(&mut self, unit: usize, latent: &Latent) -> Result<()> {
        (self.each_unit)(unit, latent, self.reporter)
    }

    fn cancelled(&self) -> bool {
        self.reporter.cancelled()
    }
}
