//! The graph a model records: a flat list of nodes over typed virtual tensors.
//!
//! A graph holds no data except small constants (rotary tables). Weights are named by
//! their checkpoint names and checked against the files before anything runs. Nodes
//! execute in the order they were recorded; an op may update its output in place, so a
//! tensor is a place in memory rather than a value.
//!
//! Every tensor is either a *root*, which owns memory, or a *view* of a root: a range of
//! rows or columns, or the same elements under another shape. Views are what lets one
//! packed buffer hold text and image tokens, or queries, keys and values, without copies.

mod builder;
mod cost;
mod op;
mod plan;
mod residency;
mod shape;

pub use op::{
    Activation, AttentionSpec, ConvSpec, Epilogue, HeadNorms, Op, RelativeBias, RowGroup, Segment,
    Shuffle,
};
pub use plan::{Lifetime, Plan, Staged, StagedWhat};
pub use residency::{Ahead, Home, Residency, matrices};

use std::collections::HashMap;
use std::ops::Range;

use crate::tensor::DType;
use crate::{Error, Result};

/// Names a tensor of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub(crate) u32);

/// Names a weight of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub(crate) u32);

impl TensorId {
    /// Position in [`Graph::tensors`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl WeightId {
    /// Position in [`Graph::weights`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where the memory of a root tensor lives, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub enum Role {
    /// Written by the caller; keeps its contents between runs.
    Input,
    /// Known when the graph is recorded; index into [`Graph::constants`].
    Constant(usize),
    /// Carried from one run to the next, shared by name between the graphs of a session;
    /// zero at first.
    State,
    /// A place in the arena, alive from the first node that touches it to the last.
    Intermediate,
    /// Like an intermediate, but kept until the end of the run for the caller to read.
    Output,
}

/// One tensor of a graph.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// For messages, and for inputs, outputs and states the name they are found by.
    pub name: String,
    /// Extents, slowest first. Token tensors are `[rows, columns]`; video tensors are
    /// `[frames, height, width, channels]`.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// The tensor that owns the memory (itself for a root).
    pub root: TensorId,
    /// Where the first element lies in the root, in elements.
    pub offset: usize,
    /// Distance between consecutive rows (all dimensions but the last), in elements.
    pub row_stride: usize,
    /// Meaningful for roots only.
    pub role: Role,
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Whether the elements lie one after another.
    pub fn is_contiguous(&self) -> bool {
        self.row_stride == self.cols() || self.rows() <= 1
    }
}

/// A weight the graph needs, by checkpoint name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
}

/// One step of the computation.
#[derive(Debug, Clone)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Tensors read, in the order the op defines.
    pub inputs: Vec<TensorId>,
    /// Tensor written (and first read, where [`Op::updates_output`] says so).
    pub output: TensorId,
    /// The frames a causal convolution carries from one run to the next.
    pub state: Option<TensorId>,
    /// Whether it may run at the same time as the node before it. See
    /// [`Graph::side_by_side`].
    pub beside: bool,
    /// Where in the model this node belongs, for messages and profiles.
    pub label: String,
}

/// A run of nodes whose weights come and go together: a transformer block, for example.
#[derive(Debug, Clone)]
pub struct Block {
    /// Checkpoint prefix of the block.
    pub name: String,
    /// The nodes of the block.
    pub nodes: Range<usize>,
}

/// A recorded computation. See the module documentation.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    tensors: Vec<Tensor>,
    nodes: Vec<Node>,
    weights: Vec<Weight>,
    weight_ids: HashMap<String, WeightId>,
    constants: Vec<Vec<f32>>,
    blocks: Vec<Block>,
    named: HashMap<String, TensorId>,
    scope: String,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// All tensors, views included.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor `id`.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.index()]
    }

    /// The nodes in execution order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Every weight the graph reads.
    pub fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// The data of all constants.
    pub fn constants(&self) -> &[Vec<f32>] {
        &self.constants
    }

    /// The blocks in execution order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The input, output or state called `name`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when the graph has none of that name.
    pub fn find(&self, name: &str) -> Result<TensorId> {
        self.named
            .get(name)
            .copied()
            .ok_or_else(|| Error::usage(format!("the graph has no input, output or state {name}")))
    }

    /// Floating-point operations of one run (a multiply-add counts as two).
    pub fn flops(&self) -> u64 {
        self.nodes.iter().map(|n| n.op.flops(self, n)).sum()
    }

    /// Whether node `index` reads frames that were carried to it.
    pub fn continues(&self, index: usize) -> bool {
        matches!(&self.nodes[index].op, Op::Conv3d(spec) if spec.continues)
    }

    /// Whether node `index` changes the frames that are carried on.
    pub fn moves_on(&self, index: usize) -> bool {
        matches!(&self.nodes[index].op, Op::Conv3d(spec) if spec.moves_on)
    }

    /// The nodes that may run at the same time as node `index`, itself included.
    pub fn group(&self, index: usize) -> Range<usize> {
        let start = (0..=index).rev().find(|&i| !self.nodes[i].beside).unwrap_or(0);
        let beside = self.nodes[index + 1..].iter().take_while(|node| node.beside).count();
        start..index + 1 + beside
    }

    /// Whether two tensors have an element in common.
    fn overlap(&self, a: TensorId, b: TensorId) -> bool {
        let (a, b) = (self.tensor(a), self.tensor(b));
        if a.root != b.root || a.is_empty() || b.is_empty() {
            return false;
        }
        let last = |t: &Tensor| t.offset + (t.rows() - 1) * t.row_stride + t.cols();
        if a.row_stride != b.row_stride {
            return a.offset < last(b) && b.offset < last(a);
        }
        // Rows of one width: apart if they are so in either direction.
        let rows = |t: &Tensor| t.offset / t.row_stride..t.offset / t.row_stride + t.rows();
        let columns = |t: &Tensor| t.offset % t.row_stride..t.offset % t.row_stride + t.cols();
        let meet = |a: Range<usize>, b: Range<usize>| a.start < b.end && b.start < a.end;
        meet(rows(a), rows(b)) && meet(columns(a), columns(b))
    }

    /// Bytes of all weights the graph reads, at `bytes_per_element`.
    pub fn weight_bytes(&self, bytes_per_element: usize) -> u64 {
        let elements: u64 =
            self.weights.iter().map(|w| w.shape.iter().product::<usize>() as u64).sum();
        elements * bytes_per_element as u64
    }
}
