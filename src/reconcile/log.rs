//! First pass over a slice: parses every record of the log by the daemon's rules and looks up its claim.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use uuid::Uuid;

use super::database::Claimed;
use super::report::money;
use super::table::{Claim, Entry, Hashes, Notes, Place, Table};
use super::{Comparison, Fault, hash};
use crate::domain::batch::{Batch, PaymentView};
use crate::domain::columns::postgres_timestamp;
use crate::domain::partitioner::java_partition_hash;
use crate::domain::publication::DEAD_LETTER_KEY_BYTES_MAX;
use crate::domain::record::{NextOffset, SourceBatch, TimestampMs};
use crate::domain::wire::{self, Rules};
use crate::error::CommandError;
use crate::kafka::librdkafka::NativeRecord;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};

/// Maximum number of records that are parsed and looked up together.
const CHUNK_RECORDS_MAX: usize = 5_000;
/// Maximum bytes of records that are parsed and looked up together.
const CHUNK_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Maximum number of unclaimed records of a slice; their ids are kept and looked up in the tables.
pub(super) const UNCLAIMED_MAX: usize = 2_000_000;

/// A slice of the log.
pub(super) struct Slice {
    /// See [`Database::pruned_until`](super::database::Database::pruned_until).
    pub pruned_until: Option<TimestampMs>,
    /// The records.
    pub table: Table,
    /// Earliest and latest timestamp of rows of these records.
    pub times: Option<(TimestampMs, TimestampMs)>,
    /// Valid records whose id is not claimed, with the id.
    pub unclaimed: Vec<(Place, Uuid)>,
}

impl Slice {
    /// Reads these ranges of the log.
    pub fn read(
        comparison: &Comparison<'_>,
        ranges: &[ScanRange],
        pruned_until: Option<TimestampMs>,
    ) -> Result<Self, Fault> {
        let table = Table::new(ranges);
        let mut slice = Self { pruned_until, table, times: None, unclaimed: Vec::new() };
        let mut source = SourceBatch::new();
        let mut outcome = Ok(());
        let read = comparison.scanner.read(ranges, |record| {
            record.copy_into(&mut source);
            if source.len() >= CHUNK_RECORDS_MAX || source.bytes() >= CHUNK_BYTES_MAX {
                outcome = slice.add(comparison, &mut source);
            }
            if outcome.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        outcome?;
        let _ = read?;
        slice.add(comparison, &mut source)?;
        slice.table.sort();
        Ok(slice)
    }

    /// Adds these records, and empties `source`.
    fn add(&mut self, comparison: &Comparison<'_>, source: &mut SourceBatch) -> Result<(), CommandError> {
        comparison.progress.inc(source.len() as u64);
        // Only the encoded rows and outputs are used; without claims the cursors do not matter.
        let batch = Batch::assemble(std::mem::take(source), Vec::new(), &comparison.rules);
        let payments = (0..batch.len()).filter_map(|index| batch.payment_view(index));
        let ids: Vec<Uuid> = payments.map(|payment| Uuid::from_bytes(payment.message_id)).collect();
        let claims = comparison.database.claims(&ids)?;
        for index in 0..batch.len() {
            let Some(view) = batch.published_view(index) else { continue };
            let record = &view.record;
            let place = (record.partition, record.offset);
            if let Some(time) =
                record.timestamp.filter(|t| (wire::TIMESTAMP_MIN..=wire::TIMESTAMP_MAX).contains(t))
            {
                let (first, last) = self.times.unwrap_or((time, time));
                self.times = Some((first.min(time), last.max(time)));
            }
            let mut notes = Notes {
                is_given_up: comparison.exempt.is_given_up(place),
                is_rewound: comparison.exempt.is_rewound(place),
                ..Notes::default()
            };
            let letter = hash::dead_letter(record.key, record.value);
            let mut entry = match (batch.payment_view(index), view.refusal) {
                (Some(payment), _) => {
                    let id = Uuid::from_bytes(payment.message_id);
                    notes.is_prunable = self.pruned_until.is_some_and(|until| payment.timestamp <= until);
                    notes.is_archived =
                        comparison.archived_before.is_some_and(|before| payment.timestamp < before);
                    let claim = claim(place, &payment, claims.get(&id), &mut notes);
                    if claim == Claim::Nobody {
                        self.note_unclaimed(place, id)?;
                    }
                    let hashes = Hashes {
                        metadata: hash::row(payment.metadata),
                        core: hash::row(payment.core),
                        notes: payment.notes.map_or(0, hash::row),
                        read: hash::message(record.key, Some(view.read_event)),
                        email: view.email_event.map_or(0, |value| hash::message(record.key, Some(value))),
                        letter,
                    };
                    Entry::new(place, claim, notes, hashes)
                }
                (None, Some(refusal)) => {
                    let claim = Claim::Refused(refusal.reason);
                    Entry::new(place, claim, notes, Hashes { letter, ..Hashes::default() })
                }
                (None, None) => continue,
            };
            if let Some((currency, amount)) = money(view.read_event) {
                entry.amount = amount;
                entry.currency = currency.as_bytes().try_into().unwrap_or_default();
            }
            let key = record.key.filter(|key| (1..=DEAD_LETTER_KEY_BYTES_MAX).contains(&key.len()));
            entry.key = key.map(java_partition_hash);
            entry.second = record.timestamp.and_then(|t| u32::try_from(t.0 / 1_000).ok()).unwrap_or_default();
            self.table.push(entry);
        }
        *source = batch.into_memory().take_source();
        Ok(())
    }

    fn note_unclaimed(&mut self, place: Place, id: Uuid) -> Result<(), CommandError> {
        if self.unclaimed.len() >= UNCLAIMED_MAX {
            let (partition, offset) = place;
            return Err(CommandError::failed(format!(
                "partition {partition}, offset {offset}: more than {UNCLAIMED_MAX} records before it have \
                 message ids that are not claimed; compare fewer records at once (--partition, \
                 --from-offset, --since, or a smaller --memory)"
            )));
        }
        self.unclaimed.push((place, id));
        Ok(())
    }
}

fn claim(place: Place, payment: &PaymentView<'_>, claimed: Option<&Claimed>, notes: &mut Notes) -> Claim {
    let Some(claimed) = claimed else { return Claim::Nobody };
    let is_same = claimed.payload_hash == payment.payload_hash;
    if claimed.place == place {
        notes.is_claim_wrong = !is_same || claimed.created_at_us != postgres_timestamp(payment.timestamp);
        return Claim::Own;
    }
    notes.is_owned_later = claimed.place.0 == place.0 && claimed.place.1 > place.1;
    if is_same { Claim::Same } else { Claim::Other }
}

/// Message id, payload and timestamp of a valid record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identified {
    /// Message id.
    pub message_id: Uuid,
    /// Hash of the payload.
    pub payload_hash: i64,
    /// Timestamp of the record.
    pub timestamp: TimestampMs,
}

impl Identified {
    /// Parses a record; `None` if it is invalid. `one` is a buffer.
    pub fn parse(record: &NativeRecord<'_>, one: &mut SourceBatch, rules: &Rules) -> Option<Self> {
        one.clear();
        record.copy_into(one);
        let payment = wire::parse(&one.get(0)?, rules).ok()?;
        Some(Self {
            message_id: payment.message_id.to_uuid(),
            payload_hash: payment.payload_hash(),
            timestamp: payment.created_at,
        })
    }
}

/// Reads single records again, for a recheck; invalid ones are omitted.
pub(super) fn identify(
    scanner: &Scanner,
    places: &HashSet<Place>,
    rules: &Rules,
) -> Result<HashMap<Place, Identified>, ScanError> {
    let mut ranges = BTreeMap::new();
    for (partition, offset) in places.iter().copied() {
        let one = ScanRange { partition, from: NextOffset(offset.0), to: offset.next() };
        let range = ranges.entry(partition).or_insert(one);
        (range.from, range.to) = (range.from.min(one.from), range.to.max(one.to));
    }
    let ranges: Vec<ScanRange> = ranges.into_values().collect();
    let mut found = HashMap::with_capacity(places.len());
    let mut one = SourceBatch::new();
    // The callback never stops the scan.
    let _ = scanner.read(&ranges, |record| {
        let place = (record.partition(), record.offset());
        if places.contains(&place)
            && let Some(identified) = Identified::parse(record, &mut one, rules)
        {
            found.insert(place, identified);
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}
