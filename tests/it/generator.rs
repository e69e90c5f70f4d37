//! Creating topics and generating payments with the commands; the daemon's outcomes match the report.

use std::collections::BTreeMap;
use std::path::Path;

use payment_writer::domain::record::{Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::{self, Rules};
use rdkafka::admin::{AdminOptions, ResourceSpecifier};

use crate::audit::audit;
use crate::support::{Received, Scope, Servers, block_on, wait_until};

const BAD_REASONS: &str = "empty_value,too_large,unsupported_schema_version,malformed_json,missing_field,\
                           invalid_field,key_mismatch,invalid_timestamp,stale_message_id";

fn report(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn partitions(scope: &Scope<'_>, topic: &str) -> usize {
    let metadata = scope.admin().inner().fetch_metadata(Some(topic), crate::support::DEADLINE).unwrap();
    metadata.topics()[0].partitions().len()
}

/// The outcome of a record by itself: its message id and payload hash, or the reason it is invalid.
fn outcome(record: &Received) -> Result<(String, i64), String> {
    let mut batch = SourceBatch::new();
    let headers = record.headers.iter().map(|(name, value)| (name.as_bytes(), value.as_deref()));
    batch.push(
        Partition(record.partition),
        Offset(record.offset),
        record.timestamp_ms.map(TimestampMs),
        record.key.as_deref(),
        record.value.as_deref(),
        headers,
    );
    match wire::parse(&batch.get(0).unwrap(), &Rules::default()) {
        Ok(payment) => Ok((payment.message_id.to_uuid().to_string(), payment.payload_hash())),
        Err(refusal) => Err(refusal.reason.to_string()),
    }
}

#[test]
fn topics_are_created_once_however_many_create_them_at_once() {
    let scope = Scope::new(Servers::shared(), "topics");
    let create = ["topics", "create", "--partitions", "6", "--output-partitions", "3"];

    let printed: Vec<String> = std::thread::scope(|threads| {
        let running: Vec<_> =
            (0..4).map(|_| threads.spawn(|| scope.command(&create).succeeds().stdout)).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });

    let printed = printed.concat();
    for (topic, count) in [
        (&scope.input_topic, 6),
        (&scope.read_topic, 3),
        (&scope.email_topic, 3),
        (&scope.dead_letter_topic, 3),
    ] {
        let created = format!("{topic}: created, {count} partitions\n");
        assert_eq!(printed.matches(&created).count(), 1, "{printed}");
        assert_eq!(partitions(&scope, topic), count);
    }
    assert_eq!(printed.matches("already there").count(), 12, "{printed}");
}

#[test]
fn dead_letters_are_kept_for_ever_and_may_be_large() {
    let scope = Scope::new(Servers::shared(), "dlq_retention");
    scope.command(&["topics", "create", "--partitions", "1", "--output-partitions", "1"]).succeeds();
    let topic = ResourceSpecifier::Topic(&scope.dead_letter_topic);

    let described = block_on(scope.admin().describe_configs([&topic], &AdminOptions::new())).unwrap();

    let config = described[0].as_ref().unwrap();
    for (name, value) in [
        ("retention.ms", "-1"),
        ("retention.bytes", "-1"),
        ("max.message.bytes", "2097152"),
        ("cleanup.policy", "delete"),
    ] {
        assert_eq!(config.get(name).unwrap().value.as_deref(), Some(value), "{name}");
    }
}

#[test]
fn existing_topics_with_other_settings_are_kept_with_a_warning() {
    let scope = Scope::new(Servers::shared(), "topics_there");
    scope.create_topics(2, 1);

    let again =
        scope.command(&["topics", "create", "--partitions", "5", "--output-partitions", "1"]).succeeds();

    assert!(again.stdout.contains(&format!("{}: already there, 2 partitions", scope.input_topic)));
    assert!(
        again.stderr.contains(&format!("{} has 2 partitions, not 5", scope.input_topic)),
        "{}",
        again.stderr
    );
    assert!(
        again.stderr.contains(&format!("{} has max.message.bytes=", scope.dead_letter_topic)),
        "{}",
        again.stderr
    );
    assert!(!again.stderr.contains(&format!("{} has", scope.read_topic)), "{}", again.stderr);
}

#[test]
fn topics_that_cannot_be_created_are_named_with_the_reason() {
    let scope = Scope::new(Servers::shared(), "topics_refused");
    let refused = scope.command(&["topics", "create", "--replication-factor", "7"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains(&scope.email_topic), "{}", refused.stderr);
    assert!(refused.stderr.contains("replication factor"), "{}", refused.stderr);
}

#[test]
fn produce_sends_what_its_report_says() {
    let scope = Scope::new(Servers::shared(), "produce");
    scope.create_topics(8, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let shares = ["--duplicates", "0.1", "--conflicts", "0.05", "--bad", "0.1", "--bad-reasons", BAD_REASONS];
    let sending = ["produce", "--count", "5000", "--seed", "7", "--report", path.to_str().unwrap()];

    let printed = scope.command(&[sending.as_slice(), &shares].concat()).succeeds().stdout;

    let report = report(&path);
    assert!(printed.contains("sent 5000 records"), "{printed}");
    let records = scope.read_all(&scope.input_topic);
    assert_eq!(records.len(), 5_000);
    let (mut payments, mut bad) = (BTreeMap::new(), BTreeMap::<String, u64>::new());
    let (mut duplicates, mut conflicts) = (0, 0);
    // By partition and offset: there a repeat must follow its payment.
    for record in &records {
        match outcome(record) {
            Err(reason) => *bad.entry(reason).or_default() += 1,
            Ok((id, hash)) => match payments.get(&id) {
                None => drop(payments.insert(id, hash)),
                Some(first) if *first == hash => duplicates += 1,
                Some(_) => conflicts += 1,
            },
        }
    }
    assert_eq!(report["payments"], payments.len());
    assert_eq!(report["duplicates"], duplicates);
    assert_eq!(report["conflicts"], conflicts);
    assert_eq!(report["bad_by_reason"], serde_json::to_value(&bad).unwrap());
    assert_eq!(bad.len(), BAD_REASONS.split(',').count());
    assert_eq!((&report["undelivered"], &report["interrupted"]), (&0.into(), &false.into()));
    assert!(records.iter().any(|r| r.has_header("correlation-id") && r.has_header("traceparent")));
}

#[test]
fn the_daemons_outcomes_match_the_generators_report() {
    let scope = Scope::new(Servers::shared(), "produce_run");
    scope.create_topics(4, 2);
    scope.command(&["migrate"]).succeeds();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let shares =
        ["--duplicates", "0.1", "--conflicts", "0.02", "--bad", "0.05", "--bad-reasons", BAD_REASONS];
    for (ids, seed) in [("v4", "1"), ("v7", "2"), ("ulid", "3")] {
        let sending = [
            "produce",
            "--yes",
            "--count",
            "3000",
            "--ids",
            ids,
            "--seed",
            seed,
            "--report",
            path.to_str().unwrap(),
        ];
        let before = scope.count("payment_core");
        let (reads, emails, letters) = outputs(&scope);
        scope.command(&[sending.as_slice(), &shares].concat()).succeeds();

        scope.command(&["run", "--until-caught-up"]).succeeds();

        let expected = &report(&path)["expected"];
        assert_eq!(expected["written"], scope.count("payment_core") - before, "{ids}");
        let (reads_now, emails_now, letters_now) = outputs(&scope);
        assert_eq!(expected["read_events"], reads_now - reads, "{ids}");
        assert_eq!(expected["email_events"], emails_now - emails, "{ids}");
        let new: BTreeMap<&String, u64> = letters_now
            .iter()
            .map(|(reason, count)| (reason, count - letters.get(reason).copied().unwrap_or_default()))
            .collect();
        assert_eq!(expected["dead_letters_by_reason"], serde_json::to_value(new).unwrap(), "{ids}");
    }
}

type Outputs = (usize, usize, BTreeMap<String, u64>);

fn outputs(scope: &Scope<'_>) -> Outputs {
    let mut letters = BTreeMap::new();
    for letter in scope.read_all(&scope.dead_letter_topic) {
        *letters.entry(letter.header("dlq-reason").to_owned()).or_default() += 1;
    }
    (scope.read_all(&scope.read_topic).len(), scope.read_all(&scope.email_topic).len(), letters)
}

#[test]
fn the_same_seed_sends_the_same_payments_again() {
    let scope = Scope::new(Servers::shared(), "produce_seed");
    scope.create_topics(4, 1);
    for _ in 0..2 {
        scope.command(&["produce", "--count", "500", "--seed", "9"]).succeeds();
    }
    let mut seen = BTreeMap::<_, usize>::new();
    for record in scope.read_all(&scope.input_topic) {
        *seen.entry((record.key, record.value)).or_default() += 1;
    }
    assert_eq!(seen.len(), 500);
    assert!(seen.values().all(|times| *times == 2));
}

#[test]
fn an_interrupted_produce_reports_exactly_what_it_sent() {
    let scope = Scope::new(Servers::shared(), "produce_stop");
    scope.create_topics(2, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let mut producing = scope.daemon(&["produce", "--rate", "700", "--report", path.to_str().unwrap()]);
    wait_until("something was sent", || scope.read_all(&scope.input_topic).len() > 100);

    producing.signal("INT");

    assert_eq!(producing.wait().code(), Some(0), "{}", producing.log());
    let report = report(&path);
    assert_eq!(report["interrupted"], true);
    assert_eq!(report["records"], scope.read_all(&scope.input_topic).len());
}

#[test]
fn produce_does_not_create_a_missing_topic() {
    let scope = Scope::new(Servers::shared(), "produce_missing");
    let refused = scope.command(&["produce", "--count", "1"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("topics create"), "{}", refused.stderr);
    let metadata = scope.admin().inner().fetch_metadata(None, crate::support::DEADLINE).unwrap();
    assert!(metadata.topics().iter().all(|topic| topic.name() != scope.input_topic));
}

#[test]
fn produce_sends_to_a_topic_that_a_daemon_reads_only_if_that_is_confirmed() {
    // GIVEN a daemon that reads the topic
    let scope = Scope::new(Servers::shared(), "produce_confirmed");
    scope.prepare(2, 1);
    let mut daemon = scope.daemon(&["run"]);
    daemon.wait_for_partitions("it is a member", |partitions| partitions == 2);

    // WHEN there is no terminal for a confirmation, THEN nothing is sent, and the error names the option
    let refused = scope.command(&["produce", "--count", "5"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("--yes") && refused.stderr.contains(&scope.group_id),
        "{}",
        refused.stderr
    );
    assert_eq!(offsets(&scope), 0);

    // AND with it they are sent; without a daemon they are sent without it
    scope.command(&["produce", "--count", "5", "--yes"]).succeeds();
    daemon.drains();
    scope.delete_group_when_empty();
    scope.command(&["produce", "--count", "5"]).succeeds();
    assert_eq!(offsets(&scope), 10);
}

#[test]
fn records_are_compressed_as_asked() {
    let scope = Scope::new(Servers::shared(), "produce_codecs");
    scope.create_topics(1, 1);
    let runs = [("none", 100), ("gzip", 200), ("snappy", 300), ("lz4", 400), ("zstd", 500)];
    for (codec, count) in runs {
        scope.command(&["produce", "--count", &count.to_string(), "--compression", codec]).succeeds();
    }

    let mut batches = scope.batches(&scope.input_topic, 0).into_iter();
    for (codec, count) in runs {
        let (mut records, mut compressed) = (0, 0);
        while records < count {
            let batch = batches.next().unwrap();
            assert!(!batch.is_transactional);
            // librdkafka sends a batch uncompressed if compression does not make it smaller: a single record.
            assert!(batch.codec == codec || batch.records == 1, "{}, not {codec}", batch.codec);
            records += batch.records;
            compressed += if batch.codec == codec { batch.records } else { 0 };
        }
        assert_eq!(records, count, "a batch holds records of two runs");
        assert!(compressed > count / 2, "{compressed} of {count} are {codec}");
    }
    assert!(batches.next().is_none());
    assert_eq!(scope.read_all(&scope.input_topic).len(), 1_500);
}

/// Records in the log, including aborted ones and control records.
fn offsets(scope: &Scope<'_>) -> i64 {
    scope.ends().values().sum()
}

#[test]
fn aborted_transactions_are_sent_again_and_not_counted() {
    // GIVEN records in transactions, a fifth of which are aborted
    let scope = Scope::ready("produce_aborts", 4, 2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let mut sending = vec!["produce", "--count", "3000", "--report", path.to_str().unwrap(), "--bad", "0.05"];
    sending.extend(["--duplicates", "0.1", "--conflicts", "0.02", "--compression", "zstd"]);
    sending.extend(["--transaction-size", "70", "--aborted-share", "0.2"]);

    let printed = scope.command(&sending).succeeds().stdout;

    // THEN a read_committed consumer gets all of them
    let report = report(&path);
    assert_eq!(scope.read_all(&scope.input_topic).len(), 3_000);
    // AND the report counts the transactions: 42 of 70 records and one of 60; each fourth is aborted before
    assert_eq!(
        report["transactions"],
        serde_json::json!({"committed": 43, "aborted": 10, "aborted_records": 700})
    );
    assert_eq!((&report["records"], &report["undelivered"]), (&3_000.into(), &0.into()));
    assert!(printed.contains("transactions aborted"), "{printed}");
    // AND the log also has the aborted records, and each partition ends with a control record
    assert!(offsets(&scope) > 3_700 + 4, "{}", offsets(&scope));

    // WHEN the daemon has read them
    scope.drain();
    // THEN only the committed records had an outcome, as the report expects
    assert_eq!(report["expected"]["written"], scope.count("payment_core"));
    let (reads, emails, letters) = outputs(&scope);
    assert_eq!(report["expected"]["read_events"], reads);
    assert_eq!(report["expected"]["email_events"], emails);
    assert_eq!(report["expected"]["dead_letters_by_reason"], serde_json::to_value(letters).unwrap());
    audit(&scope).succeeds();
}

#[test]
fn transactions_keep_their_rate_and_are_committed_at_the_end_and_when_interrupted() {
    let scope = Scope::new(Servers::shared(), "produce_rate");
    scope.create_topics(2, 1);
    // Longer than any of the runs here.
    let in_transactions = ["--transaction-size", "100000", "--aborted-share", "0.5"];
    let steady = ["produce", "--rate", "500", "--duration", "1s"];

    scope.command(&[&steady[..], &in_transactions].concat()).succeeds();

    assert_eq!(scope.read_all(&scope.input_topic).len(), 500);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let endless = ["produce", "--rate", "700", "--report", path.to_str().unwrap()];
    let mut producing = scope.daemon(&[&endless[..], &in_transactions].concat());
    // A transaction that is committed after some seconds is not the last one.
    wait_until("a transaction was committed", || scope.read_all(&scope.input_topic).len() > 500);
    producing.signal("INT");
    assert_eq!(producing.wait().code(), Some(0), "{}", producing.log());
    let report = report(&path);
    assert_eq!(report["records"].as_u64().unwrap() + 500, scope.read_all(&scope.input_topic).len() as u64);
}

#[test]
fn a_share_of_aborted_transactions_needs_transactions() {
    let scope = Scope::new(Servers::shared(), "produce_usage");
    for arguments in [
        &["--aborted-share", "0.1"][..],
        &["--transaction-size", "10", "--aborted-share", "0.6"],
        &["--transaction-size", "0"],
        &["--compression", "brotli"],
    ] {
        let refused = scope.command(&[&["produce", "--count", "1"], arguments].concat());
        assert_eq!(refused.code, Some(2), "{arguments:?}: {}", refused.stderr);
    }
}
