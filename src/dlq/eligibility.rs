//! Which dead letters may be replayed. Pure.

use std::time::Duration;

use super::letter::Letter;
use crate::domain::record::TimestampMs;
use crate::domain::wire::Reason;
use crate::kafka::topic_rules::TIMESTAMP_AHEAD_MAX_MS;

/// Conditions under which dead letters are replayed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Eligibility {
    /// `kafka.input_topic`: the topic to replay to; dead letters of other topics are refused.
    pub input_topic: String,
    /// Current time by the database's clock.
    pub now: TimestampMs,
    /// `idempotency.window`
    pub window: Duration,
    /// Maximum number of replays of one record.
    pub replays_max: u32,
    /// `--force`: replay even where a payment could be written twice.
    pub is_forced: bool,
}

/// Why a dead letter is not replayed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Objection {
    /// The record was not written by the daemon.
    NotADeadLetter,
    /// The original record is from a topic other than the configured one.
    OtherTopic,
    /// The dead letter does not contain the value.
    ValueLeftOut,
    /// The dead letter does not contain the key.
    KeyLeftOut,
    /// The original record has no usable timestamp.
    NoTimestamp,
    /// The original timestamp is further in the future than brokers accept.
    AheadOfTime,
    /// The replay limit is reached.
    TooManyReplays,
    /// Another record with another payload has the message id.
    IdTaken,
    /// The original record is older than the idempotency window.
    BeyondWindow,
}

impl Objection {
    /// Name in the output of commands.
    pub fn as_str(self) -> &'static str {
        self.texts().0
    }

    /// Explanation for the operator, one sentence.
    pub fn why(self) -> &'static str {
        self.texts().1
    }

    fn texts(self) -> (&'static str, &'static str) {
        match self {
            Self::NotADeadLetter => (
                "not_a_dead_letter",
                "it lacks the headers of a dead letter: it was not written by the daemon",
            ),
            Self::OtherTopic => ("other_topic", "its record is from a topic other than kafka.input_topic"),
            Self::ValueLeftOut => (
                "value_left_out",
                "its value was over 512 KiB and is not in the dead letter: its producer has to send it again",
            ),
            Self::KeyLeftOut => (
                "key_left_out",
                "its key was over 64 KiB and is not in the dead letter: no payment has such a key",
            ),
            Self::NoTimestamp => ("no_timestamp", "its record has no valid timestamp"),
            Self::AheadOfTime => (
                "ahead_of_time",
                "its record's timestamp is more than an hour in the future, which brokers reject; try later",
            ),
            Self::TooManyReplays => {
                ("too_many_replays", "it was replayed too often; --max-replays raises the limit")
            }
            Self::IdTaken => (
                "message_id_conflict",
                "another payment has its message id: the replay is dead-lettered again, or written as a \
                 second payment once the id is forgotten; --force replays it",
            ),
            Self::BeyondWindow => (
                "beyond_window",
                "its record is older than idempotency.window: its message id may have been written and \
                 forgotten; --force replays it",
            ),
        }
    }
}

/// How a dead letter is replayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Go {
    /// Original timestamp, which the replay keeps.
    pub timestamp: TimestampMs,
    /// Replayed only because of `--force`: a payment could be written twice.
    pub is_at_risk: bool,
}

impl Eligibility {
    /// Decides whether to replay this dead letter. A dead letter claims no message id, but another record
    /// with the same id may have been written since. While the id is remembered, the daemon recognizes the
    /// replay as a duplicate or a conflict.
    pub fn judge(&self, letter: &Letter<'_>) -> Result<Go, Objection> {
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let latest = self.now.0.saturating_add(TIMESTAMP_AHEAD_MAX_MS);
        let earliest = self.now.0.saturating_sub(millis(self.window));
        let label = letter.label.as_ref().ok_or(Objection::NotADeadLetter)?;
        // librdkafka sends timestamp 0 as the current time.
        let timestamp = label.timestamp.filter(|at| at.0 > 0);
        let refused = [
            (label.topic != self.input_topic, Objection::OtherTopic),
            (label.left_out.is_some(), Objection::ValueLeftOut),
            (label.key_left_out.is_some(), Objection::KeyLeftOut),
            (timestamp.is_none(), Objection::NoTimestamp),
            (timestamp.is_some_and(|at| at.0 > latest), Objection::AheadOfTime),
            (letter.replays >= self.replays_max, Objection::TooManyReplays),
        ];
        if let Some((_, objection)) = refused.into_iter().find(|(applies, _)| *applies) {
            return Err(objection);
        }
        let timestamp = timestamp.ok_or(Objection::NoTimestamp)?;
        let risk = if label.reason == Some(Reason::MessageIdConflict) {
            Some(Objection::IdTaken)
        } else {
            (timestamp.0 < earliest).then_some(Objection::BeyondWindow)
        };
        match risk {
            Some(objection) if !self.is_forced => Err(objection),
            risk => Ok(Go { timestamp, is_at_risk: risk.is_some() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dlq::letter::Place;
    use crate::domain::publication::Header;
    use crate::domain::record::{Offset, Partition};

    const NOW: i64 = 1_700_000_000_000;
    const HOUR: i64 = 3_600_000;

    fn terms() -> Eligibility {
        Eligibility {
            input_topic: "input".to_owned(),
            now: TimestampMs(NOW),
            window: Duration::from_secs(7 * 86_400),
            replays_max: 3,
            is_forced: false,
        }
    }

    fn judged(terms: &Eligibility, changed: &[(&'static str, String)]) -> Result<Go, Objection> {
        let mut all = vec![
            ("dlq-reason", "invalid_field".to_owned()),
            ("dlq-detail", "x".to_owned()),
            ("dlq-topic", "input".to_owned()),
            ("dlq-partition", "7".to_owned()),
            ("dlq-offset", "41".to_owned()),
            ("dlq-timestamp", (NOW - HOUR).to_string()),
        ];
        all.extend_from_slice(changed);
        let headers: Vec<Header<'_>> =
            all.iter().map(|(name, value)| (name.as_bytes(), Some(value.as_bytes()))).collect();
        let place = Place { partition: Partition(0), offset: Offset(0) };
        terms.judge(&Letter::read(place, None, None, Some(b"{}"), headers))
    }

    fn at(ms: i64) -> [(&'static str, String); 1] {
        [("dlq-timestamp", ms.to_string())]
    }

    #[test]
    fn a_letter_of_this_topic_and_within_the_window_goes_with_its_timestamp() {
        for ms in [NOW - HOUR, NOW - 7 * 24 * HOUR, NOW + HOUR] {
            let go = Go { timestamp: TimestampMs(ms), is_at_risk: false };
            assert_eq!(judged(&terms(), &at(ms)), Ok(go));
        }
        let replayed = [("dlq-replays", "2".to_owned())];
        assert!(matches!(judged(&terms(), &replayed), Ok(Go { .. })));
    }

    #[test]
    fn each_objection_has_its_cause() {
        let cases: [(&'static str, String, Objection); 9] = [
            ("dlq-topic", "elsewhere".to_owned(), Objection::OtherTopic),
            ("dlq-value-bytes", "600000".to_owned(), Objection::ValueLeftOut),
            ("dlq-key-bytes", "70000".to_owned(), Objection::KeyLeftOut),
            ("dlq-timestamp", "-1".to_owned(), Objection::NoTimestamp),
            ("dlq-timestamp", "0".to_owned(), Objection::NoTimestamp),
            ("dlq-timestamp", (NOW + HOUR + 1).to_string(), Objection::AheadOfTime),
            ("dlq-replays", "3".to_owned(), Objection::TooManyReplays),
            ("dlq-reason", "message_id_conflict".to_owned(), Objection::IdTaken),
            ("dlq-timestamp", (NOW - 7 * 24 * HOUR - 1).to_string(), Objection::BeyondWindow),
        ];
        for (name, value, objection) in cases {
            assert_eq!(judged(&terms(), &[(name, value)]), Err(objection), "{name}");
        }
        let foreign = Letter::read("0/0".parse().unwrap(), None, None, None, []);
        assert_eq!(terms().judge(&foreign), Err(Objection::NotADeadLetter));
    }

    #[test]
    fn force_takes_the_risks_upon_itself_and_nothing_else() {
        let forced = Eligibility { is_forced: true, ..terms() };
        let old = NOW - 8 * 24 * HOUR;
        let go = Go { timestamp: TimestampMs(old), is_at_risk: true };
        assert_eq!(judged(&forced, &at(old)), Ok(go));
        let conflict = [("dlq-reason", "message_id_conflict".to_owned())];
        assert!(matches!(judged(&forced, &conflict), Ok(Go { is_at_risk: true, .. })));
        let again = [("dlq-replays", "3".to_owned())];
        assert_eq!(judged(&forced, &again), Err(Objection::TooManyReplays));
    }
}
