use super::checker::{Checker, Verdict};
use super::lines::{Format, Message, parse};
use super::range::{Asked, Chosen};
use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use crate::domain::wire::{Reason, Rules};
use crate::generator::{BAD_REASONS, Generator, GeneratorConfig, IdKind, Kind};

const AT: TimestampMs = TimestampMs(1_709_251_199_999);
const ID: &str = "0197b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e8f";

fn value(id: &str, amount: &str) -> String {
    format!(
        r#"{{"messageId":"{id}","amount":{amount},"status":2,"currency":"EUR","custId":57,"type":"BWI"}}"#
    )
}

fn verdicts(lines: &[&[u8]], format: &Format) -> Vec<Verdict> {
    let mut checker = Checker::new(Rules::default());
    let numbers = 1..;
    let check = |(line, number): (&&[u8], i64)| {
        checker.check(parse(line, format).unwrap().into_batch(Offset(number), AT)).unwrap().1
    };
    lines.iter().zip(numbers).map(check).collect()
}

fn reason(verdict: &Verdict) -> Option<Reason> {
    match verdict {
        Verdict::DeadLettered { reason, .. } => Some(*reason),
        _ => None,
    }
}

const WRITTEN: Verdict = Verdict::Written { has_email: true };

#[test]
fn repeated_ids_are_duplicates_or_conflicts_with_the_first_record_that_is_valid() {
    let other = "0197b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e90";
    let lines = [
        // Invalid: claims no id.
        value(ID, "0"),
        value(ID, "10.5"),
        value(&ID.to_uppercase(), "\"10.50\""),
        value(ID, "10.51"),
        value(other, "1"),
        value(ID, "1.05E1"),
    ];
    let found = verdicts(&lines.each_ref().map(|line| line.as_bytes()), &Format::Value);
    let first = (Partition(0), Offset(2));
    assert_eq!(reason(&found[0]), Some(Reason::InvalidField));
    assert_eq!((&found[1], &found[4]), (&WRITTEN, &WRITTEN));
    assert_eq!((&found[2], &found[5]), (&Verdict::Duplicate { first }, &Verdict::Duplicate { first }));
    let Verdict::DeadLettered { reason: Reason::MessageIdConflict, first: of, detail } = &found[3] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (*of, detail.as_str()),
        (Some(first), "messageId: seen on another record with another payload")
    );
}

#[test]
fn every_bad_record_of_the_generator_has_its_reason() {
    let mut generator = Generator::new(GeneratorConfig {
        seed: 5,
        accounts: 100,
        duplicates: 0.0,
        conflicts: 0.0,
        bad: 0.7,
        bad_reasons: BAD_REASONS.map(|(reason, _)| reason).into(),
        ids: IdKind::V7,
        value_bytes: None,
        types: Rules::default().payment_types,
        value_bytes_max: Rules::default().payment_bytes_max,
        window: Rules::default().idempotency_window,
    });
    let mut checker = Checker::new(Rules::default());
    let mut met = std::collections::BTreeSet::new();
    for offset in 0..3_000 {
        let record = generator.next(AT.0);
        let mut source = SourceBatch::new();
        let headers = record.headers.iter().map(|(name, value)| (name.as_bytes(), Some(&value[..])));
        let timestamp = Some(TimestampMs(record.timestamp_ms));
        source.push(
            Partition(3),
            Offset(offset),
            timestamp,
            record.key.as_deref(),
            record.value.as_deref(),
            headers,
        );
        let (_, verdict) = checker.check(source).unwrap();
        let expected = match record.kind {
            Kind::Bad(bad) => Some(bad),
            _ => None,
        };
        assert_eq!(reason(&verdict), expected, "{record:?}");
        met.extend(expected);
    }
    assert_eq!(met.len(), 9);
}

#[test]
fn a_value_alone_is_checked_by_all_rules_but_that_of_the_key() {
    let late = value("01936f1e-0000-7c3a-9d1e-2f4b8c6d7e8f", "1");
    let lines = [
        value(ID, "10.5"),
        String::new(),
        "{}".to_owned(),
        value("x", "1"),
        late,
        format!("{} ", value(ID, "10.5").replace("\"custId\":57", "\"cust\\u0049d\":0,\"x\":1e999")),
    ];
    let found = verdicts(&lines.each_ref().map(|line| line.as_bytes()), &Format::Value);
    let reasons: Vec<_> = found.iter().map(reason).collect();
    let expected = [
        None,
        Some(Reason::EmptyValue),
        Some(Reason::MissingField),
        Some(Reason::InvalidField),
        Some(Reason::StaleMessageId),
        // By its payload: its key is right.
        Some(Reason::MessageIdConflict),
    ];
    assert_eq!(reasons, expected);
}

#[test]
fn a_key_is_what_precedes_the_first_separator() {
    let format = Format::KeyAndValue("::".to_owned());
    let key = |line: &'static str| {
        let Message { key, value, .. } = parse(line.as_bytes(), &format).unwrap();
        (key.map(|k| String::from_utf8(k.into_owned()).unwrap()), value.unwrap().into_owned())
    };
    assert_eq!(key("57::{}::"), (Some("57".to_owned()), b"{}::".to_vec()));
    assert_eq!(key("::"), (Some(String::new()), Vec::new()));
    assert_eq!(key("57:{}"), (None, b"57:{}".to_vec()));
    let line = |key: &str| format!("{key}::{}", value(ID, "1")).into_bytes();
    let found = verdicts(&[&line("57"), &line("057"), value(ID, "1").as_bytes()], &format);
    assert_eq!(
        found.iter().map(reason).collect::<Vec<_>>(),
        [None, Some(Reason::KeyMismatch), Some(Reason::KeyMismatch)]
    );
}

#[test]
fn a_line_of_kcat_has_key_value_headers_and_timestamp() {
    let line = r#"{"topic":"t","partition":1,"offset":7,"tstype":"create","ts":1700000000000,"broker":1,"headers":["schema-version","2","x",null],"key":"5\u0037","payload":"{\"a\":\"\u00e9\"}"}"#;
    let message = parse(line.as_bytes(), &Format::KcatJson).unwrap();
    assert_eq!(message.key.as_deref(), Some(&b"57"[..]));
    assert_eq!(message.value.as_deref(), Some("{\"a\":\"é\"}".as_bytes()));
    assert_eq!(message.timestamp_ms, Some(1_700_000_000_000));
    assert_eq!(message.headers, [("schema-version".into(), Some("2".into())), ("x".into(), None)]);
    // Null, and an object whose text is taken as it is.
    let of = |line: &'static str| parse(line.as_bytes(), &Format::KcatJson).unwrap();
    let tombstone = of(r#"{"key":null,"payload":null,"ts":-1}"#);
    assert_eq!((&tombstone.key, &tombstone.value), (&None, &None));
    assert_eq!(tombstone.into_batch(Offset(1), AT).get(0).unwrap().timestamp, None);
    let object = of(r#"{"key":"57","payload": { "amount" : 1.50 } }"#);
    assert_eq!(object.value.as_deref(), Some(&br#"{ "amount" : 1.50 }"#[..]));
    assert_eq!(object.into_batch(Offset(1), AT).get(0).unwrap().timestamp, Some(AT));
}

#[test]
fn a_line_that_is_not_of_kcat_is_refused_without_its_contents() {
    for line in [
        "",
        "secret",
        r#"{"key":"secret"}"#,
        r#"{"key":["secret"],"payload":"x"}"#,
        r#"{"key":"57","payload":"x","headers":["secret"]}"#,
        r#"{"key":"57","payload":"x","headers":[null,"secret"]}"#,
        r#"{"key":"57","payload":"x","headers":{"secret":1}}"#,
        r#"{"key":"57","payload":"x","ts":"secret"}"#,
        r#"{"key":"57","payload":"\ud800secret"}"#,
    ] {
        let what = parse(line.as_bytes(), &Format::KcatJson).unwrap_err();
        assert!(what.contains("kcat -J") && !what.contains("secret"), "{line}: {what}");
    }
}

fn log(partition: i32, start: i64, end: i64) -> (Partition, LogBounds) {
    (Partition(partition), LogBounds { start: NextOffset(start), end: NextOffset(end) })
}

fn asked(from: Option<i64>, to: Option<i64>, offsets_max: i64) -> Asked {
    Asked { from: from.map(NextOffset), to: to.map(NextOffset), offsets_max }
}

fn ranges(chosen: &Chosen) -> Vec<(i32, i64, i64)> {
    chosen.ranges.iter().map(|range| (range.partition.0, range.from.0, range.to.0)).collect()
}

fn skipped(chosen: &Chosen) -> Vec<String> {
    chosen.skipped.iter().map(ToString::to_string).collect()
}

#[test]
fn offsets_that_the_log_does_not_have_are_named() {
    let logs = [log(3, 50, 100)];
    for (from, to, range, not_checked) in [
        (None, None, (50, 100), &[][..]),
        (Some(60), Some(70), (60, 70), &[]),
        (Some(10), Some(70), (50, 70), &["--partition 3 --from 10 --to 50 (no longer in the log)"]),
        (Some(60), Some(120), (60, 100), &["--partition 3 --from 100 --to 120 (not in the log yet)"]),
    ] {
        let chosen = asked(from, to, 1_000).choose(&logs).unwrap();
        assert_eq!(ranges(&chosen), [(3, range.0, range.1)]);
        assert_eq!(skipped(&chosen), not_checked);
    }
}

#[test]
fn a_range_with_nothing_to_check_is_refused_with_the_reason() {
    for (from, to, text) in [
        (Some(70), Some(70), "the range from 70 to before 70 is empty"),
        (Some(10), Some(50), "--from 10 --to 50 (no longer in the log)"),
        (Some(100), Some(120), "--from 100 --to 120 (not in the log yet)"),
        (Some(100), None, "has the offsets from 50 to before 100"),
    ] {
        let reason = asked(from, to, 1_000).choose(&[log(3, 50, 100)]).unwrap_err();
        assert!(reason.contains(text), "{reason}");
    }
    let reason = asked(None, None, 1_000).choose(&[log(0, 7, 7), log(1, 0, 0)]).unwrap_err();
    assert_eq!(reason, "its 2 partitions have no records");
}

#[test]
fn the_limit_is_shared_by_the_partitions_and_used_up() {
    let logs = [log(0, 0, 100), log(1, 5, 7), log(2, 0, 0), log(3, 10, 40)];
    for offsets_max in 1..140 {
        let chosen = asked(None, None, offsets_max).choose(&logs).unwrap();
        let checked: i64 = ranges(&chosen).iter().map(|(_, from, to)| to - from).sum();
        let left: i64 = chosen.skipped.iter().map(|s| s.range.to.0 - s.range.from.0).sum();
        assert_eq!((checked, checked + left), (offsets_max.min(132), 132));
    }
    let chosen = asked(None, None, 52).choose(&logs).unwrap();
    assert_eq!(ranges(&chosen), [(0, 0, 25), (1, 5, 7), (3, 10, 35)]);
    assert_eq!(
        skipped(&chosen),
        ["--partition 0 --from 25 --to 100 (--max)", "--partition 3 --from 35 --to 40 (--max)"]
    );
}

#[test]
fn a_timestamp_is_a_time_or_milliseconds() {
    assert_eq!(super::timestamp("2024-02-29T23:59:59.999Z"), Ok(AT));
    assert_eq!(super::timestamp("1709251199999"), Ok(AT));
    assert!(super::timestamp("yesterday").unwrap_err().contains("2026-03-01T12:00:00Z"));
}
