//! What a pull tells while it goes on.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

/// What a pull tells about itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Another process pulls or removes a model of the same repository.
    Waiting {
        /// The repository.
        held: String,
    },
    /// Something the user should know although the pull goes on.
    Warning {
        /// What.
        message: String,
    },
    /// What is to be downloaded is known.
    Start {
        /// The repository.
        repo: String,
        /// Its commit.
        commit: String,
        /// Number of files to download.
        files: usize,
        /// Bytes of them that are not there yet.
        bytes: u64,
        /// Number of files that are there already.
        present: usize,
    },
    /// `done` of `total` bytes of a stage are done.
    Progress {
        /// The stage.
        stage: Stage,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
        /// How fast it went during the last seconds.
        bytes_per_second: f64,
        /// How long it will go on like this; unknown while nothing moves.
        seconds_left: Option<f64>,
        /// The part of the model, where it is one.
        detail: String,
    },
    /// A file is there.
    File {
        /// Its path in the repository.
        path: String,
        /// Its length.
        bytes: u64,
        /// Its hash, by which it was checked.
        hash: String,
        /// Where it came from.
        outcome: Outcome,
    },
    /// A part of the model is in bf16 now.
    Converted {
        /// The part.
        component: String,
        /// The file.
        path: PathBuf,
        /// Bytes of published files that were removed.
        removed: u64,
    },
}

/// The parts of a pull, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Hashing files that were there before.
    Checking,
    /// Downloading.
    Downloading,
    /// Writing weights in bf16.
    Converting,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Checking => "checking",
            Stage::Downloading => "downloading",
            Stage::Converting => "converting",
        })
    }
}

/// Where a file came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// From the server.
    Downloaded,
    /// It was in the cache.
    Present,
}

/// Listens to a pull.
pub trait Watcher {
    /// Something happened.
    fn event(&mut self, event: &Event);

    /// Whether the user wants it to stop.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Turns bytes done into progress events, with rate and time left.
pub(super) struct Meter {
    stage: Stage,
    total: u64,
    /// Bytes done at times during the last seconds.
    past: VecDeque<(Instant, u64)>,
    shown: Option<Instant>,
}

impl Meter {
    pub fn new(stage: Stage, total: u64) -> Meter {
        Meter { stage, total, past: VecDeque::new(), shown: None }
    }

    /// `done` bytes are done, `free` of them without the work that is measured: what an
    /// earlier run left says nothing about the rate.
    pub fn show(&mut self, done: u64, free: u64, detail: &str, watcher: &mut dyn Watcher) {
        const WINDOW: f64 = 10.0;
        const INTERVAL: f64 = 0.1;
        let now = Instant::now();
        let recent = self.shown.is_some_and(|at| (now - at).as_secs_f64() < INTERVAL);
        if recent && done < self.total {
            return;
        }
        self.shown = Some(now);
        let worked = done.saturating_sub(free);
        self.past.push_back((now, worked));
        while self.past.front().is_some_and(|(at, _)| (now - *at).as_secs_f64() > WINDOW) {
            self.past.pop_front();
        }
        let (since, before) = self.past.front().copied().unwrap_or((now, worked));
        let seconds = (now - since).as_secs_f64();
        let rate = if seconds > 0.0 { worked.saturating_sub(before) as f64 / seconds } else { 0.0 };
        let left = self.total.saturating_sub(done) as f64;
        watcher.event(&Event::Progress {
            stage: self.stage,
            done: done.min(self.total),
            total: self.total,
            bytes_per_second: rate,
            seconds_left: (rate > 0.0).then(|| left / rate),
            detail: detail.to_owned(),
        });
    }

    pub fn end(&mut self, watcher: &mut dyn Watcher) {
        self.shown = None;
        let free = self.total.saturating_sub(self.past.back().map_or(0, |(_, worked)| *worked));
        self.show(self.total, free, "", watcher);
    }
}
