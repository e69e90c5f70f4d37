use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

use crate::domain::payment::MessageId;
use crate::domain::record::{Offset, Partition, SourceBatch, TimestampMs};
use crate::domain::wire;

const NOW_MS: i64 = 1_780_000_000_000;

fn all_bad_reasons() -> impl Iterator<Item = Reason> {
    BAD_REASONS.into_iter().map(|(reason, _)| reason)
}

fn config(seed: u64) -> GeneratorConfig {
    GeneratorConfig {
        seed,
        accounts: 100,
        duplicates: 0.1,
        conflicts: 0.05,
        bad: 0.05,
        bad_reasons: all_bad_reasons().filter(|reason| *reason != Reason::InvalidTimestamp).collect(),
        ids: IdKind::V4,
        value_bytes: None,
        types: ["BWI", "VSA", "MSC"].map(str::to_owned).to_vec(),
        value_bytes_max: 16_384,
        window: Duration::from_secs(7 * 86_400),
    }
}

type Sent = (Kind, Option<Vec<u8>>, Option<Vec<u8>>, Vec<(&'static str, Vec<u8>)>, i64);

fn records(config: GeneratorConfig, count: usize) -> Vec<Sent> {
    let mut generator = Generator::new(config);
    (0..count)
        .map(|at| {
            let Record { kind, timestamp_ms, headers, key, value } = generator.next(NOW_MS + at as i64);
            (kind, key, value, headers, timestamp_ms)
        })
        .collect()
}

fn is_duplicate(kind: &Kind) -> bool {
    matches!(kind, Kind::Duplicate { .. })
}

fn json(value: &Option<Vec<u8>>) -> serde_json::Value {
    serde_json::from_slice(value.as_ref().unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn the_same_seed_makes_the_same_records(seed: u64) {
        prop_assert_eq!(records(config(seed), 500), records(config(seed), 500));
        prop_assert_ne!(records(config(seed), 5), records(config(seed ^ 1), 5));
    }

    #[test]
    fn shares_come_out_as_asked(seed: u64, duplicates in 0.0..0.4, conflicts in 0.0..0.3, bad in 0.0..0.3) {
        let sent = records(GeneratorConfig { duplicates, conflicts, bad, ..config(seed) }, 20_000);
        let share = |wanted: fn(&Kind) -> bool| {
            sent.iter().filter(|(kind, ..)| wanted(kind)).count() as f64 / sent.len() as f64
        };
        // Six standard deviations of 20,000 draws are 0.02.
        prop_assert!((share(is_duplicate) - duplicates).abs() < 0.025);
        prop_assert!((share(|k| matches!(k, Kind::Conflict)) - conflicts).abs() < 0.025);
        prop_assert!((share(|k| matches!(k, Kind::Bad(_))) - bad).abs() < 0.025);
    }

    #[test]
    fn payments_have_the_form_of_the_original_producer(seed: u64) {
        for (kind, key, value, ..) in records(config(seed), 300) {
            let Kind::Payment(payment) = kind else { continue };
            let json = json(&value);
            prop_assert_eq!(json["custId"].as_u64().unwrap().to_string().into_bytes(), key.unwrap());
            prop_assert!((1..=100).contains(&payment.account));
            let id = uuid::Uuid::parse_str(json["messageId"].as_str().unwrap()).unwrap();
            prop_assert_eq!((id.get_version_num(), id.as_u128()), (4, payment.id));
            prop_assert!(["BWI", "VSA", "MSC"].contains(&json["type"].as_str().unwrap()));
            prop_assert!([2, 0, -2].contains(&json["status"].as_i64().unwrap()));
            prop_assert!(json["amount"].as_f64().unwrap() > 0.0);
        }
    }

    #[test]
    fn every_record_is_to_the_daemon_what_the_generator_says(seed: u64, ids in 0..3usize) {
        let ids = [IdKind::V4, IdKind::V7, IdKind::Ulid][ids];
        let config = GeneratorConfig { ids, bad: 0.3, duplicates: 0.2, conflicts: 0.1, ..config(seed) };
        let mut seen: HashMap<MessageId, (i64, Vec<u8>)> = HashMap::new();
        for (kind, key, value, headers, timestamp_ms) in records(config, 3_000) {
            let mut batch = SourceBatch::new();
            let headers = headers.iter().map(|(name, value)| (name.as_bytes(), Some(value.as_slice())));
            let (partition, offset) = (Partition(0), Offset(0));
            batch.push(partition, offset, Some(TimestampMs(timestamp_ms)), key.as_deref(), value.as_deref(), headers);
            let view = batch.get(0).unwrap();
            let parsed = wire::parse(&view, &wire::Rules::default());
            match (kind, parsed) {
                (Kind::Payment(payment), Ok(parsed)) => {
                    prop_assert_eq!(&parsed.message_id.as_bytes()[..], &payment.id.to_be_bytes()[..]);
                    prop_assert_eq!(parsed.currency.code(), payment.currency().0);
                    let key = key.unwrap();
                    prop_assert!(seen.insert(parsed.message_id, (parsed.payload_hash(), key)).is_none());
                }
                (Kind::Duplicate { .. }, Ok(parsed)) => {
                    prop_assert_eq!(&seen[&parsed.message_id], &(parsed.payload_hash(), key.unwrap()));
                }
                (Kind::Conflict, Ok(parsed)) => {
                    let (hash, first_key) = &seen[&parsed.message_id];
                    prop_assert!(*hash != parsed.payload_hash());
                    prop_assert_eq!(first_key, &key.unwrap());
                }
                (Kind::Bad(bad), Err(refusal)) => {
                    prop_assert_eq!(bad, refusal.reason, "{:?}", value.map(|v| String::from_utf8_lossy(&v).into_owned()));
                }
                (kind, parsed) => prop_assert!(false, "{:?} became {:?}", kind, parsed),
            }
        }
    }
}

#[test]
fn every_bad_reason_is_made_and_the_warm_up_message_is_among_them() {
    let reasons: Vec<Reason> = all_bad_reasons().collect();
    let sent = records(GeneratorConfig { bad: 1.0, bad_reasons: reasons.clone(), ..config(7) }, 3_000);
    for reason in reasons {
        let of: Vec<_> = sent.iter().filter(|(kind, ..)| *kind == Kind::Bad(reason)).collect();
        assert!(of.len() > 100, "{reason:?}");
        for (_, key, value, headers, timestamp) in of {
            let length = value.as_ref().map_or(0, Vec::len);
            let parsed = value.as_ref().map(|v| serde_json::from_slice::<serde_json::Value>(v));
            match reason {
                Reason::EmptyValue => assert_eq!(length, 0),
                Reason::TooLarge => assert!(length > 16_384 && length < 17_000),
                Reason::UnsupportedSchemaVersion => {
                    assert!(headers.iter().any(|(name, value)| *name == "schema-version" && value != b"1"));
                }
                Reason::InvalidTimestamp => assert!(*timestamp < 946_684_800_000),
                Reason::KeyMismatch => {
                    let account = json(value)["custId"].as_u64().unwrap().to_string();
                    assert_ne!(key.as_deref(), Some(account.as_bytes()));
                }
                Reason::MalformedJson => {}
                Reason::MissingField | Reason::InvalidField | Reason::StaleMessageId => {
                    assert!(parsed.unwrap().unwrap().is_object());
                }
                other => panic!("{other} is not of a single record"),
            }
        }
    }
    let sent = |value: &[u8]| sent.iter().any(|(_, _, v, ..)| v.as_deref() == Some(value));
    assert!(sent(b"{}") && sent(b"null") && sent(b""));
    assert!(!sent(b"1"));
}

#[test]
fn ordered_ids_carry_the_time_of_their_record() {
    for (ids, expected) in [(IdKind::V7, 7), (IdKind::Ulid, 0)] {
        for (kind, _, value, _, timestamp) in records(GeneratorConfig { ids, bad: 0.0, ..config(3) }, 200) {
            let Kind::Payment(payment) = kind else { continue };
            assert_eq!((payment.id >> 80) as i64, timestamp);
            let text = json(&value)["messageId"].as_str().unwrap().to_owned();
            match expected {
                7 => assert_eq!(uuid::Uuid::parse_str(&text).unwrap().get_version_num(), 7),
                _ => assert_eq!(MessageId::parse(&text).unwrap().id.to_uuid().as_u128(), payment.id),
            }
        }
    }
}

#[test]
fn values_are_padded_without_breaking_a_rule() {
    for wanted in [300, 1_200, 4_000] {
        let config = GeneratorConfig { value_bytes: Some(wanted), bad: 0.0, ..config(5) };
        for (kind, _, value, ..) in records(config, 300) {
            if matches!(kind, Kind::Payment(_) | Kind::Conflict) {
                let length = value.as_ref().unwrap().len();
                assert!((wanted - 20..=wanted + 20).contains(&length), "{length}");
                assert!(json(&value)["comment"].as_str().unwrap().chars().count() <= 1_000);
            }
        }
    }
}

#[test]
fn the_tally_knows_counts_and_exact_sums() {
    let mut generator = Generator::new(config(11));
    let mut tally = Tally::default();
    let (mut yen, mut ids) = (0u128, HashSet::new());
    for _ in 0..5_000 {
        let record = generator.next(NOW_MS);
        tally.add(&record);
        if let Kind::Payment(payment) = record.kind {
            ids.insert(payment.id);
            if payment.currency().0 == "JPY" {
                yen += u128::from(payment.minor_units);
            }
        }
    }
    assert_eq!(tally.records, 5_000);
    assert_eq!(tally.payments, ids.len() as u64);
    let report = tally.report(&[2, -2]);
    assert_eq!(report["payments_by_currency"]["JPY"]["amount"], yen.to_string());
    let statuses = &report["payments_by_status"];
    let emails = statuses["2"].as_u64().unwrap() + statuses["-2"].as_u64().unwrap();
    assert_eq!(report["expected"]["email_events"], emails);
    let letters = &report["expected"]["dead_letters_by_reason"];
    assert_eq!(letters["message_id_conflict"], tally.conflicts);
    let total: u64 = letters.as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(report["expected"]["dead_letters"], total);
}
