//! A batch: records parsed and encoded once, their fates decided once the database has spoken.
//!
//! Pure. [`Batch::assemble`] turns records into rows and events in one pass; which of them count is
//! known only after the claim, so every record keeps the ranges of its bytes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use uuid::Uuid;

use crate::columns::RowWriter;
use crate::disposition::{Fate, SqlState};
use crate::payment::Payment;
use crate::record::{NextOffset, Offset, Partition, RecordView, SourceBatch, TimestampMs};
use crate::wire::{self, Reason, Refusal, Rules};

/// How far a batch takes one partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The partition.
    pub partition: Partition,
    /// `applied` as last read or written by this lane; records below are looked up, never claimed.
    pub seen: NextOffset,
    /// The position after the last record of this batch, or after control records that follow it. It
    /// may lie below `seen`: records that were written before are delivered again for their events.
    pub reached: NextOffset,
    /// Timestamp of the last record before `reached`: outer none if the batch has no record there,
    /// inner none if that record has no timestamp.
    pub timestamp: Option<Option<TimestampMs>>,
}

impl Progress {
    /// `applied` after this batch: it never moves back.
    pub fn applied(&self) -> NextOffset {
        self.seen.max(self.reached)
    }
}

/// The record that claimed a message id, as `idempotency` tells it.
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

/// One id to claim, with what `idempotency` keeps of it.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Place of the record in the batch.
    pub index: u32,
    /// The message id's 128 bits.
    pub message_id: [u8; 16],
    /// Partition of the record that claims.
    pub partition: Partition,
    /// Offset of the record that claims.
    pub offset: Offset,
    /// Hash of its payload.
    pub payload_hash: i64,
    /// Its timestamp.
    pub timestamp: TimestampMs,
}

impl Claim {
    /// Bytes of a row: six columns with their lengths.
    pub const ROW_BYTES: usize = 74;

    /// Appends its row of `idempotency`, as COPY takes it into (message_id, source_offset, payload_hash, created_at,
    /// source_partition, date). `today` is the UTC date of the claim, as days since 2000-01-01.
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

/// Appends a payment's row of `payment_core`, as COPY takes it. `id` is [`Payment::payment_id`].
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

/// Appends its row of `payment_metadata`, with the place of its record.
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

/// Appends its row of `payment_notes`; to be called only if there is something to note.
pub fn write_notes_row(payment: &Payment<'_>, id: Uuid, out: &mut Vec<u8>) {
    RowWriter::start(out, 4)
        .uuid(id.as_bytes())
        .timestamptz(payment.created_at)
        .text(payment.external_ref_id.as_deref())
        .text(payment.comment.as_deref());
}

/// What the database said to the batch's ids.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Owners of the ids that could not be claimed, and of those that were only looked up. An id of
    /// [`Batch::claims`] that is missing here was claimed by this transaction.
    pub owners: HashMap<[u8; 16], Owner>,
}

/// Records that the database refused, each by itself, with the SQLSTATE. Places in the batch.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Refused(BTreeMap<u32, SqlState>);

impl Refused {
    /// Notes that the database refused the record at this place.
    pub fn insert(&mut self, index: u32, sqlstate: SqlState) {
        self.0.insert(index, sqlstate);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// They, by their places.
    pub fn iter(&self) -> impl Iterator<Item = (u32, SqlState)> {
        self.0.iter().map(|(index, sqlstate)| (*index, *sqlstate))
    }

    fn contains(&self, index: u32) -> bool {
        !self.0.is_empty() && self.0.contains_key(&index)
    }
}

/// The fates of a batch's records, by index.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fates(pub Vec<Fate>);

/// How many records of a batch met which fate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcomes {
    /// Written now.
    pub written: u64,
    /// Written in an earlier try.
    pub redelivered: u64,
    /// Duplicates.
    pub duplicate: u64,
    /// Dead letters, for whatever reason.
    pub dead_lettered: u64,
}

impl Outcomes {
    /// Counts them.
    pub fn of(fates: &Fates) -> Self {
        let mut outcomes = Self::default();
        for fate in &fates.0 {
            *match fate {
                Fate::Written => &mut outcomes.written,
                Fate::WrittenBefore => &mut outcomes.redelivered,
                Fate::Duplicate => &mut outcomes.duplicate,
                Fate::DeadLetter(_) | Fate::Rejected(_) => &mut outcomes.dead_lettered,
            } += 1;
        }
        outcomes
    }
}

/// Rows of one table, ready for a binary COPY without header and trailer.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The bytes of whole rows.
    pub bytes: Bytes,
    /// How many rows they are.
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

/// Records of one lane on their way into one database transaction.
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
    /// Indices of valid records at or past `seen`, by message id, then offset, then partition: the
    /// first of each id is the one that claims.
    candidates: Vec<u32>,
    /// Indices of valid records below `seen`.
    lookups: Vec<u32>,
}

/// The vector inside, unless something still reads it.
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

/// The memory of a batch that is done with, for the next one: a steady stream of batches neither asks the
/// allocator for large blocks nor touches fresh pages.
#[derive(Debug, Default)]
pub struct Memory {
    source: SourceBatch,
    places: Vec<Place>,
    candidates: Vec<u32>,
    lookups: Vec<u32>,
    encoder: Encoder,
}

impl Memory {
    /// The part that records are taken into; it is empty.
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
    /// Parses and encodes `source`. `progress` names every partition of the batch, in any order.
    pub fn assemble(source: SourceBatch, progress: Vec<Progress>, rules: &Rules) -> Self {
        Self::assemble_in(Memory::default(), source, progress, rules)
    }

    /// As [`assemble`](Self::assemble), in the memory of an earlier batch.
    pub fn assemble_in(
        memory: Memory,
        source: SourceBatch,
        mut progress: Vec<Progress>,
        rules: &Rules,
    ) -> Self {
        progress.sort_unstable_by_key(|p| p.partition);
        let Memory { mut encoder, mut places, mut candidates, lookups, .. } = memory;
        // Sizes of a usual row or event; an estimate that saves growing step by step.
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

    /// The cursors turned out to stand where this batch would have put them: its transaction was
    /// committed, only the reply was lost. From now on its records are looked up, not claimed.
    pub fn was_committed(&mut self) {
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

    /// How far it takes each partition, by partition.
    pub fn progress(&self) -> &[Progress] {
        &self.progress
    }

    /// The ids to claim: sorted, each once (two lanes that claim x, y and y, x would deadlock). Of several
    /// records with one id the first claims it that was not refused.
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

    /// An upper bound of the number of claims.
    pub fn claims_max(&self) -> usize {
        self.candidates.len()
    }

    /// The ids of records below `seen`, whose owners the database has to name.
    pub fn lookups(&self) -> impl Iterator<Item = [u8; 16]> {
        self.lookups.iter().filter_map(|index| self.places.get(*index as usize).and_then(message_id))
    }

    /// Decides the fate of every record.
    pub fn decide(&self, answer: &Answer, refused: &Refused) -> Fates {
        let mut fates: Vec<Fate> = self
            .places
            .iter()
            .map(|place| match &place.entry {
                Entry::Refused(refusal) => Fate::DeadLetter(refusal.reason),
                // Overwritten below: every valid record is a candidate or a lookup.
                Entry::Valid(_) => Fate::Rejected(None),
            })
            .collect();
        let mut winner: Option<([u8; 16], Owner)> = None;
        for index in &self.candidates {
            let (Some(place), Some(fate)) =
                (self.places.get(*index as usize), fates.get_mut(*index as usize))
            else {
                continue;
            };
            let Entry::Valid(candidate) = &place.entry else { continue };
            if let Some(sqlstate) = refused.0.get(index) {
                *fate = Fate::Rejected(Some(*sqlstate));
                continue;
            }
            *fate = match &winner {
                // A twin in the batch: the first of the id has claimed it, or met its owner.
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
                        None => Fate::Written,
                        Some(owner) => against_owner(place, candidate, &owner),
                    }
                }
            };
        }
        for index in &self.lookups {
            let (Some(place), Some(fate)) =
                (self.places.get(*index as usize), fates.get_mut(*index as usize))
            else {
                continue;
            };
            let Entry::Valid(candidate) = &place.entry else { continue };
            *fate = match answer.owners.get(&candidate.message_id) {
                // The id was free when this record came: only the database can have refused it.
                Some(owner) if owner.partition == place.partition && place.offset < owner.offset => {
                    Fate::Rejected(None)
                }
                Some(owner) => against_owner(place, candidate, owner),
                // Valid, below the cursor, and nobody owns its id: the database had refused it.
                None => Fate::Rejected(None),
            };
        }
        Fates(fates)
    }

    /// The rows of the records that are written now.
    pub fn rows(&self, fates: &Fates) -> TableRows {
        let valid = self.candidates.len() + self.lookups.len();
        let count = fates.0.iter().filter(|f| **f == Fate::Written).count();
        if count == valid {
            // The usual case: every payment is new, and the rows lie there as they are wanted.
            return TableRows {
                core: Rows { bytes: self.core.clone(), count },
                metadata: Rows { bytes: self.metadata.clone(), count },
                notes: Rows { bytes: self.notes.clone(), count: self.notes_count },
            };
        }
        let written = self.places.iter().zip(&fates.0).filter(|(_, fate)| **fate == Fate::Written);
        self.copied_rows(count, written.map(|(place, _)| place))
    }

    /// The rows of the records at these places alone.
    pub fn rows_at(&self, indices: &[u32]) -> TableRows {
        self.copied_rows(indices.len(), indices.iter().filter_map(|index| self.places.get(*index as usize)))
    }

    /// Rows of `count_max` of the batch's payments at most.
    fn copied_rows<'b>(&'b self, count_max: usize, places: impl Iterator<Item = &'b Place>) -> TableRows {
        // As much of the whole as there are rows of it, and a bit: rows differ in length.
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

    /// The record at `index` with its events, for the publication.
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

    /// The records as they came.
    pub fn source(&self) -> &SourceBatch {
        &self.source
    }

    /// Timestamps of about `count` records spread evenly over the batch.
    pub fn sample_timestamps(&self, count: usize) -> impl Iterator<Item = TimestampMs> {
        let step = (self.source.len() / count.max(1)).max(1);
        self.source.iter().step_by(step).filter_map(|r| r.timestamp)
    }

    /// Gives the memory back for the next batch, emptied.
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

/// One record with what may be published of it.
#[derive(Clone, Copy, Debug)]
pub struct PublishedView<'b> {
    /// The record as it came.
    pub record: RecordView<'b>,
    /// Its read event; empty if the record is invalid.
    pub read_event: &'b [u8],
    /// Its e-mail event, if its status calls for one.
    pub email_event: Option<&'b [u8]>,
    /// Why it is invalid, if it is.
    pub refusal: Option<&'b Refusal>,
}

/// A valid payment with its rows as a binary COPY takes them, whether or not they are to be written.
#[derive(Clone, Copy, Debug)]
pub struct PaymentView<'b> {
    /// The message id's 128 bits.
    pub message_id: [u8; 16],
    /// Hash of its payload.
    pub payload_hash: i64,
    /// The record's timestamp.
    pub timestamp: TimestampMs,
    /// Its row of `payment_core`.
    pub core: &'b [u8],
    /// Its row of `payment_metadata`.
    pub metadata: &'b [u8],
    /// Its row of `payment_notes`, if there is something to note.
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

fn against_owner(place: &Place, candidate: &Candidate, owner: &Owner) -> Fate {
    if place.is_owner(owner) {
        Fate::WrittenBefore
    } else if owner.payload_hash == candidate.payload_hash {
        Fate::Duplicate
    } else {
        Fate::DeadLetter(Reason::MessageIdConflict)
    }
}

#[cfg(test)]
mod tests;
