//! Whole runs against recorded ones: same settings, same noise.

use std::path::Path;

use pyraflow::checkpoint::{Checkpoint, StoreOptions, Variant};
use pyraflow::exec::{Backend, Cpu};
use pyraflow::media::{Fit, Frame};
use pyraflow::pipeline::{FirstImage, Pipeline, Quiet, Request, Tiling, Tokenizers, pixels_of};
use pyraflow::sampler::{Latent, LatentShape, LinearGuidance, RecordedNoise};

use super::golden::{Golden, channels_last, check};
use super::networks::Comparison;

/// Relative error allowed for whole runs.
pub const WHOLE_RUN: f64 = 2e-5;
/// Share of frame values that may differ, by 1 at most.
const DIFFERENT_VALUES: f64 = 1e-3;

/// Opens the checkpoint in `folder` with the transformer in the folder `variant`, else with
/// the first there is.
pub fn checkpoint(folder: &Path, variant: Option<&str>) -> Checkpoint {
    let named = variant.and_then(|v| v.strip_prefix("diffusion_transformer_"));
    let first = Variant::available(folder).first().map(|v| v.name());
    Checkpoint::open(folder, named.or(first)).expect("checkpoint")
}

/// Opens all of a checkpoint on the CPU; converted weights do not go into its folder.
pub fn open(folder: &Path, variant: Option<&str>) -> Pipeline {
    open_on(folder, variant, Box::new(Cpu::new()))
}

/// The same on any backend.
pub fn open_on(folder: &Path, variant: Option<&str>, backend: Box<dyn Backend>) -> Pipeline {
    let store = tempfile::tempdir().expect("folder");
    let options = StoreOptions::below(store.path());
    let checkpoint = checkpoint(folder, variant);
    Pipeline::open(checkpoint, backend, &options, &mut Quiet).expect("pipeline")
}

/// The request a golden run's settings describe.
fn request_of(golden: &Golden, pipeline: &Pipeline) -> Request {
    let image =
        golden.has("image_u8").then(|| FirstImage { path: "golden".into(), fit: Fit::Crop });
    let mut request =
        Request::new(pipeline.checkpoint(), golden.setting("prompt").expect("prompt"), image);
    request.suffix = golden.setting("prompt_suffix").expect("suffix").to_string();
    request.negative = golden.setting("negative_prompt").expect("negative").to_string();
    with_settings(golden, request)
}

/// `request` with the size, the steps and the guidance of a recorded run.
pub fn with_settings(golden: &Golden, mut request: Request) -> Request {
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

/// The noise that was drawn in the run.
pub fn noise_of(golden: &Golden) -> RecordedNoise {
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

/// The recorded ones among `frames` beside their recording.
pub fn shown(what: &str, golden: &Golden, frames: &[Vec<u8>]) -> Comparison {
    let (shape, expected) = golden.tensor("frames");
    let stride: usize = golden.json("frame_stride").unwrap_or(1);
    let frames = (0..shape[0]).flat_map(|i| frames[i * stride].iter().map(|&v| f32::from(v)));
    Comparison { what: what.to_string(), found: frames.collect(), golden: expected }
}

fn compare_frames(what: &str, golden: &Golden, frames: &[Vec<u8>]) {
    let Comparison { found, golden, .. } = shown(what, golden, frames);
    let differences = found.iter().zip(&golden).map(|(f, g)| (f - g).abs());
    let different = differences.clone().filter(|d| *d > 0.0).count();
    let worst = differences.fold(0.0, f32::max);
    let share = different as f64 / golden.len() as f64;
    println!("{what} frames: {:.4} % of the values differ, by {worst} at most", 100.0 * share);
    assert!(worst <= 1.0 && share <= DIFFERENT_VALUES, "{what}: {share} by {worst}");
}

/// What the text encoders make of the prompts of `golden`, beside what is recorded there.
pub fn encoded(
    family: &str,
    folder: &Path,
    golden: &Golden,
    backend: Box<dyn Backend>,
) -> Vec<Comparison> {
    let pipeline = open_on(folder, None, backend);
    let tokenizers = Tokenizers::open(pipeline.checkpoint()).expect("tokenizers");
    let prompt = golden.setting("prompt").unwrap_or_default();
    let negative = golden.setting("negative").unwrap_or_default();
    let ids: Vec<_> =
        [prompt, negative, ""].iter().map(|p| tokenizers.encode(p).expect("ids")).collect();
    let encoded = pipeline.encode_prompts(&ids, &mut Quiet).expect("embeddings");
    let mut comparisons = Vec::new();
    for (name, found) in ["prompt", "negative", "empty"].into_iter().zip(encoded) {
        if !golden.has(&format!("{name}.embeds")) {
            continue;
        }
        let (_, mask) = golden.tensor(&format!("{name}.mask"));
        let kept = mask.iter().filter(|m| **m != 0.0).count();
        assert_eq!(kept, found.tokens, "{family} {name}: tokens");
        let (shape, embeds) = golden.tensor(&format!("{name}.embeds"));
        let (_, pooled) = golden.tensor(&format!("{name}.pooled"));
        for (part, found, golden) in [
            ("embeds", found.embeds, embeds[..kept * shape[2]].to_vec()),
            ("pooled", found.pooled, pooled),
        ] {
            comparisons.push(Comparison { what: format!("{family} {name} {part}"), found, golden });
        }
    }
    comparisons
}

/// Repeats the run in the file `recorded` with the checkpoint in `folder` and compares
/// latents and frames. Says whether there is such a file.
pub fn whole_run(what: &str, folder: &Path, recorded: &Path) -> bool {
    let Some(golden) = Golden::open(recorded) else { return false };
    let pipeline = open(folder, golden.setting("variant"));
    let (latents, frames) = repeat(what, &golden, &pipeline);
    check(&latents.what, &latents.found, &latents.golden, WHOLE_RUN);
    if golden.has("frames") {
        compare_frames(what, &golden, &frames);
    }
    true
}

/// Repeats the run `golden`: its latents beside the recorded ones, and its frames.
pub fn repeat(what: &str, golden: &Golden, pipeline: &Pipeline) -> (Comparison, Vec<Vec<u8>>) {
    let request = request_of(golden, pipeline);
    let ids = pipeline.tokenize(&request).expect("ids");
    let prompts = pipeline.encode_prompts(&ids, &mut Quiet).expect("embeddings");
    let mut noise = noise_of(golden);
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
    let comparison = Comparison {
        what: format!("{what} latents"),
        found: latents.iter().flat_map(|l| l.data().iter().copied()).collect(),
        golden: channels_last(&shape, &expected).1,
    };
    let mut frames = Vec::new();
    if golden.has("frames") {
        let keep = |frame: Frame| {
            frames.push(frame.into_data());
            Ok(())
        };
        pipeline.decode(&latents, request.tiling, keep).expect("frames");
    }
    (comparison, frames)
}
