//! `--device`: what runs the graphs.

use std::str::FromStr;

use pyraflow::exec::cuda::probe::{self, GpuInfo};
use pyraflow::exec::{Backend, Cpu};
use pyraflow::{Error, Result};

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

/// Opens the device.
///
/// # Errors
/// [`pyraflow::ErrorKind::Device`] if it was named and cannot be used.
pub fn open_backend(device: Device) -> Result<Box<dyn Backend>> {
    match device {
        Device::Cpu => Ok(Box::new(Cpu::new())),
        Device::Cuda(index) => open_gpu(&probe::require(index)?),
        // Until there is something to run on a GPU, one that is found changes nothing.
        Device::Auto => match probe::require(None).and_then(|gpu| open_gpu(&gpu)) {
            Ok(backend) => Ok(backend),
            Err(_) => Ok(Box::new(Cpu::new())),
        },
    }
}

fn open_gpu(gpu: &GpuInfo) -> Result<Box<dyn Backend>> {
    Err(Error::device(format!("pyraflow cannot run on {} yet", gpu.name)).hint("use --device cpu"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
