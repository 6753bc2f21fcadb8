//! The last step of a pull: weights in bf16, and what is not needed any more removed.

use std::path::{Path, PathBuf};

use super::cache::remove_if_there;
use super::events::{Event, Meter, Stage};
use super::monitor::interrupted;
use super::pull::Pull;
use crate::Result;
use crate::checkpoint::{Checkpoint, Component, OWN_FOLDER, StoreOptions, Variant, open_stored};

impl Pull<'_> {
    /// Writes all weights in bf16 and removes what is not needed any more.
    pub(super) fn convert(&mut self) -> Result<()> {
        let folders = self.manifest.folders();
        let variants: Vec<Variant> =
            Variant::ALL.into_iter().filter(|v| folders.contains(&v.folder())).collect();
        for (index, variant) in variants.iter().enumerate() {
            let checkpoint = Checkpoint::open(&self.snapshot, Some(variant.name()))?;
            checkpoint.require_complete()?;
            let parts = checkpoint.family().components().iter();
            // All but the transformer are the same for every variant.
            for &component in parts.filter(|&&c| index == 0 || c == Component::Transformer) {
                self.convert_one(&checkpoint, component)?;
            }
        }
        Ok(())
    }

    fn convert_one(&mut self, checkpoint: &Checkpoint, component: Component) -> Result<()> {
        let originals = checkpoint.weight_paths(component)?;
        let paths: Vec<String> = originals
            .iter()
            .filter_map(|path| Some(path.strip_prefix(&self.snapshot).ok()?.to_str()?.to_owned()))
            .filter(|path| self.record.files.contains_key(path))
            .collect();
        let Some((stored, mut fresh)) = self.store(checkpoint, component)? else {
            return Ok(()); // Published in bf16: used as it is.
        };
        let known = |path: &String| self.record.files.get(path).is_some_and(|f| f.converted);
        if !fresh && !paths.iter().all(known) {
            // Made by a run that did not come to its end, or found damaged since.
            if open_stored(&stored).and_then(|weights| weights.check_contents()).is_err() {
                remove_if_there(&stored)?;
                fresh = self.store(checkpoint, component)?.is_some();
            }
        }
        for path in &paths {
            self.record.files.entry(path.clone()).and_modify(|file| file.converted = true);
        }
        self.record.write(&self.snapshot)?;
        let mut removed = 0;
        if !self.options.keep_original {
            for path in self.superfluous(&stored, paths) {
                let blob = self.record.files.get(&path).map(|file| file.blob.as_str());
                removed += self.cache.unlink(&self.manifest.revision, &path, blob)?;
            }
        }
        if fresh || removed > 0 {
            self.pulled.removed += removed;
            let component = component.to_string();
            self.watcher.event(&Event::Converted { component, path: stored, removed });
        }
        Ok(())
    }

    /// The published files that a stored one makes superfluous: `paths`, an index before its
    /// shards so that at any moment all or none are to be found, and what a killed run left
    /// of such. Nothing that others downloaded.
    fn superfluous(&self, stored: &Path, mut paths: Vec<String>) -> Vec<String> {
        let folder = stored.file_stem().and_then(|stem| stem.to_str());
        let same = |path: &str| path.split('/').next() == folder;
        let files = &self.record.files;
        let left = files.iter().filter(|(path, file)| file.converted && same(path));
        for (path, _) in left {
            if !paths.contains(path) {
                paths.push(path.clone());
            }
        }
        let ours = paths.iter().all(|path| files.get(path).is_some_and(|file| file.ours));
        if ours { paths } else { Vec::new() }
    }

    /// Brings a component into the store. Returns where it is and whether it was written now;
    /// nothing if it needs no conversion.
    fn store(
        &mut self,
        checkpoint: &Checkpoint,
        component: Component,
    ) -> Result<Option<(PathBuf, bool)>> {
        let mut meter: Option<Meter> = None;
        let name = component.to_string();
        // In the snapshot's own folder and nowhere else: there it belongs to the snapshot.
        let store = StoreOptions { directory: None, cache: None };
        let watcher = &mut *self.watcher;
        let weights = checkpoint.open_weights(component, &store, &mut |done, total| {
            let meter = meter.get_or_insert_with(|| Meter::new(Stage::Converting, total));
            meter.show(done, 0, &name, watcher);
            if watcher.cancelled() { Err(interrupted()) } else { Ok(()) }
        })?;
        let path = weights.paths().next().map(Path::to_path_buf);
        let stored = path.filter(|path| path.starts_with(self.snapshot.join(OWN_FOLDER)));
        Ok(stored.map(|path| (path, meter.is_some())))
    }
}
