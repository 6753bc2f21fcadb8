//! What to sample: the settings of a run, checked, and what follows from them.

use half::bf16;

use super::guidance::LinearGuidance;
use super::history::{clips, level_shape};
use super::latent::LatentShape;
use super::schedule::{STAGES, Schedule};
use crate::{Error, Result};

/// Latent extents must be a multiple of this: two halvings and then patches of 2x2.
pub const ALIGNMENT: usize = 8;

/// Largest latent height and width (8192 pixels); far beyond any published model.
pub const MAX_EXTENT: usize = 1024;

/// Most latent frames; far beyond any published model.
pub const MAX_UNITS: usize = 4096;

/// Largest guidance scale; useful ones are below 10.
pub const MAX_GUIDANCE: f32 = 100.0;

/// What unit 0 is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Sampled, like all others.
    TextToVideo,
    /// A given image.
    ImageToVideo,
}

/// What is rounded to bf16 between steps. The maths of the sampler is f32 in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rounding {
    /// The current frame after every change, and the resized frames of the history.
    pub latents: bool,
    /// The timestep that the transformer embeds.
    pub timesteps: bool,
}

impl Rounding {
    /// What the published pipeline does when it runs in bf16.
    pub const PUBLISHED_BF16: Self = Rounding { latents: true, timesteps: true };
}

/// The settings of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerRequest {
    /// Whether unit 0 is given.
    pub mode: Mode,
    /// Number of latent frames, unit 0 included; `n` of them decode to `8(n-1)+1` frames.
    pub units: usize,
    /// Latent height: pixels / 8.
    pub height: usize,
    /// Latent width: pixels / 8.
    pub width: usize,
    /// Steps per stage of unit 0, or of every unit if unit 0 is a given image.
    pub steps: [usize; STAGES],
    /// Steps per stage of the other units, if unit 0 is not given.
    pub video_steps: [usize; STAGES],
    /// Guidance scale of unit 0. At 0 there is no guidance at all, in any unit.
    pub guidance: f32,
    /// Guidance scale of the other units.
    pub video_guidance: f32,
    /// Falling guidance, in place of the constant `guidance` and `video_guidance`.
    pub linear_guidance: Option<LinearGuidance>,
    /// Rounding to bf16.
    pub rounding: Rounding,
}

impl SamplerRequest {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] naming the first setting that cannot be used.
    pub fn validate(&self) -> Result<()> {
        let least = match self.mode {
            Mode::TextToVideo => 1,
            Mode::ImageToVideo => 2,
        };
        if !(least..=MAX_UNITS).contains(&self.units) {
            return Err(Error::input(format!("cannot sample {} latent frames", self.units))
                .hint(format!("ask for {least} to {MAX_UNITS}")));
        }
        for (name, extent) in [("height", self.height), ("width", self.width)] {
            if extent % ALIGNMENT != 0 || !(ALIGNMENT..=MAX_EXTENT).contains(&extent) {
                return Err(Error::input(format!("latent {name} {extent} cannot be sampled"))
                    .hint(format!(
                        "it must be a multiple of {ALIGNMENT} (of 64 in pixels), at most {MAX_EXTENT}"
                    )));
            }
        }
        Schedule::new(self.steps).map_err(|error| error.at("first unit"))?;
        Schedule::new(self.video_steps).map_err(|error| error.at("later units"))?;
        let linear = self.linear_guidance.unwrap_or_default();
        for (name, value) in [
            ("guidance", self.guidance),
            ("video guidance", self.video_guidance),
            ("slope of the linear guidance", linear.alpha),
            ("minimum of the linear guidance", linear.min),
        ] {
            // NaN is in no range.
            if !(0.0..=MAX_GUIDANCE).contains(&value) {
                return Err(Error::input(format!("{name} of {value} cannot be used"))
                    .hint(format!("it must be between 0 and {MAX_GUIDANCE}")));
            }
        }
        Ok(())
    }

    /// The shape of a finished unit.
    pub fn unit_shape(&self) -> LatentShape {
        LatentShape::frame(self.height, self.width)
    }

    /// The first unit that is sampled.
    pub fn first_unit(&self) -> usize {
        match self.mode {
            Mode::TextToVideo => 0,
            Mode::ImageToVideo => 1,
        }
    }

    /// The frame of the initial noise that `unit` starts from (`unit >= first_unit()`).
    pub fn noise_frame(&self, unit: usize) -> usize {
        unit - self.first_unit()
    }

    /// The schedule of `unit`.
    ///
    /// # Errors
    /// As [`Schedule::new`].
    pub fn schedule(&self, unit: usize) -> Result<Schedule> {
        match self.mode {
            Mode::TextToVideo if unit > 0 => Schedule::new(self.video_steps),
            _ => Schedule::new(self.steps),
        }
    }

    /// The guidance scale at `unit`; `None` when there is no guidance and only the positive
    /// prompt counts. (A scale of `Some(0)` leaves only the negative one.)
    pub fn guidance_at(&self, unit: usize) -> Option<f32> {
        (self.guidance > 0.0).then(|| match self.linear_guidance {
            Some(linear) => linear.at(self.guidance, unit),
            None if unit == 0 => self.guidance,
            None => self.video_guidance,
        })
    }

    /// What the transformer will be asked for in one stage of one unit.
    ///
    /// # Errors
    /// As [`Schedule::new`].
    pub fn stage_geometry(&self, unit: usize, stage: usize) -> Result<StageGeometry> {
        let full = self.unit_shape();
        let history = clips(unit, stage).into_iter().map(|clip| {
            let frames = clip.frames.len();
            LatentShape { frames, ..level_shape(full, clip.level) }
        });
        let schedule = self.schedule(unit)?;
        let timesteps = schedule.stages[stage].timesteps.iter();
        let round = |t: f32| if self.rounding.timesteps { bf16::from_f32(t).to_f32() } else { t };
        Ok(StageGeometry {
            unit,
            stage,
            shape: level_shape(full, stage),
            history: history.collect(),
            timesteps: timesteps.map(|&t| round(t as f32)).collect(),
            guided: self.guidance_at(unit).is_some(),
            rounded: self.rounding.latents,
        })
    }
}

/// What a stage asks of the transformer; enough to plan its memory.
#[derive(Debug, Clone, PartialEq)]
pub struct StageGeometry {
    /// The unit (latent frame).
    pub unit: usize,
    /// The stage, 0 the smallest.
    pub stage: usize,
    /// The current frame.
    pub shape: LatentShape,
    /// The history clips, oldest first.
    pub history: Vec<LatentShape>,
    /// The timestep of each step, as the transformer embeds it (rounded, if the run does so).
    pub timesteps: Vec<f32>,
    /// Whether the negative prompt is evaluated too.
    pub guided: bool,
    /// Whether the latent is rounded to bf16 whenever it has changed.
    pub rounded: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    type Edit = fn(&mut SamplerRequest);

    fn request() -> SamplerRequest {
        SamplerRequest {
            mode: Mode::TextToVideo,
            units: 16,
            height: 48,
            width: 80,
            steps: [20, 20, 20],
            video_steps: [10, 10, 10],
            guidance: 7.0,
            video_guidance: 5.0,
            linear_guidance: None,
            rounding: Rounding::default(),
        }
    }

    #[test]
    fn every_bad_setting_is_refused() {
        request().validate().unwrap();
        let edits: [(&str, Edit); 14] = [
            ("0 latent frames", |r| r.units = 0),
            ("5000 latent frames", |r| r.units = 5000),
            ("1 latent frames", |r| (r.mode, r.units) = (Mode::ImageToVideo, 1)),
            ("height 0", |r| r.height = 0),
            ("height 44", |r| r.height = 44),
            ("width 1032", |r| r.width = 1032),
            ("width 18446744073709551608", |r| r.width = usize::MAX - 7),
            ("first unit", |r| r.steps[1] = 0),
            ("later units", |r| r.video_steps[2] = 1001),
            ("guidance of NaN", |r| r.guidance = f32::NAN),
            ("guidance of -1", |r| r.guidance = -1.0),
            ("video guidance of 1000000000", |r| r.video_guidance = 1e9),
            ("slope", |r| r.linear_guidance = Some(LinearGuidance { alpha: -1.0, min: 2.0 })),
            ("minimum", |r| {
                r.linear_guidance = Some(LinearGuidance { alpha: 1.0, min: f32::INFINITY });
            }),
        ];
        for (message, edit) in edits {
            let mut request = request();
            edit(&mut request);
            let error = request.validate().unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Input);
            assert!(error.to_string().contains(message), "{error} lacks {message}");
            assert!(error.hint_text().is_some(), "{error}");
        }
    }

    #[test]
    fn guidance_follows_unit_and_mode() {
        let mut r = request();
        assert_eq!([r.guidance_at(0), r.guidance_at(1)], [Some(7.0), Some(5.0)]);
        r.linear_guidance = Some(LinearGuidance { alpha: 3.0, min: 2.0 });
        let scales: Vec<_> = (0..4).map(|unit| r.guidance_at(unit)).collect();
        assert_eq!(scales, [Some(7.0), Some(4.0), Some(2.0), Some(2.0)]);
        r.guidance = 0.0;
        assert_eq!([r.guidance_at(0), r.guidance_at(1)], [None, None]);
        r.linear_guidance = None;
        assert_eq!([r.guidance_at(0), r.guidance_at(1)], [None, None]);
    }

    #[test]
    fn steps_and_noise_follow_the_mode() {
        let mut r = request();
        let steps = |r: &SamplerRequest, unit| r.schedule(unit).unwrap().stages[0].steps();
        assert_eq!([steps(&r, 0), steps(&r, 1)], [20, 10]);
        assert_eq!([r.noise_frame(0), r.noise_frame(1)], [0, 1]);
        r.mode = Mode::ImageToVideo;
        assert_eq!([steps(&r, 1), steps(&r, 2)], [20, 20]);
        assert_eq!([r.noise_frame(1), r.noise_frame(2)], [0, 1]);
    }

    #[test]
    fn geometry_lists_history_and_rounded_timesteps() {
        let mut r = request();
        r.video_steps = [2, 2, 2];
        let geometry = r.stage_geometry(4, 2).unwrap();
        let shape = |frames, height, width| LatentShape { frames, height, width };
        assert_eq!(geometry.shape, shape(1, 48, 80));
        assert_eq!(geometry.history, [shape(2, 12, 20), shape(1, 24, 40), shape(1, 48, 80)]);
        assert_eq!(geometry.timesteps, [386.0, 1.385]);
        assert!(geometry.guided);
        r.rounding.timesteps = true;
        assert_eq!(r.stage_geometry(1, 0).unwrap().timesteps, [1000.0, 744.0]);
        assert_eq!(r.stage_geometry(1, 2).unwrap().timesteps, [386.0, 1.382_812_5]);
    }
}
