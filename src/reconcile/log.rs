//! First pass over a slice: parses every record of the log by the daemon's rules and looks up its claim.

use std::ops::ControlFlow;

use uuid::Uuid;

use super::database::{Claimed, Database};
use super::hash;
use super::range::Exempt;
use super::sums::numeric_millionths;
use super::table::{Claim, Entry, Hashes, Notes, Table};
use super::{Fault, Progress};
use crate::domain::batch::{Batch, PaymentView};
use crate::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use crate::domain::wire::{self, Rules};
use crate::error::CommandError;
use crate::kafka::scan::{ScanRange, Scanner};

/// Maximum number of records that are parsed and looked up together.
const CHUNK_RECORDS_MAX: usize = 5_000;
/// Maximum bytes of records that are parsed and looked up together.
const CHUNK_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Maximum number of unclaimed records of a slice; their ids are kept and looked up in the tables.
pub(super) const UNCLAIMED_MAX: usize = 2_000_000;

/// Inputs that are the same for all slices.
pub(super) struct Circumstances<'a> {
    /// Validation rules of the daemon.
    pub rules: &'a Rules,
    /// Records that operators skipped.
    pub exempt: &'a Exempt,
    /// See [`Database::pruned_until`].
    pub pruned_until: Option<TimestampMs>,
    /// See [`Database::archived_before`].
    pub archived_before: Option<TimestampMs>,
}

/// Results of the pass besides the table.
#[derive(Default)]
pub(super) struct Gathered {
    /// Earliest and latest timestamp of rows of these records.
    pub times: Option<(TimestampMs, TimestampMs)>,
    /// Valid records whose id is not claimed, with the id.
    pub unclaimed: Vec<(Partition, Offset, Uuid)>,
}

/// Reads the log of a slice into the table.
pub(super) fn read(
    scanner: &Scanner,
    ranges: &[ScanRange],
    circumstances: &Circumstances<'_>,
    database: &Database,
    table: &mut Table,
    progress: &Progress,
) -> Result<Gathered, Fault> {
    let mut gathered = Gathered::default();
    let mut source = SourceBatch::new();
    let mut failure: Option<CommandError> = None;
    let mut flush = |source: &mut SourceBatch, table: &mut Table| {
        let taken = std::mem::take(source);
        progress.advance(taken.len() as u64);
        match settle(taken, circumstances, database, table, &mut gathered) {
            Ok(emptied) => {
                *source = emptied;
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let read = scanner.read(ranges, |record| {
        record.copy_into(&mut source);
        if source.len() >= CHUNK_RECORDS_MAX || source.bytes() >= CHUNK_BYTES_MAX {
            return flush(&mut source, table);
        }
        ControlFlow::Continue(())
    });
    let flow = match read {
        Ok(ControlFlow::Continue(())) if !source.is_empty() => Ok(flush(&mut source, table)),
        other => other,
    };
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    // Only the failure above stops the scan.
    let _ = flow.map_err(|e| Fault::Scan(e.to_string()))?;
    Ok(gathered)
}

fn settle(
    source: SourceBatch,
    circumstances: &Circumstances<'_>,
    database: &Database,
    table: &mut Table,
    gathered: &mut Gathered,
) -> Result<SourceBatch, CommandError> {
    // Only the encoded rows and outputs are used; without claims the cursors do not matter.
    let batch = Batch::assemble(source, Vec::new(), circumstances.rules);
    let ids: Vec<Uuid> = (0..batch.len())
        .filter_map(|i| batch.payment_view(i))
        .map(|p| Uuid::from_bytes(p.message_id))
        .collect();
    let claims = database.claims(&ids)?;
    for index in 0..batch.len() {
        let Some(view) = batch.published_view(index) else { continue };
        let (partition, offset) = (view.record.partition, view.record.offset);
        let mut notes = Notes {
            is_given_up: circumstances.exempt.is_given_up(partition, offset),
            is_rewound: circumstances.exempt.is_rewound(partition, offset),
            ..Notes::default()
        };
        let mut hashes =
            Hashes { letter: hash::dead_letter(view.record.key, view.record.value), ..Hashes::default() };
        if let Some(timestamp) = view.record.timestamp
            && (wire::TIMESTAMP_MIN..=wire::TIMESTAMP_MAX).contains(&timestamp)
        {
            let (first, last) = gathered.times.unwrap_or((timestamp, timestamp));
            gathered.times = Some((first.min(timestamp), last.max(timestamp)));
        }
        let mut entry = match (batch.payment_view(index), view.refusal) {
            (Some(payment), _) => {
                hashes.metadata = hash::row(payment.metadata);
                hashes.core = hash::row(payment.core);
                hashes.notes = payment.notes.map_or(0, hash::row);
                hashes.read = hash::message(view.record.key, Some(view.read_event));
                hashes.email =
                    view.email_event.map_or(0, |value| hash::message(view.record.key, Some(value)));
                notes.is_prunable =
                    circumstances.pruned_until.is_some_and(|until| payment.timestamp <= until);
                notes.is_archived =
                    circumstances.archived_before.is_some_and(|before| payment.timestamp < before);
                let claim = claim(partition, offset, &payment, claims.get(&payment.message_id), &mut notes);
                if claim == Claim::Nobody {
                    if gathered.unclaimed.len() >= UNCLAIMED_MAX {
                        return Err(CommandError::failed(format!(
                            "partition {partition}, offset {offset}: more than {UNCLAIMED_MAX} records before it have \
                             message ids that are not claimed; compare fewer records at once (--partition, \
                             --from-offset, --since, or a smaller --memory)"
                        )));
                    }
                    gathered.unclaimed.push((partition, offset, Uuid::from_bytes(payment.message_id)));
                }
                let mut entry = Entry::new(claim, notes, hashes);
                (entry.amount, entry.currency) = amount(payment.core);
                entry
            }
            (None, Some(refusal)) => Entry::new(Claim::Refused(refusal.reason), notes, hashes),
            (None, None) => continue,
        };
        entry.key = view.record.key.filter(|key| !key.is_empty()).map(hash::java_partition_hash);
        table.push(partition, offset, entry);
    }
    Ok(batch.into_memory().take_source())
}

fn claim(
    partition: Partition,
    offset: Offset,
    payment: &PaymentView<'_>,
    claimed: Option<&Claimed>,
    notes: &mut Notes,
) -> Claim {
    let Some(claimed) = claimed else { return Claim::Nobody };
    let owner = &claimed.owner;
    if owner.partition == partition && owner.offset == offset {
        notes.is_claim_wrong =
            owner.payload_hash != payment.payload_hash || !claimed.is_of(payment.timestamp);
        return Claim::Own;
    }
    notes.is_owned_later = owner.partition == partition && owner.offset > offset;
    if owner.payload_hash == payment.payload_hash { Claim::Same } else { Claim::Other }
}

/// Amount and currency of a row of `payment_core`: its fourth and fifth column.
fn amount(row: &[u8]) -> (u64, [u8; 3]) {
    let mut rest = row.get(2..).unwrap_or_default();
    let mut fields = std::iter::from_fn(|| {
        let (len, after) = rest.split_first_chunk::<4>()?;
        let (field, after) = after.split_at_checked(usize::try_from(i32::from_be_bytes(*len)).ok()?)?;
        rest = after;
        Some(field)
    })
    .skip(3);
    let millionths = fields.next().and_then(numeric_millionths).unwrap_or_default();
    let currency = fields.next().and_then(|c| c.try_into().ok()).unwrap_or_default();
    (u64::try_from(millionths / 100).unwrap_or_default(), currency)
}

/// Looks up ids and timestamps of single records for a recheck.
pub(super) fn identify(
    scanner: &Scanner,
    places: &[(Partition, Offset)],
    rules: &Rules,
) -> Result<Vec<(Partition, Offset, Uuid, TimestampMs)>, Fault> {
    let mut ranges: Vec<ScanRange> = Vec::new();
    for (partition, offset) in places {
        match ranges.iter_mut().find(|r| r.partition == *partition) {
            Some(range) => {
                range.from = range.from.min(NextOffset(offset.0));
                range.to = range.to.max(offset.next());
            }
            None => ranges.push(ScanRange {
                partition: *partition,
                from: NextOffset(offset.0),
                to: offset.next(),
            }),
        }
    }
    let wanted: std::collections::HashSet<(Partition, Offset)> = places.iter().copied().collect();
    let mut found = Vec::with_capacity(places.len());
    let mut one = SourceBatch::new();
    // The callback never stops the scan.
    let _ = scanner
        .read(&ranges, |record| {
            if wanted.contains(&(record.partition(), record.offset())) {
                one.clear();
                record.copy_into(&mut one);
                if let Some(view) = one.get(0)
                    && let Ok(payment) = wire::parse(&view, rules)
                {
                    found.push((
                        view.partition,
                        view.offset,
                        payment.message_id.to_uuid(),
                        payment.created_at,
                    ));
                }
            }
            ControlFlow::Continue(())
        })
        .map_err(|e| Fault::Scan(e.to_string()))?;
    Ok(found)
}
