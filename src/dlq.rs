//! Dead letters: which there are, and sending them to the input topic again, each once.
//!
//! A letter is *claimed* in the database by its place in the dead-letter topic, so nobody replays it a second
//! time. Letters are claimed in chunks. A chunk is sent in one Kafka transaction of a producer with a fixed
//! transactional id, and the same transaction commits the chunk's id, as a [mark](mark::Mark), to a consumer
//! group of its own: the mark stands there exactly if the records stand in the input. Then the chunk is noted as
//! sent. One chunk is under way at a time.
//!
//! A run begins by becoming the *owner* in the database, then by `init_transactions`, in this order. What an
//! older run left open in Kafka is thereby aborted or completed, and neither in Kafka nor in the database can it
//! do anything any more. Only then the mark is read, and what was claimed and not noted as sent is settled by it:
//!
//! | the run ends | the mark names | the next run |
//! | - | - | - |
//! | before a claim | the run or chunk before | finds nothing |
//! | after the claim, before or inside the transaction | what it named at the time of the claim | releases the claim: the letters can be chosen again |
//! | with the commit sent and no answer | either, and no longer changes after `init_transactions` | goes by it |
//! | after the commit, before it is noted | the chunk | notes it as sent |
//! | after it is noted | the chunk | finds nothing |
//! | not at all: it hangs, and another begins | either, and no longer changes | goes by it; the hung run finds itself fenced |
//! | and the mark is lost (group deleted, expired, set by hand) | nothing, or something else | stops: a person says what became of the chunk |
//!
//! Claims live in the database. A database that was restored to an older state has forgotten some: then the
//! mark names a chunk that it does not know, and the next run stops.

pub mod choice;
pub mod letter;
pub mod mark;
pub mod reader;
pub mod register;
pub mod replay;
pub mod sender;
pub mod tally;
pub mod terms;

use crate::binding::BindingError;
use crate::cli::{Exit, Failure};
use crate::kafka::scan::ScanError;
use crate::schema::SchemaError;

/// Why a command on dead letters did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum DlqError {
    /// A topic cannot be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It is not known what to read.
    #[error(transparent)]
    Ranges(#[from] choice::RangesError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] SchemaError),
    /// Connecting to the database failed.
    #[error(transparent)]
    Connect(#[from] crate::postgres::ConnectError),
    /// The database is another group's or log's, or cannot say.
    #[error(transparent)]
    Binding(#[from] BindingError),
    /// The brokers refused something, or did not answer in time.
    #[error("{0}")]
    Kafka(String),
    /// Another run has the lock.
    #[error("another `dlq replay --apply` is under way")]
    Busy,
    /// Another run began while this one went on.
    #[error("another `dlq replay --apply` took over; what this one sent is known to it")]
    TakenOver,
    /// A person has to decide.
    #[error("{0}")]
    Doubt(#[from] mark::Doubt),
    /// The machine.
    #[error("cannot start the runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

impl From<DlqError> for Failure {
    fn from(error: DlqError) -> Self {
        let exit = match &error {
            DlqError::Doubt(_) | DlqError::Binding(BindingError::Identity(_)) => Exit::PersonMustDecide,
            DlqError::Ranges(choice::RangesError::Absent { .. }) => Exit::Usage,
            _ => Exit::Failed,
        };
        Self { exit, message: error.to_string() }
    }
}
