//! The small files of a tokenizer folder.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, ErrorKind, Result};

/// The longest target of a link; anything longer is a file in its own right.
const LONGEST_LINK: u64 = 1024;

/// A tokenizer folder of a checkpoint.
pub struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`.
    pub fn new(path: &Path) -> Self {
        Folder(follow(path.to_owned()))
    }

    /// Where the folder's file of this name is.
    pub fn path(&self, name: &str) -> PathBuf {
        follow(self.0.join(name))
    }

    /// The bytes of a file.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        std::fs::read(&path).map_err(|e| {
            Error::io("cannot read the tokenizer file", &path, e)
                .of_kind(ErrorKind::Model)
                .hint("the checkpoint is incomplete; download it again")
        })
    }

    /// The text of a file.
    pub fn read_text(&self, name: &str) -> Result<String> {
        String::from_utf8(self.read(name)?).map_err(|e| self.damaged(name, "not UTF-8").because(e))
    }

    /// The value of a JSON file.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        serde_json::from_slice(&self.read(name)?)
            .map_err(|e| self.damaged(name, "not what is expected").because(e))
    }

    /// The value of a JSON file that may be missing.
    pub fn read_json_if_there<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T> {
        if self.path(name).exists() { self.read_json(name) } else { Ok(T::default()) }
    }

    /// The error for a file that cannot be used.
    pub fn damaged(&self, name: &str, problem: &str) -> Error {
        Error::model(format!("the tokenizer file {} is {problem}", self.path(name).display()))
            .hint("the checkpoint is damaged; download it again")
    }
}

/// Follows a link that Git wrote as a text file holding its target, which it does where
/// links are not supported. Anything else is returned as it is.
fn follow(path: PathBuf) -> PathBuf {
    let is_small = path.metadata().is_ok_and(|m| m.is_file() && m.len() <= LONGEST_LINK);
    if !is_small {
        return path;
    }
    let target = std::fs::read_to_string(&path).ok().and_then(|text| {
        let target = path.parent()?.join(&text);
        (text.starts_with("../") && target.exists()).then_some(target)
    });
    target.unwrap_or(path)
}
