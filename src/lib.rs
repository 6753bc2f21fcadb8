//! Pyramid Flow text-to-video and image-to-video generation.
//!
//! Data goes one way: `pipeline → text → sampler → (models record) graph → plan → exec →
//! media`. Models know no backend, the executor knows no model.

pub mod batch;
pub mod cases;
pub mod checkpoint;
pub mod demo;
pub mod error;
pub mod exec;
pub mod graph;
pub mod hub;
pub mod media;
pub mod models;
pub mod pipeline;
pub mod sampler;
pub mod tensor;
pub mod text;

pub use error::{Error, ErrorKind, Result};

/// The README's example is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
