//! A request as the JSON that videos, saved runs and latents carry, and back.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{FirstImage, Pipeline, Request, Tiling};
use crate::checkpoint::{Family, Variant};
use crate::media::Fit;
use crate::sampler::LinearGuidance;
use crate::{Error, Result};

/// Hashes of the files a run starts from.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Given {
    /// SHA-256 of the pixels of the first image, at the size of the video.
    pub image: Option<String>,
    /// SHA-256 of the latents the video begins with.
    pub latents: Option<String>,
}

impl Given {
    /// As an identity tells it.
    pub fn of(identity: &Value) -> Given {
        let hash = |name: &str| identity[name].as_str().map(String::from);
        Given { image: hash("image_sha256"), latents: hash("latents_sha256") }
    }
}

impl Request {
    /// The settings of a video of this model, as they are written into it.
    pub fn settings(&self, family: Family, variant: Variant) -> Value {
        let mut settings = json!({
            "generator": concat!("pyraflow ", env!("CARGO_PKG_VERSION")),
            "family": family,
            "variant": variant,
            "prompt": self.prompt,
            "suffix": self.suffix,
            "negative": self.negative,
            "width": self.width,
            "height": self.height,
            "units": self.units,
            "steps": self.steps,
            "video_steps": self.video_steps,
            "guidance": self.guidance,
            "video_guidance": self.video_guidance,
            "seed": self.seed,
        });
        if let Some(linear) = self.linear_guidance {
            settings["linear_guidance"] = json!({ "alpha": linear.alpha, "min": linear.min });
        }
        if let Some(tiling) = self.tiling {
            settings["tile"] = json!(tiling.tile);
        }
        if let Some(image) = &self.image {
            let name = image.path.file_name().unwrap_or_default().to_string_lossy();
            settings["image"] = json!({ "file": name, "fit": format!("{:?}", image.fit) });
        }
        if let Some(latents) = &self.latents {
            let name = latents.file_name().unwrap_or_default().to_string_lossy();
            settings["latents"] = json!(name);
        }
        settings
    }

    /// The request whose [`Request::settings`] these are, or the identity of a saved run. The
    /// names of files it started from are kept, not where they were.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] naming the setting that is missing or of the wrong kind.
    pub fn from_settings(settings: &Value) -> Result<Request> {
        let number = |name: &str| parse::<u64>(settings, name);
        let image = match &settings["image"] {
            Value::Null => None,
            image => {
                let fit = match parse::<String>(image, "fit")?.as_str() {
                    "Crop" => Fit::Crop,
                    "Pad" => Fit::Pad,
                    "Stretch" => Fit::Stretch,
                    _ => return Err(unusable("fit")),
                };
                Some(FirstImage { path: parse::<String>(image, "file")?.into(), fit })
            }
        };
        let linear_guidance = match &settings["linear_guidance"] {
            Value::Null => None,
            linear => {
                Some(LinearGuidance { alpha: parse(linear, "alpha")?, min: parse(linear, "min")? })
            }
        };
        let tiling = match &settings["tile"] {
            Value::Null => None,
            _ => Some(Tiling::new(parse(settings, "tile")?)?),
        };
        let side = |name| u32::try_from(number(name)?).map_err(|_| unusable(name));
        Ok(Request {
            prompt: parse(settings, "prompt")?,
            suffix: parse(settings, "suffix")?,
            negative: parse(settings, "negative")?,
            image,
            latents: settings["latents"].as_str().map(Into::into),
            width: side("width")?,
            height: side("height")?,
            units: if settings["units"].is_null() { 1 } else { parse(settings, "units")? },
            steps: parse(settings, "steps")?,
            video_steps: parse(settings, "video_steps")?,
            guidance: parse(settings, "guidance")?,
            video_guidance: parse(settings, "video_guidance")?,
            linear_guidance,
            seed: number("seed")?,
            tiling,
        })
    }
}

fn parse<T: serde::de::DeserializeOwned>(settings: &Value, name: &str) -> Result<T> {
    serde_json::from_value(settings[name].clone()).map_err(|e| unusable(name).because(e))
}

fn unusable(name: &str) -> Error {
    Error::input(format!("the saved settings say nothing usable about {name}"))
        .hint("they may be damaged, or of another version of pyraflow")
}

impl Pipeline {
    /// The settings that are written into the video.
    pub fn settings(&self, request: &Request) -> Value {
        request.settings(self.checkpoint().family(), self.checkpoint().variant())
    }

    /// What decides the latents of each unit; the length does not, so that an unfinished
    /// run can be resumed at another length.
    pub(super) fn identity(&self, request: &Request, given: &Given) -> Value {
        let mut identity = self.settings(request);
        if let Some(fields) = identity.as_object_mut() {
            fields.remove("units");
            fields.remove("tile");
            fields.insert("weight_bytes".into(), Value::Object(self.weights.sizes()));
            fields.insert("device".into(), self.backend().name().into());
            insert(fields, "image_sha256", &given.image);
            insert(fields, "latents_sha256", &given.latents);
        }
        identity
    }
}

fn insert(fields: &mut Map<String, Value>, name: &str, value: &Option<impl Serialize>) {
    if let Some(value) = value {
        fields.insert(name.into(), json!(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_back() {
        let mut request = Request::published(Family::Sd3, Variant::P384, "a “fox”\n", None);
        request.guidance = 6.3;
        let settings = |r: &Request| {
            let text = format!("{:#}", r.settings(Family::Sd3, Variant::P384));
            serde_json::from_str::<Value>(&text).expect("JSON")
        };
        assert_eq!(Request::from_settings(&settings(&request)).expect("a request"), request);
        request.linear_guidance = Some(LinearGuidance { alpha: 0.1, min: 2.7 });
        request.tiling = Some(Tiling::PUBLISHED);
        request.image = Some(FirstImage { path: "fox.png".into(), fit: Fit::Pad });
        request.latents = Some("begin.safetensors".into());
        assert_eq!(Request::from_settings(&settings(&request)).expect("a request"), request);
        for name in ["prompt", "width", "steps", "seed", "video_guidance"] {
            let mut broken = settings(&request);
            broken[name] = json!({});
            let error = Request::from_settings(&broken).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
