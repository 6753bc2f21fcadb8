//! How long a graph takes on a machine that is known by its rates only.
//!
//! A node takes as long as its arithmetic or its memory traffic, whichever is longer; what
//! comes in from the host and goes out again runs beside the nodes, one transfer after another
//! in each direction, from when the plan has a place for it. What comes from the scratch file or
//! goes there has a way of its own beside that, as fast as the slower of link and disk. A model
//! of where time goes, not of kernels: it is fitted to one machine by the rates measured there.

use std::collections::HashMap;
use std::ops::{AddAssign, Mul};

use serde::Serialize;

use crate::graph::{Graph, Home, Node, Plan, Residency, Staged, StagedWhat};

/// What a machine can do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Machine {
    /// Floating-point operations per second of matrix products, as reached.
    pub flops: f64,
    /// Bytes per second of the device's memory, read and written ones counted, as reached.
    pub memory: f64,
    /// Bytes per second between host and device, in each direction.
    pub link: f64,
    /// Bytes per second between the host's memory and the scratch file, in each direction: of
    /// the disk, if the system has no memory to spare for what is in the file.
    pub disk: f64,
}

/// Seconds that a run is predicted to take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Predicted {
    /// With everything that comes in from the host.
    pub seconds: f64,
    /// If everything stayed on the device.
    pub resident_seconds: f64,
}

impl AddAssign for Predicted {
    fn add_assign(&mut self, other: Predicted) {
        self.seconds += other.seconds;
        self.resident_seconds += other.resident_seconds;
    }
}

impl Mul<f64> for Predicted {
    type Output = Predicted;

    fn mul(self, times: f64) -> Predicted {
        Predicted { seconds: self.seconds * times, resident_seconds: self.resident_seconds * times }
    }
}

/// Seconds between the starts of two kernels.
const LAUNCH: f64 = 3e-6;

/// The ways between device and host in one direction: that of locked memory and that of the
/// file. When each is free.
#[derive(Default)]
struct Ways {
    locked: f64,
    file: f64,
}

impl Ways {
    /// When `bytes` that may be on their way at `from` have gone it.
    fn take(&mut self, filed: bool, from: f64, bytes: u64, machine: &Machine) -> f64 {
        let (way, rate) = match filed {
            true => (&mut self.file, machine.link.min(machine.disk)),
            false => (&mut self.locked, machine.link),
        };
        *way = way.max(from) + bytes as f64 / rate;
        *way
    }
}

/// Predicts one run of `graph`, planned for `residency`.
pub(super) fn predict(
    graph: &Graph,
    plan: &Plan,
    residency: &Residency,
    machine: &Machine,
) -> Predicted {
    let stages = plan.stages();
    let name_of = |staged: &Staged| match staged.what {
        StagedWhat::State(state) => Some(graph.tensor(state).name.as_str()),
        StagedWhat::Weights => None,
    };
    let is_filed =
        |staged: &Staged| name_of(staged).is_some_and(|name| residency.home(name) == Home::File);
    let mut arrived = vec![0.0; stages.len()];
    let mut stored = vec![0.0; stages.len()];
    let (mut now, mut inward, mut outward) = (0.0f64, Ways::default(), Ways::default());
    // When the last way out of each state ends: it cannot come in again before.
    let mut home: HashMap<&str, f64> = HashMap::new();
    let mut resident_seconds = 0.0;
    for (index, node) in graph.nodes().iter().enumerate() {
        for (staged, arrived) in stages.iter().zip(&mut arrived) {
            let comes = staged.what == StagedWhat::Weights || graph.continues(staged.node);
            if staged.nodes.start == index && comes {
                let there = name_of(staged).and_then(|name| home.get(name)).copied();
                let from = now.max(there.unwrap_or(0.0));
                *arrived = inward.take(is_filed(staged), from, staged.bytes, machine);
            }
        }
        for (k, staged) in stages.iter().enumerate() {
            if staged.nodes.end == index {
                now = now.max(stored[k]);
            }
            if staged.node == index {
                now = now.max(arrived[k]);
            }
        }
        let takes = seconds_of(graph, node, machine);
        now += takes;
        resident_seconds += takes;
        for (k, staged) in stages.iter().enumerate().filter(|(_, s)| s.node == index) {
            if staged.what != StagedWhat::Weights && graph.moves_on(staged.node) {
                stored[k] = outward.take(is_filed(staged), now, staged.bytes, machine);
                if let Some(name) = name_of(staged) {
                    home.insert(name, stored[k]);
                }
            }
        }
    }
    Predicted { seconds: now, resident_seconds }
}

fn seconds_of(graph: &Graph, node: &Node, machine: &Machine) -> f64 {
    let traffic = node.op.bytes(graph, node) as f64 / machine.memory;
    let arithmetic = node.op.flops(graph, node) as f64 / machine.flops;
    traffic.max(arithmetic) + LAUNCH
}
