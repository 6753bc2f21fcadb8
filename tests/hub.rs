//! Pulling models from a hub that plays every trick: the library and the real binary against
//! a server on loopback that is written for these tests.

#[path = "hub/answers.rs"]
mod answers;
#[path = "hub/commands.rs"]
mod commands;
#[path = "hub/harness.rs"]
mod harness;
#[path = "hub/names.rs"]
mod names;
#[path = "hub/resume.rs"]
mod resume;
#[path = "hub/server.rs"]
mod server;
#[path = "hub/together.rs"]
mod together;
