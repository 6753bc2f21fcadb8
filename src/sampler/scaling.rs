//! Between the VAE's latents and the sampler's.
//!
//! The sampler works on latents of roughly unit variance. The first frame of a video, encoded
//! by the VAE like a single image, has other statistics than those that follow it.

use super::latent::{CHANNELS, Latent};
use crate::{Error, Result};

/// `sampler = (vae - shift) * scale` and its inverse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// Subtracted first.
    pub shift: f32,
    /// Multiplied by afterwards.
    pub scale: f32,
}

/// How a model family's latents are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentScaling {
    /// Of frame 0.
    pub first: Affine,
    /// Of all other frames.
    pub others: Affine,
}

impl LatentScaling {
    /// The family that uses the SD3 transformer.
    pub const SD3: Self = LatentScaling { first: affine(0.1490, 1.8415), others: OTHERS };

    /// The family that uses the miniature Flux transformer.
    pub const MINIFLUX: Self = LatentScaling { first: affine(-0.04, 1.8726), others: OTHERS };

    /// Frame `index` of a video as the VAE's decoder wants it.
    pub fn to_vae(&self, index: usize, latent: &mut Latent) {
        let Affine { shift, scale } = if index == 0 { self.first } else { self.others };
        latent.data_mut().iter_mut().for_each(|x| *x = *x / scale + shift);
    }

    /// An image sampled from the VAE's posterior as unit 0 of a run.
    pub fn image_from_vae(&self, latent: &mut Latent) {
        let Affine { shift, scale } = self.first;
        latent.data_mut().iter_mut().for_each(|x| *x = (*x - shift) * scale);
    }
}

const OTHERS: Affine = affine(-0.2343, 3.0986);

const fn affine(shift: f32, deviation: f64) -> Affine {
    Affine { shift, scale: (1.0 / deviation) as f32 }
}

/// A sample of the VAE's posterior, `mean + exp(logvar / 2) * noise`, with the log-variance
/// clamped to [-30, 20]. `moments` is channels last, [`CHANNELS`] means and then as many
/// log-variances per position.
///
/// # Errors
/// [`crate::ErrorKind::Input`] when `moments` has not two values for each of the noise's.
pub fn sample_posterior(moments: &[f32], noise: &Latent) -> Result<Latent> {
    if moments.len() != 2 * noise.data().len() {
        let (shape, len) = (noise.shape(), moments.len());
        return Err(Error::input(format!("{len} moments do not fit a latent of shape {shape}")));
    }
    let mut sample = noise.clone();
    let positions = sample.data_mut().chunks_exact_mut(CHANNELS);
    for (values, moments) in positions.zip(moments.chunks_exact(2 * CHANNELS)) {
        let (means, logvars) = moments.split_at(CHANNELS);
        for ((value, mean), logvar) in values.iter_mut().zip(means).zip(logvars) {
            *value = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * *value;
        }
    }
    Ok(sample)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::latent::LatentShape;

    fn filled(value: f32) -> Latent {
        let shape = LatentShape::frame(1, 2);
        Latent::new(shape, vec![value; shape.len()]).unwrap()
    }

    #[test]
    fn scaling_uses_the_published_constants() {
        let close = |latent: &Latent, expected: f32| {
            latent.data().iter().all(|x| (x - expected).abs() < 1e-6)
        };
        for (family, first) in
            [(LatentScaling::SD3, 1.8415 + 0.149), (LatentScaling::MINIFLUX, 1.8726 - 0.04)]
        {
            let mut latent = filled(1.0);
            family.to_vae(0, &mut latent);
            assert!(close(&latent, first), "{latent:?}");
            family.image_from_vae(&mut latent);
            assert!(close(&latent, 1.0), "{latent:?}");
            for index in [1, 30] {
                let mut latent = filled(1.0);
                family.to_vae(index, &mut latent);
                assert!(close(&latent, 3.0986 - 0.2343), "{latent:?}");
            }
        }
    }

    #[test]
    fn posterior_samples_use_mean_and_clamped_deviation() {
        let noise = filled(2.0);
        let mut moments = vec![0.0; 2 * noise.data().len()];
        moments[0] = 5.0; // mean of (0, 0, 0, 0)
        moments[CHANNELS] = 4f32.ln(); // its log-variance
        moments[CHANNELS + 1] = -1e9; // clamped to a deviation of e^-15
        moments[3 * CHANNELS + 2] = 1e9; // of (0, 0, 1, 2): clamped to e^10
        let sample = sample_posterior(&moments, &noise).unwrap();
        assert!((sample.data()[0] - 9.0).abs() < 1e-5);
        assert!((sample.data()[1] - 2.0 * (-15f32).exp()).abs() < 1e-12);
        assert!((sample.data()[CHANNELS + 2] / (2.0 * 10f32.exp()) - 1.0).abs() < 1e-5);
        assert_eq!(sample.data()[3], 2.0);
        assert!(sample_posterior(&moments[1..], &noise).is_err());
    }
}
