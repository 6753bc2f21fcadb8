//! What a run takes, from configurations alone: memory and arithmetic of each phase.

use serde::Serialize;

use super::Request;
use super::modulation;
use super::transformer::{geometry, record_step};
use crate::Result;
use crate::checkpoint::{
    Checkpoint, ClipActivation, ClipConfig, Family, FluxConfig, MmditConfig, T5Config,
    TransformerConfig, VaeConfig,
};
use crate::exec::Backend;
use crate::graph::Graph;
use crate::models::dit::StepOutput;
use crate::models::vae::{Window, record_decoder, record_encoder};
use crate::models::{clip, t5};
use crate::sampler::STAGES;
use crate::tensor::DType;
use crate::text::{CLIP_LENGTH, T5_LENGTH};

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

/// Memory and arithmetic of one phase of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PhasePlan {
    /// Which phase, for people.
    pub name: String,
    /// Peak of all intermediates, in bytes.
    pub arena_bytes: u64,
    /// What the intermediates of the largest graph would take without sharing memory.
    pub unshared_bytes: u64,
    /// Inputs, constants and carried frames, in bytes.
    pub persistent_bytes: u64,
    /// Weights of the largest network, in bf16.
    pub weight_bytes: u64,
    /// Floating-point operations of the whole run, in matrix products.
    pub flops: u64,
}

impl PhasePlan {
    /// Memory besides the weights, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.arena_bytes + self.persistent_bytes
    }

    /// Takes a graph that runs `times` in this phase into account.
    fn add(&mut self, graph: &Graph, backend: &dyn Backend, times: usize) {
        let plan = backend.plan(graph);
        if plan.arena_bytes() > self.arena_bytes {
            self.arena_bytes = plan.arena_bytes();
            self.unshared_bytes = plan.total_bytes();
        }
        self.persistent_bytes = self.persistent_bytes.max(plan.persistent_bytes());
        self.weight_bytes = self.weight_bytes.max(graph.weight_bytes(DType::Bf16.bytes()));
        self.flops += graph.flops() * times as u64;
    }
}

/// Plans every phase of `request` for `backend`, with prompts of full length.
///
/// # Errors
/// [`crate::ErrorKind::Input`] for a request that cannot be generated.
pub fn plan(
    networks: &Networks,
    request: &Request,
    backend: &dyn Backend,
) -> Result<Vec<PhasePlan>> {
    let (settings, _) = request.resolve()?;
    request.check_positions(&networks.transformer)?;
    let dtype = backend.activations();
    let samples = if request.guidance > 0.0 { 2 } else { 1 };

    let mut text = phase("text");
    for config in &networks.clips {
        text.add(&clip::record(config, CLIP_LENGTH, dtype)?, backend, samples);
    }
    text.add(&t5::record(&networks.t5, T5_LENGTH, dtype)?, backend, samples);

    let window = |continues, carries| Window {
        frames: 1,
        height: settings.height,
        width: settings.width,
        continues,
        carries,
        at_once: usize::MAX,
    };
    let mut phases = vec![text];
    if request.image.is_some() {
        let mut image = phase("image");
        let pixels = Window::whole(1, request.height as usize, request.width as usize);
        image.add(&record_encoder(&networks.vae, pixels, dtype)?, backend, 1);
        phases.push(image);
    }

    let mut sampling = phase("sampling");
    let config = &networks.transformer;
    let text_tokens = vec![T5_LENGTH; samples];
    for unit in settings.first_unit()..settings.units {
        for stage in 0..STAGES {
            let stage = settings.stage_geometry(unit, stage)?;
            let geometry = geometry(&stage, &text_tokens);
            let graph = record_step(config, &geometry, StepOutput::EulerStep, dtype)?;
            sampling.add(&graph, backend, stage.timesteps.len());
        }
    }
    // The table of the adaptive norms' vectors stays beside the graphs of the steps.
    let mut table = phase("table");
    let timesteps = modulation::timesteps(&settings)?.len();
    for (_, graph) in modulation::record(config, timesteps, samples, dtype)? {
        table.add(&graph, backend, 1);
    }
    if table.arena_bytes > sampling.arena_bytes {
        sampling.arena_bytes = table.arena_bytes;
        sampling.unshared_bytes = table.unshared_bytes;
    }
    sampling.persistent_bytes += table.persistent_bytes;
    sampling.weight_bytes += table.weight_bytes;
    sampling.flops += table.flops;
    phases.push(sampling);

    let mut decoding = phase("decoding");
    let carries = settings.units > 1;
    decoding.add(&record_decoder(&networks.vae, window(false, carries), dtype)?, backend, 1);
    if carries {
        let next = record_decoder(&networks.vae, window(true, true), dtype)?;
        decoding.add(&next, backend, settings.units - 1);
    }
    phases.push(decoding);
    Ok(phases)
}

fn phase(name: &str) -> PhasePlan {
    PhasePlan { name: name.to_string(), ..PhasePlan::default() }
}
