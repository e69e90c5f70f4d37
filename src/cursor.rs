//! Two cursors and one log: where a partition is taken up again, or why it must not be.
//!
//! *applied* lives in Postgres and moves with the rows. *K*, the group's committed offset, lives in
//! Kafka and moves only inside the transaction that carries the events; each commit bears our mark.
//! *published* is a copy of K in Postgres that trails by a batch. All of this module is pure.

use std::fmt;

use uuid::Uuid;

use crate::record::{NextOffset, Partition, TimestampMs};

/// What both sides must agree on before anything is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Id of the input topic; a topic that is deleted and made again gets another one.
    pub topic_id: Uuid,
    /// Id of the database, kept in it, so that it survives backup and restore.
    pub database_id: Uuid,
}

/// Our mark in the metadata of a committed offset. A committed offset without it was set by others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    /// The topic that the offset counts in.
    pub topic_id: Uuid,
    /// The offset again: tools that move an offset keep or drop the text, they don't adapt it.
    pub position: NextOffset,
    /// The database that holds the rows below the offset.
    pub database_id: Uuid,
}

const MARK_VERSION: &str = "pw1";

impl Mark {
    /// The mark that says that everything below `position` is written and published.
    pub fn new(identity: &Identity, position: NextOffset) -> Self {
        Self { topic_id: identity.topic_id, position, database_id: identity.database_id }
    }

    /// Reads a mark back; `None` for any text that is not exactly one.
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

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK_VERSION} {} {} {}", self.topic_id.simple(), self.position, self.database_id.simple())
    }
}

/// The group's committed offset of one partition, with the text that came with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupOffset {
    /// The committed offset.
    pub position: NextOffset,
    /// The commit's metadata text.
    pub metadata: String,
}

impl GroupOffset {
    /// The mark, if the text is one and speaks of this very offset.
    pub fn mark(&self) -> Option<Mark> {
        Mark::parse(&self.metadata).filter(|m| m.position == self.position)
    }
}

/// One row of `source_cursor`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CursorRow {
    /// Next offset to write.
    pub applied: NextOffset,
    /// Next offset to publish, as last copied; none in a database that never publishes.
    pub published: Option<NextOffset>,
    /// Timestamp of the last record before `applied`.
    pub applied_timestamp: Option<TimestampMs>,
    /// What a person decided about this partition and no lane has taken up yet: K is to be this.
    pub settled: Option<NextOffset>,
}

/// First offset still in the log, and the last stable offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogBounds {
    /// Offset of the oldest record that is still there.
    pub start: NextOffset,
    /// The last stable offset: next offset that a read_committed consumer will see.
    pub end: NextOffset,
}

/// What the outputs tell of how far events were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Proof {
    /// They were not asked.
    #[default]
    NotAsked,
    /// Of records from here on nothing was sent; everything before that is due was.
    Sent(NextOffset),
    /// They cannot tell how far: of records up to here something was sent, perhaps of later ones as well.
    Unclear(NextOffset),
}

/// Everything known of one partition at the moment of its assignment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// The partition.
    pub partition: Partition,
    /// K, if the group has one.
    pub group: Option<GroupOffset>,
    /// The database's row, if there is one.
    pub row: Option<CursorRow>,
    /// The log's bounds.
    pub bounds: LogBounds,
    /// What the outputs tell, once they were asked.
    pub proof: Proof,
}

impl Known {
    /// The lowest of the cursors, for people to look at: what lies before it was certainly dealt with.
    pub fn unpublished_from(&self) -> NextOffset {
        let row = self.row.as_ref();
        // An offset that other hands set proves nothing.
        let group = self.group.as_ref().filter(|group| group.mark().is_some());
        let cursors = [group.map(|g| g.position), row.map(|r| r.applied), row.and_then(|r| r.published)];
        cursors.into_iter().flatten().min().unwrap_or(self.bounds.start)
    }
}

/// How the daemon runs, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mode {
    /// `kafka.publish`: false writes rows only.
    pub publishes: bool,
    /// `--adopt-database`: marks of another database are accepted.
    pub adopts_database: bool,
}

/// Where and how a partition goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Start {
    /// S: first offset to read; also what `applied` is before the first batch.
    pub from: NextOffset,
    /// What `applied` is in the database: records below are looked up, never claimed.
    pub applied: NextOffset,
    /// G, the emission gate: events of records below it were sent.
    pub gate: NextOffset,
    /// K as it will stand once the lane has started.
    pub committed: NextOffset,
    /// Whether K has to be committed with our mark before anything else.
    pub must_commit: bool,
    /// Whether the database's row has to be written before the first batch.
    pub must_store: bool,
}

/// A doubt about one partition: it halts, the others go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// Records between the cursor and the log's start are gone and were never written or published.
    LogGap {
        /// First offset needed.
        needed: NextOffset,
        /// First offset there.
        log_start: NextOffset,
    },
    /// The cursor lies beyond the end of the log.
    BeyondEnd {
        /// The cursor.
        position: NextOffset,
        /// The log's end.
        end: NextOffset,
    },
    /// The group's offset was set by other hands beyond what was written.
    MovedForward {
        /// The group's offset.
        committed: NextOffset,
        /// What was written.
        applied: NextOffset,
        /// What is known to be published; between it and `applied` events may or may not have been sent.
        published: NextOffset,
    },
    /// The group's offset is gone or was set by other hands, and the outputs do not tell which events of these
    /// records were sent.
    Unproved {
        /// First record whose events may or may not have been sent.
        from: NextOffset,
        /// The record after the last one.
        to: NextOffset,
    },
    /// The broker's answers for this partition cannot be read, or it refuses them. Tried again all the time.
    Unreadable {
        /// The next offset to read.
        position: NextOffset,
        /// First offset of the batch that cannot be read, if it is a batch.
        batch: Option<NextOffset>,
        /// The offset after that batch, where it was looked for.
        after: Option<NextOffset>,
        /// What the client library calls it.
        code: String,
        /// What is known to help.
        remedy: &'static str,
    },
    /// Reading passed over records again and again. Tried again all the time.
    FetchGap {
        /// The next offset to read.
        from: NextOffset,
        /// Where reading went on.
        to: NextOffset,
    },
}

impl Doubt {
    /// Whether it goes away by itself once the partition can be read, without a person's decision.
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

    /// The first record, or place, that is in doubt.
    pub fn first_in_doubt(&self) -> NextOffset {
        match self {
            Self::LogGap { needed, .. } => *needed,
            Self::BeyondEnd { position, .. } => *position,
            Self::MovedForward { applied, .. } => *applied,
            Self::Unproved { from, .. } | Self::FetchGap { from, .. } => *from,
            Self::Unreadable { position, .. } => *position,
        }
    }

    /// What is wrong and which command settles it.
    pub fn advice(&self, partition: Partition) -> String {
        match self {
            Self::LogGap { needed, log_start } => format!(
                "partition {partition}: records {needed} to {log_start} are gone from the log and were never \
                 written and published; to give them up: payment-writer cursors skip --partition {partition} \
                 --to {log_start}"
            ),
            Self::BeyondEnd { position, end } => format!(
                "partition {partition}: the cursor {position} lies beyond the end {end} of the log, as after \
                 the loss of a broker's last records; to go on from the end: payment-writer cursors skip \
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
                    "partition {partition}: the group's offset was moved by hand to {committed}, over records \
                     from {applied} that were never written; to write them: payment-writer cursors accept \
                     --partition {partition} --published {first}{unless}; to give them up: payment-writer \
                     cursors skip --partition {partition} --to {committed}"
                )
            }
            Self::Unproved { from, to } => format!(
                "partition {partition}: the group's offset is gone or was set by other hands, and the outputs do \
                 not tell whether the events of records from {from} on were sent; if none was: payment-writer cursors \
                 accept --partition {partition} --published {from}; if all up to {to} were: --published {to}"
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
                            ". To give it up: {skip} OFFSET; payment-writer cursors show names the offset after it"
                        )
                    }
                    (None, None) => String::new(),
                };
                format!(
                    "partition {partition}: {place} ({code}); it is tried again at least every minute and goes on by \
                     itself. {remedy}{way_out}"
                )
            }
            Self::FetchGap { from, to } => format!(
                "partition {partition}: reading passed over records from {from} on, to {to}, three times in a row; \
                 nothing after {from} was written. It is tried again at least every minute; restart this instance, and \
                 report it: this is a fault of the client library"
            ),
        }
    }
}

/// A doubt about identity: the daemon stops, a person decides.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityDoubt {
    /// The group's offsets were committed for another topic of this name.
    #[error(
        "the group's offsets belong to topic id {marked}, but the topic now has id {found}: it was deleted and \
         made again, or this is another cluster. If the new topic is wanted, start with a new kafka.group_id and \
         a new, empty database; if not, point kafka.bootstrap_servers at the right cluster"
    )]
    OtherTopic {
        /// The id in the mark.
        marked: Uuid,
        /// The id found.
        found: Uuid,
    },
    /// The group's offsets speak of another database.
    #[error(
        "the group's offsets were committed together with database {marked}, but postgres.url leads to database \
         {found}. If this database is to take over (recovery), start once with run --adopt-database: rows are \
         written again from the log, events are not sent again; if not, correct postgres.url"
    )]
    OtherDatabase {
        /// The id in the mark.
        marked: Uuid,
        /// The id found.
        found: Uuid,
    },
    /// The database was bound to something else.
    #[error(
        "the database is bound to {bound}, but this daemon runs as {found}. If this database is to take over \
         (recovery), start once with run --adopt-database; if not, correct kafka.group_id, kafka.publish or \
         postgres.url"
    )]
    OtherGroup {
        /// What the database is bound to.
        bound: String,
        /// What the daemon is.
        found: String,
    },
    /// The cluster or topic is not the one that the database was written from.
    #[error(
        "the database was written from {bound}, but the log now is {found}: another cluster, or a topic that was \
         deleted and made again. If the new log is wanted, start with a new kafka.group_id and a new, empty \
         database; if not, correct kafka.bootstrap_servers or kafka.input_topic"
    )]
    OtherLog {
        /// What the database remembers.
        bound: String,
        /// What is there.
        found: String,
    },
    /// Somebody else uses our names.
    #[error(
        "another process uses kafka.instance_id {instance_id:?} in this group, and this one was fenced. Give each \
         instance a kafka.instance_id of its own, and start this one again"
    )]
    InstanceTaken {
        /// The setting.
        instance_id: String,
    },
}

/// What to do with a partition that was assigned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Go on here.
    Go(Start),
    /// Ask the outputs first which events of records from here on were sent.
    Prove {
        /// Events of records before this one were sent.
        from: NextOffset,
    },
    /// Halt it.
    Halt(Doubt),
    /// Stop the daemon.
    Stop(IdentityDoubt),
}

/// Decides where a partition is taken up. The rules are those of docs/architecture.md, "Assignment".
pub fn decide(known: &Known, identity: &Identity, mode: &Mode) -> Decision {
    let Known { group, row, bounds, .. } = known;
    let mark = group.as_ref().and_then(GroupOffset::mark);
    if let Some(mark) = &mark {
        if mark.topic_id != identity.topic_id {
            return Decision::Stop(IdentityDoubt::OtherTopic {
                marked: mark.topic_id,
                found: identity.topic_id,
            });
        }
        if mark.database_id != identity.database_id && !mode.adopts_database {
            return Decision::Stop(IdentityDoubt::OtherDatabase {
                marked: mark.database_id,
                found: identity.database_id,
            });
        }
    }
    let is_ours = mark.as_ref().is_some_and(|m| m.database_id == identity.database_id);
    let found =
        if mode.publishes { publishing(known, mark.is_some()) } else { rows_only(known, mark.is_some()) };
    let (from, applied, gate) = match found {
        Ok(positions) => positions,
        Err(Hold::Prove { from }) => {
            let furthest = row.as_ref().map_or(from, |row| row.applied.max(from));
            if furthest > bounds.end {
                return Decision::Halt(Doubt::BeyondEnd { position: furthest, end: bounds.end });
            }
            return Decision::Prove { from };
        }
        Err(Hold::Doubt(doubt)) => return Decision::Halt(doubt),
    };
    if bounds.start > from {
        return Decision::Halt(Doubt::LogGap { needed: from, log_start: bounds.start });
    }
    // Any of the three beyond the end would swallow records that are yet to come.
    let furthest = from.max(applied).max(gate);
    if furthest > bounds.end {
        return Decision::Halt(Doubt::BeyondEnd { position: furthest, end: bounds.end });
    }
    let committed = gate;
    let must_commit = !is_ours || group.as_ref().map(|g| g.position) != Some(committed);
    let stored = row.as_ref().is_some_and(|r| {
        r.applied == applied && r.settled.is_none() && r.published == mode.publishes.then_some(gate)
    });
    Decision::Go(Start { from, applied, gate, committed, must_commit, must_store: !stored })
}

/// Why a partition cannot go on as it is.
enum Hold {
    Prove { from: NextOffset },
    Doubt(Doubt),
}

impl From<Doubt> for Hold {
    fn from(doubt: Doubt) -> Self {
        Self::Doubt(doubt)
    }
}

/// S, applied and G of a daemon that publishes.
fn publishing(known: &Known, is_marked: bool) -> Result<(NextOffset, NextOffset, NextOffset), Hold> {
    let Known { group, row, bounds, .. } = known;
    let committed = group.as_ref().map(|g| g.position);
    if let Some(row) = row
        && let Some(settled) = row.settled
    {
        // A person has decided: K is to be `settled`, whatever it is now.
        return Ok((row.applied.min(settled), row.applied, settled));
    }
    // `published` is a copy of K that trails it: a K below it was rolled back, mark and all, and proves
    // nothing.
    let copied = row.as_ref().and_then(|row| row.published);
    match (row, committed.filter(|k| is_marked && copied.is_none_or(|copied| copied <= *k))) {
        (Some(row), Some(k)) => Ok((row.applied.min(k), row.applied, k)),
        (None, Some(k)) => {
            // An empty or older database: rows come again from the log, events below K do not. What
            // lies between K and the log's start was never published.
            if bounds.start > k {
                return Err(Doubt::LogGap { needed: k, log_start: bounds.start }.into());
            }
            Ok((bounds.start, bounds.start, k))
        }
        (Some(row), None) => {
            let from = row.published.unwrap_or(bounds.start);
            // A copy may be older than what was sent, as in a database that was restored: the outputs know.
            let seen = match known.proof {
                Proof::NotAsked => return Err(Hold::Prove { from }),
                Proof::Sent(seen) | Proof::Unclear(seen) => seen.max(from),
            };
            if let Some(k) = committed.filter(|k| *k > row.applied && *k > seen) {
                let doubt = Doubt::MovedForward { committed: k, applied: row.applied, published: seen };
                return Err(doubt.into());
            }
            match known.proof {
                Proof::Unclear(_) if seen > from || row.published.is_none_or(|p| p < row.applied) => {
                    Err(Doubt::Unproved { from: seen, to: row.applied.max(seen) }.into())
                }
                // `published` may be beyond `applied` after a restore.
                _ => Ok((row.applied.min(seen), row.applied, seen)),
            }
        }
        (None, None) => match committed.filter(|k| *k > bounds.start) {
            Some(k) => {
                let start = bounds.start;
                Err(Doubt::MovedForward { committed: k, applied: start, published: start }.into())
            }
            // A new group with a new database; or everything was lost, and the outputs remember.
            None => match known.proof {
                Proof::NotAsked => Err(Hold::Prove { from: bounds.start }),
                Proof::Unclear(seen) if seen > bounds.start => {
                    Err(Doubt::Unproved { from: seen, to: seen }.into())
                }
                Proof::Sent(seen) | Proof::Unclear(seen) => {
                    Ok((bounds.start, bounds.start, seen.max(bounds.start)))
                }
            },
        },
    }
}

/// S, applied and K of a daemon that writes rows only: the rows alone decide, or the log's start.
fn rows_only(known: &Known, is_marked: bool) -> Result<(NextOffset, NextOffset, NextOffset), Hold> {
    let Known { group, row, bounds, .. } = known;
    let applied = match (row, group.as_ref().filter(|_| is_marked)) {
        (Some(row), _) => row.applied,
        // The group was here before the database: what lies between it and the log's start was never
        // written.
        (None, Some(group)) if bounds.start > group.position => {
            return Err(Doubt::LogGap { needed: group.position, log_start: bounds.start }.into());
        }
        (None, _) => bounds.start,
    };
    Ok((applied, applied, applied))
}

#[cfg(test)]
mod tests;
