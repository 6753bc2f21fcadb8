//! What is said to the model besides the user's own words.

/// What the published pipeline appends to every prompt.
pub const PUBLISHED_SUFFIX: &str = ", hyper quality, Ultra HD, 8K";

/// The negative prompt of the published pipeline.
pub const PUBLISHED_NEGATIVE: &str = "cartoon style, worst quality, low quality, blurry, \
    absolute black, absolute white, low res, extra limbs, extra digits, misplaced objects, \
    mutated anatomy, monochrome, horror";
