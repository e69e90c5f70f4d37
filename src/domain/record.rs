//! Records as read from Kafka: their bytes are in one buffer per batch, without an allocation per record.
//!
//! A [`SourceBatch`] owns copies of keys, values and headers, so that a batch that waits for the database
//! does not keep the Kafka client's receive buffers alive.

use std::fmt;

/// Number of a partition of the input topic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
pub struct Partition(pub i32);

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The offset of one record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
pub struct Offset(pub i64);

impl Offset {
    /// The position after this record. All code uses this instead of adding 1 to an offset.
    pub fn next(self) -> NextOffset {
        NextOffset(self.0.saturating_add(1))
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position: the offset of the next record to process. All cursors have this type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
pub struct NextOffset(pub i64);

impl NextOffset {
    /// Whether the record at `offset` is before this position.
    pub fn is_past(self, offset: Offset) -> bool {
        offset.0 < self.0
    }
}

impl fmt::Display for NextOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TimestampMs(pub i64);

/// ISO 8601 in UTC, with milliseconds.
impl fmt::Display for TimestampMs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(time) => write!(f, "{time:.3}"),
            Err(_) => self.0.fmt(f),
        }
    }
}

/// Bytes of capacity that an emptied batch keeps: four times the default `batch.max_bytes`. Capacity beyond
/// that, as after a very large record, is freed.
const KEPT_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    len: u32,
}

#[derive(Clone, Debug)]
struct StoredRecord {
    partition: Partition,
    offset: Offset,
    timestamp: Option<TimestampMs>,
    key: Option<Span>,
    value: Option<Span>,
    headers: std::ops::Range<u32>,
}

#[derive(Clone, Copy, Debug)]
struct StoredHeader {
    name: Span,
    value: Option<Span>,
}

/// Records of one lane in order of arrival, which is offset order within each partition.
#[derive(Clone, Debug, Default)]
pub struct SourceBatch {
    bytes: Vec<u8>,
    records: Vec<StoredRecord>,
    headers: Vec<StoredHeader>,
}

/// One record, borrowed from its batch.
#[derive(Clone, Copy, Debug)]
pub struct RecordView<'a> {
    /// The partition of the input topic.
    pub partition: Partition,
    /// The offset in that partition.
    pub offset: Offset,
    /// The record's timestamp; `None` if it has none.
    pub timestamp: Option<TimestampMs>,
    /// The key's bytes; `None` if null.
    pub key: Option<&'a [u8]>,
    /// The value's bytes; `None` if null.
    pub value: Option<&'a [u8]>,
    /// The headers in order, including repeated names.
    pub headers: Headers<'a>,
}

/// The headers of one record.
#[derive(Clone, Copy, Debug)]
pub struct Headers<'a> {
    bytes: &'a [u8],
    stored: &'a [StoredHeader],
}

impl<'a> Headers<'a> {
    /// Name and value of each header, in order; a value may be null.
    pub fn iter(self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> {
        let bytes = self.bytes;
        self.stored.iter().map(move |h| (slice(bytes, h.name), h.value.map(|v| slice(bytes, v))))
    }

    /// Whether there are no headers.
    pub fn is_empty(self) -> bool {
        self.stored.is_empty()
    }
}

fn slice(bytes: &[u8], span: Span) -> &[u8] {
    let start = span.start as usize;
    bytes.get(start..start.saturating_add(span.len as usize)).unwrap_or_default()
}

impl SourceBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies one record to the end of the batch.
    pub fn push<'h>(
        &mut self,
        partition: Partition,
        offset: Offset,
        timestamp: Option<TimestampMs>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) {
        let key = key.map(|k| self.store(k));
        let value = value.map(|v| self.store(v));
        let headers_start = self.headers.len() as u32;
        for (name, value) in headers {
            let name = self.store(name);
            let value = value.map(|v| self.store(v));
            self.headers.push(StoredHeader { name, value });
        }
        let headers = headers_start..self.headers.len() as u32;
        self.records.push(StoredRecord { partition, offset, timestamp, key, value, headers });
    }

    fn store(&mut self, bytes: &[u8]) -> Span {
        // A batch is closed at `batch.max_bytes`, at most 256 MiB, and one record has less than 2 GiB.
        let span = Span { start: self.bytes.len() as u32, len: bytes.len() as u32 };
        self.bytes.extend_from_slice(bytes);
        span
    }

    /// The records, in order of arrival.
    pub fn iter(&self) -> impl Iterator<Item = RecordView<'_>> {
        self.records.iter().map(|r| self.view(r))
    }

    /// The record at `index`; `None` past the end.
    pub fn get(&self, index: usize) -> Option<RecordView<'_>> {
        self.records.get(index).map(|r| self.view(r))
    }

    fn view(&self, r: &StoredRecord) -> RecordView<'_> {
        let headers = r.headers.start as usize..r.headers.end as usize;
        RecordView {
            partition: r.partition,
            offset: r.offset,
            timestamp: r.timestamp,
            key: r.key.map(|s| slice(&self.bytes, s)),
            value: r.value.map(|s| slice(&self.bytes, s)),
            headers: Headers { bytes: &self.bytes, stored: self.headers.get(headers).unwrap_or_default() },
        }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether the batch holds no record.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of all keys, values and headers.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Number of records that have a header of this name.
    pub fn count_with_header(&self, name: &[u8]) -> usize {
        if self.headers.is_empty() {
            return 0;
        }
        self.iter().filter(|record| record.headers.iter().any(|(found, _)| found == name)).count()
    }

    /// Empties the batch and keeps its memory for the next one, up to [`KEPT_BYTES_MAX`].
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES_MAX);
        self.records.clear();
        self.headers.clear();
    }
}
