//! `check-messages` tells what the daemon would do, and does nothing itself.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use payment_writer::domain::wire::{Reason, Rules};
use payment_writer::generator::{BAD_REASONS, Generator, GeneratorConfig, IdKind, Kind, Record};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};

use crate::support::{AT_ISO, AT_MS, DEADLINE, Finished, Message, Payment, Scope, Servers, uuid_v4, uuid_v7};

/// Runs the command with this standard input, without servers.
fn offline(arguments: &[&str], input: &[u8]) -> Finished {
    offline_with(arguments, input, &[])
}

fn offline_with(arguments: &[&str], input: &[u8], settings: &[(&str, &str)]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_payment-writer"))
        .arg("check-messages")
        .args(arguments)
        .envs(settings.iter().copied())
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|threads| {
        // It may end before it has read everything.
        threads.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    });
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The JSON objects of messages, and that of the summary.
#[track_caller]
fn objects(finished: &Finished) -> (Vec<Value>, Value) {
    let parsed = finished.stdout.lines().map(|line| {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
    });
    let mut objects: Vec<Value> = parsed.collect();
    let summary = objects.pop().unwrap_or_else(|| panic!("{finished:?}"));
    (objects, summary["summary"].clone())
}

#[track_caller]
fn says(finished: &Finished, code: i32, texts: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    for text in texts {
        assert!(
            finished.stdout.contains(text) || finished.stderr.contains(text),
            "no {text:?}: {finished:?}"
        );
    }
}

fn check(scope: &Scope<'_>, topic: &str, arguments: &[&str]) -> Finished {
    scope.command(&[&["check-messages", "--topic", topic], arguments].concat())
}

fn lines(values: &[String]) -> Vec<u8> {
    values.iter().flat_map(|value| [value.as_bytes(), b"\n"].concat()).collect()
}

#[test]
fn each_line_is_told_with_its_outcome_and_the_exit_code_says_whether_all_are_good() {
    // GIVEN values of every outcome, without servers or settings
    let good = Payment::new(uuid_v4(1), 57);
    let pending = Payment::new(uuid_v4(2), 58).status(0);
    let values = [good.json(), pending.json(), good.clone().amount("\"10.50\"").json()];
    let bad = [good.clone().amount("11").json(), String::new(), good.clone().kind("SECRET").json()];

    // WHEN only good ones are checked, by default from standard input
    let finished = offline(&[], &lines(&values));

    // THEN each has a line, and the command succeeds
    assert_eq!(
        finished.succeeds().stdout,
        "line 1: written\nline 2: written\nline 3: duplicate of line 1\n\
         messages: 3, written: 2 (e-mail events: 1), duplicates: 1, dead-lettered: 0\n\
         not checked: keys, which these lines do not have\n"
    );

    // WHEN there are bad ones, in a file
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines(&[&values[..], &bad].concat())).unwrap();
    let path = file.path().to_str().unwrap();
    let finished = offline(&["--file", path, "--quiet"], b"");

    // THEN the command fails, and says why without the contents
    assert_eq!(
        finished.stdout,
        "line 4: dead-lettered: message_id_conflict: messageId: seen on another record with another payload (line 1)\n\
         line 5: dead-lettered: empty_value: value: null or without a byte\n\
         line 6: dead-lettered: invalid_field: type: is not in payment.types\n\
         messages: 6, written: 2 (e-mail events: 1), duplicates: 1, dead-lettered: 3\n  \
         empty_value: 1\n  invalid_field: 1\n  message_id_conflict: 1\n\
         not checked: keys, which these lines do not have\n"
    );
    says(&finished, 1, &["error: 3 of 6 messages would be dead-lettered"]);
    let shown = offline(&["--file", path, "--payload"], b"");
    says(&shown, 1, &["\n  value: {", "\"type\":\"SECRET\""]);

    // AND the same as JSON
    let (told, summary) = objects(&offline(&["--file", path, "--json"], b""));
    assert_eq!(told.len(), 6);
    assert_eq!(told[0], json!({"line": 1, "outcome": "written", "email": true}));
    assert_eq!(told[2], json!({"line": 3, "outcome": "duplicate", "first": {"line": 1}}));
    assert_eq!(
        told[4],
        json!({"line": 5, "outcome": "dead_lettered", "reason": "empty_value", "detail": "value: null or without a byte"})
    );
    assert_eq!(
        summary,
        json!({
            "messages": 6, "written": 2, "emails": 1, "duplicate": 1, "dead_lettered": 3, "keys_checked": false,
            "by_reason": {"empty_value": 1, "invalid_field": 1, "message_id_conflict": 1},
        })
    );
    let (told, _) = objects(&offline(&["--file", path, "--json", "--payload"], b""));
    assert_eq!(told[0]["value"]["text"], good.json());
    assert_eq!((told[0].get("key"), &told[0]["headers"]), (None, &json!([])));
}

#[test]
fn the_settings_decide_what_is_valid() {
    // GIVEN a payment of a new type whose id is two days old
    let at = ("--at", AT_ISO);
    let payment = Payment::new(uuid_v7(AT_MS - 2 * 86_400_000, 1), 57).kind("SEP").status(0);
    let input = lines(&[payment.json()]);

    // WHEN the settings allow it or not, THEN so does the command; servers are not needed
    let told = |settings: &[(&str, &str)]| offline_with(&[at.0, at.1], &input, settings);
    says(&told(&[]), 1, &["invalid_field: type: is not in payment.types"]);
    let types = ("PAYMENT_WRITER__PAYMENT__TYPES", "BWI,SEP");
    says(&told(&[types]), 0, &["line 1: written", "(e-mail events: 0)"]);
    says(&told(&[types, ("PAYMENT_WRITER__EMAIL__STATUSES", "0")]), 0, &["(e-mail events: 1)"]);
    says(&told(&[types, ("PAYMENT_WRITER__IDEMPOTENCY__WINDOW", "1d")]), 1, &["stale_message_id"]);
    says(&told(&[types, ("PAYMENT_WRITER__PAYMENT__MAX_BYTES", "256")]), 0, &[]);
    says(&told(&[("PAYMENT_WRITER__PAYMENT__TYPE", "SEP")]), 2, &["PAYMENT_WRITER__PAYMENT__TYPES"]);

    // AND --at is the records' timestamp, by default now
    says(&offline_with(&[], &input, &[types]), 1, &["stale_message_id"]);
    says(&offline_with(&["--at", "1"], &input, &[types]), 1, &["invalid_timestamp"]);
}

#[test]
fn lines_may_have_keys_headers_and_timestamps_as_kcat_writes_them() {
    let payment = Payment::new(uuid_v4(1), 57);
    let keyed = lines(&[format!("57\t{}", payment.json()), format!("58\t{}", payment.json())]);
    says(
        &offline(&["--key-separator", "\\t"], &keyed),
        1,
        &["line 1: written", "line 2: dead-lettered: key_mismatch", "messages: 2,"],
    );

    let envelope = |changes: Value| {
        let mut value = json!({
            "topic": "t", "partition": 0, "offset": 3, "tstype": "create", "ts": AT_MS, "broker": 1,
            "headers": ["schema-version", "1"], "key": "57", "payload": payment.json(),
        });
        value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        value.to_string()
    };
    let input = lines(&[
        envelope(json!({})),
        envelope(json!({"headers": ["schema-version", "2"]})),
        envelope(json!({"key": null})),
        envelope(json!({"payload": null})),
        envelope(json!({"ts": 0})),
        envelope(json!({"payload": serde_json::from_str::<Value>(&payment.json()).unwrap()})),
    ]);
    let (told, summary) = objects(&offline(&["--kcat-json", "--json"], &input));
    let outcomes: Vec<&str> =
        told.iter().map(|o| o.get("reason").unwrap_or(&o["outcome"]).as_str().unwrap()).collect();
    assert_eq!(
        outcomes,
        [
            "written",
            "unsupported_schema_version",
            "key_mismatch",
            "empty_value",
            "invalid_timestamp",
            "duplicate"
        ]
    );
    assert_eq!(summary["keys_checked"], true);

    // With --payload, key and headers are printed, too.
    let (told, _) = objects(&offline(&["--kcat-json", "--json", "--payload"], &input));
    assert_eq!(
        (&told[1]["key"], &told[1]["headers"]),
        (&json!({"text": "57"}), &json!([["schema-version", {"text": "2"}]]))
    );

    // A line of another format is wrong usage.
    let wrong = offline(&["--kcat-json"], &[&input[..], b"{\"key\":\"SECRET\"}\n"].concat());
    says(&wrong, 2, &["line 7: is not a JSON object as of kcat -J"]);
    assert!(!wrong.stderr.contains("SECRET"), "{wrong:?}");
}

#[test]
fn wrong_usage_and_nothing_to_check_end_with_exit_code_2() {
    let good = lines(&[Payment::new(uuid_v4(1), 57).json()]);
    for (arguments, text) in [
        (&["--file", "absent.jsonl"][..], "cannot open absent.jsonl"),
        (&["--file", "x", "--topic", "t"], "--topic"),
        (&["--topic", "t", "--at", "5"], "--at"),
        (&["--topic", "t", "--from", "5"], "--partition"),
        (&["--partition", "1"], "--topic"),
        (&["--at", "soon"], "2026-03-01T12:00:00Z"),
        (&["--key-separator", ""], "not empty"),
        (&["--key-separator", ":", "--kcat-json"], "--kcat-json"),
        (&["--max", "5"], "--topic"),
        (&["--time-limit", "5s"], "--topic"),
        (&["--max", "0"], "1..=5000000"),
        (&["extra"], "extra"),
    ] {
        says(&offline(arguments, &good), 2, &[text]);
    }
    says(&offline(&[], b""), 2, &["messages: 0,", "there is no message to check"]);
    says(&offline(&["--file", "-"], &good), 0, &["messages: 1,"]);
    // The last line needs no line break, and an empty line is an empty message.
    says(&offline(&[], good.trim_ascii_end()), 0, &["messages: 1,"]);
    says(&offline(&[], &[&good[..], b"\n"].concat()), 1, &["line 2: dead-lettered: empty_value"]);
    let endless = vec![b'x'; (16 << 20) + 1];
    says(&offline(&[], &endless), 2, &["line 1: is longer than 16 MiB"]);
    says(&offline(&[], &endless[1..]), 1, &["too_large"]);
}

/// Records of the generator with every bad reason, duplicates and conflicts, all of about now.
fn generated(count: usize, now_ms: i64) -> Vec<(Record, Message)> {
    let rules = Rules::default();
    let mut generator = Generator::new(GeneratorConfig {
        seed: 11,
        accounts: 50,
        duplicates: 0.1,
        conflicts: 0.1,
        bad: 0.5,
        bad_reasons: BAD_REASONS.map(|(reason, _)| reason).into(),
        ids: IdKind::V7,
        value_bytes: None,
        types: rules.payment_types,
        value_bytes_max: rules.payment_bytes_max,
        window: rules.idempotency_window,
    });
    let next = |_| {
        let record = generator.next(now_ms);
        let headers = record.headers.iter().map(|(name, value)| ((*name).to_owned(), Some(value.clone())));
        let message = Message {
            key: record.key.clone(),
            value: record.value.clone(),
            headers: headers.collect(),
            timestamp_ms: Some(record.timestamp_ms),
            // Ids are repeated in one partition only, so that all outcomes are determined.
            partition: Some(0),
        };
        (record, message)
    };
    (0..count).map(next).collect()
}

#[test]
fn every_bad_record_of_the_generator_is_told_from_a_file() {
    // GIVEN records with every reason that a record can have, as kcat writes them
    let text = |bytes: &Option<Vec<u8>>| {
        bytes.as_ref().map_or(Some(Value::Null), |b| String::from_utf8(b.clone()).ok().map(Value::from))
    };
    let mut expected = Vec::new();
    let mut input = Vec::new();
    for (record, message) in generated(2_000, AT_MS) {
        // JSON has no text for values that are not UTF-8.
        let (Some(key), Some(value)) = (text(&message.key), text(&message.value)) else { continue };
        let headers: Vec<&str> = record
            .headers
            .iter()
            .flat_map(|(name, value)| [*name, std::str::from_utf8(value).unwrap()])
            .collect();
        let line = json!({"key": key, "payload": value, "headers": headers, "ts": record.timestamp_ms});
        input.push(line.to_string());
        expected.push(match record.kind {
            Kind::Payment(_) => "written",
            Kind::Duplicate { .. } => "duplicate",
            Kind::Conflict => "message_id_conflict",
            Kind::Bad(reason) => reason.as_str(),
        });
    }

    // WHEN they are checked
    let finished = offline(&["--kcat-json", "--json"], &lines(&input));

    // THEN each has the outcome that the generator intends, and every reason occurs
    assert_eq!(finished.code, Some(1));
    let (told, summary) = objects(&finished);
    let outcome = |o: &Value| o.get("reason").unwrap_or(&o["outcome"]).as_str().unwrap().to_owned();
    assert_eq!(told.iter().map(outcome).collect::<Vec<_>>(), expected);
    let reasons: Vec<&String> = summary["by_reason"].as_object().unwrap().keys().collect();
    let known = Reason::ALL.iter().map(|reason| reason.as_str());
    let all: std::collections::BTreeSet<_> = known.filter(|r| *r != "rejected_by_database").collect();
    assert_eq!(reasons, all.iter().collect::<Vec<_>>());
}

#[test]
fn a_topic_is_told_as_the_daemon_then_treats_it() {
    // GIVEN records of every kind in the input, a part of them in aborted transactions
    let scope = Scope::ready("check_daemon", 2, 2);
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let messages: Vec<Message> = generated(1_500, now_ms).into_iter().map(|(_, message)| message).collect();
    for (number, part) in messages.chunks(100).enumerate() {
        if number % 5 == 2 {
            let aborted = part.iter().cloned();
            scope.produce_in_transaction(&scope.input_topic, aborted, false);
        }
        scope.produce(&scope.input_topic, part.iter().cloned());
    }
    // Not UTF-8, and ids in another partition
    let other = |value: &[u8]| Message::new("1", value).partition(1);
    scope.produce(&scope.input_topic, [other(b"\xff"), other(b"{}")]);

    // WHEN the topic is checked, and then read by the daemon
    let finished = check(&scope, &scope.input_topic, &["--json"]);
    assert_eq!(scope.committed(0), None, "the command commits nothing");
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    scope.drain();

    // THEN its dead letters are those that were told, with reason and detail
    let (told, summary) = objects(&finished);
    let place = |o: &Value| (o["partition"].as_i64().unwrap(), o["offset"].as_i64().unwrap());
    let text = |o: &Value, name: &str| o[name].as_str().unwrap().to_owned();
    let expected: BTreeMap<_, _> = told
        .iter()
        .filter(|o| o["outcome"] == "dead_lettered")
        .map(|o| (place(o), (text(o, "reason"), text(o, "detail"))))
        .collect();
    let letters: BTreeMap<_, _> = scope
        .read_all(&scope.dead_letter_topic)
        .iter()
        .map(|letter| {
            let number = |name| letter.header(name).parse::<i64>().unwrap();
            let reason = (letter.header("dlq-reason").to_owned(), letter.header("dlq-detail").to_owned());
            ((number("dlq-partition"), number("dlq-offset")), reason)
        })
        .collect();
    assert_eq!(letters, expected);
    assert_eq!(summary["by_reason"].as_object().unwrap().len(), 10, "{summary}");

    // AND so are its rows, its e-mail events and its duplicates
    let written: Vec<_> = told.iter().filter(|o| o["outcome"] == "written").map(place).collect();
    let rows = scope.sql(
        "SELECT source_partition, source_offset FROM payment_writer.payment_metadata ORDER BY 1, 2",
        &[],
    );
    let rows: Vec<_> =
        rows.iter().map(|row| (i64::from(row.get::<_, i32>(0)), row.get::<_, i64>(1))).collect();
    assert_eq!(written, rows);
    assert_eq!(summary["emails"], scope.read_all(&scope.email_topic).len());
    assert_eq!(summary["messages"], messages.len() + 2);
    assert!(summary["duplicate"].as_u64().unwrap() > 50, "{summary}");
}

#[test]
fn a_range_of_any_topic_is_read_committed_and_what_is_not_checked_is_named() {
    // GIVEN a topic that is not the daemon's, with an aborted transaction in it: 0-1, 2-4 aborted, 5 marker,
    // 6-7, 8 marker
    let scope = Scope::new(Servers::shared(), "check_range");
    let topic = format!("{}_fixtures", scope.database);
    scope.create_topic(&topic, 3);
    let payment = |n: u64| Payment::new(uuid_v4(n), 57).message().partition(1);
    let bad = |n: u64| Payment::new(uuid_v4(n), 57).kind("SECRET").message().partition(1);
    scope.produce(&topic, [payment(1), payment(2)]);
    scope.produce_in_transaction(&topic, [bad(3), bad(4), bad(5)], false);
    let sent = scope.produce_in_transaction(&topic, [payment(6), payment(1)], true);
    assert_eq!(sent, [(1, 6), (1, 7)]);

    // WHEN it is checked, THEN aborted records do not count, and offsets are those of the topic
    let whole = check(&scope, &topic, &[]).succeeds();
    assert_eq!(
        whole.stdout,
        "partition 1, offset 0: written\npartition 1, offset 1: written\npartition 1, offset 6: written\n\
         partition 1, offset 7: duplicate of partition 1, offset 0\n\
         messages: 4, written: 3 (e-mail events: 3), duplicates: 1, dead-lettered: 0\n"
    );
    let range = |arguments: &[&str]| check(&scope, &topic, &[&["--partition", "1"], arguments].concat());
    says(&range(&["--from", "1", "--to", "7"]), 0, &["offset 1: written", "messages: 2,"]);
    says(&range(&["--from", "7"]), 0, &["offset 7: written", "messages: 1,"]);
    // AND a range of aborted records alone has nothing to check
    says(&range(&["--from", "2", "--to", "6"]), 2, &["messages: 0,", "there is no message to check"]);
    // AND what is left out is named
    says(
        &range(&["--from", "6", "--to", "30"]),
        0,
        &["messages: 2,", "not checked: --partition 1 --from 9 --to 30 (not in the log yet)"],
    );
    says(&range(&["--max", "2"]), 0, &["messages: 2,", "not checked: --partition 1 --from 2 --to 9 (--max)"]);
    let (_, summary) = objects(&range(&["--max", "2", "--json"]));
    assert_eq!(summary["ranges"], json!([{"partition": 1, "from": 0, "to": 2}]));
    assert_eq!(summary["not_checked"], json!([{"partition": 1, "from": 2, "to": 9, "why": "--max"}]));
    says(
        &range(&["--time-limit", "0s"]),
        1,
        &["--partition 1 --from 0 --to 9 (--time-limit)", "not all messages were checked"],
    );

    // WHEN retention removes a part, THEN it is named, too
    scope.delete_records_of(&topic, 1, 6);
    says(
        &range(&["--from", "1"]),
        0,
        &["messages: 2,", "not checked: --partition 1 --from 1 --to 6 (no longer in the log)"],
    );
    says(&range(&["--from", "1", "--to", "6"]), 2, &["nothing to check", "(no longer in the log)"]);
    says(&range(&["--from", "7", "--to", "7"]), 2, &["the range from 7 to before 7 is empty"]);
    says(&range(&["--from", "90"]), 2, &["has the offsets from 6 to before 9"]);
    says(&check(&scope, &topic, &["--partition", "0"]), 2, &["has the offsets from 0 to before 0"]);
    says(&check(&scope, &topic, &["--partition", "3"]), 2, &["has no partition 3"]);

    // AND nothing was written: no group, no record
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    let groups = consumer.fetch_group_list(None, DEADLINE).unwrap();
    assert!(groups.groups().iter().all(|group| group.name() != scope.group_id));
    assert_eq!(scope.read_all(&topic).len(), 2);
}

#[test]
fn what_precedes_an_open_transaction_can_be_checked() {
    // GIVEN a record, and an open transaction behind it
    let scope = Scope::new(Servers::shared(), "check_open");
    let topic = format!("{}_fixtures", scope.database);
    scope.create_topic(&topic, 1);
    let (before, open) = (Payment::new(uuid_v4(1), 57), Payment::new(uuid_v4(2), 57));
    scope.produce(&topic, [before.message()]);
    let producer: BaseProducer = scope.client_config().set("transactional.id", &topic).create().unwrap();
    producer.init_transactions(DEADLINE).unwrap();
    producer.begin_transaction().unwrap();
    let json = open.json();
    producer.send(BaseRecord::to(&topic).key("57").payload(&json)).map_err(|(error, _)| error).unwrap();
    producer.flush(DEADLINE).unwrap();

    // WHEN the range ends before it, THEN the command does not wait for it
    let range = ["--partition", "0", "--to", "1"];
    says(&check(&scope, &topic, &range), 0, &["messages: 1, written: 1 "]);
    // AND otherwise it waits for its end
    let running = std::thread::scope(|threads| {
        let running = threads.spawn(|| check(&scope, &topic, &[]));
        producer.commit_transaction(DEADLINE).unwrap();
        running.join().unwrap()
    });
    says(&running, 0, &["messages: 2, written: 2 "]);
}

#[test]
fn an_unknown_topic_is_wrong_usage_and_is_not_created() {
    // GIVEN brokers that create topics automatically
    let servers = Servers::with_kafka_settings("auto.create.topics.enable=true\n");
    let scope = Scope::new(&servers, "check_absent");
    scope.create_topic(&scope.input_topic, 1);

    // WHEN a topic is checked that does not exist
    let finished = check(&scope, "no_such_topic", &[]);

    // THEN the command says so, and it does not exist afterwards, either
    says(&finished, 2, &["topic no_such_topic: does not exist"]);
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    let topics = consumer.fetch_metadata(None, DEADLINE).unwrap();
    let names: Vec<&str> = topics.topics().iter().map(|topic| topic.name()).collect();
    assert!(names.contains(&scope.input_topic.as_str()) && !names.contains(&"no_such_topic"), "{names:?}");

    // AND an empty topic, and brokers that do not answer, are told apart from that
    says(&check(&scope, &scope.input_topic, &[]), 2, &["nothing to check"]);
    let nowhere = ("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1");
    let finished = scope.command_with(&["check-messages", "--topic", "no_such_topic"], &[nowhere]);
    says(&finished, 1, &["topic no_such_topic: no broker answers"]);
    assert!(!finished.stderr.contains("does not exist"), "{finished:?}");
}
