use proptest::prelude::*;

use super::*;

fn bits(text: &str) -> Option<u128> {
    MessageId::parse(text).ok().map(|p| u128::from_be_bytes(*p.id.as_bytes()))
}

/// Crockford base 32, digit by digit.
fn ulid_text(bits: u128) -> String {
    let alphabet = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    (0..26).rev().map(|i| char::from(alphabet[(bits >> (5 * i)) as usize & 31])).collect()
}

#[test]
fn uuids_of_any_version_and_case_are_read() {
    let expected = 0x0197b2a4_5f0e_7c3a_9d1e_2f4b8c6d7e8f;
    assert_eq!(bits("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f"), Some(expected));
    assert_eq!(bits("0197B2A4-5F0E-7c3a-9D1E-2F4B8C6D7E8F"), Some(expected));
    assert_eq!(bits("00000000-0000-0000-0000-000000000001"), Some(1));
    assert_eq!(bits("ffffffff-ffff-ffff-ffff-ffffffffffff"), Some(u128::MAX));
}

#[test]
fn ulids_of_any_case_are_read() {
    let parsed = MessageId::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap();
    assert_eq!(parsed, MessageId::parse("01arz3ndektsv4rrffq69g5fav").unwrap());
    // The ULID specification's example: its time is the first ten digits.
    assert_eq!(parsed.embedded_time, Some(TimestampMs(1_469_922_850_259)));
    assert_eq!(bits("7ZZZZZZZZZZZZZZZZZZZZZZZZZ"), Some(u128::MAX));
}

#[test]
fn other_forms_are_refused() {
    for text in [
        "",
        "0197b2a45f0e7c3a9d1e2f4b8c6d7e8f",
        "{0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f}",
        "urn:uuid:0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f",
        "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8g",
        "0197b2a45-f0e-7c3a-9d1e-2f4b8c6d7e8f",
        "0197b2a4-5f0e-7c3a-9d1e_2f4b8c6d7e8f",
        "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8é",
        "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
        "01ARZ3NDEKTSV4RRFFQ69G5FA",
        "01ARZ3NDEKTSV4RRFFQ69G5FAVX",
        "01ARZ3NDEKTSV4RRFFQ69G5FAI",
        "01ARZ3NDEKTSV4RRFFQ69G5FAL",
        "01ARZ3NDEKTSV4RRFFQ69G5FAO",
        "01ARZ3NDEKTSV4RRFFQ69G5FAU",
        "01ARZ3NDEKTSV4RRFFQ69G5FA ",
        "l1ARZ3NDEKTSV4RRFFQ69G5FAV",
        "-0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8",
        "01ARZ3NDEKTSV4RRFFQ69G5FÄ",
    ] {
        assert_eq!(MessageId::parse(text), Err(MessageIdFault::Form), "{text}");
    }
    for text in ["00000000-0000-0000-0000-000000000000", "00000000000000000000000000"] {
        assert_eq!(MessageId::parse(text), Err(MessageIdFault::Nil), "{text}");
    }
}

#[test]
fn only_version_7_of_variant_10_and_ulids_carry_a_time() {
    let time = |text| MessageId::parse(text).unwrap().embedded_time;
    assert_eq!(time("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f"), Some(TimestampMs(0x0197_b2a4_5f0e)));
    assert_eq!(time("0197b2a4-5f0e-7c3a-bd1e-2f4b8c6d7e8f"), Some(TimestampMs(0x0197_b2a4_5f0e)));
    assert_eq!(time("0197b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e8f"), None);
    assert_eq!(time("0197b2a4-5f0e-7c3a-1d1e-2f4b8c6d7e8f"), None);
    assert_eq!(time("0197b2a4-5f0e-7c3a-cd1e-2f4b8c6d7e8f"), None);
}

proptest! {
    #[test]
    fn the_same_bits_in_either_form_are_one_id(raw in 1u128.., lower: bool) {
        let uuid = Uuid::from_u128(raw).to_string();
        let ulid = if lower { ulid_text(raw).to_lowercase() } else { ulid_text(raw) };
        let (uuid, ulid) = (MessageId::parse(&uuid).unwrap(), MessageId::parse(&ulid).unwrap());
        prop_assert_eq!(uuid.id, ulid.id);
        prop_assert_eq!(uuid.id.to_uuid().as_u128(), raw);
        prop_assert_eq!(ulid.embedded_time, Some(TimestampMs((raw >> 80) as i64)));
    }

    #[test]
    fn uuids_are_read_as_the_uuid_crate_reads_them(text in "[0-9a-fA-Fg]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F-]{12}") {
        let oracle = Uuid::try_parse(&text).ok().map(|u| u.as_u128());
        prop_assert_eq!(bits(&text), oracle);
    }

    #[test]
    fn any_text_is_read_or_refused_without_a_panic(text in ".{26}|.{36}|[0-9A-Z]{26}") {
        let _ = MessageId::parse(&text);
    }
}
