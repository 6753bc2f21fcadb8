//! The table of all adaptive-norm vectors of a run, which stays where the session computes it.

use std::ops::Range;

use super::prompts::EncodedPrompt;
use super::transformer::modulation_layout;
use crate::Result;
use crate::checkpoint::TransformerConfig;
use crate::exec::{GraphId, Session};
use crate::graph::{Graph, TensorId};
use crate::sampler::{STAGES, SamplerRequest};
use crate::tensor::DType;

/// Timesteps whose vectors are computed in one run of their graph: those of every usual run,
/// so that the weights are needed once.
const TIMESTEPS_PER_RUN: usize = 256;

/// Every timestep of a run, once, rising.
///
/// # Errors
/// As [`SamplerRequest::stage_geometry`].
pub(super) fn timesteps(request: &SamplerRequest) -> Result<Vec<f32>> {
    let mut timesteps = Vec::new();
    // The first generated unit and the one after it have all schedules there are.
    for unit in request.first_unit()..request.units.min(request.first_unit() + 2) {
        for stage in 0..STAGES {
            timesteps.extend(request.stage_geometry(unit, stage)?.timesteps);
        }
    }
    timesteps.sort_by(f32::total_cmp);
    timesteps.dedup();
    Ok(timesteps)
}

/// The graphs that compute the table of `timesteps` timesteps and `samples` prompts, each with
/// the timesteps it is for.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub(super) fn record(
    config: &TransformerConfig,
    timesteps: usize,
    samples: usize,
    dtype: DType,
) -> Result<Vec<(Range<usize>, Graph)>> {
    let layout = modulation_layout(config);
    let record = |start: usize| {
        let range = start..timesteps.min(start + TIMESTEPS_PER_RUN);
        let rows = range.start * samples..range.end * samples;
        let (total, pooled_dim) = (timesteps * samples, config.pooled_dim());
        Ok((range, layout.record(total, rows, config.width(), pooled_dim, dtype)?))
    };
    (0..timesteps).step_by(TIMESTEPS_PER_RUN).map(record).collect()
}

/// The table: for each timestep in turn a row for each prompt.
pub(super) struct ModulationTable {
    timesteps: Vec<f32>,
    samples: usize,
    /// The graph and the tensor that it is found by.
    place: (GraphId, TensorId),
}

impl ModulationTable {
    /// Computes the table for all timesteps of a run.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn compute(
        config: &TransformerConfig,
        session: &mut dyn Session,
        dtype: DType,
        prompts: &[EncodedPrompt],
        request: &SamplerRequest,
    ) -> Result<ModulationTable> {
        let timesteps = timesteps(request)?;
        let mut place = None;
        for (range, graph) in record(config, timesteps.len(), prompts.len(), dtype)? {
            let graph = session.add(graph)?;
            let repeated: Vec<f32> =
                timesteps[range].iter().flat_map(|&t| prompts.iter().map(move |_| t)).collect();
            let pooled: Vec<f32> = repeated
                .chunks_exact(prompts.len())
                .flat_map(|_| prompts.iter().flat_map(|p| p.pooled.iter().copied()))
                .collect();
            for (name, data) in [("timesteps", repeated), ("pooled", pooled)] {
                let input = session.find(graph, name)?;
                session.write(graph, input, &data)?;
            }
            session.run(graph)?;
            // The last graph stays, for the table to be found by.
            let table = session.find(graph, "modulation")?;
            if let Some((before, _)) = place.replace((graph, table)) {
                session.remove(before);
            }
        }
        let place = place.ok_or_else(|| crate::Error::usage("a run without steps"))?;
        Ok(ModulationTable { timesteps, samples: prompts.len(), place })
    }

    /// The graph and the tensor that hold the table.
    pub fn place(&self) -> (GraphId, TensorId) {
        self.place
    }

    /// The first of the rows of `timestep`, if the run has it.
    pub fn row(&self, timestep: f32) -> Option<usize> {
        let found = self.timesteps.binary_search_by(|t| t.total_cmp(&timestep)).ok();
        found.map(|index| index * self.samples)
    }
}
