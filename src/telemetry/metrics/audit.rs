//! Metrics of the audit.

use std::time::Duration;

use metrics::{Counter, Gauge, counter, gauge};

/// Audit result of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AuditResult {
    /// It owns its message id.
    Owned,
    /// Another record with the same payload owns the id.
    Duplicate,
    /// Another record with another payload owns the id.
    Conflict,
    /// It violates a rule and needs no claim.
    Invalid,
    /// Its id has no owner, and it has a dead letter.
    DeadLetter,
    /// Its id has no owner, and an operator skipped it.
    GivenUp,
    /// Unknown: the claim may have been dropped.
    Unknown,
    /// Nothing accounts for it.
    Unaccounted,
}

pub(super) fn records(result: AuditResult) -> Counter {
    counter!("payment_writer_audit_records_total", "result" => <&str>::from(result))
}

/// Metric handles of the audit.
pub struct AuditMetrics {
    dropped: Counter,
    waiting: Gauge,
    behind: Gauge,
    suspects: Gauge,
}

impl Default for AuditMetrics {
    fn default() -> Self {
        Self {
            dropped: counter!("payment_writer_audit_dropped_offsets_total"),
            waiting: gauge!("payment_writer_audit_waiting_offsets"),
            behind: gauge!("payment_writer_audit_behind_seconds"),
            suspects: gauge!("payment_writer_audit_suspects"),
        }
    }
}

impl AuditMetrics {
    /// Counts records by result.
    pub fn count(&self, result: AuditResult, records: u64) {
        if records > 0 {
            self::records(result).increment(records);
        }
    }

    /// Counts offsets that should have been audited and were not.
    pub fn dropped(&self, offsets: u64) {
        self.dropped.increment(offsets);
    }

    /// Counts a failed request to a dependency.
    pub fn failed(&self, dependency: &'static str) {
        counter!("payment_writer_audit_errors_total", "dependency" => dependency).increment(1);
    }

    /// Sets the amount and age of waiting work.
    pub fn behind(&self, offsets: u64, oldest: Duration, suspects: usize) {
        self.waiting.set(offsets as f64);
        self.behind.set(oldest.as_secs_f64());
        self.suspects.set(suspects as f64);
    }
}
