//! Log lines about single records and partitions, with the ids by which to find them and their outputs.

use std::time::Duration;

use super::LaneSettings;
use crate::domain::cursor::HaltReason;
use crate::domain::publication::{DeadLetter, OutputCounts, Publication, Source};
use crate::domain::record::{NextOffset, Partition, RecordView};
use crate::domain::wire::Reason;
use crate::ports::Gap;
use crate::telemetry::logging::RateLimited;

/// Dead letters are counted in the metrics and stored in their topic; the log names a sample. Payments have a
/// limit of their own, so that a flood of invalid records cannot suppress them.
static PAYMENTS: RateLimited = RateLimited::new(10, Duration::from_secs(10));
static RECORDS: RateLimited = RateLimited::new(10, Duration::from_secs(10));
/// A record's header is logged if it is no longer than this and looks like an id.
const HEADER_BYTES_MAX: usize = 128;

fn header<'a>(record: &RecordView<'a>, name: &str) -> Option<&'a str> {
    let (_, value) = record.headers.iter().find(|(found, _)| *found == name.as_bytes())?;
    let text = std::str::from_utf8(value?).ok()?;
    let is_of_an_id = |b: u8| b.is_ascii_alphanumeric() || b"._:/+=-".contains(&b);
    let is_id = (1..=HEADER_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_of_an_id);
    is_id.then_some(text)
}

/// Logs the records of a publication that became dead letters; `counts` are its outputs.
pub(super) fn dead_letters(
    settings: &LaneSettings,
    publication: &Publication,
    counts: &OutputCounts,
    trace_id: Option<&str>,
) {
    let count = |is_wanted: fn(Reason) -> bool| {
        let counted = Reason::ALL.iter().zip(counts.by_reason).filter(|(reason, _)| is_wanted(**reason));
        counted.map(|(_, count)| count).sum()
    };
    let mut payments = Sampled { limit: &PAYMENTS, left: count(is_a_payment), is_refused: false };
    let mut records = Sampled { limit: &RECORDS, left: count(|r| !is_a_payment(r)), is_refused: false };
    for letter in publication.dead_letters() {
        let sampled = if is_a_payment(letter.reason) { &mut payments } else { &mut records };
        if let Some(suppressed) = sampled.pass() {
            log_dead_letter(settings, &letter, trace_id, suppressed);
        }
        // Once both limits are reached, the remaining letters are only counted.
        if payments.is_done() && records.is_done() {
            break;
        }
    }
    payments.limit.leave_out(payments.left);
    records.limit.leave_out(records.left);
}

/// Dead letters of a publication under one limit.
struct Sampled {
    limit: &'static RateLimited,
    /// Letters for which the limit was not asked.
    left: u64,
    is_refused: bool,
}

impl Sampled {
    fn pass(&mut self) -> Option<u64> {
        if self.is_refused {
            return None;
        }
        self.left = self.left.saturating_sub(1);
        let passed = self.limit.pass();
        self.is_refused = passed.is_none();
        passed
    }

    fn is_done(&self) -> bool {
        self.is_refused || self.left == 0
    }
}

/// Whether the message is valid and its payment could still not be written.
fn is_a_payment(reason: Reason) -> bool {
    matches!(reason, Reason::MessageIdConflict | Reason::RejectedByDatabase)
}

fn log_dead_letter(
    settings: &LaneSettings,
    letter: &DeadLetter<'_>,
    trace_id: Option<&str>,
    suppressed: u64,
) {
    let record = &letter.record;
    let source = Source::new(settings.identity.topic_id, record.partition, record.offset).to_string();
    let correlation_id = header(record, "correlation-id").unwrap_or(&source);
    macro_rules! line {
        ($level:ident, $message:literal) => {
            tracing::$level!(
                topic = settings.input_topic,
                partition = record.partition.0,
                offset = record.offset.0,
                source,
                correlation_id,
                traceparent = header(record, "traceparent"),
                trace_id,
                reason = letter.reason.as_str(),
                detail = &*letter.detail,
                suppressed,
                $message
            )
        };
    }
    if is_a_payment(letter.reason) {
        line!(warn, "a payment is a dead letter");
    } else {
        line!(info, "a record is a dead letter");
    }
}

/// Logs that a partition halted, and the first record that is affected.
pub(super) fn halted(settings: &LaneSettings, partition: Partition, reason: &HaltReason) {
    let offset = reason.first_offset();
    let source = format!("{:08x}/{partition}/{offset}", settings.identity.topic_id.as_fields().0);
    tracing::error!(
        lane = settings.index,
        topic = settings.input_topic,
        partition = partition.0,
        offset = offset.0,
        source,
        correlation_id = source,
        halt_reason = reason.label(),
        // The former name, until 1.0.
        doubt = reason.label(),
        advice = reason.advice(partition),
        "partition halted, the others go on"
    );
}

/// Logs that a partition can be read again.
pub(super) fn read_again(settings: &LaneSettings, partition: Partition, reason: &HaltReason) {
    tracing::info!(
        lane = settings.index,
        topic = settings.input_topic,
        partition = partition.0,
        halt_reason = reason.label(),
        // The former name, until 1.0.
        doubt = reason.label(),
        "the partition can be read again, going on"
    );
}

/// Logs a range in which the client skipped records.
pub(super) fn gap(settings: &LaneSettings, gap: &Gap, record: NextOffset) {
    static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
    if let Some(suppressed) = LIMIT.pass() {
        tracing::error!(
            lane = settings.index,
            topic = settings.input_topic,
            partition = gap.partition.0,
            offset = record.0,
            from = gap.from.0,
            to = gap.to.0,
            suppressed,
            "the client passed over records: fetching restarts at the first of them, nothing is lost"
        );
    }
}

/// Logs a range that could not be checked for skipped records.
pub(super) fn gap_unknown(settings: &LaneSettings, gap: &Gap, error: &str) {
    static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
    if let Some(suppressed) = LIMIT.pass() {
        tracing::warn!(
            lane = settings.index,
            topic = settings.input_topic,
            partition = gap.partition.0,
            from = gap.from.0,
            to = gap.to.0,
            error,
            suppressed,
            "could not check whether records were passed over, trying again; the partition waits"
        );
    }
}
