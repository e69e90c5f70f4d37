//! What a lane needs of Kafka ([`KafkaPort`]) and of Postgres ([`Store`]), as traits. The daemon implements
//! them in `kafka::lane_client` and `postgres::store`; the model test replaces both.

pub mod fetch_buffer;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::batch::{Answer, Batch, Outcomes};
use crate::domain::cursor::{CursorRow, GroupOffset, IdentityMismatch, LogBounds, OutputScan};
use crate::domain::outcome::FailureClass;
use crate::domain::publication::{Committed, OutputCounts, Publication};
use crate::domain::record::{NextOffset, Partition};
use crate::ports::fetch_buffer::FetchBuffer;

/// Lets the rebalance callback return: nothing of the revoked partitions is in flight any more.
/// Dropping it does the same, as when a lane ends before it handles the revocation.
pub struct RevokeDone(Option<Box<dyn FnOnce() + Send>>);

impl RevokeDone {
    /// `done` is called when the lane has finished, even if the callback has stopped waiting.
    pub fn new(done: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }

    /// Reports that the lane has finished the revocation.
    pub fn finish(self) {
        drop(self);
    }
}

impl Drop for RevokeDone {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

/// An event that the group, a background request or the daemon sends to a lane.
pub enum LaneEvent {
    /// These partitions were assigned to this lane.
    Assigned(Vec<Partition>),
    /// These partitions are being revoked.
    Revoked {
        /// The revoked partitions.
        partitions: Vec<Partition>,
        /// The session is lost: nothing can be committed for them any more.
        is_lost: bool,
        /// The rebalance callback waits for this, within a limit.
        done: RevokeDone,
    },
    /// An answer to a [`Question`].
    Answered {
        /// Id of the question.
        id: u64,
        /// Positions of each of its partitions.
        found: Result<Vec<Positions>, KafkaPortError>,
    },
    /// The answer to [`KafkaPort::check_gaps`].
    GapsChecked {
        /// Id of the request.
        id: u64,
        /// One answer for each gap.
        answers: Vec<(Gap, GapAnswer)>,
    },
    /// Finish what is in flight, publish it, and return.
    Drain,
}

/// Why a request to Kafka, other than a transaction, failed.
#[derive(Debug, thiserror::Error)]
pub enum KafkaPortError {
    /// The request may be repeated.
    #[error("{message}")]
    Failed {
        /// Decides how the lane reacts.
        class: FailureClass,
        /// The action and the error.
        message: String,
    },
    /// The topic or the database is another one: an operator has to decide.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
}

impl KafkaPortError {
    /// A transient failure.
    pub fn transient(message: impl Into<String>) -> Self {
        Self::Failed { class: FailureClass::Transient, message: message.into() }
    }
}

/// Why a Kafka transaction failed, and whether it may have been committed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// It was aborted or never begun: nothing is visible, and the same publication may be retried.
    #[error("aborted: {message}")]
    Aborted {
        /// Decides how the lane reacts.
        class: FailureClass,
        /// The action and the error.
        message: String,
    },
    /// The broker does not accept this member's generation: retry after the rebalance.
    #[error("not a member of the group's current generation: {0}")]
    StaleGeneration(String),
    /// The producer cannot be used any more, and the transaction may have been committed.
    /// `init_transactions` of a new producer ends it; the group's offset then shows the outcome.
    #[error("the producer has to be replaced: {0}")]
    ReplaceProducer(String),
    /// The topic or the database is another one: an operator has to decide.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
}

/// Why a request to the database failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// Decides how the lane reacts.
    pub class: FailureClass,
    /// The SQLSTATE, if the server gave one.
    pub sqlstate: Option<String>,
    /// The action and the error; never a value of a row.
    pub message: String,
    /// Set if the database is another one.
    pub identity: Option<IdentityMismatch>,
}

/// What a scan of the output topics shows about one partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScannedOutputs {
    /// The partition.
    pub partition: Partition,
    /// The position from which on events were searched.
    pub from: NextOffset,
    /// What the outputs show.
    pub scan: OutputScan,
    /// Whether a right to read them is missing: another scan may show more.
    pub is_refused: bool,
}

/// A request for committed offsets and log bounds, which a lane needs to start partitions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Returned with the answer, so that the lane can drop outdated answers.
    pub id: u64,
    /// The partitions.
    pub partitions: Vec<Partition>,
}

/// Committed offset and log bounds of one partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Positions {
    /// The partition.
    pub partition: Partition,
    /// The group's committed offset, read while no transaction that could change it was pending.
    pub group: Option<GroupOffset>,
    /// First offset and last stable offset, read after the committed offset.
    pub bounds: LogBounds,
}

/// A range that the client passed over right after a begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// The partition.
    pub partition: Partition,
    /// The position at which fetching began.
    pub from: NextOffset,
    /// The position of the first record or end that was delivered.
    pub to: NextOffset,
}

/// Content of a gap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GapAnswer {
    /// No record that a read_committed consumer would receive.
    Empty,
    /// Offset of the first record in the gap.
    Record(NextOffset),
    /// The log's start has moved past the gap's start: its content is unknown.
    Removed,
    /// The check failed and is repeated later.
    Failed(String),
}

/// The input topic, the consumer group and the output topics, as one lane uses them.
pub trait KafkaPort {
    /// Asks in the background and returns at once. The answer always arrives, as [`LaneEvent::Answered`].
    fn ask(&mut self, question: Question);

    /// Checks in the background, with another client, what is in these gaps. The answer always arrives, as
    /// [`LaneEvent::GapsChecked`].
    fn check_gaps(&mut self, id: u64, gaps: Vec<Gap>);

    /// Scans the output topics for events of records at or after these positions. Starts the scan and returns
    /// at once; `None`: it is still running, call again. The result may belong to an earlier call with other
    /// positions.
    fn scan_outputs(
        &mut self,
        wanted: &[(Partition, NextOffset)],
    ) -> impl Future<Output = Result<Option<Vec<ScannedOutputs>>, KafkaPortError>>;

    /// Starts to fetch these partitions at these positions; nothing fetched before is delivered. If it fails,
    /// all partitions have to be started again.
    fn start(
        &mut self,
        positions: &[(Partition, NextOffset)],
    ) -> impl Future<Output = Result<(), KafkaPortError>>;

    /// Stops fetching these partitions; nothing more of them is delivered. If it fails, all partitions have
    /// to be started again.
    fn stop(&mut self, partitions: &[Partition]) -> impl Future<Output = Result<(), KafkaPortError>>;

    /// Abandons the fetching client; the next [`start`](Self::start) creates another one. All partitions have
    /// to be started again.
    fn abandon_fetcher(&mut self);

    /// Whether brokers throttle the fetching client because of a quota.
    fn is_throttled(&self) -> bool {
        false
    }

    /// Serves the fetching client's callbacks (errors, statistics), which pile up in its memory otherwise.
    /// For times in which nothing is fetched.
    fn listen(&self);

    /// Moves what is available into `buffer`, waiting at most `wait` for the first item. Cancel-safe.
    fn fetch(&mut self, buffer: &mut FetchBuffer, wait: Duration) -> impl Future<Output = ()>;

    /// Runs one Kafka transaction.
    fn publish(
        &mut self,
        publication: &Arc<Publication>,
    ) -> impl Future<Output = Result<(Committed, OutputCounts, PublishTimes), PublishError>>;

    /// Runs `init_transactions`, with a new producer if needed; afterwards no earlier transaction is open.
    fn renew(&mut self) -> impl Future<Output = Result<(), KafkaPortError>>;
}

/// Cursor update of one partition, in the transaction of a batch or alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CursorMove {
    /// The partition.
    pub partition: Partition,
    /// Guard: the update fails unless this is the present `applied`.
    pub seen: NextOffset,
    /// New `applied`.
    pub applied: NextOffset,
    /// New `published`; `None` leaves it as it is.
    pub published: Option<NextOffset>,
    /// As in [`Progress`](crate::domain::batch::Progress).
    pub timestamp: Option<Option<crate::domain::record::TimestampMs>>,
}

/// Durations of the parts of a database transaction, and counts of its claims.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteStats {
    /// Cursors and claim.
    pub claim: Duration,
    /// COPY of the rows.
    pub copy: Duration,
    /// COMMIT.
    pub commit: Duration,
    /// Claims whose id was looked up in older generations.
    pub claims_probed: u64,
    /// Claims whose id cannot be in an older generation, so that no lookup was needed.
    pub claims_spared: u64,
}

/// Durations of the steps of a Kafka transaction.
#[derive(Clone, Copy, Debug, Default)]
pub struct PublishTimes {
    /// Passing the outputs to librdkafka.
    pub produce: Duration,
    /// `send_offsets_to_transaction`.
    pub offsets: Duration,
    /// Waiting until the brokers have acknowledged the outputs.
    pub deliver: Duration,
    /// The commit.
    pub commit: Duration,
}

/// The database, as one lane uses it. Each call opens a new session if the last one broke.
pub trait Store {
    /// Reads the cursors of these partitions, in the order given.
    fn cursors(
        &mut self,
        partitions: &[Partition],
    ) -> impl Future<Output = Result<Vec<(Partition, Option<CursorRow>)>, StoreError>>;

    /// Writes rows of `source_cursor` before the first batch. Each row comes with `applied` as it was read
    /// (`None`: no row); if it has moved since, the call fails. A `settled` in a row is an operator's
    /// decision that takes effect with this write and is deleted.
    fn store_cursors(
        &mut self,
        rows: &[(Partition, Option<NextOffset>, CursorRow)],
    ) -> impl Future<Output = Result<(), StoreError>>;

    /// Runs one transaction: moves the cursors under their guard, claims the message ids, writes the rows.
    /// Returns the outcomes of the batch. If it fails or is dropped, the transaction may still have been
    /// committed.
    fn write(
        &mut self,
        batch: &Batch,
        moves: &[CursorMove],
    ) -> impl Future<Output = Result<(Outcomes, Answer, WriteStats), StoreError>>;

    /// Moves cursors without a batch.
    fn move_cursors(&mut self, moves: &[CursorMove]) -> impl Future<Output = Result<(), StoreError>>;
}
