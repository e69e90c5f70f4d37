//! `check-config`: what is fine, once nothing is wrong.

use super::{Failure, output};
use crate::config::{DEFAULT_PATH, Loaded, Origin};

/// Says what was read. Wrong settings never come this far: loading them has failed with exit code 2.
pub fn check_config(loaded: &Loaded) -> Result<(), Failure> {
    let count = |wanted: fn(&Origin) -> bool| loaded.effective.iter().filter(|e| wanted(&e.origin)).count();
    let file = match &loaded.file {
        Some(path) => format!("file {}", path.display()),
        None => format!("no file ({DEFAULT_PATH} is not there)"),
    };
    let from_file = count(|origin| matches!(origin, Origin::File(_)));
    let from_environment = count(|origin| matches!(origin, Origin::Environment(_)));
    let defaults = count(|origin| matches!(origin, Origin::Default));
    output::print(&format!(
        "{file}: {from_file} settings\nenvironment: {from_environment} settings\ndefaults: {defaults} settings\n\
         All of them are allowed. Nothing was connected to."
    ))
}
