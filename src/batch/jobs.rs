//! From lines to jobs: a seed, a key and a name for each.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use unicode_normalization::UnicodeNormalization;

use super::lines::{Line, LineSettings};
use crate::media::{Format, OutputTarget};
use crate::pipeline::Request;
use crate::{Error, ErrorKind, Result};

/// Seeds that are derived stay below this: short enough to be typed again.
const SEEDS: u64 = 1_000_000_000;
/// Most letters of a prompt in a name.
const WORDS: usize = 48;

/// One video to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The number of its line, from 1.
    pub line: usize,
    /// Tells it from every job with other settings: 16 hexadecimal digits.
    pub key: String,
    /// The settings.
    pub request: Request,
    /// Its output, below the folder of outputs.
    pub output: PathBuf,
    /// Whether the name was made from the key, so that nothing else has it.
    pub own_name: bool,
}

/// What became of a line.
#[derive(Debug)]
pub enum Entry {
    /// A job.
    Job(Box<Job>),
    /// A line that cannot be used.
    Bad {
        /// Its number, from 1.
        line: usize,
        /// Tells it from other lines.
        key: String,
        /// What is wrong.
        error: Error,
    },
    /// The same job as that of an earlier line.
    Duplicate {
        /// Its number, from 1.
        line: usize,
        /// The number of the first line with this job.
        of: usize,
    },
}

/// How jobs are named and told apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Naming {
    /// The format of outputs that a line does not name.
    pub format: Format,
    /// What the model is: jobs of different models have different keys.
    pub model: Value,
}

/// Makes jobs of lines; `prepare` makes the request of a line, with its seed, if the line or the
/// command says one. Other seeds are derived from the line's settings and from how many equal
/// lines there are before it.
pub fn jobs(
    lines: &[Line],
    naming: &Naming,
    mut prepare: impl FnMut(&LineSettings) -> Result<(Request, Option<u64>)>,
) -> Vec<Entry> {
    let mut maker =
        JobMaker { naming, files: HashMap::new(), equal: HashMap::new(), taken: HashMap::new() };
    let entry = |line: &Line| match maker.job(line, &mut prepare) {
        Ok(entry) => entry,
        Err(error) => {
            let number = maker.count(&format!("bad {}", line.text));
            let key = short_hash(&["bad", &line.text, &number.to_string()]);
            Entry::Bad { line: line.number, key, error }
        }
    };
    lines.iter().map(entry).collect()
}

struct JobMaker<'a> {
    naming: &'a Naming,
    /// Hashes of files that lines name.
    files: HashMap<PathBuf, String>,
    /// How often something was there.
    equal: HashMap<String, usize>,
    /// Lines and keys by output.
    taken: HashMap<PathBuf, (usize, String)>,
}

impl JobMaker<'_> {
    fn job(
        &mut self,
        line: &Line,
        prepare: &mut impl FnMut(&LineSettings) -> Result<(Request, Option<u64>)>,
    ) -> Result<Entry> {
        let settings = match &line.content {
            Ok(settings) => settings,
            Err(reason) => return Err(Error::input(reason.clone())),
        };
        let (mut request, seed) = prepare(settings)?;
        let mut described = self.describe(&request)?;
        request.seed = match seed {
            Some(seed) => seed,
            None => {
                described["seed"] = Value::Null;
                let text = described.to_string();
                let number = self.count(&text);
                derived_seed(&text, number)
            }
        };
        described["seed"] = json!(request.seed);
        let named = settings.output.as_deref().map(named_output).transpose()?;
        let extension = match &named {
            Some(path) => path.extension().unwrap_or_default().to_string_lossy().into_owned(),
            None => self.naming.format.name().to_string(),
        };
        let key = short_hash(&[&described.to_string(), &extension]);
        let own_name = named.is_none();
        let output = named.unwrap_or_else(|| made_name(&request, &key, &extension).into());
        match self.taken.get(&output) {
            Some((of, same)) if *same == key => {
                return Ok(Entry::Duplicate { line: line.number, of: *of });
            }
            Some((of, _)) => {
                let output = output.display();
                return Err(Error::input(format!("line {of} goes to {output} as well"))
                    .hint("name another output, or none"));
            }
            None => self.taken.insert(output.clone(), (line.number, key.clone())),
        };
        Ok(Entry::Job(Box::new(Job { line: line.number, key, request, output, own_name })))
    }

    /// Everything that decides what the video is.
    fn describe(&mut self, request: &Request) -> Result<Value> {
        let model = &self.naming.model;
        let mut described = json!({
            "model": model,
            "prompt": request.full_prompt(),
            "negative": request.negative,
            "size": [request.width, request.height],
            "units": request.units,
            "steps": [request.steps, request.video_steps],
            "guidance": [request.guidance, request.video_guidance],
        });
        if let Some(linear) = request.linear_guidance {
            described["linear"] = json!([linear.alpha, linear.min]);
        }
        if let Some(tiling) = request.tiling {
            described["tile"] = json!(tiling.tile);
        }
        if let Some(image) = &request.image {
            let hash = self.file(&image.path)?;
            described["image"] = json!([hash, format!("{:?}", image.fit)]);
        }
        if let Some(latents) = &request.latents {
            described["latents"] = json!(self.file(latents)?);
        }
        Ok(described)
    }

    fn file(&mut self, path: &Path) -> Result<String> {
        if let Some(hash) = self.files.get(path) {
            return Ok(hash.clone());
        }
        let bytes = fs::read(path)
            .map_err(|e| Error::io("cannot read", path, e).of_kind(ErrorKind::Input))?;
        let hash = hexadecimal(&Sha256::digest(bytes));
        self.files.insert(path.into(), hash.clone());
        Ok(hash)
    }

    /// How often this was asked before.
    fn count(&mut self, text: &str) -> usize {
        let count = self.equal.entry(text.to_string()).or_insert(0);
        *count += 1;
        *count - 1
    }
}

/// The output that a line names, which must lie below the folder of outputs.
fn named_output(name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    let below = path.components().all(|c| matches!(c, Component::Normal(_)));
    if !below || name.contains('\0') || path.as_os_str().is_empty() {
        return Err(Error::input(format!(
            "the output {name:?} is not below the folder of outputs"
        ))
        .hint("name it without a leading / and without .."));
    }
    OutputTarget::parse(path).map_err(|e| e.of_kind(ErrorKind::Input))?;
    Ok(path.into())
}

/// `7-a-blue-star-spins-0123456789abcdef.mp4`: safe on every file system, and unique.
fn made_name(request: &Request, key: &str, extension: &str) -> String {
    let mut words = String::new();
    // Decomposed, an accented letter is a letter and a mark that is left out.
    for c in request.prompt.nfkd().filter(|c| !('\u{300}'..='\u{36f}').contains(c)) {
        if c.is_ascii_alphanumeric() {
            words.push(c.to_ascii_lowercase());
        } else if !words.is_empty() && !words.ends_with('-') {
            words.push('-');
        }
        if words.len() >= WORDS {
            break;
        }
    }
    let words = words.trim_end_matches('-');
    let dash = if words.is_empty() { "" } else { "-" };
    format!("{}-{words}{dash}{key}.{extension}", request.seed)
}

fn derived_seed(text: &str, number: usize) -> u64 {
    let digest = Sha256::new().chain_update(text).chain_update(number.to_le_bytes()).finalize();
    digest.iter().take(8).fold(0, |seed: u64, &byte| seed << 8 | u64::from(byte)) % SEEDS
}

fn short_hash(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hexadecimal(&hash.finalize()[..8])
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Form, read_lines};
    use crate::checkpoint::{Family, Variant};

    fn entries(text: &str) -> Vec<Entry> {
        let naming = Naming { format: Format::Mp4, model: json!("test") };
        jobs(&read_lines(text.as_bytes(), Form::Json), &naming, |line| {
            let prompt = line.prompt.as_deref().unwrap_or("");
            let mut request = Request::published(Family::Sd3, Variant::P384, prompt, None);
            request.units = line.units.unwrap_or(2);
            Ok((request, line.seed))
        })
    }

    fn made(text: &str) -> Vec<Job> {
        let job = |entry| match entry {
            Entry::Job(job) => *job,
            other => panic!("{other:?}"),
        };
        entries(text).into_iter().map(job).collect()
    }

    #[test]
    fn names_are_safe_unique_and_stable() {
        let text = r#"
{"prompt": "A blue Star, spins!", "seed": 7}
{"prompt": "a blue star spins", "seed": 7}
{"prompt": "Überraschung: naïve café", "seed": 7}
{"prompt": "狐狸在雪中奔跑"}
{"prompt": "../../etc/passwd\u0000 -rf"}
{"prompt": "a fox"}
{"prompt": "a fox"}
{"prompt": "a fox", "units": 3}
{"prompt": "a fox", "output": "sub/fox.gif"}"#;
        let jobs = made(text);
        let names: Vec<&str> = jobs.iter().map(|j| j.output.to_str().expect("UTF-8")).collect();
        assert!(names[0].starts_with("7-a-blue-star-spins-"), "{}", names[0]);
        assert!(names[2].starts_with("7-uberraschung-naive-cafe-"), "{}", names[2]);
        assert!(names[4].contains("-etc-passwd-rf-"), "{}", names[4]);
        assert_eq!(names[8], "sub/fox.gif");
        let safe = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        assert!(names[..8].iter().all(|n| n.chars().all(safe) && n.len() < 100), "{names:?}");
        let mut different = names.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), names.len(), "{names:?}");
        // The two equal lines have seeds of their own.
        assert_ne!(jobs[5].request.seed, jobs[6].request.seed);
        // A line more changes no other line's job.
        let longer = made(&format!("{{\"prompt\": \"first\"}}\n{text}"));
        let same =
            longer[1..].iter().zip(&jobs).all(|(a, b)| a.key == b.key && a.output == b.output);
        assert!(same);
        // These are part of the meaning of a file of prompts: they must never change.
        assert_eq!(jobs[5].output.to_str(), Some(FOX));
    }

    const FOX: &str = "471907141-a-fox-85982bd20837f35e.mp4";

    #[test]
    fn duplicates_and_clashes_are_found() {
        let entries = entries(
            r#"
{"prompt": "a", "seed": 1}
{"prompt": "a", "seed": 1}
{"prompt": "a", "output": "x.mp4"}
{"prompt": "b", "output": "x.mp4"}
{"prompt": "b", "output": "../x.mp4"}
{"prompt": "b", "output": "/tmp/x.mp4"}
{"prompt": "b", "output": "x.webm"}
nonsense
nonsense"#,
        );
        let shown: Vec<String> = entries
            .iter()
            .map(|entry| match entry {
                Entry::Job(job) => format!("{}", job.line),
                Entry::Duplicate { line, of } => format!("{line} is {of}"),
                Entry::Bad { line, error, .. } => format!("{line}: {error}"),
            })
            .collect();
        assert_eq!(shown[..3], ["2", "3 is 2", "4"]);
        for (text, part) in shown[3..].iter().zip([
            "line 4 goes to x.mp4 as well",
            "not below",
            "not below",
            "format of x.webm",
            "expected",
            "expected",
        ]) {
            assert!(text.contains(part), "{text} lacks {part}");
        }
        let keys: Vec<&String> = entries
            .iter()
            .filter_map(|e| if let Entry::Bad { key, .. } = e { Some(key) } else { None })
            .collect();
        assert_ne!(keys[4], keys[5], "equal bad lines are two");
    }
}
