//! Says what clips show, and scores them against their labels.
//!
//!     judge CLIP ...                           one JSON line for each clip
//!     judge --labels LABELS.jsonl [--shuffle]  the same, and a last line with the scores
//!
//! A clip is a `.y4m` or `.npy` file or a folder of `.png` images. A line of labels is
//! `{"file", "shape", "colour", "motion"}`, the file's path relative to the labels; an
//! `"image"` with it is an image that the first frame is compared with.
//! `--shuffle` scores against other clips' labels: what a blind guess would get.
//! `--quiet` leaves out the lines for the clips.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use pyraflow::{Error, Result};
use serde_json::{Map, Value, json};

#[path = "../tests/judge/mod.rs"]
mod judge;

use judge::{Colour, Frame, Motion, Shape, Verdict, clip};

const USAGE: &str = "usage: judge [--quiet] CLIP... | judge [--quiet] [--shuffle] --labels FILE";
const ATTRIBUTES: [&str; 3] = ["colour", "shape", "motion"];

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("judge: {error}");
            if let Some(hint) = error.hint_text() {
                eprintln!("{hint}");
            }
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let (mut labels, mut shuffle, mut quiet, mut clips) = (None, false, false, Vec::new());
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--labels" => labels = arguments.next(),
            "--shuffle" => shuffle = true,
            "--quiet" => quiet = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other if other.starts_with('-') => {
                return Err(Error::usage(format!("unknown option {other}")).hint(USAGE));
            }
            _ => clips.push(argument),
        }
    }
    match labels {
        Some(labels) if clips.is_empty() => score(Path::new(&labels), shuffle, quiet),
        None if !clips.is_empty() && !shuffle => {
            for path in clips {
                let frames = clip::read(Path::new(&path))?;
                if !quiet {
                    println!("{}", line(&path, &judge::judge(&frames)));
                }
            }
            Ok(())
        }
        _ => Err(Error::usage("give either clips or labels").hint(USAGE)),
    }
}

/// Judges every clip of `labels` and prints how many are as labelled.
fn score(labels: &Path, shuffle: bool, quiet: bool) -> Result<()> {
    let text = std::fs::read_to_string(labels).map_err(|e| Error::io("cannot read", labels, e))?;
    let wanted = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(n, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::input(format!("{} line {}", labels.display(), n + 1)).because(e)
            })
        })
        .collect::<Result<Vec<Value>>>()?;
    let folder = labels.parent().unwrap_or(Path::new(""));
    let mut lines = Vec::with_capacity(wanted.len());
    for label in &wanted {
        let file = label["file"].as_str().ok_or_else(|| Error::input("a label has no file"))?;
        let frames = clip::read(&folder.join(file))?;
        let mut line = line(file, &judge::judge(&frames));
        if let Some(image) = label["image"].as_str() {
            line["first_frame_psnr"] = json!(psnr(&frames[0], &folder.join(image))?);
        }
        if !quiet {
            println!("{line}");
        }
        lines.push(line);
    }
    // Another clip's label, half the list away, stands in for a random one.
    let other = if shuffle { wanted.len() / 2 } else { 0 };
    let pairs: Vec<_> = lines
        .iter()
        .enumerate()
        .map(|(i, line)| (&wanted[(i + other) % wanted.len()], line))
        .collect();
    println!("{}", summary(&pairs));
    Ok(())
}

/// PSNR in dB of a frame and an image file; 99 for equal ones.
fn psnr(frame: &Frame, path: &Path) -> Result<f64> {
    clip::psnr(frame, &clip::image(path)?)
        .map(|psnr| psnr.min(99.0))
        .ok_or_else(|| Error::input(format!("{} has another size than the clip", path.display())))
}

/// A verdict and what it was read from.
fn line(file: &str, verdict: &Verdict) -> Value {
    let mut line = json!({
        "file": file,
        "colour": verdict.colour.map(Colour::name),
        "shape": verdict.shape.map(Shape::name),
        "motion": verdict.motion.map(Motion::name),
    });
    if let Some(m) = &verdict.measures {
        let round = |x: f32| (f64::from(x) * 1000.0).round() / 1000.0;
        let misfits: Map<String, Value> = Shape::ALL
            .iter()
            .zip(m.misfits)
            .map(|(shape, misfit)| (shape.name().to_string(), json!(round(misfit))))
            .collect();
        line["measures"] = json!({
            "seen": round(m.seen),
            "contrast": round(m.contrast),
            "rgb": m.rgb.map(f32::round),
            "colour_agreement": round(m.colour_agreement),
            "misfit": misfits,
            "right": round(m.travel.right),
            "down": round(m.travel.down),
            "growth": round(m.travel.growth),
            "turn": round(m.travel.turn),
            "bounce": round(m.travel.bounce),
        });
    }
    line
}

/// The share of right answers for each attribute and for all three together, and how often
/// each wanted word was read as each other ("none" where nothing clear was seen).
fn summary(pairs: &[(&Value, &Value)]) -> Value {
    let share = |right: usize| right as f64 / pairs.len().max(1) as f64;
    let agree = |a: &str, (wanted, seen): &(&Value, &Value)| wanted[a] == seen[a];
    let mut summary = json!({ "clips": pairs.len() });
    for attribute in ATTRIBUTES {
        summary[attribute] = json!(share(pairs.iter().filter(|p| agree(attribute, p)).count()));
    }
    let all = pairs.iter().filter(|p| ATTRIBUTES.iter().all(|a| agree(a, p))).count();
    summary["all"] = json!(share(all));
    for attribute in ATTRIBUTES {
        let mut counts: BTreeMap<&str, BTreeMap<&str, u32>> = BTreeMap::new();
        for (wanted, seen) in pairs {
            let [wanted, seen] = [wanted, seen].map(|v| v[attribute].as_str().unwrap_or("none"));
            *counts.entry(wanted).or_default().entry(seen).or_default() += 1;
        }
        summary["confusion"][attribute] = json!(counts);
    }
    summary
}
