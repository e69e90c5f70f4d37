//! The conditions that the alerts of `ops/prometheus/rules.yml` speak of, as far as the daemon itself can answer them.
//! Alerts wait longer, and look at all daemons; the console says so.

use serde::Serialize;

use super::history::History;
use super::samples::Samples;
use super::status::PartitionRow;
use super::summary::{THROTTLED_MS_PER_SECOND, duration, grouped};
use crate::domain::record::TimestampMs;
use crate::domain::wire::Reason;
use crate::telemetry::status::DeadLettered;

const MINUTE_MS: i64 = 60_000;

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
    /// The last dead letters, the newest first.
    pub dead_letters: &'o [DeadLettered],
    /// Age of the oldest record that waits, in milliseconds.
    pub oldest_ms: i64,
    /// Records that wait.
    pub lag: i64,
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

/// A condition and its answer.
#[derive(Serialize)]
pub struct Answered {
    alert: &'static str,
    severity: &'static str,
    title: &'static str,
    /// Whether it holds now.
    pub holds: bool,
    detail: String,
    since_ms: Option<i64>,
    runbook: String,
}

impl Answered {
    /// Title and detail.
    pub fn text(self) -> (&'static str, String) {
        (self.title, self.detail)
    }
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

/// All conditions, in the order of the rules.
pub const CONDITIONS: &[Condition] = &[
    page("PaymentWriterLagGrowing", "Lag grows", |o| {
        let before = o.history.since(TimestampMs(o.now.0 - 10 * MINUTE_MS)).lag_before;
        (o.oldest_ms > MINUTE_MS && o.lag > before).then(|| {
            let detail = format!(
                "{} records wait, {} more than ten minutes ago; the oldest is {} old",
                number(o.lag as f64),
                number((o.lag - before) as f64),
                duration(o.oldest_ms)
            );
            (detail, Some(TimestampMs(o.now.0 - o.oldest_ms)))
        })
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
        let since = o.now.0 - 15 * MINUTE_MS;
        let recent = o.dead_letters.iter().filter(|letter| letter.at.0 > since);
        let recent: Vec<_> = recent.filter(|letter| letter.reason != Reason::MessageIdConflict).collect();
        let last = recent.first()?;
        let first = o.history.first(TimestampMs(since), |outcomes, _| outcomes.dead_letters > 0);
        let detail = format!(
            "{} within 15 minutes, the last one of partition {} at offset {} as {}",
            number(o.history.since(TimestampMs(since)).outcomes.dead_letters.max(recent.len() as u64) as f64),
            last.partition,
            last.offset,
            last.reason.as_str()
        );
        Some((detail, first.or(recent.last().map(|letter| letter.at))))
    }),
    page("PaymentWriterDeadLetterShare", "Many records are dead-lettered", |o| {
        let since = TimestampMs(o.now.0 - 15 * MINUTE_MS);
        let outcomes = o.history.since(since).outcomes;
        let all = outcomes.written + outcomes.duplicates + outcomes.redelivered + outcomes.dead_letters;
        let share = outcomes.dead_letters as f64 / all.max(1) as f64;
        (share > 0.05 && outcomes.dead_letters >= 20).then(|| {
            let first = o.history.first(since, |outcomes, _| outcomes.dead_letters > 0);
            (format!("{} of the records of 15 minutes", percent(share)), first)
        })
    }),
    ticket("PaymentWriterMessageIdConflicts", "Ids are used for other payments", |o| {
        let conflicts = o.dead_letters.iter().filter(|letter| letter.reason == Reason::MessageIdConflict);
        let recent: Vec<_> = conflicts.filter(|letter| letter.at.0 > o.now.0 - 60 * MINUTE_MS).collect();
        let last = recent.first()?;
        let detail = format!("the last one of partition {} at offset {}", last.partition, last.offset);
        Some((detail, recent.last().map(|letter| letter.at)))
    }),
    page("PaymentWriterAuditUnaccounted", "Payments are not accounted for", |o| {
        let labels = [("result", "unaccounted")];
        above(o.metrics.sum("payment_writer_audit_records_total", &labels), 0.0, |count| {
            format!("{} since the start; the log names partitions and offsets", number(count))
        })
    }),
    ticket("PaymentWriterAuditBehind", "The audit does not keep up", |o| {
        let behind = o.metrics.sum("payment_writer_audit_behind_seconds", &[]);
        let dropped = o.metrics.sum("payment_writer_audit_dropped_offsets_total", &[]);
        (behind > 1_800.0 || dropped > 0.0).then(|| {
            let behind = duration((behind * 1_000.0) as i64);
            (format!("behind by {behind}, {} offsets not audited since the start", number(dropped)), None)
        })
    }),
    page("PaymentWriterPartitionsHalted", "Partitions are halted", |o| {
        let halted: Vec<&PartitionRow> = o.partitions.iter().filter(|row| row.halted.is_some()).collect();
        let since = halted.iter().filter_map(|row| row.since_ms).min()?;
        let numbers: Vec<String> = halted.iter().take(10).map(|row| row.partition.to_string()).collect();
        let more = if halted.len() > 10 { ", …" } else { "" };
        Some((
            format!("{} until a person decides; the others go on", numbers.join(", ") + more),
            Some(TimestampMs(since)),
        ))
    }),
    ticket("PaymentWriterFetchFaults", "The client library passed over records", |o| {
        let faults = ["payment_writer_fetch_gaps_total", "payment_writer_fetch_clients_renewed_total"];
        above(faults.map(|name| o.metrics.sum(name, &[])).iter().sum(), 0.0, |count| {
            format!("{} times since the start; they were found and read", number(count))
        })
    }),
    page("PaymentWriterDatabaseAway", "The database is away", |o| missing(o, "database")),
    page("PaymentWriterBrokerAway", "Kafka is away", |o| missing(o, "broker")),
    ticket("PaymentWriterThrottled", "Kafka's quota throttles", |o| {
        let recent = o.history.since(TimestampMs(o.now.0 - MINUTE_MS));
        let rate = recent.per_second(recent.throttled_ms);
        (rate > THROTTLED_MS_PER_SECOND).then(|| {
            let first = o.history.first(TimestampMs(o.now.0 - 15 * MINUTE_MS), |_, throttled| throttled > 0);
            (format!("{} ms in each second, summed over all answers", number(rate)), first)
        })
    }),
    ticket("PaymentWriterDatabaseSaturated", "The database limits the throughput", |o| {
        let recent = o.history.since(TimestampMs(o.now.0 - 10 * MINUTE_MS));
        (recent.seconds > 60.0 && recent.database > 0.8 && o.oldest_ms > 30_000 && o.lag >= recent.lag_before)
            .then(|| {
                (
                    format!(
                        "lanes spend {} of their time in it, and payments wait",
                        percent(recent.database)
                    ),
                    None,
                )
            })
    }),
    page("PaymentWriterNotReady", "Not ready", |o| {
        let names: Vec<&str> = o.missing.iter().map(|(what, ..)| *what).collect();
        let since = o.missing.iter().map(|(_, _, since)| *since).min()?;
        Some((format!("missing: {}", names.join(", ")), Some(since)))
    }),
    ticket("PaymentWriterMemory", "Memory is short", |o| {
        share(o, "process_resident_memory_bytes", "payment_writer_memory_limit_bytes", 0.85)
    }),
    ticket("PaymentWriterFileDescriptors", "File descriptors are short", |o| {
        share(o, "process_open_fds", "process_max_fds", 0.8)
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
        above(o.metrics.sum("payment_writer_horizon_held", &[]), 0.0, |_| {
            "it cannot be determined up to when everything is written".to_owned()
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
        // 0 until the database has answered.
        let has_answered = o.metrics.max("payment_writer_housekeeping_last_pass_timestamp_seconds")? > 0.0;
        let ahead = o.metrics.max("payment_writer_months_ahead")?;
        (has_answered && ahead < 2.0)
            .then(|| (format!("{} of the next two months have partitions", number(ahead)), None))
    }),
];

/// Alerts that the daemon cannot answer itself, and why.
#[cfg(test)]
const NOT_ANSWERED: &[(&str, &str)] = &[
    ("PaymentWriterBudgetBurnFast", "hours of history"),
    ("PaymentWriterBudgetBurnSlow", "hours of history"),
    ("PaymentWriterBudgetBurnLong", "days of history"),
    ("PaymentWriterPartitionStalled", "minutes of history of each partition"),
    ("PaymentWriterLowThroughput", "a day of history"),
    ("PaymentWriterErrors", "rates of all tries"),
    ("PaymentWriterDeadLettersOld", "days of history"),
    ("PaymentWriterPartitionsAdded", "an hour of history"),
    ("PaymentWriterNoPartitionsAssigned", "all daemons"),
    ("PaymentWriterPartitionsUnassigned", "all daemons"),
    ("PaymentWriterDatabaseSlow", "rates of a histogram"),
    ("PaymentWriterCursorDeadRows", "an exporter of Postgres"),
    ("PaymentWriterLongTransaction", "an exporter of Postgres"),
    ("PaymentWriterAbsent", "a daemon that is not there"),
    ("PaymentWriterDaemonDown", "a daemon that is not there"),
    ("PaymentWriterRestarting", "a daemon that is not there"),
];

fn above(value: f64, limit: f64, detail: impl Fn(f64) -> String) -> Option<Holds> {
    (value > limit).then(|| (detail(value), None))
}

fn missing(o: &Observed<'_>, wanted: &str) -> Option<Holds> {
    let (_, reason, since) = o.missing.iter().find(|(what, ..)| *what == wanted)?;
    Some((format!("{reason}; nothing is lost, it goes on by itself"), Some(*since)))
}

fn share(o: &Observed<'_>, used: &str, limit: &str, most: f64) -> Option<Holds> {
    let limit = o.metrics.max(limit).filter(|limit| *limit > 0.0)?;
    above(o.metrics.max(used)? / limit, most, |share| format!("{} of what it may have", percent(share)))
}

fn number(value: f64) -> String {
    grouped(value.round().max(0.0) as u64)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[cfg(test)]
mod tests;
