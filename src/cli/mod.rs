//! One file per subcommand: arguments as typed → validated request → run.

mod args;
mod batch;
mod bench;
mod defaults;
mod device;
mod doctor;
mod extend;
mod generate;
mod inspect;
mod list;
mod model;
mod plan;
mod preview;
mod progress;
mod pull;
#[cfg(test)]
mod reference;
mod rm;
mod session;
mod shell;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use pyraflow::{Error, ErrorKind, Result};

/// Pyramid Flow video generation: text, or an image and text, to video.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "Options may also be set in the environment (PYRAFLOW_SEED for --seed) and in a \
                  file: pyraflow/config.toml in the folder for configuration, see --config."
)]
struct Cli {
    /// TOML file with options: `seed = 7` for all commands, or below `[generate]` for one
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate a video from a prompt, or from an image and a prompt.
    Generate(Box<generate::Args>),
    /// Make a video longer, or complete, from the latents that were saved of it.
    Extend(Box<extend::ExtendArgs>),
    /// Decode saved latents to a video.
    Decode(Box<extend::DecodeArgs>),
    /// Download a model by name, or go on with an interrupted download.
    Pull(pull::Args),
    /// Show which models can be pulled and which are there.
    List(list::Args),
    /// Read a model again and compare it with its hashes.
    Verify(verify::Args),
    /// Remove a model that was pulled.
    Rm(rm::Args),
    /// Show what a run takes in memory and arithmetic, without reading any weights.
    Plan(Box<plan::Args>),
    /// Measure a run of a published size with random weights, phase by phase and op by op.
    Bench(Box<bench::Args>),
    /// Show what a model, a checkpoint folder, a video or an image is and how it was made.
    Inspect(inspect::Args),
    /// Show what this program and this machine can run on, and what is in the way.
    Doctor(doctor::Args),
    /// Print the completions of a shell.
    Completions(shell::CompletionsArgs),
    /// Write manual pages to a folder.
    Man(shell::ManArgs),
}

/// Runs the command line and returns the process's exit code.
pub fn run() -> ExitCode {
    START.get_or_init(Instant::now);
    let args: Vec<OsString> = std::env::args_os().collect();
    match parse(&args).and_then(|cli| dispatch(&cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// When the program began.
static START: OnceLock<Instant> = OnceLock::new();

/// Seconds from the start of the program to `then`.
fn since_start(then: Instant) -> f64 {
    START.get().map_or(0.0, |start| then.saturating_duration_since(*start).as_secs_f64())
}

/// Reads the command line; what clap finds wrong ends the process.
fn parse(args: &[OsString]) -> Result<Cli> {
    let matches = defaults::apply(Cli::command(), args)?.get_matches_from(args);
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()))
}

fn dispatch(command: &Command) -> Result<()> {
    match command {
        Command::Generate(args) => generate::run(args),
        Command::Extend(args) => extend::extend(args),
        Command::Decode(args) => extend::decode(args),
        Command::Pull(args) => pull::run(args),
        Command::List(args) => list::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Rm(args) => rm::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => shell::completions(args),
        Command::Man(args) => shell::man(args),
    }
}

/// Whether an error is written as JSON.
static JSON_ERRORS: AtomicBool = AtomicBool::new(false);

/// From here on, an error that ends the program is written as a line of JSON.
fn report_errors_as_json() {
    JSON_ERRORS.store(true, Ordering::Relaxed);
}

fn report(error: &Error) {
    if JSON_ERRORS.load(Ordering::Relaxed) {
        let line = serde_json::json!({
            "event": "error", "kind": format!("{:?}", error.kind()).to_lowercase(),
            "message": error.to_string(), "hint": error.hint_text(),
            "exit_code": error.kind().exit_code(),
        });
        return say(&line.to_string());
    }
    say(&format!("error: {error}"));
    if let Some(hint) = error.hint_text() {
        say(&format!("  hint: {hint}"));
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        1e9.. => format!("{:.1} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        1e3.. => format!("{:.1} kB", bytes / 1e3),
        _ => format!("{bytes} B"),
    }
}

/// Writes a line for people to standard error. Where nobody can read it there is nobody to
/// tell: unlike `eprintln!` this does not panic.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Writes to standard output; a reader that went away is no reason to panic.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| Error::new(ErrorKind::Io, "cannot write to standard output").because(e))
}
