//! The one picture type.

use std::fmt;

use crate::{Error, Result};

/// An 8-bit sRGB picture: `height` rows of `width` pixels of three bytes, without padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    width: u32,
    height: u32,
    data: Vec<u8>,
}

impl Frame {
    /// A picture of the given pixels, `data.len()` = `width · height · 3` bytes.
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Result<Self> {
        let expected = u64::from(width) * u64::from(height) * 3;
        if width == 0 || height == 0 || data.len() as u64 != expected {
            return Err(Error::input(format!(
                "a picture of {width}x{height} pixels needs {expected} bytes, not {}",
                data.len()
            )));
        }
        Ok(Frame { width, height, data })
    }

    /// A picture whose pixel at column `x` of row `y` is `pixel(x, y)`.
    pub fn from_fn(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Result<Self> {
        let rows = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        Self::new(width, height, rows.flat_map(|(x, y)| pixel(x, y)).collect())
    }

    /// Pixels per row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Number of rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The pixels, `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The pixels, by value.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// The rows, from the top.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, u8> {
        self.data.chunks_exact(self.width as usize * 3)
    }

    /// The pixel at column `x` of row `y`; `None` outside of the picture.
    pub fn pixel(&self, x: u32, y: u32) -> Option<[u8; 3]> {
        if x >= self.width || y >= self.height {
            return None;
        }
        let at = (y as usize * self.width as usize + x as usize) * 3;
        self.data[at..].first_chunk().copied()
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({}x{})", self.width, self.height)
    }
}
