//! Pixels on their way back: the device turns them into bytes and copies them to pinned
//! memory in the order of the stream, while the host deals with those before.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Context, DeviceMemory, Event, PinnedMemory, Stream, check};
use super::kernels::{BLOCK, Kernels, blocks};
use super::params::Rgb8;
use super::session::Place;
use super::step::Parameters;
use crate::exec::Pending;
use crate::{Error, Result};

/// Values that one thread of the kernel converts.
const VECTOR: usize = 8;
/// The flag that some value was not finite lies behind the pixels, aligned.
const FLAG: usize = 256;

/// Memory for one set of pixels, on both sides.
struct Buffer {
    device: DeviceMemory,
    host: PinnedMemory,
    done: Event,
}

/// Buffers that are used again.
#[derive(Clone, Default)]
pub(super) struct Readback {
    idle: Arc<Mutex<Vec<Buffer>>>,
}

impl Readback {
    /// Queues the conversion of the contiguous bf16 values at `place`, all in −1 … 1, and
    /// their way back. The closure waits for them.
    pub fn pixels(
        &self,
        context: &Arc<Context>,
        kernels: &Kernels,
        stream: &Stream,
        place: Place,
    ) -> Result<Pending<Vec<u8>>> {
        let n = place.rows * place.cols;
        let flag = n.next_multiple_of(FLAG);
        let mut buffer = self.take(context, flag + size_of::<u32>())?;
        let address = buffer.device.address();
        let parameters = Parameters::new(&Rgb8 {
            x: place.address,
            out: address,
            not_finite: address + flag as u64,
            n: n as i64,
        });
        let kernel = kernels.get("rgb8")?;
        let grid = [blocks(n.div_ceil(VECTOR), BLOCK as usize)?, 1, 1];
        let bytes = buffer.host.bytes();
        // SAFETY: the buffer holds the pixels and the flag behind them, and it is not used
        // again before the closure below has waited; `parameters` is what rgb8 takes.
        unsafe {
            stream.fill(address + flag as u64, 0, size_of::<u32>())?;
            check("starting rgb8", stream.launch(&kernel, grid, parameters.start(), false))?;
            stream.download(&mut buffer.host.as_mut_slice()[..bytes], address)?;
        }
        buffer.done.record(stream)?;
        let idle = self.idle.clone();
        Ok(Box::new(move || {
            buffer.done.synchronize()?;
            let bytes = buffer.host.as_slice();
            let not_finite = bytes[flag..flag + size_of::<u32>()].iter().any(|&b| b != 0);
            let pixels = bytes[..n].to_vec();
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
            if not_finite {
                return Err(Error::numeric("decoded frames hold NaN or infinity")
                    .hint("the VAE's weights may be damaged; the latents are kept"));
            }
            Ok(pixels)
        }))
    }

    fn take(&self, context: &Arc<Context>, bytes: usize) -> Result<Buffer> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = idle.iter().position(|b| b.host.bytes() == bytes) {
            return Ok(idle.swap_remove(i));
        }
        Ok(Buffer {
            device: DeviceMemory::new(context, bytes, "pixels")?,
            host: PinnedMemory::new(context, bytes)?,
            done: Event::new(context)?,
        })
    }
}
