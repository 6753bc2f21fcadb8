//! The tokenizer of the T5 text encoder.

use std::path::Path;

use tokenizers::Tokenizer;

use super::files::Folder;
use super::{T5_LENGTH, Tokens, rest_from};
use crate::{Error, Result};

/// Turns prompts into the ids of T5: everything is as tokenizer.json says.
///
/// The published files of the two model families differ in how they treat the text behind
/// a special token such as `</s>`, so each has to be used with its own.
pub struct T5Tokenizer {
    tokenizer: Tokenizer,
    end: u32,
    pad: u32,
}

impl T5Tokenizer {
    /// Reads the tokenizer in the folder `dir` of a checkpoint.
    ///
    /// # Errors
    /// A missing or damaged tokenizer.json, or one without `</s>` or `<pad>`.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        const FILE: &str = "tokenizer.json";
        let folder = Folder::new(dir.as_ref());
        let bytes = folder.read(FILE).map_err(|e| {
            if !folder.path("spiece.model").exists() {
                return e;
            }
            e.hint("spiece.model alone is not enough; download tokenizer.json of the checkpoint")
        })?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|e| folder.damaged(FILE, "not a tokenizer").because(e))?;
        // The file may ask for both; what is cut and what is padded is decided here.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|e| folder.damaged(FILE, "not a tokenizer").because(e))?;
        let id = |token: &str| {
            let problem = format!("without the token {token}");
            tokenizer.token_to_id(token).ok_or_else(|| folder.damaged(FILE, &problem))
        };
        let (end, pad) = (id("</s>")?, id("<pad>")?);
        Ok(T5Tokenizer { tokenizer, end, pad })
    }

    /// The ids of a prompt: the text, the end mark and padding, 128 in all.
    ///
    /// # Errors
    /// A prompt that the tokenizer refuses; none is known.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let encoding = self
            .tokenizer
            .encode(sufficient_start(prompt), false)
            .map_err(|e| Error::input("the prompt cannot be cut into tokens").because(e))?;
        let mut ids = encoding.get_ids().to_vec();
        let room = T5_LENGTH - 1;
        // A token's place in the prompt is where its first byte is.
        let first_lost = encoding.get_offsets().get(room);
        let lost = first_lost.map(|&(start, _)| rest_from(prompt, start).trim_start().to_owned());
        ids.truncate(room);
        Ok(Tokens::closed(ids, self.end, self.pad, T5_LENGTH, lost))
    }
}

/// The part of a prompt that its first 128 tokens depend on, or a little more.
///
/// Words are encoded one by one and give a token each at least. The cut is made at a
/// blank between ASCII letters, which no normalisation reaches across.
fn sufficient_start(prompt: &str) -> &str {
    let bytes = prompt.as_bytes();
    let gaps = bytes.windows(3).enumerate().filter(|(_, around)| {
        around[0].is_ascii_alphabetic() && around[1] == b' ' && around[2].is_ascii_alphabetic()
    });
    // The text before gap number n (from 0) has n + 1 words or more.
    gaps.map(|(at, _)| at + 1).nth(T5_LENGTH).map_or(prompt, |end| &prompt[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_start_of_a_long_prompt_is_needed() {
        assert_eq!(sufficient_start("a b"), "a b");
        assert_eq!(sufficient_start(""), "");
        let long = "é word ".repeat(1000);
        assert_eq!(sufficient_start(&long), long);
        let long = "word ".repeat(1000);
        assert_eq!(sufficient_start(&long).split(' ').count(), T5_LENGTH + 1);
    }
}
