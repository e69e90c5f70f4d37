//! Errors of the schema.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use super::{SCHEMA, SchemaVersion};
use crate::postgres::connection::describe;

/// Why the schema cannot be used, or could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// The database failed; see [`SchemaError::sqlstate`].
    #[error("{doing}: {}", describe(.source))]
    Database {
        /// The action that failed.
        doing: String,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// No step was applied to this database.
    #[error("this database has no payment-writer schema; run `payment-writer migrate`")]
    Absent,
    /// Steps that this program needs were not applied.
    #[error("the schema is at version {found}, this program needs {needed}; run `payment-writer migrate`")]
    TooOld {
        /// Version of the schema.
        found: SchemaVersion,
        /// Oldest version that this program can use.
        needed: SchemaVersion,
    },
    /// A newer program changed the schema in a way that this one does not support.
    #[error(
        "the schema is at version {found} and usable by programs that know version {oldest_known} or newer; \
         this one knows {known}: use the release that ran `migrate`"
    )]
    TooNew {
        /// Version of the schema.
        found: SchemaVersion,
        /// Version that a program must know to use the schema.
        oldest_known: SchemaVersion,
        /// Newest version that this program knows.
        known: SchemaVersion,
    },
    /// An applied step differs from this program's step of the same number.
    #[error(
        "step {version} of the schema was applied as {applied}, which differs from this program's {known}; \
         use the release that ran `migrate`, see `payment-writer migrate status`"
    )]
    Divergent {
        /// The step's number.
        version: SchemaVersion,
        /// Name in the history.
        applied: String,
        /// Name in this program; the same if only the contents differ.
        known: String,
    },
    /// All steps were applied, but tables, functions, columns, keys or partitions are missing.
    #[error(
        "the schema is incomplete, {} missing from schema {SCHEMA}: restore it, with ALTER TABLE {SCHEMA}.TABLE and ADD \
         PRIMARY KEY (COLUMNS), SET LOGGED, or ALTER COLUMN COLUMN TYPE TYPE", .0.join("; ")
    )]
    Incomplete(Vec<String>),
    /// Another session has been changing the schema for more than a minute.
    #[error("another session has been changing the schema for {} s", .0.as_secs())]
    Busy(Duration),
    /// Other sessions held locks on the tables during all attempts.
    #[error("{0}: other sessions keep locks on the tables")]
    Locked(&'static str),
    /// A step failed; the steps before it stay applied.
    #[error("{}", describe_migration(.0))]
    Step(Box<refinery::Error>),
    /// Undoing would delete rows.
    #[error("undo would delete the rows of {}; use --force to do it nevertheless", .0.join(", "))]
    NotEmpty(Vec<String>),
    /// The step is not known to this program, which therefore cannot undo it.
    #[error("step {0} is newer than this program, which cannot undo it; use the release that applied it")]
    NotOurs(SchemaVersion),
}

impl SchemaError {
    /// The SQLSTATE, if the database gave one.
    pub fn sqlstate(&self) -> Option<&SqlState> {
        match self {
            Self::Database { source, .. } => source.code(),
            Self::Step(source) => database_cause(source).and_then(tokio_postgres::Error::code),
            _ => None,
        }
    }
}

pub(super) fn database_cause(error: &refinery::Error) -> Option<&tokio_postgres::Error> {
    match error.kind() {
        refinery::error::Kind::Connection(_, cause) => cause.downcast_ref(),
        _ => None,
    }
}

fn describe_migration(error: &refinery::Error) -> String {
    match (error.kind(), database_cause(error)) {
        (refinery::error::Kind::Connection(what, _), Some(cause)) => format!("{what}: {}", describe(cause)),
        _ => error.to_string(),
    }
}
