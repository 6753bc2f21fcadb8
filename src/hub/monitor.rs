//! What the threads of a pull share: how far they are and whether they should stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Bytes done so far, and the wish to stop.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    done: AtomicU64,
    kept: AtomicU64,
    stopped: AtomicBool,
}

impl Monitor {
    /// Bytes more (a restarted file takes its own back with [`Monitor::take_back`]).
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that were there and need no download.
    pub fn keep(&self, bytes: u64) {
        self.kept.fetch_add(bytes, Ordering::Relaxed);
        self.add(bytes);
    }

    /// Bytes counted by [`Monitor::keep`].
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    pub fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Asks all threads to stop.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// [`crate::ErrorKind::Interrupted`] when the threads should stop.
    pub fn check(&self) -> Result<()> {
        if self.stopped.load(Ordering::Relaxed) { Err(interrupted()) } else { Ok(()) }
    }

    /// Sleeps, but not past the wish to stop.
    pub fn sleep(&self, pause: Duration) -> Result<()> {
        const SLICE: Duration = Duration::from_millis(50);
        let end = Instant::now() + pause;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(SLICE));
        }
    }
}

pub(super) fn interrupted() -> Error {
    Error::interrupted("stopped; what is downloaded is kept").hint("pull again to go on")
}
