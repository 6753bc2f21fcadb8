//! Compiled kernels.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{Context, check};
use crate::{Error, Result};

/// Compiled kernels of one source file.
pub(in crate::exec::cuda) struct Module {
    context: Arc<Context>,
    module: sys::CUmodule,
    early: bool,
}

// SAFETY: modules may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin or, zero-terminated, PTX. `early` says whether its kernels wait for the one
    /// ahead of them (`kernels/lib/launch.cuh`).
    pub fn new(context: &Arc<Context>, file: &str, image: &[u8], early: bool) -> Result<Module> {
        context.bind()?;
        // SAFETY: the image is complete: a cubin knows its own length, PTX ends with zero.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = check(&format!("loading the kernels of {file}"), module)?;
        Ok(Module { context: context.clone(), module, early })
    }

    /// The kernel `name`, run with blocks of `block` threads and `shared` bytes of dynamic
    /// shared memory.
    pub fn kernel(&self, name: &'static str, block: u32, shared: u32) -> Result<Kernel> {
        let symbol =
            CString::new(name).map_err(|e| Error::device(format!("kernel {name:?}")).because(e))?;
        // SAFETY: the module is alive.
        let function = unsafe { result::module::get_function(self.module, symbol) };
        let function = check(&format!("looking for the kernel {name}"), function)?;
        // Without asking, 48 KiB is the limit.
        if shared > 48 << 10 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is valid.
            let answer = unsafe {
                result::function::set_function_attribute(function, attribute, shared as i32)
            };
            check(&format!("reserving shared memory for {name}"), answer)?;
        }
        Ok(Kernel { function, name, block, shared, early: self.early })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: loaded in `new`, unloaded once, after the kernels that came from it.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

/// One entry point of a [`Module`], which must outlive it.
#[derive(Clone, Copy)]
pub(in crate::exec::cuda) struct Kernel {
    pub(super) function: sys::CUfunction,
    pub name: &'static str,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared: u32,
    /// Whether it may start before the kernel ahead of it has ended: it waits for that itself.
    pub early: bool,
}

// SAFETY: functions may be launched from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}
