//! Matrix products by cuBLASLt, NVIDIA's library, where it is installed. It is loaded when the
//! first session wants it, and nothing needs it.
//!
//! The library counts along columns: a matrix of ours, row after row, is its own transpose to
//! it. So out = x·Wᵀ is asked for as outᵀ = W·xᵀ, and the row strides are the leading
//! dimensions as they are:
//!
//! ```text
//!   A   W as k × n, k apart, transposed     C, D   out as n × m, its stride apart
//!   B   x as k × m, its stride apart        bias   one for each of the n rows of D
//! ```

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasLtEpilogue_t as Post, cublasLtMatmulDescAttributes_t as OperationAttribute,
    cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute, cublasStatus_t as Status,
};

use super::driver::{Address, Context, Stream};
use super::ops::linear::Takes;
use super::session::Place;
use crate::tensor::DType;
use crate::{Error, Result};

/// All that is called of the library: what it lacks would panic.
const FUNCTIONS: [&[u8]; 13] = [
    b"cublasLtGetVersion\0",
    b"cublasLtCreate\0",
    b"cublasLtDestroy\0",
    b"cublasLtMatrixLayoutCreate\0",
    b"cublasLtMatrixLayoutDestroy\0",
    b"cublasLtMatmulDescCreate\0",
    b"cublasLtMatmulDescDestroy\0",
    b"cublasLtMatmulDescSetAttribute\0",
    b"cublasLtMatmulPreferenceCreate\0",
    b"cublasLtMatmulPreferenceDestroy\0",
    b"cublasLtMatmulPreferenceSetAttribute\0",
    b"cublasLtMatmulAlgoGetHeuristic\0",
    b"cublasLtMatmul\0",
];

/// CUBLAS_OP_T, which the bindings of this library lack.
const TRANSPOSED: i32 = 1;

/// The oldest version whose attributes are those of the bindings: 12.0.
const OLDEST: usize = 120_000;

/// The version of the library, if there is one that can be used: 130102 is 13.1.2.
pub(super) fn version() -> Option<usize> {
    static FOUND: OnceLock<Option<usize>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: loads the library, or finds that it is not there. Functions are only looked
        // for, but for the one that returns a number.
        unsafe {
            if !sys::is_culib_present() {
                return None;
            }
            let has = |name: &&[u8]| sys::culib().get::<fn()>(*name).is_ok();
            let version = FUNCTIONS.iter().all(has).then(|| sys::cublasLtGetVersion());
            version.filter(|version| *version >= OLDEST)
        }
    })
}

/// Turns the library's answer into an error of this crate; `doing` completes "cuBLASLt failed
/// while …".
fn check<T>(doing: &str, answer: Result<T, CublasError>) -> Result<T> {
    answer.map_err(|CublasError(status)| {
        let text = format!("cuBLASLt failed while {doing} ({status:?})");
        match status {
            Status::CUBLAS_STATUS_ALLOC_FAILED => Error::memory(text).hint(
                "close other programs that use the GPU, or make the video smaller or shorter",
            ),
            _ => Error::device(text)
                .hint("it is not needed: take the folder of libcublasLt out of LD_LIBRARY_PATH"),
        }
    })
}

/// out = x·Wᵀ + bias and what follows; W has `out.cols` rows of `x.cols`, one after another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    /// In bf16.
    pub x: Place,
    /// In bf16.
    pub weight: Address,
    /// In the type of `out`; zero where there is none.
    pub bias: Address,
    /// In bf16 or f32.
    pub out: Place,
    pub fused: Fused,
}

/// What the library can do with a result before storing it, apart from a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fused {
    /// GELU by tanh.
    pub gelu: bool,
    /// Adds to what is there.
    pub accumulate: bool,
}

/// All that the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    stride_x: usize,
    stride_out: usize,
    f32_out: bool,
    bias: bool,
    fused: Fused,
    /// Of the weight, x, out and the bias, in bytes.
    alignments: [u32; 4],
}

impl Product {
    fn shape(&self) -> Shape {
        let Product { x, weight, bias, out, fused } = *self;
        Shape {
            m: x.rows,
            n: out.cols,
            k: x.cols,
            stride_x: x.stride,
            stride_out: out.stride,
            f32_out: out.dtype == DType::F32,
            bias: bias != 0,
            fused,
            alignments: [weight, x.address, out.address, bias].map(alignment),
        }
    }
}

/// The power of two that an address is a multiple of; the library asks for no more than 256.
fn alignment(address: Address) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// The algorithm for a shape.
#[derive(Clone, Copy)]
struct Algorithm {
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Bytes of memory that it works in.
    workspace: usize,
}

/// The library on one GPU, for one session.
pub(super) struct CublasLt {
    handle: Arc<Handle>,
    /// The layers that are for it.
    pub takes: Takes,
    /// `None` for what the library cannot do on this GPU.
    algorithms: RefCell<HashMap<Shape, Option<Algorithm>>>,
}

impl CublasLt {
    /// Bytes of memory that products may work in, one at a time.
    pub const WORKSPACE: usize = 32 << 20;

    pub fn new(context: &Arc<Context>, takes: Takes) -> Result<CublasLt> {
        if version().is_none() {
            return Err(Error::device("cuBLASLt was not found").hint(
                "put the folder of libcublasLt.so.13 into LD_LIBRARY_PATH, or do without it",
            ));
        }
        context.bind()?;
        let handle = check("starting", result::create_handle())?;
        let handle = Arc::new(Handle { handle, context: context.clone() });
        Ok(CublasLt { handle, takes, algorithms: RefCell::default() })
    }

    /// Makes a product ready to be queued. It works in [`CublasLt::WORKSPACE`] bytes from
    /// `workspace` on. `None` if the library cannot do it on this GPU.
    pub fn prepare(&self, product: &Product, workspace: Address) -> Result<Option<Matmul>> {
        let shape = product.shape();
        let out_type = if shape.f32_out {
            sys::cudaDataType::CUDA_R_32F
        } else {
            sys::cudaDataType::CUDA_R_16BF
        };
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let parts = Parts {
            operation: Operation::new(product)?,
            weight: Layout::new(bf16, [shape.k, shape.n], shape.k)?,
            x: Layout::new(bf16, [shape.k, shape.m], shape.stride_x)?,
            out: Layout::new(out_type, [shape.n, shape.m], shape.stride_out)?,
        };
        let known = self.algorithms.borrow().get(&shape).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let algorithm = self.choose(&shape, &parts)?;
                self.algorithms.borrow_mut().insert(shape, algorithm);
                algorithm
            }
        };
        Ok(algorithm.map(|algorithm| Matmul {
            handle: self.handle.clone(),
            parts,
            algorithm,
            weight: product.weight,
            x: product.x.address,
            out: product.out.address,
            beta: if product.fused.accumulate { 1.0 } else { 0.0 },
            workspace,
        }))
    }

    /// The library's first choice.
    fn choose(&self, shape: &Shape, parts: &Parts) -> Result<Option<Algorithm>> {
        self.handle.context.bind()?;
        let preference = Preference::new(shape)?;
        let Parts { operation, weight, x, out } = parts;
        // SAFETY: all of them are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.handle,
                operation.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
            )
        };
        match found {
            Err(CublasError(
                Status::CUBLAS_STATUS_NOT_SUPPORTED | Status::CUBLAS_STATUS_ARCH_MISMATCH,
            )) => Ok(None),
            found => {
                let found = check("choosing an algorithm", found)?;
                Ok(Some(Algorithm { algorithm: found.algo, workspace: found.workspaceSize }))
            }
        }
    }
}

/// A product with everything resolved.
pub(super) struct Matmul {
    handle: Arc<Handle>,
    parts: Parts,
    algorithm: Algorithm,
    weight: Address,
    x: Address,
    out: Address,
    beta: f32,
    workspace: Address,
}

impl Matmul {
    /// Queues the product on `stream`, whose context is current.
    ///
    /// # Safety
    /// The matrices, the bias and the workspace must be allocated and used by nobody else
    /// until the stream gets there.
    pub unsafe fn queue(&self, stream: &Stream) -> Result<()> {
        let alpha = 1f32;
        let Parts { operation, weight, x, out } = &self.parts;
        // SAFETY: handle and descriptors are alive, the factors are read before the library
        // returns, and the algorithm was chosen for these descriptors and alignments. Bindings
        // of driver and library each have a type of their own for the stream. Addresses are
        // the caller's promise.
        let answer = unsafe {
            result::matmul(
                self.handle.handle,
                operation.0,
                (&raw const alpha).cast(),
                (&raw const self.beta).cast(),
                self.weight as *const c_void,
                weight.0,
                self.x as *const c_void,
                x.0,
                self.out as *const c_void,
                out.0,
                self.out as *mut c_void,
                out.0,
                &raw const self.algorithm.algorithm,
                self.workspace as *mut c_void,
                self.algorithm.workspace,
                stream.raw().cast(),
            )
        };
        check("starting a product", answer)
    }
}

/// What describes a product to the library.
struct Parts {
    operation: Operation,
    weight: Layout,
    x: Layout,
    out: Layout,
}

/// The library's state on one GPU.
struct Handle {
    handle: sys::cublasLtHandle_t,
    context: Arc<Context>,
}

// SAFETY: the library allows a handle to be used from any thread, and from several at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: created in `CublasLt::new`, destroyed once; sessions are idle by then.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A matrix: its type, extents and stride.
struct Layout(sys::cublasLtMatrixLayout_t);

// SAFETY: memory that is owned, and changed by nobody after it was made.
unsafe impl Send for Layout {}

impl Layout {
    fn new(dtype: sys::cudaDataType, [rows, columns]: [usize; 2], stride: usize) -> Result<Layout> {
        let layout =
            result::create_matrix_layout(dtype, rows as u64, columns as u64, stride as i64);
        Ok(Layout(check("describing a matrix", layout)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What is to be computed.
struct Operation(sys::cublasLtMatmulDesc_t);

// SAFETY: as for `Layout`.
unsafe impl Send for Operation {}

impl Operation {
    fn new(product: &Product) -> Result<Operation> {
        use OperationAttribute::*;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F);
        let operation = Operation(check("describing a product", operation)?);
        operation.set(CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        let post = match (product.bias != 0, product.fused.gelu) {
            (false, false) => Post::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => Post::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => Post::CUBLASLT_EPILOGUE_GELU,
            (true, true) => Post::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        operation.set(CUBLASLT_MATMUL_DESC_EPILOGUE, post)?;
        if product.bias != 0 {
            operation.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias)?;
        }
        Ok(operation)
    }

    /// `T` must be of the attribute's size, which the library checks.
    fn set<T>(&self, attribute: OperationAttribute, value: T) -> Result<()> {
        // SAFETY: the library reads as many bytes as it is told, if it takes them at all.
        let answer = unsafe {
            let value = (&raw const value).cast();
            result::set_matmul_desc_attribute(self.0, attribute, value, size_of::<T>())
        };
        check("describing a product", answer)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What an algorithm may rely on and use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(shape: &Shape) -> Result<Preference> {
        use PreferenceAttribute::*;
        let preference = Preference(check("describing a choice", result::create_matmul_pref())?);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CublasLt::WORKSPACE as u64)?;
        // Partial sums stay in f32; others would be rounded to the output's type.
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme as u32)?;
        let [weight, x, out, _] = shape.alignments;
        for (attribute, alignment) in [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            preference.set(attribute, alignment)?;
        }
        Ok(preference)
    }

    /// `T` must be of the attribute's size, which the library checks.
    fn set<T>(&self, attribute: PreferenceAttribute, value: T) -> Result<()> {
        // SAFETY: as in `Operation::set`.
        let answer = unsafe {
            let value = (&raw const value).cast();
            result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>())
        };
        check("describing a choice", answer)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(out: DType, bias: Address, fused: Fused) -> Product {
        let place = |address, cols, stride, dtype| Place { address, rows: 65, cols, stride, dtype };
        Product {
            x: place(0x1010, 136, 160, DType::Bf16),
            weight: 0x4_0000,
            bias,
            out: place(0x9020, 72, 104, out),
            fused,
        }
    }

    #[test]
    fn equal_shapes_share_an_algorithm() {
        let fused = Fused { gelu: false, accumulate: false };
        let shape = product(DType::Bf16, 0x80, fused).shape();
        assert_eq!((shape.m, shape.n, shape.k), (65, 72, 136));
        assert_eq!(shape.alignments, [256, 16, 32, 128]);
        assert_eq!(shape, product(DType::Bf16, 0x180, fused).shape());
        // The last may rely on more.
        for other in [0, 0x140, 0x100] {
            assert_ne!(shape, product(DType::Bf16, other, fused).shape());
        }
        assert_ne!(shape, product(DType::F32, 0x80, fused).shape());
        let fused = Fused { accumulate: true, ..fused };
        assert_ne!(shape, product(DType::Bf16, 0x80, fused).shape());
    }

    /// Needs the library, not a GPU.
    #[test]
    fn the_library_takes_the_descriptions() {
        if version().is_none() {
            println!("skipped: cuBLASLt was not found");
            return;
        }
        for (bias, gelu, accumulate) in
            [(0, false, false), (0x80, false, true), (0, true, false), (0x80, true, false)]
        {
            let product = product(DType::Bf16, bias, Fused { gelu, accumulate });
            let shape = product.shape();
            Operation::new(&product).expect("an operation");
            Preference::new(&shape).expect("a preference");
            let dtype = sys::cudaDataType::CUDA_R_16BF;
            Layout::new(dtype, [shape.n, shape.m], shape.stride_out).expect("a layout");
        }
    }
}
