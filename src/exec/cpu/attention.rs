//! Attention over ranges of packed rows: for a block of queries all scores are formed, the
//! softmax taken in f32, and the values summed. No online softmax: the oracle has memory.
//!
//! Where activations are bf16 the probabilities are rounded to bf16 before they are
//! multiplied with the values, as a device's matrix units need them: the unnormalised ones,
//! whose sum is taken before rounding and divided by at the end.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Run;
use super::linear::{Operand, gemm_into};
use super::memory::{Mat, MatMut, round};
use super::pointwise::exp;
use crate::Result;
use crate::graph::{AttentionSpec, RelativeBias, Segment};
use crate::tensor::DType;

/// Queries per task.
const QUERIES: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { scores: Vec::new(), sums: Vec::new(), scales: Vec::new() })
    };
}

/// Memory of one task, kept for the thread's next.
struct Scratch {
    /// Scores, then probabilities, of each query.
    scores: Vec<f32>,
    /// The sum of the values of each query.
    sums: Vec<f32>,
    /// What each query's sum is to be multiplied with.
    scales: Vec<f32>,
}

pub(super) fn attention(run: &Run<'_>, spec: &AttentionSpec) -> Result<()> {
    let [q, k, v] = [run.input(0)?, run.input(1)?, run.input(2)?];
    let out = run.output()?;
    let bias = match spec.relative_bias {
        Some(bias) => Some((bias, run.weight_f32(bias.table)?)),
        None => None,
    };
    let kernel =
        Kernel { q, k, v, out, spec, bias, size: q.cols / spec.heads, dtype: run.output_dtype() };
    let mut tasks = Vec::new();
    for segment in spec.segments.iter() {
        for head in 0..spec.heads {
            for start in segment.queries.clone().step_by(QUERIES) {
                tasks.push((segment, head, start..(start + QUERIES).min(segment.queries.end)));
            }
        }
    }
    tasks.into_par_iter().for_each(|(segment, head, queries)| {
        SCRATCH.with_borrow_mut(|scratch| kernel.block(segment, head, queries, scratch));
    });
    Ok(())
}

struct Kernel<'a> {
    q: Mat,
    k: Mat,
    v: Mat,
    out: MatMut,
    spec: &'a AttentionSpec,
    bias: Option<(RelativeBias, Vec<f32>)>,
    size: usize,
    dtype: DType,
}

impl Kernel<'_> {
    fn block(&self, segment: &Segment, head: usize, queries: Range<usize>, scratch: &mut Scratch) {
        let Scratch { scores, sums, scales } = scratch;
        let keys: usize = segment.keys.iter().map(ExactSizeIterator::len).sum();
        let (m, size, column) = (queries.len(), self.size, head * self.size);
        scores.resize(m * keys, 0.0);
        sums.resize(m * size, 0.0);
        sums.fill(0.0);
        let q = Operand {
            start: self.q.row(queries.start)[column..].as_ptr(),
            column: 1,
            row: self.q.stride,
        };
        let mut first = 0;
        for range in segment.keys.iter().filter(|r| !r.is_empty()) {
            let start = self.k.row(range.start)[column..].as_ptr();
            let kt = Operand { start, column: self.k.stride, row: 1 };
            // SAFETY: the ranges lie inside q and k (shape inference), and `scores` has
            // `m` rows of `keys` with room for this range's columns from `first` on.
            unsafe {
                let dst = scores.as_mut_ptr().add(first);
                gemm_into([m, range.len(), size], dst, keys, false, q, kt);
            }
            first += range.len();
        }
        scales.clear();
        for (row, query) in scores.chunks_exact_mut(keys).zip(queries.clone()) {
            scales.push(self.softmax(row, head, query - segment.queries.start));
        }
        let mut first = 0;
        for range in segment.keys.iter().filter(|r| !r.is_empty()) {
            let start = self.v.row(range.start)[column..].as_ptr();
            let v = Operand { start, column: 1, row: self.v.stride };
            // SAFETY: as above; `sums` holds `m` rows of `size`.
            unsafe {
                let p = Operand { start: scores.as_ptr().add(first), column: 1, row: keys };
                gemm_into([m, size, range.len()], sums.as_mut_ptr(), size, true, p, v);
            }
            first += range.len();
        }
        for ((values, query), scale) in sums.chunks_exact_mut(size).zip(queries).zip(scales) {
            values.iter_mut().for_each(|v| *v *= *scale);
            round(self.dtype, values);
            // SAFETY: each task has its own queries and head.
            unsafe { self.out.piece(query, column..column + size) }.copy_from_slice(values);
        }
    }

    /// Softmax of one query's scores, with scale, bias and causal mask; what is returned is
    /// still to be multiplied with.
    fn softmax(&self, scores: &mut [f32], head: usize, query: usize) -> f32 {
        for (key, s) in scores.iter_mut().enumerate() {
            *s *= self.spec.scale;
            if let Some((bias, table)) = &self.bias {
                let bucket = bias.bucket(key as i64 - query as i64);
                *s += table[bucket * self.spec.heads + head];
            }
        }
        let visible = if self.spec.causal { (query + 1).min(scores.len()) } else { scores.len() };
        let (seen, hidden) = scores.split_at_mut(visible);
        hidden.fill(0.0);
        let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        seen.iter_mut().for_each(|s| *s = exp(*s - max));
        let scale = 1.0 / seen.iter().sum::<f32>();
        if self.dtype == DType::Bf16 {
            round(DType::Bf16, seen);
            return scale;
        }
        seen.iter_mut().for_each(|s| *s *= scale);
        1.0
    }
}
