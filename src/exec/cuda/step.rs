//! What a run does: a flat list of launches, library calls, copies and fills with every
//! address, grid and parameter resolved when the graph was added. The hot loop only queues
//! them.

use std::ffi::c_void;

use bytemuck::Pod;

use super::cublaslt::Matmul;
use super::driver::{Address, Kernel, Stream, check};
use crate::Result;
use crate::graph::Graph;

/// One thing to queue, on behalf of one node.
pub(super) struct Step {
    /// Index of the node in its graph.
    pub node: usize,
    pub work: Work,
}

/// See [`Step`].
pub(super) enum Work {
    Launch { kernel: Kernel, grid: [u32; 3], parameters: Parameters },
    Matmul(Matmul),
    Copy { to: Address, from: Address, bytes: usize },
    Clear { to: Address, bytes: usize },
}

/// A kernel's parameter struct, aligned for the tensor maps it may hold.
pub(super) struct Parameters(Box<[Line]>);

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl Parameters {
    pub fn new<T: Pod>(parameters: &T) -> Parameters {
        Self::of_bytes(bytemuck::bytes_of(parameters))
    }

    fn of_bytes(bytes: &[u8]) -> Parameters {
        let line = |chunk: &[u8]| {
            let mut line = Line([0; 64]);
            line.0[..chunk.len()].copy_from_slice(chunk);
            line
        };
        Parameters(bytes.chunks(64).map(line).collect())
    }

    /// A `Group<T, MOST>` of `kernels/lib/group.cuh`: problems, each with its number of units of
    /// work.
    ///
    /// # Panics
    /// If there are more than `MOST`.
    pub fn group<T: Pod, const MOST: usize>(problems: &[(T, i32)]) -> Parameters {
        assert!(problems.len() <= MOST, "{} problems in one launch", problems.len());
        let (mut first, mut end) = ([i32::MAX; MOST], 0);
        for ((_, units), first) in problems.iter().zip(&mut first) {
            *first = end;
            end += units;
        }
        let header = [&[end][..], &first].concat();
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&header).to_vec();
        bytes.resize(bytes.len().next_multiple_of(align_of::<T>()), 0);
        for (problem, _) in problems {
            bytes.extend_from_slice(bytemuck::bytes_of(problem));
        }
        bytes.resize(bytes.len() + (MOST - problems.len()) * size_of::<T>(), 0);
        Self::of_bytes(&bytes)
    }

    /// Where the struct lies.
    pub fn start(&self) -> *const c_void {
        self.0.as_ptr().cast()
    }
}

impl Step {
    /// Whether the step may start before the step `before` it has ended.
    pub fn may_start_early(&self, before: Option<&Step>) -> bool {
        let launches = |step: &Step| matches!(step.work, Work::Launch { .. });
        let waits = matches!(&self.work, Work::Launch { kernel, .. } if kernel.early);
        waits && before.is_some_and(launches)
    }

    /// Queues the step on `stream`, whose context is current; if `early`, directly behind the
    /// step of which [`Step::may_start_early`] said so.
    ///
    /// # Safety
    /// Every address in the step must still be allocated and used by nobody else until the
    /// stream gets there.
    pub unsafe fn queue(&self, stream: &Stream, graph: &Graph, early: bool) -> Result<()> {
        let place = |e: crate::Error| {
            let node = &graph.nodes()[self.node];
            e.at(format!("{} ({})", node.label, node.op.name()))
        };
        match &self.work {
            Work::Launch { kernel, grid, parameters } => {
                // SAFETY: `parameters` was made from the struct that the kernel declares;
                // addresses are the caller's promise.
                let answer = unsafe { stream.launch(kernel, *grid, parameters.start(), early) };
                answer.or_else(|e| check(&format!("starting {}", kernel.name), Err(e)))
            }
            // SAFETY: the caller's promise.
            Work::Matmul(matmul) => unsafe { matmul.queue(stream) },
            // SAFETY: the caller's promise; copies do not overlap by construction.
            Work::Copy { to, from, bytes } => unsafe { stream.copy(*to, *from, *bytes) },
            // SAFETY: the caller's promise.
            Work::Clear { to, bytes } => unsafe { stream.fill(*to, 0, *bytes) },
        }
        .map_err(place)
    }
}
