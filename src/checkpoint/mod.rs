//! Published checkpoints: their layout, their configurations and their weights.
//!
//! A checkpoint is a folder in the layout of `rain1011/pyramid-flow-sd3` or
//! `rain1011/pyramid-flow-miniflux`. [`Checkpoint::open`] reads JSON and file headers only;
//! [`Checkpoint::open_weights`] maps a component's weights, after converting them once to a
//! bf16 file whose layout suits streaming (see [`StoreOptions`]).
//!
//! Files come from the network: every number in them is checked against the file's length
//! before it is used, nothing in them is executed, and any sequence of bytes gives either
//! weights or an error of kind [`crate::ErrorKind::Model`].

mod config;
mod formats;
mod layout;
mod mapped;
mod order;
mod pickle;
mod store;
mod summary;
mod torch_bin;
mod weights;

use std::path::{Path, PathBuf};

pub use config::{
    ClipActivation, ClipConfig, FluxConfig, MmditConfig, T5Config, TransformerConfig, VaeConfig,
};
pub use layout::{Component, Family, Variant};
pub(crate) use layout::{OWN_FOLDER, stored_file};
pub(crate) use store::open_stored;
pub use store::{Progress, StoreOptions};
pub(crate) use summary::missing_parts;
pub use summary::{ComponentSummary, FileSummary, Summary};
pub use weights::ComponentWeights;

use config::Settings;
use formats::WeightFiles;

use crate::{Error, Result};

/// An opened checkpoint: what it is, not yet its weights.
///
/// Parts other than the transformer may be missing until they are asked for, so that a VAE
/// can be used without text encoders; [`Checkpoint::require_complete`] asks for all at once.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    variant: Variant,
    transformer: TransformerConfig,
    vae: Option<VaeConfig>,
    clip_l: Option<ClipConfig>,
    clip_g: Option<ClipConfig>,
    t5: Option<T5Config>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` with the transformer called `variant` (`384p`, `768p`,
    /// `image`), or with its only one. Where there are several, [`Variant::available`] and
    /// [`Variant::fits`] help to choose.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if a variant must be chosen or the name is none;
    /// [`crate::ErrorKind::Model`] if this is no checkpoint, or a configuration or a header is
    /// damaged, contradicts another one, or asks for what is not implemented.
    pub fn open(dir: &Path, variant: Option<&str>) -> Result<Self> {
        let variant = Variant::choose(dir, variant)?;
        let mut checkpoint = Checkpoint {
            dir: dir.to_path_buf(),
            variant,
            transformer: read_transformer(dir, variant)?,
            vae: None,
            clip_l: None,
            clip_g: None,
            t5: None,
        };
        let projected = checkpoint.family() == Family::Sd3;
        let settings = |component| checkpoint.settings(component);
        let vae = settings(Component::Vae)?.map(|s| VaeConfig::from_settings(&s)).transpose()?;
        let clip = |component| -> Result<Option<ClipConfig>> {
            settings(component)?.map(|s| ClipConfig::from_settings(&s, projected)).transpose()
        };
        let (clip_l, clip_g) = (clip(Component::ClipL)?, clip(Component::ClipG)?);
        let t5 = settings(Component::T5)?.map(|s| T5Config::from_settings(&s)).transpose()?;
        checkpoint.vae = vae;
        checkpoint.clip_l = clip_l;
        checkpoint.clip_g = clip_g;
        checkpoint.t5 = t5;
        checkpoint.check_text_widths()?;
        Ok(checkpoint)
    }

    /// The folder given to [`Checkpoint::open`].
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Which of the published models this is.
    pub fn family(&self) -> Family {
        self.transformer.family()
    }

    /// Which of the checkpoint's transformers was opened.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The transformer's configuration.
    pub fn transformer(&self) -> &TransformerConfig {
        &self.transformer
    }

    /// The VAE's configuration.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if the checkpoint has no VAE; likewise below.
    pub fn vae(&self) -> Result<&VaeConfig> {
        self.vae.as_ref().ok_or_else(|| self.lacks(Component::Vae))
    }

    /// The configuration of the CLIP-L text encoder.
    pub fn clip_l(&self) -> Result<&ClipConfig> {
        self.clip_l.as_ref().ok_or_else(|| self.lacks(Component::ClipL))
    }

    /// The configuration of the CLIP-G text encoder, which only sd3 has.
    pub fn clip_g(&self) -> Result<&ClipConfig> {
        self.clip_g.as_ref().ok_or_else(|| self.lacks(Component::ClipG))
    }

    /// The configuration of the T5 text encoder.
    pub fn t5(&self) -> Result<&T5Config> {
        self.t5.as_ref().ok_or_else(|| self.lacks(Component::T5))
    }

    /// The folder with a text encoder's tokenizer files (`vocab.json` and `merges.txt` for
    /// CLIP, `tokenizer.json` for T5).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if the component has no tokenizer or files are missing.
    pub fn tokenizer_dir(&self, component: Component) -> Result<PathBuf> {
        let Some((folder, files)) = component.tokenizer(self.family()) else {
            return Err(self.lacks(component));
        };
        let dir = layout::resolve_folder(self.dir.join(folder));
        match files.iter().find(|file| !dir.join(file).is_file()) {
            None => Ok(dir),
            Some(file) => {
                let path = dir.join(file);
                Err(Error::model(format!("the {component} tokenizer lacks {}", path.display())))
            }
        }
    }

    /// Everything that is missing for text to video, as paths below the checkpoint's folder.
    pub fn missing(&self) -> Vec<String> {
        summary::missing_parts(&self.dir, self.family(), self.variant)
    }

    /// # Errors
    /// [`crate::ErrorKind::Model`] listing everything that is missing.
    pub fn require_complete(&self) -> Result<()> {
        let missing = self.missing();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::model(format!(
            "the checkpoint in {} is incomplete; missing: {}",
            self.dir.display(),
            missing.join(", ")
        ))
        .hint("the download may have been interrupted: fetch the missing files"))
    }

    /// What there is in the checkpoint's folder, read from configurations and headers.
    pub fn summary(&self) -> Summary {
        Summary::read(&self.dir)
    }

    /// The weights of a component as they are published: F32, F16 or BF16.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if they are missing or damaged.
    pub fn source_weights(&self, component: Component) -> Result<ComponentWeights> {
        ComponentWeights::open(self.label(component), &self.weight_files(component)?)
    }

    /// The files that a component's weights are published in, an index first; the converted
    /// file where those are gone.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if there are none, or the index is damaged.
    pub fn weight_paths(&self, component: Component) -> Result<Vec<PathBuf>> {
        Ok(self.weight_files(component)?.files()?.0)
    }

    /// The weights of a component in bf16 (see [`StoreOptions`] for the one exception),
    /// converting them first if that has not been done yet. `progress` is told how many of
    /// how many bytes are written.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if the published files are missing or damaged;
    /// [`crate::ErrorKind::Io`] if the converted file cannot be written; what `progress`
    /// returns.
    pub fn open_weights(
        &self,
        component: Component,
        options: &StoreOptions,
        progress: Progress<'_>,
    ) -> Result<ComponentWeights> {
        let folder = self.folder(component)?;
        let files = self.weight_files(component)?;
        let source = ComponentWeights::open(self.label(component), &files)?;
        store::open(source, &files, &self.dir, folder, options, progress)
    }

    fn folder(&self, component: Component) -> Result<&'static str> {
        component.folder(self.family(), self.variant).ok_or_else(|| self.lacks(component))
    }

    fn weight_files(&self, component: Component) -> Result<WeightFiles> {
        let folder = self.folder(component)?;
        component.find_weights(&self.dir, folder).ok_or_else(|| {
            Error::model(format!(
                "there are no {component} weights in {}: no {}.safetensors and no .bin",
                self.dir.join(folder).display(),
                component.stem()
            ))
            .hint("the download may have been interrupted: fetch the missing files")
        })
    }

    fn label(&self, component: Component) -> String {
        match component {
            Component::Transformer => format!("{component} ({})", self.variant),
            _ => component.to_string(),
        }
    }

    fn lacks(&self, component: Component) -> Error {
        match component.folder(self.family(), self.variant) {
            Some(folder) => Error::model(format!(
                "the checkpoint lacks the {component}: no {}",
                self.dir.join(folder).join("config.json").display()
            )),
            None => Error::model(format!("a {} checkpoint has no {component}", self.family())),
        }
    }

    fn settings(&self, component: Component) -> Result<Option<Settings>> {
        let folder = component.folder(self.family(), self.variant);
        let path = folder.map(|folder| self.dir.join(folder).join("config.json"));
        path.filter(|path| path.is_file()).map(|path| Settings::read(&path)).transpose()
    }

    /// The transformer must expect what the text encoders give.
    fn check_text_widths(&self) -> Result<()> {
        let differ = |what: &str, gives: usize, expects: usize| {
            Err(Error::model(format!(
                "{}: {what} is {gives} wide, but the transformer expects {expects}",
                self.dir.display()
            ))
            .hint("text encoders and transformer are not of the same checkpoint"))
        };
        let expects = self.transformer.text_dim();
        if let Some(t5) = self.t5.as_ref().filter(|t5| t5.width != expects) {
            return differ("the T5 embedding", t5.width, expects);
        }
        let pooled = |clip: &ClipConfig| clip.projection.unwrap_or(clip.width);
        let gives = match (self.family(), &self.clip_l, &self.clip_g) {
            (Family::Sd3, Some(l), Some(g)) => pooled(l) + pooled(g),
            (Family::Miniflux, Some(l), _) => pooled(l),
            _ => return Ok(()),
        };
        match self.transformer.pooled_dim() {
            expects if expects != gives => differ("the pooled CLIP embedding", gives, expects),
            _ => Ok(()),
        }
    }
}

/// Reads the transformer's configuration and checks its family against the tensor names.
fn read_transformer(dir: &Path, variant: Variant) -> Result<TransformerConfig> {
    // The transformer's folder does not depend on the family.
    let folder = Component::Transformer.folder(Family::Sd3, variant).unwrap_or_default();
    let settings = Settings::read(&dir.join(folder).join("config.json"))?;
    let config = TransformerConfig::from_settings(&settings)?;
    if let Some(files) = Component::Transformer.find_weights(dir, folder) {
        let shards = files.open()?;
        let names = shards.iter().flat_map(|s| &s.tensors).map(|t| t.name.as_str());
        match Family::of_tensor_names(names) {
            Some(family) if family == config.family() => {}
            found => {
                let found = found.map_or("of no known family".to_owned(), |f| f.to_string());
                return Err(Error::model(format!(
                    "{} says {}, but the weights beside it are {found}",
                    settings.path().display(),
                    config.family()
                ))
                .hint("files of two checkpoints are mixed: fetch this folder again"));
            }
        }
    }
    Ok(config)
}

/// Joins a list, leaving out what nobody would read.
fn shorten(list: &[String], separator: &str) -> String {
    const SHOWN: usize = 20;
    let mut text = list.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(separator);
    if list.len() > SHOWN {
        text += &format!("{separator}… and {} more", list.len() - SHOWN);
    }
    text
}
