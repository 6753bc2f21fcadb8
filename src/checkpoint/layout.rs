//! What a published checkpoint consists of and where each part lies.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::formats::WeightFiles;
use super::mapped::read_small;
use crate::{Error, Result};

/// What pyraflow itself keeps in a checkpoint's folder.
pub(crate) const OWN_FOLDER: &str = ".pyraflow";

/// The two published models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `pyramid-flow-sd3`: the MMDiT transformer, two CLIP text encoders and T5.
    Sd3,
    /// `pyramid-flow-miniflux`: the Flux transformer, one CLIP text encoder and T5.
    Miniflux,
}

impl Family {
    /// The family whose *transformer* has tensors of these names, if they tell.
    pub fn of_tensor_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        names.into_iter().find_map(|name| {
            if name.starts_with("pos_embed.") || name.contains(".norm_add_q.") {
                Some(Family::Sd3)
            } else if name.starts_with("x_embedder.")
                || name.starts_with("single_transformer_blocks.")
                || name.contains(".norm_added_q.")
            {
                Some(Family::Miniflux)
            } else {
                None
            }
        })
    }

    /// The components this family has.
    pub fn components(self) -> &'static [Component] {
        use Component::*;
        match self {
            Family::Sd3 => &[Transformer, Vae, ClipL, ClipG, T5],
            Family::Miniflux => &[Transformer, Vae, ClipL, T5],
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Sd3 => "sd3",
            Family::Miniflux => "miniflux",
        })
    }
}

/// A part of a checkpoint with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// The diffusion transformer, of which a checkpoint has one per [`Variant`].
    Transformer,
    /// The causal video VAE.
    Vae,
    /// The CLIP-L text encoder.
    ClipL,
    /// The CLIP-G text encoder (sd3 only).
    ClipG,
    /// The T5-XXL text encoder.
    T5,
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Component::Transformer => "transformer",
            Component::Vae => "VAE",
            Component::ClipL => "CLIP-L",
            Component::ClipG => "CLIP-G",
            Component::T5 => "T5",
        })
    }
}

impl Component {
    /// The component's folder; `None` if the family has no such component.
    pub(crate) fn folder(self, family: Family, variant: Variant) -> Option<&'static str> {
        Some(match (self, family) {
            (Component::Transformer, _) => variant.folder(),
            (Component::Vae, _) => "causal_video_vae",
            (Component::ClipL, _) => "text_encoder",
            (Component::ClipG, Family::Sd3) => "text_encoder_2",
            (Component::ClipG, Family::Miniflux) => return None,
            (Component::T5, Family::Sd3) => "text_encoder_3",
            (Component::T5, Family::Miniflux) => "text_encoder_2",
        })
    }

    /// The folder of a text encoder's tokenizer and the files needed of it.
    pub(super) fn tokenizer(
        self,
        family: Family,
    ) -> Option<(&'static str, &'static [&'static str])> {
        const CLIP: &[&str] = &["vocab.json", "merges.txt"];
        const T5: &[&str] = &["tokenizer.json"];
        match (self, family) {
            (Component::ClipL, _) => Some(("tokenizer", CLIP)),
            (Component::ClipG, Family::Sd3) => Some(("tokenizer_2", CLIP)),
            (Component::T5, Family::Sd3) => Some(("tokenizer_3", T5)),
            (Component::T5, Family::Miniflux) => Some(("tokenizer_2", T5)),
            _ => None,
        }
    }

    /// The name under which weights are published, without `.safetensors`.
    pub(super) fn stem(self) -> &'static str {
        match self {
            Component::Transformer | Component::Vae => "diffusion_pytorch_model",
            Component::ClipL | Component::ClipG | Component::T5 => "model",
        }
    }

    /// The weights in the folder called `folder` of the checkpoint in `dir`: as published,
    /// else as converted, since the published files are not needed after that.
    pub(super) fn find_weights(self, dir: &Path, folder: &str) -> Option<WeightFiles> {
        let bin = match self {
            Component::Transformer | Component::Vae => "diffusion_pytorch_model.bin",
            Component::ClipL | Component::ClipG | Component::T5 => "pytorch_model.bin",
        };
        WeightFiles::find(&dir.join(folder), self.stem(), bin).or_else(|| {
            let stored = stored_file(dir, folder);
            stored.is_file().then_some(WeightFiles::Safetensors(stored))
        })
    }
}

/// Where the converted weights of a checkpoint's part lie, if they lie in its own folder.
pub(crate) fn stored_file(dir: &Path, folder: &str) -> PathBuf {
    dir.join(OWN_FOLDER).join(format!("{folder}.safetensors"))
}

/// Which sizes a diffusion transformer was trained for. The command line holds requests to
/// them unless it is told not to; the library does not, since weights of other origin in the
/// same folder may have other sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum Variant {
    /// 128×128, up to 9 latent frames (2.7 s): the model built into the program.
    #[serde(rename = "128p")]
    P128,
    /// 640×384 and 384×640, up to 16 latent frames (5 s).
    #[serde(rename = "384p")]
    P384,
    /// 1280×768 and 768×1280, up to 31 latent frames (10 s).
    #[serde(rename = "768p")]
    P768,
    /// Single images of 1024×1024, 1280×768 and 768×1280.
    #[serde(rename = "image")]
    Image,
}

impl Variant {
    /// All variants: the three that are published, and the built-in model's.
    pub const ALL: [Variant; 4] = [Variant::P128, Variant::P384, Variant::P768, Variant::Image];

    /// `384p`, `768p` or `image`, as published, or `128p`.
    pub fn name(self) -> &'static str {
        match self {
            Variant::P128 => "128p",
            Variant::P384 => "384p",
            Variant::P768 => "768p",
            Variant::Image => "image",
        }
    }

    /// The variant called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|variant| variant.name() == name)
    }

    /// Its transformer's folder in a checkpoint.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Variant::P128 => "diffusion_transformer_128p",
            Variant::P384 => "diffusion_transformer_384p",
            Variant::P768 => "diffusion_transformer_768p",
            Variant::Image => "diffusion_transformer_image",
        }
    }

    /// Frame sizes it was trained for, as (width, height) in pixels.
    pub fn sizes(self) -> &'static [(usize, usize)] {
        match self {
            Variant::P128 => &[(128, 128)],
            Variant::P384 => &[(640, 384), (384, 640)],
            Variant::P768 => &[(1280, 768), (768, 1280)],
            Variant::Image => &[(1024, 1024), (1280, 768), (768, 1280)],
        }
    }

    /// The longest video it was trained for, in latent frames; T of them are 8(T−1)+1
    /// frames of video.
    pub fn max_latent_frames(self) -> usize {
        match self {
            Variant::P128 => 9,
            Variant::P384 => 16,
            Variant::P768 => 31,
            Variant::Image => 1,
        }
    }

    /// Whether it was trained for this size in pixels and length in latent frames.
    pub fn fits(self, width: usize, height: usize, latent_frames: usize) -> bool {
        self.sizes().contains(&(width, height)) && latent_frames <= self.max_latent_frames()
    }

    /// The variants that the checkpoint in `dir` has.
    pub fn available(dir: &Path) -> Vec<Variant> {
        Self::ALL.into_iter().filter(|variant| dir.join(variant.folder()).is_dir()).collect()
    }

    /// The variant asked for, else the only one there is.
    pub(super) fn choose(dir: &Path, name: Option<&str>) -> Result<Variant> {
        let available = Self::available(dir);
        let names = available.iter().map(|v| v.name()).collect::<Vec<_>>().join(", ");
        let wanted = match name {
            None => None,
            Some(name) => Some(Self::from_name(name).ok_or_else(|| {
                Error::usage(format!("there is no variant {name:?}; they are 384p, 768p and image"))
            })?),
        };
        match (available.as_slice(), wanted) {
            ([], _) => Err(no_checkpoint(dir)),
            (_, Some(variant)) if available.contains(&variant) => Ok(variant),
            (_, Some(variant)) => Err(Error::model(format!(
                "{} has no {} model; it has {names}",
                dir.display(),
                variant.name()
            ))),
            (&[only], None) => Ok(only),
            (_, None) => Err(Error::usage(format!(
                "{} has several models ({names}): one must be chosen",
                dir.display()
            ))),
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn no_checkpoint(dir: &Path) -> Error {
    if !dir.is_dir() {
        return Error::model(format!("there is no checkpoint folder {}", dir.display()));
    }
    let error = Error::model(format!(
        "{} holds no Pyramid Flow checkpoint: no folder diffusion_transformer_384p, \
         diffusion_transformer_768p or diffusion_transformer_image",
        dir.display()
    ));
    if dir.join("config.json").is_file() {
        return error.hint("this looks like one part of a checkpoint: give the folder above it");
    }
    error.hint("give the folder that holds causal_video_vae and the others")
}

/// Follows `path` to a folder, also where it is a symbolic link that git or an archive tool
/// wrote as a text file (as on a file system without links).
pub(super) fn resolve_folder(path: PathBuf) -> PathBuf {
    const LONGEST_PATH: u64 = 4096;
    if !path.is_file() {
        return path;
    }
    let target = read_small(&path, LONGEST_PATH).ok().map(|text| path.with_file_name(text.trim()));
    target.filter(|target| target.is_dir()).unwrap_or(path)
}
