//! Reading golden files, and comparing with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// A safetensors file with its metadata.
pub struct Golden {
    pub path: PathBuf,
    bytes: Vec<u8>,
    meta: HashMap<String, String>,
}

impl Golden {
    /// The file at `path`, if there is one.
    pub fn open(path: &Path) -> Option<Golden> {
        let bytes = std::fs::read(path).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let meta = header.metadata().clone().unwrap_or_default();
        Some(Golden { path: path.to_path_buf(), bytes, meta })
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.bytes).expect("checked on opening");
        file.names().into_iter().map(String::from).collect()
    }

    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).expect("checked on opening").tensor(name).is_ok()
    }

    /// Shape and values of a tensor of numbers.
    pub fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = SafeTensors::deserialize(&self.bytes).expect("checked on opening");
        let view =
            file.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.path.display()));
        let bytes = view.data();
        let values = match view.dtype() {
            Dtype::F32 => words(bytes).map(f32::from_le_bytes).collect(),
            Dtype::U8 => bytes.iter().map(|&b| f32::from(b)).collect(),
            Dtype::I64 => words(bytes).map(|b| i64::from_le_bytes(b) as f32).collect(),
            other => panic!("{name} is {other:?}"),
        };
        (view.shape().to_vec(), values)
    }

    /// A setting of the run, as written in the metadata.
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.meta.get(name).map(String::as_str)
    }

    /// A setting written as JSON.
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<T> {
        let text = self.setting(name)?;
        Some(serde_json::from_str(text).unwrap_or_else(|e| panic!("{name} = {text}: {e}")))
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|b| b.try_into().expect("chunks of N"))
}

/// `[b, c, t, h, w]` to `[b·t, h, w, c]`: shape and values.
pub fn channels_last(shape: &[usize], values: &[f32]) -> ([usize; 4], Vec<f32>) {
    let &[b, c, t, h, w] = shape else { panic!("{shape:?} is not [b, c, t, h, w]") };
    let mut out = Vec::with_capacity(values.len());
    for sample in 0..b {
        for frame in 0..t {
            for pixel in 0..h * w {
                for channel in 0..c {
                    out.push(values[((sample * c + channel) * t + frame) * h * w + pixel]);
                }
            }
        }
    }
    ([b * t, h, w, c], out)
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "number of elements");
    let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / norm).sqrt()
}

/// Fails if `found` differs from `golden` by more than `bound`; prints the error.
pub fn check(what: &str, found: &[f32], golden: &[f32], bound: f64) {
    let error = relative_error(found, golden);
    println!("{what}: relative error {error:.2e}, {:.0} % of the bound", 100.0 * error / bound);
    assert!(error < bound, "{what}: relative error {error:e}, allowed {bound:e}");
}
