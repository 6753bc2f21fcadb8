//! The finished units of a run, kept on disk until its video is complete.
//!
//! A folder beside the output holds `run.json`, which says what the run is, and one file per
//! unit. Files are written under another name, synchronised and renamed, and carry a hash,
//! so that after a crash a unit is there completely or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::sampler::{CHANNELS, Latent, LatentShape};
use crate::{Error, Result};

/// Largest unit file that is read back: far more than any latent takes.
const MAX_UNIT_BYTES: u64 = 1 << 30;

/// The saved units of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedRun {
    folder: PathBuf,
    /// Everything that decides the latents, as JSON.
    identity: Value,
    /// What else was asked for: where the model is and how long the video should become.
    asked: Value,
}

/// The name in `run.json` of what does not decide the latents.
const ASKED: &str = "asked";

impl SavedRun {
    /// The run that `identity` describes, kept in `folder` (which need not exist).
    pub fn new(folder: impl Into<PathBuf>, identity: Value) -> SavedRun {
        SavedRun { folder: folder.into(), identity, asked: Value::Null }
    }

    /// The run that is kept in `folder`, as its description says.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when there is none or its description is damaged;
    /// [`crate::ErrorKind::Io`] when it cannot be read.
    pub fn open(folder: impl Into<PathBuf>) -> Result<SavedRun> {
        let mut run = SavedRun::new(folder, Value::Null);
        if !run.exists() {
            return Err(Error::input(format!("{} holds no saved run", run.folder.display()))
                .hint("generate with --keep-units keeps one beside the video"));
        }
        (run.identity, run.asked) = run.description()?;
        Ok(run)
    }

    /// Notes what does not decide the latents but helps to go on: it is kept beside them.
    pub fn asking(mut self, asked: Value) -> SavedRun {
        self.asked = asked;
        self
    }

    /// Everything that decides the latents, as JSON.
    pub fn identity(&self) -> &Value {
        &self.identity
    }

    /// What [`SavedRun::asking`] noted.
    pub fn asked(&self) -> &Value {
        &self.asked
    }

    /// Where the units are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether units of some run are there.
    pub fn exists(&self) -> bool {
        self.folder.join("run.json").is_file()
    }

    /// Begins anew: removes the units of whatever run was there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] when the folder cannot be written.
    pub fn begin(&self) -> Result<()> {
        self.discard()?;
        fs::create_dir_all(&self.folder)
            .map_err(|e| Error::io("cannot create", &self.folder, e))?;
        self.describe()
    }

    /// Writes the description of the run.
    fn describe(&self) -> Result<()> {
        let mut description = self.identity.clone();
        if let (Some(fields), false) = (description.as_object_mut(), self.asked.is_null()) {
            fields.insert(ASKED.into(), self.asked.clone());
        }
        self.write("run.json", format!("{description:#}\n").as_bytes())
    }

    /// Identity and notes as they are in the folder.
    fn description(&self) -> Result<(Value, Value)> {
        let path = self.folder.join("run.json");
        let text = fs::read_to_string(&path).map_err(|e| Error::io("cannot read", &path, e))?;
        let mut found: Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(format!("{} is damaged", path.display())).because(e))?;
        // Not `remove`, which changes the order of the others.
        let asked = found.as_object_mut().and_then(|fields| fields.shift_remove(ASKED));
        Ok((found, asked.unwrap_or(Value::Null)))
    }

    /// Whether the folder holds units of this very run.
    pub fn is_there(&self) -> bool {
        self.exists() && self.description().is_ok_and(|(found, _)| found == self.identity)
    }

    /// Reads back the units that are complete, from the first on.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when the folder belongs to another run, naming the
    /// settings that differ; [`crate::ErrorKind::Io`] when it cannot be read.
    pub fn resume(&self, shape: LatentShape) -> Result<Vec<Latent>> {
        let (found, asked) = self.description()?;
        self.check(&found)?;
        if !self.asked.is_null() && asked != self.asked {
            self.describe()?;
        }
        Ok(self.units(shape))
    }

    /// Whether the identity `found` is that of this run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] naming the settings that differ.
    pub(super) fn check(&self, found: &Value) -> Result<()> {
        let different = differences(&self.identity, found);
        if different.is_empty() {
            return Ok(());
        }
        Err(Error::input(format!(
            "{} holds the units of another run: {}",
            self.folder.display(),
            different.join(", ")
        ))
        .hint("give the same settings to resume it, or -y without --resume to start anew"))
    }

    /// The units that are complete and of this run, from the first on.
    pub fn units(&self, shape: LatentShape) -> Vec<Latent> {
        (0..).map_while(|unit| self.read_unit(unit, shape)).collect()
    }

    /// Saves a finished unit.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] when it cannot be written.
    pub fn save(&self, unit: usize, latent: &Latent) -> Result<()> {
        let shape = latent.shape();
        let bytes: Vec<u8> = latent.data().iter().flat_map(|v| v.to_le_bytes()).collect();
        let metadata = HashMap::from([("sha256".to_string(), self.hash(&bytes))]);
        let extents = vec![shape.frames, shape.height, shape.width, CHANNELS];
        let file = TensorView::new(Dtype::F32, extents, &bytes)
            .and_then(|view| safetensors::serialize([("latent", view)], Some(metadata)))
            .map_err(|e| Error::input(format!("unit {unit} cannot be stored")).because(e))?;
        self.write(&unit_name(unit), &file)
    }

    /// Removes the units, if there are any.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] when they cannot be removed.
    pub fn discard(&self) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        // Only what belongs to a run goes: the folder may hold a user's files as well.
        let entries =
            fs::read_dir(&self.folder).map_err(|e| Error::io("cannot read", &self.folder, e))?;
        let mut ours: Vec<PathBuf> = entries
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with("unit-") || name.starts_with("run.json")
            })
            .map(|entry| entry.path())
            .collect();
        // The description last: killed in between, what is left still says whose it is.
        ours.sort_by_key(|path| path.ends_with("run.json"));
        for path in ours {
            fs::remove_file(&path).map_err(|e| Error::io("cannot remove", &path, e))?;
        }
        // Fails if other files are there, which is fine.
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    /// The hash of a unit's values and of the run they belong to, so that neither a damaged
    /// unit nor one of another run is ever taken for one of this.
    fn hash(&self, values: &[u8]) -> String {
        let identity = self.identity.to_string();
        let digest = Sha256::new().chain_update(identity).chain_update(values).finalize();
        digest.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn read_unit(&self, unit: usize, shape: LatentShape) -> Option<Latent> {
        let path = self.folder.join(unit_name(unit));
        let length = fs::metadata(&path).ok()?.len();
        if length > MAX_UNIT_BYTES {
            return None;
        }
        let bytes = fs::read(&path).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let view = file.tensor("latent").ok()?;
        let wanted = [shape.frames, shape.height, shape.width, CHANNELS];
        let promised = header.metadata().as_ref()?.get("sha256")?;
        let whole = *promised == self.hash(view.data());
        if view.dtype() != Dtype::F32 || view.shape() != wanted || !whole {
            return None;
        }
        let values = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        Latent::new(shape, values).ok()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_whole(&self.folder.join(name), bytes).map_err(|e| {
            e.hint("free some space or choose another place with --output, then --resume")
        })
    }
}

/// Writes a file that is there completely or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = File::create(&partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&partial, path));
    written.map_err(|e| {
        let _ = fs::remove_file(&partial);
        Error::io("cannot write", path, e)
    })
}

fn unit_name(unit: usize) -> String {
    format!("unit-{unit:04}.safetensors")
}

/// The settings in which two runs differ: "seed 1 there, 2 here".
fn differences(here: &Value, there: &Value) -> Vec<String> {
    let (Some(here), Some(there)) = (here.as_object(), there.as_object()) else {
        return vec!["its description is damaged".to_string()];
    };
    let mut names: Vec<&String> = here.keys().chain(there.keys()).collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .filter(|name| here.get(*name) != there.get(*name))
        .map(|name| {
            let show = |v: Option<&Value>| v.map_or("nothing".to_string(), Value::to_string);
            format!("{name} is {} there, {} here", show(there.get(name)), show(here.get(name)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn latent(value: f32) -> Latent {
        let shape = LatentShape::frame(2, 2);
        Latent::new(shape, vec![value; shape.len()]).expect("a latent")
    }

    #[test]
    fn units_come_back_and_torn_ones_do_not() {
        let folder = tempfile::tempdir().expect("folder");
        let run = SavedRun::new(folder.path().join("units"), json!({"seed": 1}));
        assert!(!run.exists());
        run.begin().expect("begin");
        for unit in 0..3 {
            run.save(unit, &latent(unit as f32)).expect("save");
        }
        let shape = latent(0.0).shape();
        assert_eq!(run.resume(shape).expect("resume").len(), 3);
        let path = run.folder().join(unit_name(1));
        let mut bytes = fs::read(&path).expect("read");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).expect("write");
        let units = run.resume(shape).expect("resume");
        assert_eq!(units, vec![latent(0.0)], "only what stands before the torn unit");

        let other = SavedRun::new(run.folder(), json!({"seed": 2}));
        let error = other.resume(shape).expect_err("another run");
        assert!(error.to_string().contains("seed is 1 there, 2 here"), "{error}");
        fs::write(run.folder().join("mine.txt"), "kept").expect("write");
        run.discard().expect("discard");
        assert!(!run.exists() && run.folder().join("mine.txt").exists());
    }
}
