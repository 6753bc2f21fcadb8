//! Files that are complete or absent.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempPath};

use crate::{Error, Result};

/// An output file under a temporary name beside its final one. [`PendingFile::commit`] gives
/// it its name; dropped before that, it is removed.
pub(super) struct PendingFile {
    file: BufWriter<NamedTempFile>,
    target: PathBuf,
}

impl PendingFile {
    /// Starts a file that will be called `target`.
    pub(super) fn create(target: &Path) -> Result<Self> {
        let file = temporary_in(directory_of(target)).map_err(|e| write_error(target, e))?;
        Ok(PendingFile { file: BufWriter::with_capacity(1 << 20, file), target: target.into() })
    }

    /// The final name.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Everything is written and on the disk; only the name is missing.
    pub(super) fn close(self) -> Result<ClosedFile> {
        let PendingFile { file, target } = self;
        let failed = |e| write_error(&target, e);
        let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        file.as_file().sync_all().map_err(failed)?;
        Ok(ClosedFile { file: file.into_temp_path(), target })
    }

    /// [`PendingFile::close`] and [`ClosedFile::publish`].
    pub(super) fn commit(self, overwrite: bool) -> Result<()> {
        self.close()?.publish(overwrite)
    }
}

impl Write for PendingFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A written file that waits for its name; removed when dropped.
pub(super) struct ClosedFile {
    file: TempPath,
    target: PathBuf,
}

impl ClosedFile {
    /// Gives the file its name, in place of an older file only if `overwrite` says so.
    pub(super) fn publish(self, overwrite: bool) -> Result<()> {
        let ClosedFile { file, target } = self;
        // Asked again: the check before the computation may be minutes old.
        if !overwrite && target.symlink_metadata().is_ok() {
            return Err(already_there(&target));
        }
        file.persist(&target).map_err(|e| write_error(&target, e.error))?;
        sync_directory(&target).map_err(|e| write_error(&target, e))
    }
}

/// A new temporary file in `directory`, readable for whom the umask lets.
pub(super) fn temporary_in(directory: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    #[cfg(unix)]
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(mode);
    builder.prefix(".pyraflow-").suffix(".part").tempfile_in(directory)
}

/// The directory that `target` is or will be in.
pub(super) fn directory_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// `target` exists and may not be replaced.
pub(super) fn already_there(target: &Path) -> Error {
    Error::usage(format!("{} exists already", target.display()))
        .hint("choose another name, or overwrite it with -y")
}

/// A failed write to `target`.
pub(super) fn write_error(target: &Path, error: io::Error) -> Error {
    let full = matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    );
    let error = Error::io("cannot write", target, error);
    if full { error.hint("free some space or write to another disk") } else { error }
}

/// Makes a rename in the directory of `target` survive a power loss.
fn sync_directory(target: &Path) -> io::Result<()> {
    // Other systems cannot open a directory, and order the rename themselves.
    if cfg!(unix) { File::open(directory_of(target))?.sync_all() } else { Ok(()) }
}
