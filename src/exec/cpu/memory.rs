//! Where tensors lie: buffers and strided rows within them.
//!
//! The plan lets tensors share memory when their lives do not overlap, which the borrow
//! checker cannot see; so rows are addressed through pointers here, and only here.

use std::ops::Range;

use rayon::prelude::*;

use crate::tensor::DType;

/// A fixed piece of memory. Its contents are reached through [`Start`], so that several
/// tensors can lie in it.
pub(super) struct Buffer {
    start: *mut f32,
    len: usize,
}

// SAFETY: the buffer owns its memory.
unsafe impl Send for Buffer {}
// SAFETY: as above; who may write when is decided by the callers of `Mat::writable`.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new` and freed only here.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.start, self.len)) });
    }
}

/// The address of an element.
#[derive(Clone, Copy)]
pub(super) struct Start(*mut f32);

impl Start {
    pub fn offset(self, elements: usize) -> Start {
        Start(self.0.wrapping_add(elements))
    }
}

impl Buffer {
    pub fn zeroed(len: usize) -> Buffer {
        Buffer::new(vec![0.0; len].into_boxed_slice())
    }

    pub fn from(data: &[f32]) -> Buffer {
        Buffer::new(data.into())
    }

    fn new(data: Box<[f32]>) -> Buffer {
        let len = data.len();
        Buffer { start: Box::into_raw(data).cast(), len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn start(&self) -> Start {
        Start(self.start)
    }

    pub fn start_at(&self, element: usize) -> Start {
        debug_assert!(element <= self.len);
        self.start().offset(element)
    }

    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: the memory is owned, has this length and is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// Rows to read: `rows` of `cols` elements, `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Mat {
    start: *const f32,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

// SAFETY: a `Mat` only reads; nodes that write the same memory run at other times.
unsafe impl Send for Mat {}
// SAFETY: as above.
unsafe impl Sync for Mat {}

impl Mat {
    pub fn new(start: Start, rows: usize, cols: usize, stride: usize) -> Mat {
        Mat { start: start.0, rows, cols, stride }
    }

    pub fn row(&self, r: usize) -> &[f32] {
        assert!(r < self.rows);
        // SAFETY: the graph's shapes keep every row inside its buffer, and `r` is checked.
        unsafe { std::slice::from_raw_parts(self.start.add(r * self.stride), self.cols) }
    }

    /// All elements of a tensor without gaps.
    pub fn flat(&self) -> &[f32] {
        assert!(self.stride == self.cols || self.rows <= 1);
        // SAFETY: as for `row`; the rows follow each other without gaps.
        unsafe { std::slice::from_raw_parts(self.start, self.rows * self.cols) }
    }

    /// The same rows, to be written.
    ///
    /// # Safety
    /// Nobody else may use the memory meanwhile, except the kernel itself where its op
    /// says that input and output may be the same place.
    pub unsafe fn writable(self) -> MatMut {
        MatMut {
            start: self.start.cast_mut(),
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }
}

/// Rows to write.
pub(super) struct MatMut {
    start: *mut f32,
    pub rows: usize,
    pub cols: usize,
    stride: usize,
}

// SAFETY: rows are only handed out one at a time, each to one thread.
unsafe impl Send for MatMut {}
// SAFETY: `piece` is the only shared access and demands distinct elements.
unsafe impl Sync for MatMut {}

impl MatMut {
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        // SAFETY: `self` is borrowed mutably.
        unsafe { self.piece(r, 0..self.cols) }
    }

    /// Columns `columns` of row `r`, for kernels whose threads write different elements.
    ///
    /// # Safety
    /// No two threads may hold the same elements at a time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn piece(&self, r: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(r < self.rows && columns.end <= self.cols);
        // SAFETY: the graph's shapes keep every row inside its buffer, and `r` and the
        // columns are checked; the caller sees to it that nobody else holds them.
        unsafe {
            let start = self.start.add(r * self.stride + columns.start);
            std::slice::from_raw_parts_mut(start, columns.len())
        }
    }

    /// Calls `f(r, row)` for every row.
    pub fn for_each_row(&mut self, mut f: impl FnMut(usize, &mut [f32])) {
        for r in 0..self.rows {
            f(r, self.row(r));
        }
    }

    /// Calls `f(r, row)` for every row, on all threads.
    pub fn par_rows(&mut self, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let this = &*self;
        let chunk = (8192 / this.cols.max(1)).max(1);
        (0..this.rows).into_par_iter().with_min_len(chunk).for_each(|r| {
            // SAFETY: every `r` is visited once, by one thread.
            f(r, unsafe { this.piece(r, 0..this.cols) });
        });
    }

    /// Copies the rows of `x`, which may be this very memory, and calls `f(r, row)` on each,
    /// on all threads.
    pub fn par_rows_of(&mut self, x: &Mat, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        assert!(x.rows == self.rows && x.cols == self.cols);
        self.par_rows(|r, row| {
            // SAFETY: both rows have `cols` elements; `copy` allows them to be the same.
            unsafe { std::ptr::copy(x.start.add(r * x.stride), row.as_mut_ptr(), row.len()) };
            f(r, row);
        });
    }
}

/// Rounds values to what the type can hold (to nearest, ties to even).
pub(super) fn round(dtype: DType, values: &mut [f32]) {
    if dtype == DType::Bf16 {
        for v in values {
            *v = half::bf16::from_f32(*v).to_f32();
        }
    }
}
