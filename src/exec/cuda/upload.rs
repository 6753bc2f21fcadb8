//! The ways between host and device.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use half::bf16;
use rayon::prelude::*;

use super::driver::{Address, Context, Event, PinnedMemory, Stream, check};
use super::step::Work;
use crate::Result;
use crate::tensor::{DType, WeightView};

/// A stream for copies in one direction.
pub(super) struct Lane {
    pub stream: Stream,
    pace: Option<Arc<Pace>>,
}

/// How fast a slowed lane is, and when its present copy began.
struct Pace {
    bytes_per_second: f64,
    began: Mutex<Instant>,
}

/// When a copy that began with `pace` may end.
struct Until {
    pace: Arc<Pace>,
    takes: Duration,
}

impl Lane {
    /// `link` slows copies down to so many bytes per second: how a slower bus would do.
    pub fn new(context: &Arc<Context>, link: Option<f64>) -> Result<Lane> {
        let began = Mutex::new(Instant::now());
        let pace = link.map(|bytes_per_second| Arc::new(Pace { bytes_per_second, began }));
        Ok(Lane { stream: Stream::new(context)?, pace })
    }

    /// As [`Stream::upload`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: passed on from the caller.
        self.paced(bytes.len(), || unsafe { self.stream.upload(to, bytes) })
    }

    /// As [`Stream::download`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn download(&self, bytes: &mut [u8], from: Address) -> Result<()> {
        // SAFETY: passed on from the caller.
        self.paced(bytes.len(), || unsafe { self.stream.download(bytes, from) })
    }

    /// Queues a copy of so many bytes, and a pause behind it if the lane is slowed.
    fn paced(&self, bytes: usize, copy: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(pace) = &self.pace else { return copy() };
        let takes = Duration::from_secs_f64(bytes as f64 / pace.bytes_per_second);
        let [first, last] = [0, 1].map(|_| Box::new(Until { pace: pace.clone(), takes }));
        // SAFETY: each function takes its box back.
        unsafe {
            self.stream.call(begin, Box::into_raw(first).cast())?;
            copy()?;
            self.stream.call(pause, Box::into_raw(last).cast())
        }
    }
}

/// Notes that a copy begins.
///
/// # Safety
/// `data` must be an [`Until`] from [`Box::into_raw`] that nobody else takes back.
unsafe extern "C" fn begin(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let until = unsafe { Box::from_raw(data.cast::<Until>()) };
    *until.pace.began.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
}

/// Sleeps until a copy on the slowed lane would have ended.
///
/// # Safety
/// As for [`begin`].
unsafe extern "C" fn pause(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let until = unsafe { Box::from_raw(data.cast::<Until>()) };
    let began = *until.pace.began.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::sleep(until.takes.saturating_sub(began.elapsed()));
}

/// Brings data to the device through a ring of pinned buffers: while the copy engine reads
/// one, the CPU's threads fill the next straight from the mapped file.
pub(super) struct Uploader {
    slots: Vec<(PinnedMemory, Event)>,
    next: usize,
    lane: Lane,
}

impl Uploader {
    const SLOTS: usize = 4;
    /// Large enough for the copy engine's full rate, small enough to lock at once.
    const SLOT_BYTES: usize = 16 << 20;
    /// What one thread converts at a time.
    const PIECE: usize = 256 << 10;

    /// `link` is as for [`Lane::new`].
    pub fn new(context: &Arc<Context>, link: Option<f64>) -> Result<Uploader> {
        let slot = |_| Ok((PinnedMemory::new(context, Self::SLOT_BYTES)?, Event::new(context)?));
        let slots = (0..Self::SLOTS).map(slot).collect::<Result<_>>()?;
        Ok(Uploader { slots, next: 0, lane: Lane::new(context, link)? })
    }

    /// Queues the upload of all of `view` as `dtype` (bf16 or f32) and returns its bytes
    /// there.
    pub fn upload(&mut self, view: &WeightView<'_>, dtype: DType, to: Address) -> Result<u64> {
        self.lane.stream.bind()?;
        let size = dtype.bytes();
        let per_slot = Self::SLOT_BYTES / size;
        for start in (0..view.len()).step_by(per_slot) {
            let count = per_slot.min(view.len() - start);
            let (buffer, free) = &mut self.slots[self.next];
            free.synchronize()?;
            let bytes = &mut buffer.as_mut_slice()[..count * size];
            convert(view, start, dtype, bytes, Self::PIECE);
            // SAFETY: `to` has room for the whole view; the slot is not written again
            // before its event.
            unsafe { self.lane.upload(to + (start * size) as u64, bytes)? };
            free.record(&self.lane.stream)?;
            self.next = (self.next + 1) % Self::SLOTS;
        }
        Ok((view.len() * size) as u64)
    }

    /// The way in.
    pub fn lane(&self) -> &Lane {
        &self.lane
    }

    /// Queues a launch behind the uploads.
    pub fn launch(&self, work: Work) -> Result<()> {
        let Work::Launch { kernel, grid, parameters } = work else { return Ok(()) };
        // SAFETY: the parameters are those of this kernel, and their memory lives until
        // `finish`.
        let answer = unsafe { self.lane.stream.launch(&kernel, grid, parameters.start(), false) };
        check(&format!("starting {}", kernel.name), answer)
    }

    /// Waits until everything has arrived.
    pub fn finish(&self) -> Result<()> {
        self.lane.stream.synchronize()
    }
}

/// Elements `start ..` of `view` as `dtype` into `out`, on all threads.
fn convert(view: &WeightView<'_>, start: usize, dtype: DType, out: &mut [u8], piece: usize) {
    let size = dtype.bytes();
    out.par_chunks_mut(piece).enumerate().for_each(|(i, out)| {
        let (first, count) = (start + i * piece / size, out.len() / size);
        if view.dtype == dtype {
            out.copy_from_slice(&view.bytes[first * size..][..out.len()]);
            return;
        }
        let mut values = vec![0.0f32; count];
        view.widen(first, &mut values);
        match dtype {
            DType::Bf16 => {
                for (out, v) in out.chunks_exact_mut(2).zip(values) {
                    out.copy_from_slice(&bf16::from_f32(v).to_le_bytes());
                }
            }
            _ => out.copy_from_slice(bytemuck::cast_slice(&values)),
        }
    });
}
