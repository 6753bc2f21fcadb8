//! Images to latents and latents to frames.

use std::collections::HashMap;
use std::sync::Arc;

use super::Tiling;
use super::tiles::{TileGrid, Volume, assemble};
use crate::checkpoint::VaeConfig;
use crate::exec::{Backend, GraphId, Pending, Session};
use crate::graph::TensorId;
use crate::media::Frame;
use crate::models::vae::{FACTOR, Window, record_decoder, record_encoder};
use crate::sampler::{Latent, LatentShape};
use crate::tensor::WeightSource;
use crate::{Error, Result};

/// Encodes and decodes with the VAE of a checkpoint, in windows of time.
pub struct Vae<'a> {
    backend: &'a dyn Backend,
    config: &'a VaeConfig,
    session: Box<dyn Session>,
    plans: HashMap<(bool, Window), GraphId>,
}

impl<'a> Vae<'a> {
    /// Opens a session on the VAE's weights.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn new(
        backend: &'a dyn Backend,
        config: &'a VaeConfig,
        weights: Arc<dyn WeightSource>,
    ) -> Result<Vae<'a>> {
        Ok(Vae { backend, config, session: backend.open(weights)?, plans: HashMap::new() })
    }

    /// Encodes a video (or an image: one frame) `[frames, h, w, 3]` in −1 … 1 to the moments
    /// `[latents, h/8, w/8, 32]` of its latents.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn encode(&mut self, video: &Volume, tiling: Option<Tiling>) -> Result<Volume> {
        let Some(tiling) = tiling else { return self.window(video, false, false, false) };
        let grid = TileGrid::encoding(video.height, video.width, tiling);
        assemble(&grid, |y, x, height, width| {
            self.window(&video.crop(y, x, height, width), false, false, false)
        })
    }

    /// Decodes latents (already unscaled, one `[1, h, w, 16]` after the other) and gives the
    /// frames in order to `frames`, while the device decodes the next ones.
    ///
    /// # Errors
    /// Those of the backend and of `frames`; [`crate::ErrorKind::Numeric`] when a value is
    /// not a number.
    pub fn decode(
        &mut self,
        latents: &[Latent],
        tiling: Option<Tiling>,
        mut frames: impl FnMut(Frame) -> Result<()>,
    ) -> Result<()> {
        if let Some(tiling) = tiling {
            let video = self.decode_tiled(latents, tiling)?;
            return (0..video.frames).try_for_each(|i| frames(frame_of(&video, i)?));
        }
        let mut before: Option<Pending<Vec<u8>>> = None;
        for (i, latent) in latents.iter().enumerate() {
            let input = Volume::of_latent(latent);
            let (graph, output) = self.run(&input, true, i > 0, latents.len() > 1)?;
            let pixels = self.session.fetch_pixels(graph, output)?;
            if let Some(before) = before.replace(pixels) {
                give(latent.shape(), before()?, &mut frames)?;
            }
        }
        match (before, latents.last()) {
            (Some(last), Some(latent)) => give(latent.shape(), last()?, &mut frames),
            _ => Err(Error::input("no latents to decode")),
        }
    }

    /// Decodes the next of a video's `units` latents to its frames; they must come in order.
    ///
    /// # Errors
    /// As [`Vae::decode`].
    pub fn decode_unit(
        &mut self,
        unit: usize,
        units: usize,
        latent: &Latent,
    ) -> Result<Vec<Frame>> {
        let (graph, output) = self.run(&Volume::of_latent(latent), true, unit > 0, units > 1)?;
        let pixels = self.session.fetch_pixels(graph, output)?()?;
        let mut all = Vec::new();
        give(latent.shape(), pixels, &mut |frame| {
            all.push(frame);
            Ok(())
        })?;
        Ok(all)
    }

    /// Decodes in the published way, tile by tile with blended seams.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn decode_tiled(&mut self, latents: &[Latent], tiling: Tiling) -> Result<Volume> {
        let first = latents.first().ok_or_else(|| Error::input("no latents to decode"))?.shape();
        let grid = TileGrid::decoding(first.height, first.width, tiling);
        assemble(&grid, |y, x, height, width| {
            let mut tile = Volume::default();
            for (i, latent) in latents.iter().enumerate() {
                let crop = Volume::of_latent(latent).crop(y, x, height, width);
                tile.append(&self.window(&crop, true, i > 0, latents.len() > 1)?);
            }
            Ok(tile)
        })
    }

    /// Runs one window of a video, `continues` being whether it goes on from the one before
    /// and `carries` whether another one may. A lone latent needs no carried frames;
    /// otherwise all but the first window share one plan.
    fn run(
        &mut self,
        input: &Volume,
        decode: bool,
        continues: bool,
        carries: bool,
    ) -> Result<(GraphId, TensorId)> {
        let &Volume { frames, height, width, .. } = input;
        let window = Window { frames, height, width, continues, carries };
        let graph = match self.plans.get(&(decode, window)) {
            Some(&graph) => graph,
            None => {
                let record = if decode { record_decoder } else { record_encoder };
                let graph = record(self.config, window, self.backend.activations())?;
                let graph = self.session.add(graph)?;
                self.plans.insert((decode, window), graph);
                graph
            }
        };
        let (from, to) = if decode { ("latents", "video") } else { ("video", "moments") };
        let from = self.session.find(graph, from)?;
        let to = self.session.find(graph, to)?;
        self.session.write(graph, from, &input.data)?;
        self.session.run(graph)?;
        Ok((graph, to))
    }

    fn window(
        &mut self,
        input: &Volume,
        decode: bool,
        continues: bool,
        carries: bool,
    ) -> Result<Volume> {
        let (graph, output) = self.run(input, decode, continues, carries)?;
        let data = self.session.read(graph, output)?;
        let &Volume { height, width, .. } = input;
        let (height, width, channels) = if decode {
            (height * FACTOR, width * FACTOR, 3)
        } else {
            (height / FACTOR, width / FACTOR, 2 * self.config.latent_channels)
        };
        let frames = data.len() / (height * width * channels);
        Ok(Volume { frames, height, width, channels, data })
    }
}

/// Cuts the pixels of a decoded latent of `shape` into frames.
fn give(
    shape: LatentShape,
    pixels: Vec<u8>,
    frames: &mut impl FnMut(Frame) -> Result<()>,
) -> Result<()> {
    let (width, height) = (shape.width * FACTOR, shape.height * FACTOR);
    let pictures = pixels.chunks_exact(width * height * 3);
    let frame = |data: &[u8]| Frame::new(width as u32, height as u32, data.to_vec());
    pictures.map(frame).try_for_each(|f| frames(f?))
}

/// The frame as the encoder takes it: −1 … 1.
pub fn pixels_of(frame: &Frame) -> Volume {
    let value = |&v: &u8| (f32::from(v) / 255.0 - 0.5) / 0.5;
    Volume {
        frames: 1,
        height: frame.height() as usize,
        width: frame.width() as usize,
        channels: 3,
        data: frame.data().iter().map(value).collect(),
    }
}

/// Frame `index` of a decoded video: `x · 127.5 + 127.5`, clamped and truncated, as
/// [`Session::fetch_pixels`] does.
///
/// # Errors
/// [`crate::ErrorKind::Numeric`] when a value is not a number.
pub fn frame_of(video: &Volume, index: usize) -> Result<Frame> {
    let size = video.height * video.width * 3;
    let values = &video.data[index * size..(index + 1) * size];
    if values.iter().any(|v| !v.is_finite()) {
        return Err(Error::numeric(format!("decoded frame {index} holds NaN or infinity"))
            .hint("the VAE's weights may be damaged; the latents are kept"));
    }
    let data = values.iter().map(|v| (v * 127.5 + 127.5).clamp(0.0, 255.0) as u8).collect();
    Frame::new(video.width as u32, video.height as u32, data)
}
