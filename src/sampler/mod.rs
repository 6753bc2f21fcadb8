//! The pyramid sampler: noise in, latent frames out.
//!
//! A video is made one latent frame (a *unit*) at a time, and each unit in three *stages*
//! of growing size: a quarter of the full latent size, a half, the whole. A stage is an
//! Euler integration of the velocity that the transformer predicts from the current frame
//! and from the finished ones (the *history*, older frames at lower resolution). Between
//! stages the frame is doubled in size and renoised.
//!
//! | file | what it holds |
//! |---|---|
//! | [`latent`] | [`Latent`]: the channels-last tensor of latent frames and its resizings |
//! | [`schedule`] | timesteps, sigmas and the renoising coefficients of the stages |
//! | [`philox`] | the counter-based random generator |
//! | [`noise`] | [`NoiseSource`]: seeded or recorded noise |
//! | [`entry`] | [`Entry`]: what a stage starts from |
//! | [`history`] | which finished frames a stage sees, and at which size |
//! | [`guidance`] | classifier-free guidance and the Euler step |
//! | [`scaling`] | between the VAE's latents and the sampler's |
//! | [`request`] | [`SamplerRequest`]: what to sample, validated, and its per-stage geometry |
//! | [`driver`] | [`sample`]: the loop over units, stages and steps |
//!
//! Everything here is plain f32 on the host, and simple: the work is the transformer's, which
//! the driver sees only as a [`Denoiser`]. That also keeps the latent of the frame being
//! sampled; what happens to it here is the meaning that a device's kernels are held to.

pub mod driver;
pub mod entry;
pub mod guidance;
pub mod history;
pub mod latent;
pub mod noise;
pub mod philox;
pub mod request;
pub mod scaling;
pub mod schedule;

pub use driver::{Denoiser, Observer, Silent, Step, sample};
pub use entry::Entry;
pub use guidance::{LinearGuidance, guided_euler_step};
pub use history::{Clip, History, clips};
pub use latent::{CHANNELS, Latent, LatentShape};
pub use noise::{Draw, Noise, NoiseSource, PhiloxNoise, RecordedNoise};
pub use request::{MAX_EXTENT, MAX_UNITS, Mode, Rounding, SamplerRequest, StageGeometry};
pub use scaling::{LatentScaling, sample_posterior};
pub use schedule::{STAGES, Schedule, StageSchedule, stage_spans};
