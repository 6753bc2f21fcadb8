//! One file per subcommand: arguments as typed → validated request → run.

mod args;
mod bench;
mod device;
mod doctor;
mod generate;
mod inspect;
mod list;
mod model;
mod plan;
mod progress;
mod pull;
mod rm;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pyraflow::{Error, ErrorKind, Result};

/// Pyramid Flow video generation: text, or an image and text, to video.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate a video from a prompt, or from an image and a prompt.
    Generate(Box<generate::Args>),
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
}

/// Runs the command line and returns the process's exit code.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(*args),
        Command::Pull(args) => pull::run(&args),
        Command::List(args) => list::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Rm(args) => rm::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}"));
            if let Some(hint) = error.hint_text() {
                say(&format!("  hint: {hint}"));
            }
            ExitCode::from(error.kind().exit_code())
        }
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
