//! Latent frames and the few things the sampler does to them as images.

use std::fmt;

use half::bf16;

use crate::{Error, Result};

/// Channels of a latent frame; fixed by the VAE's architecture.
pub const CHANNELS: usize = 16;

/// The extents of a [`Latent`]; the channels are always [`CHANNELS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LatentShape {
    /// Latent frames.
    pub frames: usize,
    /// Rows; an eighth of the pixel height.
    pub height: usize,
    /// Columns; an eighth of the pixel width.
    pub width: usize,
}

impl LatentShape {
    /// The shape of one frame.
    pub const fn frame(height: usize, width: usize) -> Self {
        LatentShape { frames: 1, height, width }
    }

    /// Number of values.
    pub const fn len(self) -> usize {
        self.frames * self.height * self.width * CHANNELS
    }

    /// Whether there are no values.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for LatentShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{CHANNELS}", self.frames, self.height, self.width)
    }
}

/// Latent frames in f32, channels last: value `(t, y, x, c)` lies at
/// `((t * height + y) * width + x) * CHANNELS + c`.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    shape: LatentShape,
    data: Vec<f32>,
}

impl Latent {
    /// Wraps channels-last data.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when `data` has not exactly `shape.len()` values.
    pub fn new(shape: LatentShape, data: Vec<f32>) -> Result<Self> {
        check_len(shape, data.len())?;
        Ok(Latent { shape, data })
    }

    /// All zeros.
    pub fn zeros(shape: LatentShape) -> Self {
        Latent { shape, data: vec![0.0; shape.len()] }
    }

    /// From data laid out `[CHANNELS, frames, height, width]`, as PyTorch has it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when `data` has not exactly `shape.len()` values.
    pub fn from_channels_first(shape: LatentShape, data: &[f32]) -> Result<Self> {
        check_len(shape, data.len())?;
        let plane = shape.len() / CHANNELS;
        let values = (0..shape.len()).map(|i| data[(i % CHANNELS) * plane + i / CHANNELS]);
        Ok(Latent { shape, data: values.collect() })
    }

    /// The values laid out `[CHANNELS, frames, height, width]`.
    pub fn to_channels_first(&self) -> Vec<f32> {
        let plane = self.data.len() / CHANNELS;
        let value = |i: usize| self.data[(i % plane) * CHANNELS + i / plane];
        (0..self.data.len()).map(value).collect()
    }

    /// The extents.
    pub fn shape(&self) -> LatentShape {
        self.shape
    }

    /// The values, channels last.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The values, channels last.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, channels last.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// Frame `t` alone.
    ///
    /// # Panics
    /// If there is no such frame.
    pub fn frame(&self, t: usize) -> Latent {
        let shape = LatentShape { frames: 1, ..self.shape };
        let len = shape.len();
        Latent { shape, data: self.data[t * len..(t + 1) * len].to_vec() }
    }

    /// The parts one after the other in time.
    ///
    /// # Panics
    /// If there are no parts, or their heights or widths differ.
    pub fn concat<'a>(parts: impl IntoIterator<Item = &'a Latent>) -> Latent {
        let mut parts = parts.into_iter();
        let mut whole = parts.next().expect("a part to begin with").clone();
        for part in parts {
            let LatentShape { height, width, .. } = part.shape;
            assert_eq!((whole.shape.height, whole.shape.width), (height, width));
            whole.shape.frames += part.shape.frames;
            whole.data.extend_from_slice(&part.data);
        }
        whole
    }

    /// Half the height and width: the mean of each 2x2 block, which is what bilinear
    /// resizing by one half (`align_corners=false`) computes.
    ///
    /// # Panics
    /// If the height or the width is odd.
    pub fn halved(&self) -> Latent {
        let LatentShape { frames, height, width } = self.shape;
        assert!(height % 2 == 0 && width % 2 == 0, "{} cannot be halved", self.shape);
        let shape = LatentShape { frames, height: height / 2, width: width / 2 };
        let mut data = Vec::with_capacity(shape.len());
        // The height is even, so a pair of rows never straddles two frames.
        for rows in self.data.chunks_exact(2 * width * CHANNELS) {
            let (top, bottom) = rows.split_at(width * CHANNELS);
            let pairs = top.chunks_exact(2 * CHANNELS).zip(bottom.chunks_exact(2 * CHANNELS));
            for (t, b) in pairs {
                let sums =
                    (0..CHANNELS).map(|c| (t[c] + t[c + CHANNELS]) + (b[c] + b[c + CHANNELS]));
                data.extend(sums.map(|sum| sum * 0.25));
            }
        }
        Latent { shape, data }
    }

    /// Twice the height and width, every value repeated in a 2x2 block.
    pub fn doubled(&self) -> Latent {
        let LatentShape { frames, height, width } = self.shape;
        let shape = LatentShape { frames, height: height * 2, width: width * 2 };
        let mut data = Vec::with_capacity(shape.len());
        for row in self.data.chunks_exact(width * CHANNELS) {
            let start = data.len();
            for pixel in row.chunks_exact(CHANNELS) {
                data.extend_from_slice(pixel);
                data.extend_from_slice(pixel);
            }
            data.extend_from_within(start..);
        }
        Latent { shape, data }
    }

    /// `self <- alpha * self + beta * noise`, in f32.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn renoise(&mut self, noise: &Latent, alpha: f32, beta: f32) {
        assert_eq!(self.shape, noise.shape);
        for (x, n) in self.data.iter_mut().zip(&noise.data) {
            *x = alpha * *x + beta * n;
        }
    }

    /// Multiplies every value by `factor`.
    pub fn scale(&mut self, factor: f32) {
        self.data.iter_mut().for_each(|x| *x *= factor);
    }

    /// Rounds every value to the nearest bf16.
    pub fn round_to_bf16(&mut self) {
        self.data.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }

    /// Whether no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.data.iter().all(|x| x.is_finite())
    }
}

fn check_len(shape: LatentShape, len: usize) -> Result<()> {
    if len == shape.len() {
        return Ok(());
    }
    let need = shape.len();
    Err(Error::input(format!("a latent of shape {shape} needs {need} values, not {len}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that tell their own coordinates: t, y, x, c as digits base 100.
    fn coordinates(shape: LatentShape) -> Latent {
        let LatentShape { frames, height, width } = shape;
        let mut latent = Latent::zeros(shape);
        for (t, y, x, c) in every(frames, height, width) {
            let index = ((t * height + y) * width + x) * CHANNELS + c;
            latent.data[index] = (((t * 100 + y) * 100 + x) * 100 + c) as f32;
        }
        latent
    }

    fn every(
        frames: usize,
        height: usize,
        width: usize,
    ) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        (0..frames).flat_map(move |t| {
            (0..height).flat_map(move |y| {
                (0..width).flat_map(move |x| (0..CHANNELS).map(move |c| (t, y, x, c)))
            })
        })
    }

    #[test]
    fn channels_first_and_back() {
        let shape = LatentShape { frames: 3, height: 2, width: 4 };
        let latent = coordinates(shape);
        let first = latent.to_channels_first();
        for (t, y, x, c) in every(3, 2, 4) {
            let value = (((t * 100 + y) * 100 + x) * 100 + c) as f32;
            assert_eq!(first[((c * 3 + t) * 2 + y) * 4 + x], value);
        }
        assert_eq!(Latent::from_channels_first(shape, &first).unwrap(), latent);
        assert!(Latent::from_channels_first(shape, &first[1..]).is_err());
        assert!(Latent::new(shape, first[1..].to_vec()).is_err());
    }

    #[test]
    fn halving_is_the_mean_of_each_block() {
        let latent = coordinates(LatentShape { frames: 2, height: 4, width: 6 });
        let half = latent.halved();
        assert_eq!(half.shape(), LatentShape { frames: 2, height: 2, width: 3 });
        for (t, y, x, c) in every(2, 2, 3) {
            let at = |y: usize, x: usize| latent.data()[((t * 4 + y) * 6 + x) * CHANNELS + c];
            let (y0, x0) = (2 * y, 2 * x);
            let sum = at(y0, x0) + at(y0 + 1, x0) + at(y0, x0 + 1) + at(y0 + 1, x0 + 1);
            assert_eq!(half.data()[((t * 2 + y) * 3 + x) * CHANNELS + c], sum / 4.0);
        }
    }

    #[test]
    fn doubling_repeats_and_halving_undoes_it() {
        let latent = coordinates(LatentShape { frames: 2, height: 3, width: 5 });
        let double = latent.doubled();
        assert_eq!(double.shape(), LatentShape { frames: 2, height: 6, width: 10 });
        for (t, y, x, c) in every(2, 6, 10) {
            let source = latent.data()[((t * 3 + y / 2) * 5 + x / 2) * CHANNELS + c];
            assert_eq!(double.data()[((t * 6 + y) * 10 + x) * CHANNELS + c], source);
        }
        assert_eq!(double.halved(), latent);
    }

    #[test]
    fn frames_split_and_join() {
        let latent = coordinates(LatentShape { frames: 3, height: 2, width: 2 });
        let frames: Vec<_> = (0..3).map(|t| latent.frame(t)).collect();
        assert_eq!(frames[2].data()[0], 2_000_000.0);
        assert_eq!(Latent::concat(&frames), latent);
    }

    #[test]
    fn renoising_and_rounding() {
        let shape = LatentShape::frame(1, 1);
        let mut x = Latent::new(shape, vec![3.0; CHANNELS]).unwrap();
        x.renoise(&Latent::new(shape, vec![10.0; CHANNELS]).unwrap(), 0.5, 0.25);
        assert!(x.data().iter().all(|&v| v == 4.0));
        x.data_mut()[3] = 1.003; // Between the neighbours 1.0 and 1.0078125.
        x.round_to_bf16();
        assert_eq!(x.data()[3], 1.0);
        assert!(x.is_finite());
        x.data_mut()[5] = f32::NAN;
        assert!(!x.is_finite());
    }
}
