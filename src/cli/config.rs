//! `check-config` and `config show`: report the settings.

use clap::{Args, Subcommand};

use super::output::{print, table};
use crate::config::{DEFAULT_PATH, Loaded, Origin, PACKAGE_PATH};
use crate::error::{CommandError, OrFailed};

/// `config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting with its effective value and its origin; secrets are hidden
    Show(ShowConfigArgs),
}

/// `config show`
#[derive(Clone, Debug, Args)]
pub struct ShowConfigArgs {
    /// As JSON: an array of objects with key, value and origin
    #[arg(long)]
    pub json: bool,
}

/// Prints where the settings came from. Invalid settings fail earlier, while loading, with exit code 2.
pub fn check(loaded: &Loaded) -> Result<(), CommandError> {
    let count = |wanted: fn(&Origin) -> bool| loaded.effective.iter().filter(|e| wanted(&e.origin)).count();
    let file = match &loaded.file {
        Some(path) => format!("file {}", path.display()),
        None => format!("no file (neither {DEFAULT_PATH} nor {PACKAGE_PATH} exists)"),
    };
    let from_file = count(|origin| matches!(origin, Origin::File(_)));
    let from_environment = count(|origin| matches!(origin, Origin::Environment(_)));
    let defaults = count(|origin| matches!(origin, Origin::Default));
    print(format_args!(
        "{file}: {from_file} settings\nenvironment: {from_environment} settings\ndefaults: {defaults} settings\n\
         All of them are allowed. Nothing was connected to."
    ))
}

/// Prints every setting; secrets are already hidden.
pub fn show(loaded: &Loaded, args: &ShowConfigArgs) -> Result<(), CommandError> {
    if args.json {
        return print(serde_json::to_string_pretty(&loaded.effective).or_failed()?);
    }
    let settings = loaded.effective.iter();
    let rows = settings.map(|e| [e.key.clone(), e.value.to_string(), e.origin.to_string()]);
    print(table(["setting", "value", "origin"], rows))
}
