//! Running graphs on a device.
//!
//! A [`Backend`] opens [`Session`]s; a session holds the plans of graphs that belong
//! together (the windows of a decoder, the stages of a transformer), one arena large enough
//! for any of them, and the states that they pass on to each other by name and size.

mod cpu;

pub use cpu::{Cpu, Operand, gemm_into};

use std::sync::Arc;

use crate::Result;
use crate::graph::{Graph, Plan, TensorId};
use crate::tensor::{DType, WeightSource};

/// A device that can run graphs.
pub trait Backend: Send + Sync {
    /// What runs the graphs, for people: "CPU, 8 threads".
    fn description(&self) -> String;

    /// The type in which activations are stored by default.
    fn activations(&self) -> DType;

    /// Plans `graph` for this device, without touching it.
    fn plan(&self, graph: &Graph) -> Plan;

    /// Opens a session on the weights of one component.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] or [`crate::ErrorKind::Memory`] when the device refuses.
    fn open(&self, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Session>>;
}

/// Names a graph of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphId(pub(crate) usize);

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

    /// Forgets the graph; its number is not given out again.
    fn remove(&mut self, graph: GraphId);

    /// The input, output or state of `graph` called `name`.
    ///
    /// # Errors
    /// When there is none of that name.
    fn find(&self, graph: GraphId, name: &str) -> Result<TensorId>;

    /// Writes an f32 (or bf16) input.
    ///
    /// # Panics
    /// If the number of elements is not the tensor's.
    fn write(&mut self, graph: GraphId, input: TensorId, data: &[f32]) -> Result<()>;

    /// Writes an input of ids.
    ///
    /// # Panics
    /// If the number of elements is not the tensor's.
    fn write_ids(&mut self, graph: GraphId, input: TensorId, ids: &[u32]) -> Result<()>;

    /// Executes all nodes in order.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] when the device fails.
    fn run(&mut self, graph: GraphId) -> Result<()>;

    /// Executes the graph `repeats` times and returns the seconds of each.
    ///
    /// # Errors
    /// As for [`Session::run`].
    fn time(&mut self, graph: GraphId, repeats: usize) -> Result<Vec<f64>> {
        let once = |_| {
            let start = std::time::Instant::now();
            self.run(graph)?;
            Ok(start.elapsed().as_secs_f64())
        };
        (0..repeats).map(once).collect()
    }

    /// Reads an input or an output of the last run.
    fn read(&mut self, graph: GraphId, tensor: TensorId) -> Result<Vec<f32>>;
}
