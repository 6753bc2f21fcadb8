//! Where converted weights are kept and how a new file comes into being there.

use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::super::layout::OWN_FOLDER;
use crate::{Error, ErrorKind, Result};

/// Where converted weights are kept.
///
/// A component that is published as one safetensors file wholly in BF16 (but for the F32
/// table of positions) is mapped where it is and never converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Keep them below this folder and nowhere else.
    pub directory: Option<PathBuf>,
    /// Without `directory`: the cache folder to use where `.pyraflow` in the checkpoint's own
    /// folder cannot be written.
    pub cache: Option<PathBuf>,
}

impl Default for StoreOptions {
    /// In the checkpoint's folder, else in `$XDG_CACHE_HOME`, else in `~/.cache`.
    fn default() -> Self {
        // The specification says to ignore relative paths.
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        StoreOptions { directory: None, cache }
    }
}

impl StoreOptions {
    /// Keeps converted weights below `directory` and nowhere else.
    pub fn below(directory: impl Into<PathBuf>) -> Self {
        StoreOptions { directory: Some(directory.into()), cache: None }
    }

    /// The folders to look into and to try to write to, in this order. Folders shared by
    /// several checkpoints have one below them for each, named after its path.
    pub(super) fn folders(&self, checkpoint: &Path) -> Result<Vec<PathBuf>> {
        let own = || -> Result<String> {
            let path = fs::canonicalize(checkpoint)
                .map_err(|e| Error::io("cannot resolve", checkpoint, e))?;
            let digest = Sha256::digest(path.as_os_str().as_bytes());
            Ok(digest[..8].iter().map(|byte| format!("{byte:02x}")).collect())
        };
        match (&self.directory, &self.cache) {
            (Some(directory), _) => Ok(vec![directory.join(own()?)]),
            (None, Some(cache)) => {
                Ok(vec![checkpoint.join(OWN_FOLDER), cache.join("pyraflow").join(own()?)])
            }
            (None, None) => Ok(vec![checkpoint.join(OWN_FOLDER)]),
        }
    }
}

/// Opens a temporary file in the first folder that can be written and has room.
pub(super) fn create_in_first<'a>(
    folders: &'a [PathBuf],
    name: &str,
    size: u64,
    label: &str,
) -> Result<(&'a Path, NamedTempFile)> {
    let mut reasons = Vec::new();
    for folder in folders {
        match create(folder, name).and_then(|file| require_space(folder, size).map(|()| file)) {
            Ok(file) => return Ok((folder, file)),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(Error::new(
        ErrorKind::Io,
        format!("cannot store the {label} weights in bf16 ({size} bytes): {}", reasons.join("; ")),
    )
    .hint("free some space, or choose another folder for converted weights"))
}

fn create(folder: &Path, name: &str) -> Result<NamedTempFile> {
    fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
    let prefix = format!(".{name}.");
    remove_abandoned(folder, &prefix);
    let file = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(PARTIAL)
        // Readable by others who share the checkpoint, as far as the umask allows.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(|e| Error::io("cannot write in", folder, e))?;
    // Marks the file as being written, for `remove_abandoned`; where locks do not work,
    // abandoned files simply stay.
    let _ = file.as_file().lock();
    Ok(file)
}

const PARTIAL: &str = ".partial";

/// Deletes what killed processes left behind: partial files that nobody holds a lock on and
/// nobody has written to for a while.
fn remove_abandoned(folder: &Path, prefix: &str) {
    const AGE: Duration = Duration::from_secs(60);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(prefix) || !name.ends_with(PARTIAL) {
            continue;
        }
        let age = entry.metadata().ok().and_then(|m| m.modified().ok()?.elapsed().ok());
        let old = age.is_some_and(|age| age > AGE);
        if old && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn require_space(folder: &Path, size: u64) -> Result<()> {
    let space = rustix::fs::statvfs(folder)
        .map_err(|e| Error::io("cannot ask for the free space of", folder, e.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    // The header and the file system's own needs are small beside this margin.
    const MARGIN: u64 = 16 << 20;
    if size.saturating_add(MARGIN) > free {
        return Err(Error::new(
            ErrorKind::Io,
            format!("{} has {free} bytes free, {size} are needed", folder.display()),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_noticed_before_writing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(require_space(dir.path(), 1).is_ok());
        let folders = [dir.path().to_path_buf()];
        let error = create_in_first(&folders, "vae", u64::MAX / 2, "VAE").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(&(u64::MAX / 2).to_string()), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the temporary file is gone");
    }

    #[test]
    fn only_abandoned_partial_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, age: u64| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
            file
        };
        let live = make(".vae.live.partial", 1000);
        live.lock().unwrap();
        make(".vae.dead.partial", 1000);
        make(".vae.young.partial", 0);
        make(".t5.dead.partial", 1000);
        make("vae.safetensors", 1000);
        remove_abandoned(dir.path(), ".vae.");
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let expected =
            [".t5.dead.partial", ".vae.live.partial", ".vae.young.partial", "vae.safetensors"];
        assert_eq!(left, expected);
    }
}
