//! A batch: records are parsed and encoded once; their outcomes are decided from the database's answer.
//!
//! Pure. [`Batch::assemble`] turns records into rows and events in one pass. Which of them are written and
//! published is known only after the claim, so every record keeps the ranges of its encoded bytes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use uuid::Uuid;

use crate::domain::columns::RowWriter;
use crate::domain::outcome::{Outcome, SqlState};
use crate::domain::payment::Payment;
use crate::domain::record::{NextOffset, Offset, Partition, RecordView, SourceBatch, TimestampMs};
use crate::domain::wire::{self, Reason, Refusal, Rules};

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

/// The record that claimed a message id, as stored in `idempotency`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Partition of the owning record.
    pub partition: Partition,
    /// Offset of the owning record.
    pub offset: Offset,
    /// Hash of its payload.
    pub payload_hash: i64,
}

/// A valid payment of the batch.
#[derive(Clone, Debug)]
struct Candidate {
    message_id: [u8; 16],
    payload_hash: i64,
    timestamp: TimestampMs,
    core: Range<u32>,
    metadata: Range<u32>,
    notes: Range<u32>,
    read_event: Range<u32>,
    email_event: Range<u32>,
}

#[derive(Clone, Debug)]
enum Entry {
    Valid(Candidate),
    Refused(Refusal),
}

#[derive(Clone, Debug)]
struct Place {
    partition: Partition,
    offset: Offset,
    entry: Entry,
}

impl Place {
    fn is_owner(&self, owner: &Owner) -> bool {
        owner.partition == self.partition && owner.offset == self.offset
    }
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

impl Claim {
    /// Bytes of one encoded row: six columns with their lengths.
    pub const ROW_BYTES: usize = 74;

    /// Appends the `idempotency` row in binary COPY format, with the columns (message_id, source_offset,
    /// payload_hash, created_at, source_partition, date). `today` is the UTC date of the claim, in days since
    /// 2000-01-01.
    pub fn write_row(&self, today: i32, out: &mut Vec<u8>) {
        RowWriter::start(out, 6)
            .uuid(&self.message_id)
            .bigint(self.offset.0)
            .bigint(self.payload_hash)
            .timestamptz(self.timestamp)
            .integer(self.partition.0)
            .date(today);
    }
}

/// Appends a payment's `payment_core` row in binary COPY format. `id` is [`Payment::payment_id`].
pub fn write_core_row(payment: &Payment<'_>, id: Uuid, out: &mut Vec<u8>) {
    RowWriter::start(out, 7)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .bigint(payment.cust_id)
        .numeric_millionths(payment.amount.millionths())
        .text(Some(payment.currency.code()))
        .smallint(payment.status.code())
        .text(Some(&payment.payment_type));
}

/// Appends a payment's `payment_metadata` row, with the partition and offset of its record.
pub fn write_metadata_row(payment: &Payment<'_>, id: Uuid, record: &RecordView<'_>, out: &mut Vec<u8>) {
    RowWriter::start(out, 7)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .timestamptz(payment.created_at)
        .integer(1)
        .uuid(payment.message_id.as_bytes())
        .integer(record.partition.0)
        .bigint(record.offset.0);
}

/// Appends a payment's `payment_notes` row. Call it only if the payment has a reference or a comment.
pub fn write_notes_row(payment: &Payment<'_>, id: Uuid, out: &mut Vec<u8>) {
    RowWriter::start(out, 4)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .text(payment.external_ref_id.as_deref())
        .text(payment.comment.as_deref());
}

/// The database's answer to a batch's claims and lookups.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Owners of the ids that could not be claimed and of those that were looked up. An id of
    /// [`Batch::claims`] that is not in here was claimed by this transaction.
    pub owners: HashMap<[u8; 16], Owner>,
}

/// Records that the database refused one by one, by index in the batch, with the SQLSTATE.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Refused(BTreeMap<u32, SqlState>);

impl Refused {
    /// Adds the record at `index`.
    pub fn insert(&mut self, index: u32, sqlstate: SqlState) {
        self.0.insert(index, sqlstate);
    }

    /// Number of refused records.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Index and SQLSTATE of each refused record, by index.
    pub fn iter(&self) -> impl Iterator<Item = (u32, SqlState)> {
        self.0.iter().map(|(index, sqlstate)| (*index, *sqlstate))
    }

    fn contains(&self, index: u32) -> bool {
        !self.0.is_empty() && self.0.contains_key(&index)
    }
}

/// The outcomes of a batch's records, by index.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcomes(pub Vec<Outcome>);

/// Number of records of a batch by outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OutcomeCounts {
    /// Records written by this transaction.
    pub written: u64,
    /// Records already written in an earlier attempt.
    pub redelivered: u64,
    /// Duplicates.
    pub duplicate: u64,
    /// Dead letters, for any reason.
    pub dead_lettered: u64,
}

impl OutcomeCounts {
    /// Counts the outcomes.
    pub fn of(outcomes: &Outcomes) -> Self {
        let mut counts = Self::default();
        for outcome in &outcomes.0 {
            *match outcome {
                Outcome::Written => &mut counts.written,
                Outcome::WrittenBefore => &mut counts.redelivered,
                Outcome::Duplicate => &mut counts.duplicate,
                Outcome::DeadLetter(_) | Outcome::Rejected(_) => &mut counts.dead_lettered,
            } += 1;
        }
        counts
    }
}

/// Rows of one table in binary COPY format, without header and trailer.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The encoded rows.
    pub bytes: Bytes,
    /// Number of rows.
    pub count: usize,
}

/// The rows of the written payments, by table.
#[derive(Clone, Debug, Default)]
pub struct TableRows {
    /// `payment_core`
    pub core: Rows,
    /// `payment_metadata`
    pub metadata: Rows,
    /// `payment_notes`
    pub notes: Rows,
}

/// Records of one lane that are written in one database transaction.
#[derive(Clone, Debug)]
pub struct Batch {
    source: SourceBatch,
    places: Vec<Place>,
    progress: Vec<Progress>,
    core: Bytes,
    metadata: Bytes,
    notes: Bytes,
    notes_count: usize,
    read_events: Vec<u8>,
    email_events: Vec<u8>,
    /// Indices of valid records at or past `seen`, sorted by message id, offset and partition: the first of
    /// each id claims it.
    candidates: Vec<u32>,
    /// Indices of valid records below `seen`.
    lookups: Vec<u32>,
}

/// Returns the emptied vector for reuse, or a new one if `bytes` is still shared.
fn emptied(bytes: Bytes) -> Vec<u8> {
    bytes.try_into_mut().map_or_else(
        |_| Vec::new(),
        |mut bytes| {
            bytes.clear();
            bytes.into()
        },
    )
}

fn position(buffer: &[u8]) -> u32 {
    buffer.len() as u32
}

fn part<'b>(buffer: &'b [u8], range: &Range<u32>) -> &'b [u8] {
    buffer.get(range.start as usize..range.end as usize).unwrap_or_default()
}

/// The buffers of a finished batch, reused by the next one: in steady state, batches neither allocate large
/// blocks nor touch new pages.
#[derive(Debug, Default)]
pub struct Memory {
    source: SourceBatch,
    places: Vec<Place>,
    candidates: Vec<u32>,
    lookups: Vec<u32>,
    encoder: Encoder,
}

impl Memory {
    /// Takes out the empty source batch, to be filled with records.
    pub fn take_source(&mut self) -> SourceBatch {
        std::mem::take(&mut self.source)
    }
}

#[derive(Debug, Default)]
struct Encoder {
    core: Vec<u8>,
    metadata: Vec<u8>,
    notes: Vec<u8>,
    notes_count: usize,
    read_events: Vec<u8>,
    email_events: Vec<u8>,
}

impl Encoder {
    fn encode(&mut self, payment: &Payment<'_>, record: &RecordView<'_>, rules: &Rules) -> Candidate {
        let created_at = payment.created_at;
        let message_id = *payment.message_id.as_bytes();
        let id = payment.payment_id();
        let from = position(&self.core);
        write_core_row(payment, id, &mut self.core);
        let core = from..position(&self.core);
        let from = position(&self.metadata);
        write_metadata_row(payment, id, record, &mut self.metadata);
        let metadata = from..position(&self.metadata);
        let from = position(&self.notes);
        if payment.external_ref_id.is_some() || payment.comment.is_some() {
            write_notes_row(payment, id, &mut self.notes);
            self.notes_count += 1;
        }
        let notes = from..position(&self.notes);
        let from = position(&self.read_events);
        let texts = wire::EventTexts::of(payment, id);
        wire::encode_read_event(payment, &texts, &mut self.read_events);
        let read_event = from..position(&self.read_events);
        let from = position(&self.email_events);
        if rules.sends_email(payment.status) {
            wire::encode_email_event(payment, &texts, &mut self.email_events);
        }
        let email_event = from..position(&self.email_events);
        Candidate {
            message_id,
            payload_hash: payment.payload_hash(),
            timestamp: created_at,
            core,
            metadata,
            notes,
            read_event,
            email_event,
        }
    }
}

impl Batch {
    /// Parses and encodes `source`. `progress` has one entry for every partition of the batch, in any order.
    pub fn assemble(source: SourceBatch, progress: Vec<Progress>, rules: &Rules) -> Self {
        Self::assemble_in(Memory::default(), source, progress, rules)
    }

    /// As [`assemble`](Self::assemble), reusing the buffers of an earlier batch.
    pub fn assemble_in(
        memory: Memory,
        source: SourceBatch,
        mut progress: Vec<Progress>,
        rules: &Rules,
    ) -> Self {
        progress.sort_unstable_by_key(|p| p.partition);
        let Memory { mut encoder, mut places, mut candidates, lookups, .. } = memory;
        // Estimated bytes of a typical row or event, so that the buffers rarely grow.
        let records = source.len();
        encoder.core.reserve(records * 108);
        encoder.metadata.reserve(records * 112);
        encoder.notes.reserve(records * 80);
        encoder.read_events.reserve(records * 320);
        encoder.email_events.reserve(records * 220);
        places.reserve(records);
        candidates.reserve(records);
        for record in source.iter() {
            let entry = match wire::parse(&record, rules) {
                Ok(payment) => Entry::Valid(encoder.encode(&payment, &record, rules)),
                Err(refusal) => Entry::Refused(refusal),
            };
            places.push(Place { partition: record.partition, offset: record.offset, entry });
        }
        let mut batch = Self {
            source,
            places,
            progress,
            core: encoder.core.into(),
            metadata: encoder.metadata.into(),
            notes: encoder.notes.into(),
            notes_count: encoder.notes_count,
            read_events: encoder.read_events,
            email_events: encoder.email_events,
            candidates,
            lookups,
        };
        batch.sort_candidates();
        batch
    }

    fn sort_candidates(&mut self) {
        self.candidates.clear();
        self.lookups.clear();
        for (index, place) in self.places.iter().enumerate() {
            if let Entry::Valid(_) = place.entry {
                if seen(&self.progress, place.partition).is_past(place.offset) {
                    self.lookups.push(index as u32);
                } else {
                    self.candidates.push(index as u32);
                }
            }
        }
        let places = &self.places;
        let key = |index: &u32| places.get(*index as usize).map(|p| (message_id(p), p.offset, p.partition));
        self.candidates.sort_unstable_by_key(key);
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
        self.candidates.iter().filter_map(move |index| {
            let place = self.places.get(*index as usize)?;
            let Entry::Valid(candidate) = &place.entry else { return None };
            if previous == Some(candidate.message_id) || refused.contains(*index) {
                return None;
            }
            previous = Some(candidate.message_id);
            Some(Claim {
                index: *index,
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
        self.lookups.iter().filter_map(|index| self.places.get(*index as usize).and_then(message_id))
    }

    /// Decides the outcome of every record.
    pub fn decide(&self, answer: &Answer, refused: &Refused) -> Outcomes {
        let mut outcomes: Vec<Outcome> = self
            .places
            .iter()
            .map(|place| match &place.entry {
                Entry::Refused(refusal) => Outcome::DeadLetter(refusal.reason),
                // Replaced below: every valid record is a candidate or a lookup.
                Entry::Valid(_) => Outcome::Rejected(None),
            })
            .collect();
        let mut winner: Option<([u8; 16], Owner)> = None;
        for index in &self.candidates {
            let (Some(place), Some(outcome)) =
                (self.places.get(*index as usize), outcomes.get_mut(*index as usize))
            else {
                continue;
            };
            let Entry::Valid(candidate) = &place.entry else { continue };
            if let Some(sqlstate) = refused.0.get(index) {
                *outcome = Outcome::Rejected(Some(*sqlstate));
                continue;
            }
            *outcome = match &winner {
                // An earlier record of the batch has the same id: it claimed the id or found its owner.
                Some((id, owner)) if *id == candidate.message_id => against_owner(place, candidate, owner),
                _ => {
                    let stranger = answer.owners.get(&candidate.message_id).copied();
                    let owner = stranger.unwrap_or(Owner {
                        partition: place.partition,
                        offset: place.offset,
                        payload_hash: candidate.payload_hash,
                    });
                    winner = Some((candidate.message_id, owner));
                    match stranger {
                        None => Outcome::Written,
                        Some(owner) => against_owner(place, candidate, &owner),
                    }
                }
            };
        }
        for index in &self.lookups {
            let (Some(place), Some(outcome)) =
                (self.places.get(*index as usize), outcomes.get_mut(*index as usize))
            else {
                continue;
            };
            let Entry::Valid(candidate) = &place.entry else { continue };
            *outcome = match answer.owners.get(&candidate.message_id) {
                // A later record of the partition owns the id, so it was free when this record was written:
                // the database must have refused this record.
                Some(owner) if owner.partition == place.partition && place.offset < owner.offset => {
                    Outcome::Rejected(None)
                }
                Some(owner) => against_owner(place, candidate, owner),
                // Valid and below the cursor, but no record owns its id: the database refused it.
                None => Outcome::Rejected(None),
            };
        }
        Outcomes(outcomes)
    }

    /// The rows of the records whose outcome is [`Outcome::Written`].
    pub fn rows(&self, outcomes: &Outcomes) -> TableRows {
        let valid = self.candidates.len() + self.lookups.len();
        let count = outcomes.0.iter().filter(|f| **f == Outcome::Written).count();
        if count == valid {
            // The usual case: every payment is new, so the encoded rows are used without copying.
            return TableRows {
                core: Rows { bytes: self.core.clone(), count },
                metadata: Rows { bytes: self.metadata.clone(), count },
                notes: Rows { bytes: self.notes.clone(), count: self.notes_count },
            };
        }
        let written =
            self.places.iter().zip(&outcomes.0).filter(|(_, outcome)| **outcome == Outcome::Written);
        self.copied_rows(count, written.map(|(place, _)| place))
    }

    /// The rows of the records at these indices only.
    pub fn rows_at(&self, indices: &[u32]) -> TableRows {
        self.copied_rows(indices.len(), indices.iter().filter_map(|index| self.places.get(*index as usize)))
    }

    /// Copies the rows of these payments; there are at most `count_max`.
    fn copied_rows<'b>(&'b self, count_max: usize, places: impl Iterator<Item = &'b Place>) -> TableRows {
        // The rows' share of the whole buffer plus an eighth, because rows differ in length.
        let room = |whole: &Bytes| {
            let share = whole.len().saturating_mul(count_max) / self.places.len().max(1);
            Vec::with_capacity(whole.len().min(share + share / 8))
        };
        let (mut core, mut metadata, mut notes) = (room(&self.core), room(&self.metadata), room(&self.notes));
        let (mut count, mut notes_count) = (0, 0);
        for place in places {
            let Entry::Valid(candidate) = &place.entry else { continue };
            core.extend_from_slice(part(&self.core, &candidate.core));
            metadata.extend_from_slice(part(&self.metadata, &candidate.metadata));
            notes.extend_from_slice(part(&self.notes, &candidate.notes));
            count += 1;
            notes_count += usize::from(!candidate.notes.is_empty());
        }
        TableRows {
            core: Rows { bytes: core.into(), count },
            metadata: Rows { bytes: metadata.into(), count },
            notes: Rows { bytes: notes.into(), count: notes_count },
        }
    }

    /// The record at `index` with its events.
    pub fn published_view(&self, index: usize) -> Option<PublishedView<'_>> {
        let place = self.places.get(index)?;
        let record = self.source.get(index)?;
        let (read_event, email_event, refusal) = match &place.entry {
            Entry::Valid(c) => (
                part(&self.read_events, &c.read_event),
                Some(part(&self.email_events, &c.email_event)).filter(|e| !e.is_empty()),
                None,
            ),
            Entry::Refused(refusal) => (&[][..], None, Some(refusal)),
        };
        Some(PublishedView { record, read_event, email_event, refusal })
    }

    /// The record at `index` with its rows, if it is a valid payment.
    pub fn payment_view(&self, index: usize) -> Option<PaymentView<'_>> {
        match &self.places.get(index)?.entry {
            Entry::Valid(c) => Some(PaymentView {
                message_id: c.message_id,
                payload_hash: c.payload_hash,
                timestamp: c.timestamp,
                core: part(&self.core, &c.core),
                metadata: part(&self.metadata, &c.metadata),
                notes: Some(part(&self.notes, &c.notes)).filter(|n| !n.is_empty()),
            }),
            Entry::Refused(_) => None,
        }
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
    pub fn into_memory(self) -> Memory {
        let Self { mut source, mut places, mut candidates, mut lookups, .. } = self;
        source.clear();
        places.clear();
        candidates.clear();
        lookups.clear();
        let mut encoder = Encoder {
            core: emptied(self.core),
            metadata: emptied(self.metadata),
            notes: emptied(self.notes),
            notes_count: 0,
            read_events: self.read_events,
            email_events: self.email_events,
        };
        encoder.read_events.clear();
        encoder.email_events.clear();
        Memory { source, places, candidates, lookups, encoder }
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

fn message_id(place: &Place) -> Option<[u8; 16]> {
    match &place.entry {
        Entry::Valid(candidate) => Some(candidate.message_id),
        Entry::Refused(_) => None,
    }
}

fn seen(progress: &[Progress], partition: Partition) -> NextOffset {
    progress
        .binary_search_by_key(&partition, |p| p.partition)
        .ok()
        .and_then(|i| progress.get(i))
        .map_or(NextOffset(i64::MAX), |p| p.seen)
}

fn against_owner(place: &Place, candidate: &Candidate, owner: &Owner) -> Outcome {
    if place.is_owner(owner) {
        Outcome::WrittenBefore
    } else if owner.payload_hash == candidate.payload_hash {
        Outcome::Duplicate
    } else {
        Outcome::DeadLetter(Reason::MessageIdConflict)
    }
}

#[cfg(test)]
mod tests;
