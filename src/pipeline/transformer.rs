//! The transformer as the sampler sees it.

use std::sync::Arc;

use super::entrance::Entrances;
use super::modulation::ModulationTable;
use super::plan::fit_transformer;
use super::prompts::EncodedPrompt;
use crate::checkpoint::TransformerConfig;
use crate::exec::{Backend, GraphId, Session};
use crate::graph::{Graph, TensorId};
use crate::models::adaptive_norm::ModulationLayout;
use crate::models::dit::{Clip, Geometry, StepOutput};
use crate::models::{ExpectedWeight, flux, mmdit};
use crate::sampler::{Denoiser, Entry, Latent, LatentShape, SamplerRequest, StageGeometry, Step};
use crate::tensor::{DType, WeightSource};
use crate::{Error, ErrorKind, Result};

/// Records one call of the configured transformer.
///
/// # Errors
/// [`crate::ErrorKind::Input`] for a geometry that cannot be packed.
pub fn record_step(
    config: &TransformerConfig,
    geometry: &Geometry,
    output: StepOutput,
    dtype: DType,
) -> Result<Graph> {
    match config {
        TransformerConfig::Mmdit(c) => mmdit::record_step(c, geometry, output, dtype),
        TransformerConfig::Flux(c) => flux::record_step(c, geometry, output, dtype),
    }
}

/// Where the adaptive-norm vectors of the configured transformer lie.
pub fn modulation_layout(config: &TransformerConfig) -> ModulationLayout {
    match config {
        TransformerConfig::Mmdit(c) => mmdit::modulation_layout(c),
        TransformerConfig::Flux(c) => flux::modulation_layout(c),
    }
}

/// Every weight of the configured transformer.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &TransformerConfig) -> Result<Vec<ExpectedWeight>> {
    match config {
        TransformerConfig::Mmdit(c) => mmdit::expected_weights(c),
        TransformerConfig::Flux(c) => flux::expected_weights(c),
    }
}

/// What the transformer packs in one stage of one unit.
pub fn geometry(stage: &StageGeometry, text_tokens: &[usize]) -> Geometry {
    let clip = |s: &LatentShape| Clip { frames: s.frames, height: s.height, width: s.width };
    Geometry {
        text_tokens: text_tokens.to_vec(),
        history: stage.history.iter().map(clip).collect(),
        current: clip(&stage.shape),
        separate_latents: false,
    }
}

/// Opens a session on the transformer's weights that has room for a run with `prompts`:
/// where there is not room for all of them, weights are streamed.
///
/// # Errors
/// [`crate::ErrorKind::Memory`] when even that does not fit, and those of the backend.
pub(super) fn open(
    backend: &dyn Backend,
    weights: Arc<dyn WeightSource>,
    config: &TransformerConfig,
    prompts: &[EncodedPrompt],
    request: &SamplerRequest,
) -> Result<Box<dyn Session>> {
    let text_tokens: Vec<usize> = prompts.iter().map(|p| p.tokens).collect();
    let fit = fit_transformer(config, request, &text_tokens, backend)?;
    fit.require(backend, "sampling")?;
    backend.open_with(weights, &fit.residency)
}

/// The graph of the current stage and its inputs.
struct Stage {
    graph: GraphId,
    modulation: TensorId,
    current: TensorId,
    scalars: TensorId,
    shape: LatentShape,
    rounded: bool,
}

/// Runs the transformer for the sampler. All adaptive-norm vectors are computed first:
/// they depend on the timestep and the pooled prompts only. The latent stays in the session
/// from one stage to the next.
pub struct Transformer<'a> {
    config: &'a TransformerConfig,
    session: Box<dyn Session>,
    dtype: DType,
    text_tokens: Vec<usize>,
    text: Vec<f32>,
    modulation: ModulationTable,
    entrances: Entrances,
    stage: Option<Stage>,
    /// A stage that was announced, and what it looks like.
    expected: Option<(StageGeometry, Stage)>,
}

impl<'a> Transformer<'a> {
    /// Prepares a run. `prompts` are the samples of the batch: negative and positive, or the
    /// positive one alone without guidance.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn new(
        config: &'a TransformerConfig,
        mut session: Box<dyn Session>,
        dtype: DType,
        prompts: &[EncodedPrompt],
        request: &SamplerRequest,
    ) -> Result<Transformer<'a>> {
        let modulation = ModulationTable::compute(config, &mut *session, dtype, prompts, request)?;
        Ok(Transformer {
            config,
            session,
            dtype,
            text_tokens: prompts.iter().map(|p| p.tokens).collect(),
            text: prompts.iter().flat_map(|p| p.embeds.iter().copied()).collect(),
            modulation,
            entrances: Entrances::default(),
            stage: None,
            expected: None,
        })
    }

    /// Plans the steps of a stage, with the text written.
    fn add_stage(&mut self, stage: &StageGeometry) -> Result<Stage> {
        let geometry = geometry(stage, &self.text_tokens);
        let graph = record_step(self.config, &geometry, StepOutput::EulerStep, self.dtype)?;
        let graph = self.session.add(graph)?;
        let text = self.session.find(graph, "text")?;
        self.session.write(graph, text, &self.text)?;
        Ok(Stage {
            graph,
            modulation: self.session.find(graph, "modulation")?,
            current: self.session.find(graph, "current")?,
            scalars: self.session.find(graph, "scalars")?,
            shape: stage.shape,
            rounded: stage.rounded,
        })
    }

    fn stage(&self) -> Result<&Stage> {
        self.stage.as_ref().ok_or_else(|| Error::usage("no stage was begun"))
    }

    /// Rounds the latent where that is asked for: on the host, since only comparisons with
    /// other programs do.
    fn round(&mut self) -> Result<()> {
        if !self.stage()?.rounded {
            return Ok(());
        }
        let mut x = self.latent()?;
        x.round_to_bf16();
        let &Stage { graph, current, .. } = self.stage()?;
        self.session.write(graph, current, x.data())
    }
}

impl Denoiser for Transformer<'_> {
    fn begin_stage(
        &mut self,
        stage: &StageGeometry,
        history: &[Latent],
        entry: &Entry,
    ) -> Result<()> {
        let previous = self.stage.take();
        let below = previous.as_ref().map(|p| (p.graph, p.current));
        let entrance = self.entrances.prepare(&mut *self.session, entry, below)?;
        if let Some(previous) = previous {
            self.session.remove(previous.graph);
        }
        let begun = match self.expected.take() {
            Some((geometry, expected)) if geometry == *stage => expected,
            other => {
                other.into_iter().for_each(|(_, stage)| self.session.remove(stage.graph));
                self.add_stage(stage)?
            }
        };
        for (i, clip) in history.iter().enumerate() {
            let input = self.session.find(begun.graph, &format!("clip{i}"))?;
            self.session.write(begun.graph, input, clip.data())?;
        }
        // Only now: adding a graph may move what others left in the arena.
        self.session.run(entrance)?;
        let x = self.session.find(entrance, "x")?;
        self.session.copy((entrance, x), 0, (begun.graph, begun.current))?;
        self.stage = Some(begun);
        self.round()
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let &Stage { graph, modulation, scalars, .. } = self.stage()?;
        let row = self
            .modulation
            .row(step.timestep)
            .ok_or_else(|| Error::usage("the sampler took a step that no stage announced"))?;
        let session = &mut self.session;
        session.copy(self.modulation.place(), row, (graph, modulation))?;
        session.write(graph, scalars, &[step.guidance.unwrap_or(0.0), step.dsigma])?;
        session.run(graph)?;
        self.round()
    }

    fn expect_stage(&mut self, next: &StageGeometry) -> Result<()> {
        match self.add_stage(next) {
            Ok(stage) => {
                if let Some((_, stale)) = self.expected.replace((next.clone(), stage)) {
                    self.session.remove(stale.graph);
                }
                Ok(())
            }
            // There may be room once the present stage is over, and that should end well.
            Err(e) if e.kind() == ErrorKind::Memory => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn latent(&mut self) -> Result<Latent> {
        let &Stage { graph, current, shape, .. } = self.stage()?;
        Latent::new(shape, self.session.read(graph, current)?)
    }
}
