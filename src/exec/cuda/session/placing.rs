//! Where the tensors of a session's graphs lie, and what the graphs' steps are there.

use std::collections::HashMap;

use super::{CudaSession, Place, Planned};
use crate::exec::cuda::driver::{Address, DeviceMemory};
use crate::exec::cuda::memory::Piece;
use crate::exec::cuda::ops::{Prepare, Waiting};
use crate::exec::cuda::step::Step;
use crate::exec::cuda::upload::Uploader;
use crate::exec::cuda::weights::{Form, Key};
use crate::graph::{Graph, Node, Plan, Role, StagedWhat, TensorId};
use crate::{Error, Result};

impl CudaSession {
    /// Memory of a tensor that outlives a run.
    fn piece(&self, bytes: usize, name: &str) -> Result<Piece> {
        Piece::new(&self.context, bytes, name, self.fenced, &self.stream)
    }

    /// Takes memory for what `graph` keeps between runs, and uploads its constants. Inputs and
    /// constants lie in one piece, which is returned as well; in a fenced session each has its
    /// own.
    pub(super) fn allocate(
        &mut self,
        graph: &Graph,
        plan: &Plan,
        uploader: &mut Uploader,
    ) -> Result<(HashMap<TensorId, Piece>, Option<DeviceMemory>)> {
        let (bytes, largest) = (plan.own_bytes() as usize, self.residency.own() as usize);
        let memory = match self.fenced || bytes == 0 {
            true => None,
            false => Some(self.spare.take(&self.context, bytes, largest, "inputs")?),
        };
        let piece = |session: &Self, id, bytes, name: &str| match (&memory, plan.own_offset(id)) {
            (Some(memory), Some(offset)) => {
                Ok(Piece::within(memory.address() + offset, bytes, name))
            }
            _ => session.piece(bytes, name),
        };
        let mut own = HashMap::new();
        for (i, tensor) in graph.tensors().iter().enumerate() {
            let id = TensorId(i as u32);
            if tensor.root != id {
                continue;
            }
            let bytes = tensor.len() * tensor.dtype.bytes();
            match &tensor.role {
                Role::Input => drop(own.insert(id, piece(self, id, bytes, &tensor.name)?)),
                Role::Constant(c) => {
                    let piece = piece(self, id, bytes, &tensor.name)?;
                    if self.fenced {
                        // Its memory is being filled.
                        self.stream.synchronize()?;
                    }
                    uploader
                        .bring(bytemuck::cast_slice(&graph.constants()[*c]), piece.address())?;
                    own.insert(id, piece);
                }
                Role::State if plan.staged_state(id).is_some() => {}
                Role::State => {
                    let key = (tensor.name.clone(), bytes);
                    if !self.states.contains_key(&key) {
                        let piece = self.piece(bytes, &tensor.name)?;
                        // SAFETY: the piece holds as many bytes.
                        unsafe { self.stream.fill(piece.address(), 0, bytes)? };
                        self.states.insert(key, piece);
                    }
                }
                Role::Intermediate | Role::Output if self.fenced => {
                    own.insert(id, self.piece(bytes, &tensor.name)?);
                }
                Role::Intermediate | Role::Output => {}
            }
        }
        Ok((own, memory))
    }

    /// Sees to it that the arena and the scratch memory are large enough.
    pub(super) fn reserve(&mut self, arena: u64, scratch: usize) -> Result<()> {
        let lacks = |memory: &Option<DeviceMemory>, bytes: usize| {
            memory.as_ref().is_none_or(|m| m.bytes() < bytes)
        };
        if lacks(&self.arena, arena as usize) || lacks(&self.scratch, scratch) {
            // What is queued may use memory that moves now.
            self.settle()?;
        }
        let grow = |memory: &mut Option<DeviceMemory>, bytes: usize, what: &str| {
            if lacks(memory, bytes) {
                // The old one goes first: both need not fit at once.
                *memory = None;
                *memory = Some(DeviceMemory::new(&self.context, bytes, what)?);
            }
            Ok::<_, Error>(())
        };
        if !self.fenced {
            grow(&mut self.arena, arena as usize, "intermediates")?;
        }
        grow(&mut self.scratch, scratch, "scratch")
    }

    pub(super) fn bases(&self) -> [Address; 2] {
        [&self.arena, &self.scratch].map(|m| m.as_ref().map_or(0, DeviceMemory::address))
    }

    pub(super) fn prepare(&self, planned: &Planned) -> Result<Vec<Step>> {
        let [_, scratch] = self.bases();
        let (mut steps, mut waiting) = (Vec::new(), Waiting::default());
        for (index, node) in planned.graph.nodes().iter().enumerate() {
            let place = |id| self.place(planned, id);
            let mut prepare = Prepare {
                graph: &planned.graph,
                node,
                index,
                kernels: &self.kernels,
                cublaslt: self.cublaslt.as_ref(),
                tile: self.tile,
                weights: &self.weights,
                streamed: self.streamed(planned, index, node),
                tables: &planned.tables,
                scratch,
                place: &place,
                steps: &mut steps,
                waiting: &mut waiting,
                last_of_group: planned.graph.group(index).end == index + 1,
            };
            prepare.node().map_err(|e| e.at(format!("{} ({})", node.label, node.op.name())))?;
        }
        Ok(steps)
    }

    /// The matrices that come in for `node`, and where to.
    fn streamed(&self, planned: &Planned, index: usize, node: &Node) -> Option<(Key, Address)> {
        let matrices = self.residency.streamed(&planned.graph, node);
        let mut stages = planned.plan.stages().iter();
        let staged = stages.find(|s| s.node == index && s.what == StagedWhat::Weights)?;
        Some((Key::new(&planned.graph, &matrices, Form::Bf16), self.bases()[0] + staged.offset))
    }

    /// Where a tensor lies.
    pub(super) fn place(&self, planned: &Planned, id: TensorId) -> Result<Place> {
        let t = planned.graph.tensor(id);
        let root = planned.graph.tensor(t.root);
        let start = match &root.role {
            Role::State => match planned.plan.staged_state(t.root) {
                Some(staged) => Some(self.bases()[0] + staged.offset),
                None => {
                    let key = (root.name.clone(), root.len() * root.dtype.bytes());
                    self.states.get(&key).map(Piece::address)
                }
            },
            _ => planned
                .own
                .get(&t.root)
                .map(Piece::address)
                .or_else(|| planned.plan.lifetime(t.root).map(|l| self.bases()[0] + l.offset)),
        };
        let start = start.ok_or_else(|| {
            Error::usage(format!("tensor {} is read or written by no node", root.name))
        })?;
        Ok(Place {
            address: start + (t.offset * t.dtype.bytes()) as u64,
            rows: t.rows(),
            cols: t.cols(),
            stride: t.row_stride,
            dtype: t.dtype,
        })
    }
}
