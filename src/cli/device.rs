//! `--device`: what runs the graphs.

use std::str::FromStr;

use pyraflow::Result;
use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cpu, Cuda};

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
/// [`pyraflow::ErrorKind::Device`] if it cannot be used; [`Device::Auto`] takes the CPU where
/// no GPU can be, and says why if there is one.
pub fn open_backend(device: Device) -> Result<Box<dyn Backend>> {
    let index = match device {
        Device::Cpu => return Ok(Box::new(Cpu::new())),
        Device::Cuda(index) => index,
        Device::Auto => {
            let found = probe::probe();
            if let Err(error) = found.require(None) {
                if !found.gpus.is_empty() {
                    super::say(&format!("warning: using the CPU, since {error}"));
                }
                return Ok(Box::new(Cpu::new()));
            }
            None
        }
    };
    Ok(Box::new(Cuda::open(index)?))
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
