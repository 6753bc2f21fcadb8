//! What is left of a run: its latents and how they were made.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::latents::{LatentsFile, read_latents};
use super::{Request, SavedRun, Tiling};
use crate::checkpoint::{Family, Variant};
use crate::sampler::{Latent, LatentShape};
use crate::{Error, ErrorKind, Result};

/// The folder in which the units of the video `output` are kept: `<output>.units`.
pub fn units_folder(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_os_string();
    name.push(".units");
    name.into()
}

/// A saved run, finished or not: a folder of units or a file of latents.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// What was named when it was opened.
    pub(super) path: PathBuf,
    /// Everything that decides the latents; `Null` if that is not known.
    pub(super) identity: Value,
    /// What else was asked for.
    asked: Value,
    /// The finished units.
    pub(super) units: Vec<Latent>,
    /// The folder, unless it was a file.
    pub(super) folder: Option<PathBuf>,
}

impl State {
    /// Opens the folder of units of a run, the video beside which they are kept, or a file of
    /// latents.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when there is nothing of the kind, or it is damaged.
    pub fn open(path: &Path) -> Result<State> {
        let beside = units_folder(path);
        let folder = [path, &beside].into_iter().find(|f| f.join("run.json").is_file());
        if let Some(folder) = folder {
            return State::of_folder(path, folder);
        }
        let metadata = std::fs::metadata(path)
            .map_err(|e| Error::io("cannot open", path, e).of_kind(ErrorKind::Input))?;
        if metadata.is_dir() {
            return Err(nothing_saved(path));
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("mp4" | "gif" | "png" | "y4m") => Err(nothing_saved(path)),
            _ => {
                let LatentsFile { units, settings, .. } = read_latents(path)?;
                Ok(State {
                    path: path.into(),
                    identity: settings.unwrap_or(Value::Null),
                    asked: Value::Null,
                    units,
                    folder: None,
                })
            }
        }
    }

    fn of_folder(path: &Path, folder: &Path) -> Result<State> {
        let run = SavedRun::open(folder)?;
        let (settings, _) = Request::from_settings(run.identity())
            .and_then(|request| Request { units: 2, ..request }.resolve())
            .map_err(|e| e.at(folder.display()))?;
        let units = run.units(settings.unit_shape());
        let (identity, asked) = (run.identity().clone(), run.asked().clone());
        Ok(State { path: path.into(), identity, asked, units, folder: Some(folder.into()) })
    }

    /// Latent frames that are there.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The shape of a unit, if there is one.
    pub fn shape(&self) -> Option<LatentShape> {
        self.units.first().map(Latent::shape)
    }

    /// The folder of units, unless the state is a file of latents.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The video the units belong to, if they lie where a run keeps them.
    pub fn video(&self) -> Option<PathBuf> {
        let name = self.folder.as_ref()?.to_str()?.trim_end_matches('/');
        name.strip_suffix(".units").map(PathBuf::from)
    }

    /// The family and variant of the model, if the state says.
    pub fn model(&self) -> Option<(Family, Variant)> {
        let family = serde_json::from_value(self.identity["family"].clone()).ok()?;
        let variant = serde_json::from_value(self.identity["variant"].clone()).ok()?;
        Some((family, variant))
    }

    /// Where the checkpoint was, if the state says.
    pub fn checkpoint(&self) -> Option<PathBuf> {
        self.asked["model"].as_str().map(PathBuf::from)
    }

    /// The request that made the state. Its length is what was asked for then (what is there,
    /// if that is not known).
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the state does not say how it was made.
    pub fn request(&self) -> Result<Request> {
        if self.identity.is_null() {
            return Err(Error::input(format!(
                "{} does not say how its latents were made",
                self.path.display()
            ))
            .hint("begin a video with them: pyraflow generate \"...\" --latents FILE"));
        }
        let mut request =
            Request::from_settings(&self.identity).map_err(|e| e.at(self.path.display()))?;
        request.units = match self.asked["units"].as_u64() {
            Some(units) => usize::try_from(units).unwrap_or(usize::MAX),
            None => self.units.len(),
        };
        if let Some(tile) = self.asked["tile"].as_u64() {
            request.tiling = Some(Tiling::new(usize::try_from(tile).unwrap_or(0))?);
        }
        Ok(request)
    }
}

/// What is noted beside the identity of a run.
pub(super) fn asked(request: &Request, checkpoint: &Path) -> Value {
    let folder = std::path::absolute(checkpoint).unwrap_or_else(|_| checkpoint.into());
    let mut asked = json!({ "units": request.units, "model": folder.to_string_lossy() });
    if let Some(tiling) = request.tiling {
        asked["tile"] = json!(tiling.tile);
    }
    asked
}

fn nothing_saved(path: &Path) -> Error {
    Error::input(format!("no latents of {} are kept", path.display())).hint(
        "a finished run keeps them with --keep-units or --save-latents, an interrupted one always",
    )
}
