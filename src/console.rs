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

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use strum::VariantArray;
use tokio::sync::{Mutex, watch};

use self::conditions::{Answered, Increases, Observed};
use self::database::{Kept, Tables};
use self::history::{History, Recent};
use self::on_demand::OnDemand;
use self::page::Shown;
pub use self::page::{POLICY, file, runbooks};
use self::peers::Peers;
use self::samples::Samples;
use self::status::{LaneRow, PartitionRow, Problem, Summary};
use self::summary::Facts;
use crate::config::{KafkaProperties, Settings};
use crate::domain::record::{Partition, TimestampMs};
use crate::housekeeping::Task;
use crate::kafka::client::CLIENT_ID;
use crate::kafka::throttle;
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
    /// `kafka.dead_letter_topic`
    pub dead_letter_topic: String,
    /// `console.peers`
    pub peers: Vec<String>,
    /// Whom a quota of Kafka may be meant for.
    kafka_client: String,
    started: TimestampMs,
    lanes: usize,
}

/// Answers the page.
pub struct Console {
    /// Names of this process.
    pub about: Arc<About>,
    /// The last minutes.
    pub history: History,
    /// Those in use, also after SIGHUP.
    settings: watch::Receiver<Settings>,
    status: Arc<StatusRegistry>,
    log: Arc<LogHandle>,
    increases: Increases,
    state: Arc<Mutex<Option<(Instant, Bytes)>>>,
    database: OnDemand<Tables>,
    tables: Kept,
    peers: OnDemand<Peers>,
}

/// Whom Kafka knows these clients as, which quotas go by.
fn client_of(properties: &KafkaProperties) -> String {
    let id = properties.get("client.id").unwrap_or(CLIENT_ID);
    let user = properties.get("sasl.username").map_or("its user".to_owned(), |user| format!("user {user:?}"));
    format!("client.id {id:?} or {user}")
}

/// What this process says of itself.
pub struct Own {
    /// The time.
    pub now: TimestampMs,
    /// How things are.
    pub summary: Summary,
    /// What is missing: name, reason, since when.
    missing: Vec<(&'static str, String, TimestampMs)>,
    /// Its partitions.
    pub partitions: Vec<PartitionRow>,
    conditions: Vec<Answered>,
    lanes: Vec<LaneRow>,
    seconds: Recent,
    oldest_ms: i64,
}

impl Console {
    /// Creates the console of a process that has just started.
    pub fn new(
        settings: watch::Receiver<Settings>,
        status: Arc<StatusRegistry>,
        log: Arc<LogHandle>,
        version: &'static str,
    ) -> Self {
        let at_start = settings.borrow().clone();
        let about = About {
            version,
            group: at_start.kafka.group_id,
            instance: at_start.kafka.instance_id,
            dead_letter_topic: at_start.kafka.dead_letter_topic,
            kafka_client: client_of(&at_start.kafka.properties),
            peers: at_start.console.peers,
            started: now(),
            lanes: at_start.lanes,
        };
        Self {
            about: Arc::new(about),
            history: History::default(),
            settings,
            status,
            log,
            increases: Increases::default(),
            state: Arc::default(),
            database: OnDemand::new(database::AGE, database::LIMIT),
            tables: Kept::default(),
            peers: OnDemand::new(peers::AGE, peers::LIMIT),
        }
    }

    /// Keeps the history. Never returns.
    pub async fn run(&self) {
        self.history.run(&self.status, self.about.lanes).await;
    }

    /// How things are with this process. `metrics`: a scrape.
    pub fn own(&self, metrics: &str) -> Own {
        self.own_of(&Samples::parse(metrics))
    }

    fn own_of(&self, metrics: &Samples) -> Own {
        let (now, status, About { instance, lanes, .. }) = (now(), &self.status, &*self.about);
        let publishes = self.settings.borrow().kafka.publish;
        let row = |(partition, of): (Partition, _)| PartitionRow::new(partition, &of, instance, *lanes, now);
        let partitions: Vec<PartitionRow> = status.partitions().into_iter().map(row).collect();
        let lanes = status::lanes(status, &partitions, *lanes);
        let reasons =
            status.missing().into_iter().map(|(what, reason)| (what, status::without_class(reason)));
        let (reasons, since): (BTreeMap<_, _>, _) = (reasons.collect(), self.history.missing_since());
        let seconds = self.history.last(10);
        let oldest_ms = status.oldest_pending_ms(now);
        let missing: Vec<_> = reasons
            .iter()
            .map(|(what, reason)| (*what, reason.clone(), since.get(what).copied().unwrap_or(now)))
            .collect();
        let throttled = throttle::throttled(now);
        let (dead_letters, dead_letter_times) = (status.dead_letters(), status.dead_letter_times());
        let observed = Observed {
            now,
            metrics,
            history: &self.history,
            missing: &missing,
            partitions: &partitions,
            lanes: &lanes,
            dead_letters: &dead_letters,
            dead_letter_topic: publishes.then_some(self.about.dead_letter_topic.as_str()),
            dead_letter_times: &dead_letter_times,
            throttled: &throttled,
            kafka_client: &self.about.kafka_client,
            increases: &self.increases,
            oldest_ms,
            lag: status.lag(),
        };
        let facts = Facts {
            now,
            missing: &reasons,
            missing_since: &since,
            partitions: &partitions,
            lanes: &lanes,
            seconds,
            minute: self.history.last(60),
            kafka_client: &self.about.kafka_client,
            dead_letters: &dead_letters,
            oldest_ms,
            is_at_risk: conditions::is_at_risk(&observed),
            publishes,
        };
        let ((mut summary, said), conditions) = (facts.summary(), conditions::answers(&observed));
        conditions::add_to(&mut summary, &said, &conditions);
        Own { now, summary, missing, partitions, conditions, lanes, seconds, oldest_ms }
    }

    /// When the process was started, in milliseconds since 1970.
    pub fn started_ms(&self) -> i64 {
        self.about.started.0
    }

    /// Waits for the answers of peers that are asked now, within their time limit.
    pub async fn peers_asked(&self) {
        self.ask_peers();
        self.peers.settled().await;
    }

    /// The page as HTML with what can be shown without JavaScript. `metrics`: a scrape.
    pub fn page(&self, metrics: &str) -> (&'static str, String) {
        let mut own = self.own(metrics);
        let About { version, group, instance, started, .. } = &*self.about;
        let peers = self.ask_peers();
        peers.add_to(&mut own.summary);
        let partitions = all_partitions(&own, &peers);
        page::render(&Shown {
            summary: &own.summary,
            about: format!(
                "payment-writer {version}, group {group}, instance {instance}, since {}",
                utc(*started)
            ),
            conditions: own.conditions.iter().filter(|answer| answer.holds).collect(),
            partitions: &partitions,
            rendered_at: utc(own.now),
        })
    }

    /// What the page shows, as JSON; computed at most every two seconds, for all pages. `scrape` is called on a thread
    /// for blocking work.
    ///
    /// # Errors
    /// If it cannot be computed.
    pub async fn state(
        self: &Arc<Self>,
        scrape: impl FnOnce() -> String + Send + 'static,
    ) -> Result<Bytes, String> {
        let mut state = Arc::clone(&self.state).lock_owned().await;
        if let Some((at, bytes)) = &*state
            && at.elapsed() < STATE_AGE
        {
            return Ok(bytes.clone());
        }
        let console = Arc::clone(self);
        // It asks in the background, for which it needs this runtime.
        let runtime = tokio::runtime::Handle::current();
        // Holds the lock until it is done, also when the client is gone: there is one computation at a time.
        let computed = tokio::task::spawn_blocking(move || {
            let _entered = runtime.enter();
            let metrics = Samples::parse(&scrape());
            let bytes = serde_json::to_vec(&console.compute(&metrics)).map_err(|error| error.to_string())?;
            let bytes = Bytes::from(bytes);
            *state = Some((Instant::now(), bytes.clone()));
            Ok(bytes)
        });
        computed.await.map_err(|error| error.to_string())?
    }

    fn ask_peers(&self) -> Arc<Peers> {
        if self.about.peers.is_empty() {
            return Arc::default();
        }
        let file = self.settings.borrow().admin.token_file.clone();
        let asked = self.peers.get(peers::ask(Arc::clone(&self.about), file));
        asked.map(|(_, peers)| peers).unwrap_or_default()
    }

    fn compute(&self, metrics: &Samples) -> Value {
        let mut own = self.own_of(metrics);
        let peers = self.ask_peers();
        peers.add_to(&mut own.summary);
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
        let mut reasons: Vec<_> = self.status.dead_letter_times().into_iter().collect();
        reasons.sort_by_key(|(_, times)| std::cmp::Reverse(times.count));
        let reasons: Vec<Value> = reasons
            .into_iter()
            .map(|(reason, times)| json!({ "reason": reason, "count": times.count }))
            .collect();
        json!({
            "at_ms": own.now.0,
            "summary": own.summary,
            "version": version,
            "group": group,
            "instance": instance,
            "started_ms": started.0,
            "publishes": self.settings.borrow().kafka.publish,
            "missing": missing,
            "outcomes": self.outcomes(&own.seconds),
            "lag": {
                "records": self.status.lag(),
                "oldest_seconds": status::seconds(own.oldest_ms),
            },
            "partitions": all_partitions(&own, &peers),
            "lanes": own.lanes,
            "problems": self.problems(),
            "dead_letters": { "by_reason": reasons, "last": letters },
            "database": self.database(metrics),
            "audit": self.audit(metrics),
            "conditions": own.conditions,
            "peers": peers.rows,
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
        let settings = self.settings.borrow().clone();
        let next_pass = database::next_pass(&settings);
        let (read, tables) = self.tables.with(self.database.get(database::ask(settings)));
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
        let mut value = json!(tables);
        let more = json!({
            "read_ms": read.map(|at| at.0),
            "housekeeping": {
                "last_pass_ms": ms("payment_writer_housekeeping_last_pass_timestamp_seconds"),
                "next_pass_ms": next_pass,
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
            "is_on": self.settings.borrow().audit.share > 0.0,
            "results": results,
            "waiting_offsets": metrics.sum("payment_writer_audit_waiting_offsets", &[]),
            "behind_seconds": metrics.sum("payment_writer_audit_behind_seconds", &[]),
            "suspects": metrics.sum("payment_writer_audit_suspects", &[]),
            "dropped_offsets": metrics.sum("payment_writer_audit_dropped_offsets_total", &[]),
            "errors": metrics.sum("payment_writer_audit_errors_total", &[]),
        })
    }
}

/// One row for each partition: that of this process if it has one, else the newest one. While a partition changes hands,
/// two daemons may show it.
fn all_partitions(own: &Own, peers: &Peers) -> Vec<PartitionRow> {
    let mut rows: BTreeMap<i32, &PartitionRow> = BTreeMap::new();
    for row in &peers.partitions {
        let known = rows.entry(row.partition).or_insert(row);
        if row.since_ms > known.since_ms {
            *known = row;
        }
    }
    rows.extend(own.partitions.iter().map(|row| (row.partition, row)));
    rows.into_values().cloned().collect()
}

fn utc(at: TimestampMs) -> String {
    let time = jiff::Timestamp::from_millisecond(at.0).unwrap_or_default();
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_shown_without_its_class() {
        for (reason, expected) in [
            ("refused (os error 111) (passing)", "refused (os error 111)"),
            ("refused (os error 111)", "refused (os error 111)"),
            ("not asked yet", "not asked yet"),
        ] {
            assert_eq!(status::without_class(reason.to_owned()), expected);
        }
    }
}
