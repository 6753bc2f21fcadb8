//! Where the sampler's noise comes from: a seed, or a recording.

use rayon::prelude::*;

use super::latent::{CHANNELS, Latent, LatentShape};
use super::philox;
use super::schedule::{GAMMA, STAGES};
use crate::{Error, Result};

/// Noise of one latent: its values, or what they can be made from where they are needed.
#[derive(Debug, Clone, PartialEq)]
pub enum Noise {
    /// The values.
    Values(Latent),
    /// What a seed gives.
    Seeded(Draw),
}

impl Noise {
    /// The extents.
    pub fn shape(&self) -> LatentShape {
        match self {
            Noise::Values(latent) => latent.shape(),
            Noise::Seeded(draw) => draw.shape,
        }
    }

    /// The values, made on the host where need be.
    pub fn into_latent(self) -> Latent {
        match self {
            Noise::Values(latent) => latent,
            Noise::Seeded(draw) => draw.latent(),
        }
    }
}

/// A source of the three kinds of noise that a run uses.
///
/// Every draw is asked for by its coordinates, never "the next one", so a resumed or extended
/// run gets the noise that an uninterrupted one would have had.
pub trait NoiseSource {
    /// Standard normal noise of frame `frame` of the initial noise, at full latent size; the
    /// sampler halves it to the size of stage 0. `shape` has one frame.
    ///
    /// # Errors
    /// If the source has no such noise.
    fn initial(&mut self, frame: usize, shape: LatentShape) -> Result<Noise>;

    /// Block noise for entering stage `stage` (1 or 2) of unit `unit`: each 2x2 block of each
    /// channel is normal with covariance `(1+γ)I - γ·11ᵀ`. `shape` has one frame.
    ///
    /// # Errors
    /// If the source has no such noise.
    fn block(&mut self, unit: usize, stage: usize, shape: LatentShape) -> Result<Noise>;

    /// Standard normal noise for sampling the VAE's posterior of a given image, which is done
    /// on the host.
    ///
    /// # Errors
    /// If the source has no such noise.
    fn posterior(&mut self, shape: LatentShape) -> Result<Latent>;
}

/// Noise from a seed, the same bits on every machine.
///
/// A value depends on the seed, on what it is for and on its own coordinates, and on nothing
/// else: the Philox key is the seed and the counter is
/// `[x, y, frame or unit, purpose << 16 | stage << 8 | channel / 4]`, whose four normals are
/// the channels `4·⌊channel/4⌋ …`. So a longer video begins with the noise of a shorter one.
#[derive(Debug, Clone, Copy)]
pub struct PhiloxNoise {
    /// The seed; all 64 bits count.
    pub seed: u64,
}

/// What noise is for; part of the counter, so that no two purposes share a number.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Initial = 0,
    Block = 1,
    Posterior = 2,
}

impl PhiloxNoise {
    fn draw(&self, purpose: Purpose, stage: usize, first: usize, shape: LatentShape) -> Draw {
        Draw {
            key: [self.seed as u32, (self.seed >> 32) as u32],
            kind: (purpose as u32) << 16 | (stage as u32) << 8,
            first: first as u32,
            block: matches!(purpose, Purpose::Block),
            shape,
        }
    }
}

impl NoiseSource for PhiloxNoise {
    fn initial(&mut self, frame: usize, shape: LatentShape) -> Result<Noise> {
        Ok(Noise::Seeded(self.draw(Purpose::Initial, 0, frame, shape)))
    }

    fn block(&mut self, unit: usize, stage: usize, shape: LatentShape) -> Result<Noise> {
        Ok(Noise::Seeded(self.draw(Purpose::Block, stage, unit, shape)))
    }

    fn posterior(&mut self, shape: LatentShape) -> Result<Latent> {
        Ok(self.draw(Purpose::Posterior, 0, 0, shape).latent())
    }
}

/// Seeded noise by its coordinates: all that its values follow from, so that any device can
/// make them, to the same bits. See [`PhiloxNoise`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Lower and upper half of the seed.
    pub key: [u32; 2],
    /// Purpose and stage, in the upper 24 bits.
    pub kind: u32,
    /// The frame coordinate of the first frame.
    pub first: u32,
    /// Whether the normals are turned into block noise; height and width are even then.
    pub block: bool,
    /// The extents.
    pub shape: LatentShape,
}

impl Draw {
    /// Key, kind and first frame: what differs between draws of one shape.
    pub fn words(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.kind, self.first]
    }

    /// The draw that [`Draw::words`] describes.
    pub fn from_words(words: [u32; 4], block: bool, shape: LatentShape) -> Draw {
        let [low, high, kind, first] = words;
        Draw { key: [low, high], kind, first, block, shape }
    }

    /// The values.
    ///
    /// # Panics
    /// If the height or the width of block noise is odd.
    pub fn latent(&self) -> Latent {
        const QUAD: usize = 4;
        let shape = self.shape;
        let mut latent = Latent::zeros(shape);
        let rows = latent.data_mut().par_chunks_exact_mut(shape.width * CHANNELS);
        rows.enumerate().for_each(|(row, values)| {
            let frame = self.first.wrapping_add((row / shape.height) as u32);
            let y = (row % shape.height) as u32;
            for (i, quad) in values.chunks_exact_mut(QUAD).enumerate() {
                let x = (i / (CHANNELS / QUAD)) as u32;
                let channels = (i % (CHANNELS / QUAD)) as u32;
                let counter = [x, y, frame, self.kind | channels];
                quad.copy_from_slice(&philox::normals(counter, self.key));
            }
        });
        if self.block {
            project_to_block_noise(&mut latent);
        }
        latent
    }
}

/// Turns independent standard normals `e` into block noise, in place.
///
/// The covariance `(1+γ)I - γ·11ᵀ` of a block has the eigenvalue `1+γ` on vectors that sum to
/// zero and `1-3γ` on the constant one, which is 0 at γ = 1/3. Its symmetric square root is
/// therefore `√(1+γ)·(e - mean(e))`: no matrix need be factored (numerically, a singular one
/// may not factor at all).
///
/// # Panics
/// If the height or the width is odd.
pub fn project_to_block_noise(noise: &mut Latent) {
    let LatentShape { height, width, .. } = noise.shape();
    assert!(height % 2 == 0 && width % 2 == 0, "{} has no 2x2 blocks", noise.shape());
    let factor = (1.0 + GAMMA).sqrt();
    for rows in noise.data_mut().chunks_exact_mut(2 * width * CHANNELS) {
        let (top, bottom) = rows.split_at_mut(width * CHANNELS);
        let pairs = top.chunks_exact_mut(2 * CHANNELS).zip(bottom.chunks_exact_mut(2 * CHANNELS));
        for (t, b) in pairs {
            for c in 0..CHANNELS {
                let block = [t[c], t[c + CHANNELS], b[c], b[c + CHANNELS]].map(f64::from);
                let mean = (block[0] + block[1] + block[2] + block[3]) * 0.25;
                let block = block.map(|e| (factor * (e - mean)) as f32);
                [t[c], t[c + CHANNELS], b[c], b[c + CHANNELS]] = block;
            }
        }
    }
}

/// Replays the noise of another program's run.
#[derive(Debug, Clone)]
pub struct RecordedNoise {
    /// The initial noise of all frames, at full size.
    pub initial: Latent,
    /// The block noises in the order a run uses them: stages 1 and 2 of each unit.
    pub blocks: Vec<Latent>,
    /// The unit of the first block noise: 0, or 1 where unit 0 is a given image.
    pub first_unit: usize,
    /// The posterior noise of a given image.
    pub posterior: Option<Latent>,
}

impl NoiseSource for RecordedNoise {
    fn initial(&mut self, frame: usize, shape: LatentShape) -> Result<Noise> {
        let recorded = frame < self.initial.shape().frames;
        let noise = recorded.then(|| self.initial.frame(frame));
        replay(noise, shape, || format!("initial noise of frame {frame}")).map(Noise::Values)
    }

    fn block(&mut self, unit: usize, stage: usize, shape: LatentShape) -> Result<Noise> {
        const PER_UNIT: usize = STAGES - 1;
        let index = unit.checked_sub(self.first_unit).zip(stage.checked_sub(1));
        let index = index.map(|(unit, stage)| unit * PER_UNIT + stage);
        let noise = index.and_then(|index| self.blocks.get(index)).cloned();
        let what = || format!("block noise of unit {unit}, stage {stage}");
        replay(noise, shape, what).map(Noise::Values)
    }

    fn posterior(&mut self, shape: LatentShape) -> Result<Latent> {
        replay(self.posterior.clone(), shape, || "posterior noise".to_owned())
    }
}

fn replay(noise: Option<Latent>, shape: LatentShape, what: impl Fn() -> String) -> Result<Latent> {
    let Some(noise) = noise else {
        return Err(Error::input(format!("the recording has no {}", what())));
    };
    if noise.shape() == shape {
        return Ok(noise);
    }
    Err(Error::input(format!("the recorded {} is {}, not {shape}", what(), noise.shape())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: LatentShape = LatentShape::frame(6, 4);

    /// Computed by an independent program: these bits are part of the meaning of a seed and
    /// must never change.
    #[test]
    fn the_bits_of_a_seed_are_fixed() {
        let noise = PhiloxNoise { seed: 0x0123_4567_89ab_cdef };
        let at = |latent: &Latent| {
            let start = (5 * SHAPE.width + 3) * CHANNELS + 8;
            let bits: Vec<_> =
                latent.data()[start..start + 4].iter().map(|z| z.to_bits()).collect();
            bits
        };
        let draw = |purpose, stage, first| noise.draw(purpose, stage, first, SHAPE).latent();
        let initial = at(&draw(Purpose::Initial, 0, 7));
        assert_eq!(initial, [0xbe54_333d, 0x3f00_02af, 0xbfc8_e765, 0xbf03_6fb0]);
        // Before they are made to sum to zero.
        let block = Draw { block: false, ..noise.draw(Purpose::Block, 2, 7, SHAPE) };
        assert_eq!(at(&block.latent()), [0x3f3d_419b, 0x3ef2_4b37, 0xbfad_2f11, 0xbfa1_afc7]);
        let posterior = at(&draw(Purpose::Posterior, 0, 0));
        assert_eq!(posterior, [0xbf4e_4cd3, 0xbe68_dddb, 0xbef0_872c, 0x3ef7_9caa]);
    }

    #[test]
    fn a_value_depends_on_its_own_coordinates_only() {
        let noise = PhiloxNoise { seed: 5 };
        let large = LatentShape { frames: 3, height: 8, width: 10 };
        let all = noise.draw(Purpose::Initial, 0, 0, large).latent();
        let part = noise.draw(Purpose::Initial, 0, 2, SHAPE).latent();
        for y in 0..SHAPE.height {
            let row = SHAPE.width * CHANNELS;
            let start = (2 * large.height + y) * large.width * CHANNELS;
            assert_eq!(all.data()[start..start + row], part.data()[y * row..(y + 1) * row]);
        }
    }

    #[test]
    fn recordings_replay_in_order_and_check_shapes() {
        let numbered =
            |value: f32, shape: LatentShape| Latent::new(shape, vec![value; shape.len()]).unwrap();
        let small = LatentShape::frame(3, 2);
        let mut noise = RecordedNoise {
            initial: Latent::concat(&[numbered(1.0, SHAPE), numbered(2.0, SHAPE)]),
            blocks: (0..4)
                .map(|i| numbered(i as f32, if i % 2 == 0 { small } else { SHAPE }))
                .collect(),
            first_unit: 1,
            posterior: None,
        };
        let values = |value, shape| Noise::Values(numbered(value, shape));
        assert_eq!(noise.initial(1, SHAPE).unwrap(), values(2.0, SHAPE));
        assert_eq!(noise.block(1, 2, SHAPE).unwrap(), values(1.0, SHAPE));
        assert_eq!(noise.block(2, 1, small).unwrap(), values(2.0, small));
        for missing in [
            noise.initial(2, SHAPE),
            noise.block(0, 1, small),
            noise.block(3, 1, small),
            noise.block(1, 1, SHAPE),
            noise.posterior(SHAPE).map(Noise::Values),
        ] {
            assert_eq!(missing.unwrap_err().kind(), crate::ErrorKind::Input);
        }
        noise.posterior = Some(numbered(9.0, SHAPE));
        assert_eq!(noise.posterior(SHAPE).unwrap(), numbered(9.0, SHAPE));
    }
}
