//! `reconcile`: compares the log with rows and events, from outside, while the daemon runs.
//!
//! Both cursors are read first. Records below them are final: rows below `applied` are committed, and outputs
//! covered by the group's offset were committed in the same transaction. Everything read later contains them,
//! and records beyond the cursors are ignored. The log is processed in slices that fit into memory, each in
//! three passes: log, rows, outputs. All calls block; database calls use a handle of the runtime.

pub(crate) mod database;
mod hash;
pub(crate) mod judge;
mod log;
mod outputs;
mod range;
mod recheck;
mod report;
mod sums;
pub(crate) mod table;

use std::collections::{HashMap, HashSet};

use indicatif::ProgressBar;
use tokio::runtime::Handle;
use uuid::Uuid;

use self::database::Database;
use self::judge::{Outcome, judge, refused_by_other_settings};
use self::log::{Circumstances, Gathered};
use self::outputs::{Counted, Outputs};
use self::range::{settled_up_to, slices};
use self::recheck::{Evidence, Identified, Place, Suspects};
use self::table::{ENTRY_BYTES, Placed, Table};
use crate::config::Settings;
use crate::domain::columns::from_postgres_timestamp;
use crate::domain::cursor::{Decision, LogBounds, Mode};
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::domain::wire::Rules;
use crate::error::CommandError;
use crate::kafka::scan::{ScanRange, Scanner};
use crate::postgres::binding::{self, BindingError};
use crate::resolution::{self, View};

pub use self::hash::java_partition_hash;
pub(crate) use self::outputs::source_place;
pub(crate) use self::range::Exempt;
pub use self::report::{Compared, Finding, Findings, Report};
pub use self::sums::{Sum, Sums};

/// A slice is retried if records leave a topic, or a generation of claims is dropped, while it is read.
const TRIES_MAX: u32 = 3;

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

/// Progress of a comparison, shown to the user.
pub struct Progress(ProgressBar);

impl Progress {
    /// Creates a progress display on this bar.
    pub fn on(bar: ProgressBar) -> Self {
        Self(bar)
    }

    /// Adds to the total amount of work.
    pub(crate) fn more(&self, length: u64) {
        self.0.inc_length(length);
    }

    /// Adds to the completed work.
    pub(crate) fn advance(&self, count: u64) {
        self.0.inc(count);
    }

    /// Sets the completed work.
    pub(crate) fn at(&self, position: u64) {
        self.0.set_position(position);
    }

    /// Sets the name of the current step.
    pub(crate) fn say(&self, what: &'static str) {
        self.0.set_message(what);
    }
}

/// Reasons why a slice could not be compared.
#[derive(Debug)]
enum Fault {
    /// A topic could not be read, for example because of retention; a retry may succeed.
    Scan(String),
    /// Claims were dropped while they were looked up.
    Pruned,
    /// Any other failure; not retried.
    Failed(CommandError),
}

impl From<CommandError> for Fault {
    fn from(failure: CommandError) -> Self {
        Self::Failed(failure)
    }
}

impl From<Fault> for CommandError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Scan(message) => Self::failed(message),
            Fault::Pruned => Self::failed("generations of idempotency were dropped on every try"),
            Fault::Failed(failure) => failure,
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
    progress: &Progress,
) -> Result<Report, CommandError> {
    progress.say("cursors");
    // The cursors must be read before everything else; see the module comment.
    let view = runtime.block_on(resolution::view(settings))?;
    let session = Comparison::open(settings, runtime, wanted, progress, &view)?;
    session.compare(&view)
}

struct Comparison<'a> {
    settings: &'a Settings,
    wanted: &'a Wanted,
    progress: &'a Progress,
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
        progress: &'a Progress,
        view: &View,
    ) -> Result<Self, CommandError> {
        let kafka = &settings.kafka;
        let database = Database::open(runtime, &settings.postgres.url)?;
        let bound =
            binding::is_bound_to(database.client(), &kafka.group_id, view.identity.topic_id, kafka.publish);
        runtime.block_on(bound).map_err(|error| match error {
            BindingError::Database(_) => CommandError::failed(error.to_string()),
            BindingError::Identity(mismatch) => CommandError::person_must_decide(mismatch.to_string()),
        })?;
        let exempt = Exempt::of(&database.skips(view.identity.topic_id)?);
        let archived_before = match settings.retention.payment_months {
            Some(months) => database.archived_before(months)?,
            None => None,
        };
        let outputs = match kafka.publish {
            true => Some(Outputs::open(kafka, view.identity.topic_id)?),
            false => None,
        };
        let scanner =
            Scanner::new(kafka, &kafka.input_topic).map_err(|e| CommandError::failed(e.to_string()))?;
        let rules = settings.rules();
        Ok(Self { settings, wanted, progress, database, scanner, outputs, rules, exempt, archived_before })
    }

    fn compare(self, view: &View) -> Result<Report, CommandError> {
        let mut report = self.empty();
        let ranges = self.ranges(view, &mut report)?;
        let offsets_max = (self.wanted.memory_bytes / ENTRY_BYTES).min(log::UNCLAIMED_MAX);
        let offsets_max = i64::try_from(offsets_max).unwrap_or(i64::MAX);
        let slices = slices(&ranges, offsets_max);
        report.slices = slices.len();
        let offsets: i64 = ranges.iter().map(|r| r.to.0.saturating_sub(r.from.0)).sum();
        let outputs = self.outputs.as_ref().map_or(0, Outputs::len);
        self.progress.more(offsets.unsigned_abs().saturating_add(outputs * slices.len() as u64));
        let mut suspects = Suspects::default();
        for slice in slices {
            report.add(self.slice_with_tries(slice, &mut suspects)?);
        }
        self.resolve(suspects, &mut report)?;
        if self.wanted.looks_for_orphans {
            self.progress.say("orphans");
            report.orphans = Some(self.database.orphans(self.archived_before)?);
        }
        report.findings.named.sort();
        report.allowed.named.sort();
        Ok(report)
    }

    fn empty(&self) -> Report {
        let kafka = &self.settings.kafka;
        Report::new(
            &kafka.input_topic,
            &kafka.group_id,
            self.settings.postgres.url.to_string(),
            kafka.publish,
            self.wanted.limit,
        )
    }

    fn ranges(&self, view: &View, report: &mut Report) -> Result<Vec<ScanRange>, CommandError> {
        let wanted = self.wanted;
        let publishes = self.settings.kafka.publish;
        let mode = Mode { publishes, adopts_database: false };
        let all: Vec<Partition> = view.known.iter().map(|known| known.partition).collect();
        if let Some(unknown) = wanted.partitions.iter().find(|p| !all.contains(p)) {
            let topic = &self.settings.kafka.input_topic;
            return Err(CommandError::usage(format!("{topic} has no partition {unknown}")));
        }
        let asked = |time: Option<TimestampMs>| match time {
            Some(time) => self
                .scanner
                .positions_at(&all, time)
                .map(Some)
                .map_err(|e| CommandError::failed(e.to_string())),
            None => Ok(None),
        };
        let (since, until) = (asked(wanted.since)?, asked(wanted.until)?);
        let mut ranges = Vec::new();
        for (index, known) in view.known.iter().enumerate() {
            match view.decision(index, &mode) {
                Some(Decision::Stop(mismatch)) => {
                    return Err(CommandError::person_must_decide(mismatch.to_string()));
                }
                Some(Decision::Halt(_)) => report.halted += 1,
                Some(Decision::Go(_) | Decision::Prove { .. }) | None => {}
            }
            if !wanted.partitions.is_empty() && !wanted.partitions.contains(&known.partition) {
                continue;
            }
            let start = known.bounds.start;
            let settled = settled_up_to(known, &view.identity, publishes).unwrap_or(start);
            let mut from = start.max(wanted.from.unwrap_or(start));
            let mut to = settled.min(known.bounds.end);
            to = to.min(wanted.to.unwrap_or(to));
            if let Some(since) = &since {
                // No record with that timestamp or later: the range is empty.
                from = since.get(index).copied().flatten().map_or(to, |position| from.max(position));
            }
            if let Some(position) = until.as_ref().and_then(|until| until.get(index).copied().flatten()) {
                to = to.min(position);
            }
            let to = to.max(from);
            report.compared.push(Compared { partition: known.partition, from, to });
            ranges.push(ScanRange { partition: known.partition, from, to });
        }
        Ok(ranges)
    }

    fn slice_with_tries(
        &self,
        mut ranges: Vec<ScanRange>,
        suspects: &mut Suspects,
    ) -> Result<Report, CommandError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.slice(&ranges, suspects) {
                Ok(report) => return Ok(report),
                Err(Fault::Scan(_) | Fault::Pruned) if tries < TRIES_MAX => {}
                Err(fault) => return Err(fault.into()),
            }
            // Records removed by retention cannot be compared any more.
            let partitions: Vec<Partition> = ranges.iter().map(|r| r.partition).collect();
            let bounds = self.scanner.bounds(&partitions).map_err(|e| CommandError::failed(e.to_string()))?;
            for (range, bounds) in ranges.iter_mut().zip(bounds) {
                range.from = range.from.max(bounds.start).min(range.to);
            }
        }
    }

    /// Compares one slice. `suspects` is changed only at the end, when nothing can fail any more.
    fn slice(&self, ranges: &[ScanRange], suspects: &mut Suspects) -> Result<Report, Fault> {
        let mut report = self.empty();
        let pruned_until = self.database.pruned_until()?;
        let circumstances = Circumstances {
            rules: &self.rules,
            exempt: &self.exempt,
            pruned_until,
            archived_before: self.archived_before,
        };
        let mut table = Table::new(ranges);
        self.progress.say("log");
        let gathered =
            log::read(&self.scanner, ranges, &circumstances, &self.database, &mut table, self.progress)?;
        self.progress.say("rows");
        self.rows(ranges, &gathered, &mut table, &mut report)?;
        self.elsewhere(&gathered, &mut table)?;
        let counted = match &self.outputs {
            Some(outputs) => {
                self.progress.say("outputs");
                outputs.read(&mut table, self.wanted.limit, self.progress)?
            }
            None => Counted::new(0),
        };
        if self.database.pruned_until()? != pruned_until {
            return Err(Fault::Pruned);
        }
        self.judge(&table, &counted, suspects, &mut report);
        report.outputs = counted.outputs;
        report.events = counted.sums;
        report.foreign = counted.foreign;
        report.former += counted.former;
        report.findings.merge(counted.nowhere);
        Ok(report)
    }

    fn rows(
        &self,
        ranges: &[ScanRange],
        gathered: &Gathered,
        table: &mut Table,
        report: &mut Report,
    ) -> Result<(), CommandError> {
        let Some(times) = gathered.times else { return Ok(()) };
        self.database.payment_rows(ranges, times, |row| {
            match table.note_row(row.partition, row.offset, row.seen) {
                Placed::Outside => {}
                Placed::Former => report.former += 1,
                Placed::Nowhere => {
                    report.findings.push(row.partition, row.offset, "a row, but the log has no record there");
                }
                Placed::Here => {
                    if let Some((currency, millionths)) = row.amount {
                        report.rows.add(&currency, millionths);
                    }
                }
            }
        })
    }

    /// Looks for the ids of records that are not in the tables and whose claim may have been dropped: another
    /// record may have written the id.
    fn elsewhere(&self, gathered: &Gathered, table: &mut Table) -> Result<(), CommandError> {
        let is_open = |table: &mut Table, partition, offset| {
            table
                .entry(partition, offset)
                .is_some_and(|e| e.circumstances.is_prunable && e.found.metadata.count == 0)
        };
        let open: Vec<&(Partition, Offset, Uuid)> =
            gathered.unclaimed.iter().filter(|(p, o, _)| is_open(table, *p, *o)).collect();
        if open.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = open.iter().map(|(_, _, id)| *id).collect();
        let written: HashSet<Uuid> = self.database.written_ids(&ids)?.into_iter().collect();
        for (partition, offset, id) in open {
            if let Some(entry) = table.entry(*partition, *offset) {
                entry.circumstances.is_elsewhere = written.contains(id);
            }
        }
        Ok(())
    }

    fn judge(&self, table: &Table, counted: &Counted, suspects: &mut Suspects, report: &mut Report) {
        for (partition, offset, entry) in table.iter() {
            let is_cut_off = |topic| counted.is_cut_off(topic, partition, offset, entry.key);
            let verdict = judge(entry, self.settings.kafka.publish, is_cut_off);
            report.records += 1;
            *report.outcomes.entry(verdict.outcome).or_default() += 1;
            report.untold += u64::from(verdict.untold);
            if verdict.outcome == Outcome::Written {
                let currency = std::str::from_utf8(&entry.currency).unwrap_or_default();
                report.log.add(currency, i128::from(entry.amount).saturating_mul(100));
            }
            if verdict.wrongs.is_empty() {
                if let Some(reason) = refused_by_other_settings(entry, self.settings.kafka.publish) {
                    let text =
                        format!("dead-lettered as {}; by the current settings it is valid", reason.as_str());
                    report.allowed.push(partition, offset, text);
                }
                continue;
            }
            if suspects.take(partition, offset, entry, &verdict) {
                continue;
            }
            for wrong in &verdict.wrongs {
                report.findings.push(partition, offset, wrong.to_string());
            }
        }
    }

    fn resolve(&self, suspects: Suspects, report: &mut Report) -> Result<(), CommandError> {
        if suspects.is_empty() {
            return Ok(());
        }
        self.progress.say("rechecking");
        let mut evidence = Evidence { identified: self.identify(&suspects.places())?, ..Evidence::default() };
        let ids: HashSet<Uuid> = evidence.identified.values().map(|i| i.message_id).collect();
        let claims = self.database.claims(&ids.iter().copied().collect::<Vec<_>>())?;
        evidence.owners = claims
            .into_iter()
            .map(|(id, claimed)| {
                let owned_at = from_postgres_timestamp(claimed.created_at_us);
                (Uuid::from_bytes(id), (claimed.owner, owned_at))
            })
            .collect();
        if let Some(outputs) = &self.outputs {
            evidence.senders = outputs.senders(&ids)?;
            self.verify_senders(&mut evidence)?;
        }
        let window = self.settings.idempotency.window;
        suspects.resolve(&evidence, window, &mut report.allowed, &mut report.findings);
        Ok(())
    }
    fn identify(&self, places: &[Place]) -> Result<HashMap<Place, Identified>, CommandError> {
        let found = log::identify(&self.scanner, places, &self.rules)?;
        Ok(found
            .into_iter()
            .map(|(partition, offset, message_id, timestamp)| {
                ((partition, offset), Identified { message_id, timestamp })
            })
            .collect())
    }

    /// A read event counts as a record's only if the record has that message id, or has left the log.
    fn verify_senders(&self, evidence: &mut Evidence) -> Result<(), CommandError> {
        let (_, partitions) = self.scanner.describe().map_err(|e| CommandError::failed(e.to_string()))?;
        let bounds = self.scanner.bounds(&partitions).map_err(|e| CommandError::failed(e.to_string()))?;
        let bounds: HashMap<Partition, LogBounds> = partitions.into_iter().zip(bounds).collect();
        let (mut there, mut gone) = (Vec::new(), HashSet::new());
        // The `source` header can be written by anyone.
        for (partition, offset) in evidence.senders.values().flatten() {
            match bounds.get(partition) {
                Some(log) if log.start.is_past(*offset) => {
                    gone.insert((*partition, *offset));
                }
                Some(log) if log.end.is_past(*offset) => there.push((*partition, *offset)),
                _ => {}
            }
        }
        let found = self.identify(&there)?;
        for (id, senders) in &mut evidence.senders {
            senders.retain(|s| gone.contains(s) || found.get(s).is_some_and(|i| i.message_id == *id));
        }
        Ok(())
    }
}
