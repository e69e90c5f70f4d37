use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::*;

fn read(text: &[u8]) -> Result<(), FaultKind> {
    object::<0>(text, |_| None).map(|_| ()).map_err(|f| f.kind)
}

/// The result of serde_json's parser, with the contract's additional rules.
struct Oracle(u32);

impl<'de> DeserializeSeed<'de> for Oracle {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Oracle {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.0 == DEPTH_MAX {
            return Err(A::Error::custom("deep"));
        }
        while seq.next_element_seed(Oracle(self.0 + 1))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.0 == DEPTH_MAX {
            return Err(A::Error::custom("deep"));
        }
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            map.next_value_seed(Oracle(self.0 + 1))?;
            if !names.insert(name) {
                return Err(A::Error::custom("repeated"));
            }
        }
        Ok(())
    }
}

/// `None` if the oracle cannot decide: it converts numbers to floats, and some are too large.
fn oracle(text: &[u8]) -> Option<bool> {
    let is_object = text.iter().find(|c| !b" \t\r\n".contains(c)) == Some(&b'{');
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let result = Oracle(0).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match result {
        Ok(()) => Some(is_object),
        Err(error) if error.to_string().contains("out of range") => None,
        Err(_) => Some(false),
    }
}

/// JSON texts of any structure and notation; some break a rule.
fn texts() -> impl Strategy<Value = String> {
    let space = "[ \t\r\n]{0,2}";
    let string = prop_oneof![
        4 => "\"[ab\u{e9}\u{1d11e}]{0,3}\"",
        2 => "\"[a-c]{0,20}(\\\\[\"\\\\/bfnrtu]|\\\\u[0-9a-fA-F]{4}|\\\\u00e[0-9]|\\\\ud83[4d]\\\\ud[cde]1e){0,2}[a-c]{0,3}\"",
        1 => "\"[^\"\\\\]{0,12}\"",
        1 => "\".{0,6}\"",
    ];
    let number = "-?(0|[1-9][0-9]{0,4})(\\.[0-9]{1,3})?([eE][-+]?[0-9]{1,2})?|-?[0-9.eE+-]{1,5}";
    let leaf = prop_oneof![
        4 => string.clone(),
        4 => number,
        2 => prop_oneof![Just("null"), Just("true"), Just("false"), Just("nul"), Just("True")].prop_map(String::from),
    ];
    let value = leaf.prop_recursive(5, 40, 5, move |inner| {
        let member =
            (space, string.clone(), space, inner.clone()).prop_map(|(a, n, b, v)| format!("{a}{n}{b}:{v}"));
        prop_oneof![
            (space, proptest::collection::vec(inner, 0..4))
                .prop_map(|(s, v)| format!("[{s}{}]", v.join(&format!("{s},")))),
            (space, proptest::collection::vec(member, 0..5))
                .prop_map(|(s, v)| format!("{s}{{{s}{}{s}}}{s}", v.join(","))),
        ]
    });
    value.prop_map(|v| if v.trim_start().starts_with('{') { v } else { format!("{{\"v\":{v}}}") })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn texts_are_judged_as_serde_json_judges_them(text in texts()) {
        if let Some(good) = oracle(text.as_bytes()) {
            prop_assert_eq!(read(text.as_bytes()).is_ok(), good, "{} {:?}", text, read(text.as_bytes()));
        }
    }

    #[test]
    fn damaged_texts_are_judged_as_serde_json_judges_them(
        text in texts(),
        damage in proptest::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), proptest::sample::select(&b"{}[]:,\"\\ue0-.\x00 "[..])], 0..3u8),
            1..3,
        ),
    ) {
        let mut bytes = text.into_bytes();
        for (index, byte, how) in damage {
            let at = index.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.drain(at.min(bytes.len() - 1)..=at.min(bytes.len() - 1))),
            }
            if bytes.is_empty() {
                bytes.push(byte);
            }
        }
        if let Some(good) = oracle(&bytes) {
            prop_assert_eq!(read(&bytes).is_ok(), good, "{} {:?}", String::from_utf8_lossy(&bytes), read(&bytes));
        }
    }

    #[test]
    fn random_bytes_are_judged_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut inside = b"{\"a\":\"".to_vec();
        inside.extend_from_slice(&bytes);
        for bytes in [bytes, inside] {
            if let Some(good) = oracle(&bytes) {
                prop_assert_eq!(read(&bytes).is_ok(), good);
            }
        }
    }

    #[test]
    fn strings_say_what_serde_json_reads(text in ".{0,40}", ascii_only: bool) {
        let mut json = serde_json::to_string(&text).unwrap();
        if ascii_only {
            let escape = |c: char| {
                c.encode_utf16(&mut [0; 2]).iter().map(|u| format!("\\u{u:04X}")).collect::<String>()
            };
            json = json.chars().map(|c| if c.is_ascii() { c.to_string() } else { escape(c) }).collect();
        }
        let document = format!("{{\"x\":{json}}}");
        let [value] = object::<1>(document.as_bytes(), |n| (n == "x").then_some(0)).unwrap();
        prop_assert_eq!(value.and_then(|v| v.string()), Some(text.into()));
    }
}

/// The comparison is meaningful only if both results are frequent.
#[test]
fn the_texts_to_compare_are_a_mix_of_good_and_bad() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let texts = texts();
    let good =
        (0..400).filter(|_| read(texts.new_tree(&mut runner).unwrap().current().as_bytes()).is_ok()).count();
    assert!((100..300).contains(&good), "{good}");
}

#[test]
fn each_rule_has_its_fault() {
    let deepest = format!("{{\"a\":{}{}}}", "[".repeat(31), "]".repeat(31));
    let too_deep = format!("{{\"a\":{}{}}}", "[".repeat(32), "]".repeat(32));
    let too_deep_objects = format!("{}1{}", "{\"a\":".repeat(33), "}".repeat(33));
    let bottomless = "{\"a\":".repeat(100_000);
    let cases: [(&[u8], Result<(), FaultKind>); 32] = [
        (b"{}", Ok(())),
        (b" \t\r\n{ } \n", Ok(())),
        (deepest.as_bytes(), Ok(())),
        (br#"{"a":1,"A":1,"":1}"#, Ok(())),
        (br#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}"#, Ok(())),
        (b"{\"a\":\"\x7f\"}", Ok(())),
        (too_deep.as_bytes(), Err(FaultKind::TooDeep)),
        (too_deep_objects.as_bytes(), Err(FaultKind::TooDeep)),
        (bottomless.as_bytes(), Err(FaultKind::TooDeep)),
        (b"", Err(FaultKind::NotAnObject)),
        (b"[]", Err(FaultKind::NotAnObject)),
        (b"1", Err(FaultKind::NotAnObject)),
        (b"\xEF\xBB\xBF{}", Err(FaultKind::ByteOrderMark)),
        (b"\xFF\xFE{\0}\0", Err(FaultKind::ByteOrderMark)),
        (b"\x0C{}", Err(FaultKind::NotAnObject)),
        (b"{\"a\":\"\xff\"}", Err(FaultKind::NotUtf8)),
        (b"{\"a\":\"\xed\xa0\x80\"}", Err(FaultKind::NotUtf8)),
        (b"{\"a\":\"\xc0\x80\"}", Err(FaultKind::NotUtf8)),
        (b"{} {}", Err(FaultKind::Trailing)),
        (b"{}\0", Err(FaultKind::Trailing)),
        (b"{\"a\":1", Err(FaultKind::Ended)),
        (b"{\"a\":1,}", Err(FaultKind::Unexpected)),
        (b"{'a':1}", Err(FaultKind::Unexpected)),
        (b"{\"a\":NaN}", Err(FaultKind::Unexpected)),
        (b"{\"a\":\"\n\"}", Err(FaultKind::ControlCharacter)),
        (br#"{"a":"\x"}"#, Err(FaultKind::Escape)),
        (br#"{"a":"\u00g0"}"#, Err(FaultKind::Escape)),
        (br#"{"a":"\ude00"}"#, Err(FaultKind::Surrogate)),
        (br#"{"a":"\ud800\n"}"#, Err(FaultKind::Surrogate)),
        (br#"{"a":+1}"#, Err(FaultKind::Unexpected)),
        (br#"{"a":01}"#, Err(FaultKind::Number)),
        (br#"{"a":[{"b":1,"c":2,"\u0062":3}]}"#, Err(FaultKind::RepeatedName)),
    ];
    for (text, expected) in cases {
        assert_eq!(read(text), expected, "{}", String::from_utf8_lossy(&text[..text.len().min(60)]));
    }
}

#[test]
fn numbers_keep_their_text() {
    let text = br#"{"x":-0.10e+99999}"#;
    let [found] = object::<1>(text, |n| (n == "x").then_some(0)).unwrap();
    assert_eq!(found.and_then(|v| v.number()), Some("-0.10e+99999"));
}

/// Long names with a common prefix, short names and escaped names, in one object or in many: a mebibyte of
/// each. Quadratic time would take hours; the deadline only detects that.
#[test]
fn hostile_names_cost_no_more_than_their_size() {
    let object_of = |names: &mut dyn Iterator<Item = String>| {
        format!("{{{}}}", names.map(|n| format!("\"{n}\":0")).collect::<Vec<_>>().join(","))
    };
    let texts = [
        object_of(&mut (0..100_000).map(|i| i.to_string())),
        object_of(&mut (0..100_000).map(|i| format!("\\u0061{i}"))),
        object_of(&mut (0..1_000).map(|i| format!("{}{i}", "a".repeat(1_000)))),
        format!("{{\"a\":[{}]}}", vec![r#"{"a":0,"b":0}"#; 70_000].join(",")),
    ];
    let start = Instant::now();
    for text in &texts {
        assert_eq!(read(text.as_bytes()), Ok(()));
    }
    assert!(start.elapsed().as_secs() < 60);
}
