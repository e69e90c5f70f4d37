//! `config show`: shows effective values and their origins.

use clap::Args;

use super::output;
use crate::config::Loaded;
use crate::error::CommandError;

/// `config show`
#[derive(Clone, Debug, Args)]
pub struct ShowConfigArgs {
    /// As JSON: an array of objects with key, value and origin
    #[arg(long)]
    pub json: bool,
}

/// Prints every setting; secrets are already hidden.
pub fn show_config(loaded: &Loaded, args: &ShowConfigArgs) -> Result<(), CommandError> {
    if args.json {
        let text = serde_json::to_string_pretty(&loaded.effective)
            .map_err(|error| CommandError::failed(format!("cannot write the settings as JSON: {error}")))?;
        return output::print(&text);
    }
    let rows: Vec<[String; 3]> = std::iter::once(["setting", "value", "origin"].map(str::to_owned))
        .chain(loaded.effective.iter().map(|e| [e.key.clone(), e.value.to_string(), e.origin.to_string()]))
        .collect();
    output::print(&output::table(&rows))
}
