//! What a pull finds in the cache.

use super::cache::remove_if_there;
use super::events::{Event, Meter, Outcome, Stage};
use super::hash::Digest;
use super::manifest::ManifestFile;
use super::monitor::interrupted;
use super::pull::Pull;
use super::record::{FileRecord, modified};
use crate::Result;
use crate::checkpoint::stored_file;

/// A file that is there but was not checked by a pull yet.
struct Unchecked<'m> {
    file: &'m ManifestFile,
    blob: String,
    digest: Digest,
    bytes: u64,
}

impl Pull<'_> {
    /// Which files must be fetched. Files that are there are hashed unless an earlier pull
    /// did that and they did not change since.
    pub(super) fn survey(&mut self) -> Result<Vec<ManifestFile>> {
        let manifest = self.manifest;
        let mut missing = Vec::new();
        let mut unchecked = Vec::new();
        for file in &manifest.files {
            match self.look(file) {
                Found::Right => {}
                Found::Missing => missing.push(file.clone()),
                Found::Unchecked(there) => unchecked.push(there),
            }
        }
        let total = unchecked.iter().map(|there| there.bytes).sum();
        let mut meter = Meter::new(Stage::Checking, total);
        let mut done = 0;
        for there in unchecked {
            let path = self.cache.blob(&there.blob);
            let watcher = &mut *self.watcher;
            let right = there.digest.matches(&path, &mut |bytes| {
                done += bytes;
                meter.show(done, 0, "", watcher);
                if watcher.cancelled() { Err(interrupted()) } else { Ok(()) }
            })?;
            if right {
                self.accept(&there);
            } else {
                let name = &there.file.path;
                let message = format!("{name} in the cache is damaged and is fetched again");
                self.watcher.event(&Event::Warning { message });
                let _lock = self.cache.lock_blob(&there.blob, &mut || Ok(()))?;
                remove_if_there(&path)?;
                missing.push(there.file.clone());
            }
        }
        Ok(missing)
    }

    fn look<'m>(&self, file: &'m ManifestFile) -> Found<'m> {
        let known = self.record.files.get(&file.path);
        let Some(blob) = self.cache.blob_of(&self.manifest.revision, &file.path) else {
            let folder = file.path.split('/').next().unwrap_or_default();
            let converted = known.is_some_and(|known| known.converted)
                && !self.options.keep_original
                && stored_file(&self.snapshot, folder).is_file();
            return if converted { Found::Right } else { Found::Missing };
        };
        let digest = match &file.sha256 {
            // Another file than the pinned one, whoever put it there.
            Some(pinned) if *pinned != blob => return Found::Missing,
            Some(pinned) => Some(Digest::Sha256(pinned.clone())),
            None => Digest::of_etag(&blob),
        };
        let path = self.cache.blob(&blob);
        if known.is_some_and(|known| known.blob == blob && known.still_checked(&path)) {
            return Found::Right;
        }
        let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        digest.map_or(Found::Missing, |digest| {
            Found::Unchecked(Unchecked { file, blob, digest, bytes })
        })
    }

    fn accept(&mut self, there: &Unchecked<'_>) {
        let Unchecked { file, blob, bytes, .. } = there;
        let known = self.record.files.get(&file.path).filter(|known| known.blob == *blob);
        let record = FileRecord {
            blob: blob.clone(),
            bytes: *bytes,
            ours: known.is_some_and(|known| known.ours),
            checked: std::fs::metadata(self.cache.blob(blob)).ok().map(|m| modified(&m)),
            converted: known.is_some_and(|known| known.converted),
        };
        self.record.files.insert(file.path.clone(), record);
        let (path, hash) = (file.path.clone(), blob.clone());
        self.watcher.event(&Event::File { path, bytes: *bytes, hash, outcome: Outcome::Present });
    }
}

enum Found<'m> {
    Right,
    Missing,
    Unchecked(Unchecked<'m>),
}
