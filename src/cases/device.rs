//! The GPU that cases run on.

use crate::Result;
use crate::exec::cuda::{Gemm, LinearTile, probe};
use crate::exec::{Backend, Cuda};

/// A way to run on the GPU.
pub struct Variant {
    /// For tables: `fast`, `generic`, `cublaslt` where that is installed, and `tiles`.
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
    /// Number of its multiprocessors.
    pub multiprocessors: u32,
    /// The first variant with all linear layers in one tile: none where no kernel of this GPU has
    /// such tiles.
    pub tiles: Vec<(LinearTile, Variant)>,
    /// Measures the bytes per second of a large copy within the device's memory, read and
    /// write counted.
    pub copy_rate: Box<dyn Fn() -> Result<f64> + Send + Sync>,
}

/// The GPU, or why there is none.
///
/// # Errors
/// What a line of output says after "GPU: skipped".
///
/// # Panics
/// If there is a GPU and it cannot be opened.
pub fn gpu() -> Result<Gpu, String> {
    let report = probe::probe();
    if let Err(error) = report.require(None) {
        return Err(error.to_string());
    }
    let cuda = Cuda::open(None).unwrap_or_else(|e| panic!("the GPU that was found: {e}"));
    let variant = |name, cuda: Cuda| Variant {
        name,
        fenced: Box::new(cuda.clone().fenced()),
        plain: Box::new(cuda),
    };
    let mut variants = vec![
        variant("fast", cuda.clone().with_gemm(Gemm::Own)),
        variant("generic", cuda.clone().generic()),
    ];
    if probe::cublaslt().is_some() {
        variants.push(variant("cublaslt", cuda.clone().with_gemm(Gemm::CublasLt)));
    }
    let in_tile = |tile| (tile, variant("tiles", cuda.clone().with_gemm(Gemm::Tile(tile))));
    Ok(Gpu {
        multiprocessors: cuda.multiprocessors(),
        tiles: cuda.linear_tiles().into_iter().map(in_tile).collect(),
        name: cuda.info().name.clone(),
        driver: report.driver.and_then(|d| d.version).unwrap_or_default(),
        variants,
        copy_rate: Box::new(move || cuda.measure_copies()),
    })
}
