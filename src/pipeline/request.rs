//! What is to be generated, and the check that it can be.

use std::path::PathBuf;

use crate::checkpoint::{Checkpoint, Family, TransformerConfig, Variant};
use crate::media::{Fit, VideoSpec};
use crate::models::vae::{FACTOR, video_frames};
use crate::sampler::{LinearGuidance, Mode, Rounding, SamplerRequest};
use crate::text::{PUBLISHED_NEGATIVE, PUBLISHED_SUFFIX};
use crate::{Error, Result};

/// Frames per second of every video.
pub const FRAME_RATE: u32 = 24;
/// Frame sizes are multiples of this: 8 for the VAE, 4 for the pyramid, 2 for the patches.
pub const SIZE_MULTIPLE: u32 = 64;

/// The image a video starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstImage {
    /// A PNG, JPEG or WebP file.
    pub path: PathBuf,
    /// How it is brought to the size of the video.
    pub fit: Fit,
}

/// Tiles of the published implementation, which bound its memory and change the result a
/// little, since group norms see one tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Side of a tile in pixels, a multiple of 32.
    pub tile: usize,
}

impl Tiling {
    /// What the published pipeline uses when it saves memory.
    pub const PUBLISHED: Tiling = Tiling { tile: 256 };

    /// Checks the side of the tiles.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] if it is zero or no multiple of 32.
    pub fn new(tile: usize) -> Result<Tiling> {
        if tile == 0 || !tile.is_multiple_of(4 * FACTOR) {
            return Err(Error::input(format!("tiles of {tile} pixels cannot be used"))
                .hint("use a multiple of 32; the published size is 256"));
        }
        Ok(Tiling { tile })
    }
}

/// How many steps to take, next to the published numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Half of the published steps.
    Fast,
    /// Twice the published steps for all units but the first, which takes at least as many.
    Best,
}

/// Everything that decides what a video looks like. [`Request::new`] gives the published
/// settings of a checkpoint; change what you like.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to show.
    pub prompt: String,
    /// Appended to the prompt.
    pub suffix: String,
    /// What to avoid.
    pub negative: String,
    /// The first frame, if it is given.
    pub image: Option<FirstImage>,
    /// A file of latents (see [`super::write_latents`]) that the video begins with, in place
    /// of an image.
    pub latents: Option<PathBuf>,
    /// Pixels per row, a multiple of 64.
    pub width: u32,
    /// Rows, a multiple of 64.
    pub height: u32,
    /// Latent frames; `n` of them are `8·(n − 1) + 1` frames of video.
    pub units: usize,
    /// Steps per stage of the first frame (of every unit if the first frame is given).
    pub steps: [usize; 3],
    /// Steps per stage of the other units.
    pub video_steps: [usize; 3],
    /// Guidance of the first frame; 0 switches guidance off altogether.
    pub guidance: f32,
    /// Guidance of the other units.
    pub video_guidance: f32,
    /// Falling guidance instead of the two constants.
    pub linear_guidance: Option<LinearGuidance>,
    /// The same seed gives the same noise on any device.
    pub seed: u64,
    /// Encode and decode in tiles, as the published code does by default.
    pub tiling: Option<Tiling>,
}

impl Request {
    /// The published settings for `checkpoint`, text to video or image to video.
    pub fn new(checkpoint: &Checkpoint, prompt: &str, image: Option<FirstImage>) -> Request {
        Request::published(checkpoint.family(), checkpoint.variant(), prompt, image)
    }

    /// The published settings of a model.
    pub fn published(
        family: Family,
        variant: Variant,
        prompt: &str,
        image: Option<FirstImage>,
    ) -> Request {
        let (width, height) = variant.sizes().first().copied().unwrap_or((640, 384));
        let guidance = match (family, variant) {
            (Family::Sd3, Variant::P768) => 9.0,
            _ => 7.0,
        };
        let from_image = image.is_some();
        let request = Request {
            prompt: prompt.to_string(),
            suffix: PUBLISHED_SUFFIX.to_string(),
            negative: PUBLISHED_NEGATIVE.to_string(),
            image,
            latents: None,
            width: width as u32,
            height: height as u32,
            units: variant.max_latent_frames().min(16),
            steps: if from_image { [10; 3] } else { [20; 3] },
            video_steps: [10; 3],
            guidance,
            video_guidance: if from_image { 4.0 } else { 5.0 },
            linear_guidance: None,
            seed: 0,
            tiling: None,
        };
        match variant {
            Variant::P128 => request.for_the_demo_model(),
            _ => request,
        }
    }

    /// The settings that suit the built-in model, see its card: it was trained without
    /// suffix and negative prompt, and a small model takes little guidance.
    fn for_the_demo_model(self) -> Request {
        Request {
            suffix: String::new(),
            negative: String::new(),
            units: 7,
            steps: [10; 3],
            guidance: 2.0,
            video_guidance: 2.0,
            ..self
        }
    }

    /// Changes the steps from the published ones of the checkpoint, which must be set: in half
    /// for [`Preset::Fast`], rounded up; for [`Preset::Best`] twice as many for the later units,
    /// and for the first at least those.
    pub fn apply_preset(&mut self, preset: Preset) {
        match preset {
            Preset::Fast => {
                self.steps = self.steps.map(|n| n.div_ceil(2));
                self.video_steps = self.video_steps.map(|n| n.div_ceil(2));
            }
            Preset::Best => {
                // From an image on, all units take the steps of the first.
                let from_image = self.image.is_some();
                self.video_steps = self.video_steps.map(|n| 2 * n);
                for (first, later) in self.steps.iter_mut().zip(self.video_steps) {
                    *first = if from_image { 2 * *first } else { later.max(*first) };
                }
            }
        }
    }

    /// Checks all settings and derives what the sampler and the writer need.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] naming the setting that cannot be used.
    pub fn resolve(&self) -> Result<(SamplerRequest, VideoSpec)> {
        for (name, extent) in [("width", self.width), ("height", self.height)] {
            check_extent(name, extent)?;
        }
        let mode = if self.image.is_some() { Mode::ImageToVideo } else { Mode::TextToVideo };
        let request = SamplerRequest {
            mode,
            units: self.units,
            height: self.height as usize / FACTOR,
            width: self.width as usize / FACTOR,
            steps: self.steps,
            video_steps: self.video_steps,
            guidance: self.guidance,
            video_guidance: self.video_guidance,
            linear_guidance: self.linear_guidance,
            rounding: Rounding::default(),
        };
        request.validate()?;
        let frames = u32::try_from(video_frames(self.units))
            .map_err(|e| Error::input("too many frames").because(e))?;
        let spec = VideoSpec {
            width: self.width,
            height: self.height,
            fps_num: FRAME_RATE,
            fps_den: 1,
            frames,
        };
        Ok((request, spec))
    }

    /// Checks that the transformer has positions for every patch of a frame.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] with the largest size the model can take.
    pub fn check_positions(&self, config: &TransformerConfig) -> Result<()> {
        // Rotary positions have no end; only learned tables do.
        let TransformerConfig::Mmdit(config) = config else { return Ok(()) };
        let most = config.pos_embed_max_size * config.patch_size * FACTOR;
        if self.width.max(self.height) as usize <= most {
            return Ok(());
        }
        let (width, height) = (self.width, self.height);
        Err(Error::input(format!("this model cannot make frames of {width}x{height}"))
            .hint(format!("it has positions for {most} pixels in each direction")))
    }

    /// Checks that the model was trained for this size and length. Others work, but what they
    /// make is rarely of use, and only shows after minutes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] listing the sizes and the length it was trained for.
    pub fn check_trained(&self, variant: Variant) -> Result<()> {
        let (width, height) = (self.width as usize, self.height as usize);
        if variant.fits(width, height, self.units) {
            return Ok(());
        }
        let wrong = if variant.sizes().contains(&(width, height)) {
            format!("{} latent frames", self.units)
        } else {
            format!("{width}x{height}")
        };
        Err(not_made_for(variant, &wrong))
    }

    /// Checks the length only: that of a video whose size is settled.
    ///
    /// # Errors
    /// As [`Request::check_trained`].
    pub fn check_trained_length(&self, variant: Variant) -> Result<()> {
        match self.units <= variant.max_latent_frames() {
            true => Ok(()),
            false => Err(not_made_for(variant, &format!("{} latent frames", self.units))),
        }
    }

    /// The prompt with its suffix.
    pub fn full_prompt(&self) -> String {
        format!("{}{}", self.prompt, self.suffix)
    }
}

fn check_extent(name: &str, extent: u32) -> Result<()> {
    if extent > 0 && extent.is_multiple_of(SIZE_MULTIPLE) {
        return Ok(());
    }
    let below = (extent / SIZE_MULTIPLE * SIZE_MULTIPLE).max(SIZE_MULTIPLE);
    let nearest = match below.checked_add(SIZE_MULTIPLE) {
        Some(above) if extent > SIZE_MULTIPLE => format!("{below} or {above}"),
        _ => below.to_string(),
    };
    Err(Error::input(format!("a {name} of {extent} pixels cannot be generated"))
        .hint(format!("sizes are multiples of {SIZE_MULTIPLE}; the nearest is {nearest}")))
}

/// Latent frames of a video of `frames` frames.
///
/// # Errors
/// [`crate::ErrorKind::Input`] with the two nearest possible numbers, if `frames` is not
/// one more than a multiple of 8.
pub fn units_of_frames(frames: u32) -> Result<usize> {
    if frames % 8 == 1 {
        return Ok(frames as usize / FACTOR + 1);
    }
    let below = (frames.saturating_sub(1)) / 8 * 8 + 1;
    let nearest = match below.checked_add(8) {
        Some(above) if frames > 0 => format!("{below} or {above}"),
        _ => below.to_string(),
    };
    Err(Error::input(format!("a video of {frames} frames cannot be generated"))
        .hint(format!("frames come as 1 + a multiple of 8; the nearest is {nearest}")))
}

/// Latent frames of a video of `seconds` seconds, its first frame counted extra: 5 s are
/// 121 frames.
///
/// # Errors
/// [`crate::ErrorKind::Input`] with the two nearest lengths, if `seconds` is no multiple of
/// a third of a second (to two digits).
pub fn units_of_seconds(seconds: f64) -> Result<usize> {
    const PER_SECOND: f64 = FRAME_RATE as f64 / FACTOR as f64;
    let steps = seconds * PER_SECOND;
    if !(0.0..1e6).contains(&steps) {
        return Err(Error::input(format!("a video of {seconds:?} seconds cannot be generated"))
            .hint("lengths are thirds of a second, from 0 on"));
    }
    // A third written with two digits is meant as a third.
    if (steps - steps.round()).abs() <= 0.005 * PER_SECOND {
        return Ok(steps.round() as usize + 1);
    }
    let [below, above] = [steps.floor() / PER_SECOND, steps.ceil() / PER_SECOND];
    Err(Error::input(format!("a video of {seconds} seconds cannot be generated"))
        .hint(format!("lengths are thirds of a second; the nearest are {below:.2} and {above:.2}")))
}

fn not_made_for(variant: Variant, what: &str) -> Error {
    let sizes: Vec<String> = variant.sizes().iter().map(|(w, h)| format!("{w}x{h}")).collect();
    let length = match variant.max_latent_frames() {
        1 => "a single image (--units 1)".to_owned(),
        most => format!("up to {most} latent frames ({} frames of video)", video_frames(most)),
    };
    Error::input(format!("the {variant} model was not made for {what}")).hint(format!(
        "it was made for {}, {length}; --force tries all the same",
        sizes.join(" and ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_seconds_to_units() {
        assert_eq!(units_of_frames(1).ok(), Some(1));
        assert_eq!(units_of_frames(121).ok(), Some(16));
        assert_eq!(units_of_seconds(5.0).ok(), Some(16));
        assert_eq!(units_of_seconds(10.0).ok(), Some(31));
        assert_eq!(units_of_seconds(0.33).ok(), Some(2));
        assert_eq!(units_of_seconds(0.0).ok(), Some(1));
        for (frames, nearest) in [(0, "1"), (2, "1 or 9"), (120, "113 or 121"), (8, "1 or 9")] {
            let error = units_of_frames(frames).expect_err("impossible");
            assert!(error.hint_text().is_some_and(|h| h.ends_with(nearest)), "{frames}: {error}");
        }
        let error = units_of_seconds(2.5).expect_err("impossible");
        assert!(error.hint_text().is_some_and(|h| h.ends_with("2.33 and 2.67")));
        for seconds in [f64::NAN, -1.0, f64::INFINITY, 1e300] {
            assert!(units_of_seconds(seconds).is_err());
        }
    }

    #[test]
    fn presets_change_the_published_steps() {
        let steps = |variant, image: bool, preset: Option<Preset>| {
            let image = image.then(|| FirstImage { path: "a.png".into(), fit: Fit::Crop });
            let mut request = Request::published(Family::Sd3, variant, "", image);
            preset.into_iter().for_each(|preset| request.apply_preset(preset));
            (request.steps[0], request.video_steps[0])
        };
        let (fast, best) = (Some(Preset::Fast), Some(Preset::Best));
        let published = |image, preset| steps(Variant::P768, image, preset);
        assert_eq!([None, fast, best].map(|p| published(false, p)), [(20, 10), (10, 5), (20, 20)]);
        assert_eq!([None, fast, best].map(|p| published(true, p).0), [10, 5, 20]);
        let demo = |preset| steps(Variant::P128, false, preset);
        assert_eq!([None, fast, best].map(demo), [(10, 10), (5, 5), (20, 20)]);
    }

    #[test]
    fn sizes_are_multiples_of_64() {
        assert!(check_extent("width", 640).is_ok());
        for (extent, nearest) in [(0, "64"), (1, "64"), (65, "64 or 128"), (u32::MAX, "")] {
            let error = check_extent("width", extent).expect_err("impossible");
            assert!(error.hint_text().is_some_and(|h| h.ends_with(nearest)), "{extent}");
        }
    }
}
