//! How each fault is injected, and what is expected besides that nothing is lost or duplicated.

mod kafka;
mod postgres;
mod processes;
mod topics;

use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;

use crate::episode::Episode;
use crate::fault::Fault;
use crate::report::Checked;

/// A busy instance reaches a failpoint that it passes regularly within this time.
const REACHED_WITHIN: Duration = Duration::from_secs(30);

/// A fault that has ended, or a broker that stays down while recovery is measured.
pub struct Done {
    /// Start of the measured recovery.
    pub ended_at: Instant,
    pub detail: String,
    /// Broker to start again once records flow without it.
    pub dead_broker: Option<i32>,
    /// Recovery and result, if the fault changed the episode and checked the result itself. It is the last
    /// fault of its episode.
    pub verdict: Option<(Duration, Checked)>,
}

impl Done {
    fn at(ended_at: Instant, detail: impl Into<String>) -> Done {
        Done { ended_at, detail: detail.into(), dead_broker: None, verdict: None }
    }

    fn now(detail: impl Into<String>) -> Done {
        Done::at(Instant::now(), detail)
    }
}

/// Injects the fault and ends it.
pub fn inject(fault: Fault, episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    match fault {
        Fault::KillAtStep => processes::kill_at_step(episode, random),
        Fault::KillAnywhere => processes::kill_anywhere(episode, random),
        Fault::KillAll => processes::kill_all(episode, random),
        Fault::Zombie => processes::zombie(episode, random),
        Fault::ZombieAtStep => processes::zombie_at_step(episode, random),
        Fault::PartialRevoke => processes::partial_revoke(episode, random),
        Fault::RevokeAtStep => processes::revoke_at_step(episode, random),
        Fault::RollingRestart => processes::rolling_restart(episode, random),
        Fault::RollingUpgrade => processes::rolling_upgrade(episode, random),
        Fault::SameInstanceId => processes::same_instance_id(episode, random),
        Fault::PostgresImmediate => postgres::immediate(episode, random),
        Fault::PostgresKill => postgres::kill(episode, random),
        Fault::PostgresPause => postgres::pause(episode, random),
        Fault::BackendsTerminated => postgres::backends_terminated(episode, random),
        Fault::DatabaseRestored => postgres::restored(episode, random),
        Fault::StandbyPromoted => postgres::standby_promoted(episode, random),
        Fault::DiskFull => postgres::disk_full(episode, random),
        Fault::ConnectionsCut => postgres::connections_cut(episode, random),
        Fault::BlackHole => postgres::black_hole(episode, random),
        Fault::HalfOpen => postgres::half_open(episode),
        Fault::SwallowedCommit => postgres::swallowed_commit(episode),
        Fault::LostCommit => postgres::lost_commit(episode),
        Fault::LateCommit => postgres::late_commit(episode, random),
        Fault::BrokerKill => kafka::kill(episode, random),
        Fault::BrokerStop => kafka::stop(episode, random),
        Fault::BrokerPause => kafka::pause(episode, random),
        Fault::LeaderKill => kafka::leader_kill(episode, random),
        Fault::GroupCoordinatorKill => kafka::group_coordinator_kill(episode, random),
        Fault::TransactionCoordinatorKill => kafka::transaction_coordinator_kill(episode, random),
        Fault::OffsetsMovedBack => topics::offsets_moved_back(episode, random),
        Fault::OutputRecreated => topics::output_recreated(episode, random),
        Fault::InputRecreated => topics::input_recreated(episode, random),
    }
}

pub use kafka::mend;
