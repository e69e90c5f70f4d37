//! The conditions that the alerts of `ops/prometheus/rules.yml` speak of, as far as the daemon itself can answer them.
//! Alerts wait longer, and look at all daemons; the console says so.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::history::{History, Recent};
use super::samples::Samples;
use super::status::{LaneRow, Level, PartitionRow, Summary};
use super::summary::{
    OPENING_LONG_MS, STEP_HANGS_MS, STUCK_MS, THROTTLED_MS_PER_SECOND, duration, grouped, listed, percent,
};
use crate::domain::record::TimestampMs;
use crate::domain::wire::Reason;
use crate::telemetry::status::{DeadLetterTimes, DeadLettered};

const MINUTE_MS: i64 = 60_000;
const MINUTE: usize = 60;
/// For how long the last increase of a counter counts.
const INCREASE_COUNTS: Duration = Duration::from_secs(3_600);

/// What a condition is answered from.
pub struct Observed<'o> {
    /// The time now.
    pub now: TimestampMs,
    /// The metrics of this process.
    pub metrics: &'o Samples,
    /// The last minutes.
    pub history: &'o History,
    /// What is missing: name, reason, since when.
    pub missing: &'o [(&'static str, String, TimestampMs)],
    /// Partitions of this process.
    pub partitions: &'o [PartitionRow],
    /// Its lanes.
    pub lanes: &'o [LaneRow],
    /// The last dead letters, the newest first.
    pub dead_letters: &'o [DeadLettered],
    /// Where they are, if this daemon publishes.
    pub dead_letter_topic: Option<&'o str>,
    /// Dead letters since the start, by reason.
    pub dead_letter_times: &'o BTreeMap<&'static str, DeadLetterTimes>,
    /// The kinds of Kafka clients that quotas throttle.
    pub throttled: &'o [&'static str],
    /// Whom a quota of Kafka may be meant for.
    pub kafka_client: &'o str,
    /// When counters were seen to increase.
    pub increases: &'o Increases,
    /// Age of the oldest record that waits, in milliseconds.
    pub oldest_ms: i64,
    /// Records that wait.
    pub lag: i64,
}

/// When counters were last seen to increase; at first when they were seen above 0. A page that is opened sees only that.
#[derive(Default)]
pub struct Increases(Mutex<BTreeMap<&'static str, (f64, Instant)>>);

impl Increases {
    /// The value, if it is above 0 and has increased within the last hour.
    fn recent(&self, name: &'static str, value: f64) -> Option<f64> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, at) = seen.entry(name).or_insert((0.0, Instant::now()));
        if value > *before {
            (*before, *at) = (value, Instant::now());
        }
        (value > 0.0 && at.elapsed() < INCREASE_COUNTS).then_some(value)
    }
}

/// What holds, in words, and since when, where that is known.
type Holds = (String, Option<TimestampMs>);

/// A condition.
pub struct Condition {
    /// Name of the alert.
    pub alert: &'static str,
    /// Its severity.
    pub severity: &'static str,
    /// What it is, in a few words.
    pub title: &'static str,
    answer: fn(&Observed<'_>) -> Option<Holds>,
}

/// What may be lost stands above all else.
const LOSSES: &[&str] =
    &["PaymentWriterAuditUnaccounted", "PaymentWriterRetentionAtRisk", "PaymentWriterTopicCompacted"];

/// Raises the sentence to the worst of the conditions that hold, and names those that it does not have: `said` are the
/// alerts whose conditions it has in its own words.
pub fn add_to(summary: &mut Summary, said: &[&str], answers: &[Answered]) {
    let others = || answers.iter().filter(|answer| answer.holds && !said.contains(&answer.alert));
    // What is wrong now explains more than a condition over 15 minutes.
    let is_bad_now = summary.level == Level::Bad;
    for answer in others() {
        let level = if answer.severity == "page" { Level::Bad } else { Level::Warn };
        summary.level = summary.level.max(level);
    }
    let pages = || others().filter(|answer| answer.severity == "page");
    for answer in pages().take(2) {
        let Answered { alert, title, detail, .. } = answer;
        summary.text = if is_bad_now && !LOSSES.contains(alert) {
            format!("{}. {title}: {detail}", summary.text)
        } else {
            format!("{title}: {detail}. {}", summary.text)
        };
    }
    // Said already, with its share.
    let is_said = |answer: &&Answered| {
        answer.alert == "PaymentWriterDeadLetters"
            && answers.iter().any(|other| other.holds && other.alert == "PaymentWriterDeadLetterShare")
    };
    let tickets = others().filter(|answer| answer.severity != "page" && !is_said(answer));
    let titles: Vec<&str> = pages().skip(2).chain(tickets).map(|answer| answer.title).collect();
    if !titles.is_empty() {
        summary.text = format!("{}. Also: {}", summary.text, titles.join(", "));
    }
}

/// Whether records may be, or have been, lost, or whether this is not known: without the retention, or without the
/// position of a partition, nobody knows how old the records are that wait.
pub fn is_at_risk(observed: &Observed<'_>) -> bool {
    let half = observed.metrics.max("payment_writer_input_retention_seconds").unwrap_or_default() / 2.0;
    let compacted = [("topic", "input"), ("setting", "cleanup.policy")];
    let is_gone = |row: &PartitionRow| row.halted.as_ref().is_some_and(|halted| halted.may_lose_records);
    unaccounted(observed) > 0.0
        || observed.oldest_ms as f64 / 1_000.0 >= half
        || observed.metrics.sum("payment_writer_topic_misconfigured", &compacted) > 0.0
        || observed.partitions.iter().any(|row| row.applied.is_none() || is_gone(row))
}

/// A condition and its answer.
#[derive(Serialize)]
pub struct Answered {
    /// Name of the alert.
    pub alert: &'static str,
    severity: &'static str,
    /// What it is, in a few words.
    pub title: &'static str,
    /// Whether it holds now.
    pub holds: bool,
    /// What holds, in words.
    pub detail: String,
    since_ms: Option<i64>,
    /// Path of its section.
    pub runbook: String,
}

/// All answers, those that hold first.
pub fn answers(observed: &Observed<'_>) -> Vec<Answered> {
    let mut answers: Vec<Answered> = CONDITIONS
        .iter()
        .map(|condition| {
            let answer = (condition.answer)(observed);
            let (holds, (detail, since)) = (answer.is_some(), answer.unwrap_or_default());
            Answered {
                alert: condition.alert,
                severity: condition.severity,
                title: condition.title,
                holds,
                detail,
                since_ms: since.map(|at| at.0),
                runbook: format!("/console/runbooks#{}", condition.alert.to_ascii_lowercase()),
            }
        })
        .collect();
    answers.sort_by_key(|answer| (!answer.holds, answer.severity != "page"));
    answers
}

const fn page(
    alert: &'static str,
    title: &'static str,
    answer: fn(&Observed<'_>) -> Option<Holds>,
) -> Condition {
    Condition { alert, severity: "page", title, answer }
}

const fn ticket(
    alert: &'static str,
    title: &'static str,
    answer: fn(&Observed<'_>) -> Option<Holds>,
) -> Condition {
    Condition { alert, severity: "ticket", title, answer }
}

const DATABASE_AWAY: &str = "Waiting for the database";
const BROKER_AWAY: &str = "Waiting for Kafka";

/// All conditions, in the order of the rules.
pub const CONDITIONS: &[Condition] = &[
    page("PaymentWriterLagGrowing", "Lag grows", |o| {
        let before = o.history.last(10 * MINUTE).lag_before?;
        (o.oldest_ms > MINUTE_MS && o.lag > before).then(|| {
            let detail = format!(
                "{} records wait, {} more than ten minutes ago; the oldest is {} old",
                number(o.lag as f64),
                number((o.lag - before) as f64),
                duration(o.oldest_ms)
            );
            (detail, None)
        })
    }),
    page("PaymentWriterPartitionStalled", "Partitions do not move", |o| {
        let lane = o.lanes.iter().filter(|lane| lane.since_ms.is_some()).min_by_key(|lane| lane.since_ms);
        let hanging = lane.and_then(|lane| {
            let since = TimestampMs(lane.since_ms?);
            let detail = format!(
                "lane {} has been in one step for {}: {}",
                lane.lane,
                duration(o.now.0 - since.0),
                lane.doing
            );
            (o.now.0 - since.0 >= STEP_HANGS_MS).then_some((detail, Some(since)))
        });
        let opening = o.partitions.iter().filter(|row| row.state == "opening" && row.since_ms.is_some());
        let long_opening = || {
            let row = opening.min_by_key(|row| row.since_ms)?;
            let since = TimestampMs(row.since_ms?);
            let detail = format!("partition {} is being opened", row.partition);
            (o.now.0 - since.0 > OPENING_LONG_MS).then_some((detail, Some(since)))
        };
        let stuck = || {
            // While the database or Kafka is away, another condition says so; after that, they move within a minute.
            if !o.missing.is_empty() || o.history.last(MINUTE).was_unready {
                return None;
            }
            let is_stuck = |row: &&PartitionRow| {
                row.state == "live" && row.stuck_since_ms.is_some_and(|at| o.now.0 - at > STUCK_MS)
            };
            let stuck: Vec<&PartitionRow> = o.partitions.iter().filter(is_stuck).collect();
            let since = stuck.iter().filter_map(|row| row.stuck_since_ms).min()?;
            let numbers = listed(stuck.iter().map(|row| row.partition), stuck.len(), 10);
            let detail =
                format!("{numbers}: records wait, and none was written for {}", duration(o.now.0 - since));
            Some((detail, Some(TimestampMs(since))))
        };
        hanging.or_else(long_opening).or_else(stuck)
    }),
    page("PaymentWriterRetentionAtRisk", "Records may be deleted before they are written", |o| {
        let retention = o.metrics.max("payment_writer_input_retention_seconds")?;
        let share = o.oldest_ms as f64 / 1_000.0 / retention;
        (share > 0.5).then(|| {
            (format!("the oldest waiting record has used {} of the retention", percent(share)), None)
        })
    }),
    page("PaymentWriterOpenTransaction", "A producer's transaction is open", |o| {
        let open = o
            .partitions
            .iter()
            .max_by(|a, b| a.open_transaction_seconds.total_cmp(&b.open_transaction_seconds))?;
        let ms = (open.open_transaction_seconds * 1_000.0) as i64;
        (ms > 5 * MINUTE_MS).then(|| {
            let detail = format!(
                "partition {}: open for {}, and what is behind it waits",
                open.partition,
                duration(ms)
            );
            (detail, Some(TimestampMs(o.now.0 - ms)))
        })
    }),
    page("PaymentWriterTopicCompacted", "A topic is compacted", |o| {
        let labels = [("setting", "cleanup.policy")];
        let found = o.metrics.labels_above("payment_writer_topic_misconfigured", &labels, "topic");
        (!found.is_empty())
            .then(|| (format!("topics of role {}: brokers remove records", found.join(", ")), None))
    }),
    ticket("PaymentWriterDeadLetters", "Records are dead-lettered", |o| {
        dead_lettered(o, 15 * MINUTE_MS, |reason| reason != Reason::MessageIdConflict.as_str())
    }),
    page("PaymentWriterDeadLetterShare", "Many records are dead-lettered", |o| {
        let Recent { outcomes, seconds, .. } = o.history.last(15 * MINUTE);
        let all = outcomes.written + outcomes.duplicates + outcomes.redelivered + outcomes.dead_letters;
        let share = outcomes.dead_letters as f64 / all.max(1) as f64;
        (share > 0.05 && outcomes.dead_letters >= 20).then(|| {
            let since = o.history.since(5 * MINUTE, |outcomes, _| outcomes.dead_letters > 0);
            let last = o.dead_letter_times.values().map(|times| times.last).max();
            let ago = last.map_or(0, |last| o.now.0 - last.0);
            let quiet =
                if ago > MINUTE_MS { format!(", but none for {}", duration(ago)) } else { String::new() };
            let span = duration((seconds * 1_000.0) as i64);
            (format!("{} of the records of the last {span}{quiet}", percent(share)), since)
        })
    }),
    ticket("PaymentWriterMessageIdConflicts", "Ids are used for other payments", |o| {
        dead_lettered(o, 60 * MINUTE_MS, |reason| reason == Reason::MessageIdConflict.as_str())
    }),
    page("PaymentWriterAuditUnaccounted", "Payments are not accounted for", |o| {
        above(unaccounted(o), 0.0, |count| {
            format!("{} since the start; the log names partitions and offsets", number(count))
        })
    }),
    ticket("PaymentWriterAuditBehind", "The audit does not keep up", |o| {
        let behind = o.metrics.sum("payment_writer_audit_behind_seconds", &[]);
        let dropped = o.metrics.sum("payment_writer_audit_dropped_offsets_total", &[]);
        (o.increases.recent("dropped", dropped).is_some() || behind > 1_800.0).then(|| {
            let behind = duration((behind * 1_000.0) as i64);
            (format!("behind by {behind}, {} offsets not audited since the start", number(dropped)), None)
        })
    }),
    page("PaymentWriterPartitionsHalted", "Partitions are halted", |o| {
        let halted: Vec<&PartitionRow> = o.partitions.iter().filter(|row| row.halted.is_some()).collect();
        let since = halted.iter().filter_map(|row| row.since_ms).min()?;
        let numbers = listed(halted.iter().map(|row| row.partition), halted.len(), 10);
        let advice = "the panel of each has the reason and the command that resolves it; the others go on";
        Some((format!("{numbers}; {advice}"), Some(TimestampMs(since))))
    }),
    ticket("PaymentWriterFetchFaults", "The client library passed over records", |o| {
        let faults = ["payment_writer_fetch_gaps_total", "payment_writer_fetch_clients_renewed_total"];
        let count = faults.map(|name| o.metrics.sum(name, &[])).iter().sum();
        let count = o.increases.recent("fetch faults", count)?;
        Some((format!("{} times since the start; they were found and read", number(count)), None))
    }),
    page("PaymentWriterDatabaseAway", DATABASE_AWAY, |o| missing(o, "database")),
    page("PaymentWriterBrokerAway", BROKER_AWAY, |o| missing(o, "broker")),
    ticket("PaymentWriterThrottled", "Kafka's quota throttles", |o| {
        let recent = o.history.last(MINUTE);
        let rate = recent.per_second(recent.throttled_ms);
        (rate > THROTTLED_MS_PER_SECOND).then(|| {
            let since = o.history.since(MINUTE, |_, throttled| throttled > 0);
            (
                format!(
                    "brokers hold back {}, {} ms a second in all. The quota is of {}, or a \
                     default. `kafka-configs.sh --bootstrap-server HOST:PORT --describe --entity-type clients` and \
                     `--entity-type users` show it, `--alter --add-config NAME=BYTES` raises it",
                    limited(o.throttled),
                    number(rate),
                    o.kafka_client,
                ),
                since,
            )
        })
    }),
    ticket("PaymentWriterDatabaseSaturated", "The database limits the throughput", |o| {
        let recent = o.history.last(10 * MINUTE);
        let shrinks = o.lag < recent.lag_before?;
        (recent.database > 0.8 && o.oldest_ms > 30_000 && !shrinks).then(|| {
            (
                format!(
                    "lanes spend {} of their time in it, and payments wait",
                    percent(recent.database.min(1.0))
                ),
                None,
            )
        })
    }),
    page("PaymentWriterNotReady", "Not ready", |o| {
        let names: Vec<&str> = o.missing.iter().map(|(what, ..)| *what).collect();
        let since = o.missing.iter().map(|(_, _, since)| *since).min()?;
        let others = [("database", DATABASE_AWAY), ("broker", BROKER_AWAY)];
        let same = others.iter().find(|(what, _)| names.contains(what));
        let same = same.map_or(String::new(), |(_, title)| format!("; the same fault as \"{title}\""));
        Some((format!("/readyz names what is missing: {}{same}", names.join(", ")), Some(since)))
    }),
    ticket("PaymentWriterMemory", "Memory is short", |o| {
        share(o, "process_resident_memory_bytes", "payment_writer_memory_limit_bytes", 0.85)
    }),
    ticket("PaymentWriterFileDescriptors", "File descriptors are short", |o| {
        share(o, "process_open_fds", "process_max_fds", 0.8)
    }),
    ticket("PaymentWriterReloadFailed", "New secrets or settings do not work", |o| {
        (o.metrics.max("payment_writer_config_last_reload_successful")? < 1.0)
            .then(|| ("those from before stay in use; the log says why".to_owned(), None))
    }),
    ticket("PaymentWriterPruneStale", "Housekeeping has not run", |o| {
        let last = o
            .metrics
            .max("payment_writer_housekeeping_last_pass_timestamp_seconds")
            .filter(|at| *at > 0.0)?;
        let age = o.now.0 - (last * 1_000.0) as i64;
        (age > 691_200_000).then(|| (format!("the last complete pass began {} ago", duration(age)), None))
    }),
    ticket("PaymentWriterHorizonHeld", "Nothing is pruned", |o| {
        // Held for a moment by each halted partition.
        let known = ["payment_writer_horizon_timestamp_seconds", "process_start_time_seconds"];
        let since = known.iter().filter_map(|name| o.metrics.max(name)).fold(0.0, f64::max) * 1_000.0;
        let is_held = o.metrics.sum("payment_writer_horizon_held", &[]) > 0.0;
        let lasted = o.now.0 - since as i64;
        (is_held && lasted > 6 * 60 * MINUTE_MS).then(|| {
            (
                format!(
                    "for {} it could not be determined up to when everything is written",
                    duration(lasted)
                ),
                None,
            )
        })
    }),
    ticket("PaymentWriterDefaultPartitionRows", "Rows are in default partitions", |o| {
        above(o.metrics.sum("payment_writer_default_partition_rows", &[]), 0.0, |rows| {
            format!("{} rows", number(rows))
        })
    }),
    ticket("PaymentWriterHousekeepingFailing", "Housekeeping fails", |o| {
        let found = o.metrics.labels_above("payment_writer_housekeeping_failing", &[], "task");
        (!found.is_empty()).then(|| (format!("tasks: {}", found.join(", ")), None))
    }),
    ticket("PaymentWriterMonthsMissing", "Months are missing", |o| {
        // 0 until the database has answered, and the months of a new database are made.
        let started = o.metrics.max("process_start_time_seconds").unwrap_or_default();
        let has_answered = o.metrics.max("payment_writer_housekeeping_last_pass_timestamp_seconds")? > 0.0
            && o.now.0 as f64 / 1_000.0 - started > 120.0;
        let ahead = o.metrics.max("payment_writer_months_ahead")?;
        (has_answered && ahead < 2.0)
            .then(|| (format!("{} of the next two months have partitions", number(ahead)), None))
    }),
];

/// Payments that the audit has not found since the start.
fn unaccounted(o: &Observed<'_>) -> f64 {
    o.metrics.sum("payment_writer_audit_records_total", &[("result", "unaccounted")])
}

fn above(value: f64, limit: f64, detail: impl Fn(f64) -> String) -> Option<Holds> {
    (value > limit).then(|| (detail(value), None))
}

/// Dead letters of some reasons within the last `ms`.
fn dead_lettered(o: &Observed<'_>, ms: i64, is_of: fn(&str) -> bool) -> Option<Holds> {
    let recent = |times: &DeadLetterTimes| times.last.0 > o.now.0 - ms;
    let of = || o.dead_letter_times.iter().filter(|(reason, times)| is_of(reason) && recent(times));
    let since = of().map(|(_, times)| times.since).min()?;
    let counts: Vec<String> =
        of().map(|(reason, times)| format!("{} {reason}", number(times.count as f64))).collect();
    let mut detail = format!("since the start {}", counts.join(", "));
    if let Some(last) = o.dead_letters.iter().find(|letter| is_of(letter.reason.as_str())) {
        detail += &format!("; the last one of partition {} at offset {}", last.partition, last.offset);
    }
    if let Some(topic) = o.dead_letter_topic {
        detail += &format!(
            "; all are in {topic}: `payment-writer dlq list` shows them. Their senders have to correct them; once a cause \
             in the database or the settings is mended, `payment-writer dlq replay` sends them again"
        );
    }
    Some((detail, Some(since)))
}

fn missing(o: &Observed<'_>, wanted: &str) -> Option<Holds> {
    let (_, reason, since) = o.missing.iter().find(|(what, ..)| *what == wanted)?;
    let is_refused = reason.to_lowercase().contains("connection refused");
    let remedy = match wanted {
        "database" if is_refused => {
            "nothing listens at postgres.url: start Postgres, or correct the address; "
        }
        "broker" if is_refused => {
            "nothing listens at kafka.bootstrap_servers: start the brokers, or correct the address; "
        }
        _ => "",
    };
    Some((format!("{reason}; {remedy}it goes on by itself once that is over"), Some(*since)))
}

/// Kinds of clients, and the quotas that may limit them.
pub fn limited(clients: &[&str]) -> String {
    let quota = |client: &&str| match *client {
        "reader" => "readers (consumer_byte_rate or request_percentage)",
        _ => "producers (producer_byte_rate or request_percentage)",
    };
    if clients.is_empty() {
        "clients".to_owned()
    } else {
        clients.iter().map(quota).collect::<Vec<_>>().join(" and ")
    }
}

fn share(o: &Observed<'_>, used: &str, limit: &str, most: f64) -> Option<Holds> {
    let limit = o.metrics.max(limit).filter(|limit| *limit > 0.0)?;
    above(o.metrics.max(used)? / limit, most, |share| format!("{} of what it may have", percent(share)))
}

fn number(value: f64) -> String {
    grouped(value.round().max(0.0) as u64)
}

#[cfg(test)]
mod tests;
