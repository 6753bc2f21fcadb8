//! A latent as a small picture, without the decoder: a linear map from its 16 channels to RGB.

use crate::Result;
use crate::media::Frame;
use crate::models::vae::FACTOR;
use crate::sampler::{CHANNELS, Latent};

/// Channels and the constant one.
const TERMS: usize = CHANNELS + 1;

/// `rgb = latent · weights + bias` for each position, of latents scaled as the VAE has them, in
/// units of 0 … 255.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentRgb {
    /// Red, green and blue of each channel.
    pub weights: [[f32; 3]; CHANNELS],
    /// Red, green and blue of zeros.
    pub bias: [f32; 3],
}

impl LatentRgb {
    /// The first frame of a latent, one pixel for each position.
    ///
    /// # Errors
    /// Never for a latent with a position.
    pub fn frame(&self, latent: &Latent) -> Result<Frame> {
        let shape = latent.shape();
        let positions = latent.data().chunks_exact(CHANNELS).take(shape.height * shape.width);
        let pixels = positions.flat_map(|values| self.pixel(values).map(|v| v.round() as u8));
        Frame::new(shape.width as u32, shape.height as u32, pixels.collect())
    }

    fn pixel(&self, values: &[f32]) -> [f32; 3] {
        let mut rgb = self.bias;
        for (value, weights) in values.iter().zip(&self.weights) {
            for (out, weight) in rgb.iter_mut().zip(weights) {
                *out += value * weight;
            }
        }
        // NaN becomes 0 in the conversion to u8.
        rgb.map(|v| v.clamp(0.0, 255.0))
    }
}

/// Fits a [`LatentRgb`] to decoded latents by least squares: for each position of a latent, the
/// mean of the 8 × 8 pixels that it covers, over all frames of its unit.
#[derive(Debug, Clone)]
pub struct LatentRgbFit {
    /// Sums of products of the terms.
    square: [[f64; TERMS]; TERMS],
    /// Sums of products of each colour with the terms.
    right: [[f64; TERMS]; 3],
    /// Sum of the squared colours.
    colours: f64,
    positions: u64,
}

impl Default for LatentRgbFit {
    fn default() -> Self {
        let (square, right) = ([[0.0; TERMS]; TERMS], [[0.0; TERMS]; 3]);
        LatentRgbFit { square, right, colours: 0.0, positions: 0 }
    }
}

impl LatentRgbFit {
    /// Adds a unit: its latent, scaled as the VAE has it, and the frames it was decoded to.
    /// Frames of another size than the latent's are left out.
    pub fn add(&mut self, latent: &Latent, frames: &[Frame]) {
        let shape = latent.shape();
        let size = ((shape.width * FACTOR) as u32, (shape.height * FACTOR) as u32);
        let fits = |f: &&Frame| (f.width(), f.height()) == size;
        let frames: Vec<&Frame> = frames.iter().filter(fits).collect();
        if frames.is_empty() {
            return;
        }
        let positions = latent.data().chunks_exact(CHANNELS).take(shape.height * shape.width);
        for (index, values) in positions.enumerate() {
            let mean = mean_colour(&frames, index % shape.width, index / shape.width);
            let mut terms = [1.0; TERMS];
            terms.iter_mut().zip(values).for_each(|(t, &v)| *t = f64::from(v));
            for (i, a) in terms.iter().enumerate() {
                self.square[i].iter_mut().zip(&terms).for_each(|(s, b)| *s += a * b);
                self.right.iter_mut().zip(&mean).for_each(|(s, b)| s[i] += a * b);
            }
            self.colours += mean.iter().map(|v| v * v).sum::<f64>();
            self.positions += 1;
        }
    }

    /// The map; `None` until there are enough positions to tell the channels apart.
    pub fn solve(&self) -> Option<LatentRgb> {
        if self.positions < 4 * TERMS as u64 {
            return None;
        }
        // A touch of ridge keeps channels that never vary from being anything.
        let mut square = self.square;
        for (i, row) in square.iter_mut().enumerate().take(CHANNELS) {
            row[i] += 1e-6 * self.positions as f64;
        }
        let solution = solve(square, self.right)?;
        let row = |i: usize| solution.map(|colour| colour[i] as f32);
        Some(LatentRgb { weights: std::array::from_fn(row), bias: row(CHANNELS) })
    }

    /// Which share of the variance of the colours added here `map` explains, 1 being all.
    pub fn explained(&self, map: &LatentRgb) -> f64 {
        let (mut error, mut total) = (self.colours, self.colours);
        for (colour, right) in self.right.iter().enumerate() {
            let rows = map.weights.iter().chain([&map.bias]);
            let column: Vec<f64> = rows.map(|row| f64::from(row[colour])).collect();
            let dot = |other: &[f64; TERMS]| -> f64 {
                column.iter().zip(other).map(|(a, b)| a * b).sum()
            };
            let squares = column.iter().zip(&self.square).map(|(a, row)| a * dot(row));
            error += squares.sum::<f64>() - 2.0 * dot(right);
            total -= right[CHANNELS].powi(2) / self.positions as f64;
        }
        1.0 - error / total
    }
}

/// Mean colour of the pixels that position (x, y) covers.
fn mean_colour(frames: &[&Frame], x: usize, y: usize) -> [f64; 3] {
    let mut sum = [0u64; 3];
    for frame in frames {
        let row = frame.width() as usize * 3;
        for line in frame.data().chunks_exact(row).skip(y * FACTOR).take(FACTOR) {
            for pixel in line[x * FACTOR * 3..][..FACTOR * 3].chunks_exact(3) {
                sum.iter_mut().zip(pixel).for_each(|(s, &v)| *s += u64::from(v));
            }
        }
    }
    sum.map(|s| s as f64 / (frames.len() * FACTOR * FACTOR) as f64)
}

/// Solves a symmetric positive definite system by Cholesky's method; `None` if it is none.
fn solve(
    mut square: [[f64; TERMS]; TERMS],
    mut right: [[f64; TERMS]; 3],
) -> Option<[[f64; TERMS]; 3]> {
    for i in 0..TERMS {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| square[i][k] * square[j][k]).sum();
            let rest = square[i][j] - dot;
            if i != j {
                square[i][j] = rest / square[j][j];
            } else if rest > 1e-12 * square[i][i] {
                square[i][i] = rest.sqrt();
            } else {
                return None;
            }
        }
    }
    for column in &mut right {
        for i in 0..TERMS {
            let dot: f64 = square[i].iter().zip(&column[..i]).map(|(a, b)| a * b).sum();
            column[i] = (column[i] - dot) / square[i][i];
        }
        for i in (0..TERMS).rev() {
            let dot: f64 = (i + 1..TERMS).map(|k| square[k][i] * column[k]).sum();
            column[i] = (column[i] - dot) / square[i][i];
        }
    }
    Some(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::LatentShape;

    /// Latents whose colours follow a map, as flat 8 × 8 blocks.
    fn example(map: &LatentRgb) -> (Latent, Frame) {
        let shape = LatentShape::frame(12, 10);
        let wave = |i: usize| ((i * i * 7 + i * 13) % 101) as f32 / 50.0 - 1.0;
        let latent = Latent::new(shape, (0..shape.len()).map(wave).collect()).expect("a latent");
        let small = map.frame(&latent).expect("a frame");
        let at = |x, y| small.pixel(x / 8, y / 8).expect("inside");
        (latent, Frame::from_fn(80, 96, at).expect("a frame"))
    }

    #[test]
    fn a_map_is_found_again() {
        let mut map = LatentRgb { weights: [[0.0; 3]; CHANNELS], bias: [120.0, 130.0, 110.0] };
        for (i, row) in map.weights.iter_mut().enumerate() {
            *row = [i as f32 - 8.0, 5.0 - i as f32 * 0.5, (i % 3) as f32 * 4.0];
        }
        let (latent, frame) = example(&map);
        let mut fit = LatentRgbFit::default();
        assert_eq!(fit.solve(), None);
        fit.add(&latent, &[frame.clone(), frame]);
        let found = fit.solve().expect("a map");
        let rows = found.weights.iter().zip(&map.weights).chain([(&found.bias, &map.bias)]);
        for (a, b) in rows.flat_map(|(a, b)| a.iter().zip(b)) {
            assert!((a - b).abs() < 0.3, "{a} for {b}");
        }
        assert!(fit.explained(&found) > 0.999, "{}", fit.explained(&found));
        let none = LatentRgb { weights: [[0.0; 3]; CHANNELS], bias: [0.0; 3] };
        assert!(fit.explained(&none) < 0.0);
    }
}
