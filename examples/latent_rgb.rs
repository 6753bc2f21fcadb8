//! Fits the map from the built-in model's latents to small pictures, `demo::LATENT_RGB`:
//! samples clips, decodes them and solves for the 16 channels by least squares over all
//! positions. Prints the constant, and which share of the variance of colours it explains in
//! clips that the fit did not see.
//!
//! ```sh
//! cargo run --release --example latent_rgb
//! ```

use pyraflow::Result;
use pyraflow::checkpoint::{Checkpoint, StoreOptions};
use pyraflow::exec::Cpu;
use pyraflow::media::Frame;
use pyraflow::pipeline::{LatentRgbFit, Pipeline, Quiet, Request};
use pyraflow::sampler::PhiloxNoise;

const COLOURS: [&str; 8] = ["red", "green", "blue", "yellow", "cyan", "purple", "white", "orange"];
const MOTIONS: [&str; 4] = [
    "circle moves to the right",
    "square moves up on a striped background",
    "star spins on a dark background",
    "triangle becomes larger on a checkered background",
];

fn main() -> Result<()> {
    let checkpoint = Checkpoint::open(&pyraflow::demo::folder()?, None)?;
    let pipeline =
        Pipeline::open(checkpoint, Box::new(Cpu::new()), &StoreOptions::default(), &mut Quiet)?;
    let (mut seen, mut unseen) = (LatentRgbFit::default(), LatentRgbFit::default());
    for clip in 0..16 {
        let (colour, motion) = (COLOURS[clip % 8], MOTIONS[(clip / 2) % 4]);
        add_clip(&pipeline, &format!("a {colour} {motion}"), clip as u64, &mut seen)?;
    }
    for clip in 0..4 {
        let (colour, motion) = (COLOURS[2 * clip + 1], MOTIONS[3 - clip]);
        add_clip(&pipeline, &format!("a {colour} {motion}"), 100 + clip as u64, &mut unseen)?;
    }
    let Some(map) = seen.solve() else { return Err(pyraflow::Error::input("nothing to fit")) };
    println!("pub const LATENT_RGB: LatentRgb = LatentRgb {{\n    weights: [");
    for [r, g, b] in map.weights {
        println!("        [{r:.2}, {g:.2}, {b:.2}],");
    }
    let [r, g, b] = map.bias;
    println!("    ],\n    bias: [{r:.2}, {g:.2}, {b:.2}],\n}};");
    let (of_seen, of_unseen) = (seen.explained(&map), unseen.explained(&map));
    println!("explained: {of_seen:.4} of the clips seen, {of_unseen:.4} of others");
    Ok(())
}

/// Samples and decodes a clip and adds its units.
fn add_clip(pipeline: &Pipeline, prompt: &str, seed: u64, fit: &mut LatentRgbFit) -> Result<()> {
    let mut request = Request::new(pipeline.checkpoint(), prompt, None);
    (request.units, request.seed) = (4, seed);
    let prompts = pipeline.encode_prompts(&pipeline.tokenize(&request)?, &mut Quiet)?;
    let noise = &mut PhiloxNoise { seed };
    let mut latents = pipeline.sample(&request, &prompts, Vec::new(), noise, None, &mut Quiet)?;
    let mut frames: Vec<Frame> = Vec::new();
    pipeline.decode(&latents, None, |frame| {
        frames.push(frame);
        Ok(())
    })?;
    let mut frames = &frames[..];
    for (unit, latent) in latents.iter_mut().enumerate() {
        pipeline.latent_scaling().to_vae(unit, latent);
        let (own, rest) = frames.split_at(if unit == 0 { 1 } else { 8 });
        fit.add(latent, own);
        frames = rest;
    }
    Ok(())
}
