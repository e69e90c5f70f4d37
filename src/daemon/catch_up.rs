//! `--until-caught-up`

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::{RunError, ask, ticks};
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::group::Group;
use crate::kafka::offsets::{group_offsets, high_watermarks, log_bounds};
use crate::telemetry::status::{Phase, StatusRegistry};

const TICK: Duration = Duration::from_millis(100);
/// Interval between reads of partitions that no lane of this process reports on.
const FOREIGN_TICK: Duration = Duration::from_secs(1);
/// Longest wait for partitions without records when nothing else is left to do. A cursor beyond the log's end halts
/// within half of it.
const EMPTY_MAX: Duration = Duration::from_secs(60);

/// What is to be reached. It stays the same when the daemon starts again, or that would never end under frequent reloads.
pub(super) struct Targets {
    ends: BTreeMap<Partition, NextOffset>,
    /// Partitions without records. They are done once they have a cursor at the end.
    empty: BTreeSet<Partition>,
    /// Since when only partitions without records and halted ones are left.
    only_empty_since: Option<Instant>,
    /// Last stable offset and high watermark of partitions with an open transaction.
    open: BTreeMap<Partition, (NextOffset, NextOffset)>,
}

/// Returns once every partition's committed offset has reached the end that it had at the first call.
pub(super) async fn caught_up(
    group: &Group,
    status: &StatusRegistry,
    partitions: usize,
    targets: &mut Option<Targets>,
) -> Result<(), RunError> {
    let targets = match targets {
        Some(targets) => targets,
        None => targets.insert(ends(group, partitions).await),
    };
    reached(group, status, targets).await
}

/// Asks for the present ends until the brokers answer.
async fn ends(group: &Group, partitions: usize) -> Targets {
    let all: Vec<Partition> = (0..i32::try_from(partitions).unwrap_or(i32::MAX)).map(Partition).collect();
    loop {
        let wanted = all.clone();
        let answer = ask(group, move |group| {
            let highs = high_watermarks(group, &wanted).unwrap_or_default();
            log_bounds(group, &wanted).map(|bounds| (highs, bounds))
        });
        if let Ok(Ok((highs, bounds))) = answer.await {
            let ends = all.iter().copied().zip(&bounds).map(|(partition, bounds)| (partition, bounds.end));
            let behind =
                ends.filter_map(|(p, end)| Some((p, end, *highs.get(&p).filter(|high| **high > end)?)));
            let open = behind.map(|(partition, end, high)| (partition, (end, high))).collect();
            let bounds = || all.iter().copied().zip(&bounds);
            let empty: BTreeSet<_> = bounds().filter(|(_, b)| b.end <= b.start).map(|(p, _)| p).collect();
            tracing::info!(
                partitions = all.len(),
                without_records = empty.len(),
                "runs until the partitions reach the ends that they have now"
            );
            let ends = bounds().map(|(p, b)| (p, b.end)).collect();
            return Targets { ends, empty, only_empty_since: None, open };
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn reached(group: &Group, status: &StatusRegistry, targets: &mut Targets) -> Result<(), RunError> {
    // Each start looks at all of them: it may be with another copy of the database.
    let Targets { ends, empty, only_empty_since, open } = targets;
    let mut targets = ends.clone();
    let mut ticks = ticks(TICK);
    let mut foreign_at = Instant::now() + FOREIGN_TICK;
    loop {
        ticks.tick().await;
        let assigned = status.partitions();
        targets.retain(|partition, target| {
            // In a restored or replaced database, the rows may be behind what was published.
            let live = assigned.get(partition).filter(|status| matches!(status.phase, Phase::Live));
            let reached = live.and_then(|status| status.applied.min(status.published));
            reached.is_none_or(|reached| reached < *target)
        });
        let foreign: Vec<Partition> = targets.keys().filter(|p| !assigned.contains_key(p)).copied().collect();
        // Before the first assignment, nobody knows whose they are. Others have a partition where this program
        // committed its offset.
        if !foreign.is_empty() && status.is_member() && Instant::now() >= foreign_at {
            foreign_at = Instant::now() + FOREIGN_TICK;
            let wanted = foreign.clone();
            if let Ok(Ok(offsets)) = ask(group, move |group| group_offsets(group, &wanted)).await {
                for (partition, offset) in foreign.iter().zip(offsets) {
                    if let (Some(offset), Some(target)) = (offset, targets.get(partition))
                        && offset.position >= *target
                        && offset.commit_metadata().is_some()
                    {
                        targets.remove(partition);
                    }
                }
            }
        }
        let halted =
            |p: &Partition| assigned.get(p).is_some_and(|status| matches!(status.phase, Phase::Halted(_)));
        if targets.keys().all(|p| empty.contains(p) || halted(p)) {
            let waited = only_empty_since.get_or_insert_with(Instant::now).elapsed();
            let count = targets.len();
            targets.retain(|p, _| waited < EMPTY_MAX || halted(p));
            if targets.len() < count {
                tracing::warn!(
                    partitions = count - targets.len(),
                    seconds = EMPTY_MAX.as_secs(),
                    "caught up, except that partitions without records were not started in this time; they may have \
                     no cursor yet"
                );
            }
        }
        if targets.is_empty() {
            report_unread(open, status);
            return Ok(());
        }
        if targets.keys().all(halted) {
            return Err(RunError::Halted(format!(
                "caught up, except for {} halted partition(s); see `payment-writer cursors show`",
                targets.len()
            )));
        }
    }
}

/// Logs how many records were not read because they are behind a transaction that was open at the start. `open`
/// has the last stable offset and the high watermark of each such partition, from the start.
fn report_unread(open: &BTreeMap<Partition, (NextOffset, NextOffset)>, status: &StatusRegistry) {
    let assigned = status.partitions();
    let unread = open.iter().map(|(partition, (end, high))| {
        let applied = assigned.get(partition).and_then(|status| status.applied);
        high.0 - applied.map_or(*end, |applied| applied.max(*end)).0
    });
    let unread: Vec<i64> = unread.filter(|records| *records > 0).collect();
    if !unread.is_empty() {
        tracing::warn!(
            records = unread.iter().sum::<i64>(),
            partitions = unread.len(),
            "caught up, except for records behind an open transaction of a producer"
        );
    }
}
