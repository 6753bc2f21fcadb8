//! Carried frames on their way to the scratch file and back.
//!
//! Copy engines read and write page-locked memory only, so frames go piece by piece through
//! slots of it. Each direction has two slots with a stream each, which take turns: while the
//! copy engine works on one, the CPU's threads copy the other to or from the mapped file.
//!
//! The copies of the CPU are queued on the streams like those of the engine, as calls on a
//! thread of the driver. So all that waits here are streams, for events that were recorded
//! before: the thread that queues is never held up, and nothing can wait for what comes later.

use std::ffi::c_void;
use std::sync::Arc;

use memmap2::MmapRaw;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::driver::{Address, Context, Event, PinnedMemory, Stream};
use super::upload::Lane;
use crate::{Error, Result};

/// A part of the scratch file.
#[derive(Clone)]
pub(super) struct Span {
    file: Arc<MmapRaw>,
    offset: usize,
    bytes: usize,
}

impl Span {
    /// Spans begin at pages.
    const ALIGNMENT: usize = 4096;

    /// What a span of `bytes` takes of its file.
    pub fn padded(bytes: usize) -> usize {
        bytes.next_multiple_of(Self::ALIGNMENT)
    }

    /// # Panics
    /// If the file does not reach that far.
    pub fn new(file: &Arc<MmapRaw>, offset: usize, bytes: usize) -> Span {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= file.len()));
        Span { file: file.clone(), offset, bytes }
    }

    /// The byte `at` of the span.
    fn start(&self, at: usize) -> *mut u8 {
        // `at` lies within the span, and that within the file.
        self.file.as_mut_ptr().wrapping_add(self.offset + at)
    }
}

/// Both directions between device and file.
pub(super) struct Courier {
    outward: Way,
    inward: Way,
    threads: Arc<ThreadPool>,
}

/// One direction.
struct Way {
    legs: [Leg; 2],
    /// Whose turn it is.
    next: usize,
    /// Where it is marked what both have done.
    both: Stream,
    slot_bytes: usize,
}

/// A slot with its stream.
struct Leg {
    lane: Lane,
    slot: Arc<Slot>,
    /// Marks what the leg has done.
    done: Event,
}

/// Memory that a copy engine and the CPU take turns to use, as the stream of its leg says.
struct Slot {
    _memory: PinnedMemory,
    start: *mut u8,
}

// SAFETY: the pointer is to the memory that goes with it; who uses it when is up to the stream.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

impl Courier {
    /// Large enough for the copy engine's full rate. The planner counts all four slots.
    pub const SLOT_BYTES: usize = 16 << 20;
    /// More threads do not make memory faster.
    const MOST_THREADS: usize = 8;

    /// Slots are of `slot_bytes`; the lanes are beside the given ones.
    pub fn new(
        context: &Arc<Context>,
        slot_bytes: usize,
        outward: &Lane,
        inward: &Lane,
    ) -> Result<Courier> {
        // Threads of their own: those of others may be waiting for the device.
        let threads = ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads().min(Self::MOST_THREADS))
            .thread_name(|index| format!("scratch-{index}"))
            .build()
            .map_err(|e| Error::memory("no threads can be started for copies").because(e))?;
        let way = |lane| Way::new(context, slot_bytes, lane);
        let (outward, inward) = (way(outward)?, way(inward)?);
        Ok(Courier { outward, inward, threads: Arc::new(threads) })
    }

    /// Queues the way of the bytes at `from` to `to`, once `ready` has happened. Marks `freed`
    /// when they have left the device and `stored` when they are in the file.
    ///
    /// # Safety
    /// `from` must be memory for as many bytes as the span has, not written between `ready` and
    /// `freed`, and only ways of this courier may use the span before it is dropped.
    pub unsafe fn carry_out(
        &mut self,
        from: Address,
        to: &Span,
        ready: &Event,
        freed: &Event,
        stored: &Event,
    ) -> Result<()> {
        self.outward.wait(ready)?;
        for (at, bytes) in self.outward.pieces(to.bytes) {
            let leg = self.outward.turn();
            // SAFETY: the slot has as many bytes; the memory on the device is the caller's
            // promise. The stream takes turns with the copies below.
            unsafe { leg.lane.download(leg.slot.start, from + at as u64, bytes)? };
            leg.done.record(&leg.lane.stream)?;
            let ends = (leg.slot.start.cast_const(), to.start(at));
            // SAFETY: both have as many bytes; nobody else uses the slot, and the span is the
            // caller's promise.
            unsafe { leg.copy(ends, bytes, to, &self.threads)? };
        }
        self.outward.mark(freed)?;
        self.outward.note()?;
        self.outward.mark(stored)
    }

    /// Queues the way of the bytes of `from` to `to`, once both events of `after` have
    /// happened. Marks `arrived` when they are there.
    ///
    /// # Safety
    /// `to` must be memory for as many bytes as the span has, free from `after` to `arrived`,
    /// and only ways of this courier may use the span before it is dropped.
    pub unsafe fn carry_in(
        &mut self,
        from: &Span,
        to: Address,
        after: [&Event; 2],
        arrived: &Event,
    ) -> Result<()> {
        after.iter().try_for_each(|event| self.inward.wait(event))?;
        for (at, bytes) in self.inward.pieces(from.bytes) {
            let leg = self.inward.turn();
            let ends = (from.start(at).cast_const(), leg.slot.start);
            // SAFETY: as in `carry_out`.
            unsafe {
                leg.copy(ends, bytes, from, &self.threads)?;
                leg.lane.upload(to + at as u64, leg.slot.start, bytes)?;
            }
        }
        self.inward.note()?;
        self.inward.mark(arrived)
    }

    /// Waits until nothing is on its way.
    pub fn settle(&self) -> Result<()> {
        let [outward, inward] = [self.outward.settle(), self.inward.settle()];
        outward.and(inward)
    }
}

impl Drop for Courier {
    /// Queued copies use the slots and the file.
    fn drop(&mut self) {
        let _ = self.settle();
    }
}

impl Way {
    fn new(context: &Arc<Context>, slot_bytes: usize, beside: &Lane) -> Result<Way> {
        let leg = || {
            let mut memory = PinnedMemory::new(context, slot_bytes)?;
            let start = memory.as_mut_slice().as_mut_ptr();
            let slot = Arc::new(Slot { _memory: memory, start });
            Ok::<_, Error>(Leg { lane: beside.beside(context)?, slot, done: Event::new(context)? })
        };
        let both = Stream::new(context)?;
        Ok(Way { legs: [leg()?, leg()?], next: 0, both, slot_bytes })
    }

    /// Where the pieces of so many bytes begin, and the bytes of each.
    fn pieces(&self, bytes: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        pieces(bytes, self.slot_bytes)
    }

    /// The leg for the next piece.
    fn turn(&mut self) -> &Leg {
        let leg = &self.legs[self.next];
        self.next = (self.next + 1) % self.legs.len();
        leg
    }

    /// Lets both legs wait for `event`.
    fn wait(&self, event: &Event) -> Result<()> {
        self.legs.iter().try_for_each(|leg| leg.lane.stream.wait(event))
    }

    /// Notes what both legs have been given so far.
    fn note(&self) -> Result<()> {
        self.legs.iter().try_for_each(|leg| leg.done.record(&leg.lane.stream))
    }

    /// Marks with `event` what was noted last on both legs.
    fn mark(&self, event: &Event) -> Result<()> {
        self.legs.iter().try_for_each(|leg| self.both.wait(&leg.done))?;
        event.record(&self.both)
    }

    fn settle(&self) -> Result<()> {
        // Whatever one says, the others are waited for.
        let [first, second] = self.legs.each_ref().map(|leg| leg.lane.stream.synchronize());
        let both = self.both.synchronize();
        first.and(second).and(both)
    }
}

impl Leg {
    /// Queues a copy of `bytes` by the CPU's threads from the first of `ends` to the second,
    /// the slot's and one in the file of `span`.
    ///
    /// # Safety
    /// Both must have so many bytes, which nobody else uses when the stream gets there.
    unsafe fn copy(
        &self,
        (from, to): (*const u8, *mut u8),
        bytes: usize,
        span: &Span,
        threads: &Arc<ThreadPool>,
    ) -> Result<()> {
        let keeps = (self.slot.clone(), span.file.clone());
        let copy = Box::new(Copy { from, to, bytes, threads: threads.clone(), _keeps: keeps });
        // SAFETY: the function takes the box back, and calls no driver; the rest is the
        // caller's promise.
        unsafe { self.lane.stream.call(run, Box::into_raw(copy).cast()) }
    }
}

/// Where pieces of at most `most` bytes of so many begin, and the bytes of each.
fn pieces(bytes: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..bytes).step_by(most).map(move |at| (at, most.min(bytes - at)))
}

/// A copy by the CPU, with what it must not outlive.
struct Copy {
    from: *const u8,
    to: *mut u8,
    bytes: usize,
    threads: Arc<ThreadPool>,
    _keeps: (Arc<Slot>, Arc<MmapRaw>),
}

/// Does a copy.
///
/// # Safety
/// `data` must be a [`Copy`] from [`Box::into_raw`] that nobody else takes back, and nobody
/// else may use what it reads and writes.
unsafe extern "C" fn run(data: *mut c_void) {
    // SAFETY: the caller's promise.
    let copy = unsafe { Box::from_raw(data.cast::<Copy>()) };
    // SAFETY: as above; slot and file are kept until the box goes.
    let (from, to) = unsafe {
        let from = std::slice::from_raw_parts(copy.from, copy.bytes);
        (from, std::slice::from_raw_parts_mut(copy.to, copy.bytes))
    };
    copy_on(&copy.threads, from, to);
}

/// Copies on all of `threads`.
fn copy_on(threads: &ThreadPool, from: &[u8], to: &mut [u8]) {
    /// What one thread copies at a time.
    const PIECE: usize = 1 << 20;
    threads.install(|| {
        let pieces = to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        for (bytes, most) in [(10, 4), (8, 4), (3, 4), (1, 1), (0, 4)] {
            let mut end = 0;
            for (at, count) in pieces(bytes, most) {
                assert!(at == end && (1..=most).contains(&count), "{bytes} by {most}");
                end += count;
            }
            assert_eq!(end, bytes);
        }
    }

    #[test]
    fn spans_of_one_file_are_apart() {
        let file = Arc::new(MmapRaw::from(memmap2::MmapMut::map_anon(3 * 4096).expect("memory")));
        let first = Span::new(&file, 0, 4097);
        let second = Span::new(&file, Span::padded(4097), 4096);
        assert_eq!(second.start(0) as usize - first.start(0) as usize, 2 * 4096);
        assert!(std::panic::catch_unwind(|| Span::new(&file, 2 * 4096, 4097)).is_err());
    }

    #[test]
    fn copies_are_whole() {
        let threads = ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
        let from: Vec<u8> = (0..(3 << 20) + 5).map(|i| (i % 251) as u8).collect();
        let mut to = vec![0; from.len()];
        copy_on(&threads, &from, &mut to);
        assert!(from == to);
    }
}
