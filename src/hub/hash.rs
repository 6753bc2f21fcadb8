//! The two hashes by which the hub names contents.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::names::is_hex;
use crate::{Error, Result};

/// Bytes read at a time.
pub(super) const CHUNK: usize = 1 << 18;

/// What a file's contents must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// SHA-256 of the contents: large files.
    Sha256(String),
    /// Git's name of the contents, a SHA-1 with a prefix: small files.
    Git(String),
}

impl Digest {
    /// The hash that an entity tag of the hub is; none if it is something else.
    pub fn of_etag(etag: &str) -> Option<Digest> {
        if is_hex(etag, 64) {
            Some(Digest::Sha256(etag.to_owned()))
        } else {
            is_hex(etag, 40).then(|| Digest::Git(etag.to_owned()))
        }
    }

    /// Its hexadecimal digits, which name a blob in the cache.
    pub fn name(&self) -> &str {
        let (Digest::Sha256(name) | Digest::Git(name)) = self;
        name
    }

    /// Starts hashing contents of `bytes` bytes.
    pub fn hasher(&self, bytes: u64) -> Hasher {
        match self {
            Digest::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Digest::Git(_) => Hasher::Git(Sha1::new_with_prefix(format!("blob {bytes}\0"))),
        }
    }

    /// Whether the file at `path` has these contents; `step` is told of every chunk and can
    /// stop it.
    pub fn matches(&self, path: &Path, step: &mut dyn FnMut(u64) -> Result<()>) -> Result<bool> {
        let failed = |e| Error::io("cannot read", path, e);
        let mut file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut hasher = self.hasher(bytes);
        read_into(&mut file, path, &mut hasher, step)?;
        Ok(hasher.finish() == self.name())
    }
}

/// The SHA-256 of a file.
pub(super) fn sha256_of(path: &Path, step: &mut dyn FnMut(u64) -> Result<()>) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io("cannot read", path, e))?;
    let mut hasher = Hasher::Sha256(Sha256::new());
    read_into(&mut file, path, &mut hasher, step)?;
    Ok(hasher.finish())
}

/// Hashes what is left of a file; returns how many bytes that was.
pub(super) fn read_into(
    file: &mut File,
    path: &Path,
    hasher: &mut Hasher,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("cannot read", path, e)),
        };
        hasher.update(&buffer[..count]);
        total += count as u64;
        step(count as u64)?;
    }
}

/// A hash in the making.
#[derive(Debug, Clone)]
pub(super) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Git(hasher) => hasher.update(bytes),
        }
    }

    /// The hexadecimal digits.
    pub fn finish(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Hasher::Sha256(hasher) => hex(&hasher.finalize()),
            Hasher::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `git hash-object` and `sha256sum` of the same bytes.
    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "hello\n").unwrap();
        let git = Digest::of_etag("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert!(matches!(git, Digest::Git(_)));
        for digest in [git, Digest::of_etag(sha).unwrap()] {
            assert!(digest.matches(&path, &mut |_| Ok(())).unwrap());
            std::fs::write(&path, "hellO\n").unwrap();
            assert!(!digest.matches(&path, &mut |_| Ok(())).unwrap());
            std::fs::write(&path, "hello\n").unwrap();
        }
        assert_eq!(sha256_of(&path, &mut |_| Ok(())).unwrap(), sha);
        for other in ["", "../../x", "\"abc\"", &"A".repeat(64), &"a".repeat(63)] {
            assert_eq!(Digest::of_etag(other), None, "{other:?}");
        }
    }
}
