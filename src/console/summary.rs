//! One sentence that says how things are.

use std::collections::BTreeMap;

use super::history::Recent;
use super::status::{LaneRow, Level, PartitionRow, Summary};
use crate::domain::record::TimestampMs;
use crate::telemetry::status::DeadLettered;

/// A lane that has been in one step for longer is slow. A statement that waits is given up after 60 s.
const STEP_LONG_MS: i64 = 15_000;
/// For longer, it hangs, or waits for something that does.
pub(super) const STEP_HANGS_MS: i64 = 30_000;
/// Recovery of a partition usually takes less than a second.
pub(super) const OPENING_LONG_MS: i64 = 30_000;
/// A partition in which nothing moves for longer is a page, as by the rule of Prometheus.
pub(super) const STUCK_MS: i64 = 600_000;
/// Something that has been missing for no longer is no fault yet.
const MISSING_SHORT_MS: i64 = 10_000;
/// Records usually wait for less.
const LATE_MS: i64 = 5_000;
/// Records that wait for longer are a backlog.
const BACKLOG_MS: i64 = 60_000;
/// Throttle time that a second may have; clients are throttled now and then by a quota just above the load.
pub(super) const THROTTLED_MS_PER_SECOND: f64 = 100.0;

/// What the sentence is made from.
pub struct Facts<'f> {
    /// The time now.
    pub now: TimestampMs,
    /// Reasons by what is missing.
    pub missing: &'f BTreeMap<&'static str, String>,
    /// Since when.
    pub missing_since: &'f BTreeMap<&'static str, TimestampMs>,
    /// The partitions of this process.
    pub partitions: &'f [PartitionRow],
    /// Its lanes.
    pub lanes: &'f [LaneRow],
    /// The last ten seconds.
    pub seconds: Recent,
    /// The last minute.
    pub minute: Recent,
    /// Whom a quota of Kafka may be meant for.
    pub kafka_client: &'f str,
    /// The last dead letters.
    pub dead_letters: &'f [DeadLettered],
    /// Age of the oldest record that waits, in milliseconds.
    pub oldest_ms: i64,
    /// Whether records may be, or have been, lost, or this is not known: the sentence must not say that nothing is.
    pub is_at_risk: bool,
    /// `kafka.publish`
    pub publishes: bool,
}

/// A part of the sentence, and the alerts whose conditions it says in its own words.
type Part = (Level, String, &'static [&'static str]);

const DATABASE: &[&str] = &["PaymentWriterDatabaseAway", "PaymentWriterNotReady"];
const BROKER: &[&str] = &["PaymentWriterBrokerAway", "PaymentWriterNotReady"];
const BOTH: &[&str] = &["PaymentWriterDatabaseAway", "PaymentWriterBrokerAway", "PaymentWriterNotReady"];
const GROUP: &[&str] = &["PaymentWriterNotReady"];
const STALLED: &[&str] = &["PaymentWriterPartitionStalled"];
const HALTED: &[&str] = &["PaymentWriterPartitionsHalted"];
const THROTTLED: &[&str] = &["PaymentWriterThrottled"];
const DEAD_LETTERS: &[&str] = &["PaymentWriterDeadLetters"];

/// `1, 2, 3, 4, 5, …`
pub(super) fn listed(numbers: impl Iterator<Item = i32>, count: usize, most: usize) -> String {
    let shown: Vec<String> = numbers.take(most).map(|number| number.to_string()).collect();
    shown.join(", ") + if count > most { ", …" } else { "" }
}

impl Facts<'_> {
    /// What is worst, first; with the alerts whose conditions the sentence has in its own words.
    pub fn summary(&self) -> (Summary, Vec<&'static str>) {
        let parts = [
            self.missing(),
            self.halted(),
            self.hanging(),
            self.opening(),
            self.throttled(),
            self.dead_letters(),
        ];
        let mut parts: Vec<Part> = parts.into_iter().flatten().collect();
        let worst = parts.iter().map(|(level, ..)| *level).max();
        parts.truncate(2);
        // What is missing for all lanes explains what does not flow.
        if self.missing.is_empty() || !self.lanes_without().is_empty() {
            parts.push(self.flow());
        }
        let level = parts.iter().map(|(level, ..)| *level).max().max(worst).unwrap_or_default();
        let alerts = parts.iter().flat_map(|(.., alerts)| alerts.iter().copied()).collect();
        let text = parts.into_iter().map(|(_, text, _)| text).collect::<Vec<_>>().join(". ");
        (Summary { level, text }, alerts)
    }

    fn nothing_is_lost(&self) -> &'static str {
        if self.is_at_risk { "" } else { "nothing is lost, " }
    }

    /// The lanes that something does not answer, if it answers others.
    fn lanes_without(&self) -> Vec<&LaneRow> {
        let works = |lane: &&LaneRow| lane.partitions > 0;
        let away = |lane: &&LaneRow| lane.database.is_some() || lane.broker.is_some();
        let lanes: Vec<&LaneRow> = self.lanes.iter().filter(works).filter(away).collect();
        if lanes.len() < self.lanes.iter().filter(works).count() { lanes } else { Vec::new() }
    }

    fn missing(&self) -> Option<Part> {
        let all = ["database", "broker", "group"];
        let (what, reason) = all.into_iter().find_map(|what| Some((what, self.missing.get(what)?)))?;
        let lasted = self.missing_since.get(what).map_or(0, |since| self.now.0 - since.0);
        let (waits, rest, alerts) = match what {
            "database" if self.missing.contains_key("broker") => {
                ("for Postgres, and for Kafka,", "it goes on by itself once both answer", BOTH)
            }
            "database" => ("for Postgres", "no action in Kafka is needed", DATABASE),
            "broker" => ("for Kafka", "it goes on by itself once Kafka answers", BROKER),
            _ => ("to join the consumer group", "the records wait in Kafka", GROUP),
        };
        let lanes = self.lanes_without();
        let who = if lanes.is_empty() {
            "Waiting".to_owned()
        } else {
            let numbers = listed(lanes.iter().map(|lane| lane.lane as i32), lanes.len(), 5);
            format!("Lane {numbers} waits")
        };
        let level = if lasted < MISSING_SHORT_MS { Level::Warn } else { Level::Bad };
        let lasted = duration(lasted);
        let text = format!("{who} {waits} for {lasted}: {reason}; {}{rest}", self.nothing_is_lost());
        Some((level, text, alerts))
    }

    fn hanging(&self) -> Option<Part> {
        let lasted = |lane: &LaneRow| self.now.0 - lane.since_ms.unwrap_or(self.now.0);
        let slow: Vec<&LaneRow> = self.lanes.iter().filter(|lane| lasted(lane) >= STEP_LONG_MS).collect();
        let longest = slow.iter().max_by_key(|lane| lasted(lane))?;
        let partitions = slow.iter().map(|lane| lane.partitions as u64).sum();
        let lasted = lasted(longest);
        let step = match longest.doing {
            "database" => "waiting for Postgres in one transaction",
            "kafka" => "waiting for Kafka in one transaction",
            "recovering" => "finding where to continue",
            "starting_producer" => "starting its transactional producer",
            "revoking" => "finishing what it has of revoked partitions",
            _ => "assembling one batch",
        };
        let level = if lasted < STEP_HANGS_MS { Level::Warn } else { Level::Bad };
        let (noun, verb, whose) = match (slow.len(), level) {
            (1, Level::Bad) => ("Lane", "hangs", "its"),
            (1, _) => ("Lane", "is slow", "its"),
            (_, Level::Bad) => ("Lanes", "hang", "their"),
            _ => ("Lanes", "are slow", "their"),
        };
        let text = format!(
            "{noun} {} {verb}: {step} for {}; {}{whose} {} wait",
            listed(slow.iter().map(|lane| lane.lane as i32), slow.len(), 5),
            duration(lasted),
            self.nothing_is_lost(),
            counted(partitions, "partition"),
        );
        Some((level, text, STALLED))
    }

    fn halted(&self) -> Option<Part> {
        let halted = || self.partitions.iter().filter(|row| row.halted.is_some());
        let count = halted().count();
        let mut reasons: Vec<String> =
            halted().filter_map(|row| Some(in_words(&row.halted.as_ref()?.reason))).collect();
        reasons.sort_unstable();
        reasons.dedup();
        let until = if halted().all(|row| row.halted.as_ref().is_some_and(|halted| halted.is_retried)) {
            "and tried again each minute"
        } else {
            "until a person decides"
        };
        let numbers = listed(halted().map(|row| row.partition), count, 5);
        let who = match count {
            0 => return None,
            1 => format!("Partition {numbers} is halted"),
            _ => format!("{count} partitions are halted ({numbers})"),
        };
        let its = if count == 1 { "its" } else { "their" };
        let rest = if halted().any(|row| row.halted.as_ref().is_some_and(|halted| halted.may_lose_records)) {
            "records may be lost, the partition's panel says which".to_owned()
        } else {
            format!("{}{its} records wait in Kafka", self.nothing_is_lost())
        };
        let since = halted().filter_map(|row| row.since_ms).min().unwrap_or(self.now.0);
        let lasted = duration(self.now.0 - since);
        let text = format!("{who} for {lasted}, {until}: {}; {rest}, the others go on", reasons.join(", "));
        Some((Level::Bad, text, HALTED))
    }

    /// Partitions in recovery for long.
    fn opening(&self) -> Option<Part> {
        let is_long = |row: &&PartitionRow| {
            row.state == "opening" && self.now.0 - row.since_ms.unwrap_or(self.now.0) > OPENING_LONG_MS
        };
        let count = self.partitions.iter().filter(is_long).count();
        let numbers = listed(self.partitions.iter().filter(is_long).map(|row| row.partition), count, 5);
        let text = || {
            format!("Still finding where to continue in {} ({numbers})", counted(count as u64, "partition"))
        };
        (count > 0).then(|| (Level::Bad, text(), STALLED))
    }

    fn throttled(&self) -> Option<Part> {
        let rate = self.minute.per_second(self.minute.throttled_ms);
        (rate > THROTTLED_MS_PER_SECOND).then(|| {
            (
                Level::Warn,
                format!(
                    "Kafka slows this daemon down by a quota; {}payments take longer; if lag grows, have the quota of \
                     {} raised",
                    self.nothing_is_lost(),
                    self.kafka_client,
                ),
                THROTTLED,
            )
        })
    }

    fn dead_letters(&self) -> Option<Part> {
        let count = self.minute.outcomes.dead_letters;
        if count == 0 {
            return None;
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for letter in self.dead_letters.iter().filter(|letter| letter.at.0 > self.now.0 - 60_000) {
            *reasons.entry(letter.reason.as_str()).or_default() += 1;
        }
        let all: usize = reasons.values().sum();
        let most = reasons.iter().max_by_key(|(_, count)| **count);
        let reason = match most {
            Some((reason, _)) if reasons.len() == 1 => format!(", all {reason}"),
            Some((reason, count)) if count * 2 > all => format!(", mostly {reason}"),
            Some(_) => format!(", for {} reasons", reasons.len()),
            None => String::new(),
        };
        let Recent { outcomes, .. } = self.minute;
        let records = outcomes.written + outcomes.duplicates + outcomes.redelivered + count;
        let share = format!("{} of the records", percent(count as f64 / records as f64));
        let kept = if self.publishes {
            "they are not written to Postgres, and kept in the dead-letter topic"
        } else {
            "they are not written, and no event is sent"
        };
        let text = format!("{} in the last minute ({share}){reason}; {kept}", counted(count, "dead letter"));
        Some((Level::Warn, text, DEAD_LETTERS))
    }

    fn flow(&self) -> Part {
        let (level, text) = self.flow_of_payments();
        (level, text, &[])
    }

    fn flow_of_payments(&self) -> (Level, String) {
        if self.partitions.is_empty() {
            return (Level::Ok, "Ready, without partitions: other members of the group have them".to_owned());
        }
        let opening = self.partitions.iter().filter(|row| row.state == "opening").count();
        if opening == self.partitions.len() {
            return (
                Level::Warn,
                format!("Finding where to continue in {}", counted(opening as u64, "partition")),
            );
        }
        let outcomes = &self.seconds.outcomes;
        let done = outcomes.written + outcomes.duplicates + outcomes.dead_letters + outcomes.redelivered;
        // A halted partition has its own sentence.
        let flowing = || self.partitions.iter().filter(|row| row.halted.is_none());
        let waiting: i64 = flowing().filter_map(|row| row.lag_records).sum();
        let all_flow = flowing().count() == self.partitions.len();
        let oldest_ms = if all_flow {
            self.oldest_ms
        } else {
            let oldest = flowing().filter_map(|row| row.lag_seconds).fold(0.0, f64::max);
            (oldest * 1_000.0) as i64
        };
        let behind_open: i64 = self.partitions.iter().map(|row| row.open_transaction_records).sum();
        let oldest = duration(oldest_ms);
        if oldest_ms >= BACKLOG_MS {
            let falls = |before: i64| (before - waiting) as f64 / self.minute.seconds.max(1.0);
            let left = match self.minute.lag_before.filter(|_| all_flow).map(falls) {
                Some(falls) if falls > 0.0 => {
                    format!(", about {} left", duration((waiting as f64 / falls * 1_000.0) as i64))
                }
                Some(_) => ", and the backlog does not shrink".to_owned(),
                None => String::new(),
            };
            let text = format!(
                "Behind by {}, the oldest {oldest} old; working off {}{left}",
                counted(waiting.unsigned_abs(), "record"),
                rate(self.seconds.per_second(done), "record"),
            );
            return (Level::Warn, text);
        }
        let is_done = |row: &PartitionRow| row.state == "live" && row.lag_records == Some(0);
        let mut text = if done == 0 && self.partitions.iter().all(is_done) {
            let published = if self.publishes { " and published" } else { "" };
            format!("Idle: every record that can be read is written{published}")
        } else {
            let a_second = self.seconds.per_second(outcomes.written);
            let of = if all_flow { "" } else { " of the other partitions" };
            format!("Writing {}; oldest waiting record{of} {oldest}", rate(a_second, "payment"))
        };
        if behind_open > 0 {
            let records = counted(behind_open.unsigned_abs(), "record");
            text.push_str(&format!("; {records} wait for the end of producers' transactions"));
        }
        (if oldest_ms >= LATE_MS { Level::Warn } else { Level::Ok }, text)
    }
}

/// A halt reason, in a few words.
fn in_words(reason: &str) -> String {
    let words = match reason {
        "log_gap" => "records were deleted from the log before they were written",
        "beyond_end" => "its cursor is beyond the end of the log",
        "moved_forward" => "another program moved the group's offset past unwritten records",
        "unproved_events" => "it is not known which events were sent",
        "unreadable" => "records cannot be read",
        "fetch_gap" => "the client library skips records",
        // A newer daemon's.
        _ => return reason.to_owned(),
    };
    format!("{words} ({reason})")
}

/// `1,012 payments/s`
fn rate(a_second: f64, noun: &str) -> String {
    let number = if a_second < 10.0 && a_second > 0.0 {
        format!("{a_second:.1}")
    } else {
        grouped(a_second.round() as u64)
    };
    format!("{number} {noun}s/s")
}

/// `1 partition`, `1,012 partitions`
pub(super) fn counted(count: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// `1,234,567`
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `less than 1 %`, `20 %`
pub(super) fn percent(share: f64) -> String {
    if share > 0.0 && share < 0.01 { "less than 1 %".to_owned() } else { format!("{:.0} %", share * 100.0) }
}

/// `0.2 s`, `45 s`, `3 min`, `2 h 5 min`, `3 d`
pub(super) fn duration(ms: i64) -> String {
    let ms = ms.max(0);
    match ms / 1_000 {
        0..10 => format!("{:.1} s", ms as f64 / 1_000.0),
        s @ 10..60 => format!("{s} s"),
        s @ 60..3_600 => format!("{} min", s / 60),
        s @ 3_600..172_800 if s % 3_600 / 60 > 0 => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
        s @ 3_600..172_800 => format!("{} h", s / 3_600),
        s => format!("{} d", s / 86_400),
    }
}

#[cfg(test)]
mod tests;
