//! NVIDIA GPUs: the kernels in this program, and what the machine has to run them.

pub mod images;
pub mod probe;
