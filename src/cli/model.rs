//! What `--model` names: a model that was pulled, or a folder.

use std::path::{Path, PathBuf};

use pyraflow::checkpoint::Variant;
use pyraflow::hub::{Hub, ModelName, PublishedModel};
use pyraflow::{Error, Result};

/// A checkpoint's folder, and its transformer where the name says which.
#[derive(Debug)]
pub struct Located {
    pub dir: PathBuf,
    model: Option<PublishedModel>,
}

impl Located {
    /// A folder.
    pub fn folder(dir: PathBuf) -> Located {
        Located { dir, model: None }
    }

    /// The variant that the name says.
    pub fn variant(&self) -> Option<Variant> {
        self.model.map(|model| model.variant)
    }

    /// Which variant to open: that of the name, else the one asked for, else the one the
    /// size belongs to if the checkpoint has it. `None` leaves the choice to
    /// [`Checkpoint::open`], which takes the only one.
    ///
    /// [`Checkpoint::open`]: pyraflow::checkpoint::Checkpoint::open
    pub fn choose(&self, asked: Option<&str>, by_size: Option<Variant>) -> Result<Option<String>> {
        if let Some(model) = self.model {
            let own = model.variant.name();
            return match asked.filter(|&asked| asked != own) {
                Some(other) => Err(wrong_variant(&model, other)),
                None => Ok(Some(own.to_owned())),
            };
        }
        let by_size = by_size.filter(|v| Variant::available(&self.dir).contains(v));
        Ok(asked.map(String::from).or_else(|| by_size.map(|v| v.name().to_owned())))
    }
}

/// `--variant` contradicts the name of the model.
pub fn wrong_variant(model: &PublishedModel, asked: &str) -> Error {
    Error::usage(format!("--model {model} and --variant {asked} contradict each other"))
        .hint("leave --variant out, or name another model")
}

/// Whether `path` can be the name of a model.
pub fn is_name(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.parse::<ModelName>().is_ok())
}

/// Finds what `model` names: a published model, a folder, or a repository that was pulled,
/// in this order. (A folder with a model's name is `./NAME`.)
pub fn locate(model: &Path) -> Result<Located> {
    let name = model.to_str().and_then(|text| text.parse::<ModelName>().ok());
    match name {
        Some(ModelName::Published(published)) => {
            let dir = Hub::from_env()?.locate(&ModelName::Published(published))?;
            Ok(Located { dir, model: Some(published) })
        }
        _ if model.exists() => Ok(Located::folder(model.to_path_buf())),
        Some(name) => {
            let dir = Hub::from_env()?.locate(&name);
            dir.map(Located::folder)
                .map_err(|e| e.at(format_args!("there is no folder {}", model.display())))
        }
        None => Err(Error::model(format!("there is no checkpoint folder {}", model.display()))
            .hint(format!(
                "name a folder, a repository that was pulled, or one of {} (see pyraflow pull)",
                PublishedModel::names()
            ))),
    }
}
