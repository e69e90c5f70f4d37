//! Independent check that every record of the input topic had exactly one outcome.
//!
//! Reads the whole input topic, the three outputs and the tables, as any other system would, and shares no
//! code with the daemon: it has its own implementation of the rules that decide each record's outcome. Prints
//! counts and samples; reports what is wrong, and then exits with 1.
//!
//! It needs about 150 bytes of memory a record.
// The auditor panics on what it cannot interpret.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// It shares no code with the daemon.
#![allow(clippy::disallowed_methods)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::TryStreamExt;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Time limit for open transactions: longer than the transaction timeout of a crashed producer.
const MARKERS_MAX: Duration = Duration::from_secs(20);
const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);
const OFFENDERS_SHOWN_MAX: usize = 20;

/// Checks that every record of the input topic had exactly one outcome.
#[derive(Parser)]
struct Arguments {
    /// Kafka's bootstrap servers
    #[arg(long)]
    kafka: String,
    /// The database, e.g. postgres://user:password@host:port/database
    #[arg(long)]
    postgres_url: String,
    #[arg(long, default_value = "payment_writer_topic")]
    input_topic: String,
    #[arg(long, default_value = "payment_read_topic")]
    read_topic: String,
    #[arg(long, default_value = "payment_email")]
    email_topic: String,
    #[arg(long, default_value = "payment_writer_topic.dlq")]
    dead_letter_topic: String,
    /// The value of `payment.types`
    #[arg(long, value_delimiter = ',', default_value = "BWI,VSA,MSC")]
    types: Vec<String>,
    /// The value of `email.statuses`
    #[arg(long, value_delimiter = ',', default_value = "2", allow_negative_numbers = true)]
    email_statuses: Vec<i8>,
    /// The value of `payment.max_bytes`
    #[arg(long, default_value_t = 16 * 1024)]
    max_bytes: usize,
    /// The value of `idempotency.window`, in hours
    #[arg(long, default_value_t = 7 * 24)]
    window_hours: i64,
    /// Print no samples
    #[arg(long)]
    quiet: bool,
    /// A report that `produce --report` wrote: all records that it sent must exist, with the outcomes it
    /// expects
    #[arg(long, value_name = "FILE")]
    report: Option<std::path::PathBuf>,
}

/// The outcomes that `produce` expects for what it sent.
#[derive(Deserialize)]
struct Report {
    records: u64,
    undelivered: u64,
    expected: Expected,
}

#[derive(Deserialize)]
struct Expected {
    written: u64,
    read_events: u64,
    email_events: u64,
    duplicates: u64,
    dead_letters_by_reason: BTreeMap<String, u64>,
}

impl Report {
    fn read(path: &std::path::Path) -> Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Expected numbers, with the names of the auditor's own.
    fn numbers(&self) -> BTreeMap<String, u64> {
        let expected = &self.expected;
        let mut numbers: BTreeMap<String, u64> = [
            ("records", self.records - self.undelivered),
            ("written", expected.written),
            ("duplicate", expected.duplicates),
            ("read events", expected.read_events),
            ("e-mail events", expected.email_events),
        ]
        .map(|(name, number)| (name.to_owned(), number))
        .into();
        for (reason, number) in &expected.dead_letters_by_reason {
            numbers.insert(format!("dead letter: {reason}"), *number);
        }
        numbers.retain(|_, number| *number > 0);
        numbers
    }
}

// ---- What a record is ---------------------------------------------------------------------------------------

/// Reasons for a dead letter, in the order in which they are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    EmptyValue,
    TooLarge,
    UnsupportedSchemaVersion,
    MalformedJson,
    MissingField,
    InvalidField,
    KeyMismatch,
    InvalidTimestamp,
    StaleMessageId,
    MessageIdConflict,
    RejectedByDatabase,
}

impl Reason {
    const ALL: [(Reason, &str); 11] = [
        (Reason::EmptyValue, "empty_value"),
        (Reason::TooLarge, "too_large"),
        (Reason::UnsupportedSchemaVersion, "unsupported_schema_version"),
        (Reason::MalformedJson, "malformed_json"),
        (Reason::MissingField, "missing_field"),
        (Reason::InvalidField, "invalid_field"),
        (Reason::KeyMismatch, "key_mismatch"),
        (Reason::InvalidTimestamp, "invalid_timestamp"),
        (Reason::StaleMessageId, "stale_message_id"),
        (Reason::MessageIdConflict, "message_id_conflict"),
        (Reason::RejectedByDatabase, "rejected_by_database"),
    ];

    fn parse(text: &str) -> Option<Reason> {
        Reason::ALL.iter().find(|(_, name)| *name == text).map(|(reason, _)| *reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Reason::ALL.iter().find(|(reason, _)| reason == self).unwrap().1)
    }
}

/// A valid payment, with the fields of its message. Amounts are in ten-thousandths; no currency has more
/// decimals.
struct Payment {
    message_id: u128,
    message_id_text: String,
    cust_id: i64,
    amount: i64,
    currency: String,
    status: i8,
    kind: String,
    comment: Option<String>,
    external_ref_id: Option<String>,
}

/// What is kept of a record: enough to recognise its outputs and rows, mostly as hashes.
struct Record {
    offset: i64,
    /// `None` if it is valid by itself.
    refused: Option<Reason>,
    timestamp_ms: i64,
    message_id: u128,
    payment_id: u128,
    cust_id: i64,
    payload: u64,
    core: u64,
    notes: Option<u64>,
    read_event: u64,
    /// `None` if its status causes no e-mail event.
    email_event: Option<u64>,
    key: u64,
    value: u64,
    copied_headers: u64,
    found: Found,
}

/// How often each output or row of a record was found.
#[derive(Default)]
struct Found {
    metadata: u8,
    core: u8,
    notes: u8,
    idempotency: u8,
    read_events: u8,
    email_events: u8,
    dead_letters: u8,
    reason: Option<Reason>,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The leading bits of the SHA-256 that dead letters of large values have instead of the value.
fn value_hash(value: Option<&[u8]>) -> u64 {
    u64::from_be_bytes(Sha256::digest(value.unwrap_or_default())[..8].try_into().unwrap())
}

/// The headers that are copied to every output of a record.
fn copied_headers(message: &BorrowedMessage<'_>) -> u64 {
    let copied: Vec<_> =
        headers(message).filter(|(name, _)| ["correlation-id", "traceparent"].contains(name)).collect();
    hash(copied)
}

fn headers<'m>(message: &'m BorrowedMessage<'_>) -> impl Iterator<Item = (&'m str, Option<&'m [u8]>)> {
    message.headers().into_iter().flat_map(|headers| headers.iter().map(|header| (header.key, header.value)))
}

fn timestamp_text(timestamp_ms: i64) -> String {
    let timestamp = jiff::Timestamp::from_millisecond(timestamp_ms).unwrap();
    timestamp.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// UUIDv7 from the record's time and 74 bits of the hash of the message id.
fn payment_id(timestamp_ms: i64, message_id: u128) -> u128 {
    let hash = xxhash_rust::xxh3::xxh3_128(&message_id.to_be_bytes());
    let time = u128::try_from(timestamp_ms).unwrap() << 80;
    let rand_a = hash >> 116;
    let rand_b = (hash >> 54) & ((1 << 62) - 1);
    time | 7 << 76 | rand_a << 64 | 2 << 62 | rand_b
}

// ---- What must become of it ---------------------------------------------------------------------------------

/// The members of an object, as text; an error if a name is repeated.
struct Members<'m>(HashMap<String, &'m RawValue>);

impl<'m> Deserialize<'m> for Members<'m> {
    fn deserialize<D: Deserializer<'m>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Each;
        impl<'m> Visitor<'m> for Each {
            type Value = Members<'m>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object without repeated names")
            }

            fn visit_map<A: MapAccess<'m>>(self, mut map: A) -> std::result::Result<Members<'m>, A::Error> {
                let mut members = HashMap::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    if members.insert(name, value).is_some() {
                        return Err(serde::de::Error::custom("repeated name"));
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

fn is_strict_json(text: &str, level: u32) -> bool {
    match text.as_bytes()[0] {
        b'{' if level > 32 => false,
        b'[' if level > 32 => false,
        b'{' => serde_json::from_str::<Members<'_>>(text)
            .is_ok_and(|members| members.0.values().all(|value| is_strict_json(value.get(), level + 1))),
        b'[' => serde_json::from_str::<Vec<&RawValue>>(text)
            .is_ok_and(|values| values.iter().all(|value| is_strict_json(value.get(), level + 1))),
        // Parsing the text, unlike skipping it, detects lone surrogates.
        b'"' => serde_json::from_str::<String>(text).is_ok(),
        _ => true,
    }
}

fn minor_unit(currency: &str) -> Option<u32> {
    const TWO: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD \
        CDF CHE CHF CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD \
        HKD HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP \
        MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR \
        SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES \
        WST XAD XCD XCG YER ZAR ZMW ZWG";
    const NONE: &str = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF";
    const THREE: &str = "BHD IQD JOD KWD LYD OMR TND";
    const FOUR: &str = "CLF UYW";
    let listed = |list: &str| list.split_whitespace().any(|code| code == currency);
    [(NONE, 0), (TWO, 2), (THREE, 3), (FOUR, 4)]
        .into_iter()
        .find(|(list, _)| listed(list))
        .map(|(_, unit)| unit)
}

/// The value of a JSON number in ten-thousandths; `None` if it breaks a rule for amounts.
fn amount(text: &str, minor_unit: u32) -> Option<i64> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent),
        None => (text, "0"),
    };
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits: String = [integer, fraction].concat();
    let significant = digits.trim_start_matches('0');
    if text.starts_with('-') || significant.is_empty() {
        return None;
    }
    // An exponent that does not fit is out of range for any digits that fit into a message.
    let exponent: i64 = exponent.parse().ok()?;
    let fraction_digits = i64::try_from(fraction.len()).ok()?.checked_sub(exponent)?;
    let trimmed = significant.trim_end_matches('0');
    let zeros = i64::try_from(significant.len() - trimmed.len()).ok()?;
    // The value is `trimmed` times ten to the power of -scale.
    let scale = fraction_digits.checked_sub(zeros)?;
    let integer_digits = i64::try_from(trimmed.len()).ok()?.checked_sub(scale)?;
    if scale > i64::from(minor_unit) || integer_digits > 14 {
        return None;
    }
    let power = u32::try_from(4 - scale).ok()?;
    trimmed.parse::<i64>().ok()?.checked_mul(10_i64.checked_pow(power)?)
}

/// True if the whole text is a number in JSON's grammar.
fn is_json_number(text: &str) -> bool {
    let plain = text.bytes().next().is_some_and(|byte| byte == b'-' || byte.is_ascii_digit())
        && text.bytes().last().is_some_and(|byte| byte.is_ascii_digit());
    plain && serde_json::from_str::<&RawValue>(text).is_ok()
}

fn integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) && text != "-0";
    if plain { text.parse().ok() } else { None }
}

/// The 128 bits of a message id, and its time if it has one.
fn message_id(text: &str) -> Option<(u128, Option<i64>)> {
    let (id, timed) = if text.len() == 36 {
        let hyphen = |at| [8, 13, 18, 23].contains(&at);
        let fits = |(at, byte): (usize, u8)| if hyphen(at) { byte == b'-' } else { byte.is_ascii_hexdigit() };
        let id = text
            .bytes()
            .enumerate()
            .all(fits)
            .then(|| u128::from_str_radix(&text.replace('-', ""), 16).ok())??;
        (id, id >> 76 & 0xF == 7 && id >> 62 & 3 == 2)
    } else if text.len() == 26 {
        let mut id: u128 = 0;
        for byte in text.to_ascii_uppercase().bytes() {
            let digit = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ".iter().position(|&known| known == byte)?;
            id = if id >> 123 == 0 { id << 5 } else { return None } | u128::try_from(digit).unwrap();
        }
        (id, true)
    } else {
        return None;
    };
    (id != 0).then(|| (id, timed.then(|| i64::try_from(id >> 80).unwrap())))
}

fn optional_text(value: Option<&&RawValue>, chars_max: usize) -> std::result::Result<Option<String>, Reason> {
    let Some(value) = value else { return Ok(None) };
    let text: Option<String> = serde_json::from_str(value.get()).map_err(|_| Reason::InvalidField)?;
    match text {
        Some(text) if text.chars().count() > chars_max || text.contains('\0') => Err(Reason::InvalidField),
        text => Ok(text.filter(|text| !text.is_empty())),
    }
}

fn judge(message: &BorrowedMessage<'_>, rules: &Arguments) -> std::result::Result<Payment, Reason> {
    let value = message.payload().unwrap_or_default();
    if value.is_empty() {
        return Err(Reason::EmptyValue);
    }
    if value.len() > rules.max_bytes {
        return Err(Reason::TooLarge);
    }
    if headers(message).any(|(name, version)| name == "schema-version" && version != Some(b"1")) {
        return Err(Reason::UnsupportedSchemaVersion);
    }
    let text = std::str::from_utf8(value).map_err(|_| Reason::MalformedJson)?;
    let whole: &RawValue = serde_json::from_str(text).map_err(|_| Reason::MalformedJson)?;
    if !whole.get().starts_with('{') || !is_strict_json(whole.get(), 1) {
        return Err(Reason::MalformedJson);
    }
    let Members(members) = serde_json::from_str(whole.get()).map_err(|_| Reason::MalformedJson)?;
    for name in ["messageId", "custId", "amount", "currency", "status", "type"] {
        if members.get(name).is_none_or(|value| value.get() == "null") {
            return Err(Reason::MissingField);
        }
    }
    let text_of =
        |name| serde_json::from_str::<String>(members[name].get()).map_err(|_| Reason::InvalidField);
    let message_id_text = text_of("messageId")?;
    let (message_id, id_time_ms) = message_id(&message_id_text).ok_or(Reason::InvalidField)?;
    let cust_id = integer(members["custId"].get()).filter(|&id| id >= 0).ok_or(Reason::InvalidField)?;
    let status =
        integer(members["status"].get()).filter(|s| [2, 0, -2].contains(s)).ok_or(Reason::InvalidField)?;
    let kind = text_of("type")?;
    let currency = text_of("currency")?;
    let minor_unit = minor_unit(&currency).ok_or(Reason::InvalidField)?;
    let amount_text = members["amount"].get();
    let amount_text = if amount_text.starts_with('"') { text_of("amount")? } else { amount_text.to_owned() };
    if !is_json_number(&amount_text) || !rules.types.contains(&kind) {
        return Err(Reason::InvalidField);
    }
    let amount = amount(&amount_text, minor_unit).ok_or(Reason::InvalidField)?;
    let comment = optional_text(members.get("comment"), 1000)?;
    let external_ref_id = optional_text(members.get("externalRefId"), 64)?;
    if message.key() != Some(cust_id.to_string().as_bytes()) {
        return Err(Reason::KeyMismatch);
    }
    const YEAR_2000_MS: i64 = 946_684_800_000;
    const YEAR_2100_MS: i64 = 4_102_444_800_000;
    let timestamp_ms = message.timestamp().to_millis().unwrap_or(-1);
    if !(YEAR_2000_MS..YEAR_2100_MS).contains(&timestamp_ms) {
        return Err(Reason::InvalidTimestamp);
    }
    const HOUR_MS: i64 = 3_600_000;
    if let Some(id_time_ms) = id_time_ms
        && (id_time_ms < timestamp_ms - rules.window_hours * HOUR_MS || id_time_ms > timestamp_ms + HOUR_MS)
    {
        return Err(Reason::StaleMessageId);
    }
    let status = i8::try_from(status).unwrap();
    Ok(Payment {
        message_id,
        message_id_text,
        cust_id,
        amount,
        currency,
        status,
        kind,
        comment,
        external_ref_id,
    })
}

impl Record {
    fn of(message: &BorrowedMessage<'_>, rules: &Arguments) -> Record {
        let timestamp_ms = message.timestamp().to_millis().unwrap_or(-1);
        let judged = judge(message, rules);
        let mut record = Record {
            offset: message.offset(),
            refused: judged.as_ref().err().copied(),
            timestamp_ms,
            message_id: 0,
            payment_id: 0,
            cust_id: 0,
            payload: 0,
            core: 0,
            notes: None,
            read_event: 0,
            email_event: None,
            key: hash(message.key()),
            value: value_hash(message.payload()),
            copied_headers: copied_headers(message),
            found: Found::default(),
        };
        if let Ok(payment) = judged {
            let Payment { message_id, cust_id, amount, currency, status, kind, .. } = &payment;
            let text = payment.message_id_text.as_str();
            record.message_id = *message_id;
            record.cust_id = *cust_id;
            record.payment_id = payment_id(timestamp_ms, *message_id);
            let (comment, reference) = (payment.comment.as_deref(), payment.external_ref_id.as_deref());
            record.payload = hash((cust_id, amount, currency, status, kind, comment, reference));
            record.core = hash((timestamp_ms, cust_id, amount, currency.as_str(), status, kind.as_str()));
            record.notes =
                (comment.is_some() || reference.is_some()).then(|| hash((timestamp_ms, reference, comment)));
            let common = hash((
                record.payment_id,
                text,
                cust_id,
                amount,
                currency.as_str(),
                kind.as_str(),
                timestamp_ms,
            ));
            record.read_event = hash((common, status, comment));
            record.email_event = rules.email_statuses.contains(status).then_some(common);
        }
        record
    }
}

// ---- Kafka --------------------------------------------------------------------------------------------------

/// Passes every committed record of a topic to `each`, and returns the partitions' end offsets.
fn read_topic(kafka: &str, topic: &str, mut each: impl FnMut(&BorrowedMessage<'_>)) -> Result<Vec<i64>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "payment-writer-audit")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "50")
        .set("fetch.queue.backoff.ms", "20")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), KAFKA_TIMEOUT)?;
    let partitions = metadata.topics()[0].partitions().len();
    if partitions == 0 {
        return Err(format!("topic {topic} does not exist").into());
    }
    let mut assignment = TopicPartitionList::new();
    let mut ends = Vec::new();
    let uncommitted: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "payment-writer-audit")
        .set("isolation.level", "read_uncommitted")
        .create()?;
    let deadline = Instant::now() + MARKERS_MAX;
    for partition in 0..i32::try_from(partitions)? {
        // Before fetching starts: these requests would wait behind a long-polling fetch.
        let end = loop {
            let (_, end) = consumer.fetch_watermarks(topic, partition, KAFKA_TIMEOUT)?;
            let (_, written) = uncommitted.fetch_watermarks(topic, partition, KAFKA_TIMEOUT)?;
            if end >= written || Instant::now() > deadline {
                break end;
            }
            // The broker answers a commit before the transaction's control records are in the partitions.
            std::thread::sleep(Duration::from_millis(20));
        };
        ends.push(end);
        assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&assignment)?;
    let mut at_end = vec![false; partitions];
    while at_end.contains(&false) {
        match consumer.poll(KAFKA_TIMEOUT) {
            None => return Err(format!("topic {topic}: no data for {KAFKA_TIMEOUT:?}").into()),
            Some(Ok(message)) => each(&message),
            Some(Err(KafkaError::PartitionEOF(partition))) => at_end[usize::try_from(partition)?] = true,
            Some(Err(error)) => return Err(format!("reading topic {topic}: {error}").into()),
        }
    }
    Ok(ends)
}

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

/// A payment id in Postgres's notation.
fn written_id(text: &str) -> Option<u128> {
    let id = Uuid::parse_str(text).ok()?;
    (id.to_string() == text).then(|| id.as_u128())
}

/// A plain number with at most as many decimals as its currency has; in ten-thousandths.
fn plain_amount(raw: &RawValue, currency: &str) -> Option<i64> {
    let text = raw.get();
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    plain.then(|| amount(text, minor_unit(currency)?))?
}

// ---- The audit ----------------------------------------------------------------------------------------------

#[derive(Default)]
struct Audit {
    partitions: Vec<Vec<Record>>,
    wrong_count: usize,
    lost_count: usize,
    topic_id_prefix: String,
    samples: Vec<(String, String)>,
}

impl Audit {
    fn wrong(&mut self, what: impl fmt::Display) {
        self.wrong_count += 1;
        if self.wrong_count <= OFFENDERS_SHOWN_MAX {
            println!("WRONG: {what}");
        }
    }

    fn record(&mut self, partition: i32, offset: i64) -> Option<&mut Record> {
        let records = self.partitions.get_mut(usize::try_from(partition).ok()?)?;
        let at = records.binary_search_by_key(&offset, |record| record.offset).ok()?;
        records.get_mut(at)
    }

    fn read_input(&mut self, arguments: &Arguments) -> Result<Vec<i64>> {
        let partitions = &mut self.partitions;
        read_topic(&arguments.kafka, &arguments.input_topic, |message| {
            let partition = usize::try_from(message.partition()).unwrap();
            if partitions.len() <= partition {
                partitions.resize_with(partition + 1, Vec::new);
            }
            partitions[partition].push(Record::of(message, arguments));
        })
    }

    /// The record that an output names as its source, and the fields that both must have in common.
    fn source(&mut self, topic: &str, message: &BorrowedMessage<'_>) -> Option<(i32, i64)> {
        let place = format!("{topic}/{}/{}", message.partition(), message.offset());
        let sources: Vec<_> =
            headers(message).filter(|(name, _)| *name == "source").map(|(_, value)| value).collect();
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

    fn sample(&mut self, title: &str, message: &BorrowedMessage<'_>) {
        if self.samples.iter().any(|(known, _)| known == title) {
            return;
        }
        let text =
            |bytes: Option<&[u8]>| bytes.map_or("null".into(), |b| String::from_utf8_lossy(b).into_owned());
        let mut shown = format!("key {}", text(message.key()));
        for (name, value) in headers(message) {
            shown += &format!("\n{name}: {}", text(value));
        }
        shown += &format!("\n{}", text(message.payload()));
        self.samples.push((title.to_owned(), shown));
    }

    fn read_outputs(&mut self, arguments: &Arguments) -> Result<()> {
        let kafka = &arguments.kafka;
        for (topic, is_email) in [(&arguments.read_topic, false), (&arguments.email_topic, true)] {
            // Events of an account are in the order of its records; offsets are compared within a partition.
            let mut latest: HashMap<(i64, i32), i64> = HashMap::new();
            read_topic(kafka, topic, |message| {
                self.sample(if is_email { "an e-mail event" } else { "a read event" }, message);
                let Some((partition, offset)) = self.source(topic, message) else { return };
                let fingerprint =
                    if is_email { email_fingerprint(message) } else { read_fingerprint(message) };
                let record = self.record(partition, offset).unwrap();
                let expected = if is_email { record.email_event } else { Some(record.read_event) };
                let same = fingerprint.is_some() && fingerprint == expected;
                let same = same && message.key() == Some(record.cust_id.to_string().as_bytes());
                let found =
                    if is_email { &mut record.found.email_events } else { &mut record.found.read_events };
                *found = found.saturating_add(1);
                let cust_id = record.cust_id;
                if !same {
                    self.wrong(format!("{topic}: the event of {partition}/{offset} differs from its record"));
                }
                if latest.insert((cust_id, partition), offset).is_some_and(|earlier| earlier >= offset) {
                    self.wrong(format!(
                        "{topic}: the event of {partition}/{offset} follows the event of a later record"
                    ));
                }
            })?;
        }
        read_topic(kafka, &arguments.dead_letter_topic, |message| {
            self.sample("a dead letter", message);
            let Some((partition, offset)) = self.source(&arguments.dead_letter_topic, message) else {
                return;
            };
            let named: HashMap<&str, String> = headers(message)
                .filter_map(|(name, value)| Some((name, String::from_utf8_lossy(value?).into_owned())))
                .collect();
            let is = |name, value: &str| named.get(name).is_some_and(|found| found == value);
            let (key, mut value) = (hash(message.key()), value_hash(message.payload()));
            if let Some(digest) = named.get("dlq-value-sha256") {
                value =
                    digest.get(..16).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or_default();
            }
            let record = self.record(partition, offset).unwrap();
            record.found.dead_letters = record.found.dead_letters.saturating_add(1);
            record.found.reason = named.get("dlq-reason").and_then(|reason| Reason::parse(reason));
            let same = record.key == key && record.value == value;
            let placed = is("dlq-topic", &arguments.input_topic)
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
        })?;
        Ok(())
    }

    /// Finds every row's record, and compares the two.
    async fn read_tables(&mut self, postgres: &Client) -> Result<()> {
        let mut places: HashMap<u128, (i32, i64)> = HashMap::new();
        let rows = postgres.query_raw(
            "SELECT payment_id, message_id, source_partition, source_offset,
                    (extract(epoch FROM created_at) * 1000)::bigint,
                    version = 1 AND updated_at = created_at
             FROM payment_writer.payment_metadata",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let (payment_id, message_id) = (row.get::<_, Uuid>(0).as_u128(), row.get::<_, Uuid>(1).as_u128());
            let (partition, offset): (i32, i64) = (row.get(2), row.get(3));
            let Some(record) = self.record(partition, offset) else {
                self.wrong(format!("payment_metadata: {partition}/{offset} is not in the input"));
                continue;
            };
            record.found.metadata = record.found.metadata.saturating_add(1);
            let same = record.payment_id == payment_id
                && record.message_id == message_id
                && record.timestamp_ms == row.get::<_, i64>(4)
                && row.get::<_, bool>(5);
            if !same {
                self.wrong(format!(
                    "payment_metadata: the row of {partition}/{offset} differs from its record"
                ));
            }
            places.insert(payment_id, (partition, offset));
        }

        let rows = postgres.query_raw(
            "SELECT payment_id, (extract(epoch FROM created_at) * 1000)::bigint, cust_id, (amount * 10000)::bigint,
                    amount * 10000 = trunc(amount * 10000), currency, status, type
             FROM payment_writer.payment_core",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let payment_id = row.get::<_, Uuid>(0);
            let Some(&(partition, offset)) = places.get(&payment_id.as_u128()) else {
                self.wrong(format!("payment_core: {payment_id} is not in payment_metadata"));
                continue;
            };
            let status = i8::try_from(row.get::<_, i16>(6)).unwrap_or(i8::MAX);
            let (timestamp_ms, cust_id, amount): (i64, i64, i64) = (row.get(1), row.get(2), row.get(3));
            let core =
                hash((timestamp_ms, cust_id, amount, row.get::<_, &str>(5), status, row.get::<_, &str>(7)));
            let record = self.record(partition, offset).unwrap();
            record.found.core = record.found.core.saturating_add(1);
            if record.core != core || !row.get::<_, bool>(4) {
                self.wrong(format!("payment_core: the row of {partition}/{offset} differs from its record"));
            }
        }

        let rows = postgres.query_raw(
            "SELECT payment_id, (extract(epoch FROM created_at) * 1000)::bigint, external_ref_id, comment
             FROM payment_writer.payment_notes",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let payment_id = row.get::<_, Uuid>(0);
            let Some(&(partition, offset)) = places.get(&payment_id.as_u128()) else {
                self.wrong(format!("payment_notes: {payment_id} is not in payment_metadata"));
                continue;
            };
            let notes =
                hash((row.get::<_, i64>(1), row.get::<_, Option<&str>>(2), row.get::<_, Option<&str>>(3)));
            let record = self.record(partition, offset).unwrap();
            record.found.notes = record.found.notes.saturating_add(1);
            if record.notes != Some(notes) {
                self.wrong(format!("payment_notes: the row of {partition}/{offset} differs from its record"));
            }
        }

        let rows = postgres.query_raw(
            "SELECT message_id, source_partition, source_offset, (extract(epoch FROM created_at) * 1000)::bigint
             FROM payment_writer.idempotency",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let (partition, offset): (i32, i64) = (row.get(1), row.get(2));
            let Some(record) = self.record(partition, offset) else {
                self.wrong(format!("idempotency: {partition}/{offset} is not in the input"));
                continue;
            };
            record.found.idempotency = record.found.idempotency.saturating_add(1);
            let same = record.message_id == row.get::<_, Uuid>(0).as_u128()
                && record.timestamp_ms == row.get::<_, i64>(3);
            if !same {
                self.wrong(format!("idempotency: the row of {partition}/{offset} differs from its record"));
            }
        }
        Ok(())
    }

    /// Cursors are at the end: nothing is in flight.
    async fn check_cursors(&mut self, postgres: &Client, topic: &str, ends: &[i64]) -> Result<()> {
        let rows = postgres
            .query(
                "SELECT partition, applied, published FROM payment_writer.source_cursor
                 WHERE topic = $1 AND topic_id::text LIKE $2 || '%'",
                &[&topic, &self.topic_id_prefix],
            )
            .await?;
        let cursors: HashMap<i32, (i64, Option<i64>)> =
            rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
        for (partition, &end) in ends.iter().enumerate() {
            match cursors.get(&i32::try_from(partition)?) {
                Some(&(applied, Some(published))) if (applied, published) == (end, end) => {}
                // A partition that never had a record.
                None if self.partitions.get(partition).is_none_or(Vec::is_empty) => {}
                found => self.wrong(format!(
                    "cursor of partition {partition} (applied, published) is {found:?}, the log's end {end}"
                )),
            }
        }
        Ok(())
    }

    /// Decides each record's outcome, and compares it with what was found.
    fn judge(&mut self) -> BTreeMap<String, u64> {
        let mut winners: HashMap<u128, (usize, i64, u64)> = HashMap::new();
        let mut twice = Vec::new();
        for (partition, records) in self.partitions.iter().enumerate() {
            for record in records.iter().filter(|record| record.found.metadata > 0) {
                let place = (partition, record.offset, record.payload);
                if let Some((other, offset, _)) = winners.insert(record.message_id, place) {
                    twice.push(format!(
                        "{other}/{offset} and {partition}/{} share a message id",
                        record.offset
                    ));
                }
            }
        }
        for what in twice {
            self.wrong(format!("written twice: {what}"));
        }
        let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
        let mut wrong = Vec::new();
        for (partition, records) in self.partitions.iter().enumerate() {
            for record in records {
                let place = format!("{partition}/{}", record.offset);
                let outcome = match (record.refused, winners.get(&record.message_id)) {
                    (Some(reason), _) => Outcome::DeadLettered(reason),
                    (None, Some(&(p, o, _))) if (p, o) == (partition, record.offset) => Outcome::Written,
                    // The id of a rejected row may have another record that the database accepted, then or
                    // later.
                    (None, Some(&(p, o, _)))
                        if record.found.reason == Some(Reason::RejectedByDatabase)
                            && (p != partition || o > record.offset) =>
                    {
                        Outcome::DeadLettered(Reason::RejectedByDatabase)
                    }
                    (None, Some(&(p, o, _))) if p == partition && o > record.offset => {
                        wrong.push(format!(
                            "{place}: a later record of its partition, {p}/{o}, claimed its id"
                        ));
                        continue;
                    }
                    (None, Some(&(_, _, payload))) if payload == record.payload => Outcome::Duplicate,
                    (None, Some(_)) => Outcome::DeadLettered(Reason::MessageIdConflict),
                    // Only the database's own constraints can keep a valid record with an unclaimed id from
                    // being written.
                    (None, None) if record.found.reason == Some(Reason::RejectedByDatabase) => {
                        Outcome::DeadLettered(Reason::RejectedByDatabase)
                    }
                    (None, None) => {
                        self.lost_count += 1;
                        wrong.push(format!("{place}: lost: valid, and its message id was never written"));
                        continue;
                    }
                };
                let found = &record.found;
                let traces = [
                    (found.metadata, "payment_metadata"),
                    (found.core, "payment_core"),
                    (found.notes, "payment_notes"),
                    (found.idempotency, "idempotency"),
                    (found.read_events, "read events"),
                    (found.email_events, "e-mail events"),
                    (found.dead_letters, "dead letters"),
                ];
                let notes = u8::from(record.notes.is_some());
                let email = u8::from(record.email_event.is_some());
                let expected = match outcome {
                    Outcome::Written => [1, 1, notes, 1, 1, email, 0],
                    Outcome::Duplicate => [0; 7],
                    Outcome::DeadLettered(_) => [0, 0, 0, 0, 0, 0, 1],
                };
                for ((found, what), expected) in traces.into_iter().zip(expected) {
                    if found != expected {
                        wrong.push(format!("{place} ({outcome}): {found} in {what}, not {expected}"));
                    }
                }
                if let (Outcome::DeadLettered(reason), Some(found)) = (outcome, found.reason)
                    && reason != found
                {
                    wrong.push(format!("{place}: dead-lettered for {found}, not {reason}"));
                }
                *outcomes.entry(outcome.to_string()).or_default() += 1;
            }
        }
        for what in wrong {
            self.wrong(what);
        }
        outcomes
    }
}

#[derive(Clone, Copy)]
enum Outcome {
    Written,
    Duplicate,
    DeadLettered(Reason),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Written => f.write_str("written"),
            Outcome::Duplicate => f.write_str("duplicate"),
            Outcome::DeadLettered(reason) => write!(f, "dead letter: {reason}"),
        }
    }
}

fn read_fingerprint(message: &BorrowedMessage<'_>) -> Option<u64> {
    let event: ReadEvent<'_> = serde_json::from_slice(message.payload()?).ok()?;
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

fn email_fingerprint(message: &BorrowedMessage<'_>) -> Option<u64> {
    let event: EmailEvent<'_> = serde_json::from_slice(message.payload()?).ok()?;
    let created_at_ms = event.created_at.parse::<jiff::Timestamp>().ok()?.as_millisecond();
    if timestamp_text(created_at_ms) != event.created_at {
        return None;
    }
    let amount = plain_amount(event.amount, &event.currency)?;
    let (id, text, currency, kind) =
        (written_id(&event.id)?, &event.message_id, &event.currency, &event.r#type);
    Some(hash((id, text, event.cust_id, amount, currency, kind, created_at_ms)))
}

async fn audit(arguments: &Arguments) -> Result<usize> {
    let (postgres, connection) = tokio_postgres::connect(&arguments.postgres_url, NoTls).await?;
    tokio::spawn(connection);
    let mut audit = Audit::default();
    let ends = audit.read_input(arguments)?;

    let topics: HashSet<String> = postgres
        .query(
            "SELECT DISTINCT topic_id::text FROM payment_writer.source_cursor WHERE topic = $1",
            &[&arguments.input_topic],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    match topics.iter().next() {
        None if audit.partitions.is_empty() => {}
        Some(topic_id) if topics.len() == 1 => audit.topic_id_prefix = topic_id[..8].to_owned(),
        _ => audit.wrong(format!("source_cursor has {} topics with that name", topics.len())),
    }
    audit.check_cursors(&postgres, &arguments.input_topic, &ends).await?;
    audit.read_tables(&postgres).await?;
    audit.read_outputs(arguments)?;
    let outcomes = audit.judge();

    let records: usize = audit.partitions.iter().map(Vec::len).sum();
    println!("{:<40}{records:>12}", format!("records in {}", arguments.input_topic));
    for (outcome, count) in &outcomes {
        println!("  {outcome:<38}{count:>12}");
    }
    let found = audit.partitions.iter().flatten().map(|record| &record.found);
    let [mut read_events, mut email_events, mut dead_letters] = [0_u64; 3];
    for found in found {
        read_events += u64::from(found.read_events);
        email_events += u64::from(found.email_events);
        dead_letters += u64::from(found.dead_letters);
    }
    println!("{:<40}{read_events:>12}", "read events");
    println!("{:<40}{email_events:>12}", "e-mail events");
    println!("{:<40}{dead_letters:>12}", "dead letters");
    println!("{:<40}{:>12}", "lost", audit.lost_count);
    if let Some(path) = &arguments.report {
        let expected = Report::read(path)?.numbers();
        let mut found = outcomes.clone();
        found.insert("records".to_owned(), records as u64);
        found.insert("read events".to_owned(), read_events);
        found.insert("e-mail events".to_owned(), email_events);
        found.retain(|_, number| *number > 0);
        let names: HashSet<&String> = expected.keys().chain(found.keys()).collect();
        for name in names {
            let [sent, seen] = [&expected, &found].map(|n| n.get(name).copied().unwrap_or_default());
            if sent != seen {
                audit.wrong(format!("{name}: {seen}, but produce expects {sent}"));
            }
        }
        println!("compared with the report of produce");
    }
    println!("\npayments by currency");
    let sums = postgres
        .query(
            "SELECT currency, count(*), trim_scale(sum(amount))::text FROM payment_writer.payment_core
             GROUP BY currency ORDER BY currency",
            &[],
        )
        .await?;
    for row in sums {
        let (currency, count, sum): (&str, i64, &str) = (row.get(0), row.get(1), row.get(2));
        println!("  {currency:<6}{count:>12}{sum:>26}");
    }
    if !arguments.quiet {
        for (title, sample) in &audit.samples {
            println!("\n{title}\n  {}", sample.replace('\n', "\n  "));
        }
    }
    if audit.wrong_count > OFFENDERS_SHOWN_MAX {
        println!("... and {} more", audit.wrong_count - OFFENDERS_SHOWN_MAX);
    }
    Ok(audit.wrong_count)
}

#[tokio::main]
async fn main() -> Result<()> {
    let wrong_count = audit(&Arguments::parse()).await?;
    if wrong_count > 0 {
        println!("\nFAILED: {wrong_count} findings");
        std::process::exit(1);
    }
    println!("\nevery record had exactly one outcome");
    Ok(())
}
