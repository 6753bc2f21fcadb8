//! The CUDA backend: hand-written kernels, bf16 storage, f32 arithmetic.
//!
//! Everything a run needs is resolved when a graph is added: addresses in one arena, kernels,
//! grids and parameters. A run only queues them on a stream of its own.

mod courier;
mod cublaslt;
mod driver;
pub mod images;
mod kernels;
mod memory;
mod ops;
mod params;
pub mod probe;
mod readback;
mod session;
mod step;
mod tables;
mod tensor_map;
mod traffic;
mod upload;
mod weights;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::Result;
use crate::exec::{Backend, HostRoom, Session};
use crate::graph::{Graph, Plan, Residency};
use crate::tensor::{DType, WeightSource};
use courier::Courier;
use driver::{Context, DeviceMemory, Event, Stream};
use kernels::Kernels;
pub use ops::LinearTile;
pub use probe::GpuInfo;
use upload::Uploader;

/// What the driver's context takes of the GPU's memory, about.
pub const CONTEXT_BYTES: u64 = Context::OWN_BYTES;

/// Page-locked memory of the ring that uploads go through.
pub const RING_BYTES: u64 = (Uploader::SLOTS * Uploader::SLOT_BYTES) as u64;

/// Page-locked memory through which carried frames go to the scratch file and back: two slots for
/// each direction.
pub const COURIER_BYTES: u64 = 4 * Courier::SLOT_BYTES as u64;

/// Who computes linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gemm {
    /// cuBLASLt, where it is installed, for what it can do and is faster at; this program's
    /// kernels for the rest.
    Automatic,
    /// This program's kernels.
    Own,
    /// cuBLASLt for what it can do: results in bf16 with or without a bias, with GELU by tanh,
    /// or added to what is there, and results in f32 without a bias. Opening a session fails
    /// where it is not installed.
    CublasLt,
    /// This program's kernels, those for GPUs of compute capability 9.0 in this tile where they
    /// have it for results of the type and it fits the product, as they choose where not: for
    /// measurements.
    Tile(LinearTile),
}

impl Gemm {
    fn tile(self) -> Option<LinearTile> {
        match self {
            Gemm::Tile(tile) => Some(tile),
            Gemm::Automatic | Gemm::Own | Gemm::CublasLt => None,
        }
    }
}

/// The CUDA backend on one GPU.
#[derive(Clone)]
pub struct Cuda {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    info: GpuInfo,
    /// Sessions take turns: locking memory anew for each would take longer than small models.
    uploader: Arc<Mutex<Uploader>>,
    gemm: Gemm,
    /// Bytes per second that copies between host and device are slowed to.
    link: Option<f64>,
    /// For what does not stay on the device.
    host: HostRoom,
    /// Bytes that go to the scratch file or come back at a time.
    slot_bytes: usize,
    fenced: bool,
    first_run: Arc<OnceLock<Instant>>,
}

impl Cuda {
    /// Opens GPU `index`, or the first one.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] when there is no driver, no such GPU or no kernels for it.
    pub fn open(index: Option<usize>) -> Result<Cuda> {
        let info = probe::require(index)?;
        let context = Context::new(info.index)?;
        let capability = info.compute_capability;
        let kernels = Arc::new(Kernels::load(&context, (capability.0, capability.1))?);
        let uploader = Arc::new(Mutex::new(Uploader::new(&context, None)?));
        Ok(Cuda {
            context,
            kernels,
            info,
            uploader,
            gemm: Gemm::Automatic,
            link: None,
            host: HostRoom::default(),
            slot_bytes: Courier::SLOT_BYTES,
            fenced: false,
            first_run: Arc::default(),
        })
    }

    /// Only the kernels that every supported GPU runs, not those of one generation, and no
    /// library.
    pub fn generic(mut self) -> Cuda {
        self.kernels = Arc::new(self.kernels.generic());
        self.gemm = Gemm::Own;
        self
    }

    /// Who computes linear layers, [`Gemm::Automatic`] unless this says otherwise: for tests
    /// and measurements. [`probe::cublaslt`] tells whether the library is there.
    pub fn with_gemm(mut self, gemm: Gemm) -> Cuda {
        self.gemm = gemm;
        self
    }

    /// Uses at most `bytes` of the GPU's memory, the driver's context included: what would
    /// take more is refused.
    pub fn limited(self, bytes: u64) -> Cuda {
        self.context.limit(bytes);
        self
    }

    /// Keeps what does not stay on the device in `room`.
    pub fn with_host(mut self, room: HostRoom) -> Cuda {
        self.host = room;
        self
    }

    /// Carries frames to the scratch file and back in pieces of `bytes`: for tests.
    ///
    /// # Panics
    /// If it is none.
    pub fn with_slots(mut self, bytes: usize) -> Cuda {
        assert!(bytes > 0, "pieces have bytes");
        self.slot_bytes = bytes;
        self
    }

    /// Slows copies between host and device down to `bytes_per_second` in each direction, to
    /// measure how a slower bus would do.
    ///
    /// # Errors
    /// Those of the device.
    pub fn with_link(mut self, bytes_per_second: f64) -> Result<Cuda> {
        self.link = Some(bytes_per_second);
        self.uploader = Arc::new(Mutex::new(Uploader::new(&self.context, self.link)?));
        Ok(self)
    }

    /// Gives every tensor memory of its own between guard zones, fills it with NaN before a
    /// run and checks the zones after it: for tests.
    pub fn fenced(mut self) -> Cuda {
        self.fenced = true;
        self
    }

    /// The GPU.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// The tiles that linear layers can be computed in, [`Gemm::Tile`]: none where the kernels that
    /// have them are not for this GPU.
    pub fn linear_tiles(&self) -> Vec<LinearTile> {
        if self.kernels.hopper { LinearTile::all() } else { Vec::new() }
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.kernels.multiprocessors
    }

    /// Bytes per second of a large copy within device memory, those read and those written
    /// both counted: the ceiling of kernels that are bound by memory.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Memory`] when 1 GiB cannot be had.
    pub fn measure_copies(&self) -> Result<f64> {
        const BYTES: usize = 512 << 20;
        const REPEATS: usize = 8;
        let [from, to] = ["copying", "copying"].map(|w| DeviceMemory::new(&self.context, BYTES, w));
        let (from, to) = (from?, to?);
        let stream = Stream::new(&self.context)?;
        let (start, end) = (Event::new(&self.context)?, Event::new(&self.context)?);
        // SAFETY: both pieces were just allocated and live until the stream is idle.
        unsafe {
            stream.fill(from.address(), 1, BYTES)?;
            stream.copy(to.address(), from.address(), BYTES)?;
            start.record(&stream)?;
            for _ in 0..REPEATS {
                stream.copy(to.address(), from.address(), BYTES)?;
            }
        }
        end.record(&stream)?;
        end.synchronize()?;
        Ok((2 * BYTES * REPEATS) as f64 / end.seconds_since(&start)?)
    }
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn description(&self) -> String {
        match probe::cublaslt().filter(|_| !matches!(self.gemm, Gemm::Own | Gemm::Tile(_))) {
            Some(version) => format!("{} with cuBLASLt {version}", self.info.name),
            None => self.info.name.clone(),
        }
    }

    fn activations(&self) -> DType {
        DType::Bf16
    }

    fn plan(&self, graph: &Graph, residency: &Residency) -> Plan {
        Plan::staged(graph, DType::bytes, residency)
    }

    fn free_memory(&self) -> Option<u64> {
        self.context.available().ok()
    }

    fn copies_weights(&self) -> bool {
        true
    }

    fn host_memory(&self) -> Option<u64> {
        self.host.memory()
    }

    fn check_scratch(&self, bytes: u64) -> Result<()> {
        self.host.check(bytes)
    }

    fn copy_rate(&self) -> Result<Option<f64>> {
        self.measure_copies().map(Some)
    }

    fn first_run(&self) -> Option<Instant> {
        self.first_run.get().copied()
    }

    fn open_with(
        &self,
        weights: Arc<dyn WeightSource>,
        residency: &Residency,
    ) -> Result<Box<dyn Session>> {
        Ok(Box::new(session::CudaSession::new(self, weights, residency)?))
    }
}
