//! Configurations of the two diffusion transformers.

use super::Settings;
use crate::Result;
use crate::checkpoint::Family;

/// Size of an attention head in both families; the kernels are made for it.
const HEAD_DIM: usize = 64;
/// Channels of a latent.
const LATENT_CHANNELS: usize = 16;
/// Latent pixels along each side of a token.
const PATCH: usize = 2;
/// Bounds that no real model comes near and that keep every later product within `usize`.
const MAX_LAYERS: usize = 256;
const MAX_HEADS: usize = 256;
const MAX_WIDTH: usize = 1 << 16;

/// The configuration of the diffusion transformer, which decides the family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransformerConfig {
    /// `PyramidDiffusionMMDiT` (sd3).
    Mmdit(MmditConfig),
    /// `PyramidFluxTransformer` (miniflux).
    Flux(FluxConfig),
}

impl TransformerConfig {
    pub(in crate::checkpoint) fn from_settings(settings: &Settings) -> Result<Self> {
        match settings.text("_class_name")? {
            "PyramidDiffusionMMDiT" => MmditConfig::from_settings(settings).map(Self::Mmdit),
            "PyramidFluxTransformer" => FluxConfig::from_settings(settings).map(Self::Flux),
            _ => Err(settings
                .refuse("_class_name", "\"PyramidDiffusionMMDiT\" or \"PyramidFluxTransformer\"")),
        }
    }

    /// The family that the class belongs to.
    pub fn family(&self) -> Family {
        match self {
            TransformerConfig::Mmdit(_) => Family::Sd3,
            TransformerConfig::Flux(_) => Family::Miniflux,
        }
    }

    /// Width of a token: heads × 64.
    pub fn width(&self) -> usize {
        match self {
            TransformerConfig::Mmdit(config) => config.width(),
            TransformerConfig::Flux(config) => config.width(),
        }
    }

    /// Width of the T5 embeddings it attends to.
    pub fn text_dim(&self) -> usize {
        match self {
            TransformerConfig::Mmdit(config) => config.text_dim,
            TransformerConfig::Flux(config) => config.text_dim,
        }
    }

    /// Width of the pooled CLIP embedding.
    pub fn pooled_dim(&self) -> usize {
        match self {
            TransformerConfig::Mmdit(config) => config.pooled_dim,
            TransformerConfig::Flux(config) => config.pooled_dim,
        }
    }
}

/// The sd3 MMDiT. Latents have 16 channels, patches are 2×2, heads have 64 dimensions.
///
/// The published `config.json` omits four settings whose class defaults are wrong for it; the
/// published pipeline sets them and so does this type, always: rotary temporal positions
/// (`add_temp_pos_embed`, `temp_pos_embed_type` "rope"), the T5 mask (`use_t5_mask`) and
/// interpolated condition positions (`interp_condition_pos`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmditConfig {
    /// Number of transformer blocks; the last one leaves the text as it is.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Size of a head: always 64.
    pub head_dim: usize,
    /// Channels of a latent: always 16.
    pub in_channels: usize,
    /// Latent pixels along each side of a token: always 2.
    pub patch_size: usize,
    /// Width of the T5 embeddings (`joint_attention_dim`).
    pub text_dim: usize,
    /// Width of the pooled CLIP embedding (`pooled_projection_dim`).
    pub pooled_dim: usize,
    /// Side M of the stored M×M table of spatial positions.
    pub pos_embed_max_size: usize,
}

impl MmditConfig {
    /// Width of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn from_settings(settings: &Settings) -> Result<Self> {
        settings.require("attention_head_dim", HEAD_DIM)?;
        settings.require("in_channels", LATENT_CHANNELS)?;
        settings.require("patch_size", PATCH)?;
        settings.require("qk_norm", "rms_norm")?;
        settings.require("pos_embed_type", "sincos")?;
        settings.require("use_temporal_causal", true)?;
        // The four omitted settings: never read, but a config that denies them is not ours.
        settings.allow("add_temp_pos_embed", true)?;
        settings.allow("temp_pos_embed_type", "rope")?;
        settings.allow("use_t5_mask", true)?;
        settings.allow("interp_condition_pos", true)?;
        let config = MmditConfig {
            layers: settings.count("num_layers", 1..=MAX_LAYERS)?,
            heads: settings.count("num_attention_heads", 1..=MAX_HEADS)?,
            head_dim: HEAD_DIM,
            in_channels: LATENT_CHANNELS,
            patch_size: PATCH,
            text_dim: settings.count("joint_attention_dim", 1..=MAX_WIDTH)?,
            pooled_dim: settings.count("pooled_projection_dim", 1..=MAX_WIDTH)?,
            pos_embed_max_size: settings.count("pos_embed_max_size", 1..=4096)?,
        };
        settings.require("caption_projection_dim", config.width())?;
        Ok(config)
    }
}

/// The miniflux transformer. A token is a 2×2 patch of 16 channels, flattened to 64 before
/// the model (which is why the file says `patch_size` 1); heads have 64 dimensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FluxConfig {
    /// Number of blocks with separate text and image weights.
    pub layers: usize,
    /// Number of blocks after text and image are joined.
    pub single_layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Size of a head: always 64.
    pub head_dim: usize,
    /// Width of a token before the model: always 2·2·16.
    pub in_channels: usize,
    /// Latent pixels along each side of a token: always 2.
    pub patch_size: usize,
    /// Width of the T5 embeddings (`joint_attention_dim`).
    pub text_dim: usize,
    /// Width of the pooled CLIP embedding (`pooled_projection_dim`).
    pub pooled_dim: usize,
    /// Head dimensions rotated by time, y and x; all even, together 64.
    pub rope_axes: [usize; 3],
}

impl FluxConfig {
    /// Width of a token inside the model.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn from_settings(settings: &Settings) -> Result<Self> {
        settings.require("attention_head_dim", HEAD_DIM)?;
        settings.require("in_channels", LATENT_CHANNELS * PATCH * PATCH)?;
        settings.require("patch_size", 1)?;
        settings.require("use_temporal_causal", true)?;
        settings.require("interp_condition_pos", true)?;
        let rope_axes: [usize; 3] = settings.counts("axes_dims_rope", 2..=HEAD_DIM)?;
        if rope_axes.iter().sum::<usize>() != HEAD_DIM || rope_axes.iter().any(|d| d % 2 != 0) {
            return Err(settings.refuse(
                "axes_dims_rope",
                &format!("three even numbers that add up to {HEAD_DIM}"),
            ));
        }
        Ok(FluxConfig {
            layers: settings.count("num_layers", 1..=MAX_LAYERS)?,
            single_layers: settings.count("num_single_layers", 1..=MAX_LAYERS)?,
            heads: settings.count("num_attention_heads", 1..=MAX_HEADS)?,
            head_dim: HEAD_DIM,
            in_channels: LATENT_CHANNELS * PATCH * PATCH,
            patch_size: PATCH,
            text_dim: settings.count("joint_attention_dim", 1..=MAX_WIDTH)?,
            pooled_dim: settings.count("pooled_projection_dim", 1..=MAX_WIDTH)?,
            rope_axes,
        })
    }
}
