//! Decides where an assigned partition is resumed, or why it must not be.
//!
//! *applied* is stored in Postgres and moves with the rows. The group's committed offset is stored in Kafka
//! and moves only inside the transaction that carries the events; the commit metadata identifies the topic
//! and the database. *published* is a copy of the committed offset in Postgres that lags by one batch. This
//! module is pure.

use std::fmt;

use uuid::Uuid;

use crate::domain::record::{NextOffset, Partition, TimestampMs};

/// The topic and the database that belong together; checked before anything is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Id of the input topic; a topic that is deleted and recreated gets a new one.
    pub topic_id: Uuid,
    /// Id of the database, stored in it, so that it survives backup and restore.
    pub database_id: Uuid,
}

/// The commit metadata of this program. A committed offset without it was set by another program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommitMetadata {
    /// The topic that the offset belongs to.
    pub topic_id: Uuid,
    /// The committed offset again: tools that move an offset keep or drop the metadata, but do not adapt it.
    pub position: NextOffset,
    /// The database that holds the rows below the offset.
    pub database_id: Uuid,
}

const MARK_VERSION: &str = "pw1";

impl CommitMetadata {
    /// The metadata for a commit that says that everything below `position` is written and published.
    pub fn new(identity: &Identity, position: NextOffset) -> Self {
        Self { topic_id: identity.topic_id, position, database_id: identity.database_id }
    }

    /// Parses commit metadata; `None` for any text that does not have exactly this form.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let (version, topic_id, position, database_id) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if version != MARK_VERSION || parts.next().is_some() {
            return None;
        }
        Some(Self {
            topic_id: topic_id.parse().ok()?,
            position: NextOffset(position.parse().ok()?),
            database_id: database_id.parse().ok()?,
        })
    }
}

impl fmt::Display for CommitMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK_VERSION} {} {} {}", self.topic_id.simple(), self.position, self.database_id.simple())
    }
}

/// The group's committed offset of one partition, with its metadata.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupOffset {
    /// The committed offset.
    pub position: NextOffset,
    /// The commit's metadata text.
    pub metadata: String,
}

impl GroupOffset {
    /// The commit metadata, if this program wrote it and it belongs to this offset.
    pub fn mark(&self) -> Option<CommitMetadata> {
        CommitMetadata::parse(&self.metadata).filter(|m| m.position == self.position)
    }
}

/// One row of `source_cursor`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CursorRow {
    /// Next offset to write.
    pub applied: NextOffset,
    /// Next offset to publish, as last copied; `None` if the daemon does not publish.
    pub published: Option<NextOffset>,
    /// Timestamp of the last record before `applied`.
    pub applied_timestamp: Option<TimestampMs>,
    /// The committed offset that an operator chose for this halted partition, until a lane has committed it.
    pub settled: Option<NextOffset>,
}

/// First offset still in the log, and the last stable offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogBounds {
    /// Offset of the oldest record in the log.
    pub start: NextOffset,
    /// The last stable offset: the next offset that a `read_committed` consumer will see.
    pub end: NextOffset,
}

/// Result of the output scan: how far events were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Proof {
    /// The outputs were not scanned.
    #[default]
    NotAsked,
    /// All events of records before this offset were sent, and none of later records.
    Sent(NextOffset),
    /// The scan is inconclusive: outputs of records before this offset were found; later ones may exist as
    /// well.
    Unclear(NextOffset),
}

/// Everything known about one partition when it is assigned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// The partition.
    pub partition: Partition,
    /// The group's committed offset, if there is one.
    pub group: Option<GroupOffset>,
    /// The database's row, if there is one.
    pub row: Option<CursorRow>,
    /// The log's bounds.
    pub bounds: LogBounds,
    /// Result of the output scan.
    pub proof: Proof,
}

impl Known {
    /// The lowest of the cursors, for display: everything before it is certainly written and published.
    pub fn unpublished_from(&self) -> NextOffset {
        let row = self.row.as_ref();
        // An offset that another program committed proves nothing.
        let group = self.group.as_ref().filter(|group| group.mark().is_some());
        let cursors = [group.map(|g| g.position), row.map(|r| r.applied), row.and_then(|r| r.published)];
        cursors.into_iter().flatten().min().unwrap_or(self.bounds.start)
    }
}

/// The settings that affect the decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mode {
    /// `kafka.publish`: if false, the daemon writes rows only.
    pub publishes: bool,
    /// `--adopt-database`: commit metadata of another database is accepted.
    pub adopts_database: bool,
}

/// Where and how a partition resumes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Start {
    /// First offset to read.
    pub from: NextOffset,
    /// `applied` in the database: records below it are looked up, not claimed.
    pub applied: NextOffset,
    /// First offset whose events are published; those of records below it were already sent.
    pub publish_from: NextOffset,
    /// The group's committed offset once the lane has started.
    pub committed: NextOffset,
    /// Whether that offset must be committed, with commit metadata, before the first batch.
    pub must_commit: bool,
    /// Whether the row of `source_cursor` must be written before the first batch.
    pub must_store: bool,
}

/// Why one partition is halted; the others continue.
#[derive(Clone, PartialEq, Eq, Debug)]
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

    /// The label used in metrics and `/status`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::LogGap { .. } => "log_gap",
            Self::BeyondEnd { .. } => "beyond_end",
            Self::MovedForward { .. } => "moved_forward",
            Self::Unproved { .. } => "unproved_events",
            Self::Unreadable { .. } => "unreadable",
            Self::FetchGap { .. } => "fetch_gap",
        }
    }

    /// The first offset that the halt concerns.
    pub fn first_offset(&self) -> NextOffset {
        match self {
            Self::LogGap { needed, .. } => *needed,
            Self::BeyondEnd { position, .. } => *position,
            Self::MovedForward { applied, .. } => *applied,
            Self::Unproved { from, .. } | Self::FetchGap { from, .. } => *from,
            Self::Unreadable { position, .. } => *position,
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
                let unless = if published < applied {
                    format!(
                        " (if no events of records from {published} on were sent: --published {published})"
                    )
                } else {
                    String::new()
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
                    (Some(_), None) => {
                        format!(
                            ". To give it up: {skip} OFFSET; payment-writer cursors show prints that offset"
                        )
                    }
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
        "the group's offsets belong to topic id {marked}, but the topic now has id {found}: it was deleted \
         and recreated, or this is another cluster. To use the new topic, start with a new kafka.group_id \
         and a new, empty database; otherwise correct kafka.bootstrap_servers"
    )]
    OtherTopic {
        /// The id in the commit metadata.
        marked: Uuid,
        /// The id found now.
        found: Uuid,
    },
    /// The group's offsets were committed together with another database.
    #[error(
        "the group's offsets were committed together with database {marked}, but postgres.url leads to \
         database {found}. If this database replaces that one (recovery), start once with run \
         --adopt-database: rows are written again from the log, events are not sent again; otherwise correct \
         postgres.url"
    )]
    OtherDatabase {
        /// The id in the commit metadata.
        marked: Uuid,
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

/// What to do with an assigned partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Resume here.
    Go(Start),
    /// Scan the outputs first for events of records from this offset on.
    Prove {
        /// Events of records before this offset were sent.
        from: NextOffset,
    },
    /// Halt it.
    Halt(HaltReason),
    /// Stop the daemon.
    Stop(IdentityMismatch),
}

/// Decides where a partition resumes. The rules are those of docs/architecture.md, "Assignment".
pub fn decide(known: &Known, identity: &Identity, mode: &Mode) -> Decision {
    let Known { group, row, bounds, .. } = known;
    let mark = group.as_ref().and_then(GroupOffset::mark);
    if let Some(mark) = &mark {
        if mark.topic_id != identity.topic_id {
            return Decision::Stop(IdentityMismatch::OtherTopic {
                marked: mark.topic_id,
                found: identity.topic_id,
            });
        }
        if mark.database_id != identity.database_id && !mode.adopts_database {
            return Decision::Stop(IdentityMismatch::OtherDatabase {
                marked: mark.database_id,
                found: identity.database_id,
            });
        }
    }
    let is_ours = mark.as_ref().is_some_and(|m| m.database_id == identity.database_id);
    let found =
        if mode.publishes { publishing(known, mark.is_some()) } else { rows_only(known, mark.is_some()) };
    let (from, applied, publish_from) = match found {
        Ok(positions) => positions,
        Err(Hold::Prove { from }) => {
            let furthest = row.as_ref().map_or(from, |row| row.applied.max(from));
            if furthest > bounds.end {
                return Decision::Halt(HaltReason::BeyondEnd { position: furthest, end: bounds.end });
            }
            return Decision::Prove { from };
        }
        Err(Hold::HaltReason(reason)) => return Decision::Halt(reason),
    };
    if bounds.start > from {
        return Decision::Halt(HaltReason::LogGap { needed: from, log_start: bounds.start });
    }
    // If any of the three were beyond the end, records still to be produced would be skipped.
    let furthest = from.max(applied).max(publish_from);
    if furthest > bounds.end {
        return Decision::Halt(HaltReason::BeyondEnd { position: furthest, end: bounds.end });
    }
    let committed = publish_from;
    let must_commit = !is_ours || group.as_ref().map(|g| g.position) != Some(committed);
    let stored = row.as_ref().is_some_and(|r| {
        r.applied == applied && r.settled.is_none() && r.published == mode.publishes.then_some(publish_from)
    });
    Decision::Go(Start { from, applied, publish_from, committed, must_commit, must_store: !stored })
}

/// Why a partition cannot resume yet.
enum Hold {
    Prove { from: NextOffset },
    HaltReason(HaltReason),
}

impl From<HaltReason> for Hold {
    fn from(reason: HaltReason) -> Self {
        Self::HaltReason(reason)
    }
}

/// `from`, `applied` and `publish_from` of [`Start`] for a daemon that publishes.
fn publishing(known: &Known, is_marked: bool) -> Result<(NextOffset, NextOffset, NextOffset), Hold> {
    let Known { group, row, bounds, .. } = known;
    let committed = group.as_ref().map(|g| g.position);
    if let Some(row) = row
        && let Some(settled) = row.settled
    {
        // An operator has decided: commit `settled`, whatever the committed offset is now.
        return Ok((row.applied.min(settled), row.applied, settled));
    }
    // `published` is a copy of the committed offset and lags behind it. A committed offset below it was
    // rolled back together with its metadata and proves nothing.
    let copied = row.as_ref().and_then(|row| row.published);
    match (row, committed.filter(|k| is_marked && copied.is_none_or(|copied| copied <= *k))) {
        (Some(row), Some(k)) => Ok((row.applied.min(k), row.applied, k)),
        (None, Some(k)) => {
            // An empty or older database: rows are written again from the log, events below the committed
            // offset are not sent again. Records from the committed offset to the log's start were never
            // published.
            if bounds.start > k {
                return Err(HaltReason::LogGap { needed: k, log_start: bounds.start }.into());
            }
            Ok((bounds.start, bounds.start, k))
        }
        (Some(row), None) => {
            let from = row.published.unwrap_or(bounds.start);
            // The copy may be older than what was sent, as in a restored database: the output scan shows it.
            let seen = match known.proof {
                Proof::NotAsked => return Err(Hold::Prove { from }),
                Proof::Sent(seen) | Proof::Unclear(seen) => seen.max(from),
            };
            if let Some(k) = committed.filter(|k| *k > row.applied && *k > seen) {
                let reason = HaltReason::MovedForward { committed: k, applied: row.applied, published: seen };
                return Err(reason.into());
            }
            match known.proof {
                Proof::Unclear(_) if seen > from || row.published.is_none_or(|p| p < row.applied) => {
                    Err(HaltReason::Unproved { from: seen, to: row.applied.max(seen) }.into())
                }
                // `published` may be beyond `applied` after a restore.
                _ => Ok((row.applied.min(seen), row.applied, seen)),
            }
        }
        (None, None) => match committed.filter(|k| *k > bounds.start) {
            Some(k) => {
                let start = bounds.start;
                Err(HaltReason::MovedForward { committed: k, applied: start, published: start }.into())
            }
            // A new group with a new database; or both were lost, and only the outputs show what was sent.
            None => match known.proof {
                Proof::NotAsked => Err(Hold::Prove { from: bounds.start }),
                Proof::Unclear(seen) if seen > bounds.start => {
                    Err(HaltReason::Unproved { from: seen, to: seen }.into())
                }
                Proof::Sent(seen) | Proof::Unclear(seen) => {
                    Ok((bounds.start, bounds.start, seen.max(bounds.start)))
                }
            },
        },
    }
}

/// The same for a daemon that writes rows only: `applied` of the row, or else the log's start, decides.
fn rows_only(known: &Known, is_marked: bool) -> Result<(NextOffset, NextOffset, NextOffset), Hold> {
    let Known { group, row, bounds, .. } = known;
    let applied = match (row, group.as_ref().filter(|_| is_marked)) {
        (Some(row), _) => row.applied,
        // The group is older than the database: records from its offset to the log's start were never
        // written.
        (None, Some(group)) if bounds.start > group.position => {
            return Err(HaltReason::LogGap { needed: group.position, log_start: bounds.start }.into());
        }
        (None, _) => bounds.start,
    };
    Ok((applied, applied, applied))
}

#[cfg(test)]
mod tests;
