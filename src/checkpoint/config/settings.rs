//! One `config.json`, read key by key with messages that name file, key and value.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::mapped::read_small;
use crate::{Error, Result};

/// Largest config read (published ones have at most 1.6 KB).
const MAX_CONFIG: u64 = 1 << 20;

/// The keys and values of one `config.json`.
#[derive(Debug)]
pub(in crate::checkpoint) struct Settings {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Settings {
    /// Reads a file that holds one JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_small(path, MAX_CONFIG)?;
        let values = serde_json::from_str(&text).map_err(|e| {
            Error::model(format!("{} is not a JSON object", path.display())).because(e)
        })?;
        Ok(Settings { path: path.to_path_buf(), values })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error about the value of `key`.
    pub fn refuse(&self, key: &str, must: &str) -> Error {
        let value = match self.values.get(key) {
            None => "missing".to_owned(),
            // Long enough for every honest value, short enough for a message.
            Some(value) => value.to_string().chars().take(200).collect(),
        };
        Error::model(format!("{}: {key} is {value}, must be {must}", self.path.display()))
    }

    fn get(&self, key: &str) -> Result<&Value> {
        self.values
            .get(key)
            .ok_or_else(|| Error::model(format!("{}: {key} is missing", self.path.display())))
    }

    pub fn text(&self, key: &str) -> Result<&str> {
        self.get(key)?.as_str().ok_or_else(|| self.refuse(key, "a string"))
    }

    /// A whole number within `range`.
    pub fn count(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        as_count(self.get(key)?, &range).ok_or_else(|| {
            self.refuse(key, &format!("a whole number from {} to {}", range.start(), range.end()))
        })
    }

    /// A list of exactly `N` whole numbers within `range`.
    pub fn counts<const N: usize>(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
    ) -> Result<[usize; N]> {
        let numbers: Option<Vec<usize>> = self
            .get(key)?
            .as_array()
            .and_then(|list| list.iter().map(|value| as_count(value, &range)).collect());
        numbers.and_then(|list| list.try_into().ok()).ok_or_else(|| {
            let (low, high) = range.into_inner();
            self.refuse(key, &format!("a list of {N} whole numbers from {low} to {high}"))
        })
    }

    /// A small positive number added under a square root.
    pub fn epsilon(&self, key: &str) -> Result<f32> {
        match self.get(key)?.as_f64() {
            Some(value) if (1e-12..=1e-2).contains(&value) => Ok(value as f32),
            _ => Err(self.refuse(key, "a number from 1e-12 to 0.01")),
        }
    }

    /// The setting must be there and have the one value that is implemented.
    pub fn require(&self, key: &str, value: impl Into<Value>) -> Result<()> {
        self.get(key)?;
        self.allow(key, value)
    }

    /// The setting may be absent; if it is there it must have the value that is implemented.
    pub fn allow(&self, key: &str, value: impl Into<Value>) -> Result<()> {
        let value = value.into();
        match self.values.get(key) {
            Some(given) if *given != value => {
                Err(self.refuse(key, &format!("{value} (nothing else is implemented)")))
            }
            _ => Ok(()),
        }
    }
}

fn as_count(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    let number = usize::try_from(value.as_u64()?).ok()?;
    range.contains(&number).then_some(number)
}
