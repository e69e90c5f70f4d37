//! The daemon audits itself: it reads again what its cursors have passed, and asks whether it is accounted for.
//!
//! A cursor says that everything below it has an outcome. This asks the log and the claims, by another client than the
//! one that fetched, so that a payment that was passed over is told within minutes. Everything just behind a *begin*
//! is read again (where fetching starts, and where a rebalance finds it: there records get lost, if anywhere), and a
//! share of all the rest.
//!
//! It runs on a thread of its own, at the pace of [`pace`], and nothing waits for it.

pub mod begins;
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
use crate::daemon::rules;
use crate::logging::RateLimited;
use crate::metrics::{AuditMetrics, AuditResult};
use crate::record::{Offset, Partition};
use crate::status::Board;

/// How often the cursors are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Between two pieces at least.
const SHORTEST: Duration = Duration::from_millis(1);
/// Client and session are given up when there was nothing to audit for so long.
const IDLE: Duration = Duration::from_secs(60);
/// After a question that failed.
const RETRY: Duration = Duration::from_secs(10);
/// A look for rows that takes no longer may be repeated at once, any other after a while.
const ROWS_FAST: Duration = Duration::from_secs(1);
const ROWS_PAUSE: Duration = Duration::from_secs(10 * 60);
/// Payments of a piece, whatever the offsets: what a piece adds to the suspects.
const PIECE_MAX: usize = 1_000;

/// The running audit; it ends when this is dropped.
pub struct Audit {
    _stop: Sender<()>,
}

/// Starts the audit of what this process's cursors pass; `None` if `audit.share` is 0. `topic_id` is that of the input.
///
/// # Errors
/// When there can be no thread, or no runtime on it.
pub fn spawn(settings: &Settings, topic_id: Uuid, board: &Arc<Board>) -> std::io::Result<Option<Audit>> {
    if settings.audit.share <= 0.0 {
        return Ok(None);
    }
    board.want_begins();
    let mut auditor = Auditor {
        kafka: settings.kafka.clone(),
        topic_id,
        board: Arc::clone(board),
        plan: Plan::new(settings.audit.share, rand::random()),
        suspects: Suspects::default(),
        input: Input::new(&settings.kafka, rules(settings)),
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
        // Nothing is ever sent: the other side is dropped.
        while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            pause = auditor.step();
        }
    })?;
    Ok(Some(Audit { _stop: stop }))
}

/// Which side did not answer.
#[derive(Clone, Copy)]
enum Side {
    Broker,
    Database,
}

struct Auditor {
    kafka: KafkaSettings,
    topic_id: Uuid,
    board: Arc<Board>,
    plan: Plan,
    suspects: Suspects,
    input: Input,
    database: Database,
    metrics: AuditMetrics,
    /// When there was last something to do.
    used_at: Instant,
    /// After a failure: when to go on.
    retry_at: Instant,
    /// After a look for rows that took long: when to look again.
    rows_at: Option<Instant>,
    /// After a piece of work.
    rest: Option<Rest>,
}

impl Auditor {
    /// Does one thing, and says when to do the next.
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
        self.rest = Some(Rest::after(before, Used::now(), self.board.lag(), self.used_at));
        SHORTEST
    }

    /// Notes how far this process has come.
    fn observe(&mut self, now: Instant) {
        let (begins, dropped) = self.board.take_begins();
        for begin in begins {
            self.plan.begun(begin, now);
        }
        self.plan.passed(&self.board.applied(), now);
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
            tracing::warn!(dependency, error, suppressed, "the audit is held up, trying again");
        }
    }

    /// Audits a piece.
    fn audit(&mut self, parts: Vec<Part>, now: Instant) {
        let read = match self.input.read(&parts) {
            Ok(read) => read,
            Err(error) => {
                self.failed(Side::Broker, &error.to_string());
                // What retention has taken is not tried again; if that cannot be asked, it is.
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
            // Of a database that was restored or replaced, the cursor has yet to come here again.
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

    /// Finds out what became of suspicious records, in the order of what it costs.
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

    /// Asks again, and leaves out what is accounted for by now, what was given up, and what cannot be told yet.
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
                // Its dead letter may be on its way.
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

    /// Those that have no dead letter, and why that may be wrong.
    fn without_letter(&mut self, suspects: &[Suspect]) -> Result<(Vec<Suspect>, &'static str), String> {
        // Of a topic that was made again, the offsets mean other records.
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

    /// Counts and names records that nothing accounts for.
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

    /// Which of these have rows, for the words of the log; `None` if that is not known. Large tables are not read
    /// again and again.
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

/// How a record that needs no further look is counted.
fn counted(standing: Standing) -> Result<AuditResult, verdict::Suspicion> {
    Ok(match standing {
        Standing::Owned => AuditResult::Owned,
        Standing::Duplicate => AuditResult::Duplicate,
        Standing::Conflict => AuditResult::Conflict,
        Standing::Forgotten => AuditResult::Unknown,
        Standing::Suspect(suspicion) => return Err(suspicion),
    })
}
