use proptest::prelude::*;

use super::*;

fn payment() -> Payment<'static> {
    Payment {
        message_id: MessageId::parse("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f").unwrap().id,
        message_id_text: "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f".into(),
        cust_id: 4711,
        amount: Amount::parse("123131.21").unwrap(),
        currency: Currency::from_code("EUR").unwrap(),
        status: Status::Success,
        payment_type: "BWI".into(),
        comment: Some("Creating BWI trn in EUR".into()),
        external_ref_id: None,
        created_at: TimestampMs(1_751_000_000_123),
    }
}

/// Computed with the reference implementation of XXH3 from the encoding in the documentation.
#[test]
fn the_payload_hash_is_stored_data_and_never_changes() {
    assert_eq!(payment().payload_hash(), 3236304711541046078);
    let long = Payment {
        cust_id: i64::MAX,
        amount: Amount::parse("99999999999999.9999").unwrap(),
        currency: Currency::from_code("CLF").unwrap(),
        status: Status::Failed,
        payment_type: "VSA".into(),
        comment: Some("ä".repeat(1_000).into()),
        external_ref_id: Some("ref-1".into()),
        ..payment()
    };
    assert_eq!(long.payload_hash(), 3673791705459383851);
    let least = Payment {
        cust_id: 0,
        amount: Amount::parse("0.0001").unwrap(),
        currency: Currency::from_code("UYW").unwrap(),
        status: Status::Pending,
        payment_type: "MSC".into(),
        comment: None,
        external_ref_id: None,
        ..payment()
    };
    assert_eq!(least.payload_hash(), -3008755797014833127);
}

/// Computed with the reference implementation of XXH3 from the rule in the contract.
#[test]
fn the_payment_id_is_stored_data_and_never_changes() {
    assert_eq!(payment().payment_id().to_string(), "0197afbb-a67b-74c3-9390-c4ebea15d690");
    let id = MessageId::parse("ffffffff-ffff-ffff-ffff-ffffffffffff").unwrap().id;
    let first = TimestampMs(946_684_800_000);
    assert_eq!(payment_id(id, first).to_string(), "00dc6acf-ac00-72c7-970e-5b3addd1ef9a");
}

#[test]
fn message_id_and_time_are_not_part_of_the_payload() {
    let other = Payment {
        message_id: MessageId::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap().id,
        message_id_text: "01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
        created_at: TimestampMs(1_800_000_000_000),
        ..payment()
    };
    assert_eq!(other.payload_hash(), payment().payload_hash());
}

#[test]
fn every_part_of_the_payload_tells() {
    let base = payment();
    let others = [
        Payment { cust_id: 4712, ..base.clone() },
        Payment { amount: Amount::parse("123131.2").unwrap(), ..base.clone() },
        Payment { currency: Currency::from_code("USD").unwrap(), ..base.clone() },
        Payment { status: Status::Failed, ..base.clone() },
        Payment { payment_type: "VSA".into(), ..base.clone() },
        Payment { comment: None, ..base.clone() },
        Payment { comment: None, external_ref_id: base.comment.clone(), ..base.clone() },
        Payment { external_ref_id: Some("1".into()), ..base.clone() },
    ];
    for other in others {
        assert_ne!(other.payload_hash(), base.payload_hash(), "{other:?}");
    }
}

proptest! {
    /// Includes sizes around the limit between hashing from the stack and streaming.
    #[test]
    fn one_go_and_stream_hash_alike(comment in ".{1,120}", cust_id in 0i64..) {
        let payment = Payment { cust_id, comment: Some(comment.into()), ..payment() };
        let mut bytes = Vec::new();
        payment.encode_payload(|part| { bytes.extend_from_slice(part); Some(()) });
        prop_assert_eq!(payment.payload_hash(), xxh3_64(&bytes).cast_signed());
    }

    #[test]
    fn text_that_moves_between_fields_changes_the_hash(text in "[a-z]{2,40}", at in 1usize..40) {
        prop_assume!(at < text.len());
        let (left, right) = text.split_at(at);
        let split = Payment { comment: Some(left.into()), external_ref_id: Some(right.into()), ..payment() };
        let whole = Payment { comment: Some(text.as_str().into()), external_ref_id: None, ..payment() };
        prop_assert_ne!(split.payload_hash(), whole.payload_hash());
    }

    #[test]
    fn payment_ids_are_uuids_of_version_7_that_carry_the_time(raw in 1u128.., ms in 946_684_800_000i64..4_102_444_800_000) {
        let id_of = |bits| MessageId::parse(&Uuid::from_u128(bits).to_string()).unwrap().id;
        let id = id_of(raw);
        let uuid = payment_id(id, TimestampMs(ms));
        prop_assert_eq!(uuid.get_version_num(), 7);
        prop_assert_eq!(uuid.get_variant(), uuid::Variant::RFC4122);
        prop_assert_eq!((uuid.as_u128() >> 80) as i64, ms);
        prop_assert_ne!(uuid, payment_id(id_of((raw ^ 4) | 2), TimestampMs(ms)));
    }
}
