//! Arguments that `generate` and `plan` share, and what they mean.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use pyraflow::batch::{LineSettings, OneOrThree};
use pyraflow::checkpoint::Variant;
use pyraflow::media::{Fit, probe_image};
use pyraflow::pipeline::{FirstImage, Preset, Request, Tiling, units_of_frames, units_of_seconds};
use pyraflow::sampler::LinearGuidance;
use pyraflow::{Error, Result};

/// What the video should be.
#[derive(Debug, Clone, clap::Args)]
pub struct VideoArgs {
    /// What to show
    pub prompt: Option<OsString>,

    /// Start from this image (PNG, JPEG or WebP)
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,

    /// How the image is brought to the size of the video
    #[arg(long, value_enum, default_value = "crop")]
    pub fit: FitArg,

    /// Length in seconds, a multiple of 1/3 (5 s are 121 frames)
    #[arg(long, group = "length", value_name = "S", allow_hyphen_values = true)]
    pub seconds: Option<f64>,

    /// Length in frames, 1 + a multiple of 8
    #[arg(long, group = "length", value_name = "N", allow_negative_numbers = true)]
    pub frames: Option<u32>,

    /// Length in latent frames; N of them are 8·(N − 1) + 1 frames
    #[arg(long, group = "length", value_name = "N", allow_negative_numbers = true)]
    pub units: Option<usize>,

    /// Size: 384p (640x384), 768p (1280x768) or WxH in multiples of 64 [default: the model's]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub size: Option<Size>,

    /// Steps of the three stages for the first frame, or one number for all three
    #[arg(long, value_name = "A,B,C", allow_hyphen_values = true)]
    pub steps: Option<Steps>,

    /// Steps of the three stages for the other frames
    #[arg(long, value_name = "A,B,C", allow_hyphen_values = true)]
    pub video_steps: Option<Steps>,

    /// Guidance of the first frame; 0 for none at all
    #[arg(long, value_name = "G", allow_hyphen_values = true)]
    pub guidance: Option<f32>,

    /// Guidance of the other frames
    #[arg(long, value_name = "G", allow_hyphen_values = true)]
    pub video_guidance: Option<f32>,

    /// Guidance that falls from --guidance by ALPHA with every unit, down to MIN
    #[arg(
        long,
        value_name = "ALPHA,MIN",
        num_args = 0..=1,
        default_missing_value = "0.5,2",
        require_equals = true
    )]
    pub linear_guidance: Option<Linear>,

    /// Fewer steps: half of the published ones, about twice as fast
    #[arg(long, conflicts_with = "best")]
    pub fast: bool,

    /// More steps: twice the published ones for every frame but the first
    #[arg(long)]
    pub best: bool,

    /// What to avoid [default: the published negative prompt; nothing for the built-in model]
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<OsString>,

    /// Appended to the prompt [default: ", hyper quality, Ultra HD, 8K"; nothing for the
    /// built-in model]
    #[arg(long, value_name = "TEXT", conflicts_with = "no_suffix")]
    pub suffix: Option<OsString>,

    /// Append nothing to the prompt
    #[arg(long)]
    pub no_suffix: bool,

    /// Encode and decode in tiles of PX pixels (256 if not said), as the published code
    /// does; changes the result slightly
    #[arg(
        long,
        value_name = "PX",
        num_args = 0..=1,
        default_missing_value = "256",
        require_equals = true
    )]
    pub tile: Option<usize>,

    /// Take sizes and lengths that the model was not made for
    #[arg(long)]
    pub force: bool,
}

/// The length of a video, said in one way at most.
#[derive(Debug, Clone, Copy)]
pub struct Length {
    /// Seconds.
    pub seconds: Option<f64>,
    /// Frames.
    pub frames: Option<u32>,
    /// Latent frames.
    pub units: Option<usize>,
}

impl Length {
    /// In latent frames.
    pub fn in_units(self) -> Result<Option<usize>> {
        let seconds = self.seconds.map(units_of_seconds).transpose()?;
        let frames = self.frames.map(units_of_frames).transpose()?;
        Ok(self.units.or(frames).or(seconds))
    }
}

/// See [`Fit`].
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FitArg {
    /// Cut off what does not fit, keeping the centre
    Crop,
    /// Keep all, with bars
    Pad,
    /// Change the aspect ratio
    Stretch,
}

impl From<FitArg> for Fit {
    fn from(fit: FitArg) -> Fit {
        match fit {
            FitArg::Crop => Fit::Crop,
            FitArg::Pad => Fit::Pad,
            FitArg::Stretch => Fit::Stretch,
        }
    }
}

/// A frame size as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// That of a published model, in the orientation of the image if there is one.
    Of(Variant),
    /// Width and height in pixels.
    Pixels(u32, u32),
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        if let Some(variant @ (Variant::P384 | Variant::P768)) = Variant::from_name(text) {
            return Ok(Size::Of(variant));
        }
        let (width, height) =
            text.split_once(['x', 'X']).ok_or("expected 384p, 768p or WIDTHxHEIGHT")?;
        let number = |n: &str| n.parse::<u32>().map_err(|e| format!("{n:?}: {e}"));
        Ok(Size::Pixels(number(width)?, number(height)?))
    }
}

/// Steps of the three stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps(pub [usize; 3]);

impl FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Steps, String> {
        let numbers: Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
        match numbers.map_err(|e| e.to_string())?.as_slice() {
            &[all] => Ok(Steps([all; 3])),
            &[a, b, c] => Ok(Steps([a, b, c])),
            other => Err(format!("expected one number or three, found {}", other.len())),
        }
    }
}

/// Falling guidance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear(pub f32, pub f32);

impl FromStr for Linear {
    type Err = String;

    fn from_str(text: &str) -> Result<Linear, String> {
        let (alpha, min) = text.split_once(',').ok_or("expected ALPHA,MIN")?;
        let number = |n: &str| n.trim().parse::<f32>().map_err(|e| format!("{n:?}: {e}"));
        Ok(Linear(number(alpha)?, number(min)?))
    }
}

/// Text from the command line.
fn text(what: &str, value: &OsString) -> Result<String> {
    value.to_str().map(String::from).ok_or_else(|| {
        Error::input(format!("{what} is not valid UTF-8"))
            .hint("check the terminal's encoding, or the file it comes from")
    })
}

impl VideoArgs {
    /// The prompt.
    pub fn prompt(&self) -> Result<String> {
        self.prompt.as_ref().map_or(Ok(String::new()), |p| text("the prompt", p))
    }

    /// The variant that the size names or belongs to, if there is one.
    pub fn variant_of_size(&self) -> Option<Variant> {
        match self.size? {
            Size::Of(variant) => Some(variant),
            Size::Pixels(width, height) => [Variant::P384, Variant::P768]
                .into_iter()
                .find(|v| v.sizes().contains(&(width as usize, height as usize))),
        }
    }

    /// The first image, as typed.
    pub fn first_image(&self) -> Option<FirstImage> {
        let path = self.image.clone()?;
        Some(FirstImage { path, fit: self.fit.into() })
    }

    /// The arguments with what a line of a file of prompts sets in place of what was typed;
    /// relative paths in the line begin at `folder`.
    pub fn with_line(&self, line: &LineSettings, folder: &Path) -> Result<VideoArgs> {
        let wrong = |name: &str, reason: String| Error::input(format!("{name}: {reason}"));
        let mut args = self.clone();
        let set = |field: &mut Option<OsString>, value: &Option<String>| {
            if let Some(value) = value {
                *field = Some(value.into());
            }
        };
        set(&mut args.prompt, &line.prompt);
        set(&mut args.negative, &line.negative);
        set(&mut args.suffix, &line.suffix);
        args.no_suffix &= line.suffix.is_none();
        if let Some(image) = &line.image {
            args.image = Some(folder.join(image));
        }
        if let Some(fit) = &line.fit {
            args.fit = FitArg::from_str(fit, false).map_err(|e| wrong("fit", e))?;
        }
        if line.seconds.is_some() || line.frames.is_some() || line.units.is_some() {
            (args.seconds, args.frames, args.units) = (line.seconds, line.frames, line.units);
        }
        if let Some(size) = &line.size {
            args.size = Some(size.parse().map_err(|e| wrong("size", e))?);
        }
        let steps = |steps: OneOrThree| Steps(steps.three());
        args.steps = line.steps.map(steps).or(args.steps);
        args.video_steps = line.video_steps.map(steps).or(args.video_steps);
        args.guidance = line.guidance.or(args.guidance);
        args.video_guidance = line.video_guidance.or(args.video_guidance);
        let linear = line.linear_guidance.map(|[alpha, min]| Linear(alpha, min));
        args.linear_guidance = linear.or(args.linear_guidance);
        Ok(args)
    }

    /// Refuses to run without anything to show.
    pub fn check_prompt(&self, prompt: &str) -> Result<()> {
        if !prompt.trim().is_empty() || self.image.is_some() {
            return Ok(());
        }
        Err(Error::input("there is no prompt")
            .hint("say what to show, as in: pyraflow generate \"a fox runs through snow\""))
    }

    /// The length that was typed, in latent frames.
    pub fn length(&self) -> Result<Option<usize>> {
        Length { seconds: self.seconds, frames: self.frames, units: self.units }.in_units()
    }

    /// Puts what was typed into `request`, which holds the own settings of a model of this
    /// variant.
    pub fn apply(&self, request: &mut Request, variant: Variant) -> Result<()> {
        self.apply_size(request)?;
        match (self.fast, self.best) {
            (true, _) => request.apply_preset(Preset::Fast),
            (_, true) => request.apply_preset(Preset::Best),
            _ => {}
        }
        request.units = self.length()?.unwrap_or(request.units);
        if let Some(Steps(steps)) = self.steps {
            request.steps = steps;
        }
        if let Some(Steps(steps)) = self.video_steps {
            request.video_steps = steps;
        }
        request.guidance = self.guidance.unwrap_or(request.guidance);
        request.video_guidance = self.video_guidance.unwrap_or(request.video_guidance);
        request.linear_guidance =
            self.linear_guidance.map(|Linear(alpha, min)| LinearGuidance { alpha, min });
        if let Some(negative) = &self.negative {
            request.negative = text("the negative prompt", negative)?;
        }
        if let Some(suffix) = &self.suffix {
            request.suffix = text("the suffix", suffix)?;
        }
        if self.no_suffix {
            request.suffix.clear();
        }
        request.tiling = self.tile.map(Tiling::new).transpose()?;
        // What is impossible is told before what is unwise.
        request.resolve()?;
        self.check_trained(request, variant)
    }

    /// Refuses sizes and lengths that the model was not made for, unless --force takes them.
    pub fn check_trained(&self, request: &Request, variant: Variant) -> Result<()> {
        if self.force { Ok(()) } else { request.check_trained(variant) }
    }

    fn apply_size(&self, request: &mut Request) -> Result<()> {
        match self.size {
            Some(Size::Pixels(width, height)) => {
                (request.width, request.height) = (width, height);
                // The size stands, but a bad image is still found before anything is loaded.
                return self.image.as_deref().map_or(Ok(()), |path| probe_image(path).map(drop));
            }
            Some(Size::Of(variant)) => {
                if let Some(&(width, height)) = variant.sizes().first() {
                    (request.width, request.height) = (width as u32, height as u32);
                }
            }
            None => {}
        }
        // An upright image makes an upright video.
        if let Some(path) = &self.image {
            let (width, height) = probe_image(path)?;
            if height > width {
                std::mem::swap(&mut request.width, &mut request.height);
            }
        }
        Ok(())
    }
}
