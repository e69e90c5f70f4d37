//! Cost of one message from input bytes to output bytes. Inputs are fixed; times are per message.
#![allow(missing_docs)]

#[path = "../src/allocator.rs"]
mod allocator;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use payment_writer::domain::record::{Offset, Partition, RecordView, SourceBatch, TimestampMs};
use payment_writer::domain::wire::{EventTexts, Rules, encode_email_event, encode_read_event, parse};

/// 163 bytes, like most messages.
const PLAIN: &str = r#"{"messageId":"0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f","amount":123131.21,"status":2,"currency":"EUR","custId":4711,"type":"BWI","comment":"Creating BWI trn in EUR"}"#;
/// A UUID without a time, an amount in quotes, escapes, a comment that is not ASCII, unknown fields.
const RICH: &str = r#"{ "messageId": "3b241101-e2bb-4255-8caf-4136c566a962", "custId": 4711, "amount": "1.05E1", "currency": "KWD", "status": -2, "type": "VSA", "comment": "R\u00fcckzahlung \"März\" – Teil 2", "externalRefId": "ref-2025-06-27/0001", "trace": {"id": [1, 2.5e3, null, true], "hop": "a"}, "origin": "web" }"#;
/// The fields of the first message, with one of them given twice.
const REFUSED: &str = r#"{"messageId":"0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f","amount":123131.21,"status":2,"currency":"EUR","custId":4711,"type":"BWI","amount":5}"#;

fn batch(value: &str) -> SourceBatch {
    let mut batch = SourceBatch::new();
    let headers: [(&[u8], Option<&[u8]>); 1] = [(b"schema-version", Some(b"1"))];
    let timestamp = Some(TimestampMs(1_751_050_608_500));
    batch.push(Partition(3), Offset(42), timestamp, Some(b"4711"), Some(value.as_bytes()), headers);
    batch
}

/// All steps of parsing and encoding a message.
fn transform(record: &RecordView<'_>, rules: &Rules, out: &mut Vec<u8>) -> i64 {
    let Ok(payment) = parse(record, rules) else { return 0 };
    let payment_id = payment.payment_id();
    let texts = EventTexts::of(&payment, payment_id);
    encode_read_event(&payment, &texts, out);
    if rules.sends_email(payment.status) {
        encode_email_event(&payment, &texts, out);
    }
    payment.payload_hash()
}

fn wire(c: &mut Criterion) {
    let rules = Rules::default();
    let mut group = c.benchmark_group("wire");
    group.throughput(Throughput::Elements(1));
    for (name, text, valid) in [("plain", PLAIN, true), ("rich", RICH, true), ("refused", REFUSED, false)] {
        let batch = batch(text);
        let Some(record) = batch.get(0) else { continue };
        assert_eq!(parse(&record, &rules).is_ok(), valid, "{name}");
        group.bench_function(format!("parse/{name}"), |b| {
            b.iter(|| parse(black_box(&record), &rules).is_ok())
        });
        let mut out = Vec::with_capacity(4_096);
        if let Ok(payment) = parse(&record, &rules) {
            let id = payment.payment_id();
            group.bench_function(format!("read event/{name}"), |b| {
                b.iter(|| {
                    out.clear();
                    encode_read_event(black_box(&payment), &EventTexts::of(&payment, id), &mut out);
                    out.len()
                });
            });
            group.bench_function(format!("e-mail event/{name}"), |b| {
                b.iter(|| {
                    out.clear();
                    encode_email_event(black_box(&payment), &EventTexts::of(&payment, id), &mut out);
                    out.len()
                });
            });
        }
        group.bench_function(format!("parse, hash, id and events/{name}"), |b| {
            b.iter(|| {
                out.clear();
                transform(black_box(&record), &rules, &mut out)
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().nresamples(10_000);
    targets = wire
}
criterion_main!(benches);
