//! Does what is still to be done.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use serde_json::{Value, json};

use super::jobs::{Entry, Job};
use super::records::{Record, Records, Status};
use crate::media::{Format, OutputTarget};
use crate::models::vae::video_frames;
use crate::pipeline::{Output, SavedRun, Timings};
use crate::{Error, ErrorKind, Result};

/// A part of a file of prompts: those of its jobs whose number leaves `index` when divided by
/// `count`. All shards together are the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 0.
    pub index: usize,
    /// Of how many.
    pub count: usize,
}

impl Shard {
    /// Everything.
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    /// The name of this shard's records.
    pub fn records_name(self) -> String {
        match self {
            Shard::WHOLE => "results".into(),
            Shard { index, count } => format!("results.{index}-of-{count}"),
        }
    }

    fn has(self, number: usize) -> bool {
        number % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, String> {
        let (index, count) = text.split_once('/').ok_or("expected I/N, such as 0/4")?;
        let number = |n: &str| n.parse::<usize>().map_err(|e| format!("{n:?}: {e}"));
        let shard = Shard { index: number(index)?, count: number(count)? };
        if shard.index < shard.count {
            return Ok(shard);
        }
        Err(format!("there is no shard {text}: they count from 0, as in 0/4, 1/4, 2/4, 3/4"))
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Makes the video of a job.
pub trait Maker {
    /// Makes the video and leaves its units; `output` says where and whether to resume.
    ///
    /// # Errors
    /// Those of [`crate::pipeline::Pipeline::generate`].
    fn make(&mut self, job: &Job, output: &Output) -> Result<Timings>;

    /// Whether `units` are those of this very job, left by an earlier attempt.
    fn left(&self, job: &Job, units: &Path) -> bool;

    /// What is written about the job into the records.
    fn settings(&self, job: &Job) -> Value;
}

/// How the jobs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Which part of them.
    pub shard: Shard,
    /// Whether bad lines and failed jobs do not stop the others.
    pub keep_going: bool,
    /// Whether outputs that are there and not known to be of these jobs are replaced.
    pub overwrite: bool,
    /// Whether the units of complete videos stay.
    pub keep_units: bool,
}

/// What is told while the jobs run.
#[derive(Debug)]
pub enum Told<'a> {
    /// A line cannot be used.
    Bad {
        /// Its number.
        line: usize,
        /// Why.
        error: &'a Error,
    },
    /// A line is the same as an earlier one.
    Duplicate {
        /// Its number.
        line: usize,
        /// The number of the earlier one.
        of: usize,
    },
    /// A job begins.
    Begins {
        /// The job.
        job: &'a Job,
        /// Its number among those to be run now, from 1.
        number: usize,
        /// How many those are.
        of: usize,
    },
    /// A job is done.
    Done {
        /// The job.
        job: &'a Job,
        /// How long it took.
        timings: &'a Timings,
    },
    /// A job failed.
    Failed {
        /// The job.
        job: &'a Job,
        /// Why.
        error: &'a Error,
    },
}

/// What became of all lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Made now.
    pub done: usize,
    /// Made before.
    pub there: usize,
    /// Failed now.
    pub failed: usize,
    /// Not begun, since the run was stopped.
    pub left: usize,
    /// Lines that cannot be used.
    pub bad: usize,
    /// Lines that repeat earlier ones.
    pub duplicates: usize,
    /// Jobs of other shards.
    pub elsewhere: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} made", self.done)?;
        for (number, what) in [
            (self.there, "there already"),
            (self.failed, "failed"),
            (self.left, "left"),
            (self.bad, "bad lines"),
            (self.duplicates, "repeated lines"),
            (self.elsewhere, "of other shards"),
        ] {
            if number > 0 {
                write!(f, ", {number} {what}")?;
            }
        }
        Ok(())
    }
}

/// Runs the jobs among `entries` that are not done, into `folder`. Every line counts in the
/// summary once; the error is that of the job or line that stopped the run, or the first that
/// did not.
pub fn run(
    entries: &[Entry],
    folder: &Path,
    records: &mut Records,
    options: Options,
    maker: &mut dyn Maker,
    tell: &mut dyn FnMut(Told) -> Result<()>,
) -> (Summary, Result<()>) {
    let mut runner =
        Runner { folder, records, options, maker, summary: Summary::default(), first: Ok(()) };
    let result = runner.run(entries, tell);
    (runner.summary, result.and(runner.first))
}

struct Runner<'a> {
    folder: &'a Path,
    records: &'a mut Records,
    options: Options,
    maker: &'a mut dyn Maker,
    summary: Summary,
    /// The first error that did not stop the run.
    first: Result<()>,
}

impl Runner<'_> {
    fn run(&mut self, entries: &[Entry], tell: &mut dyn FnMut(Told) -> Result<()>) -> Result<()> {
        let todo = self.sort(entries, tell)?;
        self.summary.left = todo.len();
        if !self.options.keep_going {
            // Wrong lines are found before anything is computed.
            std::mem::replace(&mut self.first, Ok(()))?;
        }
        for (index, job) in todo.iter().enumerate() {
            tell(Told::Begins { job, number: index + 1, of: todo.len() })?;
            match self.make(job) {
                Ok(timings) => {
                    self.summary.left -= 1;
                    self.summary.done += 1;
                    tell(Told::Done { job, timings: &timings })?;
                }
                // Neither done nor failed: it is resumed next time.
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                Err(error) => {
                    self.summary.left -= 1;
                    self.summary.failed += 1;
                    tell(Told::Failed { job, error: &error })?;
                    self.record(job, Status::Failed, None, Some(&error))?;
                    // What a broken device fails once, it fails every time.
                    let fatal = error.kind() == ErrorKind::Device;
                    let error = error.at(format!("line {}", job.line));
                    if fatal || !self.options.keep_going {
                        return Err(error);
                    }
                    self.note(error);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, error: Error) {
        if self.first.is_ok() {
            self.first = Err(error);
        }
    }

    /// The jobs that are to be run; all other lines are counted and told.
    fn sort<'e>(
        &mut self,
        entries: &'e [Entry],
        tell: &mut dyn FnMut(Told) -> Result<()>,
    ) -> Result<Vec<&'e Job>> {
        let mut todo = Vec::new();
        for (number, entry) in entries.iter().enumerate() {
            if !self.options.shard.has(number) {
                self.summary.elsewhere += 1;
                continue;
            }
            match entry {
                Entry::Bad { line, key, error } => {
                    self.summary.bad += 1;
                    tell(Told::Bad { line: *line, error })?;
                    if self.records.status(key) != Some(Status::Bad) {
                        self.records.add(&Record {
                            key: key.clone(),
                            line: *line,
                            status: Status::Bad,
                            output: None,
                            settings: Value::Null,
                            seconds: Value::Null,
                            error: Some(error.to_string()),
                        })?;
                    }
                    let shown = Error::new(error.kind(), error.to_string());
                    let shown = shown.at(format!("line {line}"));
                    self.note(shown.hint("correct the line, or do without it: --keep-going"));
                }
                Entry::Duplicate { line, of } => {
                    self.summary.duplicates += 1;
                    tell(Told::Duplicate { line: *line, of: *of })?;
                }
                Entry::Job(job) if self.is_done(job)? => self.summary.there += 1,
                Entry::Job(job) => todo.push(&**job),
            }
        }
        Ok(todo)
    }

    /// Whether the job needs nothing more. Removes the units that a run left which was killed
    /// after it had recorded its end.
    fn is_done(&mut self, job: &Job) -> Result<bool> {
        let output = self.output(job)?;
        if !is_complete(&output.target, job.request.units) {
            return Ok(false);
        }
        let left = output.units.as_deref().is_some_and(|units| self.maker.left(job, units));
        if self.records.status(&job.key) == Some(Status::Done) {
            if left {
                self.discard(&output)?;
            }
            return Ok(true);
        }
        if left || !job.own_name {
            // Complete, but perhaps an older file of the same name.
            return Ok(false);
        }
        // Nothing else has this name, and outputs are complete or absent: its record was lost.
        self.record(job, Status::Done, None, None)?;
        Ok(true)
    }

    fn output(&self, job: &Job) -> Result<Output> {
        Output::to(&self.folder.join(&job.output))
    }

    fn make(&mut self, job: &Job) -> Result<Timings> {
        let mut output = self.output(job)?;
        if let OutputTarget::File { path, .. } = &output.target {
            let folder = path.parent().unwrap_or(self.folder);
            fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
        }
        // The units stay until the end is recorded: killed before, the video is decoded again.
        output.keep_units = true;
        let left = output.units.as_deref().is_some_and(|units| self.maker.left(job, units));
        // Units of this job are only there if its output might be written.
        (output.resume, output.overwrite) = (left, left || self.options.overwrite);
        let timings = self.maker.make(job, &output)?;
        self.record(job, Status::Done, Some(&timings), None)?;
        self.discard(&output)?;
        Ok(timings)
    }

    fn discard(&self, output: &Output) -> Result<()> {
        match &output.units {
            Some(folder) if !self.options.keep_units && folder.join("run.json").is_file() => {
                SavedRun::new(folder, Value::Null).discard()
            }
            _ => Ok(()),
        }
    }

    fn record(
        &mut self,
        job: &Job,
        status: Status,
        timings: Option<&Timings>,
        error: Option<&Error>,
    ) -> Result<()> {
        self.records.add(&Record {
            key: job.key.clone(),
            line: job.line,
            status,
            output: Some(job.output.to_string_lossy().into_owned()),
            settings: self.maker.settings(job),
            seconds: timings.map_or(Value::Null, |timings| json!(timings)),
            error: error.map(ToString::to_string),
        })
    }
}

/// Whether an output is there; of numbered pictures, all of them.
fn is_complete(target: &OutputTarget, units: usize) -> bool {
    match target {
        OutputTarget::Stdout => false,
        OutputTarget::File { path, format: Format::Png } if units > 1 => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let picture = |i| path.with_file_name(format!("{stem}-{i:05}.png")).is_file();
            (0..video_frames(units)).all(picture)
        }
        OutputTarget::File { path, .. } => path.is_file(),
    }
}
