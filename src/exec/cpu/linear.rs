//! Matrix products.
//!
//! The weights stay in the mapped file in their own type. A task takes a panel of output
//! columns and a range of rows, widens the panel's weights to f32 once, multiplies with the
//! `gemm` crate and applies the epilogue while the result is in cache.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::memory::{Mat, MatMut, round};
use super::{Run, norm, pointwise};
use crate::Result;
use crate::graph::{Epilogue, RowGroup, WeightId};
use crate::tensor::{DType, WeightView};

/// Output columns per task: with an inner dimension of a few thousand the widened panel
/// fits in a core's L2 cache.
const PANEL: usize = 128;
/// Rows per task at the most: bounds the scratch of one task.
const ROWS: usize = 512;

thread_local! {
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// A matrix for [`gemm_into`]: first element and the strides between columns and rows.
#[derive(Clone, Copy)]
pub struct Operand {
    /// First element.
    pub start: *const f32,
    /// Elements between columns.
    pub column: usize,
    /// Elements between rows.
    pub row: usize,
}

/// `dst = lhs · rhs` (plus `dst` if `add`), `dst` being `m × n` with rows `dst_row` apart,
/// on the calling thread.
///
/// # Safety
/// All three matrices must lie in memory valid for their extents (`lhs` is `m × k`, `rhs`
/// `k × n`), and `dst` must not overlap the others.
pub unsafe fn gemm_into(
    [m, n, k]: [usize; 3],
    dst: *mut f32,
    dst_row: usize,
    add: bool,
    lhs: Operand,
    rhs: Operand,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            dst_row as isize,
            add,
            lhs.start,
            lhs.column as isize,
            lhs.row as isize,
            rhs.start,
            rhs.column as isize,
            rhs.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// One weight with its bias and where its columns go.
struct Part<'a> {
    weight: WeightView<'a>,
    bias: Option<Vec<f32>>,
    first_column: usize,
}

pub(super) fn linear(
    run: &Run<'_>,
    parts: &[(WeightId, Option<WeightId>)],
    epilogue: &Epilogue,
) -> Result<()> {
    let x = run.input(0)?;
    let out = run.output()?;
    let modulation = match epilogue {
        Epilogue::GatedAccumulate { .. } => Some(run.input(1)?),
        _ => None,
    };
    // Norms need whole heads, so they come after the product and before the rounding.
    let dtype = match epilogue {
        Epilogue::NormHeads(_) => DType::F32,
        _ => run.output_dtype(),
    };
    let mut first_column = 0;
    let mut tasks = Vec::new();
    let mut loaded = Vec::new();
    for (p, (weight, bias)) in parts.iter().enumerate() {
        let weight = run.weight(*weight)?;
        let bias = bias.map(|b| run.weight_f32(b)).transpose()?;
        let columns = weight.shape[0];
        for panel in chunks(columns, PANEL) {
            for rows in chunks(x.rows, ROWS) {
                tasks.push((p, panel.clone(), rows));
            }
        }
        loaded.push(Part { weight, bias, first_column });
        first_column += columns;
    }
    let finish = Finish { out: &out, epilogue, modulation, dtype };
    tasks.into_par_iter().for_each(|(p, panel, rows)| {
        SCRATCH.with_borrow_mut(|(widened, product)| {
            multiply(&x, &loaded[p], panel, rows, widened, product, &finish);
        });
    });
    if let Epilogue::NormHeads(norms) = epilogue {
        let columns = loaded.iter().map(|p| p.first_column..p.first_column + p.weight.shape[0]);
        return norm::heads_of_parts(run, norms, &columns.collect::<Vec<_>>());
    }
    Ok(())
}

/// `0..n` in pieces of nearly equal length, none longer than `most`.
fn chunks(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = n.div_ceil(most).max(1);
    (0..count).map(move |i| i * n / count..(i + 1) * n / count).filter(|r| !r.is_empty())
}

fn multiply(
    x: &Mat,
    part: &Part<'_>,
    panel: Range<usize>,
    rows: Range<usize>,
    widened: &mut Vec<f32>,
    product: &mut Vec<f32>,
    finish: &Finish<'_>,
) {
    let (k, n, m) = (x.cols, panel.len(), rows.len());
    widened.resize(k * n, 0.0);
    part.weight.widen(panel.start * k, widened);
    product.resize(m * n, 0.0);
    let lhs = Operand { start: x.row(rows.start).as_ptr(), column: 1, row: x.stride };
    let rhs = Operand { start: widened.as_ptr(), column: k, row: 1 };
    // SAFETY: `x` has rows up to `rows.end`; `widened` holds `n` rows of `k` (its transpose
    // is the right operand) and `product` `m` rows of `n`.
    unsafe { gemm_into([m, n, k], product.as_mut_ptr(), n, false, lhs, rhs) };

    let bias = part.bias.as_deref().map(|b| &b[panel.clone()]);
    let first = part.first_column + panel.start;
    for (values, r) in product.chunks_exact_mut(n).zip(rows) {
        if let Some(bias) = bias {
            values.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
        }
        finish.store(r, first, values);
    }
}

/// Applies the epilogue and stores a piece of a row.
struct Finish<'a> {
    out: &'a MatMut,
    epilogue: &'a Epilogue,
    modulation: Option<Mat>,
    dtype: DType,
}

impl Finish<'_> {
    fn store(&self, row: usize, first: usize, values: &mut [f32]) {
        // SAFETY: each task has its own rows and columns, so no two write one element.
        let place = unsafe { self.out.piece(row, first..first + values.len()) };
        match self.epilogue {
            Epilogue::Store | Epilogue::NormHeads(_) => place.copy_from_slice(values),
            Epilogue::Activate(activation) => {
                pointwise::apply(*activation, values);
                place.copy_from_slice(values);
            }
            Epilogue::Accumulate => place.iter_mut().zip(values).for_each(|(y, v)| *y += *v),
            Epilogue::GatedAccumulate { gate_column, groups } => {
                if let Some(modulation) = &self.modulation {
                    let gate = &modulation.row(sample_of(groups, row))[gate_column + first..];
                    for ((y, v), g) in place.iter_mut().zip(values).zip(gate) {
                        *y += g * *v;
                    }
                }
            }
        }
        round(self.dtype, place);
    }
}

/// The sample that `row` belongs to.
pub(super) fn sample_of(groups: &[RowGroup], row: usize) -> usize {
    let mut end = 0;
    for group in groups {
        end += group.rows;
        if row < end {
            return group.sample;
        }
    }
    unreachable!("shape inference checked that the groups cover every row")
}
