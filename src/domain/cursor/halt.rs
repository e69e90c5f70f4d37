//! Why a partition is halted, and why the daemon stops.

use uuid::Uuid;

use crate::domain::record::{NextOffset, Partition};

/// Why one partition is halted; the others continue.
#[derive(Clone, PartialEq, Eq, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum HaltReason {
    /// Records between the cursor and the log's start were deleted before they were written and published.
    LogGap {
        /// First offset needed.
        needed: NextOffset,
        /// First offset in the log.
        log_start: NextOffset,
    },
    /// The cursor is beyond the end of the log.
    BeyondEnd {
        /// The cursor.
        position: NextOffset,
        /// The log's end.
        end: NextOffset,
    },
    /// Other software moved the group's offset beyond the last written record.
    MovedForward {
        /// The group's offset.
        committed: NextOffset,
        /// Next offset to write.
        applied: NextOffset,
        /// Next offset to publish, as far as known; from it to `applied`, events may or may not have been
        /// sent.
        published: NextOffset,
    },
    /// The group's offset is missing or was set by another program, and the output scan does not show which
    /// events of these records were sent.
    #[strum(serialize = "unproved_events")]
    Unproved {
        /// First record whose events may or may not have been sent.
        from: NextOffset,
        /// The record after the last one.
        to: NextOffset,
    },
    /// The broker's fetch responses for this partition are errors or cannot be parsed. Retried until it
    /// works.
    Unreadable {
        /// The next offset to read.
        position: NextOffset,
        /// First offset of the record batch that cannot be read, if the cause is a record batch.
        batch: Option<NextOffset>,
        /// The offset after that record batch, if it was determined.
        after: Option<NextOffset>,
        /// Error code of the client library.
        code: String,
        /// The known remedy.
        remedy: &'static str,
    },
    /// The client skipped records repeatedly. Retried until it works.
    FetchGap {
        /// The next offset to read.
        from: NextOffset,
        /// The offset that the client continued at.
        to: NextOffset,
    },
}

impl HaltReason {
    /// Whether the partition resumes by itself once it can be read, without an operator's decision.
    pub fn is_about_reading(&self) -> bool {
        matches!(self, Self::Unreadable { .. } | Self::FetchGap { .. })
    }

    /// Whether records are, or may be, gone from the log.
    pub fn may_lose_records(&self) -> bool {
        match self {
            Self::LogGap { .. } | Self::BeyondEnd { .. } | Self::Unreadable { .. } => true,
            Self::MovedForward { .. } | Self::Unproved { .. } | Self::FetchGap { .. } => false,
        }
    }

    /// The label used in metrics and `/status`.
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// The first offset that the halt concerns.
    pub fn first_offset(&self) -> NextOffset {
        match self {
            Self::LogGap { needed, .. } => *needed,
            Self::BeyondEnd { position, .. } | Self::Unreadable { position, .. } => *position,
            Self::MovedForward { applied, .. } => *applied,
            Self::Unproved { from, .. } | Self::FetchGap { from, .. } => *from,
        }
    }

    /// The command that resolves it, or the one that shows more if a person has to choose; `None` if none does.
    pub fn command(&self, partition: Partition) -> Option<String> {
        let skip = |to: &NextOffset| format!("payment-writer cursors skip --partition {partition} --to {to}");
        match self {
            Self::LogGap { log_start: to, .. }
            | Self::BeyondEnd { end: to, .. }
            | Self::Unreadable { after: Some(to), .. } => Some(skip(to)),
            Self::MovedForward { applied, published, .. } => Some(format!(
                "payment-writer cursors accept --partition {partition} --published {}",
                applied.max(published)
            )),
            Self::Unproved { .. } | Self::Unreadable { batch: Some(_), after: None, .. } => {
                Some("payment-writer cursors show".to_owned())
            }
            Self::Unreadable { .. } | Self::FetchGap { .. } => None,
        }
    }

    /// What is wrong and which command resolves it.
    pub fn advice(&self, partition: Partition) -> String {
        match self {
            Self::LogGap { needed, log_start } => format!(
                "partition {partition}: records {needed} to {log_start} were deleted from the log before \
                 they were written and published; to give them up: payment-writer cursors skip --partition \
                 {partition} --to {log_start}"
            ),
            Self::BeyondEnd { position, end } => format!(
                "partition {partition}: the cursor {position} is beyond the end {end} of the log, as after a \
                 broker lost its last records; to continue from the end: payment-writer cursors skip \
                 --partition {partition} --to {end}"
            ),
            Self::MovedForward { committed, applied, published } => {
                let first = applied.max(published);
                let unless = match published < applied {
                    true => format!(
                        " (if no events of records from {published} on were sent: --published {published})"
                    ),
                    false => String::new(),
                };
                format!(
                    "partition {partition}: the group's offset was moved to {committed} by another program, \
                     past records from {applied} on that were not written; to write them: payment-writer \
                     cursors accept --partition {partition} --published {first}{unless}; to give them up: \
                     payment-writer cursors skip --partition {partition} --to {committed}"
                )
            }
            Self::Unproved { from, to } => format!(
                "partition {partition}: the group's offset is missing or was set by another program, and \
                 the output topics do not show whether the events of records from {from} on were sent; if \
                 none was sent: payment-writer cursors accept --partition {partition} --published {from}; if \
                 all of records before {to} were: --published {to}"
            ),
            Self::Unreadable { position, batch, after, code, remedy } => {
                let place = batch.map_or_else(
                    || format!("offset {position} cannot be fetched"),
                    |batch| format!("the batch at offset {batch} cannot be read"),
                );
                let skip = format!("payment-writer cursors skip --partition {partition} --to");
                let way_out = match (batch, after) {
                    (_, Some(after)) => format!(". To give it up: {skip} {after}"),
                    (Some(_), None) => format!(
                        ". To give it up: {skip} OFFSET; payment-writer cursors show prints that offset"
                    ),
                    (None, None) => String::new(),
                };
                format!(
                    "partition {partition}: {place} ({code}); it is retried at least every minute and \
                     resumes by itself. {remedy}{way_out}"
                )
            }
            Self::FetchGap { from, to } => format!(
                "partition {partition}: the client skipped records from {from} on, to {to}, three times in \
                 a row; nothing from {from} on was written. It is retried at least every minute; restart \
                 this instance, and report this: it is a fault of the client library"
            ),
        }
    }
}

/// The topic, the database, the group or the instance is not the expected one: the daemon stops, and an
/// operator must decide.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityMismatch {
    /// The group's offsets were committed for another topic of this name.
    #[error(
        "the group's offsets belong to topic id {expected}, but the topic now has id {found}: it was deleted \
         and recreated, or this is another cluster. To use the new topic, start with a new kafka.group_id \
         and a new, empty database; otherwise correct kafka.bootstrap_servers"
    )]
    OtherTopic {
        /// The id in the commit metadata.
        expected: Uuid,
        /// The id found now.
        found: Uuid,
    },
    /// The group's offsets were committed together with another database.
    #[error(
        "the group's offsets were committed together with database {expected}, but postgres.url leads to \
         database {found}. If this database replaces that one (recovery), start once with run \
         --adopt-database: rows are written again from the log, events are not sent again; otherwise correct \
         postgres.url"
    )]
    OtherDatabase {
        /// The id in the commit metadata.
        expected: Uuid,
        /// The id found now.
        found: Uuid,
    },
    /// The database is bound to another group or mode.
    #[error(
        "the database is bound to {bound}, but this daemon runs as {found}. If this daemon is to use the \
         database (recovery), start once with run --adopt-database; otherwise correct kafka.group_id, \
         kafka.publish or postgres.url"
    )]
    OtherGroup {
        /// What the database is bound to.
        bound: String,
        /// What the daemon runs as.
        found: String,
    },
    /// The cluster or topic is not the one that the database was written from.
    #[error(
        "the database was written from {bound}, but the input topic now is {found}: another cluster, or a \
         topic that was deleted and recreated. To use the new topic, start with a new kafka.group_id and a \
         new, empty database; otherwise correct kafka.bootstrap_servers or kafka.input_topic"
    )]
    OtherLog {
        /// The cluster and topic recorded in the database.
        bound: String,
        /// The cluster and topic found.
        found: String,
    },
    /// Another process uses the same instance id.
    #[error(
        "another process uses kafka.instance_id {instance_id:?} in this group, and this one was fenced. \
         Give each instance its own kafka.instance_id and start this one again"
    )]
    InstanceTaken {
        /// The value of `kafka.instance_id`.
        instance_id: String,
    },
}
