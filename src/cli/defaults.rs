//! What options are when nobody types them: environment variables, then the file of settings.
//!
//! Every long option `--some-name` may be given as `PYRAFLOW_SOME_NAME`, or in a TOML file: on
//! its own for all commands that have it, or in the table of one command. What is typed wins,
//! then the environment, then the file. Of options that exclude each other, such as `--seconds`
//! and `--frames`, what is typed silences the others.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::{Arg, ArgAction, Command};
use pyraflow::{Error, ErrorKind, Result};
use toml::{Table, Value};

/// Options of which only one counts.
const EXCLUSIVE: [&[&str]; 5] = [
    &["seconds", "frames", "units"],
    &["suffix", "no-suffix"],
    &["fast", "best"],
    &["json", "log", "quiet"],
    &["image", "latents"],
];

/// Options, by command, that are of another kind than where most commands have them: `--json`
/// of `bench` names a file, and `inspect` shows a model in place of what it is given. A default
/// for all commands is not theirs; one in the command's own table is.
const OWN: [(&str, &str); 2] = [("bench", "json"), ("inspect", "model")];

/// Options that must be typed: what they do depends on what else is.
const TYPED: [&str; 5] = ["prompts", "config", "help", "version", "resume"];

/// Options that say nothing without another one, by command: where that is missing, so is a
/// default that is meant for other commands, too.
const BESIDE: [(&str, &str, &str); 1] = [("plan", "max-host", "max-vram")];

/// The environment variable of a long option.
pub fn variable(name: &str) -> String {
    format!("PYRAFLOW_{}", name.replace('-', "_").to_uppercase())
}

/// Gives the options of all subcommands the defaults of the environment and of the file.
///
/// # Errors
/// [`ErrorKind::Usage`] when the file cannot be read or names what there is not.
pub fn apply(mut command: Command, args: &[OsString]) -> Result<Command> {
    let file = File::open(args)?;
    file.check(&command)?;
    let names: Vec<String> =
        command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
    for name in names {
        command = command.mut_subcommand(&name, |sub| {
            let ids: Vec<String> = sub.get_arguments().filter_map(settable).collect();
            let defaults = file.of(&name);
            ids.iter().fold(sub, |sub, long| with_default(sub, long, &defaults, args))
        });
    }
    Ok(command)
}

/// The long name of an option that may have a default from elsewhere.
fn settable(arg: &Arg) -> Option<String> {
    arg.get_long().filter(|long| !TYPED.contains(long)).map(String::from)
}

fn with_default(
    command: Command,
    long: &str,
    file: &BTreeMap<String, String>,
    args: &[OsString],
) -> Command {
    let rivals: Vec<&str> = EXCLUSIVE
        .iter()
        .filter(|group| group.contains(&long))
        .flat_map(|group| group.iter().copied().filter(|&other| other != long))
        .collect();
    let short =
        |other: &str| command.get_arguments().find(|a| a.get_long() == Some(other))?.get_short();
    if rivals.iter().any(|other| is_typed(args, other, short(other))) {
        // clap would take two for a contradiction.
        return with_arg(command, long, |arg| arg.env(None::<&'static str>));
    }
    let in_environment = |name: &str| std::env::var_os(variable(name)).is_some();
    let alone = BESIDE.iter().any(|&(name, option, other)| {
        let given = is_typed(args, other, short(other)) || in_environment(other);
        (name, option) == (command.get_name(), long) && !given && !file.contains_key(other)
    });
    if alone {
        return command;
    }
    let value = file.get(long).filter(|_| !rivals.iter().any(|other| in_environment(other)));
    let own = OWN.contains(&(command.get_name(), long));
    with_arg(command, long, |arg| {
        let flag = matches!(arg.get_action(), ArgAction::SetTrue);
        let arg = if own { arg } else { arg.env(variable(long)).hide_env(true) };
        let arg = if flag { arg.value_parser(BoolishValueParser::new()) } else { arg };
        match value {
            Some(value) => {
                arg.default_value(value.clone()).required(false).hide_default_value(true)
            }
            None => arg,
        }
    })
}

fn with_arg(command: Command, long: &str, change: impl FnOnce(Arg) -> Arg) -> Command {
    let id = command.get_arguments().find(|arg| arg.get_long() == Some(long));
    match id.map(|arg| arg.get_id().clone()) {
        Some(id) => command.mut_arg(id, change),
        None => command,
    }
}

/// Whether an option stands on the command line, with or without a value.
fn is_typed(args: &[OsString], long: &str, short: Option<char>) -> bool {
    let options = args.iter().skip(1).take_while(|arg| *arg != "--");
    options.filter_map(|arg| arg.to_str()).any(|arg| match arg.strip_prefix("--") {
        Some(name) => name.split('=').next() == Some(long),
        None => arg.strip_prefix('-').zip(short).is_some_and(|(all, short)| all.contains(short)),
    })
}

/// The file of settings.
struct File {
    path: PathBuf,
    table: Table,
}

impl File {
    /// The file that `--config` or PYRAFLOW_CONFIG names, else `pyraflow/config.toml` in the
    /// user's folder for configuration, if there is one.
    fn open(args: &[OsString]) -> Result<File> {
        let (path, named) = match named(args).or_else(|| std::env::var_os(variable("config"))) {
            Some(path) => (PathBuf::from(path), true),
            None => match users_file() {
                Some(path) => (path, false),
                None => return Ok(File { path: PathBuf::new(), table: Table::new() }),
            },
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if !named && e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => {
                return Err(Error::io("cannot read", &path, e)
                    .of_kind(ErrorKind::Usage)
                    .hint("name another file with --config"));
            }
        };
        let table = text.parse::<Table>().map_err(|e| {
            Error::usage(format!("{} is not TOML", path.display())).because(e.to_string())
        })?;
        Ok(File { path, table })
    }

    /// Whether every setting is an option of some command, with a value that can be one.
    fn check(&self, command: &Command) -> Result<()> {
        for (key, value) in &self.table {
            let sub = command.get_subcommands().find(|sub| sub.get_name() == key);
            let settings: Vec<(&String, &Value)> = match (sub, value) {
                (Some(_), Value::Table(table)) => table.iter().collect(),
                _ => vec![(key, value)],
            };
            for (name, value) in settings {
                let within = |sub: &Command| {
                    sub.get_arguments().filter_map(settable).any(|long| long == *name)
                };
                let known = match sub {
                    Some(sub) => within(sub),
                    None => command.get_subcommands().any(within),
                };
                if !known {
                    let whose =
                        sub.map_or("no command".into(), |s| format!("not {}", s.get_name()));
                    return Err(self.wrong(name, &format!("{whose} has such an option")));
                }
                if typed(value).is_none() {
                    return Err(self.wrong(name, "a text, number, yes or no, or list is wanted"));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, name: &str, reason: &str) -> Error {
        Error::usage(format!("{}: {name}: {reason}", self.path.display()))
            .hint("options are written without dashes in front, as in: seed = 7")
    }

    /// The settings for a command, as they would be typed.
    fn of(&self, command: &str) -> BTreeMap<String, String> {
        let own = match self.table.get(command) {
            Some(Value::Table(table)) => table.clone(),
            _ => Table::new(),
        };
        let shared = self.table.iter().filter(|(name, _)| !OWN.contains(&(command, name)));
        let all = shared.chain(&own);
        all.filter_map(|(name, value)| Some((name.clone(), typed(value)?))).collect()
    }
}

/// A value as it would be typed; lists are joined by commas.
fn typed(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(yes) => Some(yes.to_string()),
        Value::Array(values) => {
            Some(values.iter().map(typed).collect::<Option<Vec<_>>>()?.join(","))
        }
        Value::Datetime(_) | Value::Table(_) => None,
    }
}

/// What `--config` names.
fn named(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().cloned();
        }
        if let Some(path) = arg.to_str().and_then(|a| a.strip_prefix("--config=")) {
            return Some(OsStr::new(path).into());
        }
    }
    None
}

fn users_file() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let folder = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(folder.join(Path::new("pyraflow/config.toml")))
}
