//! The sampler against what the published implementation recorded: schedules, the sizes of
//! history clips, block noise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pyraflow::sampler::history::level_shape;
use pyraflow::sampler::{
    CHANNELS, Latent, LatentShape, NoiseSource, RecordedNoise, STAGES, Schedule, clips, stage_spans,
};
use safetensors::{Dtype, SafeTensors};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Equal but for the last bit or two, which the JSON reader does not promise to get right.
fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 4.0 * f64::EPSILON * b.abs()
}

#[test]
fn schedules_are_the_published_ones() {
    let file = std::fs::read(goldens().join("scheduler.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_slice(&file).unwrap();
    for (stage, span) in stage_spans().iter().enumerate() {
        let number = |key: &str| recorded[key][stage.to_string()].as_f64().unwrap();
        assert!(same(span.original_start, number("ori_start_sigmas")));
        assert!(same(span.start, number("start_sigmas")));
        assert!(same(span.end, number("end_sigmas")));
        let ratios = &recorded["timestep_ratios"][stage.to_string()];
        assert!(same(span.ratios.0, ratios[0].as_f64().unwrap()), "{span:?}");
        assert!(same(span.ratios.1, ratios[1].as_f64().unwrap()), "{span:?}");
    }
    let steps = recorded["steps"].as_object().unwrap();
    assert!(!steps.is_empty());
    for (n, stages) in steps {
        let schedule = Schedule::new([n.parse().unwrap(); STAGES]).unwrap();
        for (stage, computed) in schedule.stages.iter().enumerate() {
            for (key, values) in [("timesteps", &computed.timesteps), ("sigmas", &computed.sigmas)]
            {
                let place = format!("{key} of {n} steps, stage {stage}");
                let expected = stages[stage][key].as_array().unwrap();
                assert_eq!(values.len(), expected.len(), "{place}");
                for (value, expected) in values.iter().zip(expected) {
                    assert!(same(*value, expected.as_f64().unwrap()), "{place}: {value}");
                }
            }
        }
    }
}

/// All f32 tensors of one recorded file that have five dimensions, `[batch, 16, T, h, w]`, by
/// name: their shape and the values of batch row 0.
fn read(path: &Path) -> BTreeMap<String, Latent> {
    let bytes = std::fs::read(path).unwrap();
    let mut latents = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        if let (Dtype::F32, &[_, CHANNELS, frames, height, width]) = (view.dtype(), view.shape()) {
            let shape = LatentShape { frames, height, width };
            let values = view.data().chunks_exact(4).take(shape.len());
            let values: Vec<f32> =
                values.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            latents.insert(name, Latent::from_channels_first(shape, &values).unwrap());
        }
    }
    latents
}

/// The recorded files called `name`, of whichever families there are.
fn files(names: &[&str]) -> Vec<BTreeMap<String, Latent>> {
    let folders = ["sd3", "flux"].map(|family| goldens().join(family));
    let paths = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
    let files: Vec<_> = paths.filter(|path| path.exists()).map(|path| read(&path)).collect();
    assert!(!files.is_empty(), "no {names:?} among the goldens");
    files
}

/// A recorded transformer call has the clips of the stage it was recorded in and, last, the
/// current frame.
#[test]
fn history_clips_have_the_recorded_sizes() {
    let mut calls = 0;
    for file in files(&["transformer.safetensors"]) {
        let full = ["full", "mid", "low", "first_low"]
            .iter()
            .filter_map(|call| last_clip(&file, call))
            .max_by_key(|shape| shape.height)
            .expect("a recorded call");
        for call in ["full", "mid", "low", "first_low"] {
            let Some(current) = last_clip(&file, call) else { continue };
            let stage = (0..STAGES).find(|&stage| level_shape(full, stage) == current).unwrap();
            let mut recorded = clips_of(&file, call);
            recorded.pop();
            let unit = recorded.iter().map(|clip| clip.frames).sum();
            let computed: Vec<_> = clips(unit, stage)
                .into_iter()
                .map(|clip| LatentShape {
                    frames: clip.frames.len(),
                    ..level_shape(full, clip.level)
                })
                .collect();
            assert_eq!(computed, recorded, "{call}");
            calls += 1;
        }
    }
    assert!(calls > 0);
}

fn clips_of(file: &BTreeMap<String, Latent>, call: &str) -> Vec<LatentShape> {
    (0..).map_while(|i| Some(file.get(&format!("{call}.clip{i}"))?.shape())).collect()
}

fn last_clip(file: &BTreeMap<String, Latent>, call: &str) -> Option<LatentShape> {
    clips_of(file, call).pop()
}

/// Recordings replay, and every 2x2 block of their block noise sums to zero: to about 1e-3, as
/// the published code factors the singular covariance numerically.
#[test]
fn recorded_block_noise_sums_to_zero_and_replays() {
    let names = ["t2v.safetensors", "i2v.safetensors", "t2i.safetensors"];
    let mut replayed = 0;
    for file in files(&names) {
        let Some(initial) = file.get("noise.initial").cloned() else { continue };
        let full = LatentShape { frames: 1, ..initial.shape() };
        let blocks: Vec<_> =
            (0..).map_while(|i| file.get(&format!("noise.block{i:03}")).cloned()).collect();
        assert_eq!(blocks.len() % 2, 0);
        let units = initial.shape().frames;
        let first_unit = units - blocks.len() / 2;
        let posterior = file.get("noise.posterior").cloned();
        let mut noise = RecordedNoise { initial, blocks, first_unit, posterior };
        for unit in first_unit..units {
            noise.initial(unit - first_unit, full).unwrap();
            for stage in 1..STAGES {
                let block =
                    noise.block(unit, stage, level_shape(full, stage)).unwrap().into_latent();
                let means = block.halved();
                let largest = means.data().iter().fold(0f32, |m, x| m.max(x.abs()));
                assert!(largest < 1e-3, "unit {unit}, stage {stage}: {largest}");
                replayed += 1;
            }
        }
    }
    assert!(replayed > 0);
}
