//! Compares events and dead letters with their records.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::contract::{Reason, plain_amount, written_id};
use super::{Checker, Output, Seen, copied_headers, hash, value_hash};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ReadEvent<'m> {
    message_id: String,
    id: String,
    created_at: String,
    updated_at: String,
    #[serde(borrow)]
    amount: &'m RawValue,
    status: i8,
    currency: String,
    cust_id: i64,
    r#type: String,
    comment: Option<String>,
    version: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EmailEvent<'m> {
    id: String,
    message_id: String,
    cust_id: i64,
    #[serde(borrow)]
    amount: &'m RawValue,
    currency: String,
    r#type: String,
    created_at: String,
}

fn timestamp_text(timestamp_ms: i64) -> String {
    let timestamp = jiff::Timestamp::from_millisecond(timestamp_ms).unwrap();
    timestamp.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

fn read_fingerprint(message: &Seen<'_>) -> Option<u64> {
    let event: ReadEvent<'_> = serde_json::from_slice(message.value?).ok()?;
    let created_at_ms = event.created_at.parse::<jiff::Timestamp>().ok()?.as_millisecond();
    if timestamp_text(created_at_ms) != event.created_at
        || event.updated_at != event.created_at
        || event.version != 1
    {
        return None;
    }
    let amount = plain_amount(event.amount, &event.currency)?;
    let (id, text, currency, kind) =
        (written_id(&event.id)?, &event.message_id, &event.currency, &event.r#type);
    let common = hash((id, text, event.cust_id, amount, currency, kind, created_at_ms));
    Some(hash((common, event.status, event.comment)))
}

fn email_fingerprint(message: &Seen<'_>) -> Option<u64> {
    let event: EmailEvent<'_> = serde_json::from_slice(message.value?).ok()?;
    let created_at_ms = event.created_at.parse::<jiff::Timestamp>().ok()?.as_millisecond();
    if timestamp_text(created_at_ms) != event.created_at {
        return None;
    }
    let amount = plain_amount(event.amount, &event.currency)?;
    let (id, text, currency, kind) =
        (written_id(&event.id)?, &event.message_id, &event.currency, &event.r#type);
    Some(hash((id, text, event.cust_id, amount, currency, kind, created_at_ms)))
}

impl Checker {
    /// The record that an output names as its source, and the fields that both must have in common.
    fn source(&mut self, topic: &str, message: &Seen<'_>) -> Option<(i32, i64)> {
        let place = format!("{topic}/{}/{}", message.partition, message.offset);
        let sources: Vec<_> =
            message.headers.iter().filter(|(name, _)| *name == "source").map(|(_, value)| *value).collect();
        let [Some(source)] = sources[..] else {
            self.wrong(format!("{place}: {} source headers", sources.len()));
            return None;
        };
        let source = String::from_utf8_lossy(source).into_owned();
        let mut parts = source.split('/');
        let (prefix, partition, offset) = (parts.next(), parts.next(), parts.next());
        let (Some(partition), Some(offset)) =
            (partition.and_then(|p| p.parse().ok()), offset.and_then(|o| o.parse().ok()))
        else {
            self.wrong(format!("{place}: unreadable source {source}"));
            return None;
        };
        if prefix != Some(&self.topic_id_prefix) || parts.next().is_some() {
            self.wrong(format!(
                "{place}: source {source} belongs to another topic than {}",
                self.topic_id_prefix
            ));
        }
        let copied = copied_headers(message);
        let Some(record) = self.record(partition, offset) else {
            self.wrong(format!("{place}: source {source} is not in the input"));
            return None;
        };
        if record.copied_headers != copied {
            self.wrong(format!("{place}: correlation-id or traceparent differ from those of {source}"));
        }
        Some((partition, offset))
    }

    /// Compares a record of an output topic with the record that it names as its source.
    pub fn add_output(&mut self, output: Output, topic: &str, message: &Seen<'_>) {
        let Some((partition, offset)) = self.source(topic, message) else { return };
        match output {
            Output::DeadLetter => self.add_dead_letter(message, partition, offset),
            Output::Read | Output::Email => self.add_event(output, topic, message, partition, offset),
        }
    }

    fn add_event(&mut self, output: Output, topic: &str, message: &Seen<'_>, partition: i32, offset: i64) {
        let is_email = output == Output::Email;
        let fingerprint = if is_email { email_fingerprint(message) } else { read_fingerprint(message) };
        let record = self.record(partition, offset).unwrap();
        let expected = if is_email { record.email_event } else { Some(record.read_event) };
        let same = fingerprint.is_some() && fingerprint == expected;
        let same = same && message.key == Some(record.cust_id.to_string().as_bytes());
        let found = if is_email { &mut record.found.email_events } else { &mut record.found.read_events };
        *found = found.saturating_add(1);
        let cust_id = record.cust_id;
        if !same {
            self.wrong(format!("{topic}: the event of {partition}/{offset} differs from its record"));
        }
        // Events of an account are in the order of its records; offsets are compared within a partition.
        let earlier = self.latest.insert((output, cust_id, partition), offset);
        if earlier.is_some_and(|earlier| earlier >= offset) {
            self.wrong(format!(
                "{topic}: the event of {partition}/{offset} follows the event of a later record"
            ));
        }
    }

    fn add_dead_letter(&mut self, message: &Seen<'_>, partition: i32, offset: i64) {
        let named: HashMap<&str, String> = message
            .headers
            .iter()
            .filter_map(|(name, value)| Some((*name, String::from_utf8_lossy((*value)?).into_owned())))
            .collect();
        let is = |name, value: &str| named.get(name).is_some_and(|found| found == value);
        let (key, mut value) = (hash(message.key), value_hash(message.value));
        if let Some(digest) = named.get("dlq-value-sha256") {
            value = digest.get(..16).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or_default();
        }
        let input_topic = self.input_topic.clone();
        let record = self.record(partition, offset).unwrap();
        record.found.dead_letters = record.found.dead_letters.saturating_add(1);
        record.found.reason = named.get("dlq-reason").and_then(|reason| Reason::parse(reason));
        let same = record.key == key && record.value == value;
        let placed = is("dlq-topic", &input_topic)
            && is("dlq-partition", &partition.to_string())
            && is("dlq-offset", &offset.to_string())
            && is("dlq-timestamp", &record.timestamp_ms.to_string())
            && named.contains_key("dlq-detail");
        if !same {
            self.wrong(format!(
                "the dead letter of {partition}/{offset} does not have its record's key and value"
            ));
        }
        if !placed {
            self.wrong(format!("the dead letter of {partition}/{offset} has wrong headers: {named:?}"));
        }
    }
}
