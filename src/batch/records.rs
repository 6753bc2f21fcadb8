//! What became of each line, in a file of JSON lines that only grows.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// How an attempt at a line ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The output is complete.
    Done,
    /// It failed, and will be tried again.
    Failed,
    /// The line cannot be used.
    Bad,
}

/// One attempt. The last record of a key counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// See [`super::Job::key`].
    pub key: String,
    /// The number of the line when it was run.
    pub line: usize,
    /// How it ended.
    pub status: Status,
    /// The output, below the folder of outputs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output: Option<String>,
    /// The settings of the video.
    #[serde(skip_serializing_if = "Value::is_null", default)]
    pub settings: Value,
    /// Seconds of each phase.
    #[serde(skip_serializing_if = "Value::is_null", default)]
    pub seconds: Value,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// The records of a run, and those of its other shards.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    file: File,
    last: HashMap<String, Status>,
}

impl Records {
    /// Opens `<folder>/<name>.jsonl` to add to it, and reads every `<stem>*.jsonl` beside it,
    /// where the stem is `name` up to its first dot: those are the records of other shards.
    /// A line that a crash left unfinished is cut off.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if another process has the same file open;
    /// [`crate::ErrorKind::Io`] if it cannot be read or written.
    pub fn open(folder: &Path, name: &str) -> Result<Records> {
        fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        let path = folder.join(format!("{name}.jsonl"));
        let failed = |e| Error::io("cannot open", &path, e);
        let mut file =
            OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::usage(format!("{} is in use", path.display()))
                    .hint("the same prompts are being run already; wait, or use --shard"));
            }
            // Some network file systems know no locks.
            Err(TryLockError::Error(_)) => {}
        }
        cut_unfinished(&mut file).map_err(failed)?;
        let mut records = Records { path: path.clone(), file, last: HashMap::new() };
        let stem = name.split('.').next().unwrap_or(name);
        let entries = fs::read_dir(folder).map_err(|e| Error::io("cannot read", folder, e))?;
        for entry in entries.flatten() {
            let other = entry.file_name();
            let other = other.to_string_lossy();
            if other.starts_with(stem) && other.ends_with(".jsonl") && entry.path() != path {
                records.read(&entry.path())?;
            }
        }
        records.read(&path)?;
        Ok(records)
    }

    fn read(&mut self, path: &Path) -> Result<()> {
        let failed = |e| Error::io("cannot read", path, e);
        for line in BufReader::new(File::open(path).map_err(failed)?).split(b'\n') {
            // Another shard may be about to write its last line.
            let Ok(record) = serde_json::from_slice::<Record>(&line.map_err(failed)?) else {
                continue;
            };
            // What is done stays done, whatever the order in which shards are read.
            if self.last.get(&record.key) != Some(&Status::Done) {
                self.last.insert(record.key, record.status);
            }
        }
        Ok(())
    }

    /// Where the records are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the last attempt ended, if there was one.
    pub fn status(&self, key: &str) -> Option<Status> {
        self.last.get(key).copied()
    }

    /// Adds a record, on the disk before this returns.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if it cannot be written.
    pub fn add(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record)
            .map_err(|e| Error::input("a record cannot be written").because(e))?;
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::io("cannot write", &self.path, e))?;
        self.last.insert(record.key.clone(), record.status);
        Ok(())
    }
}

/// Cuts off what stands behind the last line end.
fn cut_unfinished(file: &mut File) -> std::io::Result<()> {
    let mut content = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut content)?;
    let whole = content.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    if whole < content.len() {
        file.set_len(whole as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, status: Status) -> Record {
        let key = key.to_string();
        let (settings, seconds) = (Value::Null, Value::Null);
        Record { key, line: 1, status, output: None, settings, seconds, error: None }
    }

    #[test]
    fn torn_lines_are_cut_and_shards_read_each_other() {
        let folder = tempfile::tempdir().expect("folder");
        let mut first = Records::open(folder.path(), "results.0-of-2").expect("opened");
        first.add(&record("a", Status::Done)).expect("added");
        first.add(&record("b", Status::Failed)).expect("added");
        let in_use = Records::open(folder.path(), "results.0-of-2").expect_err("in use");
        assert!(in_use.to_string().contains("in use"), "{in_use}");
        let mut second = Records::open(folder.path(), "results.1-of-2").expect("opened");
        assert_eq!(second.status("a"), Some(Status::Done));
        assert_eq!(second.status("b"), Some(Status::Failed));
        second.add(&record("b", Status::Done)).expect("added");
        drop((first, second));

        let path = folder.path().join("results.0-of-2.jsonl");
        let whole = fs::read(&path).expect("records");
        fs::write(&path, [&whole[..], b"{\"key\": \"c\", \"sta"].concat()).expect("write");
        let mut again = Records::open(folder.path(), "results.0-of-2").expect("opened");
        assert_eq!((again.status("b"), again.status("c")), (Some(Status::Done), None));
        again.add(&record("c", Status::Bad)).expect("added");
        let text = fs::read_to_string(&path).expect("records");
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().all(|l| serde_json::from_str::<Record>(l).is_ok()), "{text}");
    }
}
