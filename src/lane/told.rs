//! What the log says of single records and partitions: where they are, and by which id to find their outputs.

use std::time::Duration;

use uuid::Uuid;

use crate::cursor::Doubt;
use crate::logging::RateLimited;
use crate::publication::{DeadLetter, Publication, Source};
use crate::record::{Partition, RecordView};
use crate::wire::Reason;

/// Dead letters are counted in the metrics and stand in their topic; the log names some of a flood. Payments apart:
/// what bad records leave of a common bound would be nothing.
static PAYMENTS: RateLimited = RateLimited::new(10, Duration::from_secs(10));
static RECORDS: RateLimited = RateLimited::new(10, Duration::from_secs(10));
/// A record's own header is repeated in the log if it is no longer than this, and looks like an id.
const HEADER_BYTES_MAX: usize = 128;

fn header<'a>(record: &RecordView<'a>, name: &str) -> Option<&'a str> {
    let (_, value) = record.headers.iter().find(|(found, _)| *found == name.as_bytes())?;
    let text = std::str::from_utf8(value?).ok()?;
    let is_of_an_id = |b: u8| b.is_ascii_alphanumeric() || b"._:/+=-".contains(&b);
    let is_id = (1..=HEADER_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_of_an_id);
    is_id.then_some(text)
}

/// Names the records of a publication that went to the dead letters.
pub(super) fn dead_letters(topic: &str, topic_id: Uuid, publication: &Publication, trace_id: Option<&str>) {
    for letter in publication.dead_letters() {
        let limit = if is_a_payment(letter.reason) { &PAYMENTS } else { &RECORDS };
        if let Some(suppressed) = limit.pass() {
            tell(topic, topic_id, &letter, trace_id, suppressed);
        }
    }
}

/// Somebody's payment is not written although the message is in order.
fn is_a_payment(reason: Reason) -> bool {
    matches!(reason, Reason::MessageIdConflict | Reason::RejectedByDatabase)
}

fn tell(topic: &str, topic_id: Uuid, letter: &DeadLetter<'_>, trace_id: Option<&str>, suppressed: u64) {
    let record = &letter.record;
    let source = Source::new(topic_id, record.partition, record.offset).to_string();
    let correlation_id = header(record, "correlation-id").unwrap_or(&source);
    macro_rules! line {
        ($level:ident, $message:literal) => {
            tracing::$level!(
                topic,
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

/// Names a partition that is halted, and the first record that is in doubt.
pub(super) fn halted(lane: usize, topic: &str, topic_id: Uuid, partition: Partition, doubt: &Doubt) {
    let offset = doubt.first_in_doubt();
    let source = format!("{:08x}/{partition}/{offset}", topic_id.as_fields().0);
    tracing::error!(
        lane,
        topic,
        partition = partition.0,
        offset = offset.0,
        source,
        correlation_id = source,
        doubt = doubt.label(),
        advice = doubt.advice(partition),
        "partition halted, the others go on"
    );
}
