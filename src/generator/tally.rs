//! Counts the sent records and the expected outcomes.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::payment::decimal;
use super::{Kind, Record};
use crate::domain::wire::Reason;

/// Counts by kind, and exact sums of money.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All records.
    pub records: u64,
    /// Distinct payments: the expected number of rows and read events.
    pub payments: u64,
    /// Repeated payments.
    pub duplicates: u64,
    /// Records with an earlier message id and another amount.
    pub conflicts: u64,
    /// Bad records by reason.
    pub bad: BTreeMap<Reason, u64>,
    duplicates_respelt: u64,
    by_status: BTreeMap<i8, u64>,
    /// Payments and their sum in the minor unit, by currency and its decimals.
    by_currency: BTreeMap<(&'static str, u32), (u64, u128)>,
    key_bytes: u64,
    value_bytes: u64,
}

fn object<K: ToString>(entries: impl IntoIterator<Item = (K, Value)>) -> Value {
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect::<Map<_, _>>().into()
}

fn counts<K: ToString>(counts: &BTreeMap<K, u64>) -> Value {
    object(counts.iter().map(|(key, count)| (key.to_string(), json!(count))))
}

impl Tally {
    /// Counts a record that was sent.
    pub fn add(&mut self, record: &Record) {
        self.records += 1;
        self.key_bytes += record.key.as_ref().map_or(0, |key| key.len() as u64);
        self.value_bytes += record.value.as_ref().map_or(0, |value| value.len() as u64);
        match record.kind {
            Kind::Payment(payment) => {
                self.payments += 1;
                *self.by_status.entry(payment.status).or_default() += 1;
                let (count, sum) = self.by_currency.entry(payment.currency()).or_default();
                *count += 1;
                *sum += u128::from(payment.minor_units);
            }
            Kind::Duplicate { respelt } => {
                self.duplicates += 1;
                self.duplicates_respelt += u64::from(respelt);
            }
            Kind::Conflict => self.conflicts += 1,
            Kind::Bad(reason) => *self.bad.entry(reason).or_default() += 1,
        }
    }

    /// Number of bad records.
    pub fn bad_total(&self) -> u64 {
        self.bad.values().sum()
    }

    /// Counts and expected outcomes for a daemon that starts with an empty database and sends e-mail events
    /// for `email_statuses`.
    pub fn report(&self, email_statuses: &[i16]) -> Value {
        let mut dead_letters = self.bad.clone();
        if self.conflicts > 0 {
            dead_letters.insert(Reason::MessageIdConflict, self.conflicts);
        }
        let by_currency = self.by_currency.iter().map(|((code, scale), (payments, sum))| {
            (*code, json!({ "payments": payments, "amount": decimal(*sum, *scale) }))
        });
        let is_mailed = |status: &i8| email_statuses.contains(&i16::from(*status));
        let mailed = self.by_status.iter().filter(|(status, _)| is_mailed(status)).map(|(_, count)| count);
        json!({
            "records": self.records,
            "payments": self.payments,
            "duplicates": self.duplicates,
            "duplicates_respelt": self.duplicates_respelt,
            "conflicts": self.conflicts,
            "bad": self.bad_total(),
            "bad_by_reason": counts(&self.bad),
            "payments_by_status": counts(&self.by_status),
            "payments_by_currency": object(by_currency),
            "key_bytes": self.key_bytes,
            "value_bytes": self.value_bytes,
            "expected": {
                "written": self.payments,
                "read_events": self.payments,
                "email_events": mailed.sum::<u64>(),
                "duplicates": self.duplicates,
                "dead_letters": self.conflicts + self.bad_total(),
                "dead_letters_by_reason": counts(&dead_letters),
            },
        })
    }
}
