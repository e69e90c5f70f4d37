//! `--until-caught-up`

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::{RunError, ask, ticks};
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::group::Group;
use crate::kafka::offsets::{group_offsets, log_bounds};
use crate::telemetry::status::{Phase, StatusRegistry};

const TICK: Duration = Duration::from_millis(100);
/// Interval between reads of partitions that no lane of this process reports on.
const FOREIGN_TICK: Duration = Duration::from_secs(1);

/// Returns once every partition's committed offset has reached the end that it had at the start.
pub(super) async fn caught_up(
    group: &Group,
    status: &StatusRegistry,
    partitions: usize,
) -> Result<(), RunError> {
    let all: Vec<Partition> = (0..i32::try_from(partitions).unwrap_or(i32::MAX)).map(Partition).collect();
    let mut targets: BTreeMap<Partition, NextOffset> = loop {
        let wanted = all.clone();
        if let Ok(Ok(bounds)) = ask(group, move |group| log_bounds(group, &wanted)).await {
            // An empty partition is already caught up.
            let targets = all.iter().copied().zip(bounds);
            break targets.filter(|(_, b)| b.end > b.start).map(|(p, b)| (p, b.end)).collect();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
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
        if !foreign.is_empty() && Instant::now() >= foreign_at {
            foreign_at = Instant::now() + FOREIGN_TICK;
            let wanted = foreign.clone();
            if let Ok(Ok(offsets)) = ask(group, move |group| group_offsets(group, &wanted)).await {
                for (partition, offset) in foreign.iter().zip(offsets) {
                    if let (Some(offset), Some(target)) = (offset, targets.get(partition))
                        && offset.position >= *target
                    {
                        targets.remove(partition);
                    }
                }
            }
        }
        if targets.is_empty() {
            return Ok(());
        }
        let halted =
            |p: &Partition| assigned.get(p).is_some_and(|status| matches!(status.phase, Phase::Halted(_)));
        if targets.keys().all(halted) {
            return Err(RunError::Halted(format!(
                "caught up, except for {} halted partition(s); see `payment-writer cursors show`",
                targets.len()
            )));
        }
    }
}
