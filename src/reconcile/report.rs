//! Result of a comparison.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use super::judge::{Outcome, Wrong};
use super::table::{Part, Place};
use crate::domain::payment::Amount;
use crate::domain::record::{Offset, Partition};
use crate::kafka::scan::ScanRange;

/// A finding about a record; never quotes its contents.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Finding {
    /// Partition of the record.
    pub partition: Partition,
    /// Offset of the record.
    pub offset: Offset,
    /// Description.
    pub what: String,
}

/// Findings; only the first ones are kept.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// The first findings, up to the limit.
    pub named: Vec<Finding>,
    /// Total number.
    pub count: u64,
    #[serde(skip)]
    limit: usize,
}

impl Findings {
    /// Creates an empty list.
    pub fn new(limit: usize) -> Self {
        Self { named: Vec::new(), count: 0, limit }
    }

    /// Adds a finding.
    pub fn push(&mut self, (partition, offset): Place, what: impl Into<String>) {
        self.count += 1;
        if self.named.len() < self.limit {
            self.named.push(Finding { partition, offset, what: what.into() });
        }
    }
}

/// Number and total amount of payments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Sum {
    /// Number of payments.
    pub count: u64,
    /// Total amount in millionths; 2^63 payments of the maximum amount fit.
    #[serde(rename = "sum", serialize_with = "as_decimal")]
    pub millionths: i128,
}

impl Sum {
    /// Adds a payment.
    pub fn add(&mut self, millionths: i128) {
        self.count = self.count.saturating_add(1);
        self.millionths = self.millionths.saturating_add(millionths);
    }

    /// The total amount as a decimal number without trailing zeros.
    pub fn text(self) -> String {
        let sign = if self.millionths < 0 { "-" } else { "" };
        let (whole, rest) =
            (self.millionths.unsigned_abs() / 1_000_000, self.millionths.unsigned_abs() % 1_000_000);
        format!("{sign}{whole}.{rest:06}").trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

fn as_decimal<S: Serializer>(millionths: &i128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&Sum { count: 0, millionths: *millionths }.text())
}

#[derive(Deserialize)]
struct Money<'m> {
    #[serde(borrow)]
    amount: &'m RawValue,
    currency: String,
}

/// Currency and amount in millionths of a read event.
pub(super) fn money(event: &[u8]) -> Option<(String, i128)> {
    let money: Money<'_> = serde_json::from_slice(event).ok()?;
    let amount = Amount::parse(money.amount.get()).ok()?;
    Some((money.currency, i128::try_from(amount.millionths()).unwrap_or_default()))
}

/// Payments of one currency.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Currency {
    /// Payments that should have been written according to the log.
    pub log: Sum,
    /// Payments in the tables.
    pub rows: Sum,
    /// Payments in the read events; `None` if outputs were not compared.
    pub read_events: Option<Sum>,
}

/// Numbers of outputs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OutputCounts {
    /// Read events of these records.
    pub read: u64,
    /// E-mail events of these records.
    pub email: u64,
    /// Dead letters of these records.
    pub dead_letter: u64,
    /// Outputs whose source is in another topic or missing.
    pub foreign: u64,
    /// Missing outputs that may have been removed by retention.
    pub beyond_retention: u64,
}

/// Numbers of rows without a row of `payment_metadata`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Orphans {
    /// In `payment_core`.
    pub payment_core: i64,
    /// In `payment_notes`.
    pub payment_notes: i64,
    /// In `idempotency`.
    pub idempotency: i64,
}

impl Orphans {
    /// The total number.
    pub fn count(&self) -> u64 {
        (self.payment_core + self.payment_notes + self.idempotency).unsigned_abs()
    }
}

/// What was not compared, and why.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct NotCompared {
    /// Whether a loss there would stay unnoticed: what was not compared is then not correct.
    pub may_hide_loss: bool,
    /// Reason.
    pub why: String,
    /// Offsets of the input topic; `None` if they are not known.
    #[serde(flatten)]
    pub range: Option<ScanRange>,
}

/// The result of a comparison.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether every record has exactly one correct outcome, and no loss can be hidden in what was not compared.
    pub is_fine: bool,
    /// Name of the input topic.
    pub topic: String,
    /// Consumer group of the daemon.
    pub group: String,
    /// Database, without the password.
    pub database: String,
    /// Compared ranges by partition.
    pub partitions: Vec<ScanRange>,
    /// Ranges that were not compared.
    pub not_compared: Vec<NotCompared>,
    /// Number of halted partitions; compared only up to the halt.
    pub partitions_halted: u64,
    /// Number of slices.
    pub slices: usize,
    /// Number of records.
    pub records: u64,
    /// Number of records by outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Payments by ISO 4217 code.
    pub currencies: BTreeMap<String, Currency>,
    /// Outputs; `None` if they were not compared.
    pub outputs: Option<OutputCounts>,
    /// Rows and outputs of records that the log has lost and whose offsets were used again.
    pub of_lost_records: u64,
    /// Rows without a row of `payment_metadata`, if requested.
    pub orphans: Option<Orphans>,
    /// Findings that are wrong.
    pub findings: Findings,
    /// Deviations that are allowed: caused by another database, by the database's own rules or by earlier
    /// settings.
    pub allowed: Findings,
}

impl Report {
    /// Adds the deviations of a record to the findings.
    pub fn wrong(&mut self, place: Place, wrongs: &[Wrong]) {
        wrongs.iter().for_each(|wrong| self.findings.push(place, wrong.to_string()));
    }

    /// Adds offsets that were not compared.
    pub fn not_compared(&mut self, range: ScanRange, why: &str, may_hide_loss: bool) {
        self.not_compared.push(NotCompared { may_hide_loss, why: why.to_owned(), range: Some(range) });
    }

    /// The payments of this currency.
    pub fn currency(&mut self, code: &str) -> &mut Currency {
        let read_events = self.outputs.as_ref().map(|_| Sum::default());
        self.currencies
            .entry(code.to_owned())
            .or_insert_with(|| Currency { read_events, ..Currency::default() })
    }

    /// Counts an output of one of these records.
    pub fn note_output(&mut self, part: Part, value: Option<&[u8]>) {
        let Some(outputs) = &mut self.outputs else { return };
        match part {
            Part::DeadLetter => outputs.dead_letter += 1,
            Part::Email => outputs.email += 1,
            _ => outputs.read += 1,
        }
        if part == Part::Read
            && let Some((currency, amount)) = value.and_then(money)
            && let Some(events) = &mut self.currency(&currency).read_events
        {
            events.add(amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_keep_every_digit() {
        let mut sums = [Sum::default(); 2];
        for _ in 0..1_000 {
            sums[0].add(99_999_999_999_999_999_900);
            sums[1].add(1_000);
            sums[1].add(1_000);
        }
        assert_eq!(sums[0].text(), "99999999999999999.9");
        assert_eq!(sums[1], Sum { count: 2_000, millionths: 2_000_000 });
        assert_eq!(sums[1].text(), "2");
        assert_eq!(Sum { count: 1, millionths: -500_000 }.text(), "-0.5");
        assert_eq!(Sum { count: 1, millionths: 10_000_001 }.text(), "10.000001");
        assert_eq!(
            (Sum::default().text(), Sum { count: 1, millionths: 10_000_000 }.text()),
            ("0".into(), "10".into())
        );
    }
}
