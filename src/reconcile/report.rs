//! Result of a comparison.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::judge::Outcome;
use super::sums::Sums;
use crate::domain::record::{NextOffset, Offset, Partition};

/// A finding about a record; never quotes its contents.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Finding {
    /// Partition of the record.
    pub partition: Partition,
    /// Offset of the record.
    pub offset: Offset,
    /// Description.
    pub what: String,
}

/// Findings; only the first ones are kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Findings {
    /// The first findings, up to the limit.
    pub named: Vec<Finding>,
    /// Total number.
    pub count: u64,
    limit: usize,
}

impl Findings {
    /// Creates an empty list.
    pub fn new(limit: usize) -> Self {
        Self { named: Vec::new(), count: 0, limit }
    }

    /// Adds a finding.
    pub fn push(&mut self, partition: Partition, offset: Offset, what: impl Into<String>) {
        self.count += 1;
        if self.named.len() < self.limit {
            self.named.push(Finding { partition, offset, what: what.into() });
        }
    }

    /// Adds the findings of another list.
    pub fn merge(&mut self, other: Self) {
        self.count += other.count;
        let room = self.limit.saturating_sub(self.named.len());
        self.named.extend(other.named.into_iter().take(room));
    }

    /// Whether there are no findings.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Machine-readable form.
    pub fn json(&self) -> Value {
        let named = self.named.iter();
        let named: Vec<Value> = named
            .map(|f| json!({ "partition": f.partition.0, "offset": f.offset.0, "what": f.what }))
            .collect();
        json!({ "count": self.count, "named": named })
    }
}

/// Compared range of a partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compared {
    /// The partition.
    pub partition: Partition,
    /// First offset.
    pub from: NextOffset,
    /// The offset after the last one.
    pub to: NextOffset,
}

/// The result of a comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Name of the input topic.
    pub topic: String,
    /// Consumer group of the daemon.
    pub group_id: String,
    /// Database, without the password.
    pub database: String,
    /// Whether outputs were compared.
    pub publishes: bool,
    /// Compared ranges by partition.
    pub compared: Vec<Compared>,
    /// Number of halted partitions; compared only up to the halt.
    pub halted: u64,
    /// Number of slices.
    pub slices: usize,
    /// Number of records.
    pub records: u64,
    /// Number of records by outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Payments that should have been written according to the log.
    pub log: Sums,
    /// Payments in the tables.
    pub rows: Sums,
    /// Payments in the read events.
    pub events: Sums,
    /// Outputs of these records: read events, e-mail events, dead letters.
    pub outputs: [u64; 3],
    /// Outputs whose source is in another topic or missing.
    pub foreign: u64,
    /// Rows and outputs of records that the log has lost and whose offsets were used again.
    pub former: u64,
    /// Missing outputs that may have been removed by retention.
    pub untold: u64,
    /// Number of rows without a row of `payment_metadata`, if requested: `payment_core`, `payment_notes`,
    /// `idempotency`.
    pub orphans: Option<[u64; 3]>,
    /// Findings that are wrong.
    pub findings: Findings,
    /// Deviations that are allowed: caused by another database, by the database's own rules or by earlier
    /// settings.
    pub allowed: Findings,
}

impl Report {
    /// Creates an empty report.
    pub fn new(topic: &str, group_id: &str, database: String, publishes: bool, limit: usize) -> Self {
        Self {
            topic: topic.to_owned(),
            group_id: group_id.to_owned(),
            database,
            publishes,
            compared: Vec::new(),
            halted: 0,
            slices: 0,
            records: 0,
            outcomes: BTreeMap::new(),
            log: Sums::default(),
            rows: Sums::default(),
            events: Sums::default(),
            outputs: [0; 3],
            foreign: 0,
            former: 0,
            untold: 0,
            orphans: None,
            findings: Findings::new(limit),
            allowed: Findings::new(limit),
        }
    }

    /// Adds the report of a slice.
    pub fn add(&mut self, slice: Self) {
        self.records += slice.records;
        for (outcome, count) in slice.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        self.log.merge(&slice.log);
        self.rows.merge(&slice.rows);
        self.events.merge(&slice.events);
        for (sum, count) in self.outputs.iter_mut().zip(slice.outputs) {
            *sum += count;
        }
        // Every slice reads all outputs and counts the same foreign ones.
        self.foreign = self.foreign.max(slice.foreign);
        self.former += slice.former;
        self.untold += slice.untold;
        self.findings.merge(slice.findings);
        self.allowed.merge(slice.allowed);
    }

    /// Whether every record has exactly one correct outcome.
    pub fn is_fine(&self) -> bool {
        self.findings.is_empty() && self.orphans.is_none_or(|counts| counts == [0; 3])
    }

    /// Currencies that occur in the log, the rows or the events.
    pub fn currencies(&self) -> Vec<&str> {
        let all = self.log.currencies().chain(self.rows.currencies()).chain(self.events.currencies());
        all.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }

    /// Machine-readable form.
    pub fn json(&self) -> Value {
        let sum = |sums: &Sums, currency: &str| {
            let sum = sums.of(currency);
            json!({ "count": sum.count, "sum": sum.text() })
        };
        let currencies: serde_json::Map<String, Value> = self
            .currencies()
            .into_iter()
            .map(|currency| {
                let events = self.publishes.then(|| sum(&self.events, currency));
                let of = json!({
                    "log": sum(&self.log, currency),
                    "rows": sum(&self.rows, currency),
                    "read_events": events,
                });
                (currency.to_owned(), of)
            })
            .collect();
        let compared: Vec<Value> = self
            .compared
            .iter()
            .map(|c| json!({ "partition": c.partition.0, "from": c.from.0, "to": c.to.0 }))
            .collect();
        let outcomes: serde_json::Map<String, Value> =
            self.outcomes.iter().map(|(outcome, count)| (outcome.to_string(), json!(count))).collect();
        let [read, email, letters] = self.outputs;
        json!({
            "is_fine": self.is_fine(),
            "topic": self.topic,
            "group": self.group_id,
            "database": self.database,
            "partitions": compared,
            "partitions_halted": self.halted,
            "slices": self.slices,
            "records": self.records,
            "outcomes": outcomes,
            "currencies": currencies,
            "outputs": self.publishes.then(|| json!({
                "read": read, "email": email, "dead_letter": letters,
                "foreign": self.foreign, "beyond_retention": self.untold,
            })),
            "of_lost_records": self.former,
            "orphans": self.orphans.map(|[core, notes, claims]| json!({
                "payment_core": core, "payment_notes": notes, "idempotency": claims,
            })),
            "findings": self.findings.json(),
            "allowed": self.allowed.json(),
        })
    }
}
