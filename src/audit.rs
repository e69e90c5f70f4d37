//! Self-audit of the daemon: reads the log again behind the cursors and checks that every record is accounted
//! for.
//!
//! A cursor states that everything below it has an outcome. The audit verifies this against the log and the
//! claims, with its own Kafka client, so that a record that was skipped is reported within minutes. It reads
//! all records just behind each *fetch start* (where fetching starts, and where a rebalance interrupts it:
//! the places where records are most likely to be lost), and a random share of all other records.
//!
//! The audit runs on its own thread at the pace set by [`pace`]; the pipeline never waits for it.

mod database;
mod findings;
mod input;
mod letters;
mod pace;
mod plan;
mod sampler;
mod suspects;
mod verdict;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::database::Database;
use self::findings::Findings;
use self::input::Input;
use self::letters::Searched;
use self::pace::{Rest, Used};
use self::plan::{Part, Plan};
use self::suspects::{Suspect, Suspects};
use self::verdict::{Payment, Standing, charge, standing};
use crate::config::{KafkaSettings, Settings};
use crate::domain::record::{Offset, Partition};
use crate::telemetry::logging::RateLimited;
use crate::telemetry::metrics::{AuditMetrics, AuditResult};
use crate::telemetry::status::StatusRegistry;

/// Interval between checks of the cursors.
const TICK: Duration = Duration::from_secs(1);
/// Minimum pause between two pieces of work.
const SHORTEST: Duration = Duration::from_millis(1);
/// The Kafka client and the database session are closed after this time without work.
const IDLE: Duration = Duration::from_secs(60);
/// Pause after a failed request.
const RETRY: Duration = Duration::from_secs(10);
/// A row lookup that is faster than this may be repeated at once.
const ROWS_FAST: Duration = Duration::from_secs(1);
const ROWS_PAUSE: Duration = Duration::from_secs(10 * 60);
/// Maximum number of payments of a piece, so that the suspects of a piece are bounded.
const PIECE_MAX: usize = 1_000;

/// The running audit; dropping it stops the audit.
pub struct Audit {
    _stop: Sender<()>,
}

/// Starts the audit of this process's cursors; `None` if `audit.share` is 0. `topic_id` is the id of the
/// input topic.
///
/// # Errors
/// If the thread or its runtime cannot be created.
pub fn spawn(
    settings: &Settings,
    topic_id: Uuid,
    status: &Arc<StatusRegistry>,
) -> std::io::Result<Option<Audit>> {
    if settings.audit.share <= 0.0 {
        return Ok(None);
    }
    status.record_fetch_starts();
    let mut auditor = Auditor {
        kafka: settings.kafka.clone(),
        topic_id,
        status: Arc::clone(status),
        plan: Plan::new(settings.audit.share, rand::random()),
        suspects: Suspects::default(),
        input: Input::new(&settings.kafka, settings.rules()),
        database: Database::new(settings.postgres.url.endpoint().clone(), topic_id)?,
        metrics: AuditMetrics::default(),
        used_at: Instant::now(),
        retry_at: Instant::now(),
        rows_at: None,
        rest: None,
    };
    let (stop, stopped) = channel();
    std::thread::Builder::new().name("audit".to_owned()).spawn(move || {
        let mut pause = TICK;
        // Nothing is sent; dropping the sender ends the loop.
        while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            pause = auditor.step();
        }
    })?;
    Ok(Some(Audit { _stop: stop }))
}

/// The dependency that failed.
#[derive(Clone, Copy)]
enum Side {
    Broker,
    Database,
}

struct Auditor {
    kafka: KafkaSettings,
    topic_id: Uuid,
    status: Arc<StatusRegistry>,
    plan: Plan,
    suspects: Suspects,
    input: Input,
    database: Database,
    metrics: AuditMetrics,
    /// Time of the last work.
    used_at: Instant,
    /// No work before this time, after a failure.
    retry_at: Instant,
    /// No row lookup before this time, after a slow one.
    rows_at: Option<Instant>,
    /// Pause after a piece of work.
    rest: Option<Rest>,
}

impl Auditor {
    /// Does one piece of work and returns the pause before the next.
    fn step(&mut self) -> Duration {
        let (now, before) = (Instant::now(), Used::now());
        self.observe(now);
        if now < self.retry_at {
            return TICK;
        }
        if let Some(left) = self.rest.and_then(|rest| rest.left(before, now)) {
            return left;
        }
        let due = self.suspects.take(now);
        if !due.is_empty() {
            self.look_into(due, now);
        } else if self.suspects.has_room(PIECE_MAX)
            && let parts = self.plan.take(now)
            && !parts.is_empty()
        {
            self.audit(parts, now);
        } else {
            if now.saturating_duration_since(self.used_at) >= IDLE {
                self.input.rest();
                self.database.rest();
            }
            return TICK;
        }
        self.used_at = Instant::now();
        self.rest = Some(Rest::after(before, Used::now(), self.status.lag(), self.used_at));
        SHORTEST
    }

    /// Updates the plan with the cursors and fetch starts of this process.
    fn observe(&mut self, now: Instant) {
        let (begins, dropped) = self.status.take_fetch_starts();
        for begin in begins {
            self.plan.begun(begin, now);
        }
        self.plan.passed(&self.status.applied(), now);
        let dropped = dropped.saturating_mul(plan::AFTER_BEGIN.unsigned_abs());
        self.metrics.dropped(self.plan.take_dropped().saturating_add(dropped));
        let (offsets, behind) = self.plan.behind(now);
        let oldest =
            self.suspects.oldest().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.metrics.behind(offsets, behind.max(oldest), self.suspects.len());
    }

    fn failed(&mut self, side: Side, error: &str) {
        static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
        let dependency = match side {
            Side::Broker => "broker",
            Side::Database => "database",
        };
        self.metrics.failed(dependency);
        self.retry_at = Instant::now() + RETRY;
        if let Some(suppressed) = LIMIT.pass() {
            tracing::warn!(dependency, error, suppressed, "the audit is delayed, retrying");
        }
    }

    /// Audits a piece.
    fn audit(&mut self, parts: Vec<Part>, now: Instant) {
        let read = match self.input.read(&parts) {
            Ok(read) => read,
            Err(error) => {
                self.failed(Side::Broker, &error.to_string());
                // Offsets removed by retention are not retried; without the log bounds, everything is
                // retried.
                let bounds = self.input.bounds(&parts).unwrap_or_default();
                for (at, part) in parts.into_iter().enumerate() {
                    self.plan.put_back(part, bounds.get(at).copied(), now);
                }
                return;
            }
        };
        let snapshot = match self.database.snapshot(&read.payments) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.failed(Side::Database, &error);
                parts.into_iter().for_each(|part| self.plan.put_back(part, None, now));
                return;
            }
        };
        self.metrics.count(AuditResult::Invalid, read.invalid);
        for payment in &read.payments {
            let cursor = snapshot.cursors.get(&payment.partition);
            // In a database that was restored or replaced, the cursor has not reached this record again yet.
            if !cursor.is_some_and(|cursor| cursor.applied.is_past(payment.offset)) {
                continue;
            }
            let owners = snapshot.owners.get(&payment.message_id).map_or(&[][..], Vec::as_slice);
            match counted(standing(payment, owners, &snapshot.pruned)) {
                Ok(result) => self.metrics.count(result, 1),
                Err(suspicion) => self.suspects.add(*payment, suspicion, Instant::now()),
            }
        }
    }

    /// Determines the outcome of suspects, cheapest check first.
    fn look_into(&mut self, due: Vec<Suspect>, now: Instant) {
        let suspects = match self.still_suspicious(&due, now) {
            Ok(suspects) => suspects,
            Err(error) => {
                self.failed(Side::Database, &error);
                return self.suspects.wait(due, now);
            }
        };
        if suspects.is_empty() {
            return;
        }
        match self.without_letter(&suspects) {
            Ok((left, but)) => self.tell(left, but),
            Err(error) => {
                self.failed(Side::Broker, &error);
                self.suspects.wait(suspects, now);
            }
        }
    }

    /// Repeats the check; drops suspects that are accounted for now, that an operator skipped, or that cannot
    /// be decided yet.
    fn still_suspicious(&mut self, due: &[Suspect], now: Instant) -> Result<Vec<Suspect>, String> {
        let payments: Vec<Payment> = due.iter().map(|suspect| suspect.payment).collect();
        let snapshot = self.database.snapshot(&payments)?;
        let exempt = self.database.exempt()?;
        let mut left = Vec::new();
        for suspect in due {
            let payment = &suspect.payment;
            let Some(cursor) = snapshot.cursors.get(&payment.partition) else { continue };
            if !cursor.applied.is_past(payment.offset) {
                continue;
            }
            let (partition, offset) = (payment.partition, payment.offset);
            if exempt.is_given_up(partition, offset) || exempt.is_rewound(partition, offset) {
                self.metrics.count(AuditResult::GivenUp, 1);
                continue;
            }
            let owners = snapshot.owners.get(&payment.message_id).map_or(&[][..], Vec::as_slice);
            match counted(standing(payment, owners, &snapshot.pruned)) {
                Ok(result) => self.metrics.count(result, 1),
                // Its dead letter may not be published yet.
                Err(_) if self.kafka.publish && !cursor.published.is_some_and(|p| p.is_past(offset)) => {
                    self.suspects.wait([*suspect], now);
                }
                Err(suspicion) => {
                    let mut suspect = *suspect;
                    suspect.suspicion = suspicion;
                    left.push(suspect);
                }
            }
        }
        Ok(left)
    }

    /// Returns the suspects without a dead letter, and why the search may have missed one.
    fn without_letter(&mut self, suspects: &[Suspect]) -> Result<(Vec<Suspect>, &'static str), String> {
        // In a recreated topic, the offsets belong to other records.
        if self.input.topic_id().map_err(|error| error.to_string())? != self.topic_id {
            return Ok((Vec::new(), ""));
        }
        if !self.kafka.publish {
            return Ok((suspects.to_vec(), ""));
        }
        let payments: Vec<Payment> = suspects.iter().map(|suspect| suspect.payment).collect();
        let Searched { found, but } = letters::search(&self.kafka, self.topic_id, &payments)?;
        let has_letter = |s: &&Suspect| found.contains(&(s.payment.partition, s.payment.offset));
        let (with, without): (Vec<&Suspect>, Vec<&Suspect>) = suspects.iter().partition(has_letter);
        self.metrics.count(AuditResult::DeadLetter, with.len() as u64);
        Ok((without.into_iter().copied().collect(), but))
    }

    /// Counts and reports records that nothing accounts for.
    fn tell(&mut self, suspects: Vec<Suspect>, but: &str) {
        if suspects.is_empty() {
            return;
        }
        let rows = self.rows(&suspects);
        let mut findings = Findings::default();
        for Suspect { payment, suspicion, .. } in suspects {
            let place = (payment.partition, payment.offset);
            let has_row = rows.as_ref().map(|rows| rows.contains(&place));
            match charge(suspicion, has_row, self.kafka.publish) {
                Some(what) => findings.push(place.0, place.1, format!("{what}{but}")),
                None => self.metrics.count(AuditResult::Unknown, 1),
            }
        }
        self.metrics.count(AuditResult::Unaccounted, findings.len());
        findings.tell(&self.kafka.input_topic);
    }

    /// Which suspects have rows, for the log message; `None` if unknown. Slow lookups are not repeated at
    /// once.
    fn rows(&mut self, suspects: &[Suspect]) -> Option<HashSet<(Partition, Offset)>> {
        if self.rows_at.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        let payments: Vec<Payment> = suspects.iter().map(|suspect| suspect.payment).collect();
        let began = Instant::now();
        let rows = self.database.rows(&payments);
        self.rows_at = (began.elapsed() > ROWS_FAST).then(|| Instant::now() + ROWS_PAUSE);
        rows.map_err(|error| self.failed(Side::Database, &error)).ok()
    }
}

/// Result to count for a record that needs no further check.
fn counted(standing: Standing) -> Result<AuditResult, verdict::Suspicion> {
    Ok(match standing {
        Standing::Owned => AuditResult::Owned,
        Standing::Duplicate => AuditResult::Duplicate,
        Standing::Conflict => AuditResult::Conflict,
        Standing::Forgotten => AuditResult::Unknown,
        Standing::Suspect(suspicion) => return Err(suspicion),
    })
}
