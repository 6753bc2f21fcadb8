//! Nodes that may run at the same time, as one launch ([`crate::graph::Graph::side_by_side`]):
//! text beside image, queries beside keys. The small one of two would leave most of a device idle.

use super::Prepare;
use super::linear::{self, Layer};
use super::norm::{self, HeadNorm, Modulated};
use crate::Result;

/// What waits for the last node of its group.
#[derive(Default)]
pub(in crate::exec::cuda) struct Waiting {
    pub layers: Vec<Layer>,
    pub modulated: Vec<Modulated>,
    pub head_norms: Vec<HeadNorm>,
}

impl Prepare<'_> {
    /// Appends launches of all that waits.
    pub(super) fn launch_waiting(&mut self) -> Result<()> {
        let Waiting { layers, modulated, head_norms } = std::mem::take(self.waiting);
        for layers in layers.chunks(linear::TOGETHER) {
            linear::launch(self, layers)?;
        }
        for modulated in modulated.chunks(norm::TOGETHER) {
            norm::launch_modulated(self, modulated)?;
        }
        for head_norms in head_norms.chunks(norm::TOGETHER) {
            norm::launch_head_norms(self, head_norms)?;
        }
        Ok(())
    }
}
