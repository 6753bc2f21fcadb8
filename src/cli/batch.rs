//! `pyraflow generate --prompts`.

use std::cell::RefCell;
use std::io::Read;
use std::path::{Path, PathBuf};

use pyraflow::batch::{
    Entry, Form, Job, Maker, Naming, Options, Records, Shard, Told, jobs, read_lines,
};
use pyraflow::checkpoint::Checkpoint;
use pyraflow::media::Format;
use pyraflow::pipeline::{Output, Pipeline, Request, Timings};
use pyraflow::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::generate::{Args, format};
use super::progress::Console;
use super::session::{LookArgs, model_of};

/// Largest file of prompts.
const MAX_BYTES: u64 = 1 << 30;

/// Many videos from one file.
#[derive(Debug, clap::Args)]
pub struct BatchArgs {
    /// Make a video of every line of a file: prompts, or JSON objects with settings of their own;
    /// - reads standard input. Run again, it goes on where it was stopped
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(super) prompts: Option<PathBuf>,

    /// Do the other lines of --prompts when one is bad or fails
    #[arg(long)]
    keep_going: bool,

    /// Do only this part of --prompts, I from 0 to N-1, while other machines do the others
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,

    /// Format of the videos of --prompts: mp4, png, gif or y4m [default: mp4]
    #[arg(long, value_name = "NAME", value_parser = format)]
    format: Option<Format>,
}

impl BatchArgs {
    /// Refuses what says nothing without --prompts.
    pub(super) fn check_single(&self) -> Result<()> {
        for (name, given) in [
            ("--keep-going", self.keep_going),
            ("--shard", self.shard.is_some()),
            ("--format", self.format.is_some()),
        ] {
            if given {
                return Err(Error::usage(format!("{name} is for many videos"))
                    .hint("name a file of prompts: --prompts FILE"));
            }
        }
        Ok(())
    }
}

/// Generates the videos of all lines.
pub fn run(args: &Args, prompts: &Path) -> Result<()> {
    args.run.prepare(None)?;
    args.look.place()?;
    let folder = args.output.clone().unwrap_or_else(|| "videos".into());
    let data = read(prompts)?;
    let lines = read_lines(&data, Form::of(prompts, &data));
    if lines.is_empty() {
        return Err(Error::input(format!("there are no prompts in {}", prompts.display())));
    }
    let model = model_of(args.model.as_deref())?;
    let variant = model.choose(args.variant.as_deref(), args.video.variant_of_size())?;
    let checkpoint = Checkpoint::open(&model.dir, variant.as_deref())?;
    let entries = entries(args, &checkpoint, prompts, &lines);
    let options = Options {
        shard: args.batch.shard.unwrap_or(Shard::WHOLE),
        keep_going: args.batch.keep_going,
        overwrite: args.overwrite,
        keep_units: args.keep_units,
    };
    let mut console = args.run.console()?;
    if !options.keep_going {
        refuse_bad_lines(&entries, &mut console)?;
    }
    let mut records = Records::open(&folder, &options.shard.records_name())?;
    let backend = args.run.backend()?;
    console.tell(&format!("running on {}", backend.description()));
    let pipeline = Pipeline::open(checkpoint, backend, &args.run.store(), &mut console)?;
    let console = RefCell::new(console);
    let mut maker = PipelineMaker { pipeline: &pipeline, look: &args.look, console: &console };
    let mut tell = |told: Told| tell(&mut console.borrow_mut(), &folder, told);
    let (summary, result) =
        pyraflow::batch::run(&entries, &folder, &mut records, options, &mut maker, &mut tell);
    let mut console = console.into_inner();
    console.tell(&format!("{summary}; see {}", records.path().display()));
    console.json(&json!({
        "event": "summary", "lines": summary, "results": records.path().display().to_string(),
    }))?;
    result.map_err(|e| match e.kind() {
        ErrorKind::Interrupted => e.hint("the same command goes on from here"),
        _ => e,
    })
}

fn read(prompts: &Path) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    let read = if prompts == Path::new("-") {
        std::io::stdin().lock().take(MAX_BYTES + 1).read_to_end(&mut data)
    } else {
        std::fs::File::open(prompts).and_then(|f| f.take(MAX_BYTES + 1).read_to_end(&mut data))
    };
    match read {
        Err(e) => Err(Error::io("cannot read", prompts, e).of_kind(ErrorKind::Input)),
        Ok(length) if length as u64 > MAX_BYTES => {
            Err(Error::input(format!("{} is larger than 1 GiB", prompts.display())))
        }
        Ok(_) => Ok(data),
    }
}

/// The jobs of all lines, everything checked that can be without weights.
fn entries(
    args: &Args,
    checkpoint: &Checkpoint,
    prompts: &Path,
    lines: &[pyraflow::batch::Line],
) -> Vec<Entry> {
    // The folder's own name: a file of prompts may be spread over machines that have the
    // checkpoint in other places.
    let name = checkpoint.dir().file_name().unwrap_or_default().to_string_lossy();
    let model = json!([name, checkpoint.family(), checkpoint.variant()]);
    let naming = Naming { format: args.batch.format.unwrap_or(Format::Mp4), model };
    let beside = prompts.parent().unwrap_or(Path::new(""));
    jobs(lines, &naming, |line| {
        let video = args.video.with_line(line, beside)?;
        let prompt = video.prompt()?;
        video.check_prompt(&prompt)?;
        let mut request = Request::new(checkpoint, &prompt, video.first_image());
        video.apply(&mut request, checkpoint.variant())?;
        request.check_positions(checkpoint.transformer())?;
        Ok((request, line.seed.or(args.seed)))
    })
}

fn refuse_bad_lines(entries: &[Entry], console: &mut Console) -> Result<()> {
    let bad: Vec<(usize, &Error)> = entries
        .iter()
        .filter_map(|e| match e {
            Entry::Bad { line, error, .. } => Some((*line, error)),
            _ => None,
        })
        .collect();
    let Some((line, first)) = bad.first() else { return Ok(()) };
    for (line, error) in &bad[1..] {
        console.warn(&format!("line {line}: {error}"));
    }
    let error = Error::new(first.kind(), first.to_string()).at(format!("line {line}"));
    Err(error.hint(match bad.len() {
        1 => "correct the line, or do without it: --keep-going".to_string(),
        n => format!("correct the {n} bad lines, or do without them: --keep-going"),
    }))
}

fn tell(console: &mut Console, folder: &Path, told: Told) -> Result<()> {
    match told {
        Told::Bad { line, error } => console.warn(&format!("line {line}: {error}")),
        Told::Duplicate { line, of } => {
            console.tell(&format!("line {line} is the same as line {of}"));
        }
        Told::Begins { job, number, of } => {
            let Job { line, request, output, .. } = job;
            let (seed, prompt) = (request.seed, &request.prompt);
            let shown: String = prompt.chars().take(60).filter(|c| !c.is_control()).collect();
            console.tell(&format!("{number} of {of}: line {line}, seed {seed}: {shown}"));
            console.json(&json!({
                "event": "job", "line": line, "number": number, "of": of, "seed": seed,
                "output": folder.join(output).display().to_string(),
            }))?;
        }
        Told::Done { job, timings } => {
            let (_, spec) = job.request.resolve()?;
            console.done(&folder.join(&job.output), &spec, timings, None)?;
        }
        Told::Failed { job, error } => {
            let hint = error.hint_text().map(|h| format!(" ({h})")).unwrap_or_default();
            console.warn(&format!("line {} failed: {error}{hint}", job.line));
        }
    }
    Ok(())
}

/// Makes jobs with one pipeline.
struct PipelineMaker<'a> {
    pipeline: &'a Pipeline,
    look: &'a LookArgs,
    console: &'a RefCell<Console>,
}

impl Maker for PipelineMaker<'_> {
    fn make(&mut self, job: &Job, output: &Output) -> Result<Timings> {
        let console = &mut *self.console.borrow_mut();
        let mut output = output.clone();
        let name = job.output.with_extension("");
        self.look.prepare(name.to_str(), self.pipeline, &mut output, console)?;
        let mut timings = self.pipeline.generate(&job.request, &output, console)?;
        // Weights were loaded once for all.
        timings.loading = 0.0;
        Ok(timings)
    }

    fn left(&self, job: &Job, units: &Path) -> bool {
        self.pipeline.has_units(&job.request, units)
    }

    fn settings(&self, job: &Job) -> Value {
        self.pipeline.settings(&job.request)
    }
}
