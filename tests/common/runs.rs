//! Whole runs against recorded ones: same settings, same noise.

use std::path::Path;

use pyraflow::checkpoint::{Checkpoint, StoreOptions, Variant};
use pyraflow::exec::Cpu;
use pyraflow::media::{Fit, Frame};
use pyraflow::pipeline::{
    FirstImage, Pipeline, Quiet, Request, Tiling, Volume, frame_of, pixels_of,
};
use pyraflow::sampler::{Latent, LatentShape, LinearGuidance, RecordedNoise};

use super::golden::{Golden, channels_last, check};

/// Relative error allowed for whole runs.
const WHOLE_RUN: f64 = 2e-5;
/// Share of frame values that may differ, by 1 at most.
const DIFFERENT_VALUES: f64 = 1e-3;

/// Opens the checkpoint in `folder` with the transformer in the folder `variant`, else with
/// the first there is.
pub fn checkpoint(folder: &Path, variant: Option<&str>) -> Checkpoint {
    let named = variant.and_then(|v| v.strip_prefix("diffusion_transformer_"));
    let first = Variant::available(folder).first().map(|v| v.name());
    Checkpoint::open(folder, named.or(first)).expect("checkpoint")
}

/// Opens all of a checkpoint; converted weights do not go into its folder.
pub fn open(folder: &Path, variant: Option<&str>) -> Pipeline {
    let store = tempfile::tempdir().expect("folder");
    let options = StoreOptions::below(store.path());
    let checkpoint = checkpoint(folder, variant);
    Pipeline::open(checkpoint, Box::new(Cpu::new()), &options, &mut Quiet).expect("pipeline")
}

/// The request a golden run's settings describe.
fn request_of(golden: &Golden, pipeline: &Pipeline) -> Request {
    let image =
        golden.has("image_u8").then(|| FirstImage { path: "golden".into(), fit: Fit::Crop });
    let mut request =
        Request::new(pipeline.checkpoint(), golden.setting("prompt").expect("prompt"), image);
    request.suffix = golden.setting("prompt_suffix").expect("suffix").to_string();
    request.negative = golden.setting("negative_prompt").expect("negative").to_string();
    request.width = golden.json("width").expect("width");
    request.height = golden.json("height").expect("height");
    request.units = golden.json("temp").expect("temp");
    request.steps = golden.json("num_inference_steps").expect("steps");
    request.video_steps = golden.json("video_num_inference_steps").unwrap_or(request.steps);
    request.guidance = golden.json("guidance_scale").expect("guidance");
    request.video_guidance = golden.json("video_guidance_scale").expect("guidance");
    if golden.json("use_linear_guidance") == Some(true) {
        let default = LinearGuidance::default();
        request.linear_guidance = Some(LinearGuidance {
            alpha: golden.json("alpha").unwrap_or(default.alpha),
            min: golden.json("min_guidance_scale").unwrap_or(default.min),
        });
    }
    request.tiling = golden.json("tiling").map(|tile| Tiling::new(tile).expect("tile"));
    request
}

fn noise_of(golden: &Golden) -> RecordedNoise {
    let latent = |name: &str| {
        let (shape, values) = golden.tensor(name);
        let ([frames, height, width, _], _) = channels_last(&shape, &values);
        let shape = LatentShape { frames, height, width };
        Latent::from_channels_first(shape, &values).expect("noise")
    };
    let mut blocks: Vec<String> =
        golden.names().into_iter().filter(|n| n.starts_with("noise.block")).collect();
    blocks.sort();
    RecordedNoise {
        initial: latent("noise.initial"),
        blocks: blocks.iter().map(|name| latent(name)).collect(),
        first_unit: golden.json("first_generated_unit").expect("first unit"),
        posterior: golden.has("noise.posterior").then(|| latent("noise.posterior")),
    }
}

fn compare_frames(what: &str, golden: &Golden, frames: &[Vec<u8>]) {
    let (shape, expected) = golden.tensor("frames");
    let stride: usize = golden.json("frame_stride").unwrap_or(1);
    let size: usize = shape[1..].iter().product();
    let (mut different, mut worst) = (0usize, 0.0f32);
    for (i, expected) in expected.chunks_exact(size).enumerate() {
        for (found, expected) in frames[i * stride].iter().zip(expected) {
            let difference = (f32::from(*found) - expected).abs();
            different += usize::from(difference > 0.0);
            worst = worst.max(difference);
        }
    }
    let share = different as f64 / expected.len() as f64;
    println!("{what} frames: {:.4} % of the values differ, by {worst} at most", 100.0 * share);
    assert!(worst <= 1.0 && share <= DIFFERENT_VALUES, "{what}: {share} by {worst}");
}

/// Repeats the run in the file `recorded` with the checkpoint in `folder` and compares
/// latents and frames. Says whether there is such a file.
pub fn whole_run(what: &str, folder: &Path, recorded: &Path) -> bool {
    let Some(golden) = Golden::open(recorded) else { return false };
    let pipeline = open(folder, golden.setting("variant"));
    let request = request_of(&golden, &pipeline);
    let ids = pipeline.tokenize(&request).expect("ids");
    let prompts = pipeline.encode_prompts(&ids, &mut Quiet).expect("embeddings");
    let mut noise = noise_of(&golden);
    let mut finished = Vec::new();
    if golden.has("image_u8") {
        let (shape, values) = golden.tensor("image_u8");
        let data = values.iter().map(|&v| v as u8).collect();
        let frame = Frame::new(shape[1] as u32, shape[0] as u32, data);
        let image = pixels_of(&frame.expect("image"));
        finished.push(pipeline.encode_image(&image, request.tiling, &mut noise).expect("latent"));
    }
    let latents = pipeline
        .sample(&request, &prompts, finished, &mut noise, None, &mut Quiet)
        .expect("latents");
    let (shape, expected) = golden.tensor("latents");
    let expected = channels_last(&shape, &expected).1;
    let found: Vec<f32> = latents.iter().flat_map(|l| l.data().iter().copied()).collect();
    check(&format!("{what} latents"), &found, &expected, WHOLE_RUN);

    if golden.has("frames") {
        let mut frames = Vec::new();
        let keep = |video: &Volume| {
            for i in 0..video.frames {
                frames.push(frame_of(video, i)?.into_data());
            }
            Ok(())
        };
        pipeline.decode(&latents, request.tiling, keep).expect("frames");
        compare_frames(what, &golden, &frames);
    }
    true
}
