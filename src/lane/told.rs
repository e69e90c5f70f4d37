//! What the log says of single records and partitions: where they are, and by which id to find their outputs.

use std::time::Duration;

use uuid::Uuid;

use super::ports::Gap;
use crate::cursor::Doubt;
use crate::logging::RateLimited;
use crate::publication::{DeadLetter, OutputCounts, Publication, Source};
use crate::record::{NextOffset, Partition, RecordView};
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

/// Names the records of a publication that went to the dead letters; `counts` is what was sent of it.
pub(super) fn dead_letters(
    topic: &str,
    topic_id: Uuid,
    publication: &Publication,
    counts: &OutputCounts,
    trace_id: Option<&str>,
) {
    let count = |is_wanted: fn(Reason) -> bool| {
        let counted = Reason::ALL.iter().zip(counts.by_reason).filter(|(reason, _)| is_wanted(**reason));
        counted.map(|(_, count)| count).sum()
    };
    let mut payments = Untold { limit: &PAYMENTS, left: count(is_a_payment), is_refused: false };
    let mut records = Untold { limit: &RECORDS, left: count(|r| !is_a_payment(r)), is_refused: false };
    for letter in publication.dead_letters() {
        let untold = if is_a_payment(letter.reason) { &mut payments } else { &mut records };
        if let Some(suppressed) = untold.pass() {
            tell(topic, topic_id, &letter, trace_id, suppressed);
        }
        // A flood is not worked through for lines that are left out.
        if payments.is_done() && records.is_done() {
            break;
        }
    }
    payments.limit.leave_out(payments.left);
    records.limit.leave_out(records.left);
}

/// Dead letters of a publication under one limit.
struct Untold {
    limit: &'static RateLimited,
    /// So many it was not asked about.
    left: u64,
    is_refused: bool,
}

impl Untold {
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

/// Names a partition that could not be read and is read again.
pub(super) fn read_again(lane: usize, topic: &str, partition: Partition, doubt: &Doubt) {
    tracing::info!(
        lane,
        topic,
        partition = partition.0,
        doubt = doubt.label(),
        "the partition can be read again, going on"
    );
}

/// Names a range with records that a reader passed over.
pub(super) fn gap(lane: usize, topic: &str, gap: &Gap, record: NextOffset) {
    static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
    if let Some(suppressed) = LIMIT.pass() {
        tracing::error!(
            lane,
            topic,
            partition = gap.partition.0,
            offset = record.0,
            from = gap.from.0,
            to = gap.to.0,
            suppressed,
            "the client passed over records: the partition is begun again at the first of them, nothing is lost"
        );
    }
}

/// Names a range of which it could not be found out whether it holds records.
pub(super) fn gap_unknown(lane: usize, topic: &str, gap: &Gap, error: &str) {
    static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
    if let Some(suppressed) = LIMIT.pass() {
        tracing::warn!(
            lane,
            topic,
            partition = gap.partition.0,
            from = gap.from.0,
            to = gap.to.0,
            error,
            suppressed,
            "whether records were passed over could not be found out, trying again; the partition waits"
        );
    }
}
