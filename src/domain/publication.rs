//! The contents of one Kafka transaction: events, dead letters and the offsets to commit.

use std::borrow::Cow;
use std::fmt::{self, Write};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::domain::batch::{Batch, Outcomes, PublishedView};
use crate::domain::cursor::{CommitMetadata, Identity};
use crate::domain::outcome::Outcome;
use crate::domain::record::{NextOffset, Offset, Partition, RecordView};
use crate::domain::wire::Reason;

/// The topics that the daemon writes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum OutputTopic {
    /// `kafka.read_topic`
    Read,
    /// `kafka.email_topic`
    Email,
    /// `kafka.dead_letter_topic`
    DeadLetter,
}

impl OutputTopic {
    /// All topics, ordered by [`index`](Self::index).
    pub const ALL: [Self; 3] = [Self::Read, Self::Email, Self::DeadLetter];

    /// Index in [`ALL`](Self::ALL).
    pub fn index(self) -> usize {
        self as usize
    }

    /// The label used in metrics.
    pub fn label(self) -> &'static str {
        self.into()
    }
}

/// The input record that an output belongs to, as stored in the header `source`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// The leading 32 bits of the input topic's id.
    pub topic_id_prefix: u32,
    /// Partition of the record.
    pub partition: Partition,
    /// Offset of the record.
    pub offset: Offset,
}

impl Source {
    /// The source of a record of the topic with this id.
    pub fn new(topic_id: Uuid, partition: Partition, offset: Offset) -> Self {
        // First 8 hex digits of the id: its leading 32 bits.
        Self { topic_id_prefix: topic_id.as_fields().0, partition, offset }
    }

    /// Name of the header.
    pub const HEADER: &'static str = "source";

    /// Parses the header's value; `None` if it does not have the form that this program writes.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(value).ok()?.split('/');
        let (prefix, partition, offset) = (parts.next()?, parts.next()?, parts.next()?);
        if prefix.len() != 8 || parts.next().is_some() {
            return None;
        }
        Some(Self {
            topic_id_prefix: u32::from_str_radix(prefix, 16).ok()?,
            partition: Partition(partition.parse().ok()?),
            offset: Offset(offset.parse().ok()?),
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}/{}/{}", self.topic_id_prefix, self.partition, self.offset)
    }
}

/// Name and value of a header.
pub type Header<'a> = (&'a [u8], Option<&'a [u8]>);

/// One message to produce.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The topic to produce to.
    pub topic: OutputTopic,
    /// The input record's key, unchanged; also `None` in a dead letter whose key is too large.
    pub key: Option<&'a [u8]>,
    /// The event, or the input record's value.
    pub value: Option<&'a [u8]>,
    /// All headers.
    pub headers: &'a [Header<'a>],
}

/// A larger value is omitted from its dead letter, which then has its size and hash in headers.
pub const DEAD_LETTER_VALUE_BYTES_MAX: usize = 512 * 1024;
/// The same limit for a key. A payment's key has at most 19 digits.
pub const DEAD_LETTER_KEY_BYTES_MAX: usize = 64 * 1024;
/// A record's own headers beyond this are omitted from its outputs: an output that exceeds the topic's limit
/// would block its partition forever.
pub const OWN_HEADERS_BYTES_MAX: usize = 256 * 1024;
/// Maximum bytes that a header takes besides its name and value: a length for each.
const HEADER_BYTES: usize = 10;
/// `correlation-id` and `traceparent` longer than this are not copied to events, for the same reason.
pub const TRACE_HEADER_BYTES_MAX: usize = 8 * 1024;

const TRACE_HEADERS: [&[u8]; 2] = [b"correlation-id", b"traceparent"];
/// Header with the number of times that a record was replayed.
pub const REPLAYS_HEADER: &[u8] = b"dlq-replays";

/// Headers that an output sets itself; the record's own headers with these names are dropped.
pub const REPLACED_HEADERS: [&[u8]; 11] = [
    b"source",
    b"dlq-reason",
    b"dlq-detail",
    b"dlq-topic",
    b"dlq-partition",
    b"dlq-offset",
    b"dlq-timestamp",
    b"dlq-value-bytes",
    b"dlq-value-sha256",
    b"dlq-key-bytes",
    b"dlq-key-sha256",
];

/// The offsets of one partition in a transaction: where publishing starts and what is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OffsetCommit {
    /// The partition.
    pub partition: Partition,
    /// First offset to publish; records below it are already published.
    pub publish_from: NextOffset,
    /// The group's offset after the transaction.
    pub commit: NextOffset,
}

/// A batch that is durable in Postgres and is to be published in one Kafka transaction.
#[derive(Debug)]
pub struct Publication {
    batch: Option<Batch>,
    outcomes: Outcomes,
    commits: Vec<OffsetCommit>,
    emits: bool,
}

/// A dead-lettered record, for logging.
#[derive(Clone, Debug)]
pub struct DeadLetter<'a> {
    /// The record; its key and value must not be logged.
    pub record: RecordView<'a>,
    /// Why it is dead-lettered.
    pub reason: Reason,
    /// The field and the rule that it breaks; never a value.
    pub detail: Cow<'a, str>,
}

/// Numbers of messages in a publication, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OutputCounts {
    /// Messages by [`OutputTopic::index`].
    pub by_topic: [u64; 3],
    /// Dead letters by their [`Reason`], in the order of `Reason::ALL`.
    pub by_reason: [u64; Reason::ALL.len()],
}

/// The offsets of a publication that is committed; the cursors move only with this value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed(Vec<(Partition, NextOffset)>);

impl Committed {
    /// The committed offsets.
    pub fn positions(&self) -> &[(Partition, NextOffset)] {
        &self.0
    }
}

impl Publication {
    /// The publication of a written batch. `emits` is false in a daemon that writes rows only.
    pub fn of_batch(batch: Batch, outcomes: Outcomes, commits: Vec<OffsetCommit>, emits: bool) -> Self {
        Self { batch: Some(batch), outcomes, commits, emits }
    }

    /// A transaction that only commits offsets.
    pub fn of_offsets(commits: Vec<OffsetCommit>) -> Self {
        Self { batch: None, outcomes: Outcomes::default(), commits, emits: false }
    }

    /// The partitions with their offsets.
    pub fn commits(&self) -> &[OffsetCommit] {
        &self.commits
    }

    /// The batch; `None` if only offsets are committed.
    pub fn batch(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// Returns the batch after publishing.
    pub fn into_batch(self) -> Option<Batch> {
        self.batch
    }

    /// The outcomes of the records.
    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    /// Offsets to commit, each with its commit metadata.
    pub fn offsets<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> impl Iterator<Item = (Partition, NextOffset, String)> + 'a {
        self.commits
            .iter()
            .map(move |s| (s.partition, s.commit, CommitMetadata::new(identity, s.commit).to_string()))
    }

    /// Returns the committed offsets. Called by the publisher only after the transaction is committed.
    pub fn committed(&self) -> Committed {
        Committed(self.commits.iter().map(|s| (s.partition, s.commit)).collect())
    }

    fn publish_from(&self, partition: Partition) -> NextOffset {
        self.commits
            .iter()
            .find(|s| s.partition == partition)
            .map_or(NextOffset(i64::MAX), |s| s.publish_from)
    }

    /// The records that this publication dead-letters; none in a daemon that writes rows only.
    pub fn dead_letters(&self) -> impl DoubleEndedIterator<Item = DeadLetter<'_>> {
        let batch = self.batch.as_ref().filter(|_| self.emits);
        self.outcomes.iter().enumerate().filter_map(move |(index, outcome)| {
            if !matches!(outcome, Outcome::DeadLetter(_) | Outcome::Rejected(_)) {
                return None;
            }
            let view = batch?.published_view(index)?;
            if self.publish_from(view.record.partition).is_past(view.record.offset) {
                return None;
            }
            dead_letter(&view, outcome)
        })
    }

    /// Passes every output to `send` in the order of the records, so that events of one account stay in
    /// offset order.
    pub fn for_each_output<E>(
        &self,
        topic: &str,
        topic_id: Uuid,
        mut send: impl FnMut(&Output<'_>) -> Result<(), E>,
    ) -> Result<OutputCounts, E> {
        let mut counts = OutputCounts::default();
        let Some(batch) = self.batch.as_ref().filter(|_| self.emits) else { return Ok(counts) };
        let mut send = |output: &Output<'_>| {
            send(output)?;
            if let Some(count) = counts.by_topic.get_mut(output.topic.index()) {
                *count += 1;
            }
            Ok(())
        };
        let mut by_reason = [0; Reason::ALL.len()];
        // First 8 hex digits of the id: its leading 32 bits.
        let topic_id_prefix = topic_id.as_fields().0;
        let mut publish_from = (Partition(-1), NextOffset(0));
        // The header `source`, in the format of `Source`, and the length of its part before the offset.
        let (mut source, mut source_prefix) = (String::new(), 0);
        for (index, outcome) in self.outcomes.iter().enumerate() {
            if *outcome == Outcome::Duplicate {
                continue;
            }
            let Some(view) = batch.published_view(index) else { continue };
            let partition = view.record.partition;
            if publish_from.0 != partition {
                publish_from = (partition, self.publish_from(partition));
                source.clear();
                // Writing to a String cannot fail.
                let _ = write!(source, "{topic_id_prefix:08x}/{partition}/");
                source_prefix = source.len();
            }
            if publish_from.1.is_past(view.record.offset) {
                continue;
            }
            source.truncate(source_prefix);
            source.push_str(itoa::Buffer::new().format(view.record.offset.0));
            match dead_letter(&view, outcome) {
                None => send_events(&view, &source, &mut send)?,
                Some(letter) => {
                    send_dead_letter(&letter, topic, &source, &mut send)?;
                    if let Some(count) = by_reason.get_mut(letter.reason as usize) {
                        *count += 1;
                    }
                }
            }
        }
        Ok(OutputCounts { by_reason, ..counts })
    }
}

/// The dead letter of a record, if its outcome is one.
pub fn dead_letter<'b>(view: &PublishedView<'b>, outcome: &Outcome) -> Option<DeadLetter<'b>> {
    let (reason, detail) = match outcome {
        Outcome::DeadLetter(reason) => {
            let detail = match (view.refusal, reason) {
                (Some(refusal), _) => Cow::Borrowed(&*refusal.detail),
                (None, Reason::MessageIdConflict) => {
                    "messageId: seen on another record with another payload".into()
                }
                (None, _) => "".into(),
            };
            (*reason, detail)
        }
        Outcome::Rejected(Some(code)) => {
            (Reason::RejectedByDatabase, format!("the database refused this row: SQLSTATE {code}").into())
        }
        Outcome::Rejected(None) => {
            (Reason::RejectedByDatabase, "the database refused this row in an earlier try".into())
        }
        Outcome::Written | Outcome::WrittenBefore | Outcome::Duplicate => return None,
    };
    Some(DeadLetter { record: view.record, reason, detail })
}

fn send_events<E>(
    view: &PublishedView<'_>,
    source: &str,
    mut send: impl FnMut(&Output<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let only_source: [Header<'_>; 1] = [(b"source", Some(source.as_bytes()))];
    // Allocates only for the few records that have trace headers.
    let mut with_trace: Vec<Header<'_>> = Vec::new();
    let own = view.record.headers;
    if !own.is_empty() {
        with_trace.extend(own.iter().filter(|(name, value)| {
            TRACE_HEADERS.contains(name) && value.is_none_or(|v| v.len() <= TRACE_HEADER_BYTES_MAX)
        }));
        // Many repeated headers would make the output too large as well.
        with_trace.truncate(8);
        with_trace.extend(only_source);
    }
    let headers = if with_trace.is_empty() { &only_source[..] } else { &with_trace };
    let key = view.record.key;
    send(&Output { topic: OutputTopic::Read, key, value: Some(view.read_event), headers })?;
    if view.email_event.is_some() {
        send(&Output { topic: OutputTopic::Email, key, value: view.email_event, headers })?;
    }
    Ok(())
}

/// Size and SHA-256 in hex of a key or value that is too large for its dead letter.
fn left_out(content: Option<&[u8]>, bytes_max: usize) -> Option<[String; 2]> {
    let large = content.filter(|content| content.len() > bytes_max)?;
    let mut sha256 = String::with_capacity(64);
    for byte in Sha256::digest(large) {
        let _ = write!(sha256, "{byte:02x}");
    }
    Some([large.len().to_string(), sha256])
}

fn send_dead_letter<E>(
    DeadLetter { record, reason, detail }: &DeadLetter<'_>,
    topic: &str,
    source: &str,
    mut send: impl FnMut(&Output<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (partition, offset) = (record.partition.to_string(), record.offset.to_string());
    let timestamp = record.timestamp.map_or(-1, |t| t.0).to_string();
    let value_left_out = left_out(record.value, DEAD_LETTER_VALUE_BYTES_MAX);
    let key_left_out = left_out(record.key, DEAD_LETTER_KEY_BYTES_MAX);
    let own_bytes: usize = record
        .headers
        .iter()
        .map(|(name, value)| name.len() + value.map_or(0, <[u8]>::len) + HEADER_BYTES)
        .sum();
    let mut headers: Vec<Header<'_>> = Vec::new();
    if own_bytes <= OWN_HEADERS_BYTES_MAX {
        headers.extend(record.headers.iter().filter(|(name, _)| !REPLACED_HEADERS.contains(name)));
    }
    headers.extend_from_slice(&[
        (b"dlq-reason", Some(reason.as_str().as_bytes())),
        (b"dlq-detail", Some(detail.as_bytes())),
        (b"dlq-topic", Some(topic.as_bytes())),
        (b"dlq-partition", Some(partition.as_bytes())),
        (b"dlq-offset", Some(offset.as_bytes())),
        (b"dlq-timestamp", Some(timestamp.as_bytes())),
    ]);
    if let Some([bytes, sha256]) = &value_left_out {
        headers.push((b"dlq-value-bytes", Some(bytes.as_bytes())));
        headers.push((b"dlq-value-sha256", Some(sha256.as_bytes())));
    }
    if let Some([bytes, sha256]) = &key_left_out {
        headers.push((b"dlq-key-bytes", Some(bytes.as_bytes())));
        headers.push((b"dlq-key-sha256", Some(sha256.as_bytes())));
    }
    headers.push((b"source", Some(source.as_bytes())));
    send(&Output {
        topic: OutputTopic::DeadLetter,
        key: record.key.filter(|_| key_left_out.is_none()),
        value: record.value.filter(|_| value_left_out.is_none()),
        headers: &headers,
    })
}

#[cfg(test)]
mod tests;
