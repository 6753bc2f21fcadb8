//! `pyraflow verify`.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use indicatif::{ProgressBar, ProgressStyle};
use pyraflow::hub::{FileCheck, Hub, ModelName, Verdict, verify_folder};
use pyraflow::{Error, Result};
use serde_json::json;

use super::progress::watch_signals;

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A model that was pulled, or a checkpoint folder
    #[arg(value_name = "NAME|DIR")]
    model: PathBuf,

    /// Look for NaN and infinity in all weights, too
    #[arg(long)]
    values: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Checks a model.
pub fn run(args: &Args) -> Result<()> {
    let name = args.model.to_str().and_then(|text| text.parse::<ModelName>().ok());
    let name = match name {
        Some(ModelName::Repo(..)) if args.model.is_dir() => None,
        other => other,
    };
    let (folder, manifest) = match &name {
        None => (super::model::locate(&args.model)?.dir, None),
        Some(name) => {
            let hub = Hub::from_env()?;
            let manifest = match name {
                ModelName::Published(model) => Some(model.manifest()),
                ModelName::Repo(..) => None,
            };
            (hub.folder_of(name)?, manifest)
        }
    };
    let interrupted = watch_signals()?;
    let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let template = "{bar:30} {percent:>3} %  {bytes} of {total_bytes}, {eta} left";
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let checks = verify_folder(&folder, manifest.as_ref(), args.values, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if interrupted.load(Ordering::Relaxed) {
            return Err(Error::interrupted("stopped"));
        }
        Ok(())
    });
    bar.finish_and_clear();
    let checks = checks?;
    super::print(&if args.json {
        format!("{:#}\n", json!({ "folder": folder, "files": checks }))
    } else {
        checks.iter().map(line).collect()
    })?;
    let failed = checks.iter().filter(|check| check.failed()).count();
    if failed == 0 {
        return Ok(());
    }
    let again = match name {
        Some(name) => format!("pyraflow pull {name} fetches what is damaged or missing"),
        None => "fetch the files that are damaged or missing again".to_owned(),
    };
    Err(Error::model(format!(
        "{failed} of {} files in {} are not right",
        checks.len(),
        folder.display()
    ))
    .hint(again))
}

fn line(check: &FileCheck) -> String {
    let FileCheck { path, verdict } = check;
    match verdict {
        Verdict::Right { by } => format!("right     {path}  ({by})\n"),
        Verdict::Unknown { sha256 } => format!("unknown   {path}  ({sha256})\n"),
        Verdict::Damaged { reason } => format!("DAMAGED   {path}  ({reason})\n"),
        Verdict::Missing => format!("MISSING   {path}\n"),
    }
}
