//! Whole runs, from text to frames, with the noise of the published implementation's runs.

mod common;

use common::golden::{Golden, channels_last, check};
use common::goldens;
use common::networks::Comparison;
use common::runs::{encoded, open, whole_run};
use pyraflow::exec::Cpu;
use pyraflow::pipeline::{Tiling, Volume};
use pyraflow::sampler::{Latent, LatentShape};

/// Relative error allowed for the text encoders, a single call.
const SINGLE_CALL: f64 = 1e-5;

const FAMILIES: [&str; 2] = ["sd3", "flux"];

#[test]
fn text_encoders_agree_with_the_published_ones() {
    for family in FAMILIES {
        let folder = goldens().join(family);
        let Some(golden) = Golden::open(&folder.join("text.safetensors")) else {
            println!("skipped: {} holds no text golden", folder.display());
            continue;
        };
        for Comparison { what, found, golden } in
            encoded(family, &folder, &golden, Box::new(Cpu::new()))
        {
            check(&what, &found, &golden, SINGLE_CALL);
        }
    }
}

fn family_run(family: &str, name: &str) -> bool {
    let folder = goldens().join(family);
    let recorded = folder.join(format!("{name}.safetensors"));
    whole_run(&format!("{family} {name}"), &folder, &recorded)
}

/// One test per kind of run, so that they go on side by side.
macro_rules! runs {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let present = FAMILIES.map(|family| family_run(family, stringify!($name)));
            if !present.contains(&true) {
                println!("{} holds no {} run: skipped", goldens().display(), stringify!($name));
            }
        }
    )*};
}

runs!(t2v, i2v, t2i, t2v_linear_guidance, t2v_no_guidance);

#[test]
fn there_are_goldens() {
    let names = ["text", "transformer", "t2v", "i2v", "t2i"].map(|n| format!("{n}.safetensors"));
    let folders = FAMILIES.map(|family| goldens().join(family));
    let mut places = folders.iter().flat_map(|f| names.iter().map(|n| f.join(n)));
    let any = places.any(|p| p.exists()) || goldens().join("vae.safetensors").exists();
    assert!(any, "{} holds no golden", goldens().display());
}

#[test]
fn published_tiling_agrees() {
    let golden = Golden::open(&goldens().join("vae.safetensors"));
    let Some((golden, tile)) = golden.and_then(|g| g.json("tile_sample_min_size").map(|t| (g, t)))
    else {
        println!("skipped: {} holds no tiled VAE golden", goldens().display());
        return;
    };
    let pipeline = open(&goldens().join(golden.setting("checkpoint").expect("name")), None);
    let tiling = Tiling::new(tile).expect("tile");
    let mut vae = pipeline.vae().expect("VAE");
    let volume = |name: &str| {
        let (shape, values) = golden.tensor(name);
        let ([frames, height, width, channels], data) = channels_last(&shape, &values);
        Volume { frames, height, width, channels, data }
    };
    if golden.has("image.moments_tiled") {
        let moments = vae.encode(&volume("image"), Some(tiling)).expect("moments");
        let expected = volume("image.moments_tiled").data;
        check("tiled moments", &moments.data, &expected, SINGLE_CALL);
    }
    if golden.has("z.decoded_tiled") {
        let z = volume("z");
        let shape = LatentShape::frame(z.height, z.width);
        let latents: Vec<Latent> = z
            .data
            .chunks_exact(shape.len())
            .map(|values| Latent::new(shape, values.to_vec()).expect("latent"))
            .collect();
        let decoded = vae.decode_tiled(&latents, tiling).expect("frames").data;
        check("tiled decode", &decoded, &volume("z.decoded_tiled").data, SINGLE_CALL);
    }
}
