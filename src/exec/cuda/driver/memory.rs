//! Memory of the device, and memory of the host that it reads and writes directly.

use std::sync::Arc;

use cudarc::driver::{result, sys};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::{Address, Context, check};
use crate::{Error, Result};

/// A piece of device memory.
pub(in crate::exec::cuda) struct DeviceMemory {
    context: Arc<Context>,
    address: Address,
    bytes: usize,
}

impl DeviceMemory {
    /// Allocates at least one byte; `what` is for the message when there is no room.
    pub fn new(context: &Arc<Context>, bytes: usize, what: &str) -> Result<DeviceMemory> {
        context.admit(bytes, what)?;
        context.bind()?;
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let what = format!("{what} ({:.1} MiB)", bytes as f64 / f64::from(1 << 20));
        Ok(DeviceMemory { context: context.clone(), address: check(&what, address)?, bytes })
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: allocated in `new`, freed once; freeing waits for work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory, which the copy engine reads and writes directly.
///
/// Mapped in large pages where the system has them and touched on all threads before it is
/// locked: the driver's own allocation takes seconds for gigabytes.
pub(in crate::exec::cuda) struct PinnedMemory {
    context: Arc<Context>,
    memory: MmapMut,
}

impl PinnedMemory {
    /// What one thread touches at a time: a large page.
    const PAGE: usize = 2 << 20;

    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedMemory> {
        let fail = |e| {
            Error::memory(format!("the host has no memory left to lock ({bytes} bytes)")).because(e)
        };
        let mut memory = MmapMut::map_anon(bytes.max(1)).map_err(fail)?;
        // Only a wish: small pages do as well, more slowly.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        memory.par_chunks_mut(Self::PAGE).for_each(|page| page.fill(0));
        context.bind()?;
        let start = memory.as_mut_ptr().cast();
        // SAFETY: the context is current, and the memory is mapped until `drop` unlocks it.
        let answer = unsafe { sys::cuMemHostRegister_v2(start, memory.len(), 0) };
        check("locking host memory", answer.result())?;
        Ok(PinnedMemory { context: context.clone(), memory })
    }

    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.memory
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: locked in `new`, unlocked once, before the memory is unmapped.
        let _ = unsafe { sys::cuMemHostUnregister(self.memory.as_mut_ptr().cast()) };
    }
}
