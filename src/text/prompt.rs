//! What is said to the model besides the user's own words.

/// What the published pipeline appends to every prompt.
pub const PUBLISHED_SUFFIX: &str = ", hyper quality, Ultra HD, 8K";

/// The negative prompt of the published pipeline.
pub const PUBLISHED_NEGATIVE: &str = "cartoon style, worst quality, low quality, blurry, \
    absolute black, absolute white, low res, extra limbs, extra digits, misplaced objects, \
    mutated anatomy, monochrome, horror";

/// A prompt with everything that is encoded for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptText {
    /// The user's words.
    pub prompt: String,
    /// What is appended to them; `None` for nothing.
    pub suffix: Option<String>,
    /// What the video should not look like. It is encoded as it is, without the suffix.
    pub negative: String,
}

impl PromptText {
    /// A prompt with the published suffix and negative prompt.
    pub fn new(prompt: impl Into<String>) -> Self {
        PromptText {
            prompt: prompt.into(),
            suffix: Some(PUBLISHED_SUFFIX.to_owned()),
            negative: PUBLISHED_NEGATIVE.to_owned(),
        }
    }

    /// The positive text that is encoded: the prompt and its suffix.
    pub fn positive(&self) -> String {
        format!("{}{}", self.prompt, self.suffix.as_deref().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suffix_is_appended_and_can_be_left_out() {
        let mut text = PromptText::new("a fox");
        assert_eq!(text.positive(), "a fox, hyper quality, Ultra HD, 8K");
        assert_eq!(text.negative.len(), 173);
        text.suffix = None;
        assert_eq!(text.positive(), "a fox");
    }
}
