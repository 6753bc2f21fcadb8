//! Graphs come and go: making them ready to run, and what becomes of those that were removed.

use std::sync::PoisonError;

use super::{CudaSession, Planned, Retired};
use crate::exec::GraphId;
use crate::exec::cuda::driver::Event;
use crate::exec::cuda::ops;
use crate::exec::cuda::tables::Tables;
use crate::exec::cuda::traffic::Schedule;
use crate::graph::{Graph, Plan};
use crate::tensor::DType;
use crate::{Error, Result};

impl CudaSession {
    /// Keeps a removed graph until nothing that is queued can use it.
    pub(super) fn retire(&mut self, planned: Planned) {
        let mark = || {
            let done = Event::new(&self.context)?;
            done.record(&self.stream)?;
            Ok::<_, Error>(done)
        };
        match mark() {
            Ok(done) => self.retired.push(Retired { planned, done }),
            // What failed shows at the next call; the graph goes once nothing is queued.
            Err(_) => drop(self.settle()),
        }
    }

    /// Waits until nothing that is queued uses removed graphs, and keeps their memory for those
    /// to come. What was queued since then goes on.
    pub(super) fn reclaim(&mut self) -> Result<()> {
        for Retired { planned, done } in std::mem::take(&mut self.retired) {
            done.synchronize()?;
            self.spare_tables.keep(planned.tables.into_memory());
            planned.memory.into_iter().for_each(|memory| self.spare.keep(memory));
        }
        Ok(())
    }

    /// Makes `graph` ready to run, once removed ones were reclaimed.
    pub(super) fn plan(&mut self, graph: Graph) -> Result<GraphId> {
        // All that is written is new, or used by nothing that is queued: graphs that are may go
        // on meanwhile.
        let uploader = self.uploader.clone();
        // A panic elsewhere leaves nothing behind that the next upload minds.
        let mut uploader = uploader.lock().unwrap_or_else(PoisonError::into_inner);
        self.weights.load(&graph, &self.residency, &self.context, &self.kernels, &mut uploader)?;
        let plan = Plan::staged(&graph, DType::bytes, &self.residency);
        let (own, memory) = self.allocate(&graph, &plan, &mut uploader)?;
        let CudaSession { kernels, weights, context, spare_tables, .. } = self;
        let tables = Tables::new(&graph, kernels, weights, context, spare_tables, &mut uploader)?;
        drop(uploader);
        let schedule = Schedule::new(&graph, &plan, &self.residency, &self.context)?;
        self.traffic.reserve(&schedule)?;
        let scratch = ops::scratch_bytes(&graph, &self.kernels, self.cublaslt.is_some());
        self.reserve(plan.arena_bytes().max(self.residency.arena()), scratch)?;
        let mut planned = Planned {
            graph,
            plan,
            own,
            memory,
            tables,
            schedule,
            steps: Vec::new(),
            made_for: self.bases(),
            fresh: true,
            ran: false,
            recorded: None,
        };
        planned.steps = self.prepare(&planned)?;
        self.graphs.push(Some(planned));
        Ok(GraphId(self.graphs.len() - 1))
    }
}
