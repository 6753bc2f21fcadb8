//! `pyraflow inspect`.

use std::path::PathBuf;

use pyraflow::checkpoint::{ComponentSummary, Summary};
use pyraflow::media::{MediaInfo, inspect};
use pyraflow::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::model::{is_name, locate};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A model that was pulled, a checkpoint folder, or a video or image made by pyraflow
    #[arg(required_unless_present = "model", conflicts_with = "model", value_name = "NAME|PATH")]
    path: Option<PathBuf>,

    /// A model that was pulled, or a checkpoint folder
    #[arg(long, value_name = "NAME|DIR")]
    model: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows what `path` is.
pub fn run(args: &Args) -> Result<()> {
    let path = match (&args.model, &args.path) {
        (Some(model), _) => locate(model)?.dir,
        (None, Some(path)) if !path.exists() && is_name(path) => locate(path)?.dir,
        (None, path) => path.clone().unwrap_or_default(),
    };
    let metadata = std::fs::metadata(&path)
        .map_err(|e| Error::io("cannot open", &path, e).of_kind(ErrorKind::Input))?;
    if metadata.is_dir() {
        let summary = Summary::read(&path);
        if summary.family.is_none() && summary.components.is_empty() {
            return Err(Error::model(format!("{} holds no checkpoint", path.display()))
                .hint("name the folder that holds diffusion_transformer_768p or the like"));
        }
        let text = if args.json { format!("{:#}\n", json!(summary)) } else { checkpoint(&summary) };
        return super::print(&text);
    }
    let info = inspect(&path)?;
    let settings = info.comment.as_deref().map(|comment| {
        serde_json::from_str(comment).unwrap_or_else(|_| Value::String(comment.to_string()))
    });
    super::print(&if args.json {
        let info = json!({
            "format": info.format.name(), "width": info.width, "height": info.height,
            "frames": info.frames, "frame_rate": info.frame_rate(), "settings": settings,
        });
        format!("{info:#}\n")
    } else {
        media(&info, settings.as_ref())
    })
}

fn media(info: &MediaInfo, settings: Option<&Value>) -> String {
    let MediaInfo { width, height, frames, .. } = info;
    let mut text = format!("{} {width}x{height}, {frames} frames", info.format.name());
    if let Some(rate) = info.frame_rate() {
        text += &format!(" at {rate:.2} per second");
    }
    text.push('\n');
    match settings {
        None => text += "holds no settings\n",
        Some(Value::Object(fields)) => {
            for (name, value) in fields {
                let value = value.as_str().map_or_else(|| value.to_string(), String::from);
                text += &format!("{name:>16}  {value}\n");
            }
        }
        Some(other) => text += &format!("{other}\n"),
    }
    text
}

fn checkpoint(summary: &Summary) -> String {
    let family = summary.family.map_or("unknown".to_string(), |f| f.to_string());
    let variants: Vec<&str> = summary.variants.iter().map(|v| v.name()).collect();
    let mut text = format!("{family} checkpoint with {}\n", variants.join(", "));
    for component in &summary.components {
        text += &line(component);
    }
    for missing in &summary.missing {
        text += &format!("missing: {missing}\n");
    }
    text
}

fn line(component: &ComponentSummary) -> String {
    let types: Vec<String> =
        component.dtypes.iter().map(|(dtype, tensors)| format!("{tensors} {dtype}")).collect();
    let mut text = format!(
        "{:<30}{:>6} tensors{:>16} parameters{:>16} bytes  {}\n",
        component.folder,
        component.tensors,
        component.parameters,
        component.bytes,
        types.join(", ")
    );
    if let Some(problem) = &component.problem {
        text += &format!("  problem: {problem}\n");
    }
    text
}
