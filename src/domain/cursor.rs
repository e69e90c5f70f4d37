//! Decides where an assigned partition is resumed, or why it must not be.
//!
//! *applied* is stored in Postgres and moves with the rows. The group's committed offset is stored in Kafka
//! and moves only inside the transaction that carries the events; the commit metadata identifies the topic
//! and the database. *published* is a copy of the committed offset in Postgres that lags by one batch. This
//! module is pure.

mod halt;

use std::fmt;

use uuid::Uuid;

pub use self::halt::{HaltReason, IdentityMismatch};
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

const METADATA_VERSION: &str = "pw1";

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
        if version != METADATA_VERSION || parts.next().is_some() {
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
        write!(
            f,
            "{METADATA_VERSION} {} {} {}",
            self.topic_id.simple(),
            self.position,
            self.database_id.simple()
        )
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
    pub fn commit_metadata(&self) -> Option<CommitMetadata> {
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
    /// An operator's decision about this halted partition, until a lane has committed it.
    pub settled: Option<Settlement>,
}

/// An operator's decision about a halted partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settlement {
    /// The offset to be committed for the group.
    pub committed: NextOffset,
    /// What the group had committed when it was decided, by [`replaced`](Self::replaced); `None` before step 9 of the
    /// schema, which does not tell.
    pub replaces: Option<String>,
}

impl Settlement {
    /// A committed offset with its metadata, as text; empty if there is none.
    pub fn replaced(group: Option<&GroupOffset>) -> String {
        let text = |group: &GroupOffset| format!("{} {}", group.position, group.metadata);
        // Postgres has no text with that.
        group.map(text).unwrap_or_default().replace('\0', "?")
    }
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
pub enum OutputScan {
    /// The outputs were not scanned.
    #[default]
    NotScanned,
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
    pub scan: OutputScan,
}

impl Known {
    /// The offset that an operator decided on. `None` if the group has gone beyond it since: a restored database may
    /// hold a decision that a lane took up after the backup, and events would be sent again.
    pub fn settlement(&self) -> Option<NextOffset> {
        let Settlement { committed, replaces } = self.row.as_ref()?.settled.as_ref()?;
        let (committed, group) = (*committed, self.group.as_ref());
        let is_below = |group: &GroupOffset| group.commit_metadata().is_some() && group.position <= committed;
        let is_unchanged = replaces.as_ref().is_none_or(|it| *it == Settlement::replaced(group));
        (is_unchanged || group.is_some_and(is_below)).then_some(committed)
    }

    /// The lowest of the cursors, for display: everything before it is certainly written and published.
    pub fn unpublished_from(&self) -> NextOffset {
        let row = self.row.as_ref();
        // An offset that another program committed proves nothing.
        let group = self.group.as_ref().filter(|group| group.commit_metadata().is_some());
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

/// What to do with an assigned partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Resume here.
    Go(Start),
    /// Scan the outputs first for events of records from this offset on.
    ScanOutputs {
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
    let metadata = group.as_ref().and_then(GroupOffset::commit_metadata);
    if let Some(metadata) = &metadata {
        if metadata.topic_id != identity.topic_id {
            return Decision::Stop(IdentityMismatch::OtherTopic {
                expected: metadata.topic_id,
                found: identity.topic_id,
            });
        }
        if metadata.database_id != identity.database_id && !mode.adopts_database {
            return Decision::Stop(IdentityMismatch::OtherDatabase {
                expected: metadata.database_id,
                found: identity.database_id,
            });
        }
    }
    let is_ours = metadata.as_ref().is_some_and(|m| m.database_id == identity.database_id);
    let found = if mode.publishes {
        publishing(known, metadata.is_some())
    } else {
        rows_only(known, metadata.is_some())
    };
    let (from, applied, publish_from) = match found {
        Ok(positions) => positions,
        Err(Decision::ScanOutputs { from }) => {
            let furthest = row.as_ref().map_or(from, |row| row.applied.max(from));
            if furthest > bounds.end {
                return Decision::Halt(HaltReason::BeyondEnd { position: furthest, end: bounds.end });
            }
            return Decision::ScanOutputs { from };
        }
        Err(decision) => return decision,
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

/// `from`, `applied` and `publish_from` of [`Start`], or why the partition cannot resume yet.
type Positions = Result<(NextOffset, NextOffset, NextOffset), Decision>;

/// Positions for a daemon that publishes.
fn publishing(known: &Known, has_metadata: bool) -> Positions {
    let Known { group, row, bounds, .. } = known;
    let committed = group.as_ref().map(|g| g.position);
    if let Some(row) = row
        && let Some(settled) = known.settlement()
    {
        // An operator has decided: commit `settled` in place of the committed offset.
        return Ok((row.applied.min(settled), row.applied, settled));
    }
    // `published` is a copy of the committed offset and lags behind it. A committed offset below it was
    // rolled back together with its metadata and proves nothing.
    let copied = row.as_ref().and_then(|row| row.published);
    match (row, committed.filter(|k| has_metadata && copied.is_none_or(|copied| copied <= *k))) {
        (Some(row), Some(k)) if k <= row.applied || copied == Some(k) => {
            Ok((row.applied.min(k), row.applied, k))
        }
        // A database that has not heard of this offset, because it is empty or older: rows are written again from
        // the log, events below the committed offset are not sent again. The group's offsets may be old as well, as
        // after a restore of both; the outputs show it.
        (row, Some(k)) => {
            // Records from the committed offset to the log's start were never published.
            if row.is_none() && bounds.start > k {
                return Err(Decision::Halt(HaltReason::LogGap { needed: k, log_start: bounds.start }));
            }
            let sent = match known.scan {
                OutputScan::NotScanned if k < bounds.end => return Err(Decision::ScanOutputs { from: k }),
                OutputScan::NotScanned => k,
                OutputScan::Unclear(seen) if seen > k => {
                    return Err(Decision::Halt(HaltReason::Unproved { from: seen, to: seen }));
                }
                OutputScan::Sent(seen) | OutputScan::Unclear(seen) => seen.max(k),
            };
            let applied = row.as_ref().map_or(bounds.start, |row| row.applied);
            Ok((applied.min(sent), applied, sent))
        }
        (Some(row), None) => {
            let from = row.published.unwrap_or(bounds.start);
            // The copy may be older than what was sent, as in a restored database: the output scan shows it.
            let seen = match known.scan {
                OutputScan::NotScanned => return Err(Decision::ScanOutputs { from }),
                OutputScan::Sent(seen) | OutputScan::Unclear(seen) => seen.max(from),
            };
            if let Some(k) = committed.filter(|k| *k > row.applied && *k > seen) {
                let reason = HaltReason::MovedForward { committed: k, applied: row.applied, published: seen };
                return Err(Decision::Halt(reason));
            }
            match known.scan {
                OutputScan::Unclear(_) if seen > from || row.published.is_none_or(|p| p < row.applied) => {
                    Err(Decision::Halt(HaltReason::Unproved { from: seen, to: row.applied.max(seen) }))
                }
                // `published` may be beyond `applied` after a restore.
                _ => Ok((row.applied.min(seen), row.applied, seen)),
            }
        }
        (None, None) => match committed.filter(|k| *k > bounds.start) {
            Some(k) => {
                let start = bounds.start;
                Err(Decision::Halt(HaltReason::MovedForward {
                    committed: k,
                    applied: start,
                    published: start,
                }))
            }
            // A new group with a new database; or both were lost, and only the outputs show what was sent.
            None => match known.scan {
                OutputScan::NotScanned => Err(Decision::ScanOutputs { from: bounds.start }),
                OutputScan::Unclear(seen) if seen > bounds.start => {
                    Err(Decision::Halt(HaltReason::Unproved { from: seen, to: seen }))
                }
                OutputScan::Sent(seen) | OutputScan::Unclear(seen) => {
                    Ok((bounds.start, bounds.start, seen.max(bounds.start)))
                }
            },
        },
    }
}

/// Positions for a daemon that writes rows only: `applied` of the row, or else the log's start, decides.
fn rows_only(known: &Known, has_metadata: bool) -> Positions {
    let Known { group, row, bounds, .. } = known;
    let applied = match (row, group.as_ref().filter(|_| has_metadata)) {
        (Some(row), _) => row.applied,
        // The group is older than the database: records from its offset to the log's start were never
        // written.
        (None, Some(group)) if bounds.start > group.position => {
            let reason = HaltReason::LogGap { needed: group.position, log_start: bounds.start };
            return Err(Decision::Halt(reason));
        }
        (None, _) => bounds.start,
    };
    Ok((applied, applied, applied))
}

#[cfg(test)]
mod tests;
