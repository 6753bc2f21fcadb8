//! Images to latents and latents to frames.

use std::collections::HashMap;
use std::sync::Arc;

use super::Tiling;
use super::plan::{fit_decoder, fit_encoder};
use super::tiles::{TileGrid, TileSize, Volume, assemble};
use crate::checkpoint::VaeConfig;
use crate::exec::{Backend, GraphId, Pending, Session};
use crate::graph::TensorId;
use crate::media::Frame;
use crate::models::vae::{FACTOR, Window, record_decoder, record_encoder};
use crate::sampler::{Latent, LatentShape};
use crate::tensor::{DType, WeightSource};
use crate::{Error, Result};

/// Encodes and decodes with the VAE of a checkpoint, in windows of time.
pub struct Vae<'a> {
    backend: &'a dyn Backend,
    config: &'a VaeConfig,
    weights: Arc<dyn WeightSource>,
    opened: Option<Opened>,
}

/// What a session is for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Purpose {
    decode: bool,
    /// The sizes of the windows, the largest last.
    sizes: Vec<TileSize>,
    /// Whether windows follow each other.
    carries: bool,
}

/// A session for windows of one kind.
struct Opened {
    purpose: Purpose,
    session: Box<dyn Session>,
    dtype: DType,
    at_once: usize,
    plans: HashMap<Window, GraphId>,
}

impl<'a> Vae<'a> {
    /// A VAE whose weights are brought to the device when they are first needed.
    pub fn new(
        backend: &'a dyn Backend,
        config: &'a VaeConfig,
        weights: Arc<dyn WeightSource>,
    ) -> Vae<'a> {
        Vae { backend, config, weights, opened: None }
    }

    /// The session for `purpose`, opened if the present one is for another.
    fn open(&mut self, purpose: Purpose) -> Result<&mut Opened> {
        if self.opened.as_ref().is_none_or(|opened| opened.purpose != purpose) {
            // First, to make room.
            self.opened = None;
            let &Purpose { decode, ref sizes, carries } = &purpose;
            let fit = if decode {
                fit_decoder(self.config, sizes, carries, self.backend)?
            } else {
                fit_encoder(self.config, sizes, self.backend)?.1
            };
            fit.require(self.backend, if decode { "decoding" } else { "encoding the image" })?;
            let session = self.backend.open_with(self.weights.clone(), &fit.residency)?;
            let (dtype, at_once) = (self.backend.activations(), fit.at_once);
            let plans = HashMap::new();
            self.opened = Some(Opened { purpose, session, dtype, at_once, plans });
        }
        self.opened.as_mut().ok_or_else(|| Error::usage("no session of the VAE is open"))
    }

    /// Encodes a video (or an image: one frame) `[frames, h, w, 3]` in −1 … 1 to the moments
    /// `[latents, h/8, w/8, 32]` of its latents.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn encode(&mut self, video: &Volume, tiling: Option<Tiling>) -> Result<Volume> {
        let config = self.config;
        let sizes = TileGrid::over_pixels([video.height, video.width], tiling);
        let opened = self.open(Purpose { decode: false, sizes, carries: false })?;
        let Some(tiling) = tiling else { return opened.window(config, video, false, false) };
        let grid = TileGrid::encoding(video.height, video.width, tiling);
        assemble(&grid, |y, x, height, width| {
            opened.window(config, &video.crop(y, x, height, width), false, false)
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
        let Some(first) = latents.first().map(Latent::shape) else {
            return Err(Error::input("no latents to decode"));
        };
        let (config, carries) = (self.config, latents.len() > 1);
        let sizes = TileGrid::over_latents([first.height, first.width], None);
        let opened = self.open(Purpose { decode: true, sizes, carries })?;
        let mut before: Option<Pending<Vec<u8>>> = None;
        for (i, latent) in latents.iter().enumerate() {
            let input = Volume::of_latent(latent);
            let (graph, output) = opened.run(config, &input, i > 0, carries)?;
            let pixels = opened.session.fetch_pixels(graph, output)?;
            if let Some(before) = before.replace(pixels) {
                give(latent.shape(), before()?, &mut frames)?;
            }
        }
        before.map_or(Ok(()), |last| give(first, last()?, &mut frames))
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
        let (config, carries) = (self.config, units > 1);
        let LatentShape { height, width, .. } = latent.shape();
        let sizes = TileGrid::over_latents([height, width], None);
        let opened = self.open(Purpose { decode: true, sizes, carries })?;
        let input = Volume::of_latent(latent);
        let (graph, output) = opened.run(config, &input, unit > 0, carries)?;
        let pixels = opened.session.fetch_pixels(graph, output)?()?;
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
        let (config, carries) = (self.config, latents.len() > 1);
        let sizes = TileGrid::over_latents([first.height, first.width], Some(tiling));
        let opened = self.open(Purpose { decode: true, sizes, carries })?;
        assemble(&grid, |y, x, height, width| {
            let mut tile = Volume::default();
            for (i, latent) in latents.iter().enumerate() {
                let crop = Volume::of_latent(latent).crop(y, x, height, width);
                tile.append(&opened.window(config, &crop, i > 0, carries)?);
            }
            Ok(tile)
        })
    }
}

impl Opened {
    /// Runs one window of a video, `continues` being whether it goes on from the one before
    /// and `carries` whether another one may. A lone latent needs no carried frames;
    /// otherwise all but the first window share one plan.
    fn run(
        &mut self,
        config: &VaeConfig,
        input: &Volume,
        continues: bool,
        carries: bool,
    ) -> Result<(GraphId, TensorId)> {
        let &Volume { frames, height, width, .. } = input;
        let (decode, at_once) = (self.purpose.decode, self.at_once);
        let window = Window { frames, height, width, continues, carries, at_once };
        let graph = match self.plans.get(&window) {
            Some(&graph) => graph,
            None => {
                let record = if decode { record_decoder } else { record_encoder };
                let graph = self.session.add(record(config, window, self.dtype)?)?;
                self.plans.insert(window, graph);
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
        config: &VaeConfig,
        input: &Volume,
        continues: bool,
        carries: bool,
    ) -> Result<Volume> {
        let (graph, output) = self.run(config, input, continues, carries)?;
        let data = self.session.read(graph, output)?;
        let &Volume { height, width, .. } = input;
        let (height, width, channels) = if self.purpose.decode {
            (height * FACTOR, width * FACTOR, 3)
        } else {
            (height / FACTOR, width / FACTOR, 2 * config.latent_channels)
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
