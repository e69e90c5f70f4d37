//! The log as JSON lines that follow the documented schema and contain no payment data.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::support::{AT_MS, Daemon, Message, Payment, Scope, rows, uuid_v4, wait_until};

/// Type of each field, from docs/reference/logs.md.
fn schema() -> BTreeMap<String, String> {
    let page = include_str!("../../docs/reference/logs.md");
    let (_, table) = page.split_once("| field | type |").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    rows(table).map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone())).collect()
}

/// The log's lines, each checked against the schema.
fn lines(daemon: &Daemon) -> Vec<Map<String, Value>> {
    let schema = schema();
    let mut lines = Vec::new();
    // The last line may be incomplete.
    let log = daemon.log();
    for line in log.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let Value::Object(fields) = value else { panic!("{line}") };
        for required in ["timestamp", "level", "target", "message"] {
            assert!(fields.contains_key(required), "{required} is missing: {line}");
        }
        for (name, value) in &fields {
            let documented =
                schema.get(name).unwrap_or_else(|| panic!("{name} is not in docs/reference/logs.md: {line}"));
            let kind = match value {
                Value::String(_) => "string",
                Value::Number(_) => "number",
                Value::Bool(_) => "boolean",
                other => panic!("{name} is {other}: {line}"),
            };
            assert!(documented.contains(kind), "{name} is a {kind}, documented as {documented}: {line}");
        }
        lines.push(fields);
    }
    lines
}

fn having<'a>(lines: &'a [Map<String, Value>], message: &str) -> Vec<&'a Map<String, Value>> {
    lines.iter().filter(|line| line["message"].as_str().unwrap().contains(message)).collect()
}

const JSON: (&str, &str) = ("PAYMENT_WRITER__LOG__FORMAT", "json");

#[test]
fn json_lines_follow_the_documented_schema_and_identify_their_records() {
    // GIVEN a daemon that logs JSON, and sees a database error
    let scope = Scope::new(crate::support::Servers::shared(), "logs");
    scope.create_topics(2, 1);
    let daemon = scope.daemon_with(&["run"], &[JSON]);
    let names_dependency = |line: &Map<String, Value>| line.contains_key("dependency");
    wait_until("it waits for the schema", || lines(&daemon).iter().any(names_dependency));
    scope.command(&["migrate"]).succeeds();
    daemon.wait_until_ready();

    // WHEN it reads more bad records than the rate limit of their log line, and then a conflict, with its own
    // id
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let first = Payment::new(uuid_v4(1), 31).message();
    let conflict = Payment::new(uuid_v4(1), 31).amount("11").message();
    let conflict = conflict.header("correlation-id", "c-1").header("traceparent", trace);
    let secret = Message::new("31", r#"{"comment":"hunter2"}"#)
        .header("correlation-id", "with\nbreak")
        .header("own", "hunter2")
        .timestamp_ms(AT_MS);
    let mut sent = vec![first];
    sent.extend(std::iter::repeat_n(secret, 100));
    sent.push(conflict);
    let places = scope.produce(&scope.input_topic, sent);
    wait_until("every record has its outcome", || daemon.metric("payment_writer_records_total", "") == 102.0);

    // THEN the conflict is logged with its partition and offset, and the ids by which its outputs are found
    wait_until("the lines are logged", || having(&lines(&daemon), "a payment is a dead letter").len() == 1);
    let lines = lines(&daemon);
    let conflict = having(&lines, "a payment is a dead letter")[0];
    let letter = scope
        .read_all(&scope.dead_letter_topic)
        .into_iter()
        .find(|letter| letter.header("dlq-reason") == "message_id_conflict")
        .unwrap();
    let (partition, offset) = places[101];
    assert_eq!(conflict["level"], "WARN");
    assert_eq!(conflict["topic"], scope.input_topic);
    assert_eq!((&conflict["partition"], &conflict["offset"]), (&partition.into(), &offset.into()));
    assert_eq!(conflict["source"], letter.header("source"));
    assert_eq!(conflict["correlation_id"], "c-1");
    assert_eq!(conflict["traceparent"], trace);
    assert_eq!(conflict["reason"], "message_id_conflict");

    // AND of the others at most ten are logged in ten seconds, by their source
    let named = having(&lines, "a record is a dead letter");
    assert!((1..=20).contains(&named.len()), "{}", named.len());
    assert!(named.iter().all(|line| line["correlation_id"] == line["source"]));
    assert!(named.iter().all(|line| line["level"] == "INFO"));

    // AND the records' contents are not logged anywhere
    assert!(!daemon.log().contains("hunter2") && !daemon.log().contains("with\\nbreak"));
    let status = daemon.get("/status").unwrap().body;
    assert!(!status.contains("hunter2"));

    // AND the last warnings are in the status
    let status: Value = serde_json::from_str(&status).unwrap();
    let problems = status["recent_problems"].as_array().unwrap();
    assert!((1..=20).contains(&problems.len()));
    let told = |p: &Value, text: &str| p["message"].as_str().unwrap().contains(text);
    assert!(problems.iter().any(|p| told(p, "message_id_conflict") && told(p, letter.header("source"))));
    // AND without anything that the producer chose: the port has no authentication
    assert!(problems.iter().all(|p| !told(p, "c-1") && !told(p, trace)));
    assert!(problems.iter().all(|p| ["WARN", "ERROR"].contains(&p["level"].as_str().unwrap())));
}

#[test]
fn every_documented_field_is_one_that_the_program_logs() {
    fn sources(folder: &std::path::Path, into: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, into);
            } else {
                into.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    /// The text in the parentheses that the argument starts with, without string literals.
    fn arguments(text: &str) -> String {
        let (mut found, mut depth, mut is_quoted, mut is_escaped) = (String::new(), 0, false, false);
        for sign in text.chars() {
            match sign {
                _ if is_escaped => is_escaped = false,
                '\\' if is_quoted => is_escaped = true,
                '"' => is_quoted = !is_quoted,
                _ if is_quoted => {}
                '(' => depth += 1,
                ')' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if !is_quoted {
                found.push(sign);
            }
        }
        found
    }
    let mut all = String::new();
    sources(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut all);
    let levels = ["error!", "warn!", "info!", "debug!", "trace!", "$level!"];
    let logged = |part: &str| levels.iter().find_map(|level| Some(arguments(part.strip_prefix(*level)?)));
    let lines: Vec<String> = all
        .split("tracing::")
        .filter_map(|part| Some(logged(part)?.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect();
    assert!(lines.len() > 30, "{}", lines.len());
    let schema = schema();
    assert!(schema.len() > 40, "{}", schema.len());
    for name in
        schema.keys().filter(|name| !["timestamp", "level", "target", "message"].contains(&name.as_str()))
    {
        // A field without an explicit name ends with a comma or the line; all others have one.
        let is_field = |word: &str| {
            let word = word.trim_start_matches(['(', '%', '?']);
            word.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest == ",")
        };
        let is_logged = lines.iter().any(|line| line.split(' ').any(is_field));
        assert!(is_logged, "{name} is documented but not logged");
    }
}

#[test]
fn a_halted_partition_is_logged_with_its_first_uncertain_record() {
    // GIVEN a group whose offset was moved by hand over records that were never written
    let scope = Scope::ready("logs_halted", 1, 1);
    scope.produce(&scope.input_topic, (1..6).map(|seed| Payment::new(uuid_v4(seed), 31).message()));
    scope.move_group_offset(0, 4, "");

    let daemon = scope.daemon_with(&["run"], &[JSON]);

    wait_until("the partition is halted", || daemon.metric("payment_writer_partitions_halted", "") == 1.0);
    let lines = lines(&daemon);
    let halted = having(&lines, "partition halted");
    assert_eq!(halted.len(), 1, "logged once");
    assert_eq!(halted[0]["level"], "ERROR");
    assert_eq!((&halted[0]["partition"], &halted[0]["offset"]), (&0.into(), &0.into()));
    assert!(halted[0]["correlation_id"].as_str().unwrap().ends_with("/0/0"));
    assert_eq!(halted[0]["doubt"], "moved_forward");
    // AND its lag is reported while it is halted, and grows
    assert_eq!(daemon.metric("payment_writer_lag_records", ""), 5.0);
    wait_until("the age of its records is reported", || {
        daemon.metric("payment_writer_lag_seconds", "") > 0.5
    });
    assert!(daemon.metric("payment_writer_oldest_pending_seconds", "") > 0.5);
    let partition = &daemon.status()["partitions"]["0"];
    assert_eq!((&partition["published"], &partition["unpublished_from"]), (&Value::Null, &0.into()));
}
