//! Locks between processes, the same as those of Hugging Face's own client.
//!
//! A lock is held by whoever has the file locked, not by the file's being there, so the lock
//! of a process that died is free.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::{Error, Result};

/// Pause between two looks at a lock that another process holds.
const PAUSE: Duration = Duration::from_millis(100);

/// A held lock; let go when dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// Takes the lock at `path`. While another process holds it, `waiting` is called and may
/// end the wait with an error.
pub(super) fn lock(path: &Path, waiting: &mut dyn FnMut() -> Result<()>) -> Result<Lock> {
    loop {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        waiting()?;
        thread::sleep(PAUSE);
    }
}

/// Takes the lock at `path` unless another process holds it.
pub(super) fn try_lock(path: &Path) -> Result<Option<Lock>> {
    let failed = |e| Error::io("cannot open the lock", path, e);
    loop {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        }
        let file =
            File::options().write(true).create(true).truncate(false).open(path).map_err(failed)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(None),
            // Where files cannot be locked there is only the check of the hash.
            Err(TryLockError::Error(_)) => return Ok(Some(Lock { _file: file })),
            Ok(()) => {}
        }
        // Another client may have removed the file after it was opened here: then somebody
        // else can lock a new one of that name.
        let ours = file.metadata().map_err(failed)?;
        if fs::metadata(path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
        {
            return Ok(Some(Lock { _file: file }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one_and_freed_by_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("locks/a.lock");
        let held = try_lock(&path).unwrap().unwrap();
        assert!(try_lock(&path).unwrap().is_none());
        let mut waits = 0;
        let error = lock(&path, &mut || {
            waits += 1;
            if waits > 1 { Err(Error::interrupted("stopped")) } else { Ok(()) }
        });
        assert!(error.is_err() && waits == 2);
        drop(held);
        // The file of a process that died lies there still.
        assert!(path.exists() && try_lock(&path).unwrap().is_some());
    }
}
