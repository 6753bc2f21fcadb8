//! What of a graph stays in device memory between the nodes that use it, and what comes and
//! goes.

use std::collections::{HashMap, HashSet};

use super::{Graph, Node, Op, WeightId};

/// How far transfers may be from the nodes that they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ahead {
    /// Most bytes that wait for their nodes, or to go out after them; one node's may be more.
    pub bytes: u64,
    /// Most nodes before the one they are for at which they begin to come in, and after it by
    /// which they have gone out.
    pub nodes: usize,
}

impl Ahead {
    /// At most so many bytes, however many nodes away.
    pub const fn bytes(bytes: u64) -> Ahead {
        Ahead { bytes, nodes: usize::MAX }
    }
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead::bytes(0)
    }
}

/// Where a carried frame is between the nodes that use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// In device memory.
    Device,
    /// In page-locked memory of the host, which the device's copy engines read and write.
    Host,
    /// In a scratch file, which the host maps.
    File,
}

/// Which weights and which carried frames stay in device memory. All of them do by default.
///
/// Only matrices and embedding tables are ever streamed: norms, biases and convolutions are
/// small beside them. On the CPU weights stay in the mapped files and states in memory, and
/// none of this matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residency {
    streamed: HashSet<String>,
    /// Where states are; those that are not named are at `others`.
    states: HashMap<String, Home>,
    others: Home,
    /// Whether every matrix is streamed, whatever is named.
    no_weights: bool,
    ahead: Ahead,
    arena: u64,
    own: u64,
}

impl Default for Residency {
    fn default() -> Residency {
        Residency::new(HashSet::new(), HashMap::new(), Ahead::default())
    }
}

impl Residency {
    /// Streams the matrices that are named (a node's by its first one) and keeps the states
    /// that are named where it is said; the others stay on the device.
    pub fn new(
        streamed: HashSet<String>,
        states: HashMap<String, Home>,
        ahead: Ahead,
    ) -> Residency {
        let (others, no_weights, arena, own) = (Home::Device, false, 0, 0);
        Residency { streamed, states, others, no_weights, ahead, arena, own }
    }

    /// The same, with an arena of `bytes` from the first graph on: that of the largest graph to
    /// come, so that memory does not grow.
    pub fn with_arena(self, bytes: u64) -> Residency {
        Residency { arena: bytes, ..self }
    }

    /// The same, with `bytes` for the inputs and constants of a graph that comes in place of a
    /// smaller one: what the largest graph to come needs, so that memory does not grow again.
    pub fn with_own(self, bytes: u64) -> Residency {
        Residency { own: bytes, ..self }
    }

    /// Streams every matrix and keeps every state at `states`.
    pub fn nothing_stays(states: Home, ahead: Ahead) -> Residency {
        Residency { no_weights: true, others: states, ahead, ..Residency::default() }
    }

    /// The matrices that `node` of `graph` needs brought in for it.
    pub fn streamed(&self, graph: &Graph, node: &Node) -> Vec<WeightId> {
        let matrices = matrices(node);
        let first = matrices.first().map(|w| graph.weights()[w.index()].name.as_str());
        if first.is_some_and(|name| self.streams(name)) { matrices } else { Vec::new() }
    }

    /// Whether the matrices that begin with the one called `name` are streamed.
    pub fn streams(&self, name: &str) -> bool {
        self.no_weights || self.streamed.contains(name)
    }

    /// How many matrices are streamed besides those of `others`.
    pub fn streamed_beyond(&self, others: &HashSet<String>) -> usize {
        self.streamed.difference(others).count()
    }

    /// Where the state called `name` is between the nodes that use it.
    pub fn home(&self, name: &str) -> Home {
        self.states.get(name).copied().unwrap_or(self.others)
    }

    /// Whether the state called `name` leaves the device between the nodes that use it.
    pub fn leaves(&self, name: &str) -> bool {
        self.home(name) != Home::Device
    }

    /// Bytes that the arena has at least.
    pub fn arena(&self) -> u64 {
        self.arena
    }

    /// Bytes of the inputs and constants of the largest graph, as far as they were told.
    pub fn own(&self) -> u64 {
        self.own
    }

    /// How far transfers may be from their nodes.
    pub fn ahead(&self) -> Ahead {
        self.ahead
    }

    /// Whether everything stays in device memory.
    pub fn is_full(&self) -> bool {
        let weights = !self.no_weights && self.streamed.is_empty();
        let stays = |home: &Home| *home == Home::Device;
        weights && stays(&self.others) && self.states.values().all(stays)
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
