//! Whole runs from embeddings to latents, with the noise of the recorded ones.
//!
//! Our latents stay f32 between steps and timesteps are not rounded, as in the f32 computation
//! that we are compared with; the published pipeline rounds both when it runs in bf16.

use std::sync::Arc;
use std::time::Instant;

use pyraflow::Result;
use pyraflow::checkpoint::Checkpoint;
use pyraflow::exec::Backend;
use pyraflow::pipeline::{Request, Transformer};
use pyraflow::sampler::{SamplerRequest, Silent, sample};
use pyraflow::tensor::WeightSource;
use serde_json::json;

use super::Repeated;
use super::calls::prompts;
use super::common::golden::{Golden, channels_last, relative_error};
use super::common::runs::{noise_of, with_settings};

/// Whether `golden` is a run rather than a call.
pub fn is_run(golden: &Golden) -> bool {
    golden.has("noise.initial")
}

/// Repeats the run in `golden`: once to warm up, once to be timed.
pub fn repeat(
    golden: &Golden,
    checkpoint: &Checkpoint,
    weights: &Arc<dyn WeightSource>,
    backend: &dyn Backend,
) -> Result<Repeated> {
    let (request, _) = with_settings(golden, Request::new(checkpoint, "", None)).resolve()?;
    let (found, _) = latents(golden, &request, checkpoint, weights, backend)?;
    let (again, seconds) = latents(golden, &request, checkpoint, weights, backend)?;
    let (shape, expected) = golden.tensor("out");
    let expected = channels_last(&shape, &expected).1;
    let unit = request.unit_shape().len();
    let pairs = found.chunks_exact(unit).zip(expected.chunks_exact(unit));
    let errors: Vec<f64> = pairs.map(|(found, expected)| relative_error(found, expected)).collect();
    let summary = json!({
        "height": golden.json::<u32>("height"), "width": golden.json::<u32>("width"), "units": request.units,
        "steps": request.steps, "video_steps": request.video_steps, "guidance": request.guidance,
        "video_guidance": request.video_guidance, "unit_errors": errors,
    });
    let same_bits = found == again;
    Ok(Repeated { found, expected, seconds, run: Some(summary), same_bits })
}

/// The latents of all units, and the seconds they take.
fn latents(
    golden: &Golden,
    request: &SamplerRequest,
    checkpoint: &Checkpoint,
    weights: &Arc<dyn WeightSource>,
    backend: &dyn Backend,
) -> Result<(Vec<f32>, f64)> {
    let (prompts, mut noise) = (prompts(golden), noise_of(golden));
    let session = backend.open(weights.clone())?;
    let start = Instant::now();
    let (config, dtype) = (checkpoint.transformer(), backend.activations());
    let mut transformer = Transformer::new(config, session, dtype, &prompts, request)?;
    let latents = sample(request, Vec::new(), &mut transformer, &mut noise, &mut Silent)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok((latents.iter().flat_map(|l| l.data().iter().copied()).collect(), seconds))
}
