//! Latents in a file of their own.
//!
//! The file is in the safetensors format and holds one tensor, `latents`, of shape
//! `[1, 16, units, height / 8, width / 8]`: the layout PyTorch uses for video latents. The values
//! are those of the sampler, of roughly unit variance; [`crate::sampler::LatentScaling`] turns
//! them into those of the VAE. Its metadata are `format` (`pyraflow latents 1`), `settings` (the
//! identity of the run as JSON, see [`super::SavedRun`]), `units` and `sha256` (of the settings
//! and the values). We write f32; f32, f16 and bf16 are read, with or without the leading 1, and
//! a file without metadata is taken for latents made elsewhere.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::saved::write_whole;
use crate::sampler::{CHANNELS, Latent, LatentShape, MAX_EXTENT, MAX_UNITS};
use crate::{Error, ErrorKind, Result};

/// What `format` says in the metadata.
const FORMAT: &str = "pyraflow latents 1";
/// Largest file that is read.
const MAX_BYTES: u64 = 16 << 30;

/// The content of a file of latents.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentsFile {
    /// One latent of one frame per unit, in order; at least one.
    pub units: Vec<Latent>,
    /// The identity of the run that made them; `None` if the file does not say.
    pub settings: Option<Value>,
    /// SHA-256 of the values, in hexadecimal digits.
    pub hash: String,
}

/// Writes latents, completely or not at all; an existing file is replaced.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be written.
pub fn write_latents(path: &Path, units: &[Latent], settings: &Value) -> Result<()> {
    if units.is_empty() {
        return Err(Error::input("there are no latents to write"));
    }
    let whole = Latent::concat(units);
    let LatentShape { frames, height, width } = whole.shape();
    let bytes: Vec<u8> = whole.to_channels_first().iter().flat_map(|v| v.to_le_bytes()).collect();
    let settings = settings.to_string();
    let metadata = HashMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("units".to_string(), frames.to_string()),
        ("sha256".to_string(), hash([settings.as_bytes(), &bytes])),
        ("settings".to_string(), settings),
    ]);
    let file = TensorView::new(Dtype::F32, vec![1, CHANNELS, frames, height, width], &bytes)
        .and_then(|view| safetensors::serialize([("latents", view)], Some(metadata)))
        .map_err(|e| Error::input("the latents cannot be stored").because(e))?;
    write_whole(path, &file)
}

/// Reads latents that [`write_latents`] wrote, or another program in the same layout.
///
/// # Errors
/// [`ErrorKind::Input`] when the file is none of latents, is damaged or holds values that are
/// not finite.
pub fn read_latents(path: &Path) -> Result<LatentsFile> {
    let bytes = read_bounded(path)?;
    let wrong = |reason: String| {
        Error::input(format!("{} holds no latents: {reason}", path.display()))
            .hint("a file of --save-latents is wanted; see docs/formats.md for its format")
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(e.to_string()))?;
    let view = file.tensor("latents").map_err(|e| wrong(e.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let text = metadata.get("settings").map_or("", String::as_str);
    let whole = hash([text.as_bytes(), view.data()]);
    if metadata.get("sha256").is_some_and(|promised| *promised != whole) {
        return Err(Error::input(format!("{} is damaged", path.display()))
            .hint("its contents do not match the hash in it; make or copy it again"));
    }
    let shape = shape_of(view.shape()).map_err(wrong)?;
    let values = values_of(&view).map_err(wrong)?;
    let whole = Latent::from_channels_first(shape, &values)?;
    if !whole.is_finite() {
        return Err(wrong("there is NaN or infinity among the values".into()));
    }
    let settings = match metadata.get("settings") {
        None => None,
        Some(text) => Some(serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?),
    };
    let units = (0..shape.frames).map(|t| whole.frame(t)).collect();
    Ok(LatentsFile { units, settings, hash: hash([view.data()]) })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io("cannot read", path, e).of_kind(ErrorKind::Input);
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(Error::input(format!("{} is not a file of latents", path.display())));
    }
    fs::read(path).map_err(failed)
}

/// Of a tensor's extents `[1, 16, units, height, width]`.
fn shape_of(extents: &[usize]) -> Result<LatentShape, String> {
    let frame = match extents {
        [1, frame @ ..] if frame.len() == 4 => frame,
        frame => frame,
    };
    match *frame {
        [CHANNELS, frames, height, width]
            if (1..=MAX_UNITS).contains(&frames)
                && (1..=MAX_EXTENT).contains(&height)
                && (1..=MAX_EXTENT).contains(&width) =>
        {
            Ok(LatentShape { frames, height, width })
        }
        _ => Err(format!("the tensor is {extents:?}, not [1, {CHANNELS}, units, height, width]")),
    }
}

fn values_of(view: &TensorView) -> Result<Vec<f32>, String> {
    let pairs = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match view.dtype() {
        Dtype::F32 => {
            let words = view.data().chunks_exact(4);
            Ok(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::F16 => Ok(pairs().map(|b| f16::from_bits(b).to_f32()).collect()),
        Dtype::BF16 => Ok(pairs().map(|b| bf16::from_bits(b).to_f32()).collect()),
        other => Err(format!("values of {other:?} are not read")),
    }
}

fn hash<const N: usize>(parts: [&[u8]; N]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn units() -> Vec<Latent> {
        let shape = LatentShape::frame(2, 3);
        let unit = |t: usize| (0..shape.len()).map(|i| (t * 1000 + i) as f32 * 0.1).collect();
        (0..3).map(|t| Latent::new(shape, unit(t)).expect("a latent")).collect()
    }

    #[test]
    fn latents_come_back_and_damage_is_found() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.safetensors");
        let settings = json!({"seed": 7, "guidance": 6.300000190734863});
        write_latents(&path, &units(), &settings).expect("written");
        let read = read_latents(&path).expect("read");
        assert_eq!((read.units, read.settings), (units(), Some(settings)));
        let whole = fs::read(&path).expect("bytes");
        for at in [whole.len() - 1, whole.len() - 400] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).expect("write");
            let error = read_latents(&path).expect_err("damaged");
            assert!(error.to_string().contains("is damaged"), "{error}");
        }
        for length in (0..whole.len()).step_by(37) {
            fs::write(&path, &whole[..length]).expect("write");
            assert_eq!(read_latents(&path).expect_err("torn").kind(), ErrorKind::Input);
        }
    }

    #[test]
    fn latents_made_elsewhere_are_read() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("b.safetensors");
        let write = |dtype, shape: &[usize], bytes: &[u8]| {
            let view = TensorView::new(dtype, shape.to_vec(), bytes).expect("a tensor");
            let file = safetensors::serialize([("latents", view)], None).expect("a file");
            fs::write(&path, file).expect("write");
        };
        let bytes: Vec<u8> =
            (0..CHANNELS * 6).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
        write(Dtype::BF16, &[CHANNELS, 1, 2, 3], &bytes);
        let read = read_latents(&path).expect("read");
        assert_eq!((read.units.len(), &read.settings), (1, &None));
        assert_eq!(read.units[0].data()[..2], [0.0, 6.0], "channels are last here");
        write(Dtype::BF16, &[8, 2, 2, 3], &bytes);
        assert!(read_latents(&path).expect_err("8 channels").to_string().contains("[8, 2, 2, 3]"));
        let nan = [f16::NAN.to_le_bytes(); CHANNELS].concat();
        write(Dtype::F16, &[1, CHANNELS, 1, 1, 1], &nan);
        assert!(read_latents(&path).expect_err("NaN").to_string().contains("NaN"));
    }
}
