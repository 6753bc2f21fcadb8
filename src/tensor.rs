//! Element types, shapes and weight views: the vocabulary that checkpoints, graphs and
//! backends share.

use std::fmt;

use crate::Result;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float (only found in checkpoints).
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32-bit unsigned integer (token ids).
    U32,
}

impl DType {
    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::Bf16 => "BF16",
            DType::U32 => "U32",
        })
    }
}

/// A weight as it lies in a mapped file: row-major, little endian, not necessarily
/// aligned to its element size.
#[derive(Debug, Clone, Copy)]
pub struct WeightView<'a> {
    /// Element type as stored.
    pub dtype: DType,
    /// Extent of each dimension, slowest first.
    pub shape: &'a [usize],
    /// The raw bytes, exactly `shape.product() * dtype.bytes()` of them.
    pub bytes: &'a [u8],
}

impl WeightView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens elements `start .. start + out.len()` to f32 (exact for every float type).
    ///
    /// # Panics
    /// If the range lies outside the tensor or the tensor holds integers.
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bytes();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        match self.dtype {
            DType::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
            DType::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            DType::U32 => panic!("an integer tensor cannot be widened to f32"),
        }
    }

    /// The whole tensor as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.widen(0, &mut out);
        out
    }
}

/// Where an executor finds the weights of one component by their checkpoint names.
pub trait WeightSource: Send + Sync {
    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when there is none.
    fn weight(&self, name: &str) -> Result<WeightView<'_>>;
}
