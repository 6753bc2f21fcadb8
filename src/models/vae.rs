//! The causal video VAE: 16 latent channels, 8× in space and time.
//!
//! Encoder and decoder are recorded for one *window* of a video. A window that does not
//! start the video continues from the frames its convolutions carried, which gives exactly
//! the result of the whole video at once. Within a window the decoder can take its last
//! level, the largest by far, in pieces of a few frames in the same way.

use std::sync::Arc;

use super::{ExpectedWeight, Record, collect_weights};
use crate::Result;
use crate::checkpoint::VaeConfig;
use crate::graph::{AttentionSpec, ConvSpec, Epilogue, Graph, Op, Segment, Shuffle, TensorId};
use crate::tensor::DType;

/// Pixels per latent in height and width, and frames per latent after the first.
pub const FACTOR: usize = 8;
/// Epsilon of the group norms.
const EPS: f32 = 1e-6;

/// One piece of a video in time, given to the encoder or the decoder at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Frames of the input: latent frames to decode, video frames to encode.
    pub frames: usize,
    /// Height of the input.
    pub height: usize,
    /// Width of the input.
    pub width: usize,
    /// Whether the window continues the one run before it.
    pub continues: bool,
    /// Whether the next window continues this one.
    pub carries: bool,
    /// Most frames of its last level that the decoder makes at once, 1 or an even number, and
    /// twice as many of each level before: fewer take less memory and give the same bits.
    pub at_once: usize,
}

impl Window {
    /// A whole video.
    pub fn whole(frames: usize, height: usize, width: usize) -> Window {
        Window { frames, height, width, continues: false, carries: false, at_once: usize::MAX }
    }
}

/// Video frames that `latents` latent frames decode to: `8·(latents − 1) + 1`.
pub fn video_frames(latents: usize) -> usize {
    (latents * FACTOR + 1).saturating_sub(FACTOR)
}

/// Records the decoder: input `latents` `[t, h, w, 16]` (already unscaled), output `video`
/// `[frames, 8h, 8w, 3]` in −1 … 1.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub fn record_decoder(config: &VaeConfig, window: Window, dtype: DType) -> Result<Graph> {
    let shape = [window.frames, window.height, window.width, config.latent_channels];
    let (mut r, x) = Recorder::new("latents", &shape, window, config.decoder_groups, dtype);
    let channels: Vec<usize> = config.decoder_channels.iter().rev().copied().collect();
    let x = r.conv("post_quant_conv.conv", x, config.latent_channels, Conv::pointwise())?;
    let x = r.conv("decoder.conv_in.conv", x, channels[0], Conv::same())?;
    let x = r.mid_block("decoder.mid_block", x)?;
    let before = if window.continues { 0 } else { FACTOR - 1 };
    let shape = [window.frames * FACTOR - before, window.height * FACTOR, window.width * FACTOR, 3];
    let video = r.g.empty(&shape, dtype);
    let mut up = UpBlocks { config, channels, video, done: 0 };
    up.record(&mut r, 0, x)?;
    r.g.mark_output("video", video);
    Ok(r.g)
}

/// The decoder's levels.
struct UpBlocks<'a> {
    config: &'a VaeConfig,
    channels: Vec<usize>,
    video: TensorId,
    /// Frames of `video` that have been recorded.
    done: usize,
}

impl UpBlocks<'_> {
    /// Records level `b` and all levels after it for the frames `x`.
    fn record(&mut self, r: &mut Recorder, b: usize, mut x: TensorId) -> Result<()> {
        let (name, width) = (format!("decoder.up_blocks.{b}"), self.channels[b]);
        for i in 0..self.config.decoder_resnets[b] {
            x = r.resnet(&format!("{name}.resnets.{i}"), x, width)?;
        }
        if b + 1 == self.channels.len() {
            return self.finish(r, x);
        }
        let whole = r.window;
        let frames = r.g.tensor(x).shape[0];
        // Frames that the next level makes at once; it doubles them.
        let deeper = self.channels.len() - (b + 2);
        let most = whole.at_once.saturating_mul(1 << deeper);
        let piece = frames.min((most / 2).max(1));
        for start in (0..frames).step_by(piece) {
            let end = frames.min(start + piece);
            r.window.continues = whole.continues || start > 0;
            r.window.carries = whole.carries || end < frames;
            let part = if piece == frames { x } else { r.g.frames(x, start..end) };
            let space = Conv { shuffle: Shuffle::Space, ..Conv::same() };
            let y = r.conv(&format!("{name}.upsamplers.0.conv.conv"), part, 4 * width, space)?;
            let time = |shuffle| Conv { shuffle, ..Conv::same() };
            let name = format!("{name}.temporal_upsamplers.0.conv.conv");
            if most == 1 {
                self.one_by_one(r, b + 1, |r, second| {
                    let one = Conv { moves_on: second, ..time(Shuffle::OneOfTime { second }) };
                    r.conv(&name, y, 2 * width, one)
                })?;
            } else {
                let all = time(Shuffle::Time { drop_first: !r.window.continues });
                let y = r.conv(&name, y, 2 * width, all)?;
                self.record(r, b + 1, y)?;
            }
        }
        r.window = whole;
        Ok(())
    }

    /// Records level `b` for each of the two frames that `make` gives, of which a video's start
    /// has the second alone.
    fn one_by_one(
        &mut self,
        r: &mut Recorder,
        b: usize,
        make: impl Fn(&mut Recorder, bool) -> Result<TensorId>,
    ) -> Result<()> {
        let piece = r.window;
        for second in [false, true] {
            if !second && !piece.continues {
                continue;
            }
            let frame = make(r, second)?;
            r.window.carries = piece.carries || !second;
            self.record(r, b, frame)?;
            r.window = piece;
        }
        Ok(())
    }

    fn finish(&mut self, r: &mut Recorder, x: TensorId) -> Result<()> {
        let x = r.group_norm("decoder.conv_norm_out", x, true)?;
        let end = self.done + r.g.tensor(x).shape[0];
        let place = r.g.frames(self.video, self.done..end);
        self.done = end;
        r.conv_into("decoder.conv_out.conv", x, 3, Conv::same(), place)
    }
}

/// Records the encoder: input `video` `[t, h, w, 3]` in −1 … 1, output `moments`
/// `[latents, h/8, w/8, 32]`, mean then log variance. A video's first window has `1 + 8k`
/// frames, later ones multiples of 8.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub fn record_encoder(config: &VaeConfig, window: Window, dtype: DType) -> Result<Graph> {
    let shape = [window.frames, window.height, window.width, 3];
    let (mut r, x) = Recorder::new("video", &shape, window, config.encoder_groups, dtype);
    let channels = config.encoder_channels;
    let mut x = r.conv("encoder.conv_in.conv", x, channels[0], Conv::same())?;
    let last = channels.len() - 1;
    for (b, &width) in channels.iter().enumerate() {
        let name = format!("encoder.down_blocks.{b}");
        for i in 0..config.encoder_resnets[b] {
            x = r.resnet(&format!("{name}.resnets.{i}"), x, width)?;
        }
        if b < last {
            let space = Conv { stride: [1, 2, 2], ..Conv::same() };
            x = r.conv(&format!("{name}.downsamplers.0.conv.conv"), x, width, space)?;
            let time = Conv { stride: [2, 1, 1], ..Conv::same() };
            x = r.conv(&format!("{name}.temporal_downsamplers.0.conv.conv"), x, width, time)?;
        }
    }
    x = r.mid_block("encoder.mid_block", x)?;
    x = r.group_norm("encoder.conv_norm_out", x, true)?;
    let moments = 2 * config.latent_channels;
    x = r.conv("encoder.conv_out.conv", x, moments, Conv::same())?;
    x = r.conv("quant_conv.conv", x, moments, Conv::pointwise())?;
    r.g.mark_output("moments", x);
    Ok(r.g)
}

/// Every weight of the component.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &VaeConfig) -> Result<Vec<ExpectedWeight>> {
    let decoder = record_decoder(config, Window::whole(1, 1, 1), DType::F32)?;
    let encoder = record_encoder(config, Window::whole(1, FACTOR, FACTOR), DType::F32)?;
    Ok(collect_weights(&[decoder, encoder]))
}

/// How a convolution differs from the plain 3×3×3 one.
#[derive(Clone, Copy)]
struct Conv {
    kernel: usize,
    stride: [usize; 3],
    shuffle: Shuffle,
    residual: Option<TensorId>,
    moves_on: bool,
}

impl Conv {
    fn same() -> Conv {
        let (stride, shuffle) = ([1; 3], Shuffle::None);
        Conv { kernel: 3, stride, shuffle, residual: None, moves_on: true }
    }

    fn pointwise() -> Conv {
        Conv { kernel: 1, ..Conv::same() }
    }
}

struct Recorder {
    g: Graph,
    window: Window,
    groups: usize,
}

impl Recorder {
    fn new(
        name: &str,
        shape: &[usize],
        window: Window,
        groups: usize,
        dtype: DType,
    ) -> (Recorder, TensorId) {
        let mut g = Graph::new();
        let x = g.input(name, shape, dtype);
        (Recorder { g, window, groups }, x)
    }

    fn channels(&self, x: TensorId) -> usize {
        self.g.tensor(x).cols()
    }

    fn conv(&mut self, name: &str, x: TensorId, outputs: usize, how: Conv) -> Result<TensorId> {
        let (spec, inputs) = self.spec(name, x, outputs, how);
        self.g.conv3d(spec, &inputs, self.window.carries || self.window.continues)
    }

    fn conv_into(
        &mut self,
        name: &str,
        x: TensorId,
        outputs: usize,
        how: Conv,
        place: TensorId,
    ) -> Result<()> {
        let (spec, inputs) = self.spec(name, x, outputs, how);
        self.g.conv3d_into(spec, &inputs, self.window.carries || self.window.continues, place)
    }

    fn spec(
        &mut self,
        name: &str,
        x: TensorId,
        outputs: usize,
        how: Conv,
    ) -> (ConvSpec, Vec<TensorId>) {
        self.g.scope(name);
        let k = how.kernel;
        let shape = [outputs, self.channels(x), k, k, k];
        let spec = ConvSpec {
            weight: self.g.weight(&format!("{name}.weight"), &shape),
            bias: self.g.weight(&format!("{name}.bias"), &[outputs]),
            kernel: [k; 3],
            stride: how.stride,
            shuffle: how.shuffle,
            residual: how.residual.is_some(),
            continues: self.window.continues,
            moves_on: how.moves_on,
        };
        (spec, [x].into_iter().chain(how.residual).collect())
    }

    fn group_norm(&mut self, name: &str, x: TensorId, silu: bool) -> Result<TensorId> {
        self.g.scope(name);
        let channels = self.channels(x);
        let weight = self.g.weight(&format!("{name}.weight"), &[channels]);
        let bias = self.g.weight(&format!("{name}.bias"), &[channels]);
        self.g.push(Op::GroupNorm { weight, bias, groups: self.groups, eps: EPS, silu }, &[x])
    }

    fn resnet(&mut self, name: &str, x: TensorId, outputs: usize) -> Result<TensorId> {
        // First, so that the norm may take the place of x.
        let skip = if self.channels(x) == outputs {
            x
        } else {
            self.conv(&format!("{name}.conv_shortcut.conv"), x, outputs, Conv::pointwise())?
        };
        let n = self.group_norm(&format!("{name}.norm1"), x, true)?;
        let hidden = self.conv(&format!("{name}.conv1.conv"), n, outputs, Conv::same())?;
        let n = self.group_norm(&format!("{name}.norm2"), hidden, true)?;
        let second = Conv { residual: Some(skip), ..Conv::same() };
        self.conv(&format!("{name}.conv2.conv"), n, outputs, second)
    }

    fn mid_block(&mut self, name: &str, x: TensorId) -> Result<TensorId> {
        let channels = self.channels(x);
        let x = self.resnet(&format!("{name}.resnets.0"), x, channels)?;
        self.attention(&format!("{name}.attentions.0"), x)?;
        self.resnet(&format!("{name}.resnets.1"), x, channels)
    }

    /// Adds self-attention within each frame, one head as wide as the channels.
    fn attention(&mut self, name: &str, x: TensorId) -> Result<()> {
        let n = self.group_norm(&format!("{name}.group_norm"), x, false)?;
        self.g.scope(name);
        let shape = self.g.tensor(x).shape.clone();
        let (pixels, c) = (shape[1] * shape[2], shape[3]);
        let rows = shape[0] * pixels;
        let tokens = self.g.reshape(n, &[rows, c]);
        let parts = ["to_q", "to_k", "to_v"]
            .map(|p| self.g.linear_weights(&format!("{name}.{p}"), c, c))
            .to_vec();
        let qkv = self.g.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[tokens])?;
        let [q, k, v] = [0, 1, 2].map(|i| self.g.cols(qkv, i * c..(i + 1) * c));
        let frame = |f| f * pixels..(f + 1) * pixels;
        let segments: Arc<[Segment]> =
            (0..shape[0]).map(|f| Segment { queries: frame(f), keys: vec![frame(f)] }).collect();
        let spec = AttentionSpec {
            heads: 1,
            scale: 1.0 / (c as f32).sqrt(),
            segments,
            causal: false,
            relative_bias: None,
        };
        let attended = self.g.push(Op::Attention(spec), &[q, k, v])?;
        let parts = vec![self.g.linear_weights(&format!("{name}.to_out.0"), c, c)];
        let residual = self.g.reshape(x, &[rows, c]);
        let op = Op::Linear { parts, epilogue: Epilogue::Accumulate };
        self.g.push_into(op, &[attended], residual)
    }
}
