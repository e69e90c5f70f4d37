//! `reconcile`: compares the log with rows and events, from outside, while the daemon runs.
//!
//! Both cursors are read first. Records below them are final: rows below `applied` are committed, and outputs
//! covered by the group's offset were committed in the same transaction. Everything read later contains them,
//! and records beyond the cursors are ignored. The log is processed in slices that fit into memory, each in
//! three passes: log, rows, outputs. All calls block; database calls use a handle of the runtime.

pub(crate) mod database;
mod hash;
pub(crate) mod judge;
pub(crate) mod log;
pub(crate) mod outputs;
pub(crate) mod range;
mod recheck;
pub(crate) mod report;
pub(crate) mod table;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tokio::runtime::Handle;
use uuid::Uuid;

use self::database::{Database, Months, add_months};
use self::judge::{Outcome, judge, refused_by_other_settings};
use self::log::{Identified, Slice, identify};
use self::outputs::{CutOff, Outputs};
use self::range::{Exempt, Gaps, select, settled_up_to, slices};
use self::recheck::{Evidence, Suspect};
use self::report::{Findings, NotCompared, Report};
use self::table::{ENTRY_BYTES, Place, Placed, Table};
use crate::config::Settings;
use crate::domain::cursor::{Decision, Known, LogBounds, Mode, decide};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::domain::wire::Rules;
use crate::error::CommandError;
use crate::failpoint;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};
use crate::kafka::topic_rules::{CLEANUP_POLICY, Role};
use crate::postgres::binding;
use crate::resolution::{self, View, not_bound};

/// A slice is retried if records leave a topic, or a generation of claims is dropped, while it is read.
const TRIES_MAX: u32 = 3;

/// How long a new leader may report an end of the log that lags behind the cursors.
const END_LAGS_MAX: Duration = Duration::from_secs(2);
const END_POLL: Duration = Duration::from_millis(200);

/// Maximum number of records to recheck, over all slices; further ones count as wrong.
const SUSPECTS_MAX: usize = 100_000;

/// Options of a comparison.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// Only these partitions; all if empty.
    pub partitions: Vec<Partition>,
    /// First offset to compare.
    pub from: Option<NextOffset>,
    /// Offset before which to stop.
    pub to: Option<NextOffset>,
    /// Start each partition at its first record with this timestamp or later.
    pub since: Option<TimestampMs>,
    /// Stop each partition at its first record with this timestamp or later.
    pub until: Option<TimestampMs>,
    /// Maximum memory for the records of a slice, in bytes.
    pub memory_bytes: usize,
    /// Maximum number of findings to list.
    pub limit: usize,
    /// Whether to look for rows without a payment.
    pub looks_for_orphans: bool,
}

/// Reasons why something could not be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// A topic could not be read, for example because of retention; a retry may succeed.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// Claims were dropped while they were looked up; a retry may succeed.
    #[error("generations of idempotency were dropped on every try")]
    Pruned,
    /// Any other failure; not retried.
    #[error(transparent)]
    Failed(#[from] CommandError),
}

impl From<Fault> for CommandError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Failed(failure) => failure,
            Fault::Scan(_) | Fault::Pruned => Self::failed(fault.to_string()),
        }
    }
}

/// Runs the comparison.
///
/// # Errors
/// If the log, the database or the outputs cannot be read, or if group, topic and database do not belong
/// together (exit code 3).
pub fn reconcile(
    settings: &Settings,
    runtime: &Handle,
    wanted: &Wanted,
    progress: &ProgressBar,
) -> Result<Report, CommandError> {
    progress.set_message("cursors");
    // The cursors must be read before everything else; see the module comment.
    let view = runtime.block_on(resolution::view(settings))?;
    let comparison = Comparison::open(settings, runtime, wanted, progress, &view)?;
    Ok(comparison.compare(&view)?)
}

struct Comparison<'a> {
    settings: &'a Settings,
    wanted: &'a Wanted,
    progress: &'a ProgressBar,
    database: Database,
    scanner: Scanner,
    outputs: Option<Outputs>,
    rules: Rules,
    exempt: Exempt,
    archived_before: Option<TimestampMs>,
}

impl<'a> Comparison<'a> {
    fn open(
        settings: &'a Settings,
        runtime: &Handle,
        wanted: &'a Wanted,
        progress: &'a ProgressBar,
        view: &View,
    ) -> Result<Self, Fault> {
        let kafka = &settings.kafka;
        let topic_id = view.identity.topic_id;
        let database = Database::open(runtime, &settings.postgres.url)?;
        let bound = binding::is_bound_to(&database.client, &kafka.group_id, topic_id, kafka.publish);
        runtime.block_on(bound).map_err(not_bound)?;
        let scanner = Scanner::new(kafka, &kafka.input_topic)?;
        let has_times = scanner.limits_timestamps(kafka);
        Ok(Self {
            settings,
            wanted,
            progress,
            exempt: database.exempt(topic_id)?,
            archived_before: database.archived_before(settings.retention.payment_months)?,
            outputs: kafka.publish.then(|| Outputs::open(kafka, topic_id, has_times)).transpose()?,
            scanner,
            rules: settings.rules(),
            database,
        })
    }

    fn compare(&self, view: &View) -> Result<Report, Fault> {
        let kafka = &self.settings.kafka;
        let mut not_compared = self.compacted();
        let (ranges, halted) = self.ranges(view, &mut not_compared)?;
        let offsets_max = (self.wanted.memory_bytes / ENTRY_BYTES).min(log::UNCLAIMED_MAX);
        let mut gaps = Gaps::new(&ranges);
        let slices = slices(&ranges, i64::try_from(offsets_max).unwrap_or(i64::MAX));
        let offsets: i64 = ranges.iter().map(|r| r.to.0.saturating_sub(r.from.0)).sum();
        self.progress.inc_length(offsets.unsigned_abs());
        let mut report = Report {
            topic: kafka.input_topic.clone(),
            group: kafka.group_id.clone(),
            database: self.settings.postgres.url.to_string(),
            partitions: ranges,
            not_compared,
            partitions_halted: halted,
            slices: slices.len(),
            outputs: kafka.publish.then(Default::default),
            findings: Findings::new(self.wanted.limit),
            allowed: Findings::new(self.wanted.limit),
            ..Report::default()
        };
        let (mut suspects, mut months) = (Vec::new(), Vec::new());
        for slice in slices {
            report = self.slice_with_tries(slice, &report, &mut suspects, &mut months, &mut gaps)?;
        }
        self.progress.set_message("gaps");
        let (gaps, mut tries) = (gaps.found(), 0);
        let removed = loop {
            tries += 1;
            match self.removed(&gaps) {
                Err(Fault::Scan(_)) if tries < TRIES_MAX => {}
                removed => break removed?,
            }
        };
        for gap in removed {
            report.not_compared(gap, "without a record, removed by compaction or lost", true);
        }
        self.resolve(suspects, &mut report)?;
        if self.wanted.looks_for_orphans {
            self.progress.set_message("orphans");
            report.orphans = Some(self.database.orphans(self.archived_before)?);
            for place in self.database.rows_of_other_months(&months)? {
                match self.exempt.is_rewound(place) {
                    true => report.of_lost_records += 1,
                    false => report
                        .findings
                        .push(place, "a row in payment_metadata, in a month that is not its own"),
                }
            }
        }
        report.findings.named.sort();
        report.allowed.named.sort();
        report.not_compared.sort();
        report.is_fine = report.findings.count == 0
            && report.orphans.is_none_or(|o| o.count() == 0)
            && !report.not_compared.iter().any(|part| part.may_hide_loss);
        Ok(report)
    }

    /// The topics that are compacted, or may be: what was removed from them cannot be compared.
    fn compacted(&self) -> Vec<NotCompared> {
        let kafka = &self.settings.kafka;
        let roles = CLEANUP_POLICY.roles.iter().filter(|role| kafka.publish || **role == Role::Input);
        let not_compared = |role: &Role| {
            let (may_hide_loss, why) = match self.scanner.violation(&CLEANUP_POLICY, kafka, *role) {
                Ok(violation) => (true, violation?),
                Err(error) => (false, format!("not known whether the topic is compacted: {error}")),
            };
            Some(NotCompared { may_hide_loss, why, range: None })
        };
        roles.filter_map(not_compared).collect()
    }

    /// The range of each partition, and the number of halted partitions.
    fn ranges(
        &self,
        view: &View,
        not_compared: &mut Vec<NotCompared>,
    ) -> Result<(Vec<ScanRange>, u64), Fault> {
        let wanted = self.wanted;
        let publishes = self.settings.kafka.publish;
        let mode = Mode { publishes, adopts_database: false };
        let all: Vec<Partition> = view.known.iter().map(|known| known.partition).collect();
        if let Some(unknown) = wanted.partitions.iter().find(|p| !all.contains(p)) {
            let topic = &self.settings.kafka.input_topic;
            return Err(CommandError::usage(format!("{topic} has no partition {unknown}")).into());
        }
        let positions =
            |time: Option<TimestampMs>| time.map(|time| self.scanner.positions_at(&all, time)).transpose();
        let (since, until) = (positions(wanted.since)?, positions(wanted.until)?);
        let settled: Vec<Option<NextOffset>> =
            view.known.iter().map(|known| settled_up_to(known, &view.identity, publishes)).collect();
        let high_watermarks = self.scanner.high_watermarks(&all)?;
        let began = Instant::now();
        let bounds = loop {
            let bounds = self.scanner.bounds(&all)?;
            let is_behind = settled.iter().zip(&bounds).any(|(settled, log)| *settled > Some(log.end));
            if !is_behind || began.elapsed() > END_LAGS_MAX {
                break bounds;
            }
            std::thread::sleep(END_POLL);
        };
        let mut ranges = Vec::new();
        let mut halted = 0;
        for (index, ((known, high_watermark), bounds)) in
            view.known.iter().zip(high_watermarks).zip(bounds).enumerate()
        {
            // The start as it was with the cursors: what is removed since can have been written since.
            let bounds = LogBounds { start: known.bounds.start, ..bounds };
            let known = Known { bounds, ..known.clone() };
            let halt = match decide(&known, &view.identity, &mode) {
                Decision::Stop(mismatch) => {
                    return Err(CommandError::person_must_decide(mismatch.to_string()).into());
                }
                Decision::Halt(reason) => Some(reason),
                Decision::Go(_) | Decision::ScanOutputs { .. } => None,
            };
            halted += u64::from(halt.is_some());
            if !wanted.partitions.is_empty() && !wanted.partitions.contains(&known.partition) {
                continue;
            }
            let mut asked = (wanted.from.unwrap_or(NextOffset(0)), wanted.to.unwrap_or(NextOffset(i64::MAX)));
            if let Some(since) = &since {
                // No record with that timestamp or later: the range is empty.
                asked.0 = since.get(index).copied().flatten().map_or(asked.1, |at| asked.0.max(at));
            }
            if let Some(position) = until.as_ref().and_then(|until| until.get(index).copied().flatten()) {
                asked.1 = asked.1.min(position);
            }
            let settled = settled.get(index).copied().flatten();
            let (range, not) = select(&known, settled, halt.as_ref(), high_watermark, asked);
            ranges.push(range);
            not_compared.extend(not);
        }
        Ok((ranges, halted))
    }

    /// Compares a slice. Returns the report with its results.
    fn slice_with_tries(
        &self,
        mut ranges: Vec<ScanRange>,
        before: &Report,
        suspects: &mut Vec<Suspect>,
        months: &mut Vec<Months>,
        gaps: &mut Gaps,
    ) -> Result<Report, Fault> {
        let mut tries = 0;
        let wanted = ranges.clone();
        loop {
            tries += 1;
            let mut report = before.clone();
            let moved = wanted.iter().zip(&ranges).filter(|(wanted, range)| wanted != range);
            let gone: Vec<ScanRange> =
                moved.map(|(wanted, range)| ScanRange { to: range.from, ..*wanted }).collect();
            for gone in &gone {
                report.not_compared(*gone, "left the log during the comparison", false);
            }
            match self.slice(&ranges, suspects, &mut report) {
                Ok((times, table)) => {
                    gone.into_iter().for_each(|gone| gaps.skip(gone));
                    table.entries().iter().for_each(|entry| gaps.pass(entry.place));
                    ranges.iter().for_each(|range| add_months(months, *range, times));
                    return Ok(report);
                }
                Err(Fault::Scan(_) | Fault::Pruned) if tries < TRIES_MAX => {}
                Err(fault) => return Err(fault),
            }
            // Records removed by retention cannot be compared any more.
            let partitions: Vec<Partition> = ranges.iter().map(|r| r.partition).collect();
            for (range, bounds) in ranges.iter_mut().zip(self.scanner.bounds(&partitions)?) {
                range.from = range.from.max(bounds.start).min(range.to);
            }
        }
    }

    /// Compares one slice, and returns the earliest and latest timestamp of its rows, and its records. `suspects` is
    /// changed only at the end, when nothing can fail any more.
    fn slice(
        &self,
        ranges: &[ScanRange],
        suspects: &mut Vec<Suspect>,
        report: &mut Report,
    ) -> Result<(Option<(TimestampMs, TimestampMs)>, Table), Fault> {
        self.progress.set_message("log");
        failpoint::hit("before_slice");
        let mut slice = Slice::read(self, ranges, self.database.pruned_until()?)?;
        self.progress.set_message("rows");
        self.rows(ranges, &mut slice, report)?;
        self.elsewhere(&mut slice)?;
        let mut cut_off = CutOff::default();
        if let Some(outputs) = &self.outputs {
            self.progress.set_message("outputs");
            cut_off = outputs.read(&mut slice.table, report, self.progress)?;
        }
        if self.database.pruned_until()? != slice.pruned_until {
            return Err(Fault::Pruned);
        }
        self.judge(&slice, &cut_off, suspects, report);
        Ok((slice.times, slice.table))
    }

    /// Those of the gaps that are not aborted transactions.
    fn removed(&self, gaps: &[ScanRange]) -> Result<Vec<ScanRange>, Fault> {
        let mut suspected: BTreeMap<Partition, ScanRange> = BTreeMap::new();
        for gap in gaps {
            suspected.entry(gap.partition).or_insert(*gap).to = gap.to;
        }
        if suspected.is_empty() {
            return Ok(Vec::new());
        }
        let mut suspected: Vec<ScanRange> = suspected.into_values().collect();
        // Retention may have removed some since.
        let partitions: Vec<Partition> = suspected.iter().map(|range| range.partition).collect();
        for (range, bounds) in suspected.iter_mut().zip(self.scanner.bounds(&partitions)?) {
            range.from = range.from.max(bounds.start).min(range.to);
        }
        let mut gaps = Gaps::new(&suspected);
        let kafka = &self.settings.kafka;
        // The callback never stops the scan.
        let _ = Scanner::uncommitted(kafka, &kafka.input_topic)?.read(&suspected, |record| {
            gaps.pass((record.partition(), record.offset()));
            ControlFlow::Continue(())
        })?;
        Ok(gaps.found())
    }

    fn rows(&self, ranges: &[ScanRange], slice: &mut Slice, report: &mut Report) -> Result<(), CommandError> {
        let Some(times) = slice.times else { return Ok(()) };
        self.database.payment_rows(ranges, times, |place, hashes, amount| {
            match slice.table.note(place, &hashes, None) {
                Placed::Outside => {}
                Placed::Former => report.of_lost_records += 1,
                Placed::Nowhere => report.findings.push(place, "a row, but the log has no record there"),
                Placed::Here => {
                    if let Some((currency, millionths)) = amount {
                        report.currency(&currency).rows.add(millionths);
                    }
                }
            }
        })
    }

    /// Looks for the ids of records that are not in the tables and whose claim may have been dropped: another
    /// record may have written the id.
    fn elsewhere(&self, slice: &mut Slice) -> Result<(), CommandError> {
        let table = &mut slice.table;
        slice.unclaimed.retain(|(place, _)| {
            table.entry(*place).is_some_and(|e| e.circumstances.is_prunable && !e.has_row())
        });
        if slice.unclaimed.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = slice.unclaimed.iter().map(|(_, id)| *id).collect();
        let written = self.database.written_ids(&ids)?;
        for (place, id) in &slice.unclaimed {
            if let Some(entry) = table.entry(*place) {
                // A later record of its partition cannot have been first.
                let is_elsewhere = |other: &Place| other.0 != place.0 || other.1 < place.1;
                let others = written.get(id);
                entry.circumstances.is_elsewhere = others.is_some_and(|o| o.iter().any(is_elsewhere));
            }
        }
        Ok(())
    }

    fn judge(&self, slice: &Slice, cut_off: &CutOff, suspects: &mut Vec<Suspect>, report: &mut Report) {
        let publishes = self.settings.kafka.publish;
        for entry in slice.table.entries() {
            let verdict = judge(entry, publishes, |part| cut_off.has(part, entry));
            report.records += 1;
            *report.outcomes.entry(verdict.outcome).or_default() += 1;
            if let Some(outputs) = &mut report.outputs {
                outputs.beyond_retention += verdict.untold;
            }
            if verdict.outcome == Outcome::Written {
                let currency = std::str::from_utf8(&entry.currency).unwrap_or_default();
                report.currency(currency).log.add(entry.amount);
            }
            if verdict.wrongs.is_empty() {
                if let Some(reason) = refused_by_other_settings(entry, publishes) {
                    let text =
                        format!("dead-lettered as {}; by the current settings it is valid", reason.as_str());
                    report.allowed.push(entry.place, text);
                }
                continue;
            }
            match Suspect::of(entry, &verdict) {
                Some(suspect) if suspects.len() < SUSPECTS_MAX => suspects.push(suspect),
                _ => report.wrong(entry.place, &verdict.wrongs),
            }
        }
    }

    fn resolve(&self, suspects: Vec<Suspect>, report: &mut Report) -> Result<(), Fault> {
        if suspects.is_empty() {
            return Ok(());
        }
        self.progress.set_message("rechecking");
        let places = suspects.iter().map(|suspect| suspect.place).collect();
        let identified = identify(&self.scanner, &places, &self.rules)?;
        let ids: HashSet<Uuid> = identified.values().map(|i| i.message_id).collect();
        let claims = self.database.claims(&ids.iter().copied().collect::<Vec<_>>())?;
        let senders = match &self.outputs {
            Some(outputs) => self.verified(outputs.senders(&ids)?)?,
            None => HashMap::new(),
        };
        let evidence = Evidence { identified, claims, senders };
        for suspect in suspects {
            match suspect.explanation(&evidence, self.settings.idempotency.window) {
                Some(what) => report.allowed.push(suspect.place, what),
                None => report.wrong(suspect.place, &suspect.wrongs),
            }
        }
        Ok(())
    }

    /// A read event counts as a record's only if the record has that message id, or has left the log: the
    /// `source` header can be written by anyone.
    fn verified(&self, mut senders: HashMap<Uuid, Vec<Place>>) -> Result<HashMap<Uuid, Vec<Place>>, Fault> {
        let (_, partitions) = self.scanner.describe()?;
        let bounds: HashMap<Partition, LogBounds> =
            partitions.iter().copied().zip(self.scanner.bounds(&partitions)?).collect();
        let is_gone =
            |(partition, offset): &Place| bounds.get(partition).is_some_and(|log| log.start.is_past(*offset));
        let is_there = |place: &&Place| {
            !is_gone(place) && bounds.get(&place.0).is_some_and(|log| log.end.is_past(place.1))
        };
        let there: HashSet<Place> = senders.values().flatten().filter(is_there).copied().collect();
        let found: HashMap<Place, Identified> = identify(&self.scanner, &there, &self.rules)?;
        for (id, places) in &mut senders {
            places.retain(|place| is_gone(place) || found.get(place).is_some_and(|i| i.message_id == *id));
        }
        Ok(senders)
    }
}
