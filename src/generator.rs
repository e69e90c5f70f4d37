//! Generates test payments. Pure and seeded; the correct outcome of every record is known.
//!
//! The same seed, settings and clock produce the same records. With version 4 ids, keys and values do not
//! depend on the clock.

mod bad;
mod payment;
mod respell;
mod tally;

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub use bad::BAD_REASONS;
pub use payment::Payment;
pub use tally::Tally;

use crate::domain::wire::Reason;

/// Number of earlier payments that can be repeated; they take a few megabytes.
const HISTORY_MAX: usize = 65_536;

/// One in this many new payments replaces a remembered one, so that repeats vary in distance.
const HISTORY_REPLACE_ONE_IN: u32 = 4;

/// One in this many records carries `correlation-id` and `traceparent`.
const TRACED_ONE_IN: u32 = 100;

/// Kind of message ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IdKind {
    /// UUID of version 4: random
    V4,
    /// UUID of version 7: ordered by time
    V7,
    /// ULID: ordered by time
    Ulid,
}

/// Settings of the generator.
#[derive(Clone, Debug)]
pub struct GeneratorConfig {
    /// Seed of the random numbers.
    pub seed: u64,
    /// Number of accounts.
    pub accounts: u64,
    /// Share of records that repeat an earlier payment.
    pub duplicates: f64,
    /// Share of records that use an earlier message id with another amount.
    pub conflicts: f64,
    /// Share of records that must be dead-lettered.
    pub bad: f64,
    /// Kinds of bad records, out of [`BAD_REASONS`].
    pub bad_reasons: Vec<Reason>,
    /// Kind of message ids.
    pub ids: IdKind,
    /// Approximate size to pad values to; `None` leaves them at about 170 bytes.
    pub value_bytes: Option<usize>,
    /// `payment.types`
    pub types: Vec<String>,
    /// `payment.max_bytes`
    pub value_bytes_max: usize,
    /// `idempotency.window`
    pub window: Duration,
}

/// Kind of a record, which determines its outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A new payment.
    Payment(Payment),
    /// A repeat of an earlier payment.
    Duplicate {
        /// Whether its bytes differ: other field order and number spelling.
        respelt: bool,
    },
    /// An earlier message id with another amount.
    Conflict,
    /// A record that must be dead-lettered.
    Bad(Reason),
}

/// A generated record.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Kind of the record.
    pub kind: Kind,
    /// Milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Headers, in order.
    pub headers: Vec<(&'static str, Vec<u8>)>,
    /// Key; may be null.
    pub key: Option<Vec<u8>>,
    /// Value; may be null.
    pub value: Option<Vec<u8>>,
}

/// Endless generator of records.
pub struct Generator {
    config: GeneratorConfig,
    rng: ChaCha8Rng,
    history: Vec<Payment>,
    bad_below: u32,
    conflicts_below: u32,
    duplicates_below: u32,
}

// Shares are compared with one 32-bit random number.
fn bound(share: f64) -> u32 {
    (share.clamp(0.0, 1.0) * f64::from(u32::MAX)) as u32
}

impl Generator {
    /// Starts at the first record of the seed.
    pub fn new(config: GeneratorConfig) -> Self {
        let bad = if config.bad_reasons.is_empty() { 0.0 } else { config.bad };
        Self {
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            history: Vec::new(),
            bad_below: bound(bad),
            conflicts_below: bound(bad + config.conflicts),
            duplicates_below: bound(bad + config.conflicts + config.duplicates),
            config,
        }
    }

    /// Generates the next record, as of `now_ms`. While there is nothing to repeat, duplicates and conflicts
    /// are replaced by new payments.
    pub fn next(&mut self, now_ms: i64) -> Record {
        let draw = self.rng.next_u32();
        if draw < self.bad_below {
            let at = below(&mut self.rng, self.config.bad_reasons.len() as u32) as usize;
            if let Some(reason) = self.config.bad_reasons.get(at).copied() {
                let payment = Payment::random(&mut self.rng, &self.config, now_ms);
                let mut record = self.record(Kind::Bad(reason), &payment, now_ms);
                bad::spoil(&mut record, reason, payment, &mut self.rng, &self.config);
                return record;
            }
        } else if draw < self.duplicates_below
            && let Some(earlier) = self.earlier()
        {
            return match draw < self.conflicts_below {
                true => self.conflict(earlier, now_ms),
                false => self.duplicate(earlier, now_ms),
            };
        }
        let payment = Payment::random(&mut self.rng, &self.config, now_ms);
        let mut record = self.record(Kind::Payment(payment), &payment, now_ms);
        self.remember(payment);
        self.trace_some(&mut record);
        record
    }

    fn record(&self, kind: Kind, payment: &Payment, timestamp_ms: i64) -> Record {
        let key = Some(payment.account.to_string().into_bytes());
        let value = Some(payment.json(&self.config).into_bytes());
        Record { kind, timestamp_ms, headers: Vec::new(), key, value }
    }

    fn conflict(&mut self, earlier: Payment, now_ms: i64) -> Record {
        let more = 1 + u64::from(below(&mut self.rng, 1_000));
        let other = Payment { minor_units: earlier.minor_units + more, ..earlier };
        self.record(Kind::Conflict, &other, now_ms)
    }

    fn duplicate(&mut self, earlier: Payment, now_ms: i64) -> Record {
        let mut record = self.record(Kind::Duplicate { respelt: false }, &earlier, now_ms);
        if one_in(&mut self.rng, 2) {
            let other = respell::respell(&earlier, &self.config, &mut self.rng);
            // The other spelling can be longer than allowed.
            if other.len() <= self.config.value_bytes_max {
                record.value = Some(other.into_bytes());
                record.kind = Kind::Duplicate { respelt: true };
                record.headers.push(("schema-version", b"1".to_vec()));
            }
        }
        self.trace_some(&mut record);
        record
    }

    fn trace_some(&mut self, record: &mut Record) {
        if one_in(&mut self.rng, TRACED_ONE_IN) {
            let (high, low, span) = (self.rng.next_u64(), self.rng.next_u64(), self.rng.next_u64() | 1);
            let traceparent = format!("00-{high:016x}{low:016x}-{span:016x}-01");
            record.headers.push(("correlation-id", format!("{:016x}", high ^ low).into_bytes()));
            record.headers.push(("traceparent", traceparent.into_bytes()));
        }
    }

    fn earlier(&mut self) -> Option<Payment> {
        let at = below(&mut self.rng, self.history.len() as u32) as usize;
        self.history.get(at).copied()
    }

    fn remember(&mut self, payment: Payment) {
        if self.history.len() < HISTORY_MAX {
            self.history.push(payment);
        } else if one_in(&mut self.rng, HISTORY_REPLACE_ONE_IN) {
            let at = below(&mut self.rng, HISTORY_MAX as u32) as usize;
            if let Some(slot) = self.history.get_mut(at) {
                *slot = payment;
            }
        }
    }
}

/// A number below `limit`, or 0 if that is 0.
fn below(rng: &mut ChaCha8Rng, limit: u32) -> u32 {
    ((u64::from(rng.next_u32()) * u64::from(limit)) >> 32) as u32
}

fn one_in(rng: &mut ChaCha8Rng, times: u32) -> bool {
    below(rng, times) == 0
}

fn pick<T: Copy + Default>(rng: &mut ChaCha8Rng, choices: &[T]) -> T {
    choices.get(below(rng, choices.len() as u32) as usize).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests;
