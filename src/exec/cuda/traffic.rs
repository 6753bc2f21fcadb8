//! What comes in from the host while a graph runs, and what goes out again: weights that are
//! streamed, and carried frames that are kept on the host.
//!
//! The plan says when memory is free for them and when they must be there; here streams wait
//! for each other accordingly. Copies run beside the kernels on streams of their own, one for
//! each direction, in the order in which nodes need them. The host fills the pinned slots of
//! weights when it queues the node from which on their place is free; the streams are far
//! behind it by then. Frames in the scratch file go by [`Courier`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Cuda;
use super::courier::{Courier, Span};
use super::driver::{Address, Context, Event, PinnedMemory, Stream};
use super::upload::{Lane, Uploader};
use crate::Result;
use crate::exec::HostRoom;
use crate::graph::{Graph, Home, Plan, Residency, Staged, StagedWhat};
use crate::tensor::{DType, WeightSource};

/// The name and the bytes of a state.
type StateKey = (String, usize);

/// A state on the host.
struct HostState {
    place: HostPlace,
    /// Marks that it has left the device on its last way out.
    freed: Event,
    /// Marks that it is on the host again.
    stored: Event,
}

enum HostPlace {
    Memory(PinnedMemory),
    File(Span),
}

/// The traffic of all graphs of a session.
pub(super) struct Traffic {
    context: Arc<Context>,
    uploader: Arc<Mutex<Uploader>>,
    outward: Lane,
    room: HostRoom,
    slot_bytes: usize,
    /// There once a state is in the scratch file.
    courier: Option<Courier>,
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
    /// Whether it is in the scratch file, whether the node reads what was carried, and whether
    /// it writes what will be.
    State { key: StateKey, filed: bool, read: bool, written: bool },
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
                    filed: residency.home(&graph.tensor(state).name) == Home::File,
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
    /// Traffic for a session of `backend`.
    pub fn new(backend: &Cuda) -> Result<Traffic> {
        let context = backend.context.clone();
        Ok(Traffic {
            uploader: backend.uploader.clone(),
            outward: Lane::new(&context, backend.link)?,
            room: backend.host.clone(),
            slot_bytes: backend.slot_bytes,
            courier: None,
            states: HashMap::new(),
            ready: Event::new(&context)?,
            context,
        })
    }

    /// Makes room on the host for the states of `schedule`.
    pub fn reserve(&mut self, schedule: &Schedule) -> Result<()> {
        let mut to_file: Vec<StateKey> = Vec::new();
        for item in &schedule.items {
            let Cargo::State { key, filed, .. } = &item.cargo else { continue };
            if self.states.contains_key(key) || to_file.contains(key) {
                continue;
            }
            if *filed {
                to_file.push(key.clone());
            } else {
                let memory = PinnedMemory::new(&self.context, key.1)?;
                self.keep(key.clone(), HostPlace::Memory(memory))?;
            }
        }
        if to_file.is_empty() {
            return Ok(());
        }
        if self.courier.is_none() {
            let (context, slot_bytes) = (&self.context, self.slot_bytes);
            let courier = Courier::new(context, slot_bytes, &self.outward, self.uploader().lane())?;
            self.courier = Some(courier);
        }
        let bytes: usize = to_file.iter().map(|key| Span::padded(key.1)).sum();
        let (file, mut offset) = (Arc::new(self.room.file(bytes as u64)?), 0);
        for key in to_file {
            let span = Span::new(&file, offset, key.1);
            offset += Span::padded(key.1);
            self.keep(key, HostPlace::File(span))?;
        }
        Ok(())
    }

    fn keep(&mut self, key: StateKey, place: HostPlace) -> Result<()> {
        let (freed, stored) = (Event::new(&self.context)?, Event::new(&self.context)?);
        self.states.insert(key, HostState { place, freed, stored });
        Ok(())
    }

    /// Waits until nothing is on its way.
    pub fn settle(&self) -> Result<()> {
        self.uploader().finish()?;
        self.outward.stream.synchronize()?;
        self.courier.as_ref().map_or(Ok(()), Courier::settle)
    }

    /// Lets `compute` wait for what is still going out: the next run uses its memory.
    pub fn begin(&self, compute: &Stream) -> Result<()> {
        self.states.values().try_for_each(|state| compute.wait(&state.freed))
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
                compute.wait(&self.states[key].freed)?;
            }
        }
        if schedule.items.iter().any(|item| item.staged.nodes.start == node) {
            self.ready.record(compute)?;
            // Not by `self.uploader()`, which would borrow the courier, too.
            let uploader = self.uploader.clone();
            let mut uploader = uploader.lock().unwrap_or_else(PoisonError::into_inner);
            uploader.lane().stream.wait(&self.ready)?;
            for item in schedule.items.iter().filter(|item| item.staged.nodes.start == node) {
                self.bring(&mut uploader, item, arena, weights)?;
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
            let Some(state) = self.states.get_mut(key) else { continue };
            let from = arena + item.staged.offset;
            self.ready.record(compute)?;
            match (&mut state.place, &mut self.courier) {
                (HostPlace::Memory(memory), _) => {
                    self.outward.stream.wait(&self.ready)?;
                    let memory = memory.as_mut_slice();
                    // SAFETY: the place holds the state once the node has run, and the memory
                    // on the host is not read before `stored`.
                    unsafe { self.outward.download(memory.as_mut_ptr(), from, memory.len())? };
                    state.freed.record(&self.outward.stream)?;
                    state.stored.record(&self.outward.stream)?;
                }
                (HostPlace::File(span), Some(courier)) => {
                    // SAFETY: the place holds the state once the node has run, and its memory is
                    // used again only after `freed`; nobody else has the span.
                    unsafe {
                        courier.carry_out(from, span, &self.ready, &state.freed, &state.stored)?;
                    }
                }
                (HostPlace::File(_), None) => unreachable!("a state in a file has its courier"),
            }
        }
        Ok(())
    }

    /// Queues the way in of `item`, once `ready` has happened.
    fn bring(
        &mut self,
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
                match (&state.place, &mut self.courier) {
                    (HostPlace::Memory(memory), _) => {
                        uploader.lane().stream.wait(&state.stored)?;
                        let memory = memory.as_slice();
                        // SAFETY: the place has the state's size, and the memory on the host is
                        // written again only after the node that waits for this.
                        unsafe { uploader.lane().upload(to, memory.as_ptr(), memory.len())? };
                    }
                    (HostPlace::File(span), Some(courier)) => {
                        let after = [&self.ready, &state.stored];
                        // SAFETY: the place has the state's size and is free from `ready` on;
                        // nobody else has the span.
                        return unsafe { courier.carry_in(span, to, after, &item.arrived) };
                    }
                    (HostPlace::File(_), None) => {
                        unreachable!("a state in a file has its courier")
                    }
                }
            }
        }
        item.arrived.record(&uploader.lane().stream)
    }

    /// A panic elsewhere leaves nothing behind that the next upload minds.
    fn uploader(&self) -> MutexGuard<'_, Uploader> {
        self.uploader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
