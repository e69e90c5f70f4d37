use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::domain::payment::{Amount, Currency, MessageId, Status};

fn payment() -> Payment<'static> {
    Payment {
        message_id: MessageId::parse("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f").unwrap().id,
        message_id_text: "0197B2A4-5f0e-7c3a-9d1e-2f4b8c6d7e8f".into(),
        cust_id: 4711,
        amount: Amount::parse("123131.210").unwrap(),
        currency: Currency::from_code("EUR").unwrap(),
        status: Status::Failed,
        payment_type: "BWI".into(),
        comment: Some("Creating \"BWI\" trn".into()),
        external_ref_id: Some("never sent".into()),
        created_at: TimestampMs(1_751_000_000_123),
    }
}

fn read_event(payment: &Payment<'_>) -> String {
    let mut out = Vec::new();
    encode_read_event(payment, &EventTexts::of(payment, payment.payment_id()), &mut out);
    String::from_utf8(out).unwrap()
}

fn email_event(payment: &Payment<'_>) -> String {
    let mut out = Vec::new();
    encode_email_event(payment, &EventTexts::of(payment, payment.payment_id()), &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn the_read_event_is_as_the_contract_writes_it() {
    assert_eq!(
        read_event(&payment()),
        concat!(
            r#"{"messageId":"0197B2A4-5f0e-7c3a-9d1e-2f4b8c6d7e8f","id":"0197afbb-a67b-74c3-9390-c4ebea15d690","#,
            r#""createdAt":"2025-06-27T04:53:20.123Z","updatedAt":"2025-06-27T04:53:20.123Z","#,
            r#""amount":123131.21,"status":-2,"currency":"EUR","custId":4711,"type":"BWI","#,
            r#""comment":"Creating \"BWI\" trn","version":1}"#,
        )
    );
    let without = read_event(&Payment { comment: None, ..payment() });
    assert!(without.ends_with(r#""type":"BWI","version":1}"#), "{without}");
}

#[test]
fn the_email_event_is_as_the_contract_writes_it() {
    assert_eq!(
        email_event(&payment()),
        concat!(
            r#"{"id":"0197afbb-a67b-74c3-9390-c4ebea15d690","messageId":"0197B2A4-5f0e-7c3a-9d1e-2f4b8c6d7e8f","#,
            r#""custId":4711,"amount":123131.21,"currency":"EUR","type":"BWI","#,
            r#""createdAt":"2025-06-27T04:53:20.123Z"}"#,
        )
    );
}

#[test]
fn events_are_appended_to_what_is_there() {
    let mut out = b"before".to_vec();
    encode_email_event(&payment(), &EventTexts::of(&payment(), payment().payment_id()), &mut out);
    assert!(out.starts_with(b"before{"));
}

proptest! {
    #[test]
    fn events_read_back_as_the_payment(
        cust_id in 0i64..,
        count in 1u64..1_000_000_000_000_000_000,
        kind in "\\PC{0,8}",
        comment in "(?s).{0,60}|[\"\\\\\n\r\t\u{1}\u{1f}\u{7f}/\u{2028}]{1,20}",
        created_at in 946_684_800_000i64..4_102_444_800_000,
        status in proptest::sample::select(&[Status::Success, Status::Pending, Status::Failed][..]),
    ) {
        let amount = Amount::parse(&format!("{}.{:04}", count / 10_000, count % 10_000)).unwrap();
        let payment = Payment {
            cust_id, amount, status, payment_type: kind.as_str().into(), comment: Some(comment.as_str().into()),
            created_at: TimestampMs(created_at), ..payment()
        };
        let time = Timestamp::from_millisecond(created_at).unwrap();
        let (read, email) = (read_event(&payment), email_event(&payment));
        let raw_amount = format!("\"amount\":{amount},");
        prop_assert!(read.contains(&raw_amount) && email.contains(&raw_amount));
        let (read, email): (Value, Value) =
            (serde_json::from_str(&read).unwrap(), serde_json::from_str(&email).unwrap());
        for event in [&read, &email] {
            prop_assert_eq!(event["id"].as_str().unwrap(), payment.payment_id().to_string());
            prop_assert_eq!(event["messageId"].as_str().unwrap(), payment.message_id_text.as_ref());
            prop_assert_eq!(event["custId"].as_i64(), Some(cust_id));
            prop_assert_eq!(event["currency"].as_str(), Some("EUR"));
            prop_assert_eq!(event["type"].as_str(), Some(kind.as_str()));
            prop_assert_eq!(event["createdAt"].as_str().unwrap(), format!("{time:.3}"));
        }
        prop_assert_eq!(&read["updatedAt"], &read["createdAt"]);
        prop_assert_eq!(read["status"].as_i64(), Some(i64::from(status.code())));
        prop_assert_eq!(read["comment"].as_str(), Some(comment.as_str()));
        prop_assert_eq!(read["version"].as_i64(), Some(1));
        prop_assert_eq!(read.as_object().unwrap().len(), 11);
        prop_assert_eq!(email.as_object().unwrap().len(), 7);
    }

    #[test]
    fn times_are_written_as_jiff_writes_them(ms in -62_167_219_200_000i64..=253_402_207_200_999) {
        let text = String::from_utf8(Iso8601::of(TimestampMs(ms)).0.to_vec()).unwrap();
        prop_assert_eq!(text, format!("{:.3}", Timestamp::from_millisecond(ms).unwrap()));
    }
}

#[test]
fn days_around_the_end_of_february_are_written() {
    for (ms, expected) in [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_399_999, "2000-02-28T23:59:59.999Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
    ] {
        assert_eq!(Iso8601::of(TimestampMs(ms)).0, expected.as_bytes());
    }
}
