//! Weight files as read-only memory.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use memmap2::{Advice, Mmap, UncheckedAdvice};
use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// Length in bytes.
    pub bytes: u64,
    /// Time of the last change, in nanoseconds since 1970 (0 where unknown).
    pub modified_ns: u64,
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        let modified_ns = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .and_then(|age| u64::try_from(age.as_nanos()).ok())
            .unwrap_or(0);
        Stamp { bytes: metadata.len(), modified_ns }
    }
}

/// A whole file mapped read-only.
///
/// # Limit
/// Another process may truncate the file while it is mapped; touching a page that is gone
/// then ends this process with SIGBUS, which no reader of mapped files can prevent (advisory
/// locks bind only those who ask). What is done about it: the length is taken from the open
/// descriptor and every tensor is checked against it before the first use, the converted
/// store is only ever replaced by renaming, so this program never truncates a mapped file
/// itself, and [`MappedFile::check_unchanged`] lets long runs notice a change between phases.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    stamp: Stamp,
}

impl MappedFile {
    /// Maps a regular, non-empty file.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |source| Error::io("cannot open", path, source).of_kind(ErrorKind::Model);
        // Asked before opening: opening a FIFO would wait for a writer.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::model(format!("{} is not a regular file", path.display())));
        }
        let file = File::open(path).map_err(fail)?;
        let stamp = Stamp::of(&file.metadata().map_err(fail)?);
        if stamp.bytes == 0 {
            return Err(Error::model(format!("{} is empty", path.display()))
                .hint("the download may have been interrupted: fetch the file again"));
        }
        // SAFETY: the map is read-only and the file is opened for reading only. The slice it
        // gives stays valid as long as nobody truncates or rewrites the file, the limit of
        // every reader of mapped files that the type's documentation states.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        if map.len() as u64 != stamp.bytes {
            return Err(Error::model(format!("{} changed while it was opened", path.display())));
        }
        Ok(MappedFile { path: path.to_path_buf(), file, map, stamp })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// An error if the file has another length or modification time than when it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|e| Error::io("cannot look at", &self.path, e))?;
        if Stamp::of(&now) == self.stamp {
            return Ok(());
        }
        Err(Error::model(format!("{} was changed while it was in use", self.path.display()))
            .hint("leave the checkpoint alone during a run; then start again"))
    }

    /// Asks the system to read ahead (a hint: failure changes nothing but speed).
    pub fn read_ahead(&self) {
        let _ = self.map.advise(Advice::Sequential);
    }

    /// Lets go of the pages of `range`, so that one pass over a large file does not pile it
    /// up in this process's memory. Reading them again later works, from the file.
    pub fn release(&self, range: Range<usize>) {
        // SAFETY: for a shared read-only file mapping DONTNEED only drops page table
        // entries; the contents come back from the file at the next access. A failure
        // leaves the pages where they were.
        let _ = unsafe {
            self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
    }
}

/// Reads a small text file whole, refusing anything over `limit` bytes before allocating.
pub(super) fn read_small(path: &Path, limit: u64) -> Result<String> {
    let fail = |source| Error::io("cannot read", path, source).of_kind(ErrorKind::Model);
    let metadata = fs::metadata(path).map_err(fail)?;
    if !metadata.is_file() {
        return Err(Error::model(format!("{} is not a regular file", path.display())));
    }
    if metadata.len() > limit {
        return Err(Error::model(format!(
            "{} has {} bytes, more than the {limit} such a file can need",
            path.display(),
            metadata.len()
        )));
    }
    fs::read_to_string(path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert!(mapped.check_unchanged().is_ok());
        mapped.read_ahead();
        mapped.release(10..90);
        assert_eq!(mapped.bytes(), [7; 100]);
        // Longer, never shorter: a shorter file under a map is what must not be touched.
        File::options().append(true).open(&path).and_then(|f| f.set_len(101)).unwrap();
        assert_eq!(mapped.check_unchanged().unwrap_err().kind(), ErrorKind::Model);
    }

    #[test]
    fn what_is_not_a_plain_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        fs::write(&empty, "").unwrap();
        for path in [dir.path(), &empty, &dir.path().join("absent")] {
            assert_eq!(MappedFile::open(path).unwrap_err().kind(), ErrorKind::Model);
        }
        fs::write(&empty, "12345").unwrap();
        assert!(read_small(&empty, 4).is_err());
        assert_eq!(read_small(&empty, 5).unwrap(), "12345");
    }
}
