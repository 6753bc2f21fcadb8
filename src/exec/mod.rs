//! Running graphs on a device.
//!
//! A [`Backend`] opens [`Session`]s; a session holds the plans of graphs that belong
//! together (the windows of a decoder, the stages of a transformer), one arena large enough
//! for any of them, and the states that they pass on to each other by name and size.

mod cpu;
pub mod cuda;
mod host;
mod imagined;

pub use cpu::{Cpu, Operand, anonymous_memory, available_memory, gemm_into, total_memory};
pub use cuda::{CONTEXT_BYTES, Cuda};
pub use host::{HostRoom, PROCESS_BYTES, lockable};
pub use imagined::ImaginedGpu;

use std::sync::Arc;
use std::time::Instant;

use crate::graph::{Graph, Plan, Residency, Role, Tensor, TensorId};
use crate::tensor::{DType, WeightSource};
use crate::{Error, Result};

/// A device that can run graphs.
pub trait Backend: Send + Sync {
    /// The kind of device: runs on one kind give the same bits.
    fn name(&self) -> &'static str;

    /// What runs the graphs, for people: "CPU, 8 threads".
    fn description(&self) -> String;

    /// The type in which activations are stored by default.
    fn activations(&self) -> DType;

    /// Plans `graph` for this device, without touching it.
    fn plan(&self, graph: &Graph, residency: &Residency) -> Plan;

    /// Memory that can still be had for tensors and weights, in bytes, where it is known.
    fn free_memory(&self) -> Option<u64>;

    /// Whether weights are copied into the memory that tensors live in (on the CPU they stay
    /// in the mapped files).
    fn copies_weights(&self) -> bool;

    /// Memory of the host that sessions may lock for what does not stay on the device, in
    /// bytes; `None` for as much as they need.
    fn host_memory(&self) -> Option<u64> {
        None
    }

    /// Whether sessions can keep so many bytes of carried frames in a scratch file.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] when there is no room for it, [`crate::ErrorKind::Usage`]
    /// when its folder is in memory itself.
    fn check_scratch(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// Bytes per second of a large copy within the device's own memory, those read and those
    /// written both counted; `None` where that is not told.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Memory`] when there is no room to measure it.
    fn copy_rate(&self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// When the first graph was given to a device that works beside the program.
    fn first_run(&self) -> Option<Instant> {
        None
    }

    /// Opens a session on the weights of one component, all of which stay on the device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] or [`crate::ErrorKind::Memory`] when the device refuses.
    fn open(&self, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Session>> {
        self.open_with(weights, &Residency::default())
    }

    /// Opens a session that keeps on the device what `residency` says, where the device has
    /// memory of its own. The results are the same to the bit.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn open_with(
        &self,
        weights: Arc<dyn WeightSource>,
        residency: &Residency,
    ) -> Result<Box<dyn Session>>;
}

/// Names a graph of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphId(pub(crate) usize);

/// Something on its way: calling it waits for it.
pub type Pending<T> = Box<dyn FnOnce() -> Result<T> + Send>;

/// Graphs that share weights, an arena and states. All data goes in and out as f32,
/// whatever the device stores.
pub trait Session: Send {
    /// Plans a graph and makes it ready to run: finds its weights, checks their shapes and
    /// places its tensors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when a weight is missing or has another shape,
    /// [`crate::ErrorKind::Memory`] when the arena cannot be had.
    fn add(&mut self, graph: Graph) -> Result<GraphId>;

    /// Forgets the graph, once the runs and copies asked for so far need it no more; its number
    /// is not given out again.
    fn remove(&mut self, graph: GraphId);

    /// The input, output or state of `graph` called `name`.
    ///
    /// # Errors
    /// When there is none of that name.
    fn find(&self, graph: GraphId, name: &str) -> Result<TensorId>;

    /// Writes an f32 (or bf16) input. Runs asked for earlier still see what was there before,
    /// and a few values are handed over without waiting for them.
    ///
    /// # Panics
    /// If the number of elements is not the tensor's.
    fn write(&mut self, graph: GraphId, input: TensorId, data: &[f32]) -> Result<()>;

    /// Writes an input of ids.
    ///
    /// # Panics
    /// If the number of elements is not the tensor's.
    fn write_ids(&mut self, graph: GraphId, input: TensorId, ids: &[u32]) -> Result<()>;

    /// Copies rows of an input, a state or an output of the last run of one graph to an input
    /// of another, without the host: as many as that has, row `first` the first of them. Runs
    /// and copies take effect in the order in which they are asked for.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when `to` is no input, the graphs are the same, the types
    /// differ, the rows do not lie one after another, or there are no such rows.
    fn copy(
        &mut self,
        from: (GraphId, TensorId),
        first: usize,
        to: (GraphId, TensorId),
    ) -> Result<()>;

    /// Executes all nodes in order. On a device they may still be under way when this returns,
    /// and a few runs before them, too; what goes wrong in them is then the error of a later call.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] when the device fails.
    fn run(&mut self, graph: GraphId) -> Result<()>;

    /// Reads an input or an output of the last run.
    fn read(&mut self, graph: GraphId, tensor: TensorId) -> Result<Vec<f32>>;

    /// Begins to bring an output of the last run back as 8-bit values: `x · 127.5 + 127.5`,
    /// clamped to 0 … 255 and truncated. What is run afterwards does not change them.
    ///
    /// # Errors
    /// Those of the device; waiting fails with [`crate::ErrorKind::Numeric`] when a value is
    /// NaN or infinite.
    fn fetch_pixels(&mut self, graph: GraphId, tensor: TensorId) -> Result<Pending<Vec<u8>>>;

    /// Names of this program's kernels that a run of `graph` starts, in order: for measurements.
    /// None on a backend without such.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when the graph was removed.
    fn kernels(&self, graph: GraphId) -> Result<Vec<&'static str>> {
        let _ = graph;
        Ok(Vec::new())
    }

    /// Runs `graph` once to warm up and then `repeats` times, and returns the seconds each
    /// run took on the device. Caches are flushed in between where the device can.
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    fn time(&mut self, graph: GraphId, repeats: usize) -> Result<Vec<f64>>;

    /// Runs `graph` once to warm up and once more, and returns the seconds of each node.
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    fn profile(&mut self, graph: GraphId) -> Result<Vec<f64>>;
}

/// Fails if [`Session::copy`] of row `first` on cannot be done.
fn check_copy(from: &Tensor, first: usize, to: &Tensor, same_graph: bool) -> Result<()> {
    let input = to.role == Role::Input && to.is_contiguous();
    let fits = from.is_contiguous() && from.dtype == to.dtype && from.cols() == to.cols();
    if input && fits && !same_graph && first + to.rows() <= from.rows() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "rows {first}.. of {} {:?} ({}) cannot be copied to {} {:?} ({})",
        from.name, from.shape, from.dtype, to.name, to.shape, to.dtype
    )))
}

/// Fails if an id is not a row of a table of `vocabulary` rows.
fn check_ids(ids: &[u32], vocabulary: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            Err(Error::model(format!("token id {id} is outside the vocabulary of {vocabulary}"))
                .hint("the tokenizer and the text encoder belong to different checkpoints"))
        }
    }
}
