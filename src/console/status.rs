//! State of partitions and lanes as JSON: what `/status` and the console answer, and what peers' answers are read into.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use strum::VariantArray;

use crate::domain::outcome::FailureClass;
use crate::domain::record::{Partition, TimestampMs};
use crate::kafka::group::lane_of;
use crate::telemetry::activity::LaneStep;
use crate::telemetry::status::{Dependency, PartitionStatus, Phase, StatusRegistry};

/// Milliseconds as seconds.
pub(super) fn seconds(ms: i64) -> f64 {
    ms as f64 / 1_000.0
}

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

/// An assigned partition. Daemons of earlier versions leave fields out.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PartitionRow {
    /// Its number.
    pub partition: i32,
    /// The `kafka.instance_id` of its daemon.
    pub instance: String,
    /// `opening`, `live` or `halted`.
    pub state: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: Option<i64>,
    /// Its lane.
    pub lane: Option<usize>,
    /// Next offset to write.
    pub applied: Option<i64>,
    /// Next offset to publish.
    pub published: Option<i64>,
    /// The lower of the two in recovery or while halted.
    pub unpublished_from: Option<i64>,
    /// Last stable offset.
    pub end: Option<i64>,
    /// Records that are not written and published.
    pub lag_records: Option<i64>,
    /// Age of the oldest of them.
    pub lag_seconds: Option<f64>,
    /// Since when records wait and none of them was written and published, in milliseconds since 1970.
    pub stuck_since_ms: Option<i64>,
    /// Records behind an open transaction.
    pub open_transaction_records: i64,
    /// Its age.
    pub open_transaction_seconds: f64,
    /// Of a halted one.
    pub halted: Option<HaltedRow>,
}

/// Why a partition is halted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HaltedRow {
    /// Halt reason.
    pub reason: String,
    /// Former name of `reason`, kept until 1.0.
    pub doubt: String,
    /// What is wrong, and what resolves it.
    pub advice: String,
    /// The command that resolves it, or the one that shows more if a person has to choose first.
    pub command: Option<String>,
    /// Whether it is tried again, and goes on by itself.
    pub is_retried: bool,
    /// Whether records are, or may be, gone from the log. For the sentence of this process alone.
    #[serde(skip)]
    pub may_lose_records: bool,
}

impl PartitionRow {
    /// The row of a partition of this process.
    pub fn new(
        partition: Partition,
        status: &PartitionStatus,
        instance: &str,
        lanes: usize,
        now: TimestampMs,
    ) -> Self {
        let open = status.open_transaction();
        let halted = match &status.phase {
            Phase::Halted(reason) => Some(HaltedRow {
                reason: reason.label().to_owned(),
                doubt: reason.label().to_owned(),
                advice: reason.advice(partition),
                command: reason.command(partition),
                is_retried: reason.is_about_reading(),
                may_lose_records: reason.may_lose_records(),
            }),
            Phase::Opening | Phase::Live => None,
        };
        Self {
            partition: partition.0,
            instance: instance.to_owned(),
            state: <&str>::from(&status.phase).to_owned(),
            since_ms: Some(status.since.0),
            lane: Some(lane_of(partition, lanes)),
            applied: status.applied.or(status.found_applied).map(|o| o.0),
            published: status.published.map(|o| o.0),
            unpublished_from: status.unpublished_from.map(|o| o.0),
            end: status.end.map(|o| o.0),
            lag_records: status.lag(),
            lag_seconds: Some(seconds(status.lag_ms(now))),
            stuck_since_ms: status.stuck_since().map(|at| at.0),
            open_transaction_records: open.map_or(0, |open| open.records),
            open_transaction_seconds: seconds(open.map_or(0, |open| open.age_ms(now))),
            halted,
        }
    }
}

/// Without the failure's class at its end, which the log has, and which says nothing to who looks at the page.
pub fn without_class(mut reason: String) -> String {
    let is_class =
        |text: &str| FailureClass::VARIANTS.iter().any(|class| text == format!("({})", class.as_str()));
    if let Some((text, _)) = reason.rsplit_once(' ').filter(|(_, last)| is_class(last)) {
        reason.truncate(text.len());
    }
    reason
}

/// What a lane does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LaneRow {
    /// Its number.
    pub lane: usize,
    /// Name of the step, `backing_off` or `idle`.
    pub doing: &'static str,
    /// Since when, in milliseconds since 1970; `None` while it waits.
    pub since_ms: Option<i64>,
    /// Records of the last batch.
    pub records: usize,
    /// Number of its partitions.
    pub partitions: usize,
    /// Of these, halted.
    pub halted: usize,
    /// Why the database does not answer it.
    pub database: Option<String>,
    /// Why the broker does not answer it.
    pub broker: Option<String>,
}

/// The lanes of this process.
pub fn lanes(status: &StatusRegistry, partitions: &[PartitionRow], lanes: usize) -> Vec<LaneRow> {
    let dependencies = status.lanes();
    let reason = |dependency: Option<&Dependency>| match dependency {
        Some(Dependency::Down(reason)) => Some(without_class(reason.clone())),
        _ => None,
    };
    (0..lanes)
        .map(|lane| {
            let ours = || partitions.iter().filter(|row| row.lane == Some(lane));
            let (count, activity) = (ours().count(), status.work().activity(lane));
            let of_lane = dependencies.get(&lane);
            let database = reason(of_lane.map(|of| &of.0));
            let broker = reason(of_lane.map(|of| &of.1));
            let is_backing_off = database.is_some() || broker.is_some();
            let (doing, since) = match activity.step() {
                Some((step, since)) if step != LaneStep::Waiting => (step.into(), Some(since)),
                _ if count == 0 => ("idle", None),
                _ if is_backing_off => ("backing_off", None),
                _ => ("waiting", None),
            };
            LaneRow {
                lane,
                doing,
                since_ms: since.map(|at| at.0),
                records: activity.records(),
                partitions: count,
                halted: ours().filter(|row| row.halted.is_some()).count(),
                database,
                broker,
            }
        })
        .collect()
}

/// The parts of another daemon's `/status` that are used.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct StatusAnswer {
    /// `build`
    pub build: Build,
    /// Its `kafka.instance_id`.
    pub instance: String,
    /// Its `kafka.group_id`.
    pub group: String,
    /// When it was started, in milliseconds since 1970.
    pub started_ms: i64,
    /// How things are, in words.
    pub summary: Option<Summary>,
    /// What keeps it from being ready.
    pub missing: BTreeMap<String, String>,
    /// By number.
    pub partitions: BTreeMap<String, PartitionRow>,
    /// The last warnings and errors.
    pub recent_problems: Vec<Problem>,
}

/// `build`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Build {
    /// Version of the program.
    pub version: String,
}

/// A line of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// When it was logged.
    pub at: String,
    /// `WARN` or `ERROR`.
    pub level: String,
    /// Message with fields.
    pub message: String,
}
