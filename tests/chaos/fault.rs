//! The kinds of faults: where each may occur, how often, and the time limit for recovery.

use std::time::Duration;

use clap::ValueEnum;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::episode::{Lab, SESSION_TIMEOUT, Stage};

/// One kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub enum Fault {
    /// SIGKILL at a failpoint of a batch, or of the recovery of partitions
    KillAtStep,
    /// SIGKILL at any moment
    KillAnywhere,
    /// SIGKILL of all instances at once
    KillAll,
    /// SIGSTOP at any moment, beyond the session timeout, then SIGCONT
    Zombie,
    /// SIGSTOP at a failpoint, beyond the session timeout, then SIGCONT
    ZombieAtStep,
    /// An instance joins while batches are in flight, and leaves again, gracefully or not
    PartialRevoke,
    /// An instance dies or hangs when partitions are revoked from it
    RevokeAtStep,
    /// Rolling restart
    RollingRestart,
    /// Rolling restart while the schema is upgraded
    RollingUpgrade,
    /// A second daemon with the same instance id
    SameInstanceId,
    /// Postgres stops without a checkpoint and starts again
    PostgresImmediate,
    /// SIGKILL of all of Postgres's processes
    PostgresKill,
    /// SIGSTOP of all of Postgres's processes, then SIGCONT
    PostgresPause,
    /// Backends are terminated repeatedly, before, in and after COMMIT
    BackendsTerminated,
    /// The database is replaced by an older copy under running daemons
    DatabaseRestored,
    /// A standby that lacks the last commits is promoted
    StandbyPromoted,
    /// The database's disk runs full
    DiskFull,
    /// All connections to Postgres are closed
    ConnectionsCut,
    /// Packets to Postgres are dropped silently
    BlackHole,
    /// Connections to Postgres die, and the daemon's side is not closed
    HalfOpen,
    /// The reply to a COMMIT and its connection are lost
    SwallowedCommit,
    /// A COMMIT and its connection are lost
    LostCommit,
    /// A connection is lost, and its COMMIT arrives later
    LateCommit,
    /// SIGKILL of a broker, and a restart
    BrokerKill,
    /// Clean stop and start of a broker
    BrokerStop,
    /// SIGSTOP of a broker, then SIGCONT
    BrokerPause,
    /// SIGKILL of the leader of an input partition
    LeaderKill,
    /// SIGKILL of the group coordinator
    GroupCoordinatorKill,
    /// SIGKILL of the transaction coordinator of a lane
    TransactionCoordinatorKill,
    /// The group's offsets are moved back or deleted after a drain
    OffsetsMovedBack,
    /// An output topic is deleted and created again
    OutputRecreated,
    /// The input topic is deleted and created again
    InputRecreated,
}

/// The longest recovery if no setting implies another limit.
const RECOVERY_MAX: Duration = Duration::from_secs(15);

impl Fault {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Relative weight of this kind; 0 where it is not possible.
    fn weight(self, stage: Stage, brokers: usize) -> u32 {
        let goes_back = u32::from(stage == Stage::Rewinding);
        let fills_up = u32::from(stage == Stage::SmallDisk);
        let is_replicated = u32::from(brokers >= 3);
        match self {
            Fault::KillAtStep => 12,
            Fault::SwallowedCommit | Fault::LostCommit | Fault::LateCommit => 5,
            Fault::KillAnywhere | Fault::ZombieAtStep | Fault::BackendsTerminated => 6,
            Fault::PartialRevoke | Fault::ConnectionsCut | Fault::PostgresImmediate => 5,
            Fault::KillAll | Fault::Zombie | Fault::BlackHole | Fault::RevokeAtStep => 4,
            Fault::BrokerKill | Fault::BrokerStop | Fault::BrokerPause => 4,
            Fault::PostgresKill | Fault::PostgresPause | Fault::SameInstanceId => 3,
            Fault::RollingRestart | Fault::OffsetsMovedBack => 3,
            Fault::RollingUpgrade => 2,
            Fault::HalfOpen | Fault::OutputRecreated | Fault::InputRecreated => 1,
            Fault::DatabaseRestored | Fault::StandbyPromoted => 14 * goes_back,
            Fault::DiskFull => 40 * fills_up,
            Fault::LeaderKill | Fault::GroupCoordinatorKill | Fault::TransactionCoordinatorKill => {
                12 * is_replicated
            }
        }
    }

    pub fn is_possible(self, stage: Stage, brokers: usize) -> bool {
        self.weight(stage, brokers) > 0
    }

    /// Chosen from `among`, or from all.
    pub fn choose(random: &mut ChaCha8Rng, among: &[Fault], stage: Stage, brokers: usize) -> Option<Fault> {
        let among = if among.is_empty() { Fault::value_variants() } else { among };
        let total: u32 = among.iter().map(|fault| fault.weight(stage, brokers)).sum();
        let mut at = if total > 0 { random.random_range(0..total) } else { return None };
        among.iter().copied().find(|fault| {
            let weight = fault.weight(stage, brokers);
            let is_it = at < weight;
            at = at.saturating_sub(weight);
            is_it
        })
    }

    /// A single broker that was killed and restarts at once is the leader of its partitions, then of none,
    /// then of all again; Kafka 4.3 drops the transactions that it has to complete in between.
    pub fn may_spoil(self, lab: &Lab) -> bool {
        matches!(self, Fault::BrokerKill | Fault::BrokerStop | Fault::BrokerPause)
            && lab.servers.brokers() < 3
    }

    /// Time limit for records to flow again, and the setting that it depends on if it is not the default.
    pub fn recovery_max(self) -> (Duration, &'static str) {
        match self {
            // A dead member is removed after the session timeout; its transaction, if nobody takes its
            // transactional id over, ends at the transaction timeout.
            Fault::PartialRevoke => (SESSION_TIMEOUT + RECOVERY_MAX, "session and transaction time limit"),
            // The daemon gets no error on such a connection: only the time limit of a transaction ends the
            // wait.
            Fault::HalfOpen => (Duration::from_secs(60) + RECOVERY_MAX, "limit of a database transaction"),
            _ => (RECOVERY_MAX, ""),
        }
    }
}
