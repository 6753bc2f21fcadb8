//! Whole runs, from text to frames, with the noise of the published implementation's runs.

mod common;

use std::path::Path;

use common::golden::{Golden, channels_last, check};
use common::goldens;
use pyraflow::checkpoint::{Checkpoint, StoreOptions};
use pyraflow::exec::Cpu;
use pyraflow::media::Fit;
use pyraflow::pipeline::{
    FirstImage, Pipeline, PromptTokens, Quiet, Request, Tiling, Tokenizers, Volume, frame_of,
    pixels_of,
};
use pyraflow::sampler::{Latent, LinearGuidance, RecordedNoise};

/// Relative error allowed for the text encoders, a single call.
const SINGLE_CALL: f64 = 1e-5;
/// Relative error allowed for whole runs.
const WHOLE_RUN: f64 = 2e-5;
/// Share of frame values that may differ, by 1 at most.
const DIFFERENT_VALUES: f64 = 1e-3;

const FAMILIES: [&str; 2] = ["sd3", "flux"];

fn open(folder: &Path, variant: Option<&str>) -> Pipeline {
    let variant = variant.and_then(|v| v.strip_prefix("diffusion_transformer_"));
    let checkpoint = Checkpoint::open(folder, variant).expect("checkpoint");
    let store = tempfile::tempdir().expect("folder");
    let options = StoreOptions::below(store.path());
    Pipeline::open(checkpoint, Box::new(Cpu::new()), &options, &mut Quiet).expect("pipeline")
}

fn tokens(pipeline: &Pipeline, prompts: &[&str]) -> Vec<PromptTokens> {
    let tokenizers = Tokenizers::open(pipeline.checkpoint()).expect("tokenizers");
    prompts.iter().map(|p| tokenizers.encode(p).expect("ids")).collect()
}

#[test]
fn text_encoders_agree_with_the_published_ones() {
    let mut seen = 0;
    for family in FAMILIES {
        let folder = goldens().join(family);
        let Some(golden) = Golden::open(&folder.join("text.safetensors")) else { continue };
        let pipeline = open(&folder, None);
        let prompt = golden.setting("prompt").expect("prompt");
        let negative = golden.setting("negative").expect("negative");
        let ids = tokens(&pipeline, &[prompt, negative, ""]);
        let encoded = pipeline.encode_prompts(&ids, &mut Quiet).expect("embeddings");
        for (name, found) in ["prompt", "negative", "empty"].into_iter().zip(encoded) {
            let (_, mask) = golden.tensor(&format!("{name}.mask"));
            let kept = mask.iter().filter(|m| **m != 0.0).count();
            assert_eq!(kept, found.tokens, "{family} {name}: tokens");
            let (shape, embeds) = golden.tensor(&format!("{name}.embeds"));
            let used = &embeds[..kept * shape[2]];
            check(&format!("{family} {name} embeds"), &found.embeds, used, SINGLE_CALL);
            let (_, pooled) = golden.tensor(&format!("{name}.pooled"));
            check(&format!("{family} {name} pooled"), &found.pooled, &pooled, SINGLE_CALL);
        }
        seen += 1;
    }
    assert!(seen > 0, "no text golden in {}", goldens().display());
}

/// The request a golden run's settings describe.
fn request_of(golden: &Golden, pipeline: &Pipeline) -> Request {
    let image = golden.has("image_u8").then(|| FirstImage { path: "golden".into(), fit: Fit::Crop });
    let mut request = Request::new(pipeline.checkpoint(), golden.setting("prompt").expect("prompt"), image);
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
        let shape = pyraflow::sampler::LatentShape { frames, height, width };
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

fn whole_run(family: &str, name: &str) -> bool {
    let folder = goldens().join(family);
    let Some(golden) = Golden::open(&folder.join(format!("{name}.safetensors"))) else {
        return false;
    };
    let what = format!("{family} {name}");
    let pipeline = open(&folder, golden.setting("variant"));
    let request = request_of(&golden, &pipeline);
    let ids = pipeline.tokenize(&request).expect("ids");
    let prompts = pipeline.encode_prompts(&ids, &mut Quiet).expect("embeddings");
    let mut noise = noise_of(&golden);
    let mut finished = Vec::new();
    if golden.has("image_u8") {
        let (shape, values) = golden.tensor("image_u8");
        let data = values.iter().map(|&v| v as u8).collect();
        let frame = pyraflow::media::Frame::new(shape[1] as u32, shape[0] as u32, data);
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
        compare_frames(&what, &golden, &frames);
    }
    true
}

/// One test per kind of run, so that they go on side by side.
macro_rules! runs {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let present = FAMILIES.map(|family| whole_run(family, stringify!($name)));
            if !present.contains(&true) {
                println!("{} holds no {} run: skipped", goldens().display(), stringify!($name));
            }
        }
    )*};
}

runs!(t2v, i2v, t2i, t2v_linear_guidance, t2v_no_guidance);

#[test]
fn there_are_whole_runs() {
    let any = FAMILIES.iter().any(|f| goldens().join(f).join("t2v.safetensors").exists());
    assert!(any, "no whole run in {}", goldens().display());
}

#[test]
fn published_tiling_agrees() {
    let golden = Golden::open(&goldens().join("vae.safetensors")).expect("a VAE golden");
    let pipeline = open(&goldens().join(golden.setting("checkpoint").expect("name")), None);
    let tile = golden.json("tile_sample_min_size").expect("tile");
    let tiling = Some(Tiling::new(tile).expect("tile"));
    let mut vae = pipeline.vae().expect("VAE");
    let volume = |name: &str| {
        let (shape, values) = golden.tensor(name);
        let ([frames, height, width, channels], data) = channels_last(&shape, &values);
        Volume { frames, height, width, channels, data }
    };
    let moments = vae.encode(&volume("image"), tiling).expect("moments");
    check("tiled moments", &moments.data, &volume("image.moments_tiled").data, SINGLE_CALL);

    let z = volume("z");
    let shape = pyraflow::sampler::LatentShape::frame(z.height, z.width);
    let latents: Vec<Latent> = z
        .data
        .chunks_exact(shape.len())
        .map(|values| Latent::new(shape, values.to_vec()).expect("latent"))
        .collect();
    let mut decoded = Vec::new();
    vae.decode(&latents, tiling, |video| {
        decoded.extend_from_slice(&video.data);
        Ok(())
    })
    .expect("frames");
    check("tiled decode", &decoded, &volume("z.decoded_tiled").data, SINGLE_CALL);
}
