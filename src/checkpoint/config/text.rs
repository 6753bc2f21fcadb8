//! Configurations of the text encoders.

use super::Settings;
use crate::Result;

const MAX_VOCABULARY: usize = 1 << 20;
const MAX_WIDTH: usize = 1 << 16;
const MAX_LAYERS: usize = 256;
const MAX_HEADS: usize = 256;

/// The activation of a CLIP text model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClipActivation {
    /// x · sigmoid(1.702 x).
    QuickGelu,
    /// The exact GELU, through erf.
    Gelu,
}

/// A CLIP text model.
///
/// The pooled output is the state at the end-of-text token, the first of the highest id of
/// the vocabulary: what transformers does for the `eos_token_id` 2 of the published files.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Number of token embeddings.
    pub vocab_size: usize,
    /// Width of a token, a multiple of `heads`.
    pub width: usize,
    /// Width inside the feed-forward layers.
    pub ffn_width: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of position embeddings, the longest text in tokens.
    pub max_positions: usize,
    /// Activation of the feed-forward layers.
    pub activation: ClipActivation,
    /// Epsilon of the layer norms.
    pub norm_eps: f32,
    /// Width of the projection of the pooled state; sd3 has one, miniflux has none.
    pub projection: Option<usize>,
}

impl ClipConfig {
    /// `projected`: whether the family uses `text_projection`. miniflux's file gives a
    /// `projection_dim` too, for a weight that is not there.
    pub(in crate::checkpoint) fn from_settings(
        settings: &Settings,
        projected: bool,
    ) -> Result<Self> {
        let activation = match settings.text("hidden_act")? {
            "quick_gelu" => ClipActivation::QuickGelu,
            "gelu" => ClipActivation::Gelu,
            _ => return Err(settings.refuse("hidden_act", "\"quick_gelu\" or \"gelu\"")),
        };
        let projection = match projected {
            true => Some(settings.count("projection_dim", 1..=MAX_WIDTH)?),
            false => None,
        };
        let config = ClipConfig {
            vocab_size: settings.count("vocab_size", 3..=MAX_VOCABULARY)?,
            width: settings.count("hidden_size", 1..=MAX_WIDTH)?,
            ffn_width: settings.count("intermediate_size", 1..=MAX_WIDTH)?,
            layers: settings.count("num_hidden_layers", 1..=MAX_LAYERS)?,
            heads: settings.count("num_attention_heads", 1..=MAX_HEADS)?,
            max_positions: settings.count("max_position_embeddings", 1..=4096)?,
            activation,
            norm_eps: settings.epsilon("layer_norm_eps")?,
            projection,
        };
        if !config.width.is_multiple_of(config.heads) {
            let must = format!("a multiple of num_attention_heads, {}", config.heads);
            return Err(settings.refuse("hidden_size", &must));
        }
        // 2 makes transformers take the highest id; naming that id comes to the same.
        let last = config.vocab_size - 1;
        let eos = settings.count("eos_token_id", 0..=last)?;
        if eos != 2 && eos != last {
            return Err(settings.refuse("eos_token_id", &format!("2 or {last}")));
        }
        Ok(config)
    }
}

/// A T5 v1.1 encoder (gated GELU in its tanh form, relative positions in the first layer).
#[derive(Debug, Clone, PartialEq)]
pub struct T5Config {
    /// Number of token embeddings.
    pub vocab_size: usize,
    /// Width of a token.
    pub width: usize,
    /// Size of an attention head; `heads * head_dim` need not be `width`.
    pub head_dim: usize,
    /// Width inside the feed-forward layers.
    pub ffn_width: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of relative position buckets, half of them for each direction.
    pub buckets: usize,
    /// Distance from which all positions share the last bucket.
    pub max_distance: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
}

impl T5Config {
    pub(in crate::checkpoint) fn from_settings(settings: &Settings) -> Result<Self> {
        settings.require("feed_forward_proj", "gated-gelu")?;
        settings.allow("dense_act_fn", "gelu_new")?;
        settings.allow("is_gated_act", true)?;
        let config = T5Config {
            vocab_size: settings.count("vocab_size", 3..=MAX_VOCABULARY)?,
            width: settings.count("d_model", 1..=MAX_WIDTH)?,
            head_dim: settings.count("d_kv", 1..=1024)?,
            ffn_width: settings.count("d_ff", 1..=MAX_WIDTH)?,
            layers: settings.count("num_layers", 1..=MAX_LAYERS)?,
            heads: settings.count("num_heads", 1..=MAX_HEADS)?,
            buckets: settings.count("relative_attention_num_buckets", 4..=4096)?,
            max_distance: settings.count("relative_attention_max_distance", 1..=MAX_WIDTH)?,
            norm_eps: settings.epsilon("layer_norm_epsilon")?,
        };
        // Per direction half the buckets are exact, the others logarithmic up to the
        // maximal distance, which must lie beyond the exact ones.
        if !config.buckets.is_multiple_of(4) {
            return Err(settings.refuse("relative_attention_num_buckets", "a multiple of 4"));
        }
        if config.max_distance <= config.buckets / 4 {
            let must = format!("more than {}", config.buckets / 4);
            return Err(settings.refuse("relative_attention_max_distance", &must));
        }
        Ok(config)
    }
}
