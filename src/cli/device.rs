//! `--device`: what runs the graphs.

use std::path::PathBuf;
use std::str::FromStr;

use pyraflow::Result;
use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cpu, Cuda, HostRoom};

/// The device to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The best there is.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU: the one of this number, or the first that can be used.
    Cuda(Option<usize>),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        let (name, index) = match text.split_once(':') {
            None => (text, None),
            Some((name, index)) => (name, Some(index)),
        };
        let device = match (name, index) {
            ("auto", None) => Some(Device::Auto),
            ("cpu", None) => Some(Device::Cpu),
            ("cuda", None) => Some(Device::Cuda(None)),
            // A sign is read as a part of a number, and is none of a device's.
            ("cuda", Some(n)) if n.starts_with('+') => None,
            ("cuda", Some(n)) => n.parse().ok().map(|n| Device::Cuda(Some(n))),
            _ => None,
        };
        device.ok_or_else(|| "expected auto, cpu, cuda or cuda:N".into())
    }
}

/// An amount of memory as typed: bytes, or with K, M or G for KiB, MiB or GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let upper = text.trim().to_ascii_uppercase();
        let upper = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
        let (number, shift) = match upper.char_indices().last() {
            Some((at, 'K')) => (&upper[..at], 10),
            Some((at, 'M')) => (&upper[..at], 20),
            Some((at, 'G')) => (&upper[..at], 30),
            _ => (upper, 0),
        };
        let plain = |c: char| c.is_ascii_digit() || c == '.';
        let value = number.trim().parse::<f64>().ok().filter(|_| number.trim().chars().all(plain));
        let bytes = value.map(|v| v * (1u64 << shift) as f64).filter(|&b| (1.0..1e18).contains(&b));
        let bytes = bytes.ok_or("expected an amount of memory such as 8G, 7.5G or 900M")?;
        Ok(ByteSize(bytes as u64))
    }
}

/// A positive rate as typed.
pub fn rate(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|v| v.is_finite() && *v > 0.0);
    value.ok_or_else(|| "expected a number above zero".into())
}

/// How much memory a run on a GPU may take.
#[derive(Debug, Clone, clap::Args)]
pub struct MemoryArgs {
    /// Most memory of the GPU to use, such as 8G; weights and decoded frames come and go where
    /// they do not fit [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub max_vram: Option<ByteSize>,

    /// Most memory of the host to use beside a GPU, such as 4G, mapped files not counted;
    /// decoded frames that fit into neither wait in a file [default: what is available]
    #[arg(long, value_name = "SIZE")]
    pub max_host: Option<ByteSize>,

    /// Folder for the file of what fits into neither memory, on a disk [default: the user's
    /// cache]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
}

impl MemoryArgs {
    /// The GPU with these limits.
    pub fn limit(&self, gpu: Cuda) -> Cuda {
        let host = HostRoom::new(self.max_host.map(|size| size.0), self.scratch.clone());
        let gpu = gpu.with_host(host);
        match self.max_vram {
            Some(ByteSize(bytes)) => gpu.limited(bytes),
            None => gpu,
        }
    }
}

/// Opens the device, a GPU with these limits.
///
/// # Errors
/// [`pyraflow::ErrorKind::Device`] if it cannot be used; [`Device::Auto`] takes the CPU where
/// no GPU can be, and says why if there is one.
pub fn open_backend(device: Device, memory: &MemoryArgs) -> Result<Box<dyn Backend>> {
    Ok(match open_gpu(device)? {
        None => Box::new(Cpu::new()),
        Some(gpu) => Box::new(memory.limit(gpu)),
    })
}

/// The GPU of `device`, or `None` for the CPU.
///
/// # Errors
/// As [`open_backend`].
pub fn open_gpu(device: Device) -> Result<Option<Cuda>> {
    let index = match device {
        Device::Cpu => return Ok(None),
        Device::Cuda(index) => index,
        Device::Auto => {
            let found = probe::probe();
            if let Err(error) = found.require(None) {
                if !found.gpus.is_empty() {
                    super::say(&format!("warning: using the CPU, since {error}"));
                }
                return Ok(None);
            }
            None
        }
    };
    Cuda::open(index).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory_are_read() {
        for (text, bytes) in [
            ("8G", 8 << 30),
            ("7.5g", 15 << 29),
            ("900M", 900 << 20),
            ("12GiB", 12 << 30),
            ("6 GB", 6 << 30),
            ("4096", 4096),
            ("1K", 1024),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "G", "-8G", "+8G", "8T", "1e3G", "nan", "inf", "0", "0G", "8 8G"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_read() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(None)),
            ("cuda:0", Device::Cuda(Some(0))),
            ("cuda:12", Device::Cuda(Some(12))),
        ] {
            assert_eq!(text.parse(), Ok(device));
        }
        for text in
            ["", "gpu", "CUDA", "cpu:0", "auto:0", "cuda:", "cuda:-1", "cuda:+1", "cuda:1:2"]
        {
            assert!(text.parse::<Device>().is_err_and(|e| e.contains("cuda:N")), "{text}");
        }
    }
}
