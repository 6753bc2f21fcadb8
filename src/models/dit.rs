//! What both transformers share: how the tokens of text, history and current frame are
//! packed into rows, who attends to whom, and the steps that both record.
//!
//! Rows are ordered `[text of all samples | history of all samples | current frame of all
//! samples]`, so that text, image and current tokens are ranges of rows. Padding text is
//! left out: nothing that is used depends on it.

use std::ops::Range;
use std::sync::Arc;

use super::Record;
use super::adaptive_norm::{AdaNorm, ModulationLayout};
use super::positions::span;
use crate::graph::{
    Activation, AttentionSpec, Epilogue, Graph, HeadNorms, Op, RowGroup, Segment, TensorId,
    WeightId,
};
use crate::tensor::DType;
use crate::{Error, Result};

/// Columns of the sinusoidal timestep embedding.
pub const TIMESTEP_CHANNELS: usize = 256;
/// Size of every attention head.
pub const HEAD_SIZE: usize = 64;

/// Extent of a clip of latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clip {
    /// Latent frames.
    pub frames: usize,
    /// Latent rows (pixels / 8 at full resolution); even.
    pub height: usize,
    /// Latent columns; even.
    pub width: usize,
}

impl Clip {
    /// Rows and columns of tokens: patches of 2×2.
    pub fn grid(&self) -> [usize; 2] {
        [self.height / 2, self.width / 2]
    }

    /// Tokens of one frame.
    pub fn frame_tokens(&self) -> usize {
        self.grid().iter().product()
    }

    /// Tokens of the clip.
    pub fn tokens(&self) -> usize {
        self.frames * self.frame_tokens()
    }
}

/// What one call of the transformer sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Text tokens of each sample of the batch (guidance: negative first), each at least 1.
    pub text_tokens: Vec<usize>,
    /// History clips, oldest first.
    pub history: Vec<Clip>,
    /// The frame being denoised: one latent frame.
    pub current: Clip,
    /// Whether each sample has latents of its own; if not, all samples share them, as the
    /// halves of guidance do.
    pub separate_latents: bool,
}

/// What a step graph computes from the velocity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepOutput {
    /// Output `velocity`, `[samples, h, w, c]`.
    Velocity,
    /// Input `scalars` = (guidance, Δσ); updates the input `current` in place by one guided
    /// Euler step. Needs shared latents.
    EulerStep,
}

impl Geometry {
    /// Checks that the extents can be packed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] saying what is wrong.
    pub fn validate(&self) -> Result<()> {
        let clips = || self.history.iter().chain([&self.current]);
        let even = clips().all(|c| c.height % 2 == 0 && c.width % 2 == 0);
        let filled = clips().all(|c| c.frames * c.height * c.width > 0);
        if even && filled && self.current.frames == 1 && !self.text_tokens.contains(&0) {
            return Ok(());
        }
        Err(Error::input(format!("the transformer cannot take latents of {self:?}")))
    }

    /// Number of samples in the batch.
    pub fn samples(&self) -> usize {
        self.text_tokens.len()
    }

    fn history_tokens(&self) -> usize {
        self.history.iter().map(Clip::tokens).sum()
    }

    /// Rows of all text tokens.
    pub fn text_rows(&self) -> Range<usize> {
        0..self.text_tokens.iter().sum()
    }

    /// Rows of all image tokens: history and current.
    pub fn image_rows(&self) -> Range<usize> {
        self.text_rows().end..self.rows()
    }

    /// Rows of the current frame's tokens.
    pub fn current_rows(&self) -> Range<usize> {
        let start = self.text_rows().end + self.samples() * self.history_tokens();
        start..self.rows()
    }

    /// Number of rows of the packed batch.
    pub fn rows(&self) -> usize {
        let image = self.history_tokens() + self.current.tokens();
        self.text_rows().end + self.samples() * image
    }

    fn text_of(&self, sample: usize) -> Range<usize> {
        let start = self.text_tokens[..sample].iter().sum();
        span(start, self.text_tokens[sample])
    }

    fn history_of(&self, sample: usize) -> Range<usize> {
        span(self.text_rows().end + sample * self.history_tokens(), self.history_tokens())
    }

    fn current_of(&self, sample: usize) -> Range<usize> {
        span(self.current_rows().start + sample * self.current.tokens(), self.current.tokens())
    }

    fn text_groups(&self) -> Vec<RowGroup> {
        let group = |(sample, &rows)| RowGroup { rows, sample };
        self.text_tokens.iter().enumerate().map(group).collect()
    }

    fn equal_groups(&self, rows: usize) -> Vec<RowGroup> {
        (0..self.samples()).map(|sample| RowGroup { rows, sample }).collect()
    }

    /// Which sample the text rows belong to.
    pub fn groups_of_text(&self) -> Arc<[RowGroup]> {
        self.text_groups().into()
    }

    /// Which sample the current frame's rows belong to.
    pub fn groups_of_current(&self) -> Arc<[RowGroup]> {
        self.equal_groups(self.current.tokens()).into()
    }

    /// Which sample the image rows belong to.
    pub fn groups_of_image(&self) -> Arc<[RowGroup]> {
        let mut groups = self.equal_groups(self.history_tokens());
        groups.extend(self.equal_groups(self.current.tokens()));
        groups.into()
    }

    /// Which sample each row belongs to.
    pub fn groups_of_all(&self) -> Arc<[RowGroup]> {
        let mut groups = self.text_groups();
        groups.extend(self.groups_of_image().iter());
        groups.into()
    }

    /// The first frame's rows in `sample`: of the history if there is one.
    fn first_frame_of(&self, sample: usize) -> Range<usize> {
        match self.history.first() {
            Some(clip) => span(self.history_of(sample).start, clip.frame_tokens()),
            None => self.current_of(sample),
        }
    }

    /// Block-causal attention: text has time 0 and latent frame `f`, counted through the
    /// clips, time `f`; a query sees keys of its own sample that are not later.
    pub fn attention(&self) -> Arc<[Segment]> {
        let mut segments = Vec::new();
        for sample in 0..self.samples() {
            let text = self.text_of(sample);
            let first_frame = self.first_frame_of(sample);
            segments.push(Segment { queries: text.clone(), keys: vec![text.clone(), first_frame] });
            let history = self.history_of(sample);
            let mut start = history.start;
            for clip in &self.history {
                for _ in 0..clip.frames {
                    let queries = span(start, clip.frame_tokens());
                    start = queries.end;
                    let keys = vec![text.clone(), history.start..queries.end];
                    segments.push(Segment { queries, keys });
                }
            }
        }
        segments.extend(self.current_attention(0).iter().cloned());
        segments.into()
    }

    /// The segments of the current frame's queries, their rows counted from `origin`.
    pub fn current_attention(&self, origin: usize) -> Arc<[Segment]> {
        let segment = |sample| {
            let current = self.current_of(sample);
            let queries = current.start - origin..current.end - origin;
            let keys = [self.text_of(sample), self.history_of(sample), current];
            Segment { queries, keys: keys.into_iter().filter(|r| !r.is_empty()).collect() }
        };
        (0..self.samples()).map(segment).collect()
    }

    /// Calls `visit(clip, time of its first frame)` for the clips of one sample, history
    /// first, `None` standing for the text.
    pub(super) fn for_each_row_block(&self, mut visit: impl FnMut(Option<(&Clip, usize)>, usize)) {
        for &tokens in &self.text_tokens {
            visit(None, tokens);
        }
        let frames: usize = self.history.iter().map(|c| c.frames).sum();
        for _ in 0..self.samples() {
            let mut time = 0;
            for clip in &self.history {
                visit(Some((clip, time)), clip.tokens());
                time += clip.frames;
            }
        }
        for _ in 0..self.samples() {
            visit(Some((&self.current, frames)), self.current.tokens());
        }
    }
}

/// Rows that are normed, projected and gated together.
#[derive(Clone)]
pub(super) struct Stream {
    pub x: TensorId,
    pub groups: Arc<[RowGroup]>,
}

/// Recording state of one step graph.
pub(super) struct Step<'a> {
    pub g: Graph,
    pub geometry: &'a Geometry,
    pub layout: &'a ModulationLayout,
    pub d: usize,
    pub eps_qk: f32,
    pub modulation: TensorId,
    pub rope: TensorId,
    pub text: TensorId,
}

/// Epsilon of the layer norms.
pub(super) const LAYER_NORM_EPS: f32 = 1e-6;

impl Step<'_> {
    pub fn heads(&self) -> usize {
        self.d / HEAD_SIZE
    }

    /// A weight matrix without its bias being separate: `name.weight`, `name.bias`.
    pub fn weights(&mut self, name: &str) -> (WeightId, Option<WeightId>) {
        self.g.linear_weights(name, self.d, self.d)
    }

    /// LN(x)·(1 + scale) + shift.
    pub fn modulate(&mut self, stream: &Stream, norm: AdaNorm) -> Result<TensorId> {
        let op = Op::LayerNormModulate {
            eps: LAYER_NORM_EPS,
            shift_column: norm.shift,
            scale_column: norm.scale,
            groups: stream.groups.clone(),
        };
        self.g.push(op, &[stream.x, self.modulation])
    }

    /// `x ← x + gate · linear(input)`.
    pub fn add_gated(
        &mut self,
        stream: &Stream,
        name: &str,
        input: TensorId,
        norm: AdaNorm,
    ) -> Result<()> {
        let inner = self.g.tensor(input).cols();
        let parts = vec![self.g.linear_weights(name, self.d, inner)];
        let groups = stream.groups.clone();
        let epilogue = Epilogue::GatedAccumulate { gate_column: norm.gate, groups };
        self.g.push_into(Op::Linear { parts, epilogue }, &[input, self.modulation], stream.x)
    }

    /// `x ← x + gate · ff(LN(x)·(1 + scale) + shift)` for streams that do not share rows, each
    /// with the name of its layers.
    pub fn feed_forward(&mut self, parts: &[(&Stream, String, AdaNorm)]) -> Result<()> {
        let modulate =
            |(stream, _, norm): &(&Stream, String, AdaNorm)| self.modulate(stream, *norm);
        let normed = parts.iter().map(modulate).collect::<Result<Vec<_>>>()?;
        self.g.side_by_side(parts.len())?;
        let mut hidden = Vec::new();
        for ((_, name, _), n) in parts.iter().zip(normed) {
            let act = Epilogue::Activate(Activation::GeluTanh);
            hidden.push(self.g.linear(&format!("{name}.net.0.proj"), n, 4 * self.d, act)?);
        }
        self.g.side_by_side(parts.len())?;
        for ((stream, name, norm), hidden) in parts.iter().zip(hidden) {
            self.add_gated(stream, &format!("{name}.net.2"), hidden, *norm)?;
        }
        self.g.side_by_side(parts.len())
    }

    /// Projects `x` with `layers` side by side into `place`, whose first row is row `first` of the
    /// packed batch. Of a layer that comes with the name of a norm the heads are normed and
    /// rotated: queries and keys.
    pub fn project(
        &mut self,
        x: TensorId,
        layers: &[(String, Option<String>)],
        first: usize,
        place: TensorId,
    ) -> Result<()> {
        let rows = self.g.tensor(x).rows();
        let parts = layers.iter().map(|(name, _)| self.weights(name)).collect();
        let mut norm = |norm: &String| self.g.weight(&format!("{norm}.weight"), &[HEAD_SIZE]);
        let weights = layers.iter().map(|(_, of)| of.as_ref().map(&mut norm)).collect();
        let epilogue = Epilogue::NormHeads(HeadNorms { weights, eps: self.eps_qk });
        let table = self.g.rows(self.rope, span(first, rows));
        self.g.push_into(Op::Linear { parts, epilogue }, &[x, table], place)
    }

    /// Attention of `q` to `k` and `v`, into `place`.
    pub fn attend(
        &mut self,
        [q, k, v]: [TensorId; 3],
        segments: Arc<[Segment]>,
        place: TensorId,
    ) -> Result<()> {
        let spec = AttentionSpec {
            heads: self.heads(),
            scale: 1.0 / (HEAD_SIZE as f32).sqrt(),
            segments,
            causal: false,
            relative_bias: None,
        };
        self.g.push_into(Op::Attention(spec), &[q, k, v], place)
    }

    /// Embeds the text into its rows of `x`; declares the inputs `clip{i}` and `current`, embeds
    /// their patches with the layer `name` into the image rows, and returns the current latent.
    pub fn embed(
        &mut self,
        name: &str,
        x: TensorId,
        channels: usize,
        channels_first: bool,
        weight_shape: &[usize],
    ) -> Result<TensorId> {
        let samples = self.geometry.samples();
        let copies = if self.geometry.separate_latents { samples } else { 1 };
        let weight = self.g.weight(&format!("{name}.weight"), weight_shape);
        let bias = self.g.weight(&format!("{name}.bias"), &[self.d]);
        self.g.scope(name);
        let mut current = None;
        let mut patches = Vec::new();
        let clips = || self.geometry.history.iter().chain([&self.geometry.current]);
        for (i, clip) in clips().enumerate() {
            let is_current = i == self.geometry.history.len();
            let label = if is_current { "current".into() } else { format!("clip{i}") };
            let shape = [copies * clip.frames, clip.height, clip.width, channels];
            let latent = self.g.input(&label, &shape, DType::F32);
            current = is_current.then_some(latent);
            let dtype = self.g.tensor(x).dtype;
            patches.push(self.g.push_as(Op::Patchify { channels_first }, &[latent], dtype)?);
        }
        self.g.scope("context_embedder");
        let text_dim = self.g.tensor(self.text).cols();
        let parts = vec![self.g.linear_weights("context_embedder", self.d, text_dim)];
        let place = self.g.rows(x, self.geometry.text_rows());
        self.g.push_into(Op::Linear { parts, epilogue: Epilogue::Store }, &[self.text], place)?;
        self.g.scope(name);
        let mut first = 0;
        let count = samples * patches.len();
        for (clip, patches) in clips().zip(patches) {
            for sample in 0..samples {
                let of = if self.geometry.separate_latents { sample } else { 0 };
                let source = self.g.rows(patches, span(of * clip.tokens(), clip.tokens()));
                let rows = if first == self.geometry.history_tokens() {
                    self.geometry.current_of(sample)
                } else {
                    span(self.geometry.history_of(sample).start + first, clip.tokens())
                };
                let place = self.g.rows(x, rows);
                let parts = vec![(weight, Some(bias))];
                let op = Op::Linear { parts, epilogue: Epilogue::Store };
                self.g.push_into(op, &[source], place)?;
            }
            first += clip.tokens();
        }
        self.g.side_by_side(count)?;
        current.ok_or_else(|| Error::input("the transformer needs a current frame"))
    }

    /// norm_out, proj_out and unpatchify of the current frame, then what was asked for.
    pub fn finish(&mut self, x: TensorId, current: TensorId, output: StepOutput) -> Result<()> {
        self.g.scope("norm_out");
        let norm = AdaNorm::continuous(self.layout.start("norm_out"), self.d);
        let stream = Stream {
            x: self.g.rows(x, self.geometry.current_rows()),
            groups: self.geometry.groups_of_current(),
        };
        let n = self.modulate(&stream, norm)?;
        self.g.scope("proj_out");
        let channels = self.g.tensor(current).cols();
        let tokens = self.g.linear("proj_out", n, 4 * channels, Epilogue::Store)?;
        let Clip { height, width, .. } = self.geometry.current;
        let velocity =
            self.g.empty(&[self.geometry.samples(), height, width, channels], DType::F32);
        self.g.push_into(Op::Unpatchify, &[tokens], velocity)?;
        match output {
            StepOutput::Velocity => self.g.mark_output("velocity", velocity),
            StepOutput::EulerStep => {
                let scalars = self.g.input("scalars", &[2], DType::F32);
                self.g.push_into(Op::GuidedEuler, &[velocity, scalars], current)?;
            }
        }
        Ok(())
    }
}
