//! The console: what the admin server's page at `/` shows. Nothing is spent on it while no page is open, but for the ring
//! of the last minutes.

mod conditions;
mod database;
pub mod history;
mod on_demand;
mod page;
mod peers;
pub mod samples;
pub mod source;
pub mod status;
mod summary;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use strum::VariantArray;
use tokio::sync::Mutex;

use self::conditions::{Answered, Observed};
use self::database::Tables;
use self::history::{History, Recent};
use self::on_demand::OnDemand;
use self::page::Shown;
pub use self::page::{POLICY, file, runbooks};
use self::peers::Peers;
use self::samples::Samples;
use self::status::{LaneRow, PartitionRow, Problem};
use self::summary::{Facts, Summary};
use crate::config::Settings;
use crate::domain::record::{Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::housekeeping::Task;
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::{AuditResult, now};
use crate::telemetry::status::StatusRegistry;

/// How old the state that pages get may be.
const STATE_AGE: Duration = Duration::from_millis(1_900);

/// Names of this process.
pub struct About {
    /// Version of the program.
    pub version: &'static str,
    /// `kafka.group_id`
    pub group: String,
    /// `kafka.instance_id`
    pub instance: String,
    /// `console.peers`
    pub peers: Vec<String>,
    started: TimestampMs,
    lanes: usize,
}

/// Answers the page.
pub struct Console {
    /// Names of this process.
    pub about: Arc<About>,
    /// The last minutes.
    pub history: History,
    settings: Settings,
    status: Arc<StatusRegistry>,
    log: Arc<LogHandle>,
    state: Mutex<Option<(Instant, Bytes)>>,
    database: OnDemand<Tables>,
    peers: OnDemand<Peers>,
}

/// What this process says of itself.
pub struct Own {
    /// The time.
    pub now: TimestampMs,
    /// How things are.
    pub summary: Summary,
    /// What is missing: name, reason, since when.
    pub missing: Vec<(&'static str, String, TimestampMs)>,
    /// Its partitions.
    pub partitions: Vec<PartitionRow>,
    lanes: Vec<LaneRow>,
    seconds: Recent,
    oldest_ms: i64,
}

impl Console {
    /// Creates the console of a process that has just started.
    pub fn new(
        settings: &Settings,
        status: Arc<StatusRegistry>,
        log: Arc<LogHandle>,
        version: &'static str,
    ) -> Self {
        let about = About {
            version,
            group: settings.kafka.group_id.clone(),
            instance: settings.kafka.instance_id.clone(),
            peers: settings.console.peers.clone(),
            started: now(),
            lanes: settings.lanes,
        };
        Self {
            about: Arc::new(about),
            history: History::default(),
            settings: settings.clone(),
            status,
            log,
            state: Mutex::default(),
            database: OnDemand::default(),
            peers: OnDemand::default(),
        }
    }

    /// Keeps the history. Never returns.
    pub async fn run(&self) {
        self.history.run(&self.status, self.about.lanes).await;
    }

    /// How things are with this process.
    pub fn own(&self) -> Own {
        let (now, status, About { instance, lanes, .. }) = (now(), &self.status, &*self.about);
        let row = |(partition, of): (Partition, _)| PartitionRow::new(partition, &of, instance, *lanes, now);
        let partitions: Vec<PartitionRow> = status.partitions().into_iter().map(row).collect();
        let lanes = status::lanes(status, &partitions, *lanes);
        let (missing, missing_since) = (status.missing(), self.history.missing_since());
        let seconds = self.history.since(TimestampMs(now.0 - 10_000));
        let oldest_ms = status.oldest_pending_ms(now);
        let facts = Facts {
            now,
            missing: &missing,
            missing_since: &missing_since,
            partitions: &partitions,
            lanes: &lanes,
            seconds,
            minute: self.history.since(TimestampMs(now.0 - 60_000)),
            dead_letters: &status.dead_letters(),
            oldest_ms,
        };
        let summary = facts.summary();
        let missing = missing
            .into_iter()
            .map(|(what, reason)| (what, reason, missing_since.get(what).copied().unwrap_or(now)));
        Own { now, summary, missing: missing.collect(), partitions, lanes, seconds, oldest_ms }
    }

    fn conditions(&self, own: &Own, metrics: &Samples) -> Vec<Answered> {
        conditions::answers(&Observed {
            now: own.now,
            metrics,
            history: &self.history,
            missing: &own.missing,
            partitions: &own.partitions,
            dead_letters: &self.status.dead_letters(),
            oldest_ms: own.oldest_ms,
            lag: self.status.lag(),
        })
    }

    /// The page as HTML with what can be shown without JavaScript. `metrics`: a scrape.
    pub fn page(&self, metrics: &str) -> (&'static str, String) {
        let (own, metrics) = (self.own(), Samples::parse(metrics));
        let conditions = self.conditions(&own, &metrics).into_iter().filter(|answer| answer.holds);
        let About { version, group, instance, started, .. } = &*self.about;
        let partitions = self.all_partitions(&own);
        page::render(&Shown {
            summary: &own.summary,
            about: format!(
                "payment-writer {version}, group {group}, instance {instance}, since {}",
                utc(*started)
            ),
            conditions: conditions.map(Answered::text).collect(),
            partitions: &partitions,
            rendered_at: utc(own.now),
        })
    }

    /// What the page shows, as JSON; computed at most every two seconds, for all pages. `scrape` is called on a thread
    /// for blocking work.
    pub async fn state(
        self: &Arc<Self>,
        scrape: impl FnOnce() -> String + Send + 'static,
    ) -> Result<Bytes, String> {
        let mut state = self.state.lock().await;
        if let Some((at, bytes)) = state.as_ref().filter(|(at, _)| at.elapsed() < STATE_AGE) {
            let _ = at;
            return Ok(bytes.clone());
        }
        let console = Arc::clone(self);
        // Also asks in the background, for which it needs this runtime.
        let runtime = tokio::runtime::Handle::current();
        let computed = tokio::task::spawn_blocking(move || {
            let _entered = runtime.enter();
            let metrics = Samples::parse(&scrape());
            serde_json::to_vec(&console.compute(&metrics)).map(Bytes::from).map_err(|error| error.to_string())
        });
        let bytes = computed.await.map_err(|error| error.to_string())??;
        *state = Some((Instant::now(), bytes.clone()));
        Ok(bytes)
    }

    fn ask_peers(&self) -> Arc<Peers> {
        if self.about.peers.is_empty() {
            return Arc::default();
        }
        let (about, file) = (Arc::clone(&self.about), self.settings.admin.token_file.clone());
        let asked = self.peers.get(peers::AGE, peers::ask(about, file));
        asked.map(|(_, peers)| peers).unwrap_or_default()
    }

    fn all_partitions(&self, own: &Own) -> Vec<PartitionRow> {
        let peers = self.ask_peers();
        let mut partitions: Vec<PartitionRow> =
            own.partitions.iter().chain(&peers.partitions).cloned().collect();
        partitions.sort_by_key(|row| row.partition);
        partitions
    }

    fn compute(&self, metrics: &Samples) -> Value {
        let own = self.own();
        let About { version, group, instance, started, .. } = &*self.about;
        let missing: Vec<Value> = own
            .missing
            .iter()
            .map(|(what, reason, since)| json!({ "what": what, "reason": reason, "since_ms": since.0 }))
            .collect();
        let letters: Vec<Value> = self
            .status
            .dead_letters()
            .iter()
            .map(|letter| {
                json!({
                    "at_ms": letter.at.0,
                    "partition": letter.partition.0,
                    "offset": letter.offset.0,
                    "reason": letter.reason.as_str(),
                })
            })
            .collect();
        json!({
            "at_ms": own.now.0,
            "summary": own.summary,
            "version": version,
            "group": group,
            "instance": instance,
            "started_ms": started.0,
            "publishes": self.settings.kafka.publish,
            "missing": missing,
            "outcomes": self.outcomes(&own.seconds),
            "lag": {
                "records": self.status.lag(),
                "oldest_seconds": status::seconds(own.oldest_ms),
            },
            "partitions": self.all_partitions(&own),
            "lanes": own.lanes,
            "problems": self.problems(),
            "dead_letters": { "by_reason": by_reason(metrics), "last": letters },
            "database": self.database(metrics),
            "audit": self.audit(metrics),
            "conditions": self.conditions(&own, metrics),
            "peers": self.ask_peers().rows,
        })
    }

    fn outcomes(&self, recent: &Recent) -> Vec<Value> {
        let (totals, outcomes) = (self.status.totals(), &recent.outcomes);
        [
            ("written", totals.written, outcomes.written),
            ("duplicate", totals.duplicates, outcomes.duplicates),
            ("dead_lettered", totals.dead_letters, outcomes.dead_letters),
            ("redelivered", totals.redelivered, outcomes.redelivered),
        ]
        .map(|(outcome, total, count)| {
            json!({ "outcome": outcome, "total": total, "per_second": recent.per_second(count) })
        })
        .to_vec()
    }

    /// The last warnings and errors, the oldest first.
    pub fn last_problems(&self) -> Vec<Problem> {
        let problems = self.log.problems().all().into_iter();
        problems
            .map(|p| Problem { at: p.at.to_string(), level: p.level.to_owned(), message: p.message })
            .collect()
    }

    fn problems(&self) -> Value {
        let (warnings, errors) = self.log.problems().counts();
        json!({ "warnings": warnings, "errors": errors, "last": self.last_problems() })
    }

    fn database(&self, metrics: &Samples) -> Value {
        let answer = self.database.get(database::AGE, database::ask(self.settings.clone()));
        let (asked, tables) = answer.map_or((None, Arc::default()), |(at, tables)| (Some(at.0), tables));
        let gauge = |name: &str| metrics.max(name).filter(|value| value.is_finite());
        let ms = |name: &str| gauge(name).filter(|at| *at > 0.0).map(|at| (at * 1_000.0) as i64);
        let failing = metrics.labels_above("payment_writer_housekeeping_failing", &[], "task");
        let tasks: Vec<Value> = Task::VARIANTS
            .iter()
            .map(|task| {
                let name: &'static str = task.into();
                let is_failing = failing.iter().any(|failed| failed == name);
                json!({ "task": name, "is_failing": is_failing, "last_ok_ms": tables.last_ok(name) })
            })
            .collect();
        let mut value = json!(*tables);
        let more = json!({
            "asked_ms": asked,
            "housekeeping": {
                "last_pass_ms": ms("payment_writer_housekeeping_last_pass_timestamp_seconds"),
                "next_pass_ms": database::next_pass(&self.settings),
                "tasks": tasks,
            },
            "horizon_ms": ms("payment_writer_horizon_timestamp_seconds"),
            "default_partition_rows": gauge("payment_writer_default_partition_rows"),
            "months_ahead": gauge("payment_writer_months_ahead"),
        });
        if let (Some(value), Value::Object(more)) = (value.as_object_mut(), more) {
            value.extend(more);
        }
        value
    }

    fn audit(&self, metrics: &Samples) -> Value {
        let results: Vec<Value> = AuditResult::VARIANTS
            .iter()
            .map(|result| {
                let name: &'static str = (*result).into();
                let count = metrics.sum("payment_writer_audit_records_total", &[("result", name)]);
                json!({ "result": name, "count": count })
            })
            .collect();
        json!({
            "is_on": self.settings.audit.share > 0.0,
            "results": results,
            "waiting_offsets": metrics.sum("payment_writer_audit_waiting_offsets", &[]),
            "behind_seconds": metrics.sum("payment_writer_audit_behind_seconds", &[]),
            "suspects": metrics.sum("payment_writer_audit_suspects", &[]),
            "dropped_offsets": metrics.sum("payment_writer_audit_dropped_offsets_total", &[]),
            "errors": metrics.sum("payment_writer_audit_errors_total", &[]),
        })
    }
}

/// Dead letters by reason since the start, the most frequent first.
fn by_reason(metrics: &Samples) -> Vec<Value> {
    let count = |reason: &Reason| {
        let count = metrics.sum("payment_writer_dead_letters_total", &[("reason", reason.as_str())]);
        (count > 0.0).then_some((count, reason.as_str()))
    };
    let mut counts: Vec<(f64, &str)> = Reason::ALL.iter().filter_map(count).collect();
    counts.sort_by(|a, b| b.0.total_cmp(&a.0));
    counts.into_iter().map(|(count, reason)| json!({ "reason": reason, "count": count })).collect()
}

fn utc(at: TimestampMs) -> String {
    let time = jiff::Timestamp::from_millisecond(at.0).unwrap_or_default();
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}
