//! From prompts to token ids.
//!
//! Tokenisation agrees, id by id, with the published Python pipeline. What does not fit
//! into an encoder's length is cut off as it is there, but not silently: see
//! [`Tokens::lost`].

mod bpe;
mod clip;
mod files;
mod prompt;
mod repair;
mod t5;

pub use clip::ClipTokenizer;
pub use prompt::{PUBLISHED_NEGATIVE, PUBLISHED_SUFFIX};
pub use t5::T5Tokenizer;

/// How many ids the CLIP encoders take.
pub const CLIP_LENGTH: usize = 77;

/// How many ids the T5 encoder takes.
pub const T5_LENGTH: usize = 128;

/// The token ids of one text, as long as its encoder takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The ids, padded to [`CLIP_LENGTH`] or [`T5_LENGTH`].
    pub ids: Vec<u32>,
    /// How many ids there are before the padding, the end mark included. The attention
    /// mask of T5 is 1 for these.
    pub len: usize,
    /// The part of the text that was cut off for want of room. For CLIP it is in the
    /// cleaned form that is encoded (lower case, single blanks).
    pub lost: Option<String>,
}

impl Tokens {
    /// Puts the end mark and the padding behind ids that leave room for the mark.
    fn closed(mut ids: Vec<u32>, end: u32, pad: u32, length: usize, lost: Option<String>) -> Self {
        ids.push(end);
        let len = ids.len();
        ids.resize(length, pad);
        Tokens { ids, len, lost }
    }
}

/// The end of a text from the character on that the byte at `at` is part of.
fn rest_from(text: &str, at: usize) -> &str {
    (0..=at).rev().find_map(|start| text.get(start..)).unwrap_or_default()
}
