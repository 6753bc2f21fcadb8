//! How a phase of a run fits into the device memory there is: which weights stay and which
//! are streamed, in what pieces the decoder goes and which of its carried frames wait on the
//! host, in memory or in the scratch file. Decided from graphs alone, before anything is loaded;
//! results do not depend on it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use super::predict::{Machine, predict};
use super::room::require_host;
use crate::exec::Backend;
use crate::graph::{Ahead, Graph, Home, Op, Residency, matrices};
use crate::tensor::DType;
use crate::{Error, Result};

/// Device memory besides arena, weights, inputs and states: work space of libraries and their
/// kernels, tables, pixels on their way back, and what the driver rounds up.
const MARGIN: u64 = 192 << 20;
/// Bytes of weights that may wait for their nodes, from comfortable to just in time.
const AHEAD: [u64; 5] = [512 << 20, 256 << 20, 128 << 20, 32 << 20, 0];
/// How far carried frames may be from their nodes. More room for what is on its way leaves less
/// for what stays.
const AHEAD_OF_STATES: [Ahead; 5] = [
    Ahead { bytes: 1 << 30, nodes: 64 },
    Ahead { bytes: 512 << 20, nodes: 16 },
    Ahead { bytes: 256 << 20, nodes: 16 },
    Ahead { bytes: 256 << 20, nodes: 4 },
    JUST_IN_TIME,
];
const JUST_IN_TIME: Ahead = Ahead { bytes: 0, nodes: 1 };
/// The machine for which one way is compared with another: a card whose memory is short, on
/// PCIe 4.0 x16, which gives less than its 25 GB/s when both directions are busy, and a disk on
/// PCIe 3.0 x4.
const USUAL: Machine = Machine { flops: 60e12, memory: 450e9, link: 20e9, disk: 2e9 };
/// Steps in which the resident part of the weights is chosen.
const STEPS: u64 = 64;
/// Pinned memory of the ring that uploads go through.
const RING: u64 = crate::exec::cuda::RING_BYTES;
/// Pinned memory that carried frames pass through on their way to the scratch file and back.
const SLOTS: u64 = crate::exec::cuda::COURIER_BYTES;
/// How much longer decoding may take for less page-locked memory.
const PATIENCE: f64 = 1.1;

/// How the graphs of one session lie in memory.
#[derive(Debug, Clone, Default)]
pub struct Fit {
    /// What stays on the device.
    pub residency: Residency,
    /// See [`crate::models::vae::Window::at_once`].
    pub at_once: usize,
    /// Peak of all intermediates and of what comes in for them, in bytes.
    pub arena_bytes: u64,
    /// Inputs, constants and carried frames that stay, in bytes.
    pub persistent_bytes: u64,
    /// Weights that stay, in bytes.
    pub resident_bytes: u64,
    /// Everything on the device, the context of the driver excepted, in bytes.
    pub device_bytes: u64,
    /// Page-locked memory of the host, in bytes.
    pub pinned_bytes: u64,
    /// Carried frames in the scratch file, in bytes.
    pub scratch_bytes: u64,
}

impl Fit {
    /// Fails if the fit needs more than `backend` has of the device's or the host's memory, or a
    /// scratch file that there is no room for.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Memory`] naming the phase and what it needs, and those of
    /// [`Backend::check_scratch`].
    pub fn require(&self, backend: &dyn Backend, phase: &str) -> Result<()> {
        if backend.copies_weights() {
            require_host(phase, self.pinned_bytes, self.scratch_bytes, backend)?;
        }
        match budget(backend) {
            Some(budget) if self.device_bytes > budget => {
                let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
                let error = Error::memory(format!(
                    "{phase} needs {:.2} GiB of GPU memory at least, {:.2} GiB can be had",
                    gib(self.device_bytes),
                    gib(budget)
                ));
                Err(error.hint(
                    "allow more with --max-vram, close other programs that use the GPU, or make \
                     the video smaller or shorter; `pyraflow plan --max-vram` shows what it takes",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// What graphs may take on `backend`, `None` where weights are not copied and nothing can be
/// left out.
fn budget(backend: &dyn Backend) -> Option<u64> {
    backend.free_memory().filter(|_| backend.copies_weights())
}

/// Which weights are streamed even where there is room for them, because each run of the
/// session needs them once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Once {
    /// None.
    Nothing,
    /// All of them.
    Everything,
    /// Those of the first graph.
    FirstGraph,
}

/// Fits graphs of one session, which are run one at a time, by streaming weights. Of what is
/// too much for the device the part that stays is spread evenly, so that transfers are, too.
/// What waits for its nodes takes room from what stays: the way is taken that is fastest for the
/// last of the graphs, and among about equals the one that streams least. If nothing fits, the
/// fit is the smallest there is.
pub fn stream_weights(graphs: &[&Graph], once: Once, backend: &dyn Backend) -> Fit {
    let weights = Weights::of(graphs);
    let names = |graph: &Graph| -> HashSet<String> {
        graph.nodes().iter().filter_map(|node| first_matrix(graph, node)).collect()
    };
    let always = match (once, graphs.first()) {
        (Once::Nothing, _) | (_, None) => HashSet::new(),
        (Once::FirstGraph, Some(first)) => names(first),
        (Once::Everything, _) => graphs.iter().flat_map(|g| names(g)).collect(),
    };
    let fit = |part: u64, ahead: u64| {
        let streamed = weights.streamed(&always, part);
        let ahead = if streamed.is_empty() { 0 } else { ahead };
        let residency = Residency::new(streamed, HashMap::new(), Ahead::bytes(ahead));
        let mut fit = measure(graphs, &weights, residency, usize::MAX, backend);
        if once == Once::FirstGraph {
            // Its states stay beside the other graphs.
            let first = backend.plan(graphs[0], &Residency::default()).persistent_bytes();
            fit.persistent_bytes += first;
            fit.device_bytes += first;
        }
        fit
    };
    let Some(budget) = budget(backend) else { return fit(STEPS, 0) };
    let mut found: Vec<(f64, Fit)> = Vec::new();
    for ahead in AHEAD {
        let Some(fit) = most_that_stays(|part| fit(part, ahead), budget) else { continue };
        let whole = fit.residency.streamed_beyond(&always) == 0;
        found.push((seconds_of_last(graphs, &fit.residency, backend), fit));
        if whole {
            break;
        }
    }
    // Of equals the first, which has most time for transfers.
    let best = about_fastest(found, 1.02).min_by_key(|fit| Reverse(fit.resident_bytes));
    best.unwrap_or_else(|| fit(0, 0))
}

/// The fits that take at most `patience` times the seconds of the fastest one.
fn about_fastest(found: Vec<(f64, Fit)>, patience: f64) -> impl Iterator<Item = Fit> {
    let least = found.iter().map(|(seconds, _)| *seconds).fold(f64::INFINITY, f64::min);
    found.into_iter().filter(move |(seconds, _)| *seconds <= patience * least).map(|(_, fit)| fit)
}

/// The fit with as many weights on the device as `budget` allows, `None` if it is too small even
/// with all of them streamed. `fit` gives it for each part of [`STEPS`].
fn most_that_stays(fit: impl Fn(u64) -> Fit, budget: u64) -> Option<Fit> {
    let all = fit(STEPS);
    if all.device_bytes <= budget {
        return Some(all);
    }
    let mut best = Some(fit(0)).filter(|fit| fit.device_bytes <= budget)?;
    let (mut low, mut high) = (0, STEPS - 1);
    while low < high {
        let middle = (low + high).div_ceil(2);
        let more = fit(middle);
        if more.device_bytes <= budget {
            (low, best) = (middle, more);
        } else {
            high = middle - 1;
        }
    }
    Some(best)
}

/// Fits the decoder, whose windows `record` gives for a number of frames at once: in as large
/// pieces as there is room for, then with carried frames on the host, those first that come
/// and go least. Where the host's memory is too small for them, those that come and go least of
/// all are in the scratch file. Of the ways that take about the least time it is the one with the
/// least memory and file. If nothing fits, the fit is the smallest there is.
///
/// # Errors
/// Those of `record`.
pub fn stream_states(
    record: impl Fn(usize) -> Result<Vec<Graph>>,
    backend: &dyn Backend,
) -> Result<Fit> {
    let most = budget(backend).unwrap_or(u64::MAX);
    for at_once in [usize::MAX, 4, 2, 1] {
        let graphs = record(at_once)?;
        let refs: Vec<&Graph> = graphs.iter().collect();
        let fit = measure(&refs, &Weights::of(&refs), Residency::default(), at_once, backend);
        if fit.device_bytes <= most {
            return Ok(fit);
        }
    }
    let mut found: Vec<(f64, Fit)> = Vec::new();
    let mut smallest: Option<Fit> = None;
    for at_once in [2, 1] {
        let graphs = record(at_once)?;
        let refs: Vec<&Graph> = graphs.iter().collect();
        let weights = Weights::of(&refs);
        let order = states_by_traffic(&refs);
        let sizes: Vec<u64> =
            order.iter().map(|name| state_bytes(&refs, |other| other == name)).collect();
        let fit = |count: usize, ahead: Ahead| {
            let filed = how_many_in_file(&sizes[..count], backend.host_memory());
            let home = |at| if at < filed { Home::File } else { Home::Host };
            let names = order[..count].iter().cloned().enumerate();
            let states = names.map(|(at, name)| (name, home(at))).collect();
            let residency = Residency::new(HashSet::new(), states, ahead);
            measure(&refs, &weights, residency, at_once, backend)
        };
        for ahead in AHEAD_OF_STATES {
            let mut fits = (1..=order.len()).map(|count| fit(count, ahead));
            let Some(fit) = fits.find(|f| f.device_bytes <= most) else { continue };
            found.push((seconds_of_last(&refs, &fit.residency, backend), fit));
        }
        let all = fit(order.len(), JUST_IN_TIME);
        if smallest.as_ref().is_none_or(|s| all.device_bytes < s.device_bytes) {
            smallest = Some(all);
        }
    }
    let best =
        about_fastest(found, PATIENCE).min_by_key(|fit| fit.pinned_bytes + fit.scratch_bytes);
    Ok(best.or(smallest).unwrap_or_default())
}

/// How many of the states of these sizes, the first ones, must be in the scratch file so that
/// `memory` bytes are enough for the others and what pinned memory there is besides.
fn how_many_in_file(sizes: &[u64], memory: Option<u64>) -> usize {
    let memory = memory.unwrap_or(u64::MAX);
    let fits = |filed: &usize| {
        let pinned = sizes[*filed..].iter().sum();
        pinned_bytes(pinned, *filed > 0) <= memory
    };
    (0..sizes.len()).find(fits).unwrap_or(sizes.len())
}

/// Pinned memory with `states` bytes of carried frames in it, and perhaps others in the file.
fn pinned_bytes(states: u64, file: bool) -> u64 {
    RING + states + if file { SLOTS } else { 0 }
}

/// How long the last of `graphs` takes on [`USUAL`].
fn seconds_of_last(graphs: &[&Graph], residency: &Residency, backend: &dyn Backend) -> f64 {
    let Some(graph) = graphs.last() else { return 0.0 };
    predict(graph, &backend.plan(graph, residency), residency, &USUAL).seconds
}

/// The name of the first matrix of `node` that could be streamed.
fn first_matrix(graph: &Graph, node: &crate::graph::Node) -> Option<String> {
    matrices(node).first().map(|w| graph.weights()[w.index()].name.clone())
}

/// States of `graphs`, those first that are used least often, and of these the smallest: large
/// ones are hard to hide.
fn states_by_traffic(graphs: &[&Graph]) -> Vec<String> {
    let mut uses: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for graph in graphs {
        let mut here: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for state in graph.nodes().iter().filter_map(|node| node.state) {
            let tensor = graph.tensor(state);
            let (count, elements) = here.entry(&tensor.name).or_default();
            (*count, *elements) = (*count + 1, tensor.len());
        }
        for (name, found) in here {
            let most = uses.entry(name.to_string()).or_default();
            *most = found.max(*most);
        }
    }
    let mut order: Vec<_> = uses.into_iter().map(|(name, uses)| (uses, name)).collect();
    order.sort();
    order.into_iter().map(|(_, name)| name).collect()
}

/// The weights of a session.
struct Weights {
    total: u64,
    /// Matrices that are used side by side, by the name of the first, in the order in which
    /// they are used.
    matrices: Vec<(String, u64)>,
}

impl Weights {
    fn of(graphs: &[&Graph]) -> Weights {
        let mut bytes: BTreeMap<&str, u64> = BTreeMap::new();
        let mut matrices_of: Vec<(String, u64)> = Vec::new();
        let mut seen = HashSet::new();
        for graph in graphs {
            let elements = |w: usize| graph.weights()[w].shape.iter().product::<usize>() as u64;
            for (i, weight) in graph.weights().iter().enumerate() {
                bytes.insert(&weight.name, elements(i) * DType::Bf16.bytes() as u64);
            }
            for node in graph.nodes() {
                if let Op::AddPositionTable { table, .. } = node.op {
                    // Added in f32.
                    let name = &graph.weights()[table.index()].name;
                    bytes.insert(name, elements(table.index()) * DType::F32.bytes() as u64);
                }
                let Some(name) = first_matrix(graph, node).filter(|n| seen.insert(n.clone()))
                else {
                    continue;
                };
                let sum: u64 = matrices(node).iter().map(|w| elements(w.index())).sum();
                matrices_of.push((name, sum * DType::Bf16.bytes() as u64));
            }
        }
        Weights { total: bytes.values().sum(), matrices: matrices_of }
    }

    /// Streams `always` and of the others so many that `part` of [`STEPS`] bytes stay.
    fn streamed(&self, always: &HashSet<String>, part: u64) -> HashSet<String> {
        let mut streamed = always.clone();
        let mut credit = 0;
        for (name, bytes) in self.matrices.iter().filter(|(name, _)| !always.contains(name)) {
            credit += bytes * part;
            if credit >= bytes * STEPS {
                credit -= bytes * STEPS;
            } else {
                streamed.insert(name.clone());
            }
        }
        streamed
    }
}

/// What `graphs` take with this residency.
fn measure(
    graphs: &[&Graph],
    weights: &Weights,
    residency: Residency,
    at_once: usize,
    backend: &dyn Backend,
) -> Fit {
    let (mut arena_bytes, mut others, mut own) = (0, 0, 0);
    for graph in graphs {
        let plan = backend.plan(graph, &residency);
        arena_bytes = plan.arena_bytes().max(arena_bytes);
        own = plan.own_bytes().max(own);
        let states = state_bytes(&[graph], |name| !residency.leaves(name));
        others = (plan.persistent_bytes() - states).max(others);
    }
    // The states of all graphs are there at one time, and the inputs of a graph and of the one
    // that is made while it runs: with memory of the graph before, which is done by then.
    let persistent_bytes = 2 * others + state_bytes(graphs, |name| !residency.leaves(name));
    let is_streamed = |(name, bytes): &(String, u64)| {
        if residency.streams(name) { *bytes } else { 0 }
    };
    let resident_bytes = weights.total - weights.matrices.iter().map(is_streamed).sum::<u64>();
    let at = |home: Home| state_bytes(graphs, |name| residency.home(name) == home);
    let scratch_bytes = at(Home::File);
    Fit {
        at_once,
        arena_bytes,
        persistent_bytes,
        resident_bytes,
        device_bytes: arena_bytes + persistent_bytes + resident_bytes + MARGIN,
        pinned_bytes: pinned_bytes(at(Home::Host), scratch_bytes > 0),
        scratch_bytes,
        residency: residency.with_arena(arena_bytes).with_own(own),
    }
}

/// Bytes of the states that are `counted` by name; those of one name and size are one.
fn state_bytes(graphs: &[&Graph], counted: impl Fn(&str) -> bool) -> u64 {
    let mut states = BTreeMap::new();
    for graph in graphs {
        for state in graph.nodes().iter().filter_map(|node| node.state) {
            let tensor = graph.tensor(state);
            if counted(&tensor.name) {
                let bytes = (tensor.len() * tensor.dtype.bytes()) as u64;
                states.insert((tensor.name.clone(), bytes), bytes);
            }
        }
    }
    states.values().sum()
}

#[cfg(test)]
mod tests {
    use super::{RING, Residency, SLOTS, Weights, how_many_in_file, measure};
    use crate::exec::Cpu;
    use crate::graph::Graph;
    use crate::tensor::DType;

    /// So that memory of graphs that come and go grows once.
    #[test]
    fn a_fit_tells_what_the_largest_graph_keeps() {
        let graphs = [9, 4].map(|rows| {
            let mut graph = Graph::new();
            graph.input("x", &[rows, 8], DType::F32);
            graph
        });
        let graphs: Vec<&Graph> = graphs.iter().collect();
        let weights = Weights::of(&graphs);
        let fit = measure(&graphs, &weights, Residency::default(), 1, &Cpu::new());
        assert_eq!(fit.residency.own(), 9 * 8 * 4);
    }

    #[test]
    fn what_memory_is_too_small_for_is_in_the_file() {
        const GIB: u64 = 1 << 30;
        let sizes = [GIB, 2 * GIB, 4 * GIB];
        let in_file = |memory| how_many_in_file(&sizes, Some(memory));
        assert_eq!(how_many_in_file(&sizes, None), 0);
        assert_eq!(in_file(RING + 7 * GIB), 0);
        assert_eq!(in_file(RING + 7 * GIB - 1), 1);
        // The slots of the way to the file take memory, too.
        assert_eq!(in_file(RING + SLOTS + 6 * GIB), 1);
        assert_eq!(in_file(RING + SLOTS + 6 * GIB - 1), 2);
        assert_eq!(in_file(RING + SLOTS + 4 * GIB - 1), 3);
        assert_eq!(in_file(0), 3);
        assert_eq!(how_many_in_file(&[], Some(0)), 0);
    }
}
