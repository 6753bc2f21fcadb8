//! `docs/commands.md`: every command as the parser has it.

use std::path::Path;

use clap::{Arg, ArgAction, Command, CommandFactory};

use super::Cli;

const HEAD: &str = "# Commands

<!-- Written from the parser by a test: PYRAFLOW_WRITE_DOCS=1 cargo test --release --bin pyraflow reference -->

What `--help` says of every command. How they are used: [README](../README.md#use) and [cookbook](cookbook.md). Exit codes and messages:
[errors](errors.md). Files: [formats](formats.md).

A long option `--some-name` may also be set as `PYRAFLOW_SOME_NAME`, or as `some-name` in a
[file of settings](cookbook.md#settings-that-stay); only `--prompts`, `--resume`, `bench --json` and `inspect --model` are not taken from the
environment. `--config FILE` names another file of settings, for every command. `pyraflow completions SHELL` and
`pyraflow man DIR` write the same for shells and as manual pages.
";

/// The whole document.
fn reference() -> String {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let commands: Vec<&Command> =
        root.get_subcommands().filter(|command| !command.is_hide_set()).collect();
    let mut text = format!("{HEAD}\n| command | |\n|---|---|\n");
    for command in &commands {
        let name = command.get_name();
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        text += &format!("| [`{name}`](#pyraflow-{name}) | {} |\n", cell(&about));
    }
    for command in commands {
        text += &section(command);
    }
    text
}

fn section(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let mut text =
        format!("\n## pyraflow {}\n\n{about}\n\n```text\n{usage}\n```\n", command.get_name());
    let shown = |arg: &&Arg| {
        !arg.is_hide_set() && !["help", "version", "config"].contains(&arg.get_id().as_str())
    };
    let arguments: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    if !arguments.is_empty() {
        text += "\n| | |\n|---|---|\n";
    }
    for arg in arguments {
        text += &format!("| {} | {} |\n", name_of(arg), meaning_of(arg));
    }
    if let Some(after) = command.get_after_help() {
        text += &format!("\n{after}\n");
    }
    text
}

/// `-o`, `--output FILE`.
fn name_of(arg: &Arg) -> String {
    let value = match (arg.get_action(), arg.get_value_names()) {
        (ArgAction::SetTrue | ArgAction::Count, _) | (_, None) => String::new(),
        (_, Some(names)) => names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(" "),
    };
    let Some(long) = arg.get_long() else {
        return format!("`{}`", cell(&value));
    };
    let short = arg.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let optional = arg.get_num_args().is_some_and(|n| n.min_values() == 0 && n.takes_values());
    let value = match (optional, value.is_empty()) {
        (_, true) => String::new(),
        (true, false) => format!("[={value}]"),
        (false, false) => format!(" {value}"),
    };
    format!("{short}`--{long}{}`", cell(&value))
}

/// The help, with the values there are and the default.
fn meaning_of(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let mut text = help.split_whitespace().collect::<Vec<_>>().join(" ");
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return cell(&text);
    }
    let values: Vec<String> = arg
        .get_possible_values()
        .iter()
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({help})", value.get_name()),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !values.is_empty() {
        text += &format!(": {}", values.join(", "));
    }
    let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if !default.is_empty() {
        text += &format!(" [default: {}]", default.join(","));
    }
    cell(&text)
}

/// Text that cannot end a cell of a table, nor begin a tag.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

#[test]
fn reference_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/commands.md");
    let wanted = reference();
    if std::env::var_os("PYRAFLOW_WRITE_DOCS").is_some() {
        std::fs::write(&path, &wanted).expect("a writable folder");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = found.lines().zip(wanted.lines()).find(|(found, wanted)| found != wanted);
    assert!(
        found == wanted,
        "docs/commands.md is not what the parser says, first at {differs:?}; write it with\n\
         PYRAFLOW_WRITE_DOCS=1 cargo test --release --bin pyraflow reference"
    );
}

#[test]
fn every_option_says_what_it_does() {
    for command in Cli::command().get_subcommands() {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for arg in command.get_arguments() {
            assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
        }
    }
}
