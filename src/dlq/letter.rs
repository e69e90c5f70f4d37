//! Parsing of a record of the dead-letter topic. Pure.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use crate::domain::publication::{Header, REPLACED_HEADERS, REPLAYS_HEADER};
use crate::domain::record::{Offset, Partition, TimestampMs};
use crate::domain::wire::Reason;

/// Place of a dead letter in the dead-letter topic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place {
    /// Partition of the dead-letter topic.
    pub partition: Partition,
    /// Offset in it.
    pub offset: Offset,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.offset)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (partition, offset) = text.split_once('/')?;
            let (partition, offset) = (partition.parse().ok()?, offset.parse().ok()?);
            (partition >= 0 && offset >= 0)
                .then_some(Self { partition: Partition(partition), offset: Offset(offset) })
        };
        read().ok_or_else(|| "a place in the dead-letter topic, PARTITION/OFFSET, such as 3/120".to_owned())
    }
}

/// One record of the dead-letter topic.
#[derive(Clone, Debug)]
pub struct Letter<'a> {
    /// Place in the dead-letter topic.
    pub place: Place,
    /// Timestamp of the dead letter: when the daemon wrote it.
    pub lettered_at: Option<TimestampMs>,
    /// Key of the original record, or null if it was left out.
    pub key: Option<&'a [u8]>,
    /// Value of the original record, or null if it was left out.
    pub value: Option<&'a [u8]>,
    /// How often the original record had been replayed before this dead letter.
    pub replays: u32,
    /// Contents of the daemon's headers; `None` if the daemon did not write this record.
    pub label: Option<Label<'a>>,
    headers: Vec<Header<'a>>,
}

/// Contents of the headers of a dead letter.
#[derive(Clone, Debug)]
pub struct Label<'a> {
    /// Reason; `None` if this version does not know it.
    pub reason: Option<Reason>,
    /// Field and rule, in words.
    pub detail: Cow<'a, str>,
    /// Topic of the original record.
    pub topic: Cow<'a, str>,
    /// Partition of the original record.
    pub partition: Partition,
    /// Offset of the original record.
    pub offset: Offset,
    /// Timestamp of the original record; `None` if it has none.
    pub timestamp: Option<TimestampMs>,
    /// Size and SHA-256 of a value that was left out.
    pub left_out: Option<LeftOut<'a>>,
    /// Size and SHA-256 of a key that was left out.
    pub key_left_out: Option<LeftOut<'a>>,
}

/// Description of a value or key that was left out.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct LeftOut<'a> {
    /// Size in bytes.
    pub bytes: Cow<'a, str>,
    /// SHA-256 in hex.
    pub sha256: Cow<'a, str>,
}

/// The reason with this name, if this version knows it.
pub fn reason(name: &str) -> Option<Reason> {
    name.parse().ok()
}

fn text<'a>(headers: &[Header<'a>], name: &str) -> Option<Cow<'a, str>> {
    // The daemon appends its headers after those of the original record.
    let (_, value) = headers.iter().rev().find(|(found, _)| *found == name.as_bytes())?;
    value.map(String::from_utf8_lossy)
}

fn number<T: FromStr>(headers: &[Header<'_>], name: &str) -> Option<T> {
    text(headers, name)?.parse().ok()
}

fn label<'a>(headers: &[Header<'a>]) -> Option<Label<'a>> {
    let reason = text(headers, "dlq-reason")?;
    let timestamp: i64 = number(headers, "dlq-timestamp")?;
    let left_out = |bytes, sha256| {
        text(headers, bytes).map(|bytes| LeftOut { bytes, sha256: text(headers, sha256).unwrap_or_default() })
    };
    Some(Label {
        reason: self::reason(&reason),
        detail: text(headers, "dlq-detail")?,
        topic: text(headers, "dlq-topic")?,
        partition: Partition(number(headers, "dlq-partition")?),
        offset: Offset(number(headers, "dlq-offset")?),
        timestamp: (timestamp >= 0).then_some(TimestampMs(timestamp)),
        left_out: left_out("dlq-value-bytes", "dlq-value-sha256"),
        key_left_out: left_out("dlq-key-bytes", "dlq-key-sha256"),
    })
}

impl<'a> Letter<'a> {
    /// Parses a record of the dead-letter topic.
    pub fn read(
        place: Place,
        lettered_at: Option<TimestampMs>,
        key: Option<&'a [u8]>,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = Header<'a>>,
    ) -> Self {
        let headers: Vec<Header<'a>> = headers.into_iter().collect();
        let replays = number(&headers, "dlq-replays").unwrap_or_default();
        Self { place, lettered_at, key, value, replays, label: label(&headers), headers }
    }

    /// Total bytes of key and value.
    pub fn bytes(&self) -> usize {
        self.key.map_or(0, <[u8]>::len) + self.value.map_or(0, <[u8]>::len)
    }

    /// Headers of the original record, including `dlq-replays`.
    pub fn own_headers(&self) -> impl Iterator<Item = Header<'a>> + '_ {
        self.headers.iter().copied().filter(|(name, _)| !REPLACED_HEADERS.contains(name))
    }

    /// Headers of the replay, without the new `dlq-replays`.
    pub fn replay_headers(&self) -> impl Iterator<Item = Header<'a>> + '_ {
        self.own_headers().filter(|(name, _)| *name != REPLAYS_HEADER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { partition: Partition(3), offset: Offset(120) };

    fn headers(changed: &'static str, to: Option<&'static [u8]>) -> Vec<Header<'static>> {
        let all: [(&str, &[u8]); 8] = [
            ("own", b"1"),
            ("dlq-replays", b"2"),
            ("dlq-reason", b"invalid_field"),
            ("dlq-detail", b"type: not one of payment.types"),
            ("dlq-topic", b"input"),
            ("dlq-partition", b"7"),
            ("dlq-offset", b"41"),
            ("dlq-timestamp", b"1700000000000"),
        ];
        let value = |name, value| if name == changed { to } else { Some(value) };
        all.into_iter()
            .map(|(name, v)| (name.as_bytes(), value(name, v)))
            .filter(|(name, value)| value.is_some() || *name == b"own")
            .collect()
    }

    fn read(headers: Vec<Header<'static>>) -> Letter<'static> {
        Letter::read(PLACE, None, Some(b"k"), None, headers)
    }

    #[test]
    fn a_place_is_read_as_it_is_shown() {
        assert_eq!("3/120".parse(), Ok(PLACE));
        assert_eq!(PLACE.to_string(), "3/120");
        for wrong in ["", "3", "3/", "/1", "-1/2", "1/-2", "1/2/3", "a/b", "3:120"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_headers_of_a_dead_letter_are_taken_apart() {
        let letter = read(headers("", None));
        let label = letter.label.as_ref().unwrap();
        assert_eq!(label.reason, Some(Reason::InvalidField));
        assert_eq!(
            (label.topic.as_ref(), label.partition, label.offset),
            ("input", Partition(7), Offset(41))
        );
        assert_eq!((label.timestamp, letter.replays), (Some(TimestampMs(1_700_000_000_000)), 2));
        assert_eq!(letter.own_headers().count(), 2);
        assert_eq!(letter.replay_headers().collect::<Vec<_>>(), [(&b"own"[..], Some(&b"1"[..]))]);
    }

    #[test]
    fn a_record_without_the_daemons_headers_is_no_dead_letter() {
        for missing in
            ["dlq-reason", "dlq-detail", "dlq-topic", "dlq-partition", "dlq-offset", "dlq-timestamp"]
        {
            assert!(read(headers(missing, None)).label.is_none(), "{missing}");
        }
        assert!(read(headers("dlq-offset", Some(b"41x"))).label.is_none());
    }

    #[test]
    fn a_reason_of_another_version_and_a_null_header_do_no_harm() {
        let letter = read(headers("dlq-reason", Some(b"of_the_future")));
        assert_eq!(letter.label.unwrap().reason, None);
        let letter = read(headers("own", None));
        assert_eq!(letter.replay_headers().collect::<Vec<_>>(), [(&b"own"[..], None)]);
        assert_eq!(read(headers("dlq-timestamp", Some(b"-1"))).label.unwrap().timestamp, None);
        assert_eq!(read(headers("dlq-replays", Some(b"many"))).replays, 0);
    }
}
