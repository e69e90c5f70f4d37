//! Each outcome of the contract, seen from outside.

use std::process::Command;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::support::{
    AT_ISO, AT_MS, Message, Payment, Received, Scope, Servers, payment_id, ulid, uuid_v4, uuid_v7, wait_until,
};

const AT_ROW: &str = "2024-02-29T23:59:59.999+00:00";

/// Names and values of the headers, sorted.
fn headers(record: &Received) -> Vec<(&str, &str)> {
    let mut headers: Vec<(&str, &str)> = record
        .headers
        .iter()
        .map(|(name, value)| {
            let value = value.as_deref().map_or("", |v| std::str::from_utf8(v).unwrap());
            (name.as_str(), value)
        })
        .collect();
    headers.sort_unstable();
    headers
}

fn text(record: &Received) -> &str {
    std::str::from_utf8(record.value.as_deref().unwrap()).unwrap()
}

/// The topic's id as Kafka's own tool prints it.
fn topic_id_by_kafkas_tool(scope: &Scope<'_>) -> Uuid {
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/servers"))
        .arg("--dir")
        .arg(scope.servers.dir())
        .args(["kafka", "tool", "TopicCommand", "--describe", "--topic", &scope.input_topic])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let id = said.split("TopicId: ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let id = id.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    // 22 characters of base64url: 132 bits, the last four of them padding.
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let value = |c: u8| alphabet.iter().position(|a| *a == c).unwrap() as u128;
    let (last, digits) = id.as_bytes().split_last().unwrap();
    let high = digits.iter().fold(0u128, |sum, c| (sum << 6) | value(*c));
    Uuid::from_u128((high << 2) | (value(*last) >> 4))
}

#[test]
fn a_payment_becomes_its_rows_one_read_event_and_one_email_event() {
    // GIVEN a payment with every field, on a record with trace headers and another header
    let scope = Scope::ready("written", 3, 2);
    let id = uuid_v7(AT_MS - 5, 1);
    let message = Payment::new(id.to_string().to_uppercase(), 4711)
        .amount("123131.21")
        .more(r#","comment":"Creating BWI trn in EUR","externalRefId":"ref-1","unknown":[1,{"a":null}]"#)
        .message()
        .header("correlation-id", "c-1")
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .header("schema-version", "1")
        .header("x-own", "kept to itself");
    let (partition, offset) = scope.produce(&scope.input_topic, [message])[0];
    let began_ms = i64::try_from(
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis(),
    )
    .unwrap();

    // WHEN the daemon has processed it
    scope.drain();

    // THEN each table has exactly the expected row
    let payment_id = payment_id(id, AT_MS);
    assert_eq!(
        scope.rows("payment_core", "payment_id"),
        [format!(
            r#"{{"payment_id":"{payment_id}","created_at":"{AT_ROW}","cust_id":4711,"amount":123131.210000,"currency":"EUR","status":2,"type":"BWI"}}"#
        )]
    );
    assert_eq!(
        scope.rows("payment_metadata", "payment_id"),
        [format!(
            r#"{{"payment_id":"{payment_id}","created_at":"{AT_ROW}","updated_at":"{AT_ROW}","version":1,"message_id":"{id}","source_partition":{partition},"source_offset":{offset}}}"#
        )]
    );
    assert_eq!(
        scope.rows("payment_notes", "payment_id"),
        [format!(
            r#"{{"payment_id":"{payment_id}","created_at":"{AT_ROW}","external_ref_id":"ref-1","comment":"Creating BWI trn in EUR"}}"#
        )]
    );
    let claims = scope.sql(
        "SELECT message_id, source_offset, created_at = $1::text::timestamptz, source_partition,
                date BETWEEN ((now() - interval '5 minutes') AT TIME ZONE 'UTC')::date
                         AND (now() AT TIME ZONE 'UTC')::date
         FROM payment_writer.idempotency",
        &[&AT_ROW],
    );
    assert_eq!(claims.len(), 1);
    assert_eq!(claims[0].get::<_, Uuid>(0), id);
    assert_eq!(claims[0].get::<_, i64>(1), offset);
    assert!(claims[0].get::<_, bool>(2), "created_at is the record's timestamp");
    assert_eq!(claims[0].get::<_, i32>(3), partition);
    assert!(claims[0].get::<_, bool>(4), "date is today's, in UTC");

    // AND each event was sent once, byte for byte as expected, with the record's key and the contract's
    // headers
    let read = scope.read_all(&scope.read_topic);
    let email = scope.read_all(&scope.email_topic);
    let upper = id.to_string().to_uppercase();
    assert_eq!((read.len(), email.len()), (1, 1));
    assert_eq!(
        text(&read[0]),
        format!(
            r#"{{"messageId":"{upper}","id":"{payment_id}","createdAt":"{AT_ISO}","updatedAt":"{AT_ISO}","amount":123131.21,"status":2,"currency":"EUR","custId":4711,"type":"BWI","comment":"Creating BWI trn in EUR","version":1}}"#
        )
    );
    assert_eq!(
        text(&email[0]),
        format!(
            r#"{{"id":"{payment_id}","messageId":"{upper}","custId":4711,"amount":123131.21,"currency":"EUR","type":"BWI","createdAt":"{AT_ISO}"}}"#
        )
    );
    let topic_id = topic_id_by_kafkas_tool(&scope).simple().to_string();
    let source = format!("{}/{partition}/{offset}", &topic_id[..8]);
    for event in [&read[0], &email[0]] {
        assert_eq!(event.key_text(), "4711");
        assert_eq!(
            headers(event),
            [
                ("correlation-id", "c-1"),
                ("source", source.as_str()),
                ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ]
        );
        assert!(event.timestamp_ms.unwrap() >= began_ms, "an output's own timestamp is when it was sent");
    }
    assert!(scope.read_all(&scope.dead_letter_topic).is_empty());
}

#[test]
fn values_at_their_limits_are_written_exactly() {
    // GIVEN amounts, currencies, ids and texts at the limits of what is allowed
    let scope = Scope::ready("edges", 4, 2);
    let long = "😀".repeat(1_000);
    let payments = [
        // An amount as text with an exponent, a currency without decimals, a ULID in lower case.
        Payment::new(ulid(uuid_v7(AT_MS, 1)).to_lowercase(), 0).amount(r#""1E+3""#).currency("JPY").status(0),
        // Four decimals, and only an external reference.
        Payment::new(uuid_v4(2), 7)
            .amount("0.0001")
            .currency("CLF")
            .status(-2)
            .more(r#","comment":"","externalRefId":"\u00e9\"\\\n""#),
        // The largest account and amount, and the longest comment.
        Payment::new(uuid_v4(3), i64::MAX)
            .amount("99999999999999.99")
            .kind("VSA")
            .more(&format!(r#","comment":"{long}","externalRefId":null"#)),
        Payment::new(uuid_v4(4), 8).amount("1.500").currency("BGN").kind("MSC"),
    ];
    scope.produce(&scope.input_topic, payments.iter().map(Payment::message));

    // WHEN the daemon has processed them
    scope.drain();

    // THEN amounts are the numbers that were sent
    let amounts = scope.sql(
        "SELECT cust_id, amount::text, currency, status, type FROM payment_writer.payment_core ORDER BY cust_id",
        &[],
    );
    let amounts: Vec<(i64, String, String, i16, String)> =
        amounts.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3), r.get(4))).collect();
    let expected = [
        (0, "1000.000000", "JPY", 0, "BWI"),
        (7, "0.000100", "CLF", -2, "BWI"),
        (8, "1.500000", "BGN", 2, "MSC"),
        (i64::MAX, "99999999999999.990000", "EUR", 2, "VSA"),
    ];
    assert_eq!(amounts, expected.map(|(a, b, c, d, e)| (a, b.to_owned(), c.to_owned(), d, e.to_owned())));
    // AND only payments with something to note have a row of notes
    let notes = scope.sql(
        "SELECT c.cust_id, n.external_ref_id, n.comment
         FROM payment_writer.payment_notes n JOIN payment_writer.payment_core c USING (payment_id)
         ORDER BY c.cust_id",
        &[],
    );
    let notes: Vec<(i64, Option<String>, Option<String>)> =
        notes.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect();
    assert_eq!(notes, [(7, Some("é\"\\\n".to_owned()), None), (i64::MAX, None, Some(long.clone()))]);
    // AND the events have the same values; message ids are as they were sent
    let mut read = scope.read_all(&scope.read_topic);
    read.sort_by_key(|event| event.key.clone().map(|key| (key.len(), key)));
    for (event, (payment, amount)) in read.iter().zip([
        (&payments[0], "1000"),
        (&payments[1], "0.0001"),
        (&payments[3], "1.5"),
        (&payments[2], "99999999999999.99"),
    ]) {
        let json = event.json();
        assert_eq!(json["messageId"], payment.message_id);
        assert_eq!(json["custId"], payment.cust_id);
        assert!(text(event).contains(&format!(r#","amount":{amount},"status":"#)), "{}", text(event));
        assert_eq!(event.key_text(), payment.cust_id.to_string());
    }
    assert_eq!(read.len(), 4);
    assert_eq!(read[3].json()["comment"], long);
    assert!(read[1].json().get("comment").is_none(), "an empty comment is left out");
    // AND only payments of status 2 cause an e-mail
    let mut emails: Vec<String> =
        scope.read_all(&scope.email_topic).iter().map(|e| e.key_text().to_owned()).collect();
    emails.sort();
    assert_eq!(emails, ["8".to_owned(), i64::MAX.to_string()]);
}

#[test]
fn email_events_are_sent_for_the_configured_statuses_alone() {
    let scope = Scope::ready("statuses", 1, 1);
    let payments =
        [2, 0, -2].map(|status: i64| Payment::new(uuid_v4((status + 9) as u64), 5).status(status).message());
    scope.produce(&scope.input_topic, payments);

    scope.drain_with(&[("PAYMENT_WRITER__EMAIL__STATUSES", "0,-2")]);

    let emails: Vec<_> =
        scope.read_all(&scope.email_topic).iter().map(|e| e.header("source").to_owned()).collect();
    assert_eq!(emails, [scope.source(0, 1), scope.source(0, 2)]);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 3);
}

/// Many spellings of one payload.
fn spellings(id: Uuid) -> Vec<Message> {
    let message = |value: String| Message::new("31", value).timestamp_ms(AT_MS);
    let upper = id.to_string().to_uppercase();
    let ulid = ulid(id);
    vec![
        message(format!(
            r#"{{"messageId":"{id}","amount":10.5,"status":2,"currency":"EUR","custId":31,"type":"BWI","comment":"A\u0041"}}"#
        )),
        message(format!(
            "\n{{ \"type\" : \"\\u0042WI\" ,\t\"comment\":\"\\u0041A\",\"amount\":\"10.50\",\"messageId\":\"{upper}\",\"custId\":31,\"currency\":\"EUR\",\"status\":2}} "
        )),
        message(format!(
            r#"{{"messageId":"{ulid}","amount":1.05E1,"status":2,"currency":"EUR","custId":31,"type":"BWI","comment":"AA","externalRefId":null,"new":{{"a":1}}}}"#
        )),
        message(format!(
            r#"{{"messageId":"{}","amount":"1050e-2","status":2,"currency":"EUR","custId":31,"type":"BWI","comment":"AA","externalRefId":""}}"#,
            ulid.to_lowercase()
        ))
        .timestamp_ms(AT_MS + 60_000),
    ]
}

#[test]
fn a_repeat_is_a_duplicate_however_it_is_spelled_and_whenever_it_comes() {
    // GIVEN a payment, its repeats in the same batch, and one on another partition
    let scope = Scope::ready("duplicates", 2, 1);
    let id = uuid_v7(AT_MS, 9);
    let all = spellings(id);
    scope.produce(&scope.input_topic, all.iter().cloned().map(|m| m.partition(1)));

    // WHEN the daemon reads them, and reads them again after a restart on both partitions
    scope.drain();
    scope.produce(&scope.input_topic, all.iter().cloned().map(|m| m.partition(0)));
    scope.produce(&scope.input_topic, all.iter().cloned().map(|m| m.partition(1)));
    scope.drain();
    // AND another daemon reads them in batches of one
    let mut daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "drain")]);
    for (batch, message) in all.iter().enumerate() {
        scope.produce(&scope.input_topic, [message.clone()]);
        let seen = (batch + 1) as f64;
        wait_until("the duplicate is counted", || {
            daemon.metric("payment_writer_records_total", r#"outcome="duplicate""#) == seen
        });
    }
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(0));

    // THEN only the first one was written
    assert_eq!(scope.count("payment_core"), 1);
    assert_eq!(scope.count("payment_metadata"), 1);
    assert_eq!(scope.count("payment_notes"), 1);
    assert_eq!(scope.count("idempotency"), 1);
    let read = scope.read_all(&scope.read_topic);
    assert_eq!(read.len(), 1);
    assert_eq!(read[0].header("source"), scope.source(1, 0));
    assert_eq!(read[0].json()["id"], payment_id(id, AT_MS));
    assert_eq!(scope.read_all(&scope.email_topic).len(), 1);
    assert!(scope.read_all(&scope.dead_letter_topic).is_empty());
}

#[test]
fn an_id_seen_with_another_payload_is_a_conflict_in_the_batch_and_after_a_restart() {
    // GIVEN a payment, its duplicate, and messages of the same id that differ in one field each
    let scope = Scope::ready("conflicts", 2, 1);
    let id = uuid_v4(1);
    let payment = Payment::new(id, 31).more(r#","comment":"c","externalRefId":"r""#);
    let others = [
        payment.clone().amount("10.51"),
        payment.clone().currency("USD"),
        payment.clone().status(0),
        payment.clone().kind("VSA"),
        payment.clone().more(r#","comment":"C","externalRefId":"r""#),
        payment.clone().more(r#","comment":"c""#),
        payment.clone().more(r#","comment":"r","externalRefId":"c""#),
        Payment { cust_id: 32, ..payment.clone() },
    ];
    let mut first = vec![payment.message().partition(0)];
    first.extend(others.iter().map(|other| other.message().partition(0)));
    first.push(payment.message().partition(0));
    let first_len = first.len() as i64;
    scope.produce(&scope.input_topic, first);

    // WHEN they arrive in one batch, and the others again after a restart, on another partition too
    scope.drain();
    scope.produce(&scope.input_topic, others.iter().map(|other| other.message().partition(1)));
    scope.produce(&scope.input_topic, [payment.message().partition(0)]);
    scope.drain();

    // THEN the lowest offset is written, its duplicates are counted, and each other one is a dead letter
    assert_eq!(scope.count("payment_core"), 1);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 1);
    assert_eq!(scope.read_all(&scope.read_topic)[0].header("source"), scope.source(0, 0));
    assert_eq!(scope.read_all(&scope.email_topic).len(), 1);
    let letters = scope.read_all(&scope.dead_letter_topic);
    let expected: Vec<String> = (1..first_len - 1)
        .map(|offset| scope.source(0, offset))
        .chain((0..others.len() as i64).map(|offset| scope.source(1, offset)))
        .collect();
    assert_eq!(letters.iter().map(|l| l.header("source").to_owned()).collect::<Vec<_>>(), expected);
    for letter in &letters {
        assert_eq!(letter.header("dlq-reason"), "message_id_conflict");
        assert!(letter.header("dlq-detail").contains("messageId"));
    }
}

struct Bad {
    reason: &'static str,
    /// What the detail must name.
    names: &'static str,
    message: Message,
}

fn bad(reason: &'static str, names: &'static str, message: Message) -> Bad {
    Bad { reason, names, message }
}

/// Records for every reason that depends on the record alone, most reasons in several ways.
fn every_bad_record() -> Vec<Bad> {
    let good = || Payment::new(uuid_v4(1), 31);
    let raw = |value: &[u8]| Message::new("31", value).timestamp_ms(AT_MS);
    let invalid = |names, payment: Payment| bad("invalid_field", names, payment.message());
    let without = |field: &str| {
        let mut json: serde_json::Value = serde_json::from_str(&good().json()).unwrap();
        json.as_object_mut().unwrap().remove(field).unwrap();
        raw(json.to_string().as_bytes())
    };
    let deep = |levels: usize| {
        good().more(&format!(r#","x":{}1{}"#, "[".repeat(levels - 1), "]".repeat(levels - 1))).message()
    };
    let hour = 3_600_000;
    let at = |id: Uuid| Payment::new(id, 31).message();
    vec![
        bad("empty_value", "value", Message { value: None, ..raw(b"") }),
        bad("empty_value", "value", raw(b"")),
        bad("empty_value", "value", Message { key: None, ..raw(b"") }),
        bad("too_large", "value", raw(&[b' '; 16 * 1024 + 1])),
        bad("unsupported_schema_version", "schema-version", good().message().header("schema-version", "2")),
        bad("unsupported_schema_version", "schema-version", good().message().header("schema-version", "")),
        bad("unsupported_schema_version", "schema-version", good().message().header("schema-version", "1 ")),
        bad(
            "unsupported_schema_version",
            "schema-version",
            Message { headers: vec![("schema-version".into(), None)], ..good().message() },
        ),
        bad(
            "unsupported_schema_version",
            "schema-version",
            raw(b"not json").header("schema-version", "1").header("schema-version", "01"),
        ),
        bad("malformed_json", "value", raw(b"secret-payload")),
        bad("malformed_json", "value", raw(b"\xff\xfe\x00secret-payload")),
        bad("malformed_json", "value", raw(format!("\u{feff}{}", good().json()).as_bytes())),
        bad("malformed_json", "value", raw(format!("[{}]", good().json()).as_bytes())),
        bad("malformed_json", "value", raw(b"null")),
        bad("malformed_json", "value", raw(format!("{}x", good().json()).as_bytes())),
        bad("malformed_json", "value", raw(&good().json().as_bytes()[..40])),
        bad("malformed_json", "value", good().more(r#","status":2"#).message()),
        bad("malformed_json", "value", good().more(r#","x":{"a":1,"\u0061":2}"#).message()),
        bad("malformed_json", "value", good().more(r#","x":"\ud800""#).message()),
        bad("malformed_json", "value", good().more(r#","\udfff":1"#).message()),
        bad("malformed_json", "value", good().more(r#","x":01"#).message()),
        bad("malformed_json", "value", good().more(r#","x":NaN"#).message()),
        bad("malformed_json", "value", deep(33)),
        bad("missing_field", "messageId", raw(b"{}")),
        bad("missing_field", "messageId", without("messageId")),
        bad("missing_field", "amount", without("amount")),
        bad("missing_field", "currency", without("currency")),
        bad("missing_field", "status", without("status")),
        bad("missing_field", "type", without("type")),
        bad("missing_field", "custId", without("custId")),
        bad("missing_field", "amount", good().amount("null").message()),
        invalid("messageId", Payment::new("secret-payload", 31)),
        invalid("messageId", Payment::new("00000000-0000-0000-0000-000000000000", 31)),
        invalid("messageId", Payment::new("00000000000000000000000000", 31)),
        invalid("messageId", Payment::new("0197b2a45f0e7c3a9d1e2f4b8c6d7e8f", 31)),
        invalid("messageId", Payment::new("81ARZ3NDEKTSV4RRFFQ69G5FAV", 31)),
        invalid("custId", Payment::new(uuid_v4(1), -1)),
        bad("invalid_field", "custId", raw(good().json().replace("31", "31.0").as_bytes())),
        bad("invalid_field", "custId", raw(good().json().replace("31", "9223372036854775808").as_bytes())),
        bad("invalid_field", "custId", raw(good().json().replace(":31,", ":\"31\",").as_bytes())),
        invalid("amount", good().amount("0")),
        invalid("amount", good().amount("-10.5")),
        invalid("amount", good().amount("\"10,5\"")),
        invalid("amount", good().amount("\" 10.5\"")),
        invalid("amount", good().amount("true")),
        invalid("amount", good().amount("100000000000000")),
        invalid("amount", good().amount("1e999999999999999999999")),
        invalid("amount", good().amount("10.555")),
        invalid("amount", good().amount("10.5").currency("JPY")),
        invalid("currency", good().currency("eur")),
        invalid("currency", good().currency("XAU")),
        invalid("currency", good().currency("secret-payload")),
        invalid("status", good().status(1)),
        bad("invalid_field", "status", raw(good().json().replace(":2,", ":2.0,").as_bytes())),
        bad("invalid_field", "status", raw(good().json().replace(":2,", ":-0,").as_bytes())),
        invalid("type", good().kind("bwi")),
        invalid("type", good().kind("secret-payload")),
        invalid("comment", good().more(&format!(r#","comment":"{}""#, "é".repeat(1_001)))),
        invalid("comment", good().more(r#","comment":"secret-payload\u0000""#)),
        invalid("comment", good().more(r#","comment":5"#)),
        invalid("externalRefId", good().more(&format!(r#","externalRefId":"{}""#, "é".repeat(65)))),
        invalid("externalRefId", good().more(r#","externalRefId":["secret-payload"]"#)),
        bad("key_mismatch", "key", Message { key: Some(b"32".to_vec()), ..good().message() }),
        bad("key_mismatch", "key", Message { key: None, ..good().message() }),
        bad("key_mismatch", "key", Message { key: Some(Vec::new()), ..good().message() }),
        bad("key_mismatch", "key", Message { key: Some(b"031".to_vec()), ..good().message() }),
        bad(
            "key_mismatch",
            "key",
            Message { key: Some(b"secret-payload\xff\x00".to_vec()), ..good().message() },
        ),
        bad("invalid_timestamp", "timestamp", good().message().timestamp_ms(946_684_799_999)),
        bad("invalid_timestamp", "timestamp", good().message().timestamp_ms(1)),
        bad("invalid_timestamp", "timestamp", good().message().timestamp_ms(4_102_444_800_000)),
        // The key is checked before the timestamp, and the timestamp before the time in the id.
        bad("key_mismatch", "key", Message { key: None, ..good().message().timestamp_ms(1) }),
        bad("invalid_timestamp", "timestamp", at(uuid_v7(1, 1)).timestamp_ms(1)),
        bad("stale_message_id", "messageId", at(uuid_v7(AT_MS - 7 * 24 * hour - 1, 1))),
        bad("stale_message_id", "messageId", at(uuid_v7(AT_MS + hour + 1, 1))),
        // A ULID carries a time, too.
        bad("stale_message_id", "messageId", Payment::new(ulid(uuid_v7(1, 1)), 31).message()),
    ]
}

#[test]
fn every_bad_record_is_dead_lettered_untouched_with_its_reason() {
    // GIVEN bad records of every kind, each with headers of its own, between two good ones
    let scope = Scope::new(Servers::shared(), "dead_letters");
    let any_time = ("message.timestamp.after.max.ms", "9223372036854775807");
    scope.create_topics_with(1, 1, &[any_time]);
    scope.command(&["migrate"]).succeeds();
    let bad: Vec<Bad> = every_bad_record()
        .into_iter()
        .map(|mut bad| {
            bad.message =
                bad.message.header("own", b"\xff\x00").header("correlation-id", "c").header("own", "again");
            bad.message.headers.push(("null".to_owned(), None));
            bad
        })
        .collect();
    let good = |seed: u64| Payment::new(uuid_v4(1_000 + seed), 31).message();
    let mut sent = vec![good(1)];
    sent.extend(bad.iter().map(|bad| bad.message.clone()));
    sent.push(good(2));
    let places = scope.produce(&scope.input_topic, sent);

    // WHEN the daemon has processed them
    let daemon = scope.drain();

    // THEN the good ones are written
    assert_eq!(scope.count("payment_core"), 2);
    assert_eq!(scope.count("idempotency"), 2);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 2);
    // AND each bad one is a dead letter: the original key, value and headers, then the reason
    let mut letters = scope.read_all(&scope.dead_letter_topic);
    letters.sort_by_key(|letter| letter.header("dlq-offset").parse::<i64>().unwrap());
    assert_eq!(letters.len(), bad.len());
    for ((letter, bad), (_, offset)) in letters.iter().zip(&bad).zip(&places[1..]) {
        let case = format!("{} {}: {:?}", bad.reason, bad.names, bad.message);
        assert_eq!(letter.key, bad.message.key, "{case}");
        assert_eq!(letter.value, bad.message.value, "{case}");
        assert_eq!(letter.headers[..bad.message.headers.len()], bad.message.headers[..], "{case}");
        assert_eq!(letter.header("dlq-reason"), bad.reason, "{case}: {}", letter.header("dlq-detail"));
        let detail = letter.header("dlq-detail");
        assert!(detail.contains(bad.names), "{case}: {detail}");
        assert!(!detail.contains("secret"), "{case}: {detail}");
        assert_eq!(letter.header("dlq-topic"), scope.input_topic);
        assert_eq!(letter.header("dlq-partition"), "0");
        assert_eq!(letter.header("dlq-offset"), offset.to_string());
        assert_eq!(letter.header("dlq-timestamp"), bad.message.timestamp_ms.unwrap().to_string(), "{case}");
        assert_eq!(letter.header("source"), scope.source(0, *offset));
        assert_eq!(letter.headers.len(), bad.message.headers.len() + 7, "{case}: {:?}", letter.headers);
    }
    // AND the log contains nothing of their contents
    assert!(!daemon.log().contains("secret-payload"));
}

#[test]
fn a_time_in_a_message_id_may_lie_a_window_before_and_an_hour_after_its_record() {
    let scope = Scope::ready("id_times", 1, 1);
    let hour = 3_600_000;
    let ids = [uuid_v7(AT_MS - 7 * 24 * hour, 1), uuid_v7(AT_MS + hour, 2)];
    scope.produce(&scope.input_topic, ids.map(|id| Payment::new(id, 31).message()));

    scope.drain();

    assert_eq!(scope.count("payment_core"), 2);
    assert!(scope.read_all(&scope.dead_letter_topic).is_empty());
}

#[test]
fn a_stale_id_is_a_dead_letter_even_if_it_would_be_a_duplicate() {
    let scope = Scope::ready("stale_duplicate", 1, 1);
    let id = uuid_v7(AT_MS, 1);
    let late = Payment::new(id, 31).message().timestamp_ms(AT_MS + 7 * 24 * 3_600_000 + 1);
    scope.produce(&scope.input_topic, [Payment::new(id, 31).message(), late]);

    scope.drain();

    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].header("dlq-reason"), "stale_message_id");
    assert_eq!(scope.count("payment_core"), 1);
}

#[test]
fn reserved_headers_of_a_record_are_replaced() {
    // GIVEN a good and a bad record with headers that have the daemon's own names, several times
    let scope = Scope::ready("forged", 1, 1);
    let forge = |message: Message| {
        [
            "source",
            "dlq-reason",
            "dlq-detail",
            "dlq-topic",
            "dlq-partition",
            "dlq-offset",
            "dlq-timestamp",
            "dlq-value-bytes",
            "dlq-value-sha256",
            "source",
        ]
        .iter()
        .fold(message, |message, name| message.header(name, "forged"))
        .header("dlq-replays", "2")
        .header("own", "kept")
    };
    let good = Payment::new(uuid_v4(1), 31).message();
    scope.produce(&scope.input_topic, [forge(good), forge(Message::new("31", "{}").timestamp_ms(AT_MS))]);

    // WHEN the daemon has processed them
    scope.drain();

    // THEN no output has the values they carried, except the count of replays
    let read = scope.read_all(&scope.read_topic);
    assert_eq!(read[0].header("source"), scope.source(0, 0));
    assert!(!read[0].has_header("dlq-reason"));
    let letters = scope.read_all(&scope.dead_letter_topic);
    let (source, detail) = (scope.source(0, 1), letters[0].header("dlq-detail"));
    assert_eq!(
        headers(&letters[0]),
        [
            ("dlq-detail", detail),
            ("dlq-offset", "1"),
            ("dlq-partition", "0"),
            ("dlq-reason", "missing_field"),
            ("dlq-replays", "2"),
            ("dlq-timestamp", AT_MS.to_string().as_str()),
            ("dlq-topic", scope.input_topic.as_str()),
            ("own", "kept"),
            ("source", source.as_str()),
        ]
    );
    assert_ne!(detail, "forged");
}

#[test]
fn a_dead_lettered_record_claims_no_id_so_its_replay_succeeds() {
    // GIVEN a record rejected for its type, and a good one of the same id behind it in the batch
    let scope = Scope::ready("replay", 1, 1);
    let id = uuid_v4(1);
    let refused = Payment::new(id, 31).kind("NEW");
    scope.produce(&scope.input_topic, [refused.message()]);
    scope.drain();
    let letter = scope.read_all(&scope.dead_letter_topic).remove(0);
    assert_eq!(scope.count("idempotency"), 0);

    // WHEN the type is allowed and the dead letter is sent again unchanged
    let replay = Message {
        key: letter.key,
        value: letter.value,
        headers: letter.headers,
        timestamp_ms: Some(AT_MS),
        partition: None,
    };
    scope.produce(&scope.input_topic, [replay.header("dlq-replays", "1")]);
    scope.drain_with(&[("PAYMENT_WRITER__PAYMENT__TYPES", "BWI,NEW")]);

    // THEN it is written: a dead letter does not claim the id
    assert_eq!(scope.count("payment_core"), 1);
    let read = scope.read_all(&scope.read_topic);
    assert_eq!(read.len(), 1);
    assert_eq!(read[0].json()["type"], "NEW");
    assert_eq!(read[0].header("source"), scope.source(0, 1));
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 1);
}

#[test]
fn a_value_over_512_kib_is_left_out_of_its_dead_letter_and_named_by_size_and_hash() {
    // GIVEN values around the limit and far above it, in a topic that accepts them
    let scope = Scope::new(Servers::shared(), "large_values");
    scope.create_topic_with(&scope.input_topic, 1, &[("max.message.bytes", "8000000")]);
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        scope.create_topic(topic, 1);
    }
    scope.command(&["migrate"]).succeeds();
    let value = |bytes: usize| (0..bytes).map(|i| (i % 251) as u8).collect::<Vec<u8>>();
    let sizes = [512 * 1024, 512 * 1024 + 1, 3_000_000];
    scope
        .produce(&scope.input_topic, sizes.map(|bytes| Message::new("31", value(bytes)).timestamp_ms(AT_MS)));
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);

    // WHEN the daemon has processed them
    scope.drain();

    // THEN the first is kept as it was, the others by size and hash, and later records are written
    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 3);
    assert_eq!(letters[0].value, Some(value(sizes[0])));
    assert!(!letters[0].has_header("dlq-value-bytes") && !letters[0].has_header("dlq-value-sha256"));
    for (letter, bytes) in letters.iter().zip(sizes).skip(1) {
        assert_eq!(letter.value, None);
        assert_eq!(letter.header("dlq-value-bytes"), bytes.to_string());
        let hash: String = Sha256::digest(value(bytes)).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(letter.header("dlq-value-sha256"), hash);
    }
    for letter in &letters {
        assert_eq!(letter.key_text(), "31");
        assert_eq!(letter.header("dlq-reason"), "too_large");
    }
    assert_eq!(scope.count("payment_core"), 1);
}

#[test]
fn headers_too_large_for_any_output_do_not_stop_their_partition() {
    // GIVEN records whose headers and value together exceed what an output topic accepts
    let scope = Scope::ready("large_headers", 1, 1);
    let huge = "h".repeat(450_000);
    scope.produce(
        &scope.input_topic,
        [
            Message::new("31", vec![b'x'; 500_000]).header("own", huge.as_str()).timestamp_ms(AT_MS),
            Payment::new(uuid_v4(1), 31)
                .message()
                .header("correlation-id", huge.as_str())
                .header("traceparent", huge.as_str()),
            Payment::new(uuid_v4(2), 31).message(),
        ],
    );

    // WHEN the daemon has processed them
    scope.drain();

    // THEN each has its outcome
    assert_eq!(scope.count("payment_core"), 2);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 2);
    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].header("dlq-reason"), "too_large");
    assert_eq!(letters[0].header("source"), scope.source(0, 0));
}

#[test]
fn payments_of_an_account_are_written_and_published_in_the_order_of_their_offsets() {
    // GIVEN payments of many accounts on several partitions, with some invalid and some repeated records
    let scope = Scope::ready("order", 6, 3);
    let accounts = 20;
    let mut messages = Vec::new();
    for round in 0..60_u64 {
        for account in 0..accounts {
            let id = uuid_v4(round * 1_000 + account);
            // Every seventh round repeats the one before, every eleventh is invalid.
            let id = if round % 7 == 6 { uuid_v4((round - 1) * 1_000 + account) } else { id };
            let amount = if round % 7 == 6 { round } else { round + 1 };
            let payment = Payment::new(id, account as i64).amount(&amount.to_string());
            let payment = if round % 11 == 10 { payment.kind("bad") } else { payment };
            messages.push(payment.message());
        }
    }
    let sent = messages.len();
    scope.produce(&scope.input_topic, messages);

    // WHEN they are read in small batches
    let daemon = scope.drain_with(&[("PAYMENT_WRITER__BATCH__MAX_PAYMENTS", "37")]);

    // THEN every account's events are in the order in which its payments were sent
    let read = scope.read_all(&scope.read_topic);
    let letters = scope.read_all(&scope.dead_letter_topic);
    for topic in [&read, &letters] {
        for account in 0..accounts {
            let key = account.to_string().into_bytes();
            let of_account: Vec<&Received> = topic.iter().filter(|r| r.key.as_ref() == Some(&key)).collect();
            let offsets: Vec<i64> = of_account
                .iter()
                .map(|r| r.header("source").rsplit('/').next().unwrap().parse().unwrap())
                .collect();
            assert!(offsets.is_sorted_by(|a, b| a < b), "account {account}: {offsets:?}");
            let partitions: std::collections::BTreeSet<i32> =
                of_account.iter().map(|r| r.partition).collect();
            assert_eq!(partitions.len(), 1, "an account's events are on one partition");
        }
    }
    // AND the written payments are those with a read event, and none is missing
    assert_eq!(scope.count("payment_core"), read.len() as i64);
    let bad = 60 / 11 * accounts as usize;
    let repeats_of_good = (0..60).filter(|r| r % 7 == 6 && r % 11 != 10 && (r - 1) % 11 != 10).count();
    assert_eq!(letters.len(), bad);
    assert_eq!(read.len(), sent - bad - repeats_of_good * accounts as usize, "{}", daemon.log());
}

#[test]
fn aborted_records_have_no_outcome_and_control_records_are_skipped() {
    // GIVEN committed and aborted transactions, with control records throughout and at the ends of the
    // partitions
    let scope = Scope::ready("transactional", 2, 1);
    let payment = |seed: u64, partition: i32| Payment::new(uuid_v4(seed), 31).message().partition(partition);
    scope.produce_in_transaction(&scope.input_topic, [payment(1, 0), payment(2, 1)], true);
    scope.produce_in_transaction(
        &scope.input_topic,
        [payment(3, 0), Message::new("31", "{}").partition(1)],
        false,
    );
    scope.produce(&scope.input_topic, [payment(4, 0)]);
    scope.produce_in_transaction(&scope.input_topic, [payment(5, 0), payment(6, 0)], true);
    scope.produce_in_transaction(&scope.input_topic, [payment(7, 0)], false);
    // Partition 1 ends with control records of two transactions, the last one aborted.

    // WHEN a daemon has caught up
    let mut daemon = scope.daemon(&["run"]);
    wait_until("lag is 0 on both partitions", || {
        let lag = |p: i32| {
            daemon.get("/status").is_some_and(|reply| {
                let json: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
                json["partitions"][p.to_string()]["lag_records"] == 0
            })
        };
        lag(0) && lag(1)
    });
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(0));

    // THEN the committed records are written, the aborted ones have no outcome
    let ids: Vec<String> = scope
        .sql("SELECT message_id::text FROM payment_writer.payment_metadata ORDER BY source_partition, source_offset", &[])
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(ids, [1, 4, 5, 6, 2].map(|seed| uuid_v4(seed).to_string()));
    assert_eq!(scope.read_all(&scope.read_topic).len(), 5);
    assert!(scope.read_all(&scope.dead_letter_topic).is_empty());
    // AND all cursors are at the ends: five records and five control records on partition 0
    let cursors: Vec<(i32, i64, Option<i64>)> = scope
        .sql("SELECT partition, applied, published FROM payment_writer.source_cursor ORDER BY partition", &[])
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    assert_eq!(cursors, [(0, 10, Some(10)), (1, 4, Some(4))]);
    assert_eq!(scope.committed(0).unwrap().0, 10);
    assert_eq!(scope.committed(1).unwrap().0, 4);
}

#[test]
fn an_open_transaction_holds_its_partition_back_until_it_ends() {
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
    use std::time::Duration;

    // GIVEN an open transaction, and a record behind it
    let scope = Scope::ready("open_transaction", 1, 1);
    let producer: BaseProducer = scope.client_config().set("transactional.id", "open").create().unwrap();
    producer.init_transactions(Duration::from_secs(60)).unwrap();
    producer.begin_transaction().unwrap();
    let (first, second) = (Payment::new(uuid_v4(1), 31), Payment::new(uuid_v4(2), 31));
    producer
        .send(BaseRecord::to(&scope.input_topic).key("31").payload(&first.json()).timestamp(AT_MS))
        .map_err(|(error, _)| error)
        .unwrap();
    producer.flush(Duration::from_secs(60)).unwrap();
    scope.produce(&scope.input_topic, [second.message()]);

    // WHEN a daemon runs until it has caught up
    scope.drain();

    // THEN neither is written: the end is the last stable offset
    assert_eq!(scope.count("payment_core"), 0);
    assert!(scope.read_all(&scope.dead_letter_topic).is_empty());

    // AND once the transaction is committed, both are, in order
    producer.commit_transaction(Duration::from_secs(60)).unwrap();
    scope.drain();
    let read: Vec<_> =
        scope.read_all(&scope.read_topic).iter().map(|r| r.json()["messageId"].clone()).collect();
    assert_eq!(read, [uuid_v4(1).to_string(), uuid_v4(2).to_string()]);
}
