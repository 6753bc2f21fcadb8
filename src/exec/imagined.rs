//! A GPU that is not there, to plan for.

use std::sync::Arc;

use super::{Backend, Session};
use crate::graph::{Graph, Plan, Residency};
use crate::tensor::{DType, WeightSource};
use crate::{Error, Result};

/// Plans as the CUDA backend does for a GPU with so much memory left, and runs nothing.
#[derive(Debug, Clone, Copy)]
pub struct ImaginedGpu {
    /// Bytes for tensors and weights, the driver's context left out.
    pub memory: u64,
    /// Bytes of the host's memory that may be locked; `None` for as much as is needed.
    pub host: Option<u64>,
}

impl Backend for ImaginedGpu {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn description(&self) -> String {
        let gib = self.memory as f64 / f64::from(1 << 30);
        format!("a GPU with {gib:.1} GiB for tensors and weights")
    }

    fn activations(&self) -> DType {
        DType::Bf16
    }

    fn plan(&self, graph: &Graph, residency: &Residency) -> Plan {
        Plan::staged(graph, DType::bytes, residency)
    }

    fn free_memory(&self) -> Option<u64> {
        Some(self.memory)
    }

    fn copies_weights(&self) -> bool {
        true
    }

    fn host_memory(&self) -> Option<u64> {
        self.host
    }

    fn open_with(&self, _: Arc<dyn WeightSource>, _: &Residency) -> Result<Box<dyn Session>> {
        Err(Error::device("this GPU is only imagined, to plan for it"))
    }
}
