//! Pieces of device memory that hold one tensor each, perhaps between guard zones, and what is
//! kept of removed graphs for those to come.

use std::sync::Arc;

use super::driver::{Address, Context, DeviceMemory, Stream};
use crate::{Error, Result};

/// What guard zones and, in a fenced run, fresh memory hold: a NaN in bf16 and in f32.
pub(super) const PATTERN: u8 = 0xff;
/// Bytes of a guard zone: a tile's row of the widest kernel.
const GUARD: usize = 4096;

/// Memory of one tensor.
pub(super) struct Piece {
    address: Address,
    bytes: usize,
    name: String,
    /// Bytes of the guard zones before and after it.
    guard: usize,
    /// `None` for a part of memory that is kept elsewhere.
    _memory: Option<DeviceMemory>,
}

impl Piece {
    /// Memory for `bytes`, its contents undefined.
    pub fn new(
        context: &Arc<Context>,
        bytes: usize,
        name: &str,
        fenced: bool,
        stream: &Stream,
    ) -> Result<Piece> {
        let guard = if fenced { GUARD } else { 0 };
        let memory = DeviceMemory::new(context, bytes + 2 * guard, name)?;
        if fenced {
            // SAFETY: the memory was just allocated.
            unsafe { stream.fill(memory.address(), PATTERN, memory.bytes())? };
        }
        let address = memory.address() + guard as u64;
        Ok(Piece { address, bytes, name: name.to_string(), guard, _memory: Some(memory) })
    }

    /// The `bytes` at `address` of memory that outlives the piece.
    pub fn within(address: Address, bytes: usize, name: &str) -> Piece {
        Piece { address, bytes, name: name.to_string(), guard: 0, _memory: None }
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fails if a guard zone has been written to. The stream must be idle.
    pub fn check(&self, stream: &Stream) -> Result<()> {
        let (first, end) = (self.address - self.guard as u64, self.address + self.bytes as u64);
        for (start, side) in [(first, "before"), (end, "after")] {
            let mut zone = vec![0; self.guard];
            // SAFETY: the zone lies within the memory, and the stream is waited for.
            unsafe { stream.download(&mut zone, start)? };
            stream.synchronize()?;
            if let Some(at) = zone.iter().position(|&b| b != PATTERN) {
                let distance = if side == "before" { self.guard - at } else { at };
                return Err(Error::device(format!(
                    "something wrote {distance} bytes {side} the tensor {}",
                    self.name
                )));
            }
        }
        Ok(())
    }
}

/// Memory of removed graphs, which nothing queued uses any more, for graphs to come. The driver
/// takes none back before the device has done all that is queued.
#[derive(Default)]
pub(super) struct Spare(Vec<DeviceMemory>);

impl Spare {
    /// Keeps `memory`.
    pub fn keep(&mut self, memory: DeviceMemory) {
        self.0.push(memory);
    }

    /// At least `bytes` of memory: the smallest kept piece that has them. If all are smaller
    /// they go, so that no more is held than graphs need at one time, and what is allocated in
    /// their place has `largest` bytes, if that is more: it will do for those to come.
    pub fn take(
        &mut self,
        context: &Arc<Context>,
        bytes: usize,
        largest: usize,
        what: &str,
    ) -> Result<DeviceMemory> {
        // A piece is for who needs one.
        if bytes == 0 {
            return DeviceMemory::new(context, 0, what);
        }
        let sizes: Vec<usize> = self.0.iter().map(DeviceMemory::bytes).collect();
        match smallest_of(&sizes, bytes) {
            Some(index) => Ok(self.0.swap_remove(index)),
            None => {
                let grows = sizes.iter().any(|&size| size > 0);
                self.0.clear();
                DeviceMemory::new(context, if grows { bytes.max(largest) } else { bytes }, what)
            }
        }
    }

    /// Gives everything back.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Which of `sizes` is the smallest that is not below `bytes`.
fn smallest_of(sizes: &[usize], bytes: usize) -> Option<usize> {
    let enough = sizes.iter().enumerate().filter(|(_, size)| **size >= bytes);
    enough.min_by_key(|(_, size)| **size).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_that_is_large_enough_is_taken() {
        let sizes = [64, 256, 128, 256];
        for (bytes, index) in [(64, Some(0)), (65, Some(2)), (129, Some(1))] {
            assert_eq!(smallest_of(&sizes, bytes), index, "{bytes} bytes");
        }
        assert_eq!((smallest_of(&sizes, 257), smallest_of(&[], 0)), (None, None));
    }
}
