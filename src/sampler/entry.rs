//! Entering a stage: what its first step starts from.

use super::latent::{Latent, LatentShape};
use super::noise::Noise;
use super::schedule::STAGES;
use crate::{Error, Result};

/// How the latent that a stage starts from is made.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// Stage 0: noise of the full latent size, halved [`Entry::HALVINGS`] times and multiplied
    /// by [`Entry::START_FACTOR`].
    Start {
        /// Standard normal noise.
        noise: Noise,
    },
    /// A stage above: `alpha * doubled(x) + beta * noise`, `x` being what the stage below
    /// ended with.
    Renoise {
        /// Factor on the doubled latent.
        alpha: f32,
        /// Factor on the noise.
        beta: f32,
        /// Block noise of the stage's size.
        noise: Noise,
    },
}

impl Entry {
    /// Halvings from the full latent size to that of stage 0.
    pub const HALVINGS: usize = STAGES - 1;

    /// The mean of 4 independent normals has half their deviation, so each halving is made up
    /// for by a factor of 2; powers of two commute with rounding.
    pub const START_FACTOR: f32 = (1 << Self::HALVINGS) as f32;

    /// The noise.
    pub fn noise(&self) -> &Noise {
        match self {
            Entry::Start { noise } | Entry::Renoise { noise, .. } => noise,
        }
    }

    /// The size of the latent that is made.
    pub fn shape(&self) -> LatentShape {
        let shape = self.noise().shape();
        match self {
            Entry::Start { .. } => LatentShape {
                height: shape.height >> Self::HALVINGS,
                width: shape.width >> Self::HALVINGS,
                ..shape
            },
            Entry::Renoise { .. } => shape,
        }
    }

    /// Makes the latent on the host: what a device's is held to. `below` is what the stage
    /// below ended with; stage 0 has none.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when `below` is needed and missing.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn latent(&self, below: Option<&Latent>) -> Result<Latent> {
        let noise = self.noise().clone().into_latent();
        match self {
            Entry::Start { .. } => {
                let mut x = (0..Self::HALVINGS).fold(noise, |x, _| x.halved());
                x.scale(Self::START_FACTOR);
                Ok(x)
            }
            Entry::Renoise { alpha, beta, .. } => {
                let mut x = below.ok_or_else(Self::nothing_below)?.doubled();
                x.renoise(&noise, *alpha, *beta);
                Ok(x)
            }
        }
    }

    /// The error of a stage above the first that none came before.
    pub fn nothing_below() -> Error {
        Error::usage("a stage above the first was begun before any other")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(shape: LatentShape, value: f32) -> Latent {
        Latent::new(shape, vec![value; shape.len()]).unwrap()
    }

    #[test]
    fn latents_have_the_stage_s_size() {
        let full = LatentShape::frame(8, 16);
        let noise = || Noise::Values(filled(full, 0.5));
        let start = Entry::Start { noise: noise() };
        assert_eq!(start.shape(), LatentShape::frame(2, 4));
        assert_eq!(start.latent(None).unwrap(), filled(start.shape(), 2.0));
        let renoise = Entry::Renoise { alpha: 0.75, beta: 2.0, noise: noise() };
        let below = filled(LatentShape::frame(4, 8), 4.0);
        assert_eq!(renoise.shape(), full);
        assert_eq!(renoise.latent(Some(&below)).unwrap(), filled(full, 4.0));
        assert_eq!(renoise.latent(None).unwrap_err().kind(), crate::ErrorKind::Usage);
    }
}
