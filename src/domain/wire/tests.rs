use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::domain::record::{Offset, Partition, SourceBatch};

const V7: &str = "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f";
const V4: &str = "3b241101-e2bb-4255-8caf-4136c566a962";
/// The time in `V7`.
const V7_MS: i64 = 0x0197_b2a4_5f0e;
const EXAMPLE: &str = r#"{"messageId":"0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f","amount":123131.21,"status":2,"currency":"EUR","custId":4711,"type":"BWI","comment":"Creating BWI trn in EUR"}"#;

/// A record to parse; by default the contract's example.
struct Record<'t> {
    key: Option<&'t [u8]>,
    value: Option<&'t [u8]>,
    timestamp: Option<i64>,
    headers: &'t [(&'t str, Option<&'t str>)],
}

impl Default for Record<'_> {
    fn default() -> Self {
        Record { key: Some(b"4711"), value: Some(EXAMPLE.as_bytes()), timestamp: Some(V7_MS), headers: &[] }
    }
}

impl Record<'_> {
    fn batch(&self) -> SourceBatch {
        let mut batch = SourceBatch::new();
        let headers = self.headers.iter().map(|(n, v)| (n.as_bytes(), v.map(str::as_bytes)));
        batch.push(Partition(3), Offset(42), self.timestamp.map(TimestampMs), self.key, self.value, headers);
        batch
    }

    /// Parses it and returns `look` of the payment, or the refusal.
    fn parse<T>(&self, rules: &Rules, look: impl Fn(&Payment<'_>) -> T) -> Result<T, Refusal> {
        let batch = self.batch();
        parse(&batch.get(0).unwrap(), rules).map(|p| look(&p))
    }

    fn reason(&self) -> Option<Reason> {
        self.parse(&Rules::default(), |_| ()).err().map(|r| r.reason)
    }
}

fn value_reason(value: &str) -> Option<Reason> {
    Record { value: Some(value.as_bytes()), ..Default::default() }.reason()
}

/// The example with one field replaced by this JSON text, or omitted.
fn with(field: &str, text: Option<&str>) -> String {
    let mut out = String::from("{");
    let fields = [
        ("messageId", format!("\"{V4}\"")),
        ("custId", "4711".into()),
        ("amount", "10.5".into()),
        ("currency", "\"EUR\"".into()),
        ("status", "2".into()),
        ("type", "\"BWI\"".into()),
        ("comment", "\"c\"".into()),
        ("externalRefId", "\"e\"".into()),
    ];
    for (name, value) in fields {
        let value = if name == field { text } else { Some(value.as_str()) };
        if let Some(value) = value {
            let comma = if out.len() > 1 { "," } else { "" };
            write!(out, "{comma}\"{name}\":{value}").unwrap();
        }
    }
    out + "}"
}

fn field_reason(field: &str, text: &str) -> Option<Reason> {
    value_reason(&with(field, Some(text)))
}

#[test]
fn the_contracts_example_is_a_payment() {
    let record = Record::default();
    let batch = record.batch();
    let payment = parse(&batch.get(0).unwrap(), &Rules::default()).unwrap();
    let expected = Payment {
        message_id: MessageId::parse(V7).unwrap().id,
        message_id_text: V7.into(),
        cust_id: 4711,
        amount: Amount::parse("123131.21").unwrap(),
        currency: Currency::from_code("EUR").unwrap(),
        status: Status::Success,
        payment_type: "BWI".into(),
        comment: Some("Creating BWI trn in EUR".into()),
        external_ref_id: None,
        created_at: TimestampMs(V7_MS),
    };
    assert_eq!(payment, expected);
    assert!(matches!(payment.message_id_text, Cow::Borrowed(_)));
    assert!(matches!(payment.comment, Some(Cow::Borrowed(_))));
}

#[test]
fn the_first_reason_that_holds_is_given() {
    let value = |value| Record { value, ..Default::default() };
    assert_eq!(value(None).reason(), Some(Reason::EmptyValue));
    assert_eq!(value(Some(b"")).reason(), Some(Reason::EmptyValue));

    // Each record breaks one rule more than the next.
    let version: &[_] = &[("schema-version", Some("2"))];
    let spaces = " ".repeat(16_385);
    let bad = |value, headers| Record { value: Some(value), key: Some(b"1"), timestamp: None, headers };
    let stale = format!("{{\"messageId\":\"{V7}\",\"custId\":1,\"amount\":0,\"status\":2}}");
    let invalid = with("amount", Some("0"));
    let other_key = with("custId", Some("2"));
    let right = with("custId", Some("1"));
    for (record, reason) in [
        (bad(spaces.as_bytes(), version), Reason::TooLarge),
        (bad(b"[", version), Reason::UnsupportedSchemaVersion),
        (bad(b"[", &[]), Reason::MalformedJson),
        (bad(stale.as_bytes(), &[]), Reason::MissingField),
        (bad(invalid.as_bytes(), &[]), Reason::InvalidField),
        (bad(other_key.as_bytes(), &[]), Reason::KeyMismatch),
        (bad(right.as_bytes(), &[]), Reason::InvalidTimestamp),
        (Record { timestamp: Some(V7_MS - 3_600_001), ..Default::default() }, Reason::StaleMessageId),
    ] {
        assert_eq!(record.reason(), Some(reason));
    }
}

#[test]
fn a_value_of_exactly_the_limit_is_read() {
    let padded = format!("{EXAMPLE}{}", " ".repeat(16 * 1024 - EXAMPLE.len()));
    assert_eq!(value_reason(&padded), None);
    assert_eq!(value_reason(&format!("{padded} ")), Some(Reason::TooLarge));
}

#[test]
fn every_schema_version_header_says_exactly_1() {
    fn reason(headers: &[(&str, Option<&str>)]) -> Option<Reason> {
        Record { headers, ..Default::default() }.reason()
    }
    let refused = Some(Reason::UnsupportedSchemaVersion);
    assert_eq!(reason(&[("schema-version", Some("1"))]), None);
    assert_eq!(reason(&[("schema-version", Some("1")), ("schema-version", Some("1"))]), None);
    assert_eq!(reason(&[("Schema-Version", Some("2")), ("traceparent", None)]), None);
    assert_eq!(reason(&[("schema-version", Some("1")), ("schema-version", Some("2"))]), refused);
    for value in [None, Some(""), Some("01"), Some("1 "), Some("1.0"), Some("\"1\"")] {
        assert_eq!(reason(&[("schema-version", value)]), refused, "{value:?}");
    }
}

#[test]
fn a_required_field_that_is_absent_or_null_is_missing() {
    for field in Field::VARIANTS {
        let expected = match field {
            Field::Comment | Field::ExternalRefId => None,
            _ => Some(Reason::MissingField),
        };
        assert_eq!(value_reason(&with(field.name(), None)), expected, "{field:?}");
        assert_eq!(field_reason(field.name(), "null"), expected, "{field:?}");
    }
    // All fields are searched for, in the contract's order, before any is checked.
    let refusal = Record { value: Some(br#"{"messageId":5,"currency":"EUR"}"#), ..Default::default() }
        .parse(&Rules::default(), |_| ());
    assert_eq!(refusal, Err(Refusal::new(Reason::MissingField, "custId: absent or null")));
}

#[test]
fn fields_that_break_their_rule_are_invalid() {
    let too_long = format!("\"{}\"", "é".repeat(1_001));
    let too_long_ref = format!("\"{}\"", "é".repeat(65));
    for (field, text) in [
        ("messageId", "7"),
        ("messageId", "\"\""),
        ("messageId", "\"00000000-0000-0000-0000-000000000000\""),
        ("messageId", "[]"),
        ("custId", "-1"),
        ("custId", "-0"),
        ("custId", "4711.0"),
        ("custId", "4711e0"),
        ("custId", "\"4711\""),
        ("custId", "9223372036854775808"),
        ("custId", "true"),
        ("amount", "0"),
        ("amount", "-1"),
        ("amount", "1.234"),
        ("amount", "1e14"),
        ("amount", "\"\""),
        ("amount", "\" 1\""),
        ("amount", "\"+1\""),
        ("amount", "\"01\""),
        ("amount", "{}"),
        ("currency", "\"eur\""),
        ("currency", "\"XAU\""),
        ("currency", "978"),
        ("status", "1"),
        ("status", "2.0"),
        ("status", "-0"),
        ("status", "\"2\""),
        ("status", "99999999999999999999"),
        ("type", "\"bwi\""),
        ("type", "\"\""),
        ("type", "1"),
        ("comment", "1"),
        ("comment", "\"\\u0000\""),
        ("comment", too_long.as_str()),
        ("externalRefId", "false"),
        ("externalRefId", "\"a\\u0000\""),
        ("externalRefId", too_long_ref.as_str()),
    ] {
        assert_eq!(field_reason(field, text), Some(Reason::InvalidField), "{field} {text}");
    }
}

#[test]
fn fields_that_keep_their_rule_are_read() {
    let longest = format!("\"{}\"", "𝄞".repeat(1_000));
    let longest_ref = format!("\"{}\"", "𝄞".repeat(64));
    for (field, text) in [
        ("messageId", "\"01ARZ3NDEKTSV4RRFFQ69G5FAV\""),
        ("amount", "\"10.50\""),
        ("amount", "1E+3"),
        ("amount", "99999999999999.99"),
        ("currency", "\"BGN\""),
        ("currency", "\"\\u0045UR\""),
        ("status", "0"),
        ("status", "-2"),
        ("type", "\"MSC\""),
        ("comment", "\"\""),
        ("comment", longest.as_str()),
        ("externalRefId", longest_ref.as_str()),
    ] {
        let record = with(field, Some(text));
        let timestamp = Some(if text.contains("01ARZ") { 1_469_922_850_259 } else { V7_MS });
        let record = Record { value: Some(record.as_bytes()), timestamp, ..Default::default() };
        assert_eq!(record.reason(), None, "{field} {text}");
    }
}

#[test]
fn the_key_is_the_decimal_text_of_the_account() {
    let reason = |key, cust_id| {
        let value = with("custId", Some(cust_id));
        Record { key, value: Some(value.as_bytes()), ..Default::default() }.reason()
    };
    assert_eq!(reason(Some(b"0".as_slice()), "0"), None);
    assert_eq!(reason(Some(b"9223372036854775807"), "9223372036854775807"), None);
    for key in [None, Some(b"".as_slice()), Some(b"04711"), Some(b"4711 "), Some(b"+4711"), Some(b"471")] {
        assert_eq!(reason(key, "4711"), Some(Reason::KeyMismatch), "{key:?}");
    }
}

#[test]
fn timestamps_lie_in_the_years_2000_to_2099() {
    let value = with("", None);
    let reason =
        |timestamp| Record { value: Some(value.as_bytes()), timestamp, ..Default::default() }.reason();
    assert_eq!(reason(Some(TIMESTAMP_MIN.0)), None);
    assert_eq!(reason(Some(TIMESTAMP_MAX.0)), None);
    for timestamp in [None, Some(-1), Some(i64::MIN), Some(TIMESTAMP_MIN.0 - 1), Some(TIMESTAMP_MAX.0 + 1)] {
        assert_eq!(reason(timestamp), Some(Reason::InvalidTimestamp), "{timestamp:?}");
    }
}

#[test]
fn an_id_whose_time_lies_beyond_the_window_or_an_hour_ahead_is_stale() {
    const WEEK_MS: i64 = 7 * 86_400_000;
    let reason = |timestamp| Record { timestamp: Some(timestamp), ..Default::default() }.reason();
    assert_eq!(reason(V7_MS + WEEK_MS), None);
    assert_eq!(reason(V7_MS + WEEK_MS + 1), Some(Reason::StaleMessageId));
    assert_eq!(reason(V7_MS - 3_600_000), None);
    assert_eq!(reason(V7_MS - 3_600_001), Some(Reason::StaleMessageId));

    // The same bits have a time as a ULID and none as a UUID of version 4.
    let bits = u128::from_be_bytes(*MessageId::parse(V4).unwrap().id.as_bytes());
    let alphabet = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let ulid: String = (0..26).rev().map(|i| char::from(alphabet[(bits >> (5 * i)) as usize & 31])).collect();
    assert_eq!(field_reason("messageId", &format!("\"{V4}\"")), None);
    assert_eq!(field_reason("messageId", &format!("\"{ulid}\"")), Some(Reason::StaleMessageId));
}

#[test]
fn null_and_empty_texts_are_absent_and_do_not_change_the_hash() {
    let hash = |text| {
        let value = with("comment", text);
        Record { value: Some(value.as_bytes()), ..Default::default() }
            .parse(&Rules::default(), |p| (p.comment.is_none(), p.payload_hash()))
            .unwrap()
    };
    let absent = hash(None);
    assert!(absent.0);
    assert_eq!(hash(Some("null")), absent);
    assert_eq!(hash(Some("\"\"")), absent);
    assert_ne!(hash(Some("\"x\"")), absent);
}

#[test]
fn unknown_fields_are_ignored_and_must_be_good_json() {
    let example = |extra: &str| EXAMPLE.replacen('{', &format!("{{{extra},"), 1);
    for extra in [
        r#""x":1e999999"#,
        r#""x":{"a":[{"amount":1},{"amount":1}],"b":null}"#,
        r#""x":true,"X":false"#,
        r#""":"""#,
        r#""\ud834\udd1e":"\ud834\udd1e""#,
    ] {
        assert_eq!(value_reason(&example(extra)), None, "{extra}");
    }
    for extra in [
        r#""x":1,"x":1"#,
        r#""x":1,"\u0078":1"#,
        r#""amount":1"#,
        r#""\u0061mount":1"#,
        r#""x":{"a":1,"a":1}"#,
        r#""x":"\ud834""#,
        r#""\udd1e":0"#,
        r#""x":"\ud834\u0041""#,
        r#""x":01"#,
        r#""x":nul"#,
        "\"x\":\"\t\"",
    ] {
        assert_eq!(value_reason(&example(extra)), Some(Reason::MalformedJson), "{extra}");
    }
}

#[test]
fn the_published_schemas_say_what_the_code_does() {
    let schemas = [
        include_str!("../../../docs/schemas/payment.schema.json"),
        include_str!("../../../docs/schemas/read-event.schema.json"),
        include_str!("../../../docs/schemas/email-event.schema.json"),
    ]
    .map(|text| serde_json::from_str::<serde_json::Value>(text).unwrap());
    let [message, read, email] = &schemas;
    let names: Vec<_> = Field::VARIANTS.iter().map(|f| f.name()).collect();
    assert_eq!(message["required"], json!(names[..6]));
    assert!(message["properties"].as_object().unwrap().keys().all(|name| Field::index_of(name).is_some()));

    // The message example produces the event examples.
    let value = message["examples"][0].to_string();
    let timestamp = Some(V7_MS + 102);
    let events = Record { value: Some(value.as_bytes()), timestamp, ..Default::default() }.parse(
        &Rules::default(),
        |p| {
            let (mut read, mut email) = (Vec::new(), Vec::new());
            encode_read_event(p, &EventTexts::of(p, p.payment_id()), &mut read);
            encode_email_event(p, &EventTexts::of(p, p.payment_id()), &mut email);
            [read, email].map(|event| serde_json::from_slice::<serde_json::Value>(&event).unwrap())
        },
    );
    assert_eq!(events, Ok([read["examples"][0].clone(), email["examples"][0].clone()]));
}

#[test]
fn a_refusal_never_shows_what_the_message_says() {
    const SECRET: &str = "s3cr3t";
    let quoted = format!("\"{SECRET}\"");
    let mut values: Vec<String> =
        Field::VARIANTS.iter().map(|f| with(f.name(), Some(&format!("{{{quoted}:1}}")))).collect();
    values.extend(
        ["messageId", "custId", "amount", "currency", "status", "type"].map(|f| with(f, Some(&quoted))),
    );
    values.extend([
        quoted.clone(),
        format!("{{{quoted}:1,{quoted}:2}}"),
        format!("{{{SECRET}"),
        with("", None),
    ]);
    for value in values {
        let record =
            Record { value: Some(value.as_bytes()), key: Some(SECRET.as_bytes()), ..Default::default() };
        let refusal = record.parse(&Rules::default(), |_| ()).unwrap_err();
        assert!(!refusal.to_string().contains(SECRET), "{refusal}");
        assert!(refusal.detail.contains(": "), "{refusal}");
    }
}

/// Any valid message, with varied values and notations.
fn messages() -> impl Strategy<Value = serde_json::Value> {
    let amount = (1u64..100_000_000_000_000, 0u32..100, any::<bool>()).prop_map(|(whole, cents, quoted)| {
        let text = format!("{whole}.{cents:02}");
        // Floats of serde_json would lose digits, so large amounts are strings.
        if quoted || whole > 1_000_000 { json!(text) } else { serde_json::from_str(&text).unwrap() }
    });
    let id = (1u128..).prop_map(|raw| {
        // Version 4 has no time, so it cannot be stale.
        json!(uuid::Builder::from_random_bytes(raw.to_be_bytes()).into_uuid().to_string())
    });
    let text = |max| {
        prop_oneof![
            Just(json!(null)),
            proptest::string::string_regex(&format!("[^\\x00]{{0,{max}}}")).unwrap().prop_map(|s| json!(s))
        ]
    };
    let kind = prop_oneof![Just("BWI"), Just("VSA"), Just("MSC")];
    let status = prop_oneof![Just(2), Just(0), Just(-2)];
    (id, 0i64.., amount, status, kind, text(1_000), text(64)).prop_map(
        |(id, cust_id, amount, status, kind, comment, reference)| {
            json!({
                "messageId": id, "custId": cust_id, "amount": amount, "currency": "EUR", "status": status,
                "type": kind, "comment": comment, "externalRefId": reference,
            })
        },
    )
}

proptest! {
    #[test]
    fn every_valid_message_is_read_as_it_is_meant(message in messages(), ahead in 0i64..1_000_000) {
        let value = message.to_string();
        let key = message["custId"].to_string();
        let timestamp = Some(V7_MS + ahead);
        let record = Record { value: Some(value.as_bytes()), key: Some(key.as_bytes()), timestamp, headers: &[] };
        let batch = record.batch();
        let payment = parse(&batch.get(0).unwrap(), &Rules::default()).unwrap();
        prop_assert_eq!(json!(payment.message_id.to_uuid().to_string()), message["messageId"].clone());
        prop_assert_eq!(payment.cust_id, message["custId"].as_i64().unwrap());
        prop_assert_eq!(i64::from(payment.status.code()), message["status"].as_i64().unwrap());
        prop_assert_eq!(payment.comment.as_deref().unwrap_or(""), message["comment"].as_str().unwrap_or(""));
        prop_assert_eq!(
            payment.external_ref_id.as_deref().unwrap_or(""),
            message["externalRefId"].as_str().unwrap_or("")
        );

        // White space, order and the notation of the amount do not matter.
        let amount = format!("\"{}00E+0\"", if payment.amount.to_string().contains('.') {
            payment.amount.to_string()
        } else {
            format!("{}.", payment.amount)
        });
        let mut fields: Vec<(String, String)> =
            message.as_object().unwrap().iter().map(|(n, v)| (n.clone(), v.to_string())).collect();
        fields.iter_mut().find(|(n, _)| n == "amount").unwrap().1 = amount;
        fields.reverse();
        let mut twin = String::from("\n{");
        for (i, (name, value)) in fields.iter().enumerate() {
            write!(twin, "{}\t\"{name}\" : {value} ", if i > 0 { "," } else { "" }).unwrap();
        }
        twin.push_str("}\r\n");
        let twin = Record { value: Some(twin.as_bytes()), key: Some(key.as_bytes()), timestamp, headers: &[] };
        prop_assert_eq!(twin.parse(&Rules::default(), |p| p.payload_hash()), Ok(payment.payload_hash()));
    }

    #[test]
    fn no_bytes_make_it_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in 0usize..200,
    ) {
        let mut value = EXAMPLE.as_bytes().to_vec();
        for (index, byte) in flips {
            let at = index.index(value.len());
            value[at] = byte;
        }
        value.truncate(cut);
        let _ = Record { value: Some(&value), ..Default::default() }.reason();
    }
}
