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
use self::pace::{Rest, Used};
use self::plan::{Part, Plan};
use self::suspects::{Suspect, Suspects};
use self::verdict::charge;
use crate::config::{KafkaSettings, Settings};
use crate::reconcile::table::Place;
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
/// The dependencies, as labels of metrics and logs.
const BROKER: &str = "broker";
const DATABASE: &str = "database";
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
        database: Database::new(settings.postgres.url.clone(), topic_id)?,
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
        auditor.end();
    })?;
    Ok(Some(Audit { _stop: stop }))
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

    /// Tells what is left undone. The next audit, as after a reload, begins with the fetch starts and cursors of then. It
    /// is not counted as dropped: that is an audit which does not keep up.
    fn end(&mut self) {
        let offsets = self.plan.passed_and_waiting().saturating_add(self.suspects.len() as u64);
        if offsets > 0 {
            tracing::info!(offsets, "the audit ends; so many offsets that were chosen are not read again");
        }
    }

    fn failed(&mut self, dependency: &'static str, error: &str) {
        static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
        self.metrics.failed(dependency);
        self.retry_at = Instant::now() + RETRY;
        if let Some(suppressed) = LIMIT.pass() {
            tracing::warn!(dependency, error, suppressed, "the audit is delayed, retrying");
        }
    }

    /// Audits a piece.
    fn audit(&mut self, parts: Vec<Part>, now: Instant) {
        let (payments, invalid) = match self.input.read(&parts) {
            Ok(read) => read,
            Err(error) => {
                self.failed(BROKER, &error.to_string());
                // Offsets removed by retention are not retried; without the log bounds, everything is
                // retried.
                let bounds = self.input.bounds(&parts).unwrap_or_default();
                for (at, part) in parts.into_iter().enumerate() {
                    self.plan.put_back(part, bounds.get(at).copied(), now);
                }
                return;
            }
        };
        let snapshot = match self.database.snapshot(payments.iter()) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.failed(DATABASE, &error);
                parts.into_iter().for_each(|part| self.plan.put_back(part, None, now));
                return;
            }
        };
        self.metrics.count(AuditResult::Invalid, invalid);
        for payment in payments {
            match snapshot.standing(&payment) {
                Some(Ok(result)) => self.metrics.count(result, 1),
                Some(Err(suspicion)) => self.suspects.add(payment, suspicion, Instant::now()),
                None => {}
            }
        }
    }

    /// Determines the outcome of suspects, cheapest check first.
    fn look_into(&mut self, due: Vec<Suspect>, now: Instant) {
        let suspects = match self.still_suspicious(&due, now) {
            Ok(suspects) => suspects,
            Err(error) => {
                self.failed(DATABASE, &error);
                return self.suspects.wait(due, now);
            }
        };
        if suspects.is_empty() {
            return;
        }
        match self.without_letter(&suspects) {
            Ok((left, but)) => self.tell(&left, but),
            Err(error) => {
                self.failed(BROKER, &error);
                self.suspects.wait(suspects, now);
            }
        }
    }

    /// Repeats the check; drops suspects that are accounted for now, that an operator skipped, or that cannot
    /// be decided yet.
    fn still_suspicious(&mut self, due: &[Suspect], now: Instant) -> Result<Vec<Suspect>, String> {
        let snapshot = self.database.snapshot(due.iter().map(|suspect| &suspect.payment))?;
        let exempt = self.database.exempt()?;
        let mut left = Vec::new();
        for suspect in due {
            let place = suspect.payment.place;
            let Some(standing) = snapshot.standing(&suspect.payment) else { continue };
            if exempt.is_given_up(place) || exempt.is_rewound(place) {
                self.metrics.count(AuditResult::GivenUp, 1);
                continue;
            }
            match standing {
                Ok(result) => self.metrics.count(result, 1),
                // Its dead letter may not be published yet.
                Err(_) if self.kafka.publish && !snapshot.is_published(place) => {
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
            self.metrics.dropped(suspects.len() as u64);
            return Ok((Vec::new(), ""));
        }
        if !self.kafka.publish {
            return Ok((suspects.to_vec(), ""));
        }
        let (found, but) = letters::search(&self.kafka, self.topic_id, suspects)?;
        let has_letter = |suspect: &Suspect| found.contains(&suspect.payment.place);
        let left: Vec<Suspect> = suspects.iter().copied().filter(|suspect| !has_letter(suspect)).collect();
        self.metrics.count(AuditResult::DeadLetter, (suspects.len() - left.len()) as u64);
        Ok((left, but))
    }

    /// Counts and reports records that nothing accounts for.
    fn tell(&mut self, suspects: &[Suspect], but: &str) {
        if suspects.is_empty() {
            return;
        }
        let rows = self.rows(suspects);
        let (mut findings, mut count) = (Findings::new(), 0);
        for suspect in suspects {
            let place = suspect.payment.place;
            let has_row = rows.as_ref().map(|rows| rows.contains(&place));
            match charge(place, suspect.suspicion, has_row, self.kafka.publish) {
                Some(what) => {
                    findings.entry((place.0, format!("{what}{but}"))).or_default().push(place.1);
                    count += 1;
                }
                None => self.metrics.count(AuditResult::Unknown, 1),
            }
        }
        self.metrics.count(AuditResult::Unaccounted, count);
        findings::tell(&self.kafka.input_topic, findings);
    }

    /// Which suspects have rows, for the log message; `None` if unknown. Slow lookups are not repeated at
    /// once.
    fn rows(&mut self, suspects: &[Suspect]) -> Option<HashSet<Place>> {
        if self.rows_at.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        let began = Instant::now();
        let rows = self.database.rows(suspects);
        self.rows_at = (began.elapsed() > ROWS_FAST).then(|| Instant::now() + ROWS_PAUSE);
        rows.map_err(|error| self.failed(DATABASE, &error)).ok()
    }
}
