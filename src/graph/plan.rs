//! The memory plan: where in one arena each intermediate lives.
//!
//! A pure function of the graph. Each root tensor is alive from the first node that
//! touches it (or a view of it) to the last. Roots are placed largest first at the lowest
//! offset that no root alive at the same time occupies ("greedy by size", Pisarchyk and
//! Lee, arXiv 2001.03288). Where an op allows it, its output takes the place of an input
//! that is not needed any more.

use std::ops::Range;

use super::{Graph, Role, TensorId};
use crate::tensor::DType;

/// Placement of one root tensor in the arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifetime {
    /// The root tensor.
    pub root: TensorId,
    /// First byte in the arena, a multiple of [`Plan::ALIGNMENT`].
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Nodes during which the memory must be kept: from the first that touches it to one
    /// past the last; an output's go on past the last node of the graph.
    pub nodes: Range<usize>,
}

/// Where every intermediate and output of a graph lives. Inputs, constants and states have
/// memory of their own, since they outlive a run.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    lifetimes: Vec<Lifetime>,
    by_root: Vec<Option<usize>>,
    arena_bytes: u64,
    total_bytes: u64,
    persistent_bytes: u64,
}

impl Plan {
    /// Every placement starts at a multiple of this many bytes: the widest vector access
    /// and the granularity of a device cache line.
    pub const ALIGNMENT: u64 = 256;

    /// Plans `graph` on a backend that stores elements of a type in `storage(type)` bytes.
    pub fn new(graph: &Graph, storage: impl Fn(DType) -> usize) -> Plan {
        Self::with(graph, storage, true)
    }

    /// A plan in which no two tensors share memory: what sharing must not change.
    pub fn unshared(graph: &Graph, storage: impl Fn(DType) -> usize) -> Plan {
        Self::with(graph, storage, false)
    }

    fn with(graph: &Graph, storage: impl Fn(DType) -> usize, share: bool) -> Plan {
        let bytes_of = |id: TensorId| {
            let t = graph.tensor(id);
            t.len() as u64 * storage(t.dtype) as u64
        };
        let mut lifetimes = spans(graph, &bytes_of);
        let total_bytes = lifetimes.iter().map(|l| l.bytes).sum();
        if share {
            let owner = reuse_inputs(graph, &lifetimes);
            place(&mut lifetimes, &owner);
        } else {
            let mut end = 0u64;
            for lifetime in &mut lifetimes {
                lifetime.offset = end.next_multiple_of(Self::ALIGNMENT);
                end = lifetime.offset + lifetime.bytes;
            }
        }

        let mut by_root = vec![None; graph.tensors().len()];
        for (i, lifetime) in lifetimes.iter().enumerate() {
            by_root[lifetime.root.index()] = Some(i);
        }
        let persistent_bytes = graph
            .tensors()
            .iter()
            .enumerate()
            .filter(|(i, t)| t.root.index() == *i && !in_arena(&t.role))
            .map(|(i, _)| bytes_of(TensorId(i as u32)))
            .sum();
        let arena_bytes = lifetimes.iter().map(|l| l.offset + l.bytes).max().unwrap_or(0);
        Plan { lifetimes, by_root, arena_bytes, total_bytes, persistent_bytes }
    }

    /// All placements, in the order of their roots.
    pub fn lifetimes(&self) -> &[Lifetime] {
        &self.lifetimes
    }

    /// The placement of `root`, if it lives in the arena.
    pub fn lifetime(&self, root: TensorId) -> Option<&Lifetime> {
        self.by_root[root.index()].map(|i| &self.lifetimes[i])
    }

    /// Size of the arena: the peak of all intermediates, in bytes.
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }

    /// What the intermediates would take without any reuse, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Memory of inputs, constants and states, in bytes.
    pub fn persistent_bytes(&self) -> u64 {
        self.persistent_bytes
    }
}

fn in_arena(role: &Role) -> bool {
    matches!(role, Role::Intermediate | Role::Output)
}

/// The lifetime of every root in the arena, not placed yet.
fn spans(graph: &Graph, bytes_of: &dyn Fn(TensorId) -> u64) -> Vec<Lifetime> {
    let mut touched: Vec<Option<Range<usize>>> = vec![None; graph.tensors().len()];
    for (step, node) in graph.nodes().iter().enumerate() {
        for &id in node.inputs.iter().chain([&node.output]) {
            let root = graph.tensor(id).root.index();
            let span = touched[root].get_or_insert(step..step + 1);
            span.end = step + 1;
        }
    }
    let mut lifetimes = Vec::new();
    for (i, span) in touched.into_iter().enumerate() {
        let (Some(mut nodes), tensor) = (span, &graph.tensors()[i]) else { continue };
        if !in_arena(&tensor.role) {
            continue;
        }
        if tensor.role == Role::Output {
            // Past the last node, so that not even that one may take its place.
            nodes.end = graph.nodes().len() + 1;
        }
        let root = TensorId(i as u32);
        lifetimes.push(Lifetime { root, offset: 0, bytes: bytes_of(root), nodes });
    }
    lifetimes
}

/// Lets outputs take the place of dying inputs. Returns, for each lifetime, the index of
/// the one whose memory it uses (itself if none).
fn reuse_inputs(graph: &Graph, lifetimes: &[Lifetime]) -> Vec<usize> {
    let mut owner: Vec<usize> = (0..lifetimes.len()).collect();
    let find = |root: TensorId| lifetimes.binary_search_by_key(&root, |l| l.root).ok();
    // End of each owner's own and inherited life.
    let mut end: Vec<usize> = lifetimes.iter().map(|l| l.nodes.end).collect();
    for (step, node) in graph.nodes().iter().enumerate() {
        let Some(&input) = node.inputs.first().filter(|_| node.op.may_reuse_input()) else {
            continue;
        };
        let (from, to) = (graph.tensor(input), graph.tensor(node.output));
        let whole = from.len() == graph.tensor(from.root).len() && to.root == node.output;
        let (Some(i), Some(o)) = (find(from.root), find(to.root)) else {
            continue;
        };
        let owner_of_input = owner[i];
        let dies_here = lifetimes[i].nodes.end == step + 1 && end[owner_of_input] == step + 1;
        let born_here = lifetimes[o].nodes.start == step;
        if whole && dies_here && born_here && lifetimes[i].bytes == lifetimes[o].bytes {
            owner[o] = owner_of_input;
            end[owner_of_input] = lifetimes[o].nodes.end;
        }
    }
    owner
}

/// Assigns offsets, largest owner first.
fn place(lifetimes: &mut [Lifetime], owner: &[usize]) {
    // A group is an owner with all that take its place: one block of memory.
    let mut groups: Vec<Option<Range<usize>>> = vec![None; lifetimes.len()];
    for (i, lifetime) in lifetimes.iter().enumerate() {
        let span = groups[owner[i]].get_or_insert(lifetime.nodes.clone());
        span.start = span.start.min(lifetime.nodes.start);
        span.end = span.end.max(lifetime.nodes.end);
    }
    let mut order: Vec<usize> = (0..lifetimes.len()).filter(|&i| owner[i] == i).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lifetimes[i].bytes), i));

    let mut placed: Vec<usize> = Vec::new();
    for &i in &order {
        let Some(span) = &groups[i] else { continue };
        // Placed groups alive at the same time, by offset.
        let mut taken: Vec<(u64, u64)> = placed
            .iter()
            .filter(|&&j| {
                groups[j].as_ref().is_some_and(|g| g.start < span.end && span.start < g.end)
            })
            .map(|&j| (lifetimes[j].offset, lifetimes[j].offset + lifetimes[j].bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + lifetimes[i].bytes <= start {
                break;
            }
            offset = offset.max(end.next_multiple_of(Plan::ALIGNMENT));
        }
        lifetimes[i].offset = offset;
        placed.push(i);
    }
    for i in 0..lifetimes.len() {
        lifetimes[i].offset = lifetimes[owner[i]].offset;
    }
}
