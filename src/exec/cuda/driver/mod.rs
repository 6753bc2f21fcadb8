//! The CUDA driver behind types that free what they own: context, streams, events, device
//! and pinned memory, modules. Every call is checked; errors say what was being done.

mod memory;
mod module;

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result, sys};

pub(super) use memory::{DeviceMemory, PinnedMemory};
pub(super) use module::{Kernel, Module};

use crate::{Error, Result};

/// An address in device memory.
pub(super) type Address = u64;

/// Turns the driver's answer into an error of this crate; `doing` completes "the GPU
/// failed while …".
pub(super) fn check<T>(doing: &str, answer: Result<T, result::DriverError>) -> Result<T> {
    answer.map_err(|e| {
        if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Error::memory(format!("the GPU has no memory left for {doing}")).hint(
                "close other programs that use the GPU, or make the video smaller or shorter",
            );
        }
        let name = e.error_name().ok().and_then(|n| n.to_str().ok()).unwrap_or("unknown error");
        let text = e.error_string().ok().and_then(|n| n.to_str().ok()).unwrap_or("no description");
        Error::device(format!("the GPU failed while {doing}: {text} ({name})"))
    })
}

/// Whether the driver takes launches that start early in recordings, as those of CUDA 12.3 on do.
pub(super) fn starts_early() -> Result<bool> {
    let mut version = 0;
    // SAFETY: writes one number.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check("asking for its version", answer.result())?;
    Ok(version >= 12_030)
}

/// The primary context of one GPU, and how much of its memory this process may use.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Bytes that were free once the context was there.
    free_at_first: u64,
    /// Most bytes to be used, the context's own included; 0 for all there are.
    limit: AtomicU64,
}

// SAFETY: contexts may be used from any thread that makes them current.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Context {}

impl Context {
    /// What a context takes itself, about: the driver does not tell. Measured with
    /// nvidia-smi on an H200, where it is largest, since it grows with the multiprocessors.
    pub const OWN_BYTES: u64 = 600 << 20;

    /// Takes the primary context of GPU `index`, which [`super::probe::require`] has found
    /// to be usable.
    pub fn new(index: usize) -> Result<Arc<Context>> {
        check("starting the driver", result::init())?;
        let device = check("opening the GPU", result::device::get(index as i32))?;
        // SAFETY: `device` was just returned by the driver.
        let context = check("opening the GPU", unsafe { result::primary_ctx::retain(device) })?;
        let mut this = Context { device, context, free_at_first: 0, limit: AtomicU64::new(0) };
        this.free_at_first = this.memory()?.0;
        Ok(Arc::new(this))
    }

    /// Sees to it that memory beyond `bytes`, the context's own included, is refused.
    pub fn limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// Bytes that this process uses, the context's own included. What other processes have
    /// taken since it began counts, too: the driver does not tell them apart.
    pub fn used(&self) -> Result<u64> {
        Ok(Self::OWN_BYTES + self.free_at_first.saturating_sub(self.memory()?.0))
    }

    /// Bytes that can still be had, within the limit if there is one.
    pub fn available(&self) -> Result<u64> {
        let (free, _) = self.memory()?;
        match self.limit.load(Ordering::Relaxed) {
            0 => Ok(free),
            limit => Ok(free.min(limit.saturating_sub(self.used()?))),
        }
    }

    /// Fails if `bytes` more are beyond the limit.
    fn admit(&self, bytes: usize, what: &str) -> Result<()> {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == 0 || self.used()? + bytes as u64 <= limit {
            return Ok(());
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (used, limit) = (mib(self.used()?), mib(limit));
        Err(Error::memory(format!(
            "{what} would exceed the limit of {limit:.0} MiB of GPU memory; {used:.0} MiB are used"
        ))
        .hint("allow more with --max-vram, or make the video smaller or shorter"))
    }

    /// Makes the context current on the calling thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check("selecting the GPU", unsafe { result::ctx::set_current(self.context) })
    }

    /// A property of the device.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        // SAFETY: the device handle is valid.
        let value = unsafe { result::device::get_attribute(self.device, attribute) };
        check("asking for its properties", value)
    }

    /// Free and total device memory in bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (free, total) = check("asking for its memory", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `new`, released once. A failure at the end of a process is
        // nothing that anyone could act on.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A queue of work that runs in order.
pub(super) struct Stream {
    context: Arc<Context>,
    stream: sys::CUstream,
}

// SAFETY: streams may be used from any thread; the driver locks internally.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(context: &Arc<Context>) -> Result<Stream> {
        context.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Stream { context: context.clone(), stream: check("creating a stream", stream)? })
    }

    /// Makes the context current on the calling thread, as work on the stream needs.
    pub fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    /// As libraries take it; it lives as long as `self`.
    pub fn raw(&self) -> sys::CUstream {
        self.stream
    }

    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        check("computing", unsafe { result::stream::synchronize(self.stream) })
    }

    /// Lets what is queued from now on wait for what `event` marked last.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        let answer = unsafe { result::stream::wait_event(self.stream, event.event, flags) };
        check("waiting for an event", answer)
    }

    /// Queues a call of `function` on a thread of the driver.
    ///
    /// # Safety
    /// `data` must be valid for the function until the stream has got there, and the function
    /// must not call the driver.
    pub unsafe fn call(
        &self,
        function: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> Result<()> {
        // SAFETY: passed on from the caller; the stream is alive.
        let answer = unsafe { sys::cuLaunchHostFunc(self.stream, Some(function), data) };
        check("queueing a call", answer.result())
    }

    /// Records what `queue` queues on this stream, and runs none of it.
    pub fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<Recorded> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        check("recording", unsafe { result::stream::begin_capture(self.stream, mode) })?;
        let queued = queue();
        // SAFETY: as above; also ends a recording that failed.
        let graph = unsafe { result::stream::end_capture(self.stream) };
        queued?;
        let graph = check("recording", graph)?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just recorded, and is destroyed once.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, flags);
            let _ = result::graph::destroy(graph);
            executable
        };
        let executable = check("preparing what was recorded", executable)?;
        Ok(Recorded { context: self.context.clone(), executable })
    }

    /// Queues a copy within device memory.
    ///
    /// # Safety
    /// Both ranges must be allocated and must not overlap.
    pub unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        check("copying", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    /// Queues setting every byte of a range.
    ///
    /// # Safety
    /// The range must be allocated.
    pub unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        check("filling memory", unsafe { result::memset_d8_async(to, byte, bytes, self.stream) })
    }

    /// As [`Self::upload`], from memory that others may use before the stream gets there.
    ///
    /// # Safety
    /// As there, and for the bytes at `from`.
    pub unsafe fn upload_from(&self, to: Address, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        let answer = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream) };
        check("uploading", answer.result())
    }

    /// As [`Self::download`], to memory that others may use before the stream gets there.
    ///
    /// # Safety
    /// As there, and for the bytes at `to`.
    pub unsafe fn download_to(&self, to: *mut u8, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        let answer = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream) };
        check("downloading", answer.result())
    }

    /// Queues a copy to the device. The bytes must stay as they are until it is done:
    /// pinned memory guarded by an event, or synchronize.
    ///
    /// # Safety
    /// `to` must be allocated for as many bytes.
    pub unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.upload_from(to, bytes.as_ptr(), bytes.len()) }
    }

    /// Queues a copy from the device; valid after the stream has been waited for.
    ///
    /// # Safety
    /// `from` must be allocated for as many bytes.
    pub unsafe fn download(&self, bytes: &mut [u8], from: Address) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.download_to(bytes.as_mut_ptr(), from, bytes.len()) }
    }

    /// Queues a kernel whose one parameter is the struct at `parameters`. If `early` it may
    /// start while the kernel ahead of it still runs, which must be the last thing queued.
    ///
    /// # Safety
    /// The kernel must take exactly such a struct, and every address in it must be valid
    /// for what the kernel reads and writes. What starts early must wait by itself.
    pub unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        parameters: *const c_void,
        early: bool,
    ) -> Result<(), result::DriverError> {
        let mut pointers = [parameters.cast_mut()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: kernel.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        let (pointers, none) = (pointers.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the driver copies the parameters before it returns; the rest is passed on
        // from the caller.
        unsafe { sys::cuLaunchKernelEx(&raw const config, kernel.function, pointers, none) }
            .result()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: created in `new`, destroyed once; the driver finishes queued work first.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

/// Work that was recorded once, to be queued as one: a CUDA graph.
pub(super) struct Recorded {
    context: Arc<Context>,
    executable: sys::CUgraphExec,
}

// SAFETY: may be used from any thread, by one at a time, as its owner sees to.
unsafe impl Send for Recorded {}

impl Recorded {
    /// Queues the work.
    ///
    /// # Safety
    /// As for everything that was recorded.
    pub unsafe fn queue(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive; the rest is passed on from the caller.
        let answer = unsafe { result::graph::launch(self.executable, stream.stream) };
        check("starting what was recorded", answer)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: instantiated in `Stream::record`, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

/// A point in a stream.
pub(super) struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// An event that also takes the time.
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        context.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Event { context: context.clone(), event: check("creating an event", event)? })
    }

    /// Marks the work queued so far on `stream`.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        check("marking an event", unsafe { result::event::record(self.event, stream.stream) })
    }

    /// Blocks until the marked work is done; at once if nothing was marked.
    pub fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event is alive.
        check("computing", unsafe { result::event::synchronize(self.event) })
    }

    /// Seconds from `start` to this event, both done.
    pub fn seconds_since(&self, start: &Event) -> Result<f64> {
        // SAFETY: both are alive.
        let milliseconds = unsafe { result::event::elapsed(start.event, self.event) };
        Ok(f64::from(check("taking the time", milliseconds)?) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}
