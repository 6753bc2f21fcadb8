//! The GPU that cases run on.

use crate::Result;
use crate::exec::Backend;

/// A way to run on the GPU.
pub struct Variant {
    /// For tables: `fast`, `generic`.
    pub name: &'static str,
    /// As pipelines use it.
    pub plain: Box<dyn Backend>,
    /// With guards around every tensor and NaN in all memory before a run.
    pub fenced: Box<dyn Backend>,
}

/// The GPU of this machine.
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Version of its driver.
    pub driver: String,
    /// Every way to run on it; the first is the fastest.
    pub variants: Vec<Variant>,
    copy_rate: Box<dyn Fn() -> Result<f64> + Send + Sync>,
}

impl Gpu {
    /// Bytes per second of a large copy within the device's memory, read and write counted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn copy_rate(&self) -> Result<f64> {
        (self.copy_rate)()
    }
}

/// The GPU, or why there is none.
///
/// # Errors
/// What a line of output says after "GPU: skipped".
pub fn gpu() -> Result<Gpu, String> {
    Err("this build has no GPU backend".into())
}
