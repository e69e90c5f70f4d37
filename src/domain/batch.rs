//! A batch: records are parsed and encoded once; their outcomes are decided from the database's answer.
//!
//! Pure. [`Batch::assemble`] turns records into rows and events in one pass. Which of them are written and
//! published is known only after the claim, so every record keeps the ranges of its encoded bytes.

mod outcomes;
mod rows;

use std::ops::Range;

use bytes::Bytes;

pub use self::outcomes::{Answer, OutcomeCounts, Outcomes, Owner, Refused};
pub use self::rows::{Rows, TableRows, write_core_row, write_metadata_row, write_notes_row};
use crate::domain::outcome::Outcome;
use crate::domain::payment::Payment;
use crate::domain::record::{NextOffset, Offset, Partition, RecordView, SourceBatch, TimestampMs};
use crate::domain::wire::{self, Refusal, Rules};

/// How far a batch moves one partition's cursor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The partition.
    pub partition: Partition,
    /// `applied` as last read or written by this lane. Records below it are looked up, not claimed.
    pub seen: NextOffset,
    /// The position after the last record of this batch, or after the control records that follow it. It is
    /// below `seen` if records that are already written are read again to publish their events.
    pub reached: NextOffset,
    /// Timestamp of the last record before `reached`: `None` if the batch has no record there, `Some(None)`
    /// if that record has no timestamp.
    pub timestamp: Option<Option<TimestampMs>>,
}

impl Progress {
    /// `applied` after this batch: it never moves back.
    pub fn applied(&self) -> NextOffset {
        self.seen.max(self.reached)
    }
}

/// A valid payment of the batch, with the ranges of its encoded rows and events; those that it does not have
/// are empty.
#[derive(Clone, Debug)]
struct Candidate {
    message_id: [u8; 16],
    payload_hash: i64,
    timestamp: TimestampMs,
    rows: PerTable<Range<u32>>,
    read_event: Range<u32>,
    email_event: Range<u32>,
}

/// One value for each of `payment_core`, `payment_metadata` and `payment_notes`.
type PerTable<T> = [T; 3];

#[derive(Clone, Debug)]
struct Place {
    partition: Partition,
    offset: Offset,
    payment: Result<Candidate, Refusal>,
}

/// One message id to claim, with the columns of its `idempotency` row.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Index of the record in the batch.
    pub index: u32,
    /// The message id's 128 bits.
    pub message_id: [u8; 16],
    /// Partition of the claiming record.
    pub partition: Partition,
    /// Offset of the claiming record.
    pub offset: Offset,
    /// Hash of the payload.
    pub payload_hash: i64,
    /// The record's timestamp.
    pub timestamp: TimestampMs,
}

/// Records of one lane that are written in one database transaction.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    source: SourceBatch,
    places: Vec<Place>,
    progress: Vec<Progress>,
    rows: PerTable<Bytes>,
    notes_count: usize,
    read_events: Vec<u8>,
    email_events: Vec<u8>,
    /// Indices of valid records at or past `seen`, sorted by message id, offset and partition: the first of
    /// each id claims it.
    candidates: Vec<u32>,
    /// Indices of valid records below `seen`.
    lookups: Vec<u32>,
}

/// The buffers of a finished batch, reused by the next one: in steady state, batches neither allocate large
/// blocks nor touch new pages.
#[derive(Debug, Default)]
pub struct Memory {
    /// An empty batch.
    batch: Batch,
    /// Buffers for its rows.
    rows: PerTable<Vec<u8>>,
}

impl Memory {
    /// Takes out the empty source batch, to be filled with records.
    pub fn take_source(&mut self) -> SourceBatch {
        std::mem::take(&mut self.batch.source)
    }

    /// Reserves the estimated bytes of typical rows and events, so that the buffers rarely grow.
    fn reserve(&mut self, records: usize) {
        for (rows, bytes) in self.rows.iter_mut().zip([108, 112, 80]) {
            rows.reserve(records * bytes);
        }
        self.batch.read_events.reserve(records * 320);
        self.batch.email_events.reserve(records * 220);
        self.batch.places.reserve(records);
        self.batch.candidates.reserve(records);
    }

    fn encode(&mut self, payment: &Payment<'_>, record: &RecordView<'_>, rules: &Rules) -> Candidate {
        let id = payment.payment_id();
        let texts = wire::EventTexts::of(payment, id);
        let has_notes = payment.external_ref_id.is_some() || payment.comment.is_some();
        self.batch.notes_count += usize::from(has_notes);
        let [core, metadata, notes] = &mut self.rows;
        Candidate {
            message_id: *payment.message_id.as_bytes(),
            payload_hash: payment.payload_hash(),
            timestamp: payment.created_at,
            rows: [
                appended(core, |out| write_core_row(payment, id, out)),
                appended(metadata, |out| write_metadata_row(payment, id, record, out)),
                appended(notes, |out| {
                    if has_notes {
                        write_notes_row(payment, id, out);
                    }
                }),
            ],
            read_event: appended(&mut self.batch.read_events, |out| {
                wire::encode_read_event(payment, &texts, out);
            }),
            email_event: appended(&mut self.batch.email_events, |out| {
                if rules.sends_email(payment.status) {
                    wire::encode_email_event(payment, &texts, out);
                }
            }),
        }
    }
}

/// The range that `write` appends to `buffer`.
#[inline]
fn appended(buffer: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) -> Range<u32> {
    let start = buffer.len() as u32;
    write(buffer);
    start..buffer.len() as u32
}

fn part<'b>(buffer: &'b [u8], range: &Range<u32>) -> &'b [u8] {
    buffer.get(range.start as usize..range.end as usize).unwrap_or_default()
}

/// Returns the emptied vector for reuse, or a new one if `bytes` is still shared.
fn emptied(bytes: Bytes) -> Vec<u8> {
    let Ok(mut bytes) = bytes.try_into_mut() else { return Vec::new() };
    // Before the conversion, which moves the contents to the front.
    bytes.clear();
    bytes.into()
}

impl Batch {
    /// Parses and encodes `source`. `progress` has one entry for every partition of the batch, in any order.
    pub fn assemble(source: SourceBatch, progress: Vec<Progress>, rules: &Rules) -> Self {
        Self::assemble_in(Memory::default(), source, progress, rules)
    }

    /// As [`assemble`](Self::assemble), reusing the buffers of an earlier batch.
    pub fn assemble_in(
        mut memory: Memory,
        source: SourceBatch,
        mut progress: Vec<Progress>,
        rules: &Rules,
    ) -> Self {
        progress.sort_unstable_by_key(|p| p.partition);
        memory.reserve(source.len());
        for record in source.iter() {
            let payment = wire::parse(&record, rules).map(|payment| memory.encode(&payment, &record, rules));
            memory.batch.places.push(Place { partition: record.partition, offset: record.offset, payment });
        }
        let rows = memory.rows.map(Bytes::from);
        let mut batch = Self { source, progress, rows, ..memory.batch };
        batch.sort_candidates();
        batch
    }

    fn sort_candidates(&mut self) {
        self.candidates.clear();
        self.lookups.clear();
        for (index, place) in self.places.iter().enumerate() {
            if place.payment.is_ok() {
                if seen(&self.progress, place.partition).is_past(place.offset) {
                    self.lookups.push(index as u32);
                } else {
                    self.candidates.push(index as u32);
                }
            }
        }
        let places = &self.places;
        let key = |index: &u32| {
            let place = places.get(*index as usize)?;
            Some((place.payment.as_ref().ok()?.message_id, place.offset, place.partition))
        };
        self.candidates.sort_unstable_by_key(key);
    }

    /// The valid records at these indices.
    fn valid(&self, indices: &[u32]) -> impl Iterator<Item = (u32, &Place, &Candidate)> {
        indices.iter().filter_map(|index| {
            let place = self.places.get(*index as usize)?;
            Some((*index, place, place.payment.as_ref().ok()?))
        })
    }

    /// Records that the transaction was committed although its reply was lost: the cursors are where this
    /// batch moves them. From then on its records are looked up, not claimed.
    pub fn mark_committed(&mut self) {
        for progress in &mut self.progress {
            progress.seen = progress.applied();
        }
        self.sort_candidates();
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether the batch holds no record; it may still move cursors.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Bytes of keys, values and headers in the batch.
    pub fn source_bytes(&self) -> usize {
        self.source.bytes()
    }

    /// Progress of each partition, sorted by partition.
    pub fn progress(&self) -> &[Progress] {
        &self.progress
    }

    /// The ids to claim, each once and sorted, because two lanes that claim the same ids in different orders
    /// would deadlock. Of several records with one id, the first that was not refused claims it.
    pub fn claims(&self, refused: &Refused) -> impl Iterator<Item = Claim> {
        let mut previous = None;
        self.valid(&self.candidates).filter_map(move |(index, place, candidate)| {
            if previous == Some(candidate.message_id) || refused.contains_key(&index) {
                return None;
            }
            previous = Some(candidate.message_id);
            Some(Claim {
                index,
                message_id: candidate.message_id,
                partition: place.partition,
                offset: place.offset,
                payload_hash: candidate.payload_hash,
                timestamp: candidate.timestamp,
            })
        })
    }

    /// An upper bound on the number of claims.
    pub fn claims_max(&self) -> usize {
        self.candidates.len()
    }

    /// The ids of records below `seen`, whose owners are looked up in the database.
    pub fn lookups(&self) -> impl Iterator<Item = [u8; 16]> {
        self.valid(&self.lookups).map(|(_, _, candidate)| candidate.message_id)
    }

    /// The rows of the records whose outcome is [`Outcome::Written`].
    pub fn rows(&self, outcomes: &Outcomes) -> TableRows {
        let valid = self.candidates.len() + self.lookups.len();
        let is_written = |outcome: &Outcome| *outcome == Outcome::Written;
        let count = outcomes.iter().filter(|outcome| is_written(outcome)).count();
        if count == valid {
            // The usual case: every payment is new, so the encoded rows are used without copying.
            let [core, metadata, notes] = self.rows.clone();
            return TableRows {
                core: Rows { bytes: core, count },
                metadata: Rows { bytes: metadata, count },
                notes: Rows { bytes: notes, count: self.notes_count },
            };
        }
        let written = self.places.iter().zip(outcomes).filter(|(_, outcome)| is_written(outcome));
        self.copied_rows(count, written.filter_map(|(place, _)| place.payment.as_ref().ok()))
    }

    /// The rows of the records at these indices only.
    pub fn rows_at(&self, indices: &[u32]) -> TableRows {
        self.copied_rows(indices.len(), self.valid(indices).map(|(_, _, candidate)| candidate))
    }

    /// Copies the rows of these payments; there are at most `count_max`.
    fn copied_rows<'b>(
        &'b self,
        count_max: usize,
        payments: impl Iterator<Item = &'b Candidate>,
    ) -> TableRows {
        // The rows' share of the whole buffer plus an eighth, because rows differ in length.
        let mut copies = self.rows.each_ref().map(|whole| {
            let share = whole.len().saturating_mul(count_max) / self.places.len().max(1);
            (Vec::with_capacity(whole.len().min(share + share / 8)), 0)
        });
        for payment in payments {
            for ((copy, count), (whole, range)) in copies.iter_mut().zip(self.rows.iter().zip(&payment.rows))
            {
                copy.extend_from_slice(part(whole, range));
                *count += usize::from(!range.is_empty());
            }
        }
        let [core, metadata, notes] = copies.map(|(bytes, count)| Rows { bytes: bytes.into(), count });
        TableRows { core, metadata, notes }
    }

    /// The record at `index` with its events.
    pub fn published_view(&self, index: usize) -> Option<PublishedView<'_>> {
        let record = self.source.get(index)?;
        let (read_event, email_event, refusal) = match &self.places.get(index)?.payment {
            Ok(payment) => (
                part(&self.read_events, &payment.read_event),
                Some(part(&self.email_events, &payment.email_event)).filter(|event| !event.is_empty()),
                None,
            ),
            Err(refusal) => (&[][..], None, Some(refusal)),
        };
        Some(PublishedView { record, read_event, email_event, refusal })
    }

    /// The record at `index` with its rows, if it is a valid payment.
    pub fn payment_view(&self, index: usize) -> Option<PaymentView<'_>> {
        let payment = self.places.get(index)?.payment.as_ref().ok()?;
        let ([core, metadata, notes], [core_range, metadata_range, notes_range]) =
            (&self.rows, &payment.rows);
        Some(PaymentView {
            message_id: payment.message_id,
            payload_hash: payment.payload_hash,
            timestamp: payment.timestamp,
            core: part(core, core_range),
            metadata: part(metadata, metadata_range),
            notes: Some(part(notes, notes_range)).filter(|notes| !notes.is_empty()),
        })
    }

    /// The records as read from Kafka.
    pub fn source(&self) -> &SourceBatch {
        &self.source
    }

    /// Timestamps of about `count` records spread evenly over the batch.
    pub fn sample_timestamps(&self, count: usize) -> impl Iterator<Item = TimestampMs> {
        let step = (self.source.len() / count.max(1)).max(1);
        self.source.iter().step_by(step).filter_map(|r| r.timestamp)
    }

    /// Returns the emptied buffers for the next batch.
    pub fn into_memory(mut self) -> Memory {
        let rows = std::mem::take(&mut self.rows).map(emptied);
        self.source.clear();
        self.places.clear();
        self.notes_count = 0;
        self.read_events.clear();
        self.email_events.clear();
        Memory { batch: self, rows }
    }
}

/// One record with the events that may be published for it.
#[derive(Clone, Copy, Debug)]
pub struct PublishedView<'b> {
    /// The record as read from Kafka.
    pub record: RecordView<'b>,
    /// The read event; empty if the record is invalid.
    pub read_event: &'b [u8],
    /// The e-mail event, if the payment's status gets one.
    pub email_event: Option<&'b [u8]>,
    /// Why the record is invalid; `None` if it is valid.
    pub refusal: Option<&'b Refusal>,
}

/// A valid payment with its rows in binary COPY format, whatever its outcome.
#[derive(Clone, Copy, Debug)]
pub struct PaymentView<'b> {
    /// The message id's 128 bits.
    pub message_id: [u8; 16],
    /// Hash of the payload.
    pub payload_hash: i64,
    /// The record's timestamp.
    pub timestamp: TimestampMs,
    /// The `payment_core` row.
    pub core: &'b [u8],
    /// The `payment_metadata` row.
    pub metadata: &'b [u8],
    /// The `payment_notes` row; `None` without a reference or comment.
    pub notes: Option<&'b [u8]>,
}

fn seen(progress: &[Progress], partition: Partition) -> NextOffset {
    progress
        .binary_search_by_key(&partition, |p| p.partition)
        .ok()
        .and_then(|i| progress.get(i))
        .map_or(NextOffset(i64::MAX), |p| p.seen)
}

#[cfg(test)]
mod tests;
