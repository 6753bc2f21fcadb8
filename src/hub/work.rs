//! Several things at once, watched from one thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::monitor::Monitor;
use crate::{Error, ErrorKind, Result};

/// Time between two looks at the progress.
const TICK: Duration = Duration::from_millis(100);

/// Does `work` for all `items`, `jobs` at a time. Each result is given to `done` on the
/// calling thread, where `tick` is called regularly, too. The first error stops the rest and
/// is returned.
pub(super) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    monitor: &Monitor,
    work: impl Fn(&T) -> Result<R> + Sync,
    mut done: impl FnMut(&T, R) -> Result<()>,
    mut tick: impl FnMut() -> Result<()>,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let (sender, results) = channel();
    let mut failure: Option<Error> = None;
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, items.len().max(1)) {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = monitor.check().and_then(|()| work(item));
                    if sender.send((item, result)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        loop {
            let step = match results.recv_timeout(TICK) {
                Ok((item, result)) => result.and_then(|result| done(item, result)),
                Err(RecvTimeoutError::Timeout) => Ok(()),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Err(error) = step.and_then(|()| tick()) {
                monitor.stop();
                // Threads that were told to stop say so; why they were told matters more.
                let better = failure.as_ref().is_none_or(|f| f.kind() == ErrorKind::Interrupted)
                    && (failure.is_none() || error.kind() != ErrorKind::Interrupted);
                if better {
                    failure = Some(error);
                }
            }
        }
    });
    failure.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_stops_the_rest() {
        let items: Vec<usize> = (0..100).collect();
        let monitor = Monitor::default();
        let mut sum = 0;
        let all = in_parallel(
            &items,
            3,
            &monitor,
            |i| Ok(*i),
            |_, i| {
                sum += i;
                Ok(())
            },
            || Ok(()),
        );
        assert!(all.is_ok() && sum == 4950);

        let monitor = Monitor::default();
        let work = |i: &usize| match i {
            7 => Err(Error::network("seven")),
            _ => monitor.sleep(Duration::from_millis(5)),
        };
        let error = in_parallel(&items, 3, &monitor, work, |_, ()| Ok(()), || Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "seven");
        let none: [usize; 0] = [];
        assert!(
            in_parallel(&none, 3, &Monitor::default(), work, |_, ()| Ok(()), || Ok(())).is_ok()
        );
    }
}
