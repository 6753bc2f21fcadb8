//! `pyraflow pull`.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use pyraflow::checkpoint::Variant;
use pyraflow::hub::{Event, Hub, ModelName, Outcome, PullOptions, Pulled, Stage, Watcher};
use pyraflow::{Error, Result};
use serde_json::json;

use super::progress::{JSON_INTERVAL, Mode, watch_signals};
use super::session::ReportArgs;
use super::size;

/// Arguments of `pull`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Models go into Hugging Face's cache. HF_HOME, HF_HUB_CACHE, HF_TOKEN, \
    HF_TOKEN_PATH, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to its own tools.")]
pub struct Args {
    /// sd3-384p, sd3-768p, miniflux-384p, miniflux-768p, miniflux-image, or another
    /// repository as OWNER/NAME or OWNER/NAME@REVISION
    name: String,

    /// Of another repository's transformers, only this one: 384p, 768p or image
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,

    /// Keep the published weights beside the bf16 they are converted to [default: remove
    /// those that pyraflow downloaded, once the conversion was read back]
    #[arg(long)]
    keep_original: bool,

    /// Files downloaded at the same time
    #[arg(long, value_name = "N", default_value = "4")]
    jobs: usize,

    #[command(flatten)]
    report: ReportArgs,
}

/// Most files at the same time: servers do not like more.
const MAX_JOBS: usize = 16;

/// Pulls a model.
pub fn run(args: &Args) -> Result<()> {
    let mode = args.report.mode();
    let name: ModelName = args.name.parse()?;
    let variant = match &args.variant {
        None => None,
        Some(text) => Some(Variant::from_name(text).ok_or_else(|| {
            Error::usage(format!("there is no variant {text:?}; they are 384p, 768p and image"))
        })?),
    };
    if !(1..=MAX_JOBS).contains(&args.jobs) {
        return Err(Error::usage(format!("cannot download {} files at the same time", args.jobs))
            .hint(format!("ask for 1 to {MAX_JOBS}")));
    }
    let mut console = Console::new(mode)?;
    let hub = Hub::from_env()?;
    let manifest = hub.manifest(&name, variant)?;
    let options = PullOptions {
        keep_original: args.keep_original,
        jobs: args.jobs,
        ..PullOptions::default()
    };
    let pulled = hub.pull(&manifest, &options, &mut console);
    console.bar.finish_and_clear();
    console.done(&name, &pulled?)
}

/// Shows a pull.
struct Console {
    mode: Mode,
    bar: ProgressBar,
    stage: Option<Stage>,
    interrupted: Arc<AtomicBool>,
    last_json: Option<Instant>,
}

impl Console {
    fn new(mode: Mode) -> Result<Console> {
        let shown = mode == Mode::People && stderr().is_terminal();
        let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{prefix:>11} {bar:30} {percent:>3} %  {msg}");
        // The template is a constant; should it be wrong, indicatif's own bar will do.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Console { mode, bar, stage: None, interrupted: watch_signals()?, last_json: None })
    }

    fn done(&self, name: &ModelName, pulled: &Pulled) -> Result<()> {
        match self.mode {
            Mode::Quiet => Ok(()),
            Mode::Json | Mode::Log => self.mode.json(&json!({
                "event": "done", "model": name.to_string(), "folder": pulled.folder,
                "downloaded": pulled.downloaded, "removed": pulled.removed,
            })),
            Mode::People => {
                super::say(&format!("{name} is in {}", pulled.folder.display()));
                super::say(&format!("use it with: pyraflow generate --model {name} \"…\""));
                Ok(())
            }
        }
    }

    fn json_event(&mut self, event: &Event) {
        if let Event::Progress { done, total, .. } = event {
            let now = Instant::now();
            let recent = self.last_json.is_some_and(|last| now - last < JSON_INTERVAL);
            if recent && done < total {
                return;
            }
            self.last_json = Some(now);
        }
        if self.mode.json(event).is_err() {
            // The reader is gone: nobody waits for the model either.
            self.interrupted.store(true, Ordering::Relaxed);
        }
    }

    /// A line above the bar.
    fn line(&self, text: &str) {
        self.bar.suspend(|| super::say(text));
    }

    fn show(&mut self, event: &Event) {
        let talks = self.mode == Mode::People;
        match event {
            Event::Warning { message } => self.line(&format!("warning: {message}")),
            Event::Progress { stage, done, total, bytes_per_second, seconds_left, detail } => {
                if self.stage != Some(*stage) {
                    self.stage = Some(*stage);
                    self.bar.reset();
                    self.bar.set_prefix(stage.to_string());
                }
                self.bar.set_length(*total);
                self.bar.set_position(*done);
                let left = seconds_left.map_or(String::new(), |s| format!(", {} left", time(s)));
                self.bar.set_message(format!(
                    "{} of {}, {}/s{left}  {detail}",
                    size(*done),
                    size(*total),
                    size(*bytes_per_second as u64),
                ));
            }
            Event::Waiting { held } if talks => {
                self.line(&format!("another process is at work on {held}: waiting for it"));
            }
            Event::Start { repo, commit, files, bytes, present } if talks => {
                let (short, bytes) = (&commit[..commit.len().min(8)], size(*bytes));
                self.line(&format!(
                    "{repo} at {short}: {files} files to get ({bytes}), {present} are there"
                ));
            }
            Event::File { path, bytes, outcome: Outcome::Downloaded, .. } if talks => {
                self.line(&format!("  {path} ({})", size(*bytes)));
            }
            Event::Converted { component, removed, .. } if talks => {
                let removed = match removed {
                    0 => String::new(),
                    bytes => format!(", published files removed ({})", size(*bytes)),
                };
                self.line(&format!("  {component} is in bf16{removed}"));
            }
            _ => {}
        }
    }
}

impl Watcher for Console {
    fn event(&mut self, event: &Event) {
        match self.mode {
            Mode::Json | Mode::Log => self.json_event(event),
            Mode::People | Mode::Quiet => self.show(event),
        }
    }

    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // An error message follows; the bar must not be left on its line.
        self.bar.finish_and_clear();
    }
}

/// A length of time for people.
fn time(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 1e7).round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m}:{s:02} min"),
        (h, m, _) => format!("{h}:{m:02} h"),
    }
}
