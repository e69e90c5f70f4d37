use std::collections::HashMap;

use super::*;
use crate::domain::batch::{Answer, Progress, Refused};
use crate::domain::record::{Offset, SourceBatch, TimestampMs};
use crate::domain::wire::Rules;

const TOPIC_ID: Uuid = Uuid::from_u128(0x0a1b_2c3d_4e5f_6071_8293_a4b5_c6d7_e8f9);
const NOW: TimestampMs = TimestampMs(1_767_225_600_123);

/// A sent message: topic, value, headers.
type Sent = (OutputTopic, Option<Vec<u8>>, Vec<(String, Option<String>)>);

fn payment(n: u8, status: i32) -> Vec<u8> {
    format!(
        r#"{{"messageId":"0197b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e{n:02x}","amount":1,"status":{status},"currency":"EUR","custId":7,"type":"BWI"}}"#
    )
    .into_bytes()
}

struct Input {
    source: SourceBatch,
    reached: HashMap<i32, i64>,
}

impl Input {
    fn new() -> Self {
        Self { source: SourceBatch::new(), reached: HashMap::new() }
    }

    fn push(mut self, partition: i32, offset: i64, value: &[u8], headers: &[(&str, Option<&[u8]>)]) -> Self {
        let headers = headers.iter().map(|(name, value)| (name.as_bytes(), *value));
        self.source.push(Partition(partition), Offset(offset), Some(NOW), Some(b"7"), Some(value), headers);
        self.reached.insert(partition, Offset(offset).next().0);
        self
    }

    /// A publication that starts at `publish_from` in each partition of `commits`.
    fn publication(self, commits: &[i32], publish_from: i64, emits: bool) -> Publication {
        let progress = self.reached.iter().map(|(p, reached)| Progress {
            partition: Partition(*p),
            seen: NextOffset(0),
            reached: NextOffset(*reached),
            timestamp: None,
        });
        let batch = Batch::assemble(self.source, progress.collect(), &Rules::default());
        let outcomes = batch.decide(&Answer::default(), &Refused::default());
        let commits = commits
            .iter()
            .map(|p| OffsetCommit {
                partition: Partition(*p),
                publish_from: NextOffset(publish_from),
                commit: NextOffset(self.reached[p]),
            })
            .collect();
        Publication::of_batch(batch, outcomes, commits, emits)
    }
}

fn sent(publication: &Publication) -> (Vec<Sent>, OutputCounts) {
    let mut all = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let counts = publication
        .for_each_output("payments", TOPIC_ID, |output| {
            assert_eq!(output.key, Some(&b"7"[..]), "the record's own key");
            let headers = output.headers.iter().map(|(name, value)| (text(name), value.map(text)));
            all.push((output.topic, output.value.map(<[u8]>::to_vec), headers.collect()));
            Ok::<(), ()>(())
        })
        .unwrap();
    (all, counts)
}

fn header(name: &str, value: &str) -> (String, Option<String>) {
    (name.to_owned(), Some(value.to_owned()))
}

#[test]
fn a_success_has_two_events_and_any_other_payment_one() {
    let input = Input::new().push(3, 10, &payment(1, 2), &[]).push(3, 11, &payment(2, 0), &[]);
    let (all, counts) = sent(&input.publication(&[3], 0, true));
    let topics: Vec<_> = all.iter().map(|(topic, ..)| *topic).collect();
    assert_eq!(topics, [OutputTopic::Read, OutputTopic::Email, OutputTopic::Read]);
    for ((_, _, headers), offset) in all.iter().zip([10, 10, 11]) {
        assert_eq!(*headers, [header("source", &format!("0a1b2c3d/3/{offset}"))]);
    }
    assert_eq!(counts.by_topic, [2, 1, 0]);
    assert_eq!(counts.by_reason.iter().sum::<u64>(), 0);
}

#[test]
fn an_event_carries_the_records_trace_and_nothing_else_of_its_headers() {
    let input = Input::new().push(
        0,
        4,
        &payment(1, 0),
        &[
            ("traceparent", Some(b"00-ab")),
            ("source", Some(b"brought along")),
            ("schema-version", Some(b"1")),
            ("correlation-id", None),
            ("x", Some(b"y")),
        ],
    );
    let (all, _) = sent(&input.publication(&[0], 0, true));
    let wanted = [
        header("traceparent", "00-ab"),
        ("correlation-id".to_owned(), None),
        header("source", "0a1b2c3d/0/4"),
    ];
    assert_eq!(all[0].2, wanted);
}

#[test]
fn endless_trace_headers_do_not_outgrow_an_event() {
    let long = vec![b'x'; TRACE_HEADER_BYTES_MAX + 1];
    let mut headers = vec![("traceparent", Some(&long[..]))];
    headers.extend(std::iter::repeat_n(("correlation-id", Some(&b"c"[..])), 1_000));
    let (all, _) = sent(&Input::new().push(0, 4, &payment(1, 0), &headers).publication(&[0], 0, true));
    let headers = &all[0].2;
    assert!(headers.len() < 10 && headers.iter().all(|(name, _)| name != "traceparent"));
    assert_eq!(headers.last(), Some(&header("source", "0a1b2c3d/0/4")));
}

#[test]
fn a_dead_letter_is_the_record_itself_with_the_reason() {
    let value = b"{not json";
    let input = Input::new().push(
        5,
        77,
        value,
        &[
            ("traceparent", Some(b"00-ab")),
            ("dlq-reason", Some(b"of an earlier life")),
            ("dlq-replays", Some(b"2")),
            ("dlq-value-sha256", Some(b"00")),
            ("source", Some(b"old")),
            ("x", None),
            ("x", Some(b"again")),
        ],
    );
    let (all, counts) = sent(&input.publication(&[5], 0, true));
    let (topic, sent_value, headers) = &all[0];
    assert_eq!((*topic, sent_value.as_deref()), (OutputTopic::DeadLetter, Some(&value[..])));
    let detail = headers.iter().find(|(name, _)| name == "dlq-detail").unwrap().1.clone().unwrap();
    assert!(!detail.is_empty());
    let wanted = [
        header("traceparent", "00-ab"),
        header("dlq-replays", "2"),
        ("x".to_owned(), None),
        header("x", "again"),
        header("dlq-reason", "malformed_json"),
        header("dlq-detail", &detail),
        header("dlq-topic", "payments"),
        header("dlq-partition", "5"),
        header("dlq-offset", "77"),
        header("dlq-timestamp", "1767225600123"),
        header("source", "0a1b2c3d/5/77"),
    ];
    assert_eq!(*headers, wanted);
    assert_eq!(counts.by_topic, [0, 0, 1]);
    let place = Reason::ALL.iter().position(|r| *r == Reason::MalformedJson).unwrap();
    assert_eq!(counts.by_reason[place], 1);
}

#[test]
fn a_dead_letter_of_a_record_without_key_value_or_time_says_so() {
    let mut source = SourceBatch::new();
    source.push(Partition(0), Offset(0), None, None, None, []);
    let progress = Progress {
        partition: Partition(0),
        seen: NextOffset(0),
        reached: NextOffset(1),
        timestamp: Some(None),
    };
    let batch = Batch::assemble(source, vec![progress], &Rules::default());
    let outcomes = batch.decide(&Answer::default(), &Refused::default());
    let commit = OffsetCommit { partition: Partition(0), publish_from: NextOffset(0), commit: NextOffset(1) };
    let publication = Publication::of_batch(batch, outcomes, vec![commit], true);
    let mut seen = 0;
    publication
        .for_each_output("payments", TOPIC_ID, |output| {
            assert_eq!((output.key, output.value), (None, None));
            let value = |name: &[u8]| output.headers.iter().find(|(n, _)| *n == name).and_then(|(_, v)| *v);
            assert_eq!(value(b"dlq-reason"), Some(&b"empty_value"[..]));
            assert_eq!(value(b"dlq-timestamp"), Some(&b"-1"[..]));
            assert_eq!(value(b"dlq-value-bytes"), None, "nothing was left out");
            seen += 1;
            Ok::<(), ()>(())
        })
        .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn a_huge_value_is_left_out_of_its_dead_letter_and_its_hash_stands_for_it() {
    let largest = vec![b'x'; DEAD_LETTER_VALUE_BYTES_MAX];
    let larger = vec![b'x'; DEAD_LETTER_VALUE_BYTES_MAX + 1];
    let input = Input::new().push(0, 0, &largest, &[]).push(0, 1, &larger, &[]);
    let (all, _) = sent(&input.publication(&[0], 0, true));
    assert_eq!(all[0].1.as_deref(), Some(&largest[..]));
    assert!(all[0].2.iter().all(|(name, _)| !name.starts_with("dlq-value")));
    assert_eq!(all[1].1, None);
    assert!(all[1].2.contains(&header("dlq-reason", "too_large")));
    assert!(all[1].2.contains(&header("dlq-value-bytes", "524289")));
    let mut hash = String::new();
    for byte in Sha256::digest(&larger) {
        write!(hash, "{byte:02x}").unwrap();
    }
    assert!(all[1].2.contains(&header("dlq-value-sha256", &hash)));
}

#[test]
fn a_huge_key_is_left_out_of_its_dead_letter_and_its_hash_stands_for_it() {
    let keys = [vec![b'x'; DEAD_LETTER_KEY_BYTES_MAX], vec![b'x'; DEAD_LETTER_KEY_BYTES_MAX + 1]];
    let mut source = SourceBatch::new();
    for (offset, key) in (0..).zip(&keys) {
        source.push(Partition(0), Offset(offset), Some(TimestampMs(1)), Some(key), Some(b"{"), []);
    }
    let reached = NextOffset(2);
    let progress = Progress { partition: Partition(0), seen: NextOffset(0), reached, timestamp: Some(None) };
    let batch = Batch::assemble(source, vec![progress], &Rules::default());
    let outcomes = batch.decide(&Answer::default(), &Refused::default());
    let commit = OffsetCommit { partition: Partition(0), publish_from: NextOffset(0), commit: reached };
    let mut seen: Vec<(Option<usize>, Option<String>)> = Vec::new();
    Publication::of_batch(batch, outcomes, vec![commit], true)
        .for_each_output("payments", TOPIC_ID, |output| {
            let header = output.headers.iter().find(|(name, _)| *name == b"dlq-key-bytes");
            let bytes = header.and_then(|(_, v)| *v).map(|v| String::from_utf8_lossy(v).into_owned());
            seen.push((output.key.map(<[u8]>::len), bytes));
            Ok::<(), ()>(())
        })
        .unwrap();
    assert_eq!(seen, [(Some(65_536), None), (None, Some("65537".to_owned()))]);
}

#[test]
fn a_crowd_of_empty_headers_does_not_block_a_partition() {
    let crowd: Vec<(&str, Option<&[u8]>)> = vec![("", None); 100_000];
    let input = Input::new().push(0, 0, b"{", &crowd);
    let (all, _) = sent(&input.publication(&[0], 0, true));
    assert_eq!(all[0].2.len(), 7, "those of the daemon alone");
}

#[test]
fn huge_headers_do_not_block_a_partition() {
    let huge = vec![b'x'; OWN_HEADERS_BYTES_MAX];
    let input = Input::new().push(0, 0, b"{", &[("x", Some(&huge))]);
    let (all, _) = sent(&input.publication(&[0], 0, true));
    let names: Vec<_> = all[0].2.iter().map(|(name, _)| name.as_str()).collect();
    let ours =
        ["dlq-reason", "dlq-detail", "dlq-topic", "dlq-partition", "dlq-offset", "dlq-timestamp", "source"];
    assert_eq!(names, ours);
}

#[test]
fn the_second_of_an_id_is_silent_or_a_conflict() {
    let input = Input::new().push(0, 0, &payment(1, 0), &[]).push(0, 1, &payment(1, 0), &[]).push(
        0,
        2,
        &payment(1, 2),
        &[],
    );
    let (all, counts) = sent(&input.publication(&[0], 0, true));
    assert_eq!(counts.by_topic, [1, 0, 1]);
    assert!(all[1].2.contains(&header("dlq-reason", "message_id_conflict")));
    assert!(all[1].2.contains(&header("source", "0a1b2c3d/0/2")));
}

#[test]
fn below_the_gate_nothing_is_sent() {
    let input = || {
        Input::new().push(0, 4, &payment(1, 2), &[]).push(1, 4, b"{", &[]).push(0, 5, b"{", &[]).push(
            1,
            5,
            &payment(2, 0),
            &[],
        )
    };
    let sources = |publication: &Publication| -> Vec<String> {
        let all = sent(publication).0;
        all.iter().map(|(.., headers)| headers.last().unwrap().1.clone().unwrap()).collect()
    };
    assert_eq!(sources(&input().publication(&[0, 1], 5, true)), ["0a1b2c3d/0/5", "0a1b2c3d/1/5"]);
    assert_eq!(sources(&input().publication(&[0, 1], 6, true)), [""; 0]);
    // A partition without an offset to commit publishes nothing.
    assert_eq!(sources(&input().publication(&[1], 4, true)), ["0a1b2c3d/1/4", "0a1b2c3d/1/5"]);
    // A daemon that writes rows only.
    assert_eq!(sources(&input().publication(&[0, 1], 0, false)), [""; 0]);
    // AND the dead letters to log are the published ones.
    let named =
        |publish_from, emits| input().publication(&[0, 1], publish_from, emits).dead_letters().count();
    assert_eq!((named(0, true), named(5, true), named(0, false)), (2, 1, 0));
}

#[test]
fn each_offset_is_committed_with_our_mark() {
    let identity = Identity { topic_id: TOPIC_ID, database_id: Uuid::from_u128(5) };
    let publication = Input::new().push(4, 8, b"{", &[]).publication(&[4], 0, true);
    let offsets: Vec<_> = publication.offsets(&identity).collect();
    let mark =
        CommitMetadata { topic_id: TOPIC_ID, position: NextOffset(9), database_id: Uuid::from_u128(5) };
    assert_eq!(offsets.len(), 1);
    assert_eq!((offsets[0].0, offsets[0].1), (Partition(4), NextOffset(9)));
    assert_eq!(CommitMetadata::parse(&offsets[0].2), Some(mark));
    assert_eq!(publication.committed().positions(), [(Partition(4), NextOffset(9))]);
}

#[test]
fn a_source_is_read_back_as_it_was_written_and_nothing_else_is_one() {
    let source = Source { topic_id_prefix: 0x0a0b, partition: Partition(99), offset: Offset(1 << 40) };
    assert_eq!(source.to_string(), "00000a0b/99/1099511627776");
    assert_eq!(Source::parse(source.to_string().as_bytes()), Some(source));
    for other in
        ["", "00000a0b/99", "a0b/99/1", "00000a0b/99/1/2", "00000a0b/x/1", "0000000g/1/1", "\u{ff}/1/1"]
    {
        assert_eq!(Source::parse(other.as_bytes()), None, "{other}");
    }
}
