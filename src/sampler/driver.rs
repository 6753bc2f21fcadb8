//! The loop over units, stages and steps.

use super::entry::Entry;
use super::history::History;
use super::latent::{Latent, LatentShape};
use super::noise::NoiseSource;
use super::request::{Mode, SamplerRequest, StageGeometry};
use super::schedule::{Schedule, StageSchedule, stage_spans};
use crate::{Error, Result};

/// One Euler step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Its number within the stage; `timestep` is `StageGeometry::timesteps[index]`.
    pub index: usize,
    /// What the transformer embeds, in 0..=1000.
    pub timestep: f32,
    /// The guidance scale; `None` asks for the positive prompt alone.
    pub guidance: Option<f32>,
    /// What the guided velocity is multiplied by before it is added; negative.
    pub dsigma: f32,
}

/// The model, as the sampler sees it. It keeps the latent `x` of the frame being sampled,
/// perhaps in the memory of a device, where steps may still be under way when these functions
/// return: what goes wrong in one may be the error of a later one. Nothing but
/// [`latent`](Self::latent) has to wait for them. With
/// [`StageGeometry::rounded`] it rounds `x` to bf16 after the entry and after every step.
pub trait Denoiser {
    /// Makes the latent that the stage starts from, of `stage.shape`, out of `entry` and of
    /// what the stage before ended with, and prepares for the steps. `history` holds the clips
    /// of `stage.history`, oldest first; they stay the same throughout the stage.
    ///
    /// # Errors
    /// If the model cannot do what is asked.
    fn begin_stage(
        &mut self,
        stage: &StageGeometry,
        history: &[Latent],
        entry: &Entry,
    ) -> Result<()>;

    /// Takes one step: `x <- x + step.dsigma * v`, where `v` is the guided velocity at `x` (see
    /// [`super::guided_euler_step`]).
    ///
    /// # Errors
    /// If the model fails.
    fn step(&mut self, step: &Step) -> Result<()>;

    /// Announces the stage after the present one, whose steps may still be under way: what they
    /// leave to be prepared is prepared meanwhile. Nothing has to be done.
    ///
    /// # Errors
    /// If the model cannot do what will be asked.
    fn expect_stage(&mut self, next: &StageGeometry) -> Result<()> {
        let _ = next;
        Ok(())
    }

    /// `x` after all steps so far, which are waited for. Asked for at the end of every unit, and
    /// of the stages that an observer wants to see; the next stage may still start from it.
    ///
    /// # Errors
    /// If the model or one of the steps failed.
    fn latent(&mut self) -> Result<Latent>;
}

/// Watches a run, and may stop it. An error from it ends the run.
pub trait Observer {
    /// A step was taken; `done` of the stage's steps were. A device may still be busy with
    /// the last few.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn step_finished(&mut self, stage: &StageGeometry, done: usize) -> Result<()> {
        let _ = (stage, done);
        Ok(())
    }

    /// Whether [`stage_finished`](Self::stage_finished) is to be called for the stage that was
    /// just sampled. A device is waited for then, and has nothing to do meanwhile.
    fn wants_stages(&self) -> bool {
        false
    }

    /// A stage is done, with this frame at the stage's size. Called where
    /// [`wants_stages`](Self::wants_stages) says so.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn stage_finished(&mut self, stage: &StageGeometry, latent: &Latent) -> Result<()> {
        let _ = (stage, latent);
        Ok(())
    }

    /// A unit is done: the latent to save. It is finite and complete, and a run resumed with it
    /// goes on to the same bits.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn unit_finished(&mut self, unit: usize, latent: &Latent) -> Result<()> {
        let _ = (unit, latent);
        Ok(())
    }

    /// Whether to stop; asked before every step.
    fn cancelled(&self) -> bool {
        false
    }
}

/// An observer that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// Samples a video: all its latent frames in order, each of shape
/// [`SamplerRequest::unit_shape`], the `finished` ones first.
///
/// `finished` are the units there are already: none for a new text-to-video run, the encoded
/// image (as [`super::LatentScaling::image_from_vae`] leaves it) for a new image-to-video run,
/// and what an earlier run handed to its observer for one that is resumed or extended. The
/// result has the same bits whichever units are given and whichever sampled.
///
/// # Errors
/// * [`crate::ErrorKind::Input`] when the request or a finished unit cannot be used;
/// * [`crate::ErrorKind::Numeric`] when a unit, or a stage that is watched, ends with NaN or
///   infinity;
/// * [`crate::ErrorKind::Interrupted`] when the observer cancels;
/// * whatever the denoiser, the noise source or the observer returns.
pub fn sample(
    request: &SamplerRequest,
    finished: Vec<Latent>,
    denoiser: &mut dyn Denoiser,
    noise: &mut dyn NoiseSource,
    observer: &mut dyn Observer,
) -> Result<Vec<Latent>> {
    request.validate()?;
    check_finished(request, &finished)?;
    let mut history = History::new(request.rounding.latents);
    finished.into_iter().for_each(|latent| history.push(latent));
    let mut run = Run { request, denoiser, noise, observer };
    while history.len() < request.units {
        let latent = run.unit(&history)?;
        run.observer.unit_finished(history.len(), &latent)?;
        history.push(latent);
    }
    Ok(history.into_frames())
}

fn check_finished(request: &SamplerRequest, finished: &[Latent]) -> Result<()> {
    if request.mode == Mode::ImageToVideo && finished.is_empty() {
        return Err(Error::input("image-to-video needs the image's latent as unit 0"));
    }
    if finished.len() > request.units {
        let (have, want) = (finished.len(), request.units);
        return Err(Error::input(format!("{have} units are finished already, {want} asked for"))
            .hint("ask for at least as many units as there are"));
    }
    for (unit, latent) in finished.iter().enumerate() {
        check_shape(latent.shape(), request.unit_shape())
            .map_err(|e| e.at(format!("unit {unit}")))?;
        if !latent.is_finite() {
            return Err(Error::input(format!("finished unit {unit} holds NaN or infinity"))
                .hint("resume from an earlier unit"));
        }
    }
    Ok(())
}

fn check_shape(found: LatentShape, wanted: LatentShape) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::input(format!("a latent of shape {found} was given for {wanted}")))
}

/// A run's parts, for as long as it lasts.
struct Run<'a> {
    request: &'a SamplerRequest,
    denoiser: &'a mut dyn Denoiser,
    noise: &'a mut dyn NoiseSource,
    observer: &'a mut dyn Observer,
}

impl Run<'_> {
    /// Samples the next unit after `history`. Its latent is looked at when it is complete, and no
    /// earlier unless an observer wants to see it: that would wait for the device. NaN and
    /// infinity of an early stage are still there: every position goes into the next stage, times
    /// a factor that is not 0, and then only sums follow. NaN stays NaN in all of it, and infinity
    /// stays infinite or becomes NaN.
    fn unit(&mut self, history: &History) -> Result<Latent> {
        let Schedule { stages } = self.request.schedule(history.len())?;
        let mut seen = None;
        for (stage, schedule) in stages.iter().enumerate() {
            let geometry = self.request.stage_geometry(history.len(), stage)?;
            self.stage(&geometry, schedule, history)?;
            seen = match self.observer.wants_stages() {
                true => {
                    let x = self.latent(geometry.shape, &place(&geometry))?;
                    self.observer.stage_finished(&geometry, &x)?;
                    Some(x)
                }
                false => None,
            };
        }
        let unit = format!("unit {}", history.len());
        seen.map_or_else(|| self.latent(self.request.unit_shape(), &unit), Ok)
    }

    /// Samples one stage of the next unit after `history`.
    fn stage(
        &mut self,
        geometry: &StageGeometry,
        schedule: &StageSchedule,
        history: &History,
    ) -> Result<()> {
        let entry = self.entry(geometry).map_err(|e| e.at(place(geometry)))?;
        self.check_cancelled(geometry, 0)?;
        let clips = history.clips(geometry.stage);
        self.denoiser.begin_stage(geometry, &clips, &entry).map_err(|e| e.at(place(geometry)))?;
        self.steps(geometry, schedule)?;
        match self.stage_after(geometry)? {
            Some(next) => self.denoiser.expect_stage(&next).map_err(|e| e.at(place(&next))),
            None => Ok(()),
        }
    }

    /// The latent after all steps so far, those of `place`.
    fn latent(&mut self, shape: LatentShape, place: &str) -> Result<Latent> {
        let x = self.denoiser.latent().map_err(|e| e.at(place))?;
        check_shape(x.shape(), shape).map_err(|e| e.at(place))?;
        if !x.is_finite() {
            return Err(Error::numeric(format!("{place}: the latent holds NaN or infinity"))
                .hint("check the checkpoint for damage, or lower the guidance"));
        }
        Ok(x)
    }

    /// The stage after `present`, if that is not the last of the run.
    fn stage_after(&self, present: &StageGeometry) -> Result<Option<StageGeometry>> {
        let (unit, stage) = match present.stage + 1 {
            stage if stage < stage_spans().len() => (present.unit, stage),
            _ => (present.unit + 1, 0),
        };
        let comes = unit < self.request.units;
        comes.then(|| self.request.stage_geometry(unit, stage)).transpose()
    }

    /// What a stage starts from: for stage 0 its frame of the initial noise, for the others
    /// the stage below.
    fn entry(&mut self, to: &StageGeometry) -> Result<Entry> {
        if to.stage == 0 {
            let (frame, shape) = (self.request.noise_frame(to.unit), self.request.unit_shape());
            let noise = self.noise.initial(frame, shape)?;
            check_shape(noise.shape(), shape)?;
            return Ok(Entry::Start { noise });
        }
        let noise = self.noise.block(to.unit, to.stage, to.shape)?;
        check_shape(noise.shape(), to.shape)?;
        let (alpha, beta) = stage_spans()[to.stage].renoise();
        Ok(Entry::Renoise { alpha: alpha as f32, beta: beta as f32, noise })
    }

    /// Takes all steps of one stage.
    fn steps(&mut self, geometry: &StageGeometry, schedule: &StageSchedule) -> Result<()> {
        for (index, &timestep) in geometry.timesteps.iter().enumerate() {
            self.check_cancelled(geometry, index)?;
            let guidance = self.request.guidance_at(geometry.unit);
            let step = Step { index, timestep, guidance, dsigma: schedule.dsigma(index) };
            self.denoiser
                .step(&step)
                .map_err(|e| e.at(format!("{}, step {index}", place(geometry))))?;
            self.observer.step_finished(geometry, index + 1)?;
        }
        Ok(())
    }

    fn check_cancelled(&self, geometry: &StageGeometry, step: usize) -> Result<()> {
        if !self.observer.cancelled() {
            return Ok(());
        }
        let (place, units) = (place(geometry), self.request.units);
        Err(Error::interrupted(format!(
            "stopped at {place}, step {step}; {} of {units} units are finished",
            geometry.unit
        )))
    }
}

fn place(geometry: &StageGeometry) -> String {
    format!("unit {}, stage {}", geometry.unit, geometry.stage)
}
