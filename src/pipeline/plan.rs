//! What a run takes, from configurations alone: memory, arithmetic and traffic of each phase.

use serde::Serialize;

use super::memory::{Fit, Once, stream_states, stream_weights};
use super::predict::{Machine, Predicted, predict};
use super::tiles::{TileGrid, TileSize};
use super::transformer::{geometry, record_step};
use super::{Networks, Request, Tiling, modulation};
use crate::Result;
use crate::checkpoint::{TransformerConfig, VaeConfig};
use crate::exec::Backend;
use crate::graph::{Graph, StagedWhat};
use crate::models::dit::StepOutput;
use crate::models::vae::{Window, record_decoder, record_encoder};
use crate::models::{clip, t5};
use crate::sampler::{STAGES, SamplerRequest};
use crate::tensor::DType;
use crate::text::{CLIP_LENGTH, T5_LENGTH};

/// Memory, arithmetic and traffic of one phase of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PhasePlan {
    /// Which phase, for people.
    pub name: String,
    /// Peak of all intermediates, in bytes, with what comes in for them.
    pub arena_bytes: u64,
    /// What the intermediates of the largest graph would take without sharing memory.
    pub unshared_bytes: u64,
    /// Inputs, constants and carried frames that stay on the device, in bytes.
    pub persistent_bytes: u64,
    /// Weights of the largest network, in bf16.
    pub weight_bytes: u64,
    /// Of these the ones that stay on the device, in bytes; none on the CPU.
    pub resident_bytes: u64,
    /// Peak on the device, the driver's context excepted, in bytes.
    pub device_bytes: u64,
    /// Page-locked memory of the host, in bytes.
    pub pinned_bytes: u64,
    /// Carried frames in the scratch file, in bytes.
    pub scratch_bytes: u64,
    /// Most frames of its last level that the decoder makes at once, if it goes in pieces.
    pub frames_at_once: Option<usize>,
    /// Bytes that come in from the host over the whole phase.
    pub streamed_bytes: u64,
    /// Floating-point operations of the whole run, in matrix products.
    pub flops: u64,
    /// How long the phase takes on the machine that was named.
    pub predicted: Option<Predicted>,
}

impl PhasePlan {
    /// Memory besides the weights, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.arena_bytes + self.persistent_bytes
    }
}

/// One phase being planned.
struct Planner<'a> {
    backend: &'a dyn Backend,
    machine: Option<&'a Machine>,
    phase: PhasePlan,
}

impl<'a> Planner<'a> {
    fn new(name: &str, backend: &'a dyn Backend, machine: Option<&'a Machine>) -> Planner<'a> {
        let phase = PhasePlan { name: name.to_string(), ..PhasePlan::default() };
        Planner { backend, machine, phase }
    }

    /// A session of this phase lies in memory in this way.
    fn fit(&mut self, fit: &Fit) {
        let phase = &mut self.phase;
        if fit.device_bytes > phase.device_bytes {
            phase.arena_bytes = fit.arena_bytes;
            phase.persistent_bytes = fit.persistent_bytes;
            phase.resident_bytes = fit.resident_bytes;
            phase.device_bytes = fit.device_bytes;
        }
        phase.pinned_bytes = phase.pinned_bytes.max(fit.pinned_bytes);
        phase.scratch_bytes = phase.scratch_bytes.max(fit.scratch_bytes);
        if fit.at_once != usize::MAX {
            phase.frames_at_once = Some(fit.at_once);
        }
        if !self.backend.copies_weights() {
            (phase.resident_bytes, phase.device_bytes, phase.pinned_bytes) = (0, 0, 0);
        }
    }

    /// A graph runs `times` in this phase.
    fn run(&mut self, graph: &Graph, fit: &Fit, times: usize) {
        let plan = self.backend.plan(graph, &fit.residency);
        let phase = &mut self.phase;
        phase.unshared_bytes = phase.unshared_bytes.max(plan.total_bytes());
        phase.flops += graph.flops() * times as u64;
        let comes_in = plan.stages().iter().map(|staged| match staged.what {
            StagedWhat::Weights => staged.bytes,
            StagedWhat::State(_) if graph.continues(staged.node) => staged.bytes,
            StagedWhat::State(_) => 0,
        });
        phase.streamed_bytes += comes_in.sum::<u64>() * times as u64;
        if let Some(machine) = self.machine {
            let run = predict(graph, &plan, &fit.residency, machine);
            *phase.predicted.get_or_insert_default() += run * times as f64;
        }
    }

    fn weights(&mut self, graphs: &[&Graph]) {
        let bytes = graphs.iter().map(|g| g.weight_bytes(DType::Bf16.bytes())).sum();
        self.phase.weight_bytes = self.phase.weight_bytes.max(bytes);
    }
}

/// Plans every phase of `request` for `backend`, with prompts of full length. With a machine,
/// times are predicted.
///
/// # Errors
/// [`crate::ErrorKind::Input`] for a request that cannot be generated.
pub fn plan(
    networks: &Networks,
    request: &Request,
    backend: &dyn Backend,
    machine: Option<&Machine>,
) -> Result<Vec<PhasePlan>> {
    let (settings, _) = request.resolve()?;
    request.check_positions(&networks.transformer)?;
    let samples = if request.guidance > 0.0 { 2 } else { 1 };
    let planner = |name: &str| Planner::new(name, backend, machine);
    let mut phases = vec![text(planner("text"), networks, samples)?];
    if request.image.is_some() {
        phases.push(image(planner("image"), &networks.vae, &settings, request.tiling)?);
    }
    phases.push(sampling(planner("sampling"), &networks.transformer, &settings, samples)?);
    phases.push(decoding(planner("decoding"), &networks.vae, &settings, request.tiling)?);
    Ok(phases)
}

fn text(mut planner: Planner, networks: &Networks, samples: usize) -> Result<PhasePlan> {
    let dtype = planner.backend.activations();
    for config in &networks.clips {
        let graph = clip::record(config, CLIP_LENGTH, dtype)?;
        let fit = stream_weights(&[&graph], Once::Nothing, planner.backend);
        planner.fit(&fit);
        planner.weights(&[&graph]);
        planner.run(&graph, &fit, samples);
    }
    let graph = t5::record(&networks.t5, &vec![T5_LENGTH; samples], dtype)?;
    let fit = stream_weights(&[&graph], Once::Everything, planner.backend);
    planner.fit(&fit);
    planner.weights(&[&graph]);
    planner.run(&graph, &fit, 1);
    Ok(planner.phase)
}

fn image(
    mut planner: Planner,
    vae: &VaeConfig,
    settings: &SamplerRequest,
    tiling: Option<Tiling>,
) -> Result<PhasePlan> {
    let pixels = [settings.height, settings.width].map(|n| n * crate::models::vae::FACTOR);
    let sizes = TileGrid::over_pixels(pixels, tiling);
    let (graphs, fit) = fit_encoder(vae, &sizes, planner.backend)?;
    planner.fit(&fit);
    for (graph, size) in graphs.iter().zip(&sizes) {
        planner.weights(&[graph]);
        planner.run(graph, &fit, size.count);
    }
    Ok(planner.phase)
}

fn sampling(
    mut planner: Planner,
    config: &TransformerConfig,
    settings: &SamplerRequest,
    samples: usize,
) -> Result<PhasePlan> {
    let backend = planner.backend;
    let text_tokens = vec![T5_LENGTH; samples];
    let fit = fit_transformer(config, settings, &text_tokens, backend)?;
    planner.fit(&fit);
    let dtype = backend.activations();
    let mut step = None;
    for unit in settings.first_unit()..settings.units {
        for stage in 0..STAGES {
            let stage = settings.stage_geometry(unit, stage)?;
            let geometry = geometry(&stage, &text_tokens);
            let graph = record_step(config, &geometry, StepOutput::EulerStep, dtype)?;
            planner.run(&graph, &fit, stage.timesteps.len());
            step = Some(graph);
        }
    }
    // The table of the adaptive norms' vectors stays beside the graphs of the steps.
    let timesteps = modulation::timesteps(settings)?.len();
    let tables = modulation::record(config, timesteps, samples, dtype)?;
    for (_, graph) in &tables {
        planner.run(graph, &fit, 1);
    }
    let table = tables.first().map(|(_, graph)| graph);
    planner.weights(&step.iter().chain(table).collect::<Vec<_>>());
    Ok(planner.phase)
}

fn decoding(
    mut planner: Planner,
    vae: &VaeConfig,
    settings: &SamplerRequest,
    tiling: Option<Tiling>,
) -> Result<PhasePlan> {
    let sizes = TileGrid::over_latents([settings.height, settings.width], tiling);
    let units = settings.units;
    let fit = fit_decoder(vae, &sizes, units > 1, planner.backend)?;
    planner.fit(&fit);
    let dtype = planner.backend.activations();
    for size in &sizes {
        let windows = decoder_windows(vae, size.extent, units > 1, fit.at_once, dtype)?;
        for (graph, times) in windows.iter().zip([1, units - 1]) {
            planner.weights(&[graph]);
            planner.run(graph, &fit, times * size.count);
        }
    }
    Ok(planner.phase)
}

/// How the transformer's graphs fit, the largest of which are those of the last unit.
///
/// # Errors
/// [`crate::ErrorKind::Input`] for sizes that cannot be generated.
pub(super) fn fit_transformer(
    config: &TransformerConfig,
    settings: &SamplerRequest,
    text_tokens: &[usize],
    backend: &dyn Backend,
) -> Result<Fit> {
    let dtype = backend.activations();
    let timesteps = modulation::timesteps(settings)?.len();
    let tables = modulation::record(config, timesteps, text_tokens.len(), dtype)?;
    let unit = settings.units - 1;
    let steps: Vec<Graph> = (0..STAGES)
        .map(|stage| {
            let stage = settings.stage_geometry(unit, stage)?;
            record_step(config, &geometry(&stage, text_tokens), StepOutput::EulerStep, dtype)
        })
        .collect::<Result<_>>()?;
    let graphs: Vec<&Graph> =
        tables.first().map(|(_, graph)| graph).into_iter().chain(&steps).collect();
    Ok(stream_weights(&graphs, Once::FirstGraph, backend))
}

/// How the encoder fits for images of these sizes, with a graph for each.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub(super) fn fit_encoder(
    vae: &VaeConfig,
    sizes: &[TileSize],
    backend: &dyn Backend,
) -> Result<(Vec<Graph>, Fit)> {
    let record = |size: &TileSize| {
        let [height, width] = size.extent;
        record_encoder(vae, Window::whole(1, height, width), backend.activations())
    };
    let graphs = sizes.iter().map(record).collect::<Result<Vec<_>>>()?;
    let fit = stream_weights(&graphs.iter().collect::<Vec<_>>(), Once::Nothing, backend);
    Ok((graphs, fit))
}

/// How the decoder fits for latents of these sizes, one or (if frames are carried) more.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub(super) fn fit_decoder(
    vae: &VaeConfig,
    sizes: &[TileSize],
    carries: bool,
    backend: &dyn Backend,
) -> Result<Fit> {
    let dtype = backend.activations();
    let record = |at_once| -> Result<Vec<Graph>> {
        let windows = |size: &TileSize| decoder_windows(vae, size.extent, carries, at_once, dtype);
        Ok(sizes.iter().map(windows).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    };
    stream_states(record, backend)
}

/// The decoder's first window of one size, and the one that all others are like if there are
/// any.
fn decoder_windows(
    vae: &VaeConfig,
    [height, width]: [usize; 2],
    carries: bool,
    at_once: usize,
    dtype: DType,
) -> Result<Vec<Graph>> {
    let window =
        |continues| Window { carries, continues, at_once, ..Window::whole(1, height, width) };
    let windows = if carries { &[false, true][..] } else { &[false] };
    windows.iter().map(|&continues| record_decoder(vae, window(continues), dtype)).collect()
}
