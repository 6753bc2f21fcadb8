//! The real binary, run on the small reference checkpoints: what works, what every wrong
//! input is told, and that no accident costs more than one unit.

#[path = "cli/accidents.rs"]
mod accidents;
#[path = "cli/defaults.rs"]
mod defaults;
#[path = "cli/devices.rs"]
mod devices;
#[path = "cli/documents.rs"]
mod documents;
#[path = "cli/early.rs"]
mod early;
#[path = "cli/extending.rs"]
mod extending;
#[path = "cli/harness.rs"]
mod harness;
#[path = "cli/images.rs"]
mod images;
#[path = "cli/many.rs"]
mod many;
#[path = "cli/models.rs"]
mod models;
#[path = "cli/outputs.rs"]
mod outputs;
#[path = "cli/settings.rs"]
mod settings;
#[path = "cli/shells.rs"]
mod shells;
#[path = "cli/works.rs"]
mod works;
