//! Where adaptive norms have their vectors: scale, shift and gate depend on the timestep and the
//! pooled text alone (AdaLN-Zero, arXiv 2212.09748), so those of all norms and steps are computed at
//! once.

use std::collections::HashMap;
use std::ops::Range;

use super::Record;
use super::positions::span;
use crate::Result;
use crate::graph::{Activation, Epilogue, Graph, Op};
use crate::tensor::DType;

/// Where the adaptive-norm vectors of each norm lie in the modulation table: the outputs of
/// all `<name>.linear` layers side by side.
#[derive(Debug, Clone, Default)]
pub struct ModulationLayout {
    norms: Vec<(String, usize)>,
    starts: HashMap<String, usize>,
    columns: usize,
}

impl ModulationLayout {
    /// Adds the norm `name` with `columns` outputs.
    pub fn add(&mut self, name: String, columns: usize) {
        self.starts.insert(name.clone(), self.columns);
        self.norms.push((name, columns));
        self.columns += columns;
    }

    /// First column of the norm `name`.
    ///
    /// # Panics
    /// If it was never added.
    pub fn start(&self, name: &str) -> usize {
        self.starts[name]
    }

    /// Number of columns of the table.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Records the graph that computes rows `range` of a table of `total` rows, one for each
    /// (timestep, pooled text) pair: inputs `timesteps` `[rows]` and `pooled`
    /// `[rows, pooled_dim]`, state `modulation` `[total, columns]` in f32. The graphs of all
    /// ranges write to the same table.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] when shapes do not fit.
    ///
    /// # Panics
    /// If the range does not lie within the table.
    pub fn record(
        &self,
        total: usize,
        range: Range<usize>,
        d: usize,
        pooled_dim: usize,
        dtype: DType,
    ) -> Result<Graph> {
        let rows = range.len();
        let mut g = Graph::new();
        g.scope("time_text_embed");
        let timesteps = g.input("timesteps", &[rows], DType::F32);
        let pooled = g.input("pooled", &[rows, pooled_dim], dtype);
        let sinusoid = g.push_as(Op::TimestepEmbedding, &[timesteps], dtype)?;
        let hidden = Epilogue::Activate(Activation::Silu);
        let name = "time_text_embed.timestep_embedder";
        let time = g.linear(&format!("{name}.linear_1"), sinusoid, d, hidden.clone())?;
        let embedding = g.linear(&format!("{name}.linear_2"), time, d, Epilogue::Store)?;
        let name = "time_text_embed.text_embedder";
        let text = g.linear(&format!("{name}.linear_1"), pooled, d, hidden)?;
        let parts = vec![g.linear_weights(&format!("{name}.linear_2"), d, d)];
        g.push_into(Op::Linear { parts, epilogue: Epilogue::Accumulate }, &[text], embedding)?;
        let embedding = g.push(Op::Activate(Activation::Silu), &[embedding])?;

        let table = g.state("modulation", &[total, self.columns], DType::F32);
        let table = g.rows(table, range);
        for (name, columns) in &self.norms {
            g.scope(name.clone());
            let parts = vec![g.linear_weights(&format!("{name}.linear"), *columns, d)];
            let place = g.cols(table, span(self.start(name), *columns));
            g.push_into(Op::Linear { parts, epilogue: Epilogue::Store }, &[embedding], place)?;
        }
        Ok(g)
    }
}

/// The chunks of an adaptive-norm vector, as first columns of the modulation table.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdaNorm {
    pub shift: usize,
    pub scale: usize,
    pub gate: usize,
}

impl AdaNorm {
    /// The attention's third of an AdaLN-Zero vector: (shift, scale, gate).
    pub fn first(start: usize, d: usize) -> AdaNorm {
        AdaNorm { shift: start, scale: start + d, gate: start + 2 * d }
    }

    /// The feed-forward's part of an AdaLN-Zero vector, after the attention's.
    pub fn second(start: usize, d: usize) -> AdaNorm {
        AdaNorm::first(start + 3 * d, d)
    }

    /// AdaLN-continuous: (scale, shift), no gate.
    pub fn continuous(start: usize, d: usize) -> AdaNorm {
        AdaNorm { scale: start, shift: start + d, gate: start }
    }
}
