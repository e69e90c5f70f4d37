//! docs/asyncapi.yaml and docs/schemas name what the program has. `make asyncapi-check` compares them with what it does.

use std::collections::BTreeSet;
use std::fs;

use payment_writer::domain::payment::Currency;
use payment_writer::domain::publication::{REPLACED_HEADERS, REPLAYS_HEADER};
use payment_writer::domain::wire::Reason;
use serde_json::Value;

use super::generated::repository;
use super::settings::defaults;

fn schema(name: &str) -> Value {
    let path = repository().join(format!("docs/schemas/{name}.schema.json"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn texts(list: &Value) -> BTreeSet<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn names(schema: &Value) -> BTreeSet<String> {
    schema["properties"].as_object().unwrap().keys().cloned().collect()
}

#[test]
fn topics_group_and_headers_of_the_asyncapi_document_are_those_of_the_program() {
    let document = fs::read_to_string(repository().join("docs/asyncapi.yaml")).unwrap();
    let defaults = defaults();
    let default = |key: &str| -> String {
        let (_, value) = defaults.iter().find(|(known, _)| known == key).unwrap();
        value.as_str().unwrap().to_owned()
    };
    for (topic, partitions) in [("input", 100), ("read", 20), ("email", 20), ("dead_letter", 20)] {
        let name = default(&format!("kafka.{topic}_topic"));
        for fact in [
            format!("    address: {name}\n"),
            format!("        topic: {name}\n        partitions: {partitions}\n"),
            format!("Setting kafka.{topic}_topic."),
        ] {
            assert!(document.contains(&fact), "{fact}");
        }
    }
    assert!(document.contains(&format!("          const: {}\n", default("kafka.group_id"))));

    let own = |headers: &[&[u8]]| -> BTreeSet<String> {
        headers.iter().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
    };
    let letters = schema("dead-letter-headers");
    assert_eq!(names(&letters), &own(&REPLACED_HEADERS) | &own(&[REPLAYS_HEADER]));
    let events = own(&[b"source", b"correlation-id", b"traceparent"]);
    assert_eq!(names(&schema("event-headers")), events);
}

#[test]
fn reasons_and_currencies_of_the_schemas_are_those_of_the_program() {
    let reasons: BTreeSet<String> = Reason::ALL.iter().map(|reason| reason.as_str().to_owned()).collect();
    assert_eq!(texts(&schema("dead-letter-headers")["properties"]["dlq-reason"]["enum"]), reasons);
    let letters =
        ('A'..='Z').flat_map(|a| ('A'..='Z').flat_map(move |b| ('A'..='Z').map(move |c| [a, b, c])));
    let known: BTreeSet<String> =
        letters.map(String::from_iter).filter(|code| Currency::from_code(code).is_some()).collect();
    for name in ["payment", "read-event", "email-event"] {
        assert_eq!(texts(&schema(name)["properties"]["currency"]["enum"]), known, "{name}");
    }
}
