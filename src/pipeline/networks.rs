//! The configurations of a checkpoint's networks, and those of the published ones.

use crate::Result;
use crate::checkpoint::{
    Checkpoint, ClipActivation, ClipConfig, Family, FluxConfig, MmditConfig, T5Config,
    TransformerConfig, VaeConfig,
};

/// The configurations of all networks of a checkpoint.
#[derive(Debug, Clone)]
pub struct Networks {
    /// The text encoders that are pooled.
    pub clips: Vec<ClipConfig>,
    /// The text encoder whose tokens are used.
    pub t5: T5Config,
    /// The transformer.
    pub transformer: TransformerConfig,
    /// The VAE.
    pub vae: VaeConfig,
}

impl Networks {
    /// Those of an opened checkpoint.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] naming a configuration that is missing.
    pub fn of(checkpoint: &Checkpoint) -> Result<Networks> {
        let mut clips = vec![checkpoint.clip_l()?.clone()];
        if checkpoint.family() == Family::Sd3 {
            clips.push(checkpoint.clip_g()?.clone());
        }
        Ok(Networks {
            clips,
            t5: checkpoint.t5()?.clone(),
            transformer: checkpoint.transformer().clone(),
            vae: checkpoint.vae()?.clone(),
        })
    }
}

/// The sizes of the published checkpoints.
impl Networks {
    /// The networks of a published family, without its files.
    pub fn published(family: Family) -> Networks {
        let clip_l = ClipConfig {
            vocab_size: 49408,
            width: 768,
            ffn_width: 3072,
            layers: 12,
            heads: 12,
            max_positions: 77,
            activation: ClipActivation::QuickGelu,
            norm_eps: 1e-5,
            projection: None,
        };
        let t5 = T5Config {
            vocab_size: 32128,
            width: 4096,
            head_dim: 64,
            ffn_width: 10240,
            layers: 24,
            heads: 64,
            buckets: 32,
            max_distance: 128,
            norm_eps: 1e-6,
        };
        let vae = VaeConfig {
            latent_channels: 16,
            encoder_channels: [128, 256, 512, 512],
            encoder_resnets: [2; 4],
            encoder_groups: 32,
            decoder_channels: [128, 256, 512, 512],
            decoder_resnets: [3; 4],
            decoder_groups: 32,
        };
        let (clips, transformer) = match family {
            Family::Sd3 => {
                let clip_g = ClipConfig {
                    width: 1280,
                    ffn_width: 5120,
                    layers: 32,
                    heads: 20,
                    activation: ClipActivation::Gelu,
                    projection: Some(1280),
                    ..clip_l.clone()
                };
                let clip_l = ClipConfig { projection: Some(768), ..clip_l };
                let transformer = MmditConfig {
                    layers: 24,
                    heads: 24,
                    head_dim: 64,
                    in_channels: 16,
                    patch_size: 2,
                    text_dim: 4096,
                    pooled_dim: 2048,
                    pos_embed_max_size: 192,
                };
                (vec![clip_l, clip_g], TransformerConfig::Mmdit(transformer))
            }
            Family::Miniflux => {
                let transformer = FluxConfig {
                    layers: 8,
                    single_layers: 16,
                    heads: 30,
                    head_dim: 64,
                    in_channels: 64,
                    patch_size: 2,
                    text_dim: 4096,
                    pooled_dim: 768,
                    rope_axes: [16, 24, 24],
                };
                (vec![clip_l], TransformerConfig::Flux(transformer))
            }
        };
        Networks { clips, t5, transformer, vae }
    }
}
