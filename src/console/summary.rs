//! One sentence that says how things are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::history::Recent;
use super::status::{LaneRow, PartitionRow};
use crate::domain::record::TimestampMs;
use crate::telemetry::status::DeadLettered;

/// A lane that has been in one step for longer hangs, or waits for something that does.
const STEP_LONG_MS: i64 = 60_000;
/// Something that has been missing for no longer is no fault yet.
const MISSING_SHORT_MS: i64 = 10_000;
/// Records that wait for longer are a backlog.
const BACKLOG_MS: i64 = 60_000;
/// Throttle time that a second may have; clients are throttled now and then by a quota just above the load.
pub(super) const THROTTLED_MS_PER_SECOND: f64 = 100.0;

/// How urgent a sentence is.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, strum::IntoStaticStr,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    #[default]
    Ok,
    /// To be looked at.
    Warn,
    /// Payments wait.
    Bad,
}

/// How things are.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    /// How urgent it is.
    pub level: Level,
    /// In words.
    pub text: String,
}

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
    /// The last dead letters.
    pub dead_letters: &'f [DeadLettered],
    /// Age of the oldest record that waits, in milliseconds.
    pub oldest_ms: i64,
}

impl Facts<'_> {
    /// What is worst, first.
    pub fn summary(&self) -> Summary {
        let parts = [self.missing(), self.hanging(), self.halted(), self.throttled(), self.dead_letters()];
        let mut parts: Vec<(Level, String)> = parts.into_iter().flatten().collect();
        // What is missing explains the rest.
        parts.truncate(if self.missing.is_empty() { 2 } else { 1 });
        if self.missing.is_empty() {
            parts.push(self.flow());
        }
        let level = parts.iter().map(|(level, _)| *level).max().unwrap_or_default();
        let text = parts.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(". ");
        Summary { level, text }
    }

    fn missing(&self) -> Option<(Level, String)> {
        // The database first: a broker that is away as well is told by the list below.
        let (what, reason) = ["database", "broker", "group"]
            .into_iter()
            .find_map(|what| Some((what, self.missing.get(what)?)))?;
        let lasted = self.missing_since.get(what).map_or(0, |since| self.now.0 - since.0);
        let (waits, nothing_to_do) = match what {
            "database" => ("Waiting for Postgres", "no action in Kafka is needed"),
            "broker" => ("Waiting for Kafka", "it goes on by itself when Kafka answers"),
            _ => ("Waiting to join the consumer group", "the records wait in Kafka"),
        };
        let level = if lasted < MISSING_SHORT_MS { Level::Warn } else { Level::Bad };
        Some((level, format!("{waits} for {}: {reason}; nothing is lost, {nothing_to_do}", duration(lasted))))
    }

    fn hanging(&self) -> Option<(Level, String)> {
        let lasted = |lane: &LaneRow| self.now.0 - lane.since_ms.unwrap_or(self.now.0);
        let is_step = |lane: &&LaneRow| !matches!(lane.doing, "waiting" | "idle" | "backing_off");
        let longest = self.lanes.iter().filter(is_step).max_by_key(|lane| lasted(lane))?;
        let lasted = lasted(longest);
        if lasted < STEP_LONG_MS {
            return None;
        }
        let step = match longest.doing {
            "database" => "one Postgres transaction",
            "kafka" => "one Kafka transaction",
            "recovering" => "finding where to continue",
            "starting_producer" => "starting its transactional producer",
            _ => "assembling one batch",
        };
        let text = format!(
            "Lane {} hangs: {step} for {}; its {} wait, nothing is lost",
            longest.lane,
            duration(lasted),
            counted(longest.partitions as u64, "partition"),
        );
        Some((Level::Bad, text))
    }

    fn halted(&self) -> Option<(Level, String)> {
        let halted: Vec<&PartitionRow> = self.partitions.iter().filter(|row| row.halted.is_some()).collect();
        let first = halted.first()?;
        let reason = first.halted.as_ref().map_or("", |halted| halted.reason.as_str());
        let text = if halted.len() == 1 {
            format!("Partition {} is halted ({reason}) until a person decides", first.partition)
        } else {
            let numbers: Vec<String> = halted.iter().take(5).map(|row| row.partition.to_string()).collect();
            let more = if halted.len() > 5 { ", …" } else { "" };
            format!(
                "{} partitions are halted ({}{more}; {reason}) until a person decides",
                halted.len(),
                numbers.join(", ")
            )
        };
        Some((Level::Bad, text))
    }

    fn throttled(&self) -> Option<(Level, String)> {
        let rate = self.minute.per_second(self.minute.throttled_ms);
        (rate > THROTTLED_MS_PER_SECOND).then(|| {
            (
                Level::Warn,
                "Kafka slows this daemon down by a quota; nothing is lost, payments take longer".to_owned(),
            )
        })
    }

    fn dead_letters(&self) -> Option<(Level, String)> {
        let count = self.minute.outcomes.dead_letters;
        if count == 0 {
            return None;
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for letter in self.dead_letters.iter().filter(|letter| letter.at.0 > self.now.0 - 60_000) {
            *reasons.entry(letter.reason.as_str()).or_default() += 1;
        }
        let reason = reasons.into_iter().max_by_key(|(_, count)| *count).map(|(reason, _)| reason);
        let reason = reason.map(|reason| format!(", mostly {reason}")).unwrap_or_default();
        let text = format!(
            "{} in the last minute{reason}; they are kept in the dead-letter topic",
            counted(count, "dead letter")
        );
        Some((Level::Warn, text))
    }

    fn flow(&self) -> (Level, String) {
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
        let a_second = self.seconds.per_second(outcomes.written);
        let waiting: i64 = self.partitions.iter().filter_map(|row| row.lag_records).sum();
        let oldest = duration(self.oldest_ms);
        if self.oldest_ms >= BACKLOG_MS && waiting > 0 {
            let done_a_second = self.seconds.per_second(done);
            let falls = (self.minute.lag_before - waiting) as f64 / self.minute.seconds.max(1.0);
            let left = if falls > 0.0 {
                format!(", about {} left", duration((waiting as f64 / falls * 1_000.0) as i64))
            } else {
                ", and the backlog does not shrink".to_owned()
            };
            let text = format!(
                "Behind by {}, the oldest {oldest} old; working off {}{left}",
                counted(waiting.unsigned_abs(), "record"),
                rate(done_a_second, "record"),
            );
            return (Level::Warn, text);
        }
        if done == 0 && waiting == 0 {
            return (Level::Ok, "Idle: every record is written and published".to_owned());
        }
        (Level::Ok, format!("Writing {}; oldest waiting record {oldest}", rate(a_second, "payment")))
    }
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
fn counted(count: u64, noun: &str) -> String {
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
