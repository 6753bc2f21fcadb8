//! `pyraflow rm`.

use pyraflow::Result;
use pyraflow::hub::{Hub, ModelName};

use super::size;

/// Arguments of `rm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A model that was pulled, as `pyraflow list` shows it
    name: String,
}

/// Removes a model.
pub fn run(args: &Args) -> Result<()> {
    let name: ModelName = args.name.parse()?;
    let removed = Hub::from_env()?.remove(&name)?;
    super::say(&format!("removed {name}: {} are free", size(removed.bytes)));
    if !removed.kept_for.is_empty() {
        super::say(&format!("what it shares with {} stays", removed.kept_for.join(", ")));
    }
    Ok(())
}
