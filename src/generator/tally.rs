//! Counts the sent records and the expected outcomes.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::payment::CURRENCIES;
use super::{BadReason, Kind, Record};
use crate::domain::wire::Reason;

/// Counts by kind, and exact sums of money.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    records: u64,
    payments: u64,
    duplicates: u64,
    duplicates_respelt: u64,
    conflicts: u64,
    bad: BTreeMap<BadReason, u64>,
    by_status: BTreeMap<i8, u64>,
    by_currency: [(u64, u128); CURRENCIES.len()],
    key_bytes: u64,
    value_bytes: u64,
}

impl Tally {
    /// Counts a record that was sent.
    pub fn add(&mut self, record: &Record) {
        self.records += 1;
        self.key_bytes += record.key().map_or(0, |key| key.len() as u64);
        self.value_bytes += record.value().map_or(0, |value| value.len() as u64);
        match record.kind {
            Kind::Payment(payment) => {
                self.payments += 1;
                *self.by_status.entry(payment.status).or_default() += 1;
                if let Some((count, sum)) = self.by_currency.get_mut(usize::from(payment.currency)) {
                    *count += 1;
                    *sum += u128::from(payment.minor_units);
                }
            }
            Kind::Duplicate { respelt } => {
                self.duplicates += 1;
                self.duplicates_respelt += u64::from(respelt);
            }
            Kind::Conflict => self.conflicts += 1,
            Kind::Bad(reason) => *self.bad.entry(reason).or_default() += 1,
        }
    }

    /// Total number of records.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Number of distinct payments, which is the expected number of rows and read events.
    pub fn payments(&self) -> u64 {
        self.payments
    }

    /// Number of repeated payments.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Number of records with an earlier message id and another amount.
    pub fn conflicts(&self) -> u64 {
        self.conflicts
    }

    /// Number of bad records.
    pub fn bad_total(&self) -> u64 {
        self.bad.values().sum()
    }

    /// Number of bad records by reason.
    pub fn bad(&self) -> &BTreeMap<BadReason, u64> {
        &self.bad
    }

    /// Reports counts and expected outcomes, with e-mail events for `email_statuses`.
    pub fn report(&self, email_statuses: &[i16]) -> TallyReport {
        let mut dead_letters: BTreeMap<String, u64> =
            self.bad.iter().map(|(reason, count)| (reason.reason().to_string(), *count)).collect();
        if self.conflicts > 0 {
            dead_letters.insert(Reason::MessageIdConflict.to_string(), self.conflicts);
        }
        let wanted: BTreeSet<i16> = email_statuses.iter().copied().collect();
        let currencies = CURRENCIES
            .iter()
            .zip(self.by_currency)
            .filter(|(_, (count, _))| *count > 0)
            .map(|((code, scale), (payments, sum))| {
                let amount = decimal(sum, *scale);
                ((*code).to_owned(), CurrencyReport { payments, amount })
            })
            .collect();
        TallyReport {
            records: self.records(),
            payments: self.payments,
            duplicates: self.duplicates,
            duplicates_respelt: self.duplicates_respelt,
            conflicts: self.conflicts,
            bad: self.bad_total(),
            bad_by_reason: self
                .bad
                .iter()
                .map(|(reason, count)| (reason.reason().to_string(), *count))
                .collect(),
            payments_by_status: self.by_status.clone(),
            payments_by_currency: currencies,
            key_bytes: self.key_bytes,
            value_bytes: self.value_bytes,
            expected: Expected {
                written: self.payments,
                read_events: self.payments,
                email_events: self
                    .by_status
                    .iter()
                    .filter(|(status, _)| wanted.contains(&i16::from(**status)))
                    .map(|(_, count)| count)
                    .sum(),
                duplicates: self.duplicates,
                dead_letters: self.conflicts + self.bad_total(),
                dead_letters_by_reason: dead_letters,
            },
        }
    }
}

fn decimal(minor_units: u128, scale: u32) -> String {
    let factor = 10u128.pow(scale);
    let width = scale as usize;
    if scale == 0 {
        return minor_units.to_string();
    }
    format!("{}.{:0width$}", minor_units / factor, minor_units % factor)
}

/// Machine-readable form of a tally.
#[derive(Clone, Debug, Serialize)]
pub struct TallyReport {
    records: u64,
    payments: u64,
    duplicates: u64,
    duplicates_respelt: u64,
    conflicts: u64,
    bad: u64,
    bad_by_reason: BTreeMap<String, u64>,
    payments_by_status: BTreeMap<i8, u64>,
    payments_by_currency: BTreeMap<String, CurrencyReport>,
    key_bytes: u64,
    value_bytes: u64,
    expected: Expected,
}

/// Exact sums of distinct payments.
#[derive(Clone, Debug, Serialize)]
struct CurrencyReport {
    payments: u64,
    amount: String,
}

/// Expected outcomes for a daemon that starts with an empty database.
#[derive(Clone, Debug, Serialize)]
struct Expected {
    written: u64,
    read_events: u64,
    email_events: u64,
    duplicates: u64,
    dead_letters: u64,
    dead_letters_by_reason: BTreeMap<String, u64>,
}
