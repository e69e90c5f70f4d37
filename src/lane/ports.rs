//! The two sides of a lane as traits, so that a model of both can stand in for them.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::{Answer, Batch, Fates};
use crate::cursor::{CursorRow, GroupOffset, IdentityDoubt, LogBounds, Proof};
use crate::disposition::FailureClass;
use crate::intake::Intake;
use crate::publication::{OutputCounts, Publication, Published};
use crate::record::{NextOffset, Partition};

/// Tells the group that nothing of the revoked partitions is in flight any more.
pub struct RevokeDone(Box<dyn FnOnce() + Send>);

impl RevokeDone {
    /// `done` is called once the lane is finished, whether or not the group still waits for it.
    pub fn new(done: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(done))
    }

    /// The lane is finished with what was revoked.
    pub fn finish(self) {
        (self.0)();
    }
}

impl std::fmt::Debug for RevokeDone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RevokeDone")
    }
}

/// What the group tells a lane.
#[derive(Debug)]
pub enum LaneEvent {
    /// These partitions are now this lane's.
    Assigned(Vec<Partition>),
    /// These partitions go away.
    Revoked {
        /// Which.
        partitions: Vec<Partition>,
        /// They are gone already: nothing can be committed for them any more.
        is_lost: bool,
        /// The group waits (bounded) for this.
        done: RevokeDone,
    },
    /// An answer to a [`Question`].
    Answered {
        /// The question's.
        id: u64,
        /// Of each of its partitions.
        found: Result<Vec<Positions>, LogFailure>,
    },
    /// What is in gaps.
    GapsProved {
        /// As it was asked with.
        id: u64,
        /// Of each gap that was asked about.
        answers: Vec<(Gap, GapAnswer)>,
    },
    /// Finish what is in flight, publish it, and return.
    Drain,
}

/// Why the log could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LogFailure {
    /// It may work the next time.
    #[error("{message}")]
    Failed {
        /// What to do about it.
        class: FailureClass,
        /// What was being done, and what was said.
        message: String,
    },
    /// A person has to decide.
    #[error(transparent)]
    Identity(#[from] IdentityDoubt),
}

impl LogFailure {
    /// A failure that goes away by itself.
    pub fn passing(message: impl Into<String>) -> Self {
        Self::Failed { class: FailureClass::Passing, message: message.into() }
    }
}

/// Why a Kafka transaction did not take place, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum PublishFailure {
    /// It was aborted or never begun: nothing is visible, the same may be tried again.
    #[error("aborted: {message}")]
    Aborted {
        /// What to do about it.
        class: FailureClass,
        /// What failed.
        message: String,
    },
    /// The group does not know this member or its generation: wait for the rebalance.
    #[error("not a member of the group's current generation: {0}")]
    Fenced(String),
    /// Whether it was committed is not known: a new producer settles it, the group's offset tells.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// A person has to decide.
    #[error(transparent)]
    Identity(#[from] IdentityDoubt),
}

impl PublishFailure {
    /// An abort for a reason that goes away by itself.
    pub fn aborted(message: impl Into<String>) -> Self {
        Self::Aborted { class: FailureClass::Passing, message: message.into() }
    }
}

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct LedgerFailure {
    /// What to do about it. [`FailureClass::Record`]: rows of the batch are refused, and whether they are at fault can
    /// be told only together with others.
    pub class: FailureClass,
    /// The SQLSTATE, if the server gave one.
    pub sqlstate: Option<String>,
    /// What was being done, and what was said; never a value of a row.
    pub message: String,
    /// The database turned out to be another one.
    pub identity: Option<IdentityDoubt>,
}

/// What the outputs tell of one partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proved {
    /// The partition.
    pub partition: Partition,
    /// The position that was asked about.
    pub from: NextOffset,
    /// The answer.
    pub proof: Proof,
}

/// What a lane wants to know of partitions before it takes them up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Given back with the answer, so that an answer that came too late is told from one that counts.
    pub id: u64,
    /// The partitions.
    pub partitions: Vec<Partition>,
}

/// What the cluster says of one partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Positions {
    /// The partition.
    pub partition: Partition,
    /// The group's committed offset, read while no transaction that would change it was pending.
    pub group: Option<GroupOffset>,
    /// First offset and last stable offset, asked for after it.
    pub bounds: LogBounds,
}

/// A range that a reader passed over just after it was begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// The partition.
    pub partition: Partition,
    /// Where reading was begun.
    pub from: NextOffset,
    /// Where the first record or end was.
    pub to: NextOffset,
}

/// What is in a gap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GapAnswer {
    /// No record that a read_committed consumer sees.
    Empty,
    /// A record at this place, and none before it.
    Record(NextOffset),
    /// The log's start was moved into the gap or beyond it: nobody can tell any more.
    Removed,
    /// It could not be found out; it is asked again.
    Failed(String),
}

/// The input topic, the consumer group and the outputs, as one lane sees them.
pub trait Log {
    /// Asks in the background, and returns at once. The answer comes as [`LaneEvent::Answered`], always.
    fn ask(&mut self, question: Question);

    /// Finds out in the background what is in these gaps, with a client of its own. The answer comes as
    /// [`LaneEvent::GapsProved`], always.
    fn prove_gaps(&mut self, id: u64, gaps: Vec<Gap>);

    /// Finds out from the outputs which events of records at or after these positions were sent. Begins the
    /// search and returns at once; `None`: it is not done yet, ask again. What is told may be of an earlier
    /// question.
    fn prove(
        &mut self,
        wanted: &[(Partition, NextOffset)],
    ) -> impl Future<Output = Result<Option<Vec<Proved>>, LogFailure>>;

    /// Delivers these partitions from these positions on, and nothing that was fetched before. When it fails, all
    /// partitions have to be started again.
    fn start(
        &mut self,
        positions: &[(Partition, NextOffset)],
    ) -> impl Future<Output = Result<(), LogFailure>>;

    /// Delivers nothing more of these partitions. When it fails, all partitions have to be started again.
    fn stop(&mut self, partitions: &[Partition]) -> impl Future<Output = Result<(), LogFailure>>;

    /// Fetches by a client that is made anew: all partitions have to be started again.
    fn renew_fetching(&mut self);

    /// Hears what the fetching client has to tell, which it keeps until then: for when nothing can be taken in.
    fn listen(&self);

    /// Puts what is there into `intake`, waiting at most `wait` for the first item. May be dropped while
    /// it waits, without loss.
    fn fetch(&mut self, intake: &mut Intake, wait: Duration) -> impl Future<Output = ()>;

    /// Runs one Kafka transaction.
    fn publish(
        &mut self,
        publication: &Arc<Publication>,
    ) -> impl Future<Output = Result<(Published, OutputCounts, PublishTimes), PublishFailure>>;

    /// Replaces the producer; when it returns, no transaction of the old one is open.
    fn renew(&mut self) -> impl Future<Output = Result<(), LogFailure>>;
}

/// One partition's part of the cursor update that goes with a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CursorMove {
    /// The partition.
    pub partition: Partition,
    /// The guard.
    pub seen: NextOffset,
    /// New `applied`.
    pub applied: NextOffset,
    /// New `published`, if it is to be moved.
    pub published: Option<NextOffset>,
    /// As in [`Progress`](crate::batch::Progress).
    pub timestamp: Option<Option<crate::record::TimestampMs>>,
}

/// How long the parts of a database transaction took, and what its claims needed.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteStats {
    /// Cursors and claim.
    pub claim: Duration,
    /// COPY of the rows.
    pub copy: Duration,
    /// COMMIT.
    pub commit: Duration,
    /// Claims whose id had to be looked for in an older generation.
    pub claims_probed: u64,
    /// Claims whose id cannot be in any of the older generations.
    pub claims_spared: u64,
}

/// How long the steps of a Kafka transaction took.
#[derive(Clone, Copy, Debug, Default)]
pub struct PublishTimes {
    /// Handing the outputs to the client library.
    pub produce: Duration,
    /// The group's offsets.
    pub offsets: Duration,
    /// Sending the outputs until the brokers have answered.
    pub deliver: Duration,
    /// The commit.
    pub commit: Duration,
}

/// The database, as one lane sees it. Each call opens a new session when the last one broke.
pub trait Ledger {
    /// The cursors of these partitions, in their order.
    fn cursors(
        &mut self,
        partitions: &[Partition],
    ) -> impl Future<Output = Result<Vec<(Partition, Option<CursorRow>)>, LedgerFailure>>;

    /// Writes rows of `source_cursor` as they are to be before the first batch, unless `applied` was
    /// moved since it was read (`None`: there was no row). `settled` is the decision that was taken up
    /// by this, and is done with.
    fn store_cursors(
        &mut self,
        rows: &[(Partition, Option<NextOffset>, CursorRow)],
    ) -> impl Future<Output = Result<(), LedgerFailure>>;

    /// One transaction: guard and move the cursors, claim, write rows. Returns the fates of the batch.
    /// When it fails, or is dropped, the transaction may or may not have been committed.
    fn write(
        &mut self,
        batch: &Batch,
        moves: &[CursorMove],
    ) -> impl Future<Output = Result<(Fates, Answer, WriteStats), LedgerFailure>>;

    /// Moves cursors without a batch.
    fn move_cursors(&mut self, moves: &[CursorMove]) -> impl Future<Output = Result<(), LedgerFailure>>;
}
