//! What a run shows: a bar on a terminal, JSON lines for programs, or nothing.

use std::io::{IsTerminal, stderr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pyraflow::media::{Frame, VideoSpec};
use pyraflow::pipeline::{Event, Phase, Reporter, Request, Timings};
use pyraflow::sampler::Latent;
use pyraflow::{Error, ErrorKind, Result};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::preview::Preview;

/// How a run reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A progress bar if standard error is a terminal, and a summary.
    People,
    /// JSON lines on standard output.
    Json,
    /// JSON lines on standard error.
    Log,
    /// Warnings only.
    Quiet,
}

impl Mode {
    /// Writes an event as a line of JSON, where that is wanted.
    pub fn json(self, value: &impl serde::Serialize) -> Result<()> {
        match self {
            Mode::Json => super::print(&json_line(value)?),
            Mode::Log => {
                super::say(json_line(value)?.trim_end());
                Ok(())
            }
            Mode::People | Mode::Quiet => Ok(()),
        }
    }
}

/// Least time between two progress events in JSON.
pub(super) const JSON_INTERVAL: Duration = Duration::from_millis(200);

/// Shows events on the console and listens for signals: the first interrupt asks the run to
/// stop, the second ends the process at once.
pub struct Console {
    mode: Mode,
    bar: ProgressBar,
    phase: Option<Phase>,
    interrupted: Arc<AtomicBool>,
    last_json: Option<Instant>,
    preview: Option<Preview>,
}

impl Console {
    /// Installs the signal handlers.
    pub fn new(mode: Mode) -> Result<Console> {
        let interrupted = watch_signals()?;
        let shown = mode == Mode::People && stderr().is_terminal();
        let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template(
            "{prefix:>9} {bar:30} {percent:>3} %  {elapsed} elapsed, {eta} left  {msg}",
        );
        // The template is a constant; should it be wrong, indicatif's own bar will do.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Console { mode, bar, phase: None, interrupted, last_json: None, preview: None })
    }

    /// Shows previews of runs from now on.
    pub fn show_previews(&mut self, preview: Option<Preview>) {
        self.preview = preview;
    }

    /// Says something to people, above the bar.
    pub fn tell(&mut self, line: &str) {
        if self.mode == Mode::People {
            self.bar.suspend(|| super::say(line));
            self.preview.iter_mut().for_each(Preview::leave);
        }
    }

    /// Says something that must be heard.
    pub fn warn(&mut self, message: &str) {
        self.event(&Event::Warning { message: message.into() });
    }

    /// Writes an event as a line of JSON, where that is wanted.
    pub fn json(&self, value: &impl serde::Serialize) -> Result<()> {
        self.mode.json(value)
    }

    /// Says what is about to run.
    pub fn start(&mut self, request: &Request, output: &Path, device: &str) -> Result<()> {
        self.tell(&format!("seed {}", request.seed));
        self.tell(&format!("running on {device}"));
        self.json(&json!({
            "event": "start", "seed": request.seed, "width": request.width,
            "height": request.height, "units": request.units, "output": output.display().to_string(),
            "device": device,
        }))
    }

    /// Says what was written and how long it took; `first_run` is when the GPU got its first
    /// work, if there is one.
    pub fn done(
        &mut self,
        output: &Path,
        spec: &VideoSpec,
        timings: &Timings,
        first_run: Option<Instant>,
    ) -> Result<()> {
        self.bar.finish_and_clear();
        self.phase = None;
        let Timings { loading, text, image, sampling, decoding } = timings;
        let total = loading + text + image + sampling + decoding;
        self.tell(&format!(
            "wrote {}: {} frames of {}x{} in {total:.1} s (loading {loading:.1}, text \
             {text:.1}, image {image:.1}, sampling {sampling:.1}, decoding {decoding:.1})",
            output.display(),
            spec.frames,
            spec.width,
            spec.height,
        ));
        self.json(&json!({
            "event": "done", "output": output.display().to_string(), "frames": spec.frames,
            "seconds": timings, "start_to_first_kernel": first_run.map(super::since_start),
        }))
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
        if self.json(event).is_err() {
            // The reader is gone: nobody waits for the video either.
            self.interrupted.store(true, Ordering::Relaxed);
        }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Warning { message } => {
                self.bar.suspend(|| super::say(&format!("warning: {message}")));
                self.preview.iter_mut().for_each(Preview::leave);
            }
            Event::Progress { phase, done, total, detail } => {
                if self.phase != Some(*phase) {
                    self.phase = Some(*phase);
                    self.bar.reset();
                    self.bar.set_prefix(phase.to_string());
                }
                self.bar.set_length(*total);
                self.bar.set_position(*done);
                self.bar.set_message(detail.clone());
            }
            Event::Finished { .. } => self.bar.set_message(""),
        }
    }
}

impl Reporter for Console {
    fn event(&mut self, event: &Event) {
        match self.mode {
            Mode::Json | Mode::Log => self.json_event(event),
            Mode::People | Mode::Quiet => self.show(event),
        }
    }

    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn wants_stages(&self) -> bool {
        self.preview.as_ref().is_some_and(Preview::shows_stages)
    }

    fn stage_finished(&mut self, unit: usize, stage: usize, latent: &Latent) {
        let Some(preview) = &mut self.preview else { return };
        let shown = self.bar.suspend(|| preview.stage_finished(unit, stage, latent));
        self.end_preview_after(shown);
    }

    fn unit_decoded(&mut self, unit: usize, latent: &Latent, frames: &[Frame]) {
        let Some(preview) = &mut self.preview else { return };
        let shown = self.bar.suspend(|| preview.unit_decoded(unit, latent, frames));
        self.end_preview_after(shown);
    }
}

impl Console {
    /// A preview that cannot be shown is no reason to end the run.
    fn end_preview_after(&mut self, shown: Result<()>) {
        if let Err(error) = shown {
            self.preview = None;
            self.warn(&format!("no more previews: {error}"));
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // An error message follows; the bar must not be left on its line.
        self.bar.finish_and_clear();
    }
}

fn json_line(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map(|line| format!("{line}\n"))
        .map_err(|e| Error::new(ErrorKind::Io, "cannot write an event").because(e))
}

/// A flag that the first interrupt sets; the second ends the process.
pub(super) fn watch_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let code = i32::from(ErrorKind::Interrupted.exit_code());
    for signal in [SIGINT, SIGTERM] {
        // In this order: the second signal finds the flag set and exits.
        let armed = Arc::clone(&interrupted);
        signal_hook::flag::register_conditional_shutdown(signal, code, armed)
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|e| Error::new(ErrorKind::Io, "cannot listen for signals").because(e))?;
    }
    Ok(interrupted)
}
