//! The ways between host and device.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
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

/// How fast the slowed lanes of one direction are together, and when what they have begun ends.
struct Pace {
    bytes_per_second: f64,
    busy: Mutex<Instant>,
}

impl Pace {
    fn takes(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }

    /// When a copy may end that began then and is followed by the others.
    fn end(&self, began: Instant, takes: Duration) -> Instant {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        *busy = began.max(*busy) + takes;
        *busy
    }
}

/// A copy on a slowed lane.
struct Slowed {
    pace: Arc<Pace>,
    takes: Duration,
    began: OnceLock<Instant>,
}

impl Lane {
    /// `link` slows copies down to so many bytes per second: how a slower bus would do.
    pub fn new(context: &Arc<Context>, link: Option<f64>) -> Result<Lane> {
        let busy = Mutex::new(Instant::now());
        let pace = link.map(|bytes_per_second| Arc::new(Pace { bytes_per_second, busy }));
        Ok(Lane { stream: Stream::new(context)?, pace })
    }

    /// Another lane of the same direction: if they are slowed, they share the bus.
    pub fn beside(&self, context: &Arc<Context>) -> Result<Lane> {
        Ok(Lane { stream: Stream::new(context)?, pace: self.pace.clone() })
    }

    /// As [`Stream::upload_from`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn upload(&self, to: Address, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        self.paced(bytes, || unsafe { self.stream.upload_from(to, from, bytes) })
    }

    /// As [`Stream::download_to`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn download(&self, to: *mut u8, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: passed on from the caller.
        self.paced(bytes, || unsafe { self.stream.download_to(to, from, bytes) })
    }

    /// Queues a copy of so many bytes, and a pause behind it if the lane is slowed.
    fn paced(&self, bytes: usize, copy: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(pace) = &self.pace else { return copy() };
        let (takes, began) = (pace.takes(bytes), OnceLock::new());
        let slowed = Arc::new(Slowed { pace: pace.clone(), takes, began });
        // SAFETY: each function takes its share of the copy back.
        unsafe {
            self.stream.call(begin, Arc::into_raw(slowed.clone()).cast_mut().cast())?;
            copy()?;
            self.stream.call(pause, Arc::into_raw(slowed).cast_mut().cast())
        }
    }
}

/// Notes that a copy begins.
///
/// # Safety
/// `data` must be a [`Slowed`] from [`Arc::into_raw`] that nobody else takes back.
unsafe extern "C" fn begin(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let slowed = unsafe { Arc::from_raw(data.cast_const().cast::<Slowed>()) };
    slowed.began.get_or_init(Instant::now);
}

/// Sleeps until a copy on the slowed lane would have ended.
///
/// # Safety
/// As for [`begin`].
unsafe extern "C" fn pause(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let slowed = unsafe { Arc::from_raw(data.cast_const().cast::<Slowed>()) };
    let began = *slowed.began.get_or_init(Instant::now);
    let end = slowed.pace.end(began, slowed.takes);
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
}

/// Brings data to the device through a ring of pinned buffers: while the copy engine reads
/// one, the CPU's threads fill the next straight from the mapped file.
pub(super) struct Uploader {
    slots: Vec<(PinnedMemory, Event)>,
    next: usize,
    lane: Lane,
}

impl Uploader {
    pub const SLOTS: usize = 4;
    /// Large enough for the copy engine's full rate, small enough to lock at once.
    pub const SLOT_BYTES: usize = 16 << 20;
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
            unsafe {
                self.lane.upload(to + (start * size) as u64, bytes.as_ptr(), bytes.len())?;
            }
            free.record(&self.lane.stream)?;
            self.next = (self.next + 1) % Self::SLOTS;
        }
        Ok((view.len() * size) as u64)
    }

    /// Brings `bytes` to memory that nothing queued elsewhere uses, and waits until they are
    /// there.
    pub fn bring(&mut self, bytes: &[u8], to: Address) -> Result<()> {
        self.lane.stream.bind()?;
        for (i, bytes) in bytes.chunks(Self::SLOT_BYTES).enumerate() {
            let (buffer, free) = &mut self.slots[self.next];
            free.synchronize()?;
            let slot = &mut buffer.as_mut_slice()[..bytes.len()];
            slot.copy_from_slice(bytes);
            // SAFETY: `to` has room for all of it; the slot is not written again before its
            // event.
            unsafe {
                self.lane.upload(to + (i * Self::SLOT_BYTES) as u64, slot.as_ptr(), slot.len())?;
            }
            free.record(&self.lane.stream)?;
            self.next = (self.next + 1) % Self::SLOTS;
        }
        self.finish()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slowed_lanes_share_their_bus() {
        let start = Instant::now();
        let pace = Pace { bytes_per_second: 1e6, busy: Mutex::new(start) };
        let (second, takes) = (Duration::from_secs(1), pace.takes(2_000_000));
        assert_eq!(takes, 2 * second);
        // Two that begin together, and one when the bus is free again.
        assert_eq!(pace.end(start, takes), start + 2 * second);
        assert_eq!(pace.end(start, takes), start + 4 * second);
        assert_eq!(pace.end(start + 9 * second, takes), start + 11 * second);
    }
}
