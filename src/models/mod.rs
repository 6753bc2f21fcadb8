//! The networks of Pyramid Flow. Each *records* a graph for a given geometry and nothing
//! else; structures are named like the checkpoint's keys.

pub mod adaptive_norm;
pub mod clip;
pub mod dit;
pub mod flux;
mod joint;
pub mod mmdit;
mod positions;
pub mod t5;
pub mod vae;

use crate::Result;
use crate::graph::{Epilogue, Graph, Op, TensorId, WeightId};

/// A weight name with the shape the model expects.
pub type ExpectedWeight = (String, Vec<usize>);

/// The weights of several graphs of one component, each once, by name.
fn collect_weights(graphs: &[Graph]) -> Vec<ExpectedWeight> {
    let mut all: Vec<ExpectedWeight> = graphs
        .iter()
        .flat_map(|g| g.weights().iter().map(|w| (w.name.clone(), w.shape.clone())))
        .collect();
    all.sort();
    all.dedup();
    all
}

/// Shorthands for what every model records.
trait Record {
    /// Weight and bias of a linear layer `name` from `inputs` to `outputs` columns.
    fn linear_weights(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> (WeightId, Option<WeightId>);

    /// `act(x·Wᵀ + b)` and the like, into a fresh tensor.
    fn linear(
        &mut self,
        name: &str,
        x: TensorId,
        outputs: usize,
        epilogue: Epilogue,
    ) -> Result<TensorId>;
}

impl Record for Graph {
    fn linear_weights(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> (WeightId, Option<WeightId>) {
        let weight = self.weight(&format!("{name}.weight"), &[outputs, inputs]);
        (weight, Some(self.weight(&format!("{name}.bias"), &[outputs])))
    }

    fn linear(
        &mut self,
        name: &str,
        x: TensorId,
        outputs: usize,
        epilogue: Epilogue,
    ) -> Result<TensorId> {
        let inputs = self.tensor(x).cols();
        let parts = vec![self.linear_weights(name, outputs, inputs)];
        self.push(Op::Linear { parts, epilogue }, &[x])
    }
}
