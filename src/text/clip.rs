//! The tokenizer of the CLIP text encoders.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::bpe::Bpe;
use super::files::Folder;
use super::repair::fix_text;
use super::{CLIP_LENGTH, Tokens, rest_from};
use crate::{Error, Result};

/// What a cleaned text is cut into: the two marks, the endings of English contractions,
/// runs of letters, single digits, runs of anything else. (U+0345 is nothing: the lower
/// case of a letter without being one, it is skipped by the published expression.)
static WORD: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x) (?i: <\|startoftext\|> | <\|endoftext\|> | 's | 't | 're | 've | 'm | 'll | 'd )
        | \p{L}+ | \p{N} | [^\s\p{L}\p{N}\x{345}]+",
    )
    .expect("a constant pattern")
});

/// Words of a cleaned text that are a token each, never cut further.
const MARKS: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// Turns prompts into the ids of CLIP: vocab.json, merges.txt and the special tokens of
/// tokenizer_config.json.
///
/// The ids are those of the published slow tokenizer (`CLIPTokenizer` with ftfy): the
/// prompt is split at the special tokens, which include the padding token, even where
/// that is a plain `!`; what lies between is repaired, its white space collapsed, put in
/// lower case, cut into words and encoded by byte pairs.
pub struct ClipTokenizer {
    bpe: Bpe,
    start: u32,
    end: u32,
    pad: u32,
    unknown: u32,
    /// The special tokens that a prompt is split at, the longest first, and their ids.
    special: HashMap<String, u32>,
    splitter: Regex,
}

/// The parts of tokenizer_config.json and special_tokens_map.json that matter here.
#[derive(Deserialize, Default)]
struct Config {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
    added_tokens_decoder: Option<BTreeMap<u32, Token>>,
}

/// A special token, as a plain string or with its settings.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Detailed { content: String },
}

impl Token {
    fn into_content(self) -> String {
        match self {
            Token::Plain(content) | Token::Detailed { content } => content,
        }
    }
}

impl ClipTokenizer {
    /// Reads the tokenizer in the folder `dir` of a checkpoint.
    ///
    /// # Errors
    /// A missing or damaged file, or a special token that is not in the vocabulary.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let folder = Folder::new(dir.as_ref());
        let vocabulary = folder.read_json("vocab.json")?;
        let bpe = Bpe::new(vocabulary, &folder.read_text("merges.txt")?)
            .map_err(|e| e.at(dir.as_ref().display()))?;
        let config: Config = folder.read_json_if_there("tokenizer_config.json")?;
        let map: Config = folder.read_json_if_there("special_tokens_map.json")?;
        Self::new(bpe, config, map).map_err(|e| e.at(dir.as_ref().display()))
    }

    fn new(bpe: Bpe, config: Config, map: Config) -> Result<Self> {
        // Files from before tokenizer_config.json listed the added tokens keep the
        // special ones in the map.
        let (first, second) = match config.added_tokens_decoder {
            Some(_) => (&config, &map),
            None => (&map, &config),
        };
        let name = |token: fn(&Config) -> &Option<Token>, default: &str| {
            let found = token(first).as_ref().or(token(second).as_ref()).cloned();
            found.map_or(default.to_owned(), Token::into_content)
        };
        let [start_mark, end_mark] = MARKS;
        let start = name(|c| &c.bos_token, start_mark);
        let end = name(|c| &c.eos_token, end_mark);
        let unknown = name(|c| &c.unk_token, end_mark);
        let pad = name(|c| &c.pad_token, end_mark);

        let mut special: HashMap<String, u32> = HashMap::new();
        for (&id, token) in config.added_tokens_decoder.iter().flatten() {
            special.insert(token.clone().into_content(), id);
        }
        let mut id = |token: &String| -> Result<u32> {
            let known = special.get(token).copied().or_else(|| bpe.id(token));
            let id = known.ok_or_else(|| {
                Error::model(format!("the vocabulary lacks the special token {token:?}"))
            })?;
            special.insert(token.clone(), id);
            Ok(id)
        };
        let [start, end, unknown, pad] = [id(&start)?, id(&end)?, id(&unknown)?, id(&pad)?];

        special.remove("");
        let mut longest_first: Vec<&str> = special.keys().map(String::as_str).collect();
        longest_first.sort_unstable_by_key(|token| (std::cmp::Reverse(token.len()), *token));
        let escaped: Vec<String> = longest_first.into_iter().map(regex::escape).collect();
        let splitter = Regex::new(&escaped.join("|"))
            .map_err(|e| Error::model("the special tokens are too large").because(e))?;
        Ok(ClipTokenizer { bpe, start, end, pad, unknown, special, splitter })
    }

    /// The ids of a prompt: the start mark, the text, the end mark and padding, 77 in all.
    pub fn encode(&self, prompt: &str) -> Tokens {
        let mut ids = vec![self.start];
        let lost = self.encode_pieces(prompt, &mut ids);
        Tokens::closed(ids, self.end, self.pad, CLIP_LENGTH, lost)
    }

    /// Appends the ids of the text and returns the part there was no room for.
    fn encode_pieces(&self, prompt: &str, ids: &mut Vec<u32>) -> Option<String> {
        let mut at = 0;
        for special in self.splitter.find_iter(prompt) {
            if let Some(lost) = self.encode_text(&prompt[at..special.start()], ids) {
                return Some(lost + &prompt[special.start()..]);
            }
            at = special.end();
            if is_full(ids) {
                return Some(prompt[special.start()..].to_owned());
            }
            ids.push(self.special.get(special.as_str()).copied().unwrap_or(self.unknown));
        }
        self.encode_text(&prompt[at..], ids)
    }

    /// The same for a text without special tokens.
    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Option<String> {
        let clean = clean(text);
        for word in WORD.find_iter(&clean) {
            if is_full(ids) {
                return Some(clean[word.start()..].to_owned());
            }
            if MARKS.contains(&word.as_str()) {
                ids.push(self.bpe.id(word.as_str()).unwrap_or(self.unknown));
                continue;
            }
            let mut at = word.start();
            for piece in self.bpe.encode(word.as_str()) {
                if is_full(ids) {
                    return Some(rest_from(&clean, at).to_owned());
                }
                ids.push(piece.id.unwrap_or(self.unknown));
                at += piece.bytes;
            }
        }
        None
    }
}

/// Whether there is room for the end mark only.
fn is_full(ids: &[u32]) -> bool {
    ids.len() + 1 >= CLIP_LENGTH
}

/// Repaired, with single blanks for white space, in lower case.
fn clean(text: &str) -> String {
    let fixed = fix_text(text);
    let mut clean = String::with_capacity(fixed.len());
    for word in fixed.split_whitespace() {
        if !clean.is_empty() {
            clean.push(' ');
        }
        clean.push_str(word);
    }
    clean.to_lowercase()
}
