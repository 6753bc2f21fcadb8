//! Images to latents and latents to frames.

use std::collections::HashMap;
use std::sync::Arc;

use super::Tiling;
use super::tiles::{TileGrid, Volume, assemble};
use crate::checkpoint::VaeConfig;
use crate::exec::{Backend, GraphId, Session};
use crate::media::Frame;
use crate::models::vae::{FACTOR, Window, record_decoder, record_encoder};
use crate::sampler::Latent;
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
    /// frames in order to `frames`, as few as the VAE decodes at a time.
    ///
    /// # Errors
    /// Those of the backend and of `frames`.
    pub fn decode(
        &mut self,
        latents: &[Latent],
        tiling: Option<Tiling>,
        mut frames: impl FnMut(&Volume) -> Result<()>,
    ) -> Result<()> {
        let Some(tiling) = tiling else {
            return self.stream(latents.len(), |i| Volume::of_latent(&latents[i]), frames);
        };
        let first = latents.first().ok_or_else(|| Error::input("no latents to decode"))?.shape();
        let grid = TileGrid::decoding(first.height, first.width, tiling);
        let video = assemble(&grid, |y, x, height, width| {
            let mut tile = Volume::default();
            let crop = |i: usize| Volume::of_latent(&latents[i]).crop(y, x, height, width);
            self.stream(latents.len(), crop, |window| {
                tile.append(window);
                Ok(())
            })?;
            Ok(tile)
        })?;
        frames(&video)
    }

    /// Decodes `count` latents one at a time: exactly the whole decode, in little memory.
    fn stream(
        &mut self,
        count: usize,
        latent: impl Fn(usize) -> Volume,
        mut frames: impl FnMut(&Volume) -> Result<()>,
    ) -> Result<()> {
        for i in 0..count {
            // A lone latent needs no carried frames; otherwise all but the first window
            // share one plan.
            let video = self.window(&latent(i), true, i > 0, count > 1)?;
            frames(&video)?;
        }
        Ok(())
    }

    fn window(
        &mut self,
        input: &Volume,
        decode: bool,
        continues: bool,
        carries: bool,
    ) -> Result<Volume> {
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
        let data = self.session.read(graph, to)?;
        let (height, width, channels) = if decode {
            (height * FACTOR, width * FACTOR, 3)
        } else {
            (height / FACTOR, width / FACTOR, 2 * self.config.latent_channels)
        };
        Ok(Volume {
            frames: data.len() / (height * width * channels),
            height,
            width,
            channels,
            data,
        })
    }
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

/// Frame `index` of a decoded video: `x · 127.5 + 127.5`, clamped and truncated.
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
