//! What can happen: the kinds of faults, where each may occur, how often, and how soon it is to be over.

use std::time::Duration;

use clap::ValueEnum;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::episode::{Lab, SESSION_TIMEOUT, Stage};

/// One kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub enum Fault {
    /// SIGKILL at a named step of a batch, or of taking partitions up
    KillAtStep,
    /// SIGKILL at any moment
    KillAnywhere,
    /// SIGKILL of all instances at once
    KillAll,
    /// SIGSTOP at any moment, past the session time limit, and back
    Zombie,
    /// SIGSTOP at a named step, past the session time limit, and back
    ZombieAtStep,
    /// An instance joins while batches are in flight, and leaves again, in order or not
    PartialRevoke,
    /// An instance dies, or hangs, when it is told to give partitions away
    RevokeAtStep,
    /// Restarts one by one
    RollingRestart,
    /// Restarts one by one while the schema becomes newer
    RollingUpgrade,
    /// A second daemon with the same instance id
    SameInstanceId,
    /// Postgres stops without a checkpoint and starts again
    PostgresImmediate,
    /// SIGKILL of all of Postgres's processes
    PostgresKill,
    /// SIGSTOP of all of Postgres's processes, and back
    PostgresPause,
    /// Backends are terminated again and again, before, in and after COMMIT
    BackendsTerminated,
    /// The database is replaced by an older copy beside running daemons
    DatabaseRestored,
    /// A standby that lacks the last commits is promoted
    StandbyPromoted,
    /// The database's disk runs full
    DiskFull,
    /// All connections to Postgres are cut
    ConnectionsCut,
    /// Nothing gets through to Postgres, and nobody says so
    BlackHole,
    /// Connections to Postgres die and the daemon's side is never told
    HalfOpen,
    /// The reply to a COMMIT is lost with its connection
    SwallowedCommit,
    /// A COMMIT is lost with its connection
    LostCommit,
    /// A connection is lost, and its COMMIT arrives later
    LateCommit,
    /// SIGKILL of a broker, and a restart
    BrokerKill,
    /// A broker stops in order and starts again
    BrokerStop,
    /// SIGSTOP of a broker, and back
    BrokerPause,
    /// SIGKILL of the broker that leads a partition of the input
    LeaderKill,
    /// SIGKILL of the broker that coordinates the group
    GroupCoordinatorKill,
    /// SIGKILL of the broker that coordinates a lane's transactions
    TransactionCoordinatorKill,
    /// The group's offsets are moved back or deleted after a drain
    OffsetsMovedBack,
    /// An output topic is deleted and made again
    OutputRecreated,
    /// The input topic is deleted and made again
    InputRecreated,
}

/// The longest recovery where no setting names another bound.
const RECOVERY_MAX: Duration = Duration::from_secs(15);

impl Fault {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// How often it is chosen, relative to the others; 0 where it cannot be.
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

    /// A single broker that was killed and comes back at once is the leader of its partitions, then of
    /// none, then of all again; what Kafka 4.3 has to finish of transactions in between it drops.
    pub fn may_spoil(self, lab: &Lab) -> bool {
        matches!(self, Fault::BrokerKill | Fault::BrokerStop | Fault::BrokerPause)
            && lab.servers.brokers() < 3
    }

    /// The longest that records may take to flow again, and which setting says so if it is not the rule.
    pub fn recovery_max(self) -> (Duration, &'static str) {
        match self {
            // A member that died is missed after the session time limit; its transaction, if nobody takes
            // its name again, ends by its own limit.
            Fault::PartialRevoke => (SESSION_TIMEOUT + RECOVERY_MAX, "session and transaction time limit"),
            // Nothing is ever heard of such a connection: only the limit of a transaction ends the wait.
            Fault::HalfOpen => (Duration::from_secs(60) + RECOVERY_MAX, "limit of a database transaction"),
            _ => (RECOVERY_MAX, ""),
        }
    }
}
