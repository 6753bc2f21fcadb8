//! `pyraflow completions` and `pyraflow man`: what shells and manuals want to know of the parser.

use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use pyraflow::{Error, Result};

use super::{Cli, say};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// The folder, which is made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Prints a shell's script.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pyraflow", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}

/// Writes a page for the program and one for each command.
pub fn man(args: &ManArgs) -> Result<()> {
    let folder = &args.folder;
    std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))?;
    let mut command = Cli::command().disable_help_subcommand(true);
    // Names of commands then begin with the program's, as their pages do.
    command.build();
    write(&command, folder.join("pyraflow.1"))?;
    for sub in command.get_subcommands() {
        write(sub, folder.join(format!("pyraflow-{}.1", sub.get_name())))?;
    }
    say(&format!("wrote {} pages to {}", 1 + command.get_subcommands().count(), folder.display()));
    Ok(())
}

fn write(command: &Command, path: PathBuf) -> Result<()> {
    let name = match command.get_bin_name() {
        Some(name) => name.replace(' ', "-"),
        None => command.get_name().to_string(),
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name).version(env!("CARGO_PKG_VERSION")))
        .render(&mut page)
        .and_then(|()| std::fs::write(&path, page))
        .map_err(|e| Error::io("cannot write", &path, e))
}
