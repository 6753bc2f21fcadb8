//! The three-stage flow-matching schedule: timesteps, sigmas and renoising coefficients.
//!
//! The schedule of the whole flow has 1000 sigmas, cut into three spans of equal length.
//! Going from one stage to the next doubles the frame by repeating values, which leaves its
//! noise correlated within 2x2 blocks. Fresh block-correlated noise is added until the sum is
//! white again (section 3.2 of arXiv 2410.05954), so each later stage begins at a higher
//! noise level, [`StageSpan::start`], than where the previous one ended.
//!
//! Everything is computed in f64 in the order NumPy's `linspace` uses, so that the published
//! values come out exactly.

use crate::{Error, Result};

/// Number of pyramid stages.
pub const STAGES: usize = 3;

/// Most steps that a stage can take: as many as there are training timesteps.
pub const MAX_STEPS: usize = TRAINING_STEPS;

/// The correlation of block noise: its 2x2 blocks have covariance `(1+γ)I - γ·11ᵀ`.
pub const GAMMA: f64 = 1.0 / 3.0;

const TRAINING_STEPS: usize = 1000;

/// Where a stage lies in the flow; sigma 1 is pure noise, 0 a clean frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageSpan {
    /// Sigma where the stage would start if no renoising were needed.
    pub original_start: f64,
    /// Sigma where it starts, renoising counted. It only decides `ratios`.
    pub start: f64,
    /// Sigma where it ends.
    pub end: f64,
    /// Beginning and end of the stage's share of the training timesteps, in 0..=1.
    pub ratios: (f64, f64),
}

impl StageSpan {
    /// The coefficients `(alpha, beta)` on entering this stage from the one below:
    /// `x <- alpha * doubled(x) + beta * block noise`.
    pub fn renoise(&self) -> (f64, f64) {
        let clean = 1.0 - self.original_start;
        let alpha = 1.0 / spread(clean);
        (alpha, alpha * (1.0 - clean) / GAMMA.sqrt())
    }
}

/// `√(1+1/γ)·(1−s) + s`, for the clean share `s` where a stage is entered.
fn spread(clean: f64) -> f64 {
    (1.0 + 1.0 / GAMMA).sqrt() * (1.0 - clean) + clean
}

/// The spans of the three stages.
pub fn stage_spans() -> [StageSpan; STAGES] {
    let sigma = |k: usize| f64::from((TRAINING_STEPS - k) as f32 / TRAINING_STEPS as f32);
    let boundary = |stage: usize| TRAINING_STEPS * stage / STAGES;
    let mut spans: [StageSpan; STAGES] = std::array::from_fn(|stage| {
        let original_start = sigma(boundary(stage));
        let clean = 1.0 - original_start;
        let start = if stage == 0 { 1.0 } else { 1.0 - clean / spread(clean) };
        let end = if stage + 1 == STAGES { 0.0 } else { sigma(boundary(stage + 1)) };
        StageSpan { original_start, start, end, ratios: (0.0, 1.0) }
    });
    let total: f64 = spans.iter().map(|span| span.start - span.end).sum();
    let mut covered = 0.0;
    for stage in 0..STAGES - 1 {
        covered += spans[stage].start - spans[stage].end;
        spans[stage].ratios.1 = covered / total;
        spans[stage + 1].ratios.0 = covered / total;
    }
    spans
}

/// The steps of one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct StageSchedule {
    /// The timestep of each step, falling, in 0..=1000.
    pub timesteps: Vec<f64>,
    /// The sigma before each step and, last, 0 after the final one.
    pub sigmas: Vec<f64>,
}

impl StageSchedule {
    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// What the velocity of step `k` is multiplied by: the (negative) change of sigma.
    pub fn dsigma(&self, k: usize) -> f32 {
        (self.sigmas[k + 1] - self.sigmas[k]) as f32
    }
}

/// The steps of all stages of one unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// One entry per stage.
    pub stages: [StageSchedule; STAGES],
}

impl Schedule {
    /// The schedule with the given number of steps per stage.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when a stage has no steps or more than [`MAX_STEPS`].
    pub fn new(steps: [usize; STAGES]) -> Result<Self> {
        if steps.iter().any(|steps| !(1..=MAX_STEPS).contains(steps)) {
            let [a, b, c] = steps;
            return Err(Error::input(format!("cannot take {a}, {b} and {c} steps"))
                .hint(format!("every stage takes 1 to {MAX_STEPS} steps")));
        }
        // 1, 0.999, … 0.001: the same in every stage.
        let sigmas = linspace_without_end(1.0, 0.0);
        let spans = stage_spans();
        let stages = std::array::from_fn(|stage| {
            // Training timestep k is 1000 - k.
            let index = |ratio: f64| (ratio * TRAINING_STEPS as f64) as usize;
            let first = TRAINING_STEPS - index(spans[stage].ratios.0);
            let last = TRAINING_STEPS - index(spans[stage].ratios.1).min(TRAINING_STEPS - 1);
            let timesteps = linspace_without_end(first as f64, last as f64);
            StageSchedule {
                timesteps: linspace(timesteps.0, timesteps.1, steps[stage]),
                sigmas: {
                    let mut sigmas = linspace(sigmas.0, sigmas.1, steps[stage]);
                    sigmas.push(0.0);
                    sigmas
                },
            }
        });
        Ok(Schedule { stages })
    }
}

/// First and last of the 1000 points left when the end of 1001 evenly spaced ones is dropped.
fn linspace_without_end(start: f64, stop: f64) -> (f64, f64) {
    let step = (stop - start) / TRAINING_STEPS as f64;
    (start, (TRAINING_STEPS - 1) as f64 * step + start)
}

/// `n` evenly spaced points from `start` to `stop` inclusive (`start` alone if n is 1), with
/// the operations of NumPy in its order.
fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    let mut points: Vec<f64> = (0..n).map(|k| k as f64 * step + start).collect();
    if n > 1 {
        points[n - 1] = stop;
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_counts_are_checked() {
        for bad in [[0, 1, 1], [1, 0, 1], [1, 1, 1001], [usize::MAX, 1, 1]] {
            let error = Schedule::new(bad).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Input);
        }
        let longest = Schedule::new([1000; 3]).unwrap();
        assert_eq!(longest.stages[2].timesteps.len(), 1000);
        assert_eq!(longest.stages[2].sigmas.len(), 1001);
    }

    /// A doubled frame at the end of a stage has signal `1 - σ` and noise `σ`, and the noise is
    /// equal within 2x2 blocks. After renoising, the noise must be white and signal and noise
    /// must be where the next stage starts.
    #[test]
    fn renoising_whitens_the_noise_and_meets_the_next_start() {
        let spans = stage_spans();
        for stage in 1..STAGES {
            let (alpha, beta) = spans[stage].renoise();
            let sigma = spans[stage - 1].end;
            let correlated = (alpha * sigma).powi(2);
            let covariance = correlated - beta.powi(2) * GAMMA;
            assert!(covariance.abs() < 1e-12, "covariance {covariance}");
            let deviation = (correlated + beta.powi(2)).sqrt();
            assert!((deviation - spans[stage].start).abs() < 1e-12, "noise {deviation}");
            let signal = alpha * (1.0 - sigma);
            assert!((signal - (1.0 - spans[stage].start)).abs() < 1e-12, "signal {signal}");
        }
    }

    #[test]
    fn sigmas_fall_to_zero_and_steps_add_up() {
        let schedule = Schedule::new([1, 7, 20]).unwrap();
        for stage in &schedule.stages {
            assert!(stage.sigmas.is_sorted_by(|a, b| a > b));
            assert!(stage.timesteps.is_sorted_by(|a, b| a > b));
            let sum: f64 = (0..stage.steps()).map(|k| f64::from(stage.dsigma(k))).sum();
            assert!((sum + 1.0).abs() < 1e-6, "{sum}");
        }
    }
}
