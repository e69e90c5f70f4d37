//! Dead letters: listing them, and replaying each to the input topic at most once.
//!
//! A replay *claims* a dead letter in the database by its partition and offset in the dead-letter topic, so
//! that no other replay sends it. Dead letters are claimed in chunks. Each chunk is sent in one Kafka
//! transaction of a producer with a fixed transactional id. The same transaction commits an offset of a
//! separate consumer group whose metadata names the chunk ([`RunMetadata`](run_metadata::RunMetadata)). The
//! metadata is there if and only if the records are in the input topic. Then the chunk is recorded as sent.
//! Only one chunk is in flight.
//!
//! A run first becomes the *owner* in the database and then calls `init_transactions`, in this order. This
//! aborts or completes what an older run left open in Kafka, and the older run can change nothing more in
//! Kafka or in the database. Only then does the run read the metadata and use it to resolve claimed chunks
//! that are not recorded as sent:
//!
//! | where the earlier run ends | the metadata names | the next run |
//! | - | - | - |
//! | before a claim | the previous run or chunk | finds nothing |
//! | after the claim, before or inside the transaction | the same as when the chunk was claimed | releases the claim: the dead letters can be selected again |
//! | after sending the commit, before the answer | either; final after `init_transactions` | decides by the metadata |
//! | after the commit, before it is recorded | the chunk | records it as sent |
//! | after it is recorded | the chunk | finds nothing |
//! | it hangs while another run starts | either; final after `init_transactions` | decides by the metadata; the hung run is fenced |
//! | any of these, and the metadata is lost (group deleted, expired, set by hand) | nothing, or something else | stops: the operator states whether the chunk was sent |
//!
//! Claims live in the database. If the database was restored to an older state, the metadata names a chunk
//! that the database does not have, and the next run stops.

pub mod eligibility;
pub mod filter;
pub mod letter;
pub mod reader;
pub mod replay;
pub mod replay_store;
pub mod run_metadata;
pub mod sender;
pub mod summary;

use crate::error::{CommandError, ErrorKind};
use crate::kafka::scan::ScanError;
use crate::postgres::binding::BindingError;
use crate::postgres::schema::SchemaError;

/// Reasons for a dead-letter command to fail.
#[derive(Debug, thiserror::Error)]
pub enum DlqError {
    /// A topic cannot be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The dead-letter topic has no record at a named place.
    #[error("{topic} holds no record at {place}")]
    Absent {
        /// The dead-letter topic.
        topic: String,
        /// The named place.
        place: letter::Place,
    },
    /// A database statement failed.
    #[error(transparent)]
    Database(#[from] SchemaError),
    /// Connecting to the database failed.
    #[error(transparent)]
    Connect(#[from] crate::postgres::connection::ConnectError),
    /// The database belongs to another group or topic, or its binding cannot be read.
    #[error(transparent)]
    Binding(#[from] BindingError),
    /// The brokers returned an error or did not answer in time.
    #[error("{0}")]
    Kafka(String),
    /// Another run holds the advisory lock.
    #[error("another `dlq replay --apply` is under way")]
    Busy,
    /// Another run started while this one was running.
    #[error("another `dlq replay --apply` took over; it knows what this one sent")]
    TakenOver,
    /// The operator must state what happened to a chunk.
    #[error(transparent)]
    UnknownOutcome(#[from] run_metadata::UnknownOutcome),
}

impl From<DlqError> for CommandError {
    fn from(error: DlqError) -> Self {
        let kind = match &error {
            DlqError::UnknownOutcome(_) | DlqError::Binding(BindingError::Identity(_)) => {
                ErrorKind::PersonMustDecide
            }
            DlqError::Absent { .. } => ErrorKind::Usage,
            _ => ErrorKind::Failed,
        };
        Self { kind, message: error.to_string() }
    }
}
