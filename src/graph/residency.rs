//! What of a graph stays in device memory between the nodes that use it, and what comes and
//! goes.

use std::collections::HashSet;

use super::{Graph, Node, Op, WeightId};

/// Which weights and which carried frames stay in device memory. All of them do by default.
///
/// Only matrices and embedding tables are ever streamed: norms, biases and convolutions are
/// small beside them. On the CPU weights stay in the mapped files and states in memory, and
/// none of this matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residency {
    streamed: HashSet<String>,
    hosted: HashSet<String>,
    /// Whether nothing stays, whatever is named.
    none: bool,
    ahead: u64,
}

impl Residency {
    /// Streams the matrices that are named (a node's by its first one) and keeps the states
    /// that are named on the host. What is needed next may come in early while at most
    /// `ahead` bytes wait for their nodes.
    pub fn new(streamed: HashSet<String>, hosted: HashSet<String>, ahead: u64) -> Residency {
        Residency { streamed, hosted, none: false, ahead }
    }

    /// Streams every matrix and keeps every state on the host.
    pub fn nothing_stays(ahead: u64) -> Residency {
        Residency { none: true, ahead, ..Residency::default() }
    }

    /// The matrices that `node` of `graph` needs brought in for it.
    pub fn streamed(&self, graph: &Graph, node: &Node) -> Vec<WeightId> {
        let matrices = matrices(node);
        let first = matrices.first().map(|w| graph.weights()[w.index()].name.as_str());
        if first.is_some_and(|name| self.streams(name)) { matrices } else { Vec::new() }
    }

    /// Whether the matrices that begin with the one called `name` are streamed.
    pub fn streams(&self, name: &str) -> bool {
        self.none || self.streamed.contains(name)
    }

    /// Whether the state called `name` is kept on the host.
    pub fn hosts(&self, name: &str) -> bool {
        self.none || self.hosted.contains(name)
    }

    /// Bytes that may wait for their nodes.
    pub fn ahead(&self) -> u64 {
        self.ahead
    }

    /// Whether everything stays in device memory.
    pub fn is_full(&self) -> bool {
        !self.none && self.streamed.is_empty() && self.hosted.is_empty()
    }
}

/// The matrices of `node` that can be streamed, in the order in which they lie side by side.
pub fn matrices(node: &Node) -> Vec<WeightId> {
    match &node.op {
        Op::Linear { parts, .. } => parts.iter().map(|(weight, _)| *weight).collect(),
        Op::Embedding { table, .. } => vec![*table],
        _ => Vec::new(),
    }
}
