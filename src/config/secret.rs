//! Values that must never be printed.

use std::fmt;

/// What stands in the place of a secret wherever one would be shown.
pub const HIDDEN: &str = "***";

/// A text that no log, error or listing may contain. There is no `Display`, and `Debug` says only
/// that something is there.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the text into keeping.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for handing to the library that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}
