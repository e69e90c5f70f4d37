//! The demo's auditor accepts a correct state and reports an incorrect one.

use std::process::Command;

use crate::support::{Finished, Message, Scope, Servers};

const TIMESTAMP_MS: i64 = 1_770_000_000_123;
const CREATED_AT: &str = "2026-02-02T02:40:00.123Z";
const PAID: &str = "2f1c6a52-7a0e-4b57-9c39-0d5f6e1b8a41";
const PENDING: &str = "b7c9e0d4-13f2-4f6b-8a75-c2d4e6f80913";
const TOPIC_ID: &str = "01234567-89ab-4def-8123-456789abcdef";

/// Follows the contract's wording, in binary digits.
fn payment_id(message_id: &str) -> String {
    let bytes = uuid::Uuid::parse_str(message_id).unwrap().into_bytes();
    let hash = format!("{:0128b}", xxhash_rust::xxh3::xxh3_128(&bytes));
    let digits = [&format!("{TIMESTAMP_MS:048b}"), "0111", &hash[..12], "10", &hash[12..74]].concat();
    uuid::Uuid::from_u128(u128::from_str_radix(&digits, 2).unwrap()).to_string()
}

pub fn audit(scope: &Scope<'_>) -> Finished {
    let output = Command::new(env!("CARGO_BIN_EXE_audit"))
        .args(["--kafka", scope.servers.bootstrap_servers(), "--postgres-url", &scope.postgres_url()])
        .args(["--input-topic", &scope.input_topic, "--dead-letter-topic", &scope.dead_letter_topic])
        .args(["--read-topic", &scope.read_topic, "--email-topic", &scope.email_topic])
        .output()
        .expect("cargo builds binaries along with tests");
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn output(offset: i64, key: &str, value: String) -> Message {
    Message::new(key, value).header("source", format!("01234567/0/{offset}"))
}

fn dead_letter(scope: &Scope<'_>, offset: i64, value: &str, reason: &str) -> Message {
    output(offset, "57", value.to_owned())
        .header("dlq-reason", reason)
        .header("dlq-detail", "a field, a rule")
        .header("dlq-topic", scope.input_topic.as_str())
        .header("dlq-partition", "0")
        .header("dlq-offset", offset.to_string())
        .header("dlq-timestamp", TIMESTAMP_MS.to_string())
}

/// Two payments written, one duplicate, two dead letters: topics and tables as the contract requires.
fn settled(scope: &Scope<'_>) {
    scope.create_topics(1, 1);
    let paid = format!(
        r#"{{"messageId":"{PAID}","amount":123131.21,"status":2,"currency":"EUR","custId":57,"type":"BWI","comment":"hello"}}"#
    );
    let again =
        paid.replace("123131.21", "\"1.2313121E5\"").replace("\"comment\"", "\"other\":[{}],\"comment\"");
    let conflict = paid.replace("123131.21", "123131.22");
    let pending = format!(
        r#"{{"messageId":"{PENDING}","amount":"7","status":0,"currency":"JPY","custId":57,"type":"VSA","comment":""}}"#
    );
    let input = [&paid, &again, &conflict, "{}", &pending].map(|value| Message::new("57", value.to_owned()));
    let [paid_record, ..] = input.clone();
    let input = [vec![paid_record.header("correlation-id", "c")], input[1..].to_vec()].concat();
    scope.produce(&scope.input_topic, input.into_iter().map(|message| message.timestamp_ms(TIMESTAMP_MS)));

    let (paid_id, pending_id) = (payment_id(PAID), payment_id(PENDING));
    let read = |message_id, id: &str, rest| {
        format!(
            r#"{{"messageId":"{message_id}","id":"{id}","createdAt":"{CREATED_AT}","updatedAt":"{CREATED_AT}","custId":57,"version":1,{rest}}}"#
        )
    };
    let paid_read = read(
        PAID,
        &paid_id,
        r#""amount":123131.21,"status":2,"currency":"EUR","type":"BWI","comment":"hello""#,
    );
    let pending_read = read(PENDING, &pending_id, r#""amount":7,"status":0,"currency":"JPY","type":"VSA""#);
    scope.produce(
        &scope.read_topic,
        [output(0, "57", paid_read).header("correlation-id", "c"), output(4, "57", pending_read)],
    );
    let email = format!(
        r#"{{"id":"{paid_id}","messageId":"{PAID}","custId":57,"amount":123131.21,"currency":"EUR","type":"BWI","createdAt":"{CREATED_AT}"}}"#
    );
    scope.produce(&scope.email_topic, [output(0, "57", email).header("correlation-id", "c")]);
    scope.produce(
        &scope.dead_letter_topic,
        [
            dead_letter(scope, 2, &conflict, "message_id_conflict"),
            dead_letter(scope, 3, "{}", "missing_field"),
        ],
    );
    scope.execute(&format!(
        "CREATE SCHEMA payment_writer;
         SET search_path = payment_writer;
         CREATE TABLE source_cursor AS SELECT '{}' AS topic, '{TOPIC_ID}'::uuid AS topic_id, 0 AS partition,
             5::bigint AS applied, 5::bigint AS published;
         CREATE TABLE payment_metadata AS SELECT payment_id::uuid, '{CREATED_AT}'::timestamptz AS created_at,
             '{CREATED_AT}'::timestamptz AS updated_at, 1 AS version, message_id::uuid, 0 AS source_partition,
             source_offset::bigint
             FROM (VALUES ('{paid_id}', '{PAID}', 0), ('{pending_id}', '{PENDING}', 4))
             AS t (payment_id, message_id, source_offset);
         CREATE TABLE idempotency AS SELECT message_id, source_offset, 0::bigint AS payload_hash, created_at,
             source_partition, current_date AS date FROM payment_metadata;
         CREATE TABLE payment_core AS SELECT payment_id::uuid, '{CREATED_AT}'::timestamptz AS created_at,
             57::bigint AS cust_id, amount::numeric(20, 6), currency, status::smallint, type
             FROM (VALUES ('{paid_id}', 123131.21, 'EUR', 2, 'BWI'), ('{pending_id}', 7, 'JPY', 0, 'VSA'))
             AS t (payment_id, amount, currency, status, type);
         CREATE TABLE payment_notes AS SELECT '{paid_id}'::uuid AS payment_id, '{CREATED_AT}'::timestamptz AS created_at,
             NULL::text AS external_ref_id, 'hello' AS comment;",
        scope.input_topic
    ));
}

#[test]
fn the_auditor_accepts_a_correct_state() {
    let scope = Scope::new(Servers::shared(), "audit_passes");
    settled(&scope);
    let shown = audit(&scope).succeeds().stdout;
    for line in
        ["written 2", "duplicate 1", "dead letter: message_id_conflict 1", "dead letter: missing_field 1"]
    {
        let squeezed: Vec<String> =
            shown.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert!(squeezed.iter().any(|l| l == line), "{line} is not in\n{shown}");
    }
}

#[test]
fn the_auditor_reports_what_is_wrong_in_the_tables() {
    let scope = Scope::new(Servers::shared(), "audit_tables");
    settled(&scope);
    for (harm, finding) in [
        ("DELETE FROM payment_notes", "0/0 (written): 0 in payment_notes, not 1"),
        (
            "UPDATE payment_core SET amount = amount + 0.01",
            "payment_core: the row of 0/0 differs from its record",
        ),
        (
            "INSERT INTO payment_core SELECT * FROM payment_core WHERE status = 0",
            "0/4 (written): 2 in payment_core",
        ),
        ("DELETE FROM payment_metadata WHERE source_offset = 4", "0/4: lost"),
        (
            "UPDATE payment_metadata SET source_offset = 1 WHERE source_offset = 0",
            "a later record of its partition",
        ),
        ("DELETE FROM idempotency WHERE source_offset = 4", "0/4 (written): 0 in idempotency, not 1"),
        ("UPDATE source_cursor SET published = 4", "cursor of partition 0"),
    ] {
        let tables = ["payment_core", "payment_metadata", "payment_notes", "idempotency", "source_cursor"];
        let each = |f: &dyn Fn(&str) -> String| tables.map(f).concat();
        scope.execute(&each(&|t| format!("CREATE TABLE kept_{t} AS TABLE payment_writer.{t};")));
        scope.execute_unguarded(&format!("SET search_path = payment_writer; {harm}"));
        let found = audit(&scope);
        assert_eq!(found.code, Some(1), "{harm}\n{}{}", found.stdout, found.stderr);
        assert!(found.stdout.contains(finding), "{harm}: {finding} is not in\n{}", found.stdout);
        scope.execute_unguarded(&each(&|t| {
            format!("TRUNCATE payment_writer.{t}; INSERT INTO payment_writer.{t} TABLE kept_{t}; DROP TABLE kept_{t};")
        }));
    }
    audit(&scope).succeeds();
}

#[test]
fn the_auditor_reports_what_is_wrong_in_the_topics() {
    let scope = Scope::new(Servers::shared(), "audit_topics");
    settled(&scope);
    let event = scope.read_all(&scope.read_topic).remove(1);
    let value = event.value.unwrap();
    scope.produce(&scope.read_topic, [output(4, "57", String::from_utf8(value).unwrap())]);
    scope.produce(&scope.email_topic, [output(9, "57", "{}".into())]);
    scope.produce(&scope.dead_letter_topic, [dead_letter(&scope, 1, "{}", "malformed_json")]);

    let found = audit(&scope);

    assert_eq!(found.code, Some(1), "{}{}", found.stdout, found.stderr);
    for finding in [
        "0/4 (written): 2 in read events, not 1",
        "source 01234567/0/9 is not in the input",
        "0/1 (duplicate): 1 in dead letters, not 0",
        "the dead letter of 0/1 does not have its record's key and value",
    ] {
        assert!(found.stdout.contains(finding), "{finding} is not in\n{}", found.stdout);
    }
}
