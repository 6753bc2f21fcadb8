//! Pieces of device memory that hold one tensor each, perhaps between guard zones.

use std::sync::Arc;

use super::driver::{Address, Context, DeviceMemory, Stream};
use crate::{Error, Result};

/// What guard zones and, in a fenced run, fresh memory hold: a NaN in bf16 and in f32.
pub(super) const PATTERN: u8 = 0xff;
/// Bytes of a guard zone: a tile's row of the widest kernel.
const GUARD: usize = 4096;

/// Memory of one tensor.
pub(super) struct Piece {
    memory: DeviceMemory,
    name: String,
    guard: usize,
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
        let piece = Piece { memory, name: name.to_string(), guard };
        if fenced {
            // SAFETY: the memory was just allocated.
            unsafe { stream.fill(piece.memory.address(), PATTERN, piece.memory.bytes())? };
        }
        Ok(piece)
    }

    pub fn address(&self) -> Address {
        self.memory.address() + self.guard as u64
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes() - 2 * self.guard
    }

    /// Fails if a guard zone has been written to. The stream must be idle.
    pub fn check(&self, stream: &Stream) -> Result<()> {
        let end = self.address() + self.bytes() as u64;
        for (start, side) in [(self.memory.address(), "before"), (end, "after")] {
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
