//! `pyraflow list`.

use pyraflow::Result;
use pyraflow::hub::{Hub, State};
use serde_json::json;

use super::size;

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows the models.
pub fn run(args: &Args) -> Result<()> {
    let hub = Hub::from_env()?;
    let models = hub.installed();
    if args.json {
        let text = json!({ "cache": hub.settings().cache, "models": models });
        return super::print(&format!("{text:#}\n"));
    }
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for model in &models {
        let state = match model.state {
            State::Complete => format!("{:>9}", size(model.bytes)),
            State::Partial => format!("{:>9}  incomplete, pull it again", size(model.bytes)),
            State::Absent => format!("{:>9}", "-"),
        };
        let folder = model.folder.as_ref().map_or(String::new(), |f| format!("  {}", f.display()));
        text += &format!("{:<width$}  {state}{folder}\n", model.name);
    }
    super::print(&text)
}
