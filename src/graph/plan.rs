//! The memory plan: where in one arena each intermediate lives.
//!
//! A pure function of the graph. Each root tensor is alive from the first node that
//! touches it (or a view of it) to the last. Roots are placed largest first at the lowest
//! offset that no root alive at the same time occupies ("greedy by size", Pisarchyk and
//! Lee, arXiv 2001.03288). Where an op allows it, its output takes the place of an input
//! that is not needed any more.
//!
//! What does not stay in device memory ([`Residency`]) has a place in the same arena, from
//! the node at which it may begin to come in to the one by which it has gone out again.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{Graph, Residency, Role, TensorId};
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

/// What comes in from the host for one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagedWhat {
    /// The node's matrices, side by side.
    Weights,
    /// The node's state, which goes out again after it if the node moves it on.
    State(TensorId),
}

/// The place in the arena of what comes in from the host for one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// The node that uses it.
    pub node: usize,
    /// What it is.
    pub what: StagedWhat,
    /// First byte in the arena, a multiple of [`Plan::ALIGNMENT`].
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Nodes during which the memory is kept: once those before the first have run it may
    /// come in, and before the one past the last runs it must have gone out. The end may lie
    /// past the last node of the graph: then it goes out while other graphs run.
    pub nodes: Range<usize>,
}

/// Where every intermediate and output of a graph lives. Inputs, constants and states have
/// memory of their own, since they outlive a run.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    lifetimes: Vec<Lifetime>,
    by_root: Vec<Option<usize>>,
    staged: Vec<Staged>,
    arena_bytes: u64,
    total_bytes: u64,
    persistent_bytes: u64,
    own: HashMap<TensorId, u64>,
    own_bytes: u64,
}

impl Plan {
    /// Every placement starts at a multiple of this many bytes: the widest vector access
    /// and the granularity of a device cache line.
    pub const ALIGNMENT: u64 = 256;

    /// Plans `graph` on a backend that stores elements of a type in `storage(type)` bytes.
    pub fn new(graph: &Graph, storage: impl Fn(DType) -> usize) -> Plan {
        Self::with(graph, storage, &Residency::default(), true)
    }

    /// Plans `graph` with places for what `residency` does not keep in device memory. Weights
    /// are stored in bf16.
    pub fn staged(graph: &Graph, storage: impl Fn(DType) -> usize, residency: &Residency) -> Plan {
        Self::with(graph, storage, residency, true)
    }

    /// A plan in which no two tensors share memory: what sharing must not change.
    pub fn unshared(graph: &Graph, storage: impl Fn(DType) -> usize) -> Plan {
        Self::with(graph, storage, &Residency::default(), false)
    }

    fn with(
        graph: &Graph,
        storage: impl Fn(DType) -> usize,
        residency: &Residency,
        share: bool,
    ) -> Plan {
        let bytes_of = |id: TensorId| {
            let t = graph.tensor(id);
            t.len() as u64 * storage(t.dtype) as u64
        };
        let mut lifetimes = spans(graph, &bytes_of);
        let mut staged = stage(graph, residency, &bytes_of);
        let total_bytes = lifetimes.iter().map(|l| l.bytes).sum();
        if share {
            let owner = reuse_inputs(graph, &lifetimes);
            place(&mut lifetimes, &mut staged, &owner);
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
        let ends = lifetimes.iter().map(|l| l.offset + l.bytes);
        let arena_bytes = ends.chain(staged.iter().map(|s| s.offset + s.bytes)).max().unwrap_or(0);
        let persistent_bytes = persistent_bytes(graph, residency, &bytes_of);
        let (own, own_bytes) = own(graph, &bytes_of);
        Plan {
            lifetimes,
            by_root,
            staged,
            arena_bytes,
            total_bytes,
            persistent_bytes,
            own,
            own_bytes,
        }
    }

    /// All placements, in the order of their roots.
    pub fn lifetimes(&self) -> &[Lifetime] {
        &self.lifetimes
    }

    /// The placement of `root`, if it lives in the arena.
    pub fn lifetime(&self, root: TensorId) -> Option<&Lifetime> {
        self.by_root[root.index()].map(|i| &self.lifetimes[i])
    }

    /// The place of a state that leaves the device, for the node that uses it.
    pub fn staged_state(&self, state: TensorId) -> Option<&Staged> {
        self.staged.iter().find(|staged| staged.what == StagedWhat::State(state))
    }

    /// What comes in from the host, in the order of the nodes.
    pub fn stages(&self) -> &[Staged] {
        &self.staged
    }

    /// Size of the arena: the peak of all intermediates, in bytes.
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }

    /// What the intermediates would take without any reuse, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Memory of inputs, constants and the states that stay, in bytes.
    pub fn persistent_bytes(&self) -> u64 {
        self.persistent_bytes
    }

    /// Where `root`, an input or a constant, begins in a piece of memory that holds all of them
    /// and nothing else: a multiple of [`Plan::ALIGNMENT`].
    pub fn own_offset(&self, root: TensorId) -> Option<u64> {
        self.own.get(&root).copied()
    }

    /// Size of that piece, in bytes.
    pub fn own_bytes(&self) -> u64 {
        self.own_bytes
    }
}

fn in_arena(role: &Role) -> bool {
    matches!(role, Role::Intermediate | Role::Output)
}

/// Memory of what outlives a run. States of one name and size are one.
fn persistent_bytes(
    graph: &Graph,
    residency: &Residency,
    bytes_of: &dyn Fn(TensorId) -> u64,
) -> u64 {
    let carried: HashSet<TensorId> = graph.nodes().iter().filter_map(|node| node.state).collect();
    let mut states = HashSet::new();
    let mut counts = |id: TensorId| {
        let tensor = graph.tensor(id);
        match &tensor.role {
            Role::State if carried.contains(&id) && residency.leaves(&tensor.name) => false,
            Role::State => states.insert((&tensor.name, bytes_of(id))),
            role => !in_arena(role),
        }
    };
    let ids = (0..graph.tensors().len()).map(|i| TensorId(i as u32));
    let roots = ids.filter(|&id| graph.tensor(id).root == id);
    roots.filter(|&id| counts(id)).map(bytes_of).sum()
}

/// Where inputs and constants lie one after another, and where they end.
fn own(graph: &Graph, bytes_of: &dyn Fn(TensorId) -> u64) -> (HashMap<TensorId, u64>, u64) {
    let (mut offsets, mut end) = (HashMap::new(), 0u64);
    for (i, tensor) in graph.tensors().iter().enumerate() {
        let id = TensorId(i as u32);
        if tensor.root == id && matches!(tensor.role, Role::Input | Role::Constant(_)) {
            let offset = end.next_multiple_of(Plan::ALIGNMENT);
            offsets.insert(id, offset);
            end = offset + bytes_of(id);
        }
    }
    (offsets, end)
}

/// What comes in from the host, not placed yet, with the nodes during which its memory is
/// kept: as early, and for states as long, as [`Residency::ahead`] allows.
fn stage(graph: &Graph, residency: &Residency, bytes_of: &dyn Fn(TensorId) -> u64) -> Vec<Staged> {
    if residency.is_full() {
        return Vec::new();
    }
    let mut staged = Vec::new();
    for (node, recorded) in graph.nodes().iter().enumerate() {
        // Until all that may run with the node have: a backend makes one launch of them.
        let nodes = node..graph.group(node).end;
        let item = |what, bytes| Staged { node, what, offset: 0, bytes, nodes: nodes.clone() };
        let elements =
            |w: &super::WeightId| graph.weights()[w.index()].shape.iter().product::<usize>() as u64;
        let streamed = residency.streamed(graph, recorded);
        if !streamed.is_empty() {
            let bytes = streamed.iter().map(elements).sum::<u64>() * DType::Bf16.bytes() as u64;
            staged.push(item(StagedWhat::Weights, bytes));
        }
        if let Some(state) = recorded.state.filter(|&s| residency.leaves(&graph.tensor(s).name)) {
            staged.push(item(StagedWhat::State(state), bytes_of(state)));
        }
    }
    let most = residency.ahead();
    let sizes: Vec<(usize, u64)> = staged.iter().map(|s| (s.node, s.bytes)).collect();
    let mut last_use: HashMap<&str, usize> = HashMap::new();
    let (mut first, mut after, mut ahead, mut behind) = (0, 0, 0, 0);
    for (k, item) in staged.iter_mut().enumerate() {
        // Items first ..= k fit before this node: the memory of the one before `first` is
        // free for this one when its node has run.
        ahead += item.bytes;
        while ahead > most.bytes && first < k {
            ahead -= sizes[first].1;
            first += 1;
        }
        let free = first.checked_sub(1).map_or(0, |before| graph.group(sizes[before].0).end);
        item.nodes.start = free.max(item.node.saturating_sub(most.nodes)).min(item.node);
        // Items k .. after fit from this node on.
        if after < k {
            (after, behind) = (k, 0);
        }
        while after < sizes.len() && (behind + sizes[after].1 <= most.bytes || after == k) {
            behind += sizes[after].1;
            after += 1;
        }
        behind -= item.bytes;
        let StagedWhat::State(state) = item.what else { continue };
        // What does not move on is as it was: nothing goes out.
        let stays = if graph.moves_on(item.node) { most.nodes } else { 1 };
        let next = sizes.get(after).map_or(graph.nodes().len() + 1, |&(node, _)| node);
        item.nodes.end = next.min(item.node.saturating_add(stays)).max(item.node + 1);
        // A state must have been used before it can come in for its next use.
        let name = graph.tensor(state).name.as_str();
        if let Some(before) = last_use.insert(name, item.node) {
            item.nodes.start = item.nodes.start.max(before + 1);
        }
    }
    staged
}

/// The lifetime of every root in the arena, not placed yet.
fn spans(graph: &Graph, bytes_of: &dyn Fn(TensorId) -> u64) -> Vec<Lifetime> {
    let mut touched: Vec<Option<Range<usize>>> = vec![None; graph.tensors().len()];
    for (step, node) in graph.nodes().iter().enumerate() {
        // What may run at one time may not share memory.
        let group = graph.group(step);
        for &id in node.inputs.iter().chain([&node.output]) {
            let root = graph.tensor(id).root.index();
            let span = touched[root].get_or_insert(group.clone());
            span.end = group.end;
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

/// Assigns offsets, largest first: one block of memory for an owner and all that take its
/// place, and one for each staged item.
fn place(lifetimes: &mut [Lifetime], staged: &mut [Staged], owner: &[usize]) {
    struct Block {
        bytes: u64,
        nodes: Range<usize>,
        offset: u64,
    }
    let mut blocks: Vec<Block> = lifetimes
        .iter()
        .map(|l| Block { bytes: l.bytes, nodes: l.nodes.clone(), offset: 0 })
        .chain(staged.iter().map(|s| Block { bytes: s.bytes, nodes: s.nodes.clone(), offset: 0 }))
        .collect();
    for (i, lifetime) in lifetimes.iter().enumerate() {
        let span = &mut blocks[owner[i]].nodes;
        *span = span.start.min(lifetime.nodes.start)..span.end.max(lifetime.nodes.end);
    }
    let is_owner = |i: usize| owner.get(i).is_none_or(|&o| o == i);
    let mut order: Vec<usize> = (0..blocks.len()).filter(|&i| is_owner(i)).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(blocks[i].bytes), i));

    let mut placed: Vec<usize> = Vec::new();
    for &i in &order {
        let Block { bytes, nodes, .. } = &blocks[i];
        // Placed blocks alive at the same time, by offset.
        let mut taken: Vec<(u64, u64)> = placed
            .iter()
            .map(|&j| &blocks[j])
            .filter(|b| b.nodes.start < nodes.end && nodes.start < b.nodes.end)
            .map(|b| (b.offset, b.offset + b.bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + bytes <= start {
                break;
            }
            offset = offset.max(end.next_multiple_of(Plan::ALIGNMENT));
        }
        blocks[i].offset = offset;
        placed.push(i);
    }
    for (i, lifetime) in lifetimes.iter_mut().enumerate() {
        lifetime.offset = blocks[owner[i]].offset;
    }
    for (item, block) in staged.iter_mut().zip(&blocks[owner.len()..]) {
        item.offset = block.offset;
    }
}
