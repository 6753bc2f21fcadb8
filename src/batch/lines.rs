//! The lines of a file of prompts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How a line is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Each line is a prompt.
    Text,
    /// Each line is a JSON object, see [`LineSettings`].
    Json,
}

impl Form {
    /// By the extension of the file (`.jsonl`, `.ndjson` and `.json`, or `.txt`), else by
    /// whether the first line that says anything begins like a JSON object.
    pub fn of(path: &Path, data: &[u8]) -> Form {
        match path.extension().and_then(|e| e.to_str()) {
            Some("jsonl" | "ndjson" | "json") => Form::Json,
            Some("txt") => Form::Text,
            _ => {
                match without_mark(data).split(|&b| b == b'\n').find(|line| says_something(line)) {
                    Some(line) if line.trim_ascii_start().starts_with(b"{") => Form::Json,
                    _ => Form::Text,
                }
            }
        }
    }
}

/// What one line may set; what it does not set is as the command says.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LineSettings {
    /// What to show.
    pub prompt: Option<String>,
    /// What to avoid.
    pub negative: Option<String>,
    /// Appended to the prompt.
    pub suffix: Option<String>,
    /// The first image; a relative path begins at the folder of the file of prompts.
    pub image: Option<PathBuf>,
    /// `crop`, `pad` or `stretch`.
    pub fit: Option<String>,
    /// Seed of the noise.
    pub seed: Option<u64>,
    /// `384p`, `768p` or `WIDTHxHEIGHT`.
    pub size: Option<String>,
    /// Length in seconds; at most one of the three lengths may be given.
    pub seconds: Option<f64>,
    /// Length in frames.
    pub frames: Option<u32>,
    /// Length in latent frames.
    pub units: Option<usize>,
    /// Steps of the three stages for the first frame.
    pub steps: Option<OneOrThree>,
    /// Steps of the three stages for the other frames.
    pub video_steps: Option<OneOrThree>,
    /// Guidance of the first frame.
    pub guidance: Option<f32>,
    /// Guidance of the other frames.
    pub video_guidance: Option<f32>,
    /// Falling guidance: by how much with every unit, and down to what.
    pub linear_guidance: Option<[f32; 2]>,
    /// Name of the output below the folder of outputs.
    pub output: Option<String>,
}

/// One number for all three stages, or three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum OneOrThree {
    /// For all.
    One(usize),
    /// For each.
    Three([usize; 3]),
}

impl OneOrThree {
    /// As three.
    pub fn three(self) -> [usize; 3] {
        match self {
            OneOrThree::One(all) => [all; 3],
            OneOrThree::Three(three) => three,
        }
    }
}

/// A line that says something: neither blank nor a comment.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Its number in the file, from 1.
    pub number: usize,
    /// Its text, with U+FFFD in place of what is not UTF-8.
    pub text: String,
    /// What it says, or what is wrong with it.
    pub content: Result<LineSettings, String>,
}

/// Reads the lines of a file of prompts. Blank lines and lines that begin with `#` say nothing;
/// line ends may be those of Windows, and a byte order mark is skipped.
pub fn read_lines(data: &[u8], form: Form) -> Vec<Line> {
    let lines = without_mark(data).split(|&b| b == b'\n').enumerate();
    lines
        .filter(|(_, line)| says_something(line))
        .map(|(index, line)| {
            let line = line.trim_ascii();
            let content = match std::str::from_utf8(line) {
                Err(e) => Err(format!("not valid UTF-8: {e}")),
                Ok(text) => read_line(text, form),
            };
            let text = String::from_utf8_lossy(line).into_owned();
            Line { number: index + 1, text, content }
        })
        .collect()
}

fn read_line(text: &str, form: Form) -> Result<LineSettings, String> {
    let settings = match form {
        Form::Text => LineSettings { prompt: Some(text.into()), ..LineSettings::default() },
        // A list would be taken for the fields in their order.
        Form::Json if !text.starts_with('{') => {
            return Err(format!("expected a JSON object, found {}", shorten(text)));
        }
        // The position that the error gives is within the line.
        Form::Json => serde_json::from_str(text)
            .map_err(|e| e.to_string().replace("at line 1 column", "at column"))?,
    };
    let lengths = [settings.seconds.is_some(), settings.frames.is_some(), settings.units.is_some()];
    if lengths.into_iter().filter(|&given| given).count() > 1 {
        return Err("more than one of seconds, frames and units is given".into());
    }
    Ok(settings)
}

/// The beginning of a text that may be very long.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

fn without_mark(data: &[u8]) -> &[u8] {
    data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data)
}

fn says_something(line: &[u8]) -> bool {
    let line = line.trim_ascii();
    !line.is_empty() && !line.starts_with(b"#")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_one_prompt_a_line() {
        let data = b"\xef\xbb\xbfa fox\r\n\n  # no prompt\n\ta bear \n\xff\xfe\nlast";
        assert_eq!(Form::of("p.txt".as_ref(), data), Form::Text);
        let lines = read_lines(data, Form::Text);
        let prompts: Vec<_> = lines
            .iter()
            .map(|l| (l.number, l.content.as_ref().ok().and_then(|c| c.prompt.as_deref())))
            .collect();
        assert_eq!(
            prompts,
            [(1, Some("a fox")), (4, Some("a bear")), (5, None), (6, Some("last"))]
        );
    }

    #[test]
    fn json_has_settings_and_bad_lines_say_why() {
        let data = br#"
{"prompt": "a fox", "seed": 18446744073709551615, "steps": [3, 2, 1], "video_steps": 4}
{"prompt": "a fox", "colour": "red"}
{"prompt": 7}
{"prompt": "a", "seed": -1}
{"prompt": "a", "seconds": 1, "units": 2}
["a fox"]
a fox"#;
        assert_eq!(Form::of("-".as_ref(), data), Form::Json);
        let lines = read_lines(data, Form::Json);
        let good = lines[0].content.as_ref().expect("a good line");
        assert_eq!(good.seed, Some(u64::MAX));
        assert_eq!(good.steps.map(OneOrThree::three), Some([3, 2, 1]));
        assert_eq!(good.video_steps.map(OneOrThree::three), Some([4; 3]));
        let errors =
            ["colour", "expected a string", "u64", "more than one", "found [", "found a fox"];
        for (line, part) in lines[1..].iter().zip(errors) {
            let error = line.content.as_ref().expect_err(part);
            assert!(error.contains(part), "{error} lacks {part}");
        }
        assert_eq!(lines.len(), 7);
        assert_eq!(lines.iter().map(|l| l.number).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7, 8]);
    }
}
