//! Typed, range-checked component configurations.
//!
//! A value that the model code does not implement is refused by name here, so that nothing
//! further down has to ask. Keys that do not change what is computed are ignored.

mod settings;
mod text;
mod transformer;
mod vae;

pub use text::{ClipActivation, ClipConfig, T5Config};
pub use transformer::{FluxConfig, MmditConfig, TransformerConfig};
pub use vae::VaeConfig;

pub(super) use settings::Settings;
