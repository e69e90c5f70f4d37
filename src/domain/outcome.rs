//! Outcomes of records and classes of failures.

use std::fmt;

use crate::domain::wire::Reason;

mod failures;
mod refusals;

pub use failures::{
    FailureClass, SQLSTATE_CLASSES, SQLSTATE_CURSOR_MOVED, class_of_kafka, class_of_sqlstate, is_refusal,
    sqlstate_label,
};
pub use refusals::Refusals;

/// The outcome of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// This transaction claimed its id: rows are written, events are to be published.
    Written,
    /// An earlier attempt wrote it, possibly another process's: no rows are written, its events may be
    /// missing.
    WrittenBefore,
    /// Another record owns the id with the same payload: nothing to do.
    Duplicate,
    /// It is dead-lettered.
    DeadLetter(Reason),
    /// It is dead-lettered as `rejected_by_database`; with the SQLSTATE, unless an earlier attempt refused
    /// it.
    Rejected(Option<SqlState>),
}

/// The five characters of a SQLSTATE (PostgreSQL manual, appendix A).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// `None` unless the text is five ASCII letters and digits.
    pub fn new(code: &str) -> Option<Self> {
        let bytes: [u8; 5] = code.as_bytes().try_into().ok()?;
        bytes.iter().all(u8::is_ascii_alphanumeric).then_some(Self(bytes))
    }

    /// The code as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
