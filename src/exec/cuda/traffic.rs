//! What comes in from the host while a graph runs, and what goes out again: weights that are
//! streamed, and carried frames that are kept on the host.
//!
//! The plan says when memory is free for them and when they must be there; here streams wait
//! for each other accordingly. Copies run beside the kernels on streams of their own, one for
//! each direction, in the order in which nodes need them. The host fills the pinned slots of
//! weights when it queues the node from which on their place is free; the streams are far
//! behind it by then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Address, Context, Event, PinnedMemory, Stream};
use super::upload::{Lane, Uploader};
use crate::Result;
use crate::graph::{Graph, Plan, Residency, Staged, StagedWhat};
use crate::tensor::{DType, WeightSource};

/// The name and the bytes of a state.
type StateKey = (String, usize);

/// A state on the host.
struct HostState {
    memory: PinnedMemory,
    /// Marks its last way out.
    stored: Event,
}

/// The traffic of all graphs of a session.
pub(super) struct Traffic {
    context: Arc<Context>,
    uploader: Arc<Mutex<Uploader>>,
    outward: Lane,
    states: HashMap<StateKey, HostState>,
    /// Marks that memory has become free, or that a state may go out.
    ready: Event,
}

/// What comes in for one node.
struct Item {
    staged: Staged,
    cargo: Cargo,
    arrived: Event,
}

enum Cargo {
    /// Names of the matrices.
    Weights(Vec<String>),
    /// Whether the node reads what was carried, and whether it writes what will be.
    State { key: StateKey, read: bool, written: bool },
}

/// The traffic of one graph.
#[derive(Default)]
pub(super) struct Schedule {
    items: Vec<Item>,
}

impl Schedule {
    pub fn new(
        graph: &Graph,
        plan: &Plan,
        residency: &Residency,
        context: &Arc<Context>,
    ) -> Result<Schedule> {
        let item = |staged: &Staged| {
            let node = &graph.nodes()[staged.node];
            let cargo = match staged.what {
                StagedWhat::Weights => {
                    let name = |w: &crate::graph::WeightId| graph.weights()[w.index()].name.clone();
                    Cargo::Weights(residency.streamed(graph, node).iter().map(name).collect())
                }
                StagedWhat::State(state) => Cargo::State {
                    key: (graph.tensor(state).name.clone(), staged.bytes as usize),
                    read: graph.continues(staged.node),
                    written: graph.moves_on(staged.node),
                },
            };
            Ok(Item { staged: staged.clone(), cargo, arrived: Event::new(context)? })
        };
        Ok(Schedule { items: plan.stages().iter().map(item).collect::<Result<_>>()? })
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

impl Traffic {
    /// `link` is as for [`Lane::new`].
    pub fn new(
        context: &Arc<Context>,
        uploader: Arc<Mutex<Uploader>>,
        link: Option<f64>,
    ) -> Result<Traffic> {
        Ok(Traffic {
            context: context.clone(),
            uploader,
            outward: Lane::new(context, link)?,
            states: HashMap::new(),
            ready: Event::new(context)?,
        })
    }

    /// Makes room on the host for the states of `schedule`.
    pub fn reserve(&mut self, schedule: &Schedule) -> Result<()> {
        for item in &schedule.items {
            let Cargo::State { key, .. } = &item.cargo else { continue };
            if !self.states.contains_key(key) {
                let memory = PinnedMemory::new(&self.context, key.1)?;
                let state = HostState { memory, stored: Event::new(&self.context)? };
                self.states.insert(key.clone(), state);
            }
        }
        Ok(())
    }

    /// Waits until nothing is on its way.
    pub fn settle(&self) -> Result<()> {
        self.uploader().finish()?;
        self.outward.stream.synchronize()
    }

    /// Lets `compute` wait for what is still going out: the next run uses its memory.
    pub fn begin(&self, compute: &Stream) -> Result<()> {
        self.states.values().try_for_each(|state| compute.wait(&state.stored))
    }

    /// What must be done before `node` is queued on `compute`; `arena` is where the arena
    /// begins.
    pub fn enter(
        &mut self,
        schedule: &Schedule,
        node: usize,
        arena: Address,
        weights: &dyn WeightSource,
        compute: &Stream,
    ) -> Result<()> {
        for item in &schedule.items {
            let ends = item.staged.nodes.end == node;
            if let (Cargo::State { key, written: true, .. }, true) = (&item.cargo, ends) {
                compute.wait(&self.states[key].stored)?;
            }
        }
        if schedule.items.iter().any(|item| item.staged.nodes.start == node) {
            self.ready.record(compute)?;
            let mut uploader = self.uploader();
            uploader.lane().stream.wait(&self.ready)?;
            for item in schedule.items.iter().filter(|item| item.staged.nodes.start == node) {
                self.bring(&mut uploader, item, arena, weights)?;
                item.arrived.record(&uploader.lane().stream)?;
            }
        }
        for item in schedule.items.iter().filter(|item| item.staged.node == node) {
            compute.wait(&item.arrived)?;
        }
        Ok(())
    }

    /// What must be done after `node` was queued.
    pub fn leave(
        &mut self,
        schedule: &Schedule,
        node: usize,
        arena: Address,
        compute: &Stream,
    ) -> Result<()> {
        for item in schedule.items.iter().filter(|item| item.staged.node == node) {
            let Cargo::State { key, written: true, .. } = &item.cargo else { continue };
            self.ready.record(compute)?;
            self.outward.stream.wait(&self.ready)?;
            let Some(state) = self.states.get_mut(key) else { continue };
            // SAFETY: the place holds the state once the node has run, and the memory on the
            // host is not read before `stored`.
            unsafe {
                self.outward.download(state.memory.as_mut_slice(), arena + item.staged.offset)?;
            }
            state.stored.record(&self.outward.stream)?;
        }
        Ok(())
    }

    /// Queues the way in of `item`.
    fn bring(
        &self,
        uploader: &mut Uploader,
        item: &Item,
        arena: Address,
        weights: &dyn WeightSource,
    ) -> Result<()> {
        let mut to = arena + item.staged.offset;
        match &item.cargo {
            Cargo::Weights(names) => {
                for name in names {
                    to += uploader.upload(&weights.weight(name)?, DType::Bf16, to)?;
                }
            }
            Cargo::State { read: false, .. } => {}
            Cargo::State { key, read: true, .. } => {
                let state = &self.states[key];
                uploader.lane().stream.wait(&state.stored)?;
                // SAFETY: the place has the state's size, and the memory on the host is
                // written again only after the node that waits for this.
                unsafe { uploader.lane().upload(to, state.memory.as_slice())? };
            }
        }
        Ok(())
    }

    /// A panic elsewhere leaves nothing behind that the next upload minds.
    fn uploader(&self) -> MutexGuard<'_, Uploader> {
        self.uploader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
