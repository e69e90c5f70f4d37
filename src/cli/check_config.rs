//! `check-config`: reports valid settings.

use super::output;
use crate::config::{DEFAULT_PATH, Loaded, Origin};
use crate::error::CommandError;

/// Prints where the settings came from. Invalid settings fail earlier, while loading, with exit code 2.
pub fn check_config(loaded: &Loaded) -> Result<(), CommandError> {
    let count = |wanted: fn(&Origin) -> bool| loaded.effective.iter().filter(|e| wanted(&e.origin)).count();
    let file = match &loaded.file {
        Some(path) => format!("file {}", path.display()),
        None => format!("no file ({DEFAULT_PATH} does not exist)"),
    };
    let from_file = count(|origin| matches!(origin, Origin::File(_)));
    let from_environment = count(|origin| matches!(origin, Origin::Environment(_)));
    let defaults = count(|origin| matches!(origin, Origin::Default));
    output::print(&format!(
        "{file}: {from_file} settings\nenvironment: {from_environment} settings\ndefaults: {defaults} settings\n\
         All of them are allowed. Nothing was connected to."
    ))
}
