//! Attention over ranges of packed rows: for a block of queries all scores are formed, the
//! softmax taken in f32, and the values summed. No online softmax: the oracle has memory.

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
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
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
        SCRATCH.with_borrow_mut(|(scores, sums)| {
            kernel.block(segment, head, queries, scores, sums);
        });
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
    fn block(
        &self,
        segment: &Segment,
        head: usize,
        queries: Range<usize>,
        scores: &mut Vec<f32>,
        sums: &mut Vec<f32>,
    ) {
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
        for (row, query) in scores.chunks_exact_mut(keys).zip(queries.clone()) {
            self.softmax(row, head, query - segment.queries.start);
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
        for (values, query) in sums.chunks_exact_mut(size).zip(queries) {
            round(self.dtype, values);
            // SAFETY: each task has its own queries and head.
            unsafe { self.out.piece(query, column..column + size) }.copy_from_slice(values);
        }
    }

    /// Softmax of one query's scores, with scale, bias and causal mask.
    fn softmax(&self, scores: &mut [f32], head: usize, query: usize) {
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
        seen.iter_mut().for_each(|s| *s *= scale);
    }
}
