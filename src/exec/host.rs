//! Room on the host for what does not stay on the device: memory that may be locked, and a
//! scratch file for the rest.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::available_memory;
use crate::{Error, ErrorKind, Result};

/// What a run takes of the host's memory besides what it locks for carried frames and rings:
/// the driver's own, frames on their way to the file, tokenizers, and some reserve.
pub const PROCESS_BYTES: u64 = 768 << 20;

/// Of a limit of host memory the part that may be locked, in bytes.
pub const fn lockable(limit: u64) -> u64 {
    limit.saturating_sub(PROCESS_BYTES)
}

/// Room on the host.
#[derive(Debug, Clone, Default)]
pub struct HostRoom {
    limit: Option<u64>,
    scratch: Option<PathBuf>,
    /// The first answer of [`HostRoom::memory`]: what is planned later must fit as it was found to
    /// fit at first, though the run itself has taken memory since.
    found: Arc<OnceLock<Option<u64>>>,
}

impl HostRoom {
    /// At most `limit` bytes of memory, all that no file stands behind counted: what is locked
    /// and [`PROCESS_BYTES`]. In any case at most what is available when it is first asked for,
    /// less an eighth. What is beyond goes to a file in the folder `scratch`, without it in the
    /// user's cache.
    pub fn new(limit: Option<u64>, scratch: Option<PathBuf>) -> HostRoom {
        HostRoom { limit, scratch, found: Arc::default() }
    }

    /// Bytes that may be locked, the same at every call; `None` where neither the caller nor the
    /// system tells.
    pub fn memory(&self) -> Option<u64> {
        *self.found.get_or_init(|| {
            let available = available_memory().map(|bytes| bytes - bytes / 8);
            available.into_iter().chain(self.limit).min().map(lockable)
        })
    }

    /// Fails if a scratch file of `bytes` cannot be had.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the folder cannot be made or has no room,
    /// [`ErrorKind::Usage`] when it is in memory itself.
    pub fn check(&self, bytes: u64) -> Result<()> {
        let folder = self.folder()?;
        let asking = |e: Errno| Error::io("cannot ask for the free space of", &folder, e.into());
        if in_memory(&folder).map_err(asking)? {
            return Err(Error::usage(format!(
                "{} is in memory (tmpfs), where a scratch file saves none",
                folder.display()
            ))
            .hint("name a folder on a disk with --scratch"));
        }
        let space = rustix::fs::statvfs(&folder).map_err(asking)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free >= bytes {
            return Ok(());
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        Err(full(format!(
            "a scratch file of {:.2} GiB is needed, {:.2} GiB are free in {}",
            gib(bytes),
            gib(free),
            folder.display()
        )))
    }

    /// A file of `bytes` zeros that has no name and goes with its mapping. All of it is
    /// allocated, so that the disk cannot be full when it is written to.
    ///
    /// # Errors
    /// Those of [`check`](Self::check), and [`ErrorKind::Io`].
    pub fn file(&self, bytes: u64) -> Result<MmapRaw> {
        self.check(bytes)?;
        let folder = self.folder()?;
        let made = tempfile::tempfile_in(&folder)
            .map_err(|e| Error::io("cannot make a scratch file in", &folder, e))?;
        allocate(&made, bytes).map_err(|e| {
            let gib = bytes as f64 / f64::from(1 << 30);
            full(format!("no scratch file of {gib:.2} GiB in {}", folder.display())).because(e)
        })?;
        MmapOptions::new()
            .len(bytes as usize)
            .map_raw(&made)
            .map_err(|e| Error::io("cannot map a scratch file in", &folder, e))
    }

    /// The folder of scratch files, which is made if it is not there.
    fn folder(&self) -> Result<PathBuf> {
        // The specification says to ignore relative paths.
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let cache =
            || absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let own = || cache().map(|cache| cache.join("pyraflow"));
        let folder = self.scratch.clone().or_else(own).ok_or_else(|| {
            Error::usage("there is no place for a scratch file: neither XDG_CACHE_HOME nor HOME")
                .hint("name a folder on a disk with --scratch")
        })?;
        fs::create_dir_all(&folder).map_err(|e| {
            Error::io("cannot make the folder", &folder, e)
                .hint("name another one for scratch files with --scratch")
        })?;
        Ok(folder)
    }
}

fn full(message: String) -> Error {
    Error::new(ErrorKind::Io, message).hint(
        "free some space, name a folder on another disk with --scratch, allow more memory with \
         --max-host or --max-vram, or decode in tiles (--tile)",
    )
}

/// Whether files in `folder` take memory.
fn in_memory(folder: &Path) -> Result<bool, Errno> {
    /// As in Linux's `magic.h`.
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let kind = rustix::fs::statfs(folder)?.f_type as i64;
    Ok(kind == TMPFS || kind == RAMFS)
}

/// Gives `file` its size and the blocks for it.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // Not every file system can.
        Err(Errno::OPNOTSUPP) => write_zeros(file, bytes),
        answer => Ok(answer?),
    }
}

fn write_zeros(mut file: &File, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(bytes), &mut file).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder beside the test itself: that for temporary files may be in memory. `None` if
    /// this one is, too.
    fn folder() -> Option<tempfile::TempDir> {
        let test = std::env::current_exe().expect("this test");
        let folder = tempfile::tempdir_in(test.parent().expect("its folder")).expect("a folder");
        let memory = in_memory(folder.path()).expect("the kind of its file system");
        memory.then(|| println!("skipped: {} is in memory", folder.path().display()));
        (!memory).then_some(folder)
    }

    #[test]
    fn a_scratch_file_has_its_size_and_no_name() {
        let Some(folder) = folder() else { return };
        let below = folder.path().join("made");
        let room = HostRoom::new(None, Some(below.clone()));
        room.check(1 << 20).expect("room for a MiB");
        let file = room.file(3 << 20).expect("a file");
        assert_eq!((file.len(), fs::read_dir(&below).expect("the folder").count()), (3 << 20, 0));
        // SAFETY: nobody else has the mapping.
        let bytes = unsafe { std::slice::from_raw_parts_mut(file.as_mut_ptr(), file.len()) };
        assert!(bytes.iter().all(|&b| b == 0));
        bytes.fill(7);
        assert!(bytes.iter().all(|&b| b == 7));
    }

    #[test]
    fn what_does_not_fit_on_the_disk_is_told() {
        let Some(folder) = folder() else { return };
        let room = HostRoom::new(None, Some(folder.path().into()));
        let error = room.check(1 << 60).expect_err("an exbibyte");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("1073741824.00 GiB is needed"), "{error}");
        assert!(room.file(1 << 60).is_err());
        let file = folder.path().join("file");
        fs::write(&file, "").expect("a file");
        let error = HostRoom::new(None, Some(file)).check(1).expect_err("no folder");
        assert_eq!(error.kind(), ErrorKind::Io);
    }

    #[test]
    fn memory_is_no_place_for_a_scratch_file() {
        let shared = Path::new("/dev/shm");
        if !in_memory(shared).is_ok_and(|is| is) {
            println!("skipped: {} is no tmpfs", shared.display());
            return;
        }
        let error = HostRoom::new(None, Some(shared.into())).check(1).expect_err("in memory");
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("tmpfs"), "{error}");
    }

    #[test]
    fn a_limit_counts_the_process_itself() {
        assert_eq!(lockable(4 << 30), (4 << 30) - PROCESS_BYTES);
        let memory = |limit| HostRoom::new(limit, None).memory();
        assert_eq!(memory(Some(1 << 20)), Some(0));
        assert!(memory(Some(4 << 30)) <= Some(lockable(4 << 30)));
        // Nor more than there is.
        if let Some(all) = crate::exec::total_memory() {
            assert!(memory(None) < Some(all) && memory(Some(u64::MAX)) < Some(all));
        }
    }

    #[test]
    fn a_file_is_as_large_and_empty_whether_reserved_or_written() {
        let bytes = (2 << 20) + 1;
        for fill in [allocate, write_zeros] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("file");
            let file = File::create_new(&path).expect("a file");
            fill(&file, bytes).expect("room");
            let found = fs::read(&path).expect("the file");
            assert!(found.len() as u64 == bytes && found.iter().all(|&b| b == 0));
        }
    }
}
