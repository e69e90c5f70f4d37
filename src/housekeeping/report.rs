//! What a pass did, and why.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::json;

use super::generations::{Generation, State};
use super::horizon::Hold;
use crate::domain::record::{Partition, TimestampMs};
use crate::error::CommandError;
use crate::postgres::connection::ConnectError;
use crate::postgres::schema::SchemaError;
use crate::postgres::schema::months::MonthsReport;

/// A pass is incomplete if a generation can be dropped within this time.
const DUE_SOON: Duration = Duration::from_secs(2 * 3_600);

/// Why a pass did not finish. The next one continues where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] SchemaError),
    /// The database cannot be reached.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// Tasks of the pass failed, each named with its error. The other tasks were done.
    #[error("{0}")]
    Tasks(String),
    /// The broker could not be queried, or an operator must decide.
    #[error("the horizon is unknown, so nothing was pruned: {0}")]
    Log(#[source] CommandError),
}

/// A task of a pass. Each is tried whether or not the others fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Task {
    /// Creating the table of the next generation.
    Generation,
    /// Making the next generation current.
    Rotation,
    /// Measuring and dropping generations; the horizon has its own metric.
    Pruning,
    /// Creating, filling and archiving months of the payment tables.
    Months,
}

/// What a pass does with one generation, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Kept: batches write their claims to it.
    Current,
    /// Kept: created for the next rotation.
    Ready,
    /// Dropped, or in a dry run to be dropped.
    Goes,
    /// Kept: its youngest record is within the window; it can be dropped when the horizon is past this time.
    TooYoung(TimestampMs),
    /// Kept: the horizon is unknown because of this partition.
    Held(Hold, Partition),
    /// Kept: not measured yet, as in a dry run after a rotation.
    Unmeasured,
    /// Kept: another session uses its table.
    Locked(State),
    /// Kept: the database refused to remove it.
    Failed(State),
}

/// Formats a time in seconds precision, for display.
pub fn time(at: TimestampMs) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.0.to_string(), |t| format!("{t:.0}"))
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current => f.write_str("stays: it is the current generation"),
            Self::Ready => f.write_str("stays: it is ready for the next rotation"),
            Self::Goes => f.write_str("goes"),
            Self::TooYoung(at) => {
                write!(f, "stays: it can be dropped when every partition is published beyond {}", time(*at))
            }
            Self::Held(why, partition) => write!(f, "stays: partition {partition} {why}"),
            Self::Unmeasured => f.write_str("stays: its youngest record is not known yet"),
            Self::Locked(state) => {
                write!(f, "stays, {state}: another session uses its table; the next pass continues")
            }
            Self::Failed(state) => {
                write!(f, "stays, {state}: it could not be removed; the next pass continues")
            }
        }
    }
}

/// What a pass did, or would do in a dry run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PassReport {
    /// Another pass was running; this one did nothing.
    pub is_busy: bool,
    /// Dry run: nothing was changed.
    pub is_dry_run: bool,
    /// Number of the new current generation.
    pub rotated_to: Option<i64>,
    /// A rotation is due, but the lock could not be taken, or this is a dry run.
    pub rotation_waits: bool,
    /// Each generation as it was, and what was decided.
    pub generations: Vec<(Generation, Verdict)>,
    /// The horizon and the slowest partition; `None` if the horizon was not needed or is unknown.
    pub horizon: Option<(TimestampMs, Option<Partition>)>,
    /// What was done with the monthly partitions of the payment tables.
    pub months: MonthsReport,
    /// The tasks that failed, and why.
    pub failed: Vec<(Task, String)>,
    /// In a dry run, rows in the payment tables' default partitions, counted up to a limit.
    pub default_rows: i64,
    /// Duration of the pass.
    pub took: Duration,
}

impl PassReport {
    /// Whether the pass left nothing that a retry before the next scheduled pass could do.
    pub fn is_complete(&self) -> bool {
        let soon = i64::try_from(DUE_SOON.as_millis()).unwrap_or(i64::MAX);
        let waits = |v: &Verdict| match v {
            Verdict::Held(..) | Verdict::Locked(_) | Verdict::Failed(_) | Verdict::Unmeasured => true,
            Verdict::TooYoung(goes_at) => self.horizon.is_some_and(|(at, _)| goes_at.0 - at.0 <= soon),
            Verdict::Current | Verdict::Ready | Verdict::Goes => false,
        };
        !self.is_busy
            && !self.rotation_waits
            && self.months.waiting.is_empty()
            && self.failed.is_empty()
            && !self.generations.iter().any(|(_, verdict)| waits(verdict))
    }

    /// The generations that were dropped, or would be dropped.
    pub fn gone(&self) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(|(_, v)| *v == Verdict::Goes).map(|(g, _)| g)
    }

    /// Why this task failed; `None` if it did not.
    pub fn error_of(&self, task: Task) -> Option<&str> {
        self.failed.iter().find(|(failed, _)| *failed == task).map(|(_, error)| error.as_str())
    }

    /// Notes the first error of a task.
    pub(super) fn note(&mut self, task: Task, outcome: Result<(), impl fmt::Display>) {
        if let Err(error) = outcome
            && self.error_of(task).is_none()
        {
            self.failed.push((task, error.to_string()));
        }
    }

    /// The tasks that failed, with their errors.
    pub(super) fn failures(&self) -> String {
        let named = |(task, error): &(Task, String)| format!("{}: {error}", <&str>::from(task));
        self.failed.iter().map(named).collect::<Vec<_>>().join("; ")
    }

    pub(super) fn detail(&self) -> serde_json::Value {
        json!({
            "rotated_to": self.rotated_to,
            "dropped": self.gone().map(|g| g.number).collect::<Vec<_>>(),
            "dropped_rows": self.gone().map(|g| g.rows).sum::<i64>(),
            "dropped_bytes": self.gone().map(|g| g.bytes).sum::<i64>(),
            "kept": self.generations.iter().filter(|(_, v)| *v != Verdict::Goes)
                .map(|(g, v)| json!({"generation": g.number, "why": v.to_string()})).collect::<Vec<_>>(),
            "horizon_ms": self.horizon.map(|(at, _)| at.0),
            "slowest_partition": self.horizon.and_then(|(_, slowest)| slowest).map(|p| p.0),
            "months_made": self.months.made,
            "months_archived": self.months.archived,
            "rows_moved": self.months.moved,
            "months_error": self.error_of(Task::Months),
            "failed": self.failed.iter().map(|(task, error)| (<&str>::from(task), error.as_str()))
                .collect::<BTreeMap<_, _>>(),
        })
    }
}
