//! Configuration of the causal video VAE.

use super::Settings;
use crate::Result;

/// Number of resolution levels: three halvings make the factor 8 in time, height and width.
const LEVELS: usize = 4;
const MAX_CHANNELS: usize = 1 << 13;
const MAX_RESNETS: usize = 64;
const LATENT_CHANNELS: usize = 16;

/// The causal video VAE: 3 colour channels to 16 latent channels, 8× smaller in time, height
/// and width. `scaling_factor` of the file is not used by the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaeConfig {
    /// Channels of a latent: always 16.
    pub latent_channels: usize,
    /// Widths of the encoder's blocks in the order run.
    pub encoder_channels: [usize; LEVELS],
    /// Resnets of the encoder's blocks in the order run.
    pub encoder_resnets: [usize; LEVELS],
    /// Groups of every group norm in the encoder.
    pub encoder_groups: usize,
    /// Widths of the decoder's blocks as stored, *ascending*: the decoder runs them reversed.
    pub decoder_channels: [usize; LEVELS],
    /// Resnets of the decoder's blocks in the order run (not reversed).
    pub decoder_resnets: [usize; LEVELS],
    /// Groups of every group norm in the decoder.
    pub decoder_groups: usize,
}

impl VaeConfig {
    pub(in crate::checkpoint) fn from_settings(settings: &Settings) -> Result<Self> {
        settings.require("_class_name", "CausalVideoVAE")?;
        settings.require("encoder_in_channels", 3)?;
        settings.require("encoder_out_channels", LATENT_CHANNELS)?;
        settings.require("encoder_double_z", true)?;
        settings.require("encoder_type", "causal_vae_conv")?;
        settings.require("encoder_act_fn", "silu")?;
        settings.require("encoder_down_block_types", ["DownEncoderBlockCausal3D"; LEVELS])?;
        settings.require("decoder_in_channels", LATENT_CHANNELS)?;
        settings.require("decoder_out_channels", 3)?;
        settings.require("decoder_type", "causal_vae_conv")?;
        settings.require("decoder_act_fn", "silu")?;
        settings.require("decoder_up_block_types", ["UpDecoderBlockCausal3D"; LEVELS])?;
        for key in [
            "encoder_spatial_down_sample",
            "encoder_temporal_down_sample",
            "decoder_spatial_up_sample",
            "decoder_temporal_up_sample",
        ] {
            settings.require(key, [true, true, true, false])?;
        }
        settings.require("downsample_scale", 8)?;
        settings.require("add_post_quant_conv", true)?;
        settings.require("interpolate", false)?;
        let half = |name: &str| -> Result<([usize; LEVELS], [usize; LEVELS], usize)> {
            let channels_key = format!("{name}_block_out_channels");
            let channels: [usize; LEVELS] = settings.counts(&channels_key, 1..=MAX_CHANNELS)?;
            let resnets = settings.counts(&format!("{name}_layers_per_block"), 1..=MAX_RESNETS)?;
            let groups = settings.count(&format!("{name}_norm_num_groups"), 1..=MAX_CHANNELS)?;
            if channels.iter().any(|c| c % groups != 0) {
                return Err(settings.refuse(
                    &channels_key,
                    &format!("multiples of {name}_norm_num_groups, {groups}"),
                ));
            }
            Ok((channels, resnets, groups))
        };
        let (encoder_channels, encoder_resnets, encoder_groups) = half("encoder")?;
        let (decoder_channels, decoder_resnets, decoder_groups) = half("decoder")?;
        Ok(VaeConfig {
            latent_channels: LATENT_CHANNELS,
            encoder_channels,
            encoder_resnets,
            encoder_groups,
            decoder_channels,
            decoder_resnets,
            decoder_groups,
        })
    }
}
