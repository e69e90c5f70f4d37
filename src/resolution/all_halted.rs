//! All halted partitions at once: proposes a decision for each, and checks a plan of them against the present
//! state.

use std::collections::BTreeMap;

use super::plan_file::{Found, Header, PlanFile, PlanLine};
use super::{HaltResolution, Plan, Unread, View, blocking, checked, is_ours, view};
use crate::config::Settings;
use crate::domain::cursor::{Decision, HaltReason, Known, Mode, OutputScan, decide};
use crate::domain::record::Partition;
use crate::error::CommandError;
use crate::kafka::output_scan;

/// The halted partitions, with what the outputs show of their events.
struct AllHalted {
    view: View,
    mode: Mode,
    reasons: BTreeMap<Partition, (Known, HaltReason)>,
}

fn header(settings: &Settings, view: &View) -> Header {
    Header {
        group: settings.kafka.group_id.clone(),
        topic: view.topic.clone(),
        topic_id: view.identity.topic_id,
        database_id: view.identity.database_id,
    }
}

fn found(known: &Known, reason: &HaltReason) -> Found {
    Found {
        applied: known.row.as_ref().map(|row| row.applied),
        published: known.row.as_ref().and_then(|row| row.published),
        group: known.group.as_ref().map(|group| group.position),
        halt_reason: reason.label().to_owned(),
    }
}

impl AllHalted {
    async fn find(settings: &Settings, mut view: View) -> Result<Self, CommandError> {
        let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
        let topic_id = view.identity.topic_id;
        is_ours(settings, &view).await?;
        // A lane scans the outputs before it halts one of these, and may not halt it then.
        let to_scan = view.known.iter().filter_map(|known| {
            let unscanned = Known { scan: OutputScan::NotScanned, ..known.clone() };
            match decide(&unscanned, &view.identity, &mode) {
                Decision::ScanOutputs { from } => Some((known.partition, from)),
                Decision::Halt(HaltReason::MovedForward { published, .. }) => {
                    Some((known.partition, published))
                }
                _ => None,
            }
        });
        let to_scan: Vec<_> = to_scan.collect();
        if !to_scan.is_empty() {
            let kafka = settings.kafka.clone();
            for scanned in blocking(move || output_scan::scan(&kafka, topic_id, &to_scan)).await? {
                if let Some(known) = view.known.iter_mut().find(|known| known.partition == scanned.partition)
                {
                    known.scan = scanned.scan;
                }
            }
        }
        let mut unread = view.probe(settings, &mode, None).await?;
        let mut reasons = BTreeMap::new();
        for known in &view.known {
            let reason = match (decide(known, &view.identity, &mode), unread.remove(&known.partition)) {
                (Decision::Halt(reason), _) | (_, Some(Unread::Unreadable(reason))) => reason,
                (Decision::Stop(mismatch), _) => {
                    return Err(CommandError::person_must_decide(mismatch.to_string()));
                }
                _ => continue,
            };
            reasons.insert(known.partition, (known.clone(), reason));
        }
        Ok(Self { view, mode, reasons })
    }

    /// The decision that loses no payment and sends no event twice, and why; or why there is none.
    fn decision(&self, known: &Known, reason: &HaltReason) -> Result<(HaltResolution, String), String> {
        let none = |advice: String| format!("no decision surely loses and doubles nothing: {advice}");
        let HaltReason::MovedForward { committed, applied, .. } = reason else {
            return Err(none(reason.advice(known.partition)));
        };
        // Where the daemon would resume if the group had no offset that another program committed.
        let unmoved = Known { group: None, ..known.clone() };
        let start = match decide(&unmoved, &self.view.identity, &self.mode) {
            // Only the outputs show which events were sent: the row may be of a restored database.
            Decision::Go(start) if matches!(known.scan, OutputScan::Sent(_)) => start,
            Decision::Halt(reason) => return Err(none(reason.advice(known.partition))),
            _ => return Err(none(reason.advice(known.partition))),
        };
        let published = start.publish_from;
        let decision = HaltResolution::Accept { published };
        checked(&self.view, known, &self.mode, reason.clone(), decision)
            .map_err(|error| none(error.message))?;
        let why = format!(
            "another program moved the group's offset to {committed}; records from {applied} on are not \
             written yet, and events were sent of records before {published} only"
        );
        Ok((decision, why))
    }
}

/// Proposes a decision for each halted partition.
pub async fn propose(settings: &Settings) -> Result<PlanFile, CommandError> {
    let view = view(settings).await?;
    let header = header(settings, &view);
    let all = AllHalted::find(settings, view).await?;
    let lines = all.reasons.values().map(|(known, reason)| {
        let (decision, why) = match all.decision(known, reason) {
            Ok((decision, why)) => (Some(decision), why),
            Err(why) => (None, why),
        };
        PlanLine { partition: known.partition, found: found(known, reason), decision, why }
    });
    Ok(PlanFile { header, time: jiff::Timestamp::now(), lines: lines.collect() })
}

/// Checks a plan as a whole. Returns its decisions with their reasons, in the order of the partitions.
///
/// # Errors
/// If it belongs to another group, topic or database; if the state of any of its partitions differs from it,
/// all of which are named; if any of its decisions cannot be applied.
pub async fn check<'f>(
    settings: &Settings,
    file: &'f PlanFile,
) -> Result<Vec<(Plan, &'f str)>, CommandError> {
    let view = view(settings).await?;
    let here = header(settings, &view);
    let others = file.header.fields().into_iter().zip(here.fields()).filter(|(plan, here)| plan != here);
    let others: Vec<String> =
        others.map(|((name, plan), (_, here))| format!("{name} {plan} instead of {here}")).collect();
    if !others.is_empty() {
        return Err(CommandError::usage(format!(
            "nothing was changed: the plan was made for {}",
            others.join(", ")
        )));
    }
    let all = AllHalted::find(settings, view).await?;
    let now = |line: &PlanLine| all.reasons.get(&line.partition).map(|(known, reason)| found(known, reason));
    let mut differences = String::new();
    for line in file.lines.iter().filter(|line| now(line).as_ref() != Some(&line.found)) {
        let now = now(line).map_or_else(|| "not halted".to_owned(), |found| found.to_string());
        differences
            .push_str(&format!("\npartition {}: planned for {}, now {now}", line.partition, line.found));
    }
    if !differences.is_empty() {
        return Err(CommandError::failed(format!(
            "nothing was changed: these partitions are not as in the plan; make a new one with cursors show \
             --plan{differences}"
        )));
    }
    let mut lines: Vec<&PlanLine> = file.lines.iter().collect();
    lines.sort_by_key(|line| line.partition);
    let plans = lines.into_iter().filter_map(|line| {
        let (known, reason) = all.reasons.get(&line.partition)?;
        let checked = checked(&all.view, known, &all.mode, reason.clone(), line.decision?);
        Some(checked.map(|plan| (plan, line.why.as_str())))
    });
    plans.collect()
}
