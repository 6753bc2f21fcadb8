//! The built-in model: a small Pyramid Flow model inside the program, so that the first
//! command makes a video with nothing downloaded. See `assets/demo/README.md`.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::pipeline::LatentRgb;
use crate::{Error, Result};

/// A file of the model: its name below the checkpoint's folder, and its contents.
struct Asset {
    name: &'static str,
    bytes: &'static [u8],
}

macro_rules! asset {
    ($name:literal) => {
        Asset { name: $name, bytes: include_bytes!(concat!("../assets/demo/", $name)) }
    };
}

static ASSETS: &[Asset] = &[
    asset!("causal_video_vae/config.json"),
    asset!("causal_video_vae/diffusion_pytorch_model.safetensors"),
    asset!("diffusion_transformer_128p/config.json"),
    asset!("diffusion_transformer_128p/diffusion_pytorch_model.safetensors"),
    asset!("text_encoder/config.json"),
    asset!("text_encoder/model.safetensors"),
    asset!("text_encoder_2/config.json"),
    asset!("text_encoder_2/model.safetensors"),
    asset!("text_encoder_3/config.json"),
    asset!("text_encoder_3/model.safetensors"),
    asset!("tokenizer/merges.txt"),
    asset!("tokenizer/special_tokens_map.json"),
    asset!("tokenizer/tokenizer_config.json"),
    asset!("tokenizer/vocab.json"),
    asset!("tokenizer_2/merges.txt"),
    asset!("tokenizer_2/special_tokens_map.json"),
    asset!("tokenizer_2/tokenizer_config.json"),
    asset!("tokenizer_2/vocab.json"),
    asset!("tokenizer_3/special_tokens_map.json"),
    asset!("tokenizer_3/tokenizer.json"),
    asset!("tokenizer_3/tokenizer_config.json"),
];

/// How its latents become small pictures: a least-squares fit by `examples/latent_rgb.rs` to 16
/// clips. In four others it explains 85 % of the variance of colours.
pub const LATENT_RGB: LatentRgb = LatentRgb {
    weights: [
        [11.95, 14.70, 18.60],
        [11.65, 1.95, -8.10],
        [-1.41, 6.17, -6.61],
        [-3.38, 0.84, -0.20],
        [1.43, -1.30, -0.46],
        [0.57, 1.36, -0.14],
        [-0.09, -2.22, -0.33],
        [1.95, 0.97, -1.96],
        [1.98, -1.48, -0.96],
        [0.60, 0.55, 0.61],
        [-1.64, 2.69, 2.13],
        [-3.47, 0.30, 0.34],
        [-0.71, -5.70, -0.18],
        [-2.42, -1.06, -3.04],
        [-3.54, -0.02, -3.09],
        [-0.09, 1.40, 0.24],
    ],
    bias: [57.11, 52.40, 49.61],
};

/// Whether the VAE of the checkpoint in `folder` is that of the built-in model.
pub fn has_vae(folder: &Path) -> bool {
    const WEIGHTS: &str = "causal_video_vae/diffusion_pytorch_model.safetensors";
    let same_length = |asset: &&Asset| {
        fs::metadata(folder.join(asset.name)).is_ok_and(|m| m.len() == asset.bytes.len() as u64)
    };
    let asset = ASSETS.iter().find(|asset| asset.name == WEIGHTS).filter(same_length);
    asset.is_some_and(|asset| is_there(folder, asset))
}

/// The folder of the built-in model, which is unpacked into the user's cache the first time
/// (or into the folder for temporary files, if there is no cache that can be written).
///
/// # Errors
/// [`crate::ErrorKind::Io`] when it cannot be unpacked anywhere.
pub fn folder() -> Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let places = cache.map(|c| c.join("pyraflow")).into_iter();
    let mut result = Err(Error::input("there is no place for the built-in model"));
    for place in places.chain([std::env::temp_dir().join("pyraflow")]) {
        result = unpacked(&place);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// The model below `place`, unpacked if it is not there yet. Its folder carries a hash of
/// the contents, so that another version of the program has another one.
fn unpacked(place: &Path) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    for asset in ASSETS {
        hash.update(asset.name);
        hash.update(asset.bytes);
    }
    let hash: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
    let folder = place.join(format!("demo-{hash}"));
    if ASSETS.iter().all(|asset| is_there(&folder, asset)) {
        return Ok(folder);
    }
    fs::create_dir_all(place).map_err(|e| Error::io("cannot create", place, e))?;
    let partial = tempfile::Builder::new()
        .prefix("demo-")
        .tempdir_in(place)
        .map_err(|e| Error::io("cannot create a folder in", place, e))?;
    for asset in ASSETS {
        let path = partial.path().join(asset.name);
        let parent = path.parent().unwrap_or(place);
        fs::create_dir_all(parent).map_err(|e| Error::io("cannot create", parent, e))?;
        fs::write(&path, asset.bytes).map_err(|e| Error::io("cannot write", &path, e))?;
    }
    // A damaged folder makes way; another process may just have put a good one there.
    if folder.exists() && !ASSETS.iter().all(|asset| is_there(&folder, asset)) {
        fs::remove_dir_all(&folder).map_err(|e| Error::io("cannot remove", &folder, e))?;
    }
    match fs::rename(partial.path(), &folder) {
        Ok(()) => {
            // Renamed: there is nothing left to remove.
            let _ = partial.keep();
            Ok(folder)
        }
        Err(_) if ASSETS.iter().all(|asset| is_there(&folder, asset)) => Ok(folder),
        Err(e) => Err(Error::io("cannot rename to", &folder, e)),
    }
}

/// Whether the asset is there with its very contents: 11 MB are compared in milliseconds.
fn is_there(folder: &Path, asset: &Asset) -> bool {
    fs::read(folder.join(asset.name)).is_ok_and(|bytes| bytes == asset.bytes)
}

#[cfg(test)]
mod tests {
    use super::{ASSETS, unpacked};

    #[test]
    fn unpacks_once_and_repairs_damage() {
        let place = tempfile::tempdir().expect("folder");
        let folder = unpacked(place.path()).expect("unpacked");
        assert_eq!(unpacked(place.path()).expect("there"), folder);
        let file = folder.join(ASSETS[0].name);
        std::fs::write(&file, "damaged").expect("write");
        assert_eq!(unpacked(place.path()).expect("repaired"), folder);
        assert_eq!(std::fs::read(&file).expect("read"), ASSETS[0].bytes);
        assert_eq!(std::fs::read_dir(place.path()).expect("list").count(), 1);
    }
}
