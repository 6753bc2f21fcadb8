//! Runs that are timed phase by phase, and what each kind of op takes of them: the real way
//! through, with a checkpoint's weights or with random ones of the published sizes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::memory::{Once, stream_weights};
use super::plan::{fit_decoder, fit_transformer};
use super::prompts::EncodedPrompt;
use super::tiles::TileGrid;
use super::transformer::{Transformer, geometry, record_step};
use super::vae::Vae;
use super::{Networks, Request, transformer};
use crate::checkpoint::Component;
use crate::exec::{Backend, Session, anonymous_memory};
use crate::graph::{Epilogue, Graph, Node, Op};
use crate::models::dit::StepOutput;
use crate::models::vae::{Window, record_decoder};
use crate::models::{ExpectedWeight, clip, t5, vae};
use crate::sampler::{Latent, Observer, PhiloxNoise, STAGES, sample};
use crate::tensor::{DType, WeightSource, WeightView};
use crate::text::{CLIP_LENGTH, T5_LENGTH};
use crate::{ErrorKind, Result};

/// T5 tokens of the negative prompt and of the prompt, end marks included: the published
/// negative prompt has about so many, and so has a sentence with the published suffix.
const TEXT_TOKENS: [usize; 2] = [57, 40];

/// One phase of a measured run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PhaseTime {
    /// Which phase.
    pub name: &'static str,
    /// Wall-clock seconds, loading the weights apart.
    pub seconds: f64,
    /// Seconds to bring the weights to the device and to make the first plan.
    pub loading: f64,
    /// Floating-point operations in matrix products; pairs that are masked do not count.
    pub flops: u64,
    /// Memory of the device in use at the end of the phase, in bytes, if it can be told.
    pub memory: Option<u64>,
    /// The same after each unit of the phase: a latent that was sampled, or its frames.
    pub memory_of_units: Vec<u64>,
    /// Memory of the host that no file stands behind, in bytes, at that time.
    pub host_memory: Option<u64>,
    /// Page-locked memory of the host among it, or beside it, in bytes.
    pub pinned: u64,
    /// Carried frames in the scratch file, in bytes.
    pub scratch: u64,
}

/// What one kind of op takes in one graph.
#[derive(Debug, Clone, Serialize)]
pub struct OpTime {
    /// The graph: a stage of the last unit, or a window of the decoder.
    pub graph: String,
    /// The op.
    pub op: &'static str,
    /// Nodes of this op.
    pub nodes: usize,
    /// Their seconds together.
    pub seconds: f64,
    /// Their operations in matrix products.
    pub flops: u64,
    /// Bytes that they must read and write.
    pub bytes: u64,
    /// Seconds that each of them would take at least by the [`Ceilings`], together.
    pub floor: Option<f64>,
}

/// How fast the device is at what it does best.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Floating-point operations per second of a large matrix product.
    pub flops: f64,
    /// Bytes per second of a large copy, read and written ones counted.
    pub bytes: f64,
}

impl Ceilings {
    /// Rows, columns and inner dimension of the product.
    const EXTENT: usize = 8192;
    const REPEATS: usize = 9;

    /// Measures them, on devices with memory of their own and room for some 1.5 GB.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn measure(backend: &dyn Backend) -> Result<Option<Ceilings>> {
        match Self::measure_with_room(backend) {
            Err(error) if error.kind() == ErrorKind::Memory => Ok(None),
            found => found,
        }
    }

    fn measure_with_room(backend: &dyn Backend) -> Result<Option<Ceilings>> {
        let Some(bytes) = backend.copy_rate()? else { return Ok(None) };
        let n = Self::EXTENT;
        let mut graph = Graph::new();
        let x = graph.input("x", &[n, n], backend.activations());
        let parts = vec![(graph.weight("w", &[n, n]), None)];
        let y = graph.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[x])?;
        graph.mark_output("y", y);
        let flops = graph.flops() as f64;
        let mut session = backend.open(RandomWeights::of(vec![("w".into(), vec![n, n])]))?;
        let graph = session.add(graph)?;
        let values: Vec<f32> = random_values(1).take(n * n).collect();
        session.write(graph, x, &values)?;
        let mut seconds = session.time(graph, Self::REPEATS)?;
        seconds.sort_by(f64::total_cmp);
        Ok(Some(Ceilings { flops: flops / seconds[Self::REPEATS / 2], bytes }))
    }

    fn floor(&self, flops: u64, bytes: u64) -> f64 {
        (flops as f64 / self.flops).max(bytes as f64 / self.bytes)
    }
}

/// A measured run.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Text, sampling, decoding.
    pub phases: Vec<PhaseTime>,
    /// What the ops take in the graphs of the last unit.
    pub ops: Vec<OpTime>,
    /// What they are held to.
    pub ceilings: Option<Ceilings>,
    /// A hash of all latents and of the first frames: the same where the results are.
    pub digest: String,
}

/// Where the weights of a component come from.
pub type WeightsOf<'a> = dyn Fn(Component) -> Result<Arc<dyn WeightSource>> + 'a;

/// Generates what `request` asks for and throws the frames away, with prompts of usual length
/// that are made up. Ops are held to `ceilings`.
///
/// # Errors
/// Those of [`Request::resolve`], of the weights and of the backend.
pub fn measure(
    networks: &Networks,
    weights: &WeightsOf<'_>,
    request: &Request,
    backend: &dyn Backend,
    ceilings: Option<Ceilings>,
    mut phase_done: impl FnMut(&PhaseTime),
) -> Result<Measured> {
    let free = backend.free_memory();
    let used = || Some(free?.saturating_sub(backend.free_memory()?));
    let (phases, ops, digest) = (Vec::new(), Vec::new(), String::new());
    let mut measured = Measured { phases, ops, ceilings, digest };
    let mut add = |measured: &mut Measured, phase: PhaseTime| {
        phase_done(&phase);
        measured.phases.push(phase);
    };
    add(&mut measured, text(networks, weights, backend, &used)?);

    let (settings, _) = request.resolve()?;
    let samples = if request.guidance > 0.0 { 2 } else { 1 };
    let config = &networks.transformer;
    let prompts: Vec<EncodedPrompt> =
        TEXT_TOKENS[2 - samples..].iter().map(|&tokens| prompt(tokens, networks)).collect();
    let transformer = weights(Component::Transformer)?;
    let dtype = backend.activations();

    let clock = Instant::now();
    let text_tokens: Vec<usize> = prompts.iter().map(|p| p.tokens).collect();
    let fit = fit_transformer(config, &settings, &text_tokens, backend)?;
    fit.require(backend, "sampling")?;
    let session = backend.open_with(transformer.clone(), &fit.residency)?;
    let mut denoiser = Transformer::new(config, session, dtype, &prompts, &settings)?;
    let loading = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let mut noise = PhiloxNoise { seed: request.seed };
    let mut units = UsedAfterUnits { used: &used, bytes: Vec::new() };
    let latents = sample(&settings, Vec::new(), &mut denoiser, &mut noise, &mut units)?;
    let memory_of_units = units.bytes;
    let seconds = clock.elapsed().as_secs_f64();
    let (memory, host_memory) = (used(), anonymous_memory());
    drop(denoiser);

    let mut flops = 0;
    let mut session = backend.open_with(transformer, &fit.residency)?;
    for unit in settings.first_unit()..settings.units {
        for stage in 0..STAGES {
            let at = settings.stage_geometry(unit, stage)?;
            let graph =
                record_step(config, &geometry(&at, &text_tokens), StepOutput::EulerStep, dtype)?;
            flops += graph.flops() * at.timesteps.len() as u64;
            if unit + 1 == settings.units {
                let name = format!("stage {} of the last unit", stage + 1);
                let ops = profile(&mut *session, name, graph, measured.ceilings)?;
                measured.ops.extend(ops);
            }
        }
    }
    drop(session);
    let phase = PhaseTime {
        name: "sampling",
        seconds,
        loading,
        flops,
        memory,
        memory_of_units,
        host_memory,
        pinned: fit.pinned_bytes,
        scratch: fit.scratch_bytes,
    };
    add(&mut measured, phase);
    decode(networks, weights, backend, &latents, &used, &mut measured, add)?;
    Ok(measured)
}

/// Notes what is in use whenever a unit is done.
struct UsedAfterUnits<'a> {
    used: &'a dyn Fn() -> Option<u64>,
    bytes: Vec<u64>,
}

impl Observer for UsedAfterUnits<'_> {
    fn unit_finished(&mut self, _unit: usize, _latent: &Latent) -> Result<()> {
        self.bytes.extend((self.used)());
        Ok(())
    }
}

fn text(
    networks: &Networks,
    weights: &WeightsOf<'_>,
    backend: &dyn Backend,
    used: &dyn Fn() -> Option<u64>,
) -> Result<PhaseTime> {
    let dtype = backend.activations();
    // Prompt and negative prompt: one after the other, and through T5 together.
    let both = t5::record(&networks.t5, &[T5_LENGTH; 2], dtype)?;
    let mut encoders = vec![(Component::T5, both, Once::Everything, 1)];
    for (component, config) in [Component::ClipL, Component::ClipG].into_iter().zip(&networks.clips)
    {
        let graph = clip::record(config, CLIP_LENGTH, dtype)?;
        encoders.push((component, graph, Once::Nothing, 2));
    }
    let mut phase = PhaseTime { name: "text", ..PhaseTime::default() };
    for (component, graph, once, times) in encoders {
        phase.flops += graph.flops() * times as u64;
        let weights = weights(component)?;
        let clock = Instant::now();
        let fit = stream_weights(&[&graph], once, backend);
        fit.require(backend, "text")?;
        let mut session = backend.open_with(weights, &fit.residency)?;
        let graph = session.add(graph)?;
        phase.loading += clock.elapsed().as_secs_f64();
        phase.seconds += session.time(graph, times)?.iter().sum::<f64>();
        phase.memory = phase.memory.max(used());
        phase.host_memory = phase.host_memory.max(anonymous_memory());
        phase.pinned = phase.pinned.max(fit.pinned_bytes);
    }
    Ok(phase)
}

fn decode(
    networks: &Networks,
    weights: &WeightsOf<'_>,
    backend: &dyn Backend,
    latents: &[Latent],
    used: &dyn Fn() -> Option<u64>,
    measured: &mut Measured,
    mut add: impl FnMut(&mut Measured, PhaseTime),
) -> Result<()> {
    let dtype = backend.activations();
    let weights = weights(Component::Vae)?;
    let shape = latents.first().map_or_else(|| unreachable!("a run has units"), |l| l.shape());
    let sizes = TileGrid::over_latents([shape.height, shape.width], None);
    let fit = fit_decoder(&networks.vae, &sizes, latents.len() > 1, backend)?;
    fit.require(backend, "decoding")?;
    let window = |continues| Window {
        continues,
        carries: latents.len() > 1,
        at_once: fit.at_once,
        ..Window::whole(1, shape.height, shape.width)
    };
    let graphs =
        [false, true].map(|continues| record_decoder(&networks.vae, window(continues), dtype));
    let [first, next] = graphs;
    let (first, next) = (first?, next?);
    let flops = first.flops() + next.flops() * (latents.len() as u64 - 1);
    let clock = Instant::now();
    let mut session = backend.open_with(weights.clone(), &fit.residency)?;
    let name = "decoding one latent".to_string();
    measured.ops.extend(profile(&mut *session, name, next, measured.ceilings)?);
    drop(session);

    let mut decoder = Vae::new(backend, &networks.vae, weights);
    // Weights and plans come with the first windows.
    let mut hash = Sha256::new();
    for latent in latents {
        hash.update(bytemuck::cast_slice::<f32, u8>(latent.data()));
    }
    decoder.decode(&latents[..latents.len().min(3)], None, |frame| {
        hash.update(frame.data());
        Ok(())
    })?;
    measured.digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let loading = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let mut units = UsedAfterUnits { used, bytes: Vec::new() };
    let mut frames = 0;
    decoder.decode(latents, None, |_| {
        // The first latent is one frame, the others are eight.
        if frames % vae::FACTOR == 0 {
            units.bytes.extend(used());
        }
        frames += 1;
        Ok(())
    })?;
    let seconds = clock.elapsed().as_secs_f64();
    let phase = PhaseTime {
        name: "decoding",
        seconds,
        loading,
        flops,
        memory: used(),
        memory_of_units: units.bytes,
        host_memory: anonymous_memory(),
        pinned: fit.pinned_bytes,
        scratch: fit.scratch_bytes,
    };
    add(measured, phase);
    Ok(())
}

/// The seconds of each kind of op in `graph`, longest first.
fn profile(
    session: &mut dyn Session,
    name: String,
    graph: Graph,
    ceilings: Option<Ceilings>,
) -> Result<Vec<OpTime>> {
    let work = |n: &Node| (n.op.name(), n.op.flops(&graph, n), n.op.bytes(&graph, n));
    let nodes: Vec<_> = graph.nodes().iter().map(work).collect();
    let id = session.add(graph)?;
    let seconds = session.profile(id)?;
    session.remove(id);
    let mut ops: BTreeMap<&'static str, OpTime> = BTreeMap::new();
    for ((op, flops, bytes), seconds) in nodes.into_iter().zip(seconds) {
        let entry = ops.entry(op).or_insert_with(|| OpTime {
            graph: name.clone(),
            op,
            nodes: 0,
            seconds: 0.0,
            flops: 0,
            bytes: 0,
            floor: ceilings.map(|_| 0.0),
        });
        entry.nodes += 1;
        entry.seconds += seconds;
        entry.flops += flops;
        entry.bytes += bytes;
        if let (Some(floor), Some(ceilings)) = (&mut entry.floor, ceilings) {
            *floor += ceilings.floor(flops, bytes);
        }
    }
    let mut ops: Vec<_> = ops.into_values().collect();
    ops.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(ops)
}

/// A prompt of `tokens` tokens, encoded to small random values.
fn prompt(tokens: usize, networks: &Networks) -> EncodedPrompt {
    let mut values = random_values(tokens as u64);
    let mut take = |n: usize| (&mut values).take(n).collect();
    EncodedPrompt {
        embeds: take(tokens * networks.transformer.text_dim()),
        tokens,
        pooled: take(networks.transformer.pooled_dim()),
    }
}

/// Values in ±0.05: with them activations stay finite through every network.
fn random_values(seed: u64) -> impl Iterator<Item = f32> {
    // The 64-bit generator of Steele, Lea and Flood, "Fast splittable pseudorandom number
    // generators" (2014); any would do.
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1
    })
}

/// Random weights for all networks: as heavy to multiply with as real ones.
pub fn random_weights(
    networks: &Networks,
) -> impl Fn(Component) -> Result<Arc<dyn WeightSource>> + use<> {
    let networks = networks.clone();
    move |component| {
        let expected = match component {
            Component::Transformer => transformer::expected_weights(&networks.transformer)?,
            Component::Vae => vae::expected_weights(&networks.vae)?,
            Component::T5 => t5::expected_weights(&networks.t5)?,
            Component::ClipL | Component::ClipG => {
                let index = usize::from(component == Component::ClipG);
                let found = networks.clips.get(index);
                let missing = || crate::Error::model(format!("the networks have no {component}"));
                clip::expected_weights(found.ok_or_else(missing)?)?
            }
        };
        Ok(RandomWeights::of(expected))
    }
}

/// Weights of given names and shapes that all show the same random values, so that they take
/// no more memory than the largest of them.
struct RandomWeights {
    shapes: HashMap<String, Vec<usize>>,
    bytes: Vec<u8>,
}

impl RandomWeights {
    fn of(expected: Vec<ExpectedWeight>) -> Arc<RandomWeights> {
        let largest = expected.iter().map(|(_, shape)| shape.iter().product()).max();
        let values = random_values(0).take(largest.unwrap_or(0));
        let bytes = values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
        Arc::new(RandomWeights { shapes: expected.into_iter().collect(), bytes })
    }
}

impl WeightSource for RandomWeights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        let shape = self
            .shapes
            .get(name)
            .ok_or_else(|| crate::Error::model(format!("the networks have no weight {name:?}")))?;
        let elements: usize = shape.iter().product();
        Ok(WeightView { dtype: DType::Bf16, shape, bytes: &self.bytes[..2 * elements] })
    }
}
