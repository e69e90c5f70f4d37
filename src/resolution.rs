//! Resolves halted partitions by an operator's decision. The decision is written to the database with an
//! audit row; the partition's lane reads it and commits the group's offset in its own transaction.

mod all_halted;
mod plan_file;

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Transaction;
use uuid::Uuid;

pub use self::all_halted::{check, propose};
pub use self::plan_file::{PlanFile, PlanLine};
use crate::config::Settings;
use crate::domain::cursor::{
    CursorRow, Decision, HaltReason, Identity, Known, LogBounds, Mode, OutputScan, Settlement, decide,
};
use crate::domain::record::{NextOffset, Partition};
use crate::error::{CommandError, OrFailed};
use crate::kafka::group::Group;
use crate::kafka::librdkafka::topic_id;
use crate::kafka::offsets::{group_offsets, log_bounds};
use crate::kafka::probe::{Probed, probe};
use crate::ports::{KafkaPortError, Store};
use crate::postgres::binding::{self, BindingError};
use crate::postgres::connection::{backend_pid, describe};
use crate::postgres::schema;
use crate::postgres::store::PgStore;
use crate::postgres::waits::Waits;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Both cursors of every partition at one time.
pub struct View {
    /// Ids of the topic and the database.
    pub identity: Identity,
    /// What is known about each partition, from 0 on.
    pub known: Vec<Known>,
    topic: String,
}

/// Why nothing was read at a partition's cursor.
pub enum Unread {
    /// No answer in time.
    NoAnswer,
    /// The next batch cannot be read.
    Unreadable(HaltReason),
}

/// The error of a database that does not belong to the group, or cannot be asked.
pub(crate) fn not_bound(error: BindingError) -> CommandError {
    match error {
        BindingError::Database(_) => CommandError::failed(error.to_string()),
        BindingError::Identity(mismatch) => CommandError::person_must_decide(mismatch.to_string()),
    }
}

/// Runs requests to Kafka in another thread.
async fn blocking<T: Send + 'static, E: Display + Send + 'static>(
    request: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, CommandError> {
    tokio::task::spawn_blocking(request).await.or_failed()?.or_failed()
}

impl View {
    /// What a lane would decide about this partition; `None` if the topic does not have it.
    pub fn decision(&self, partition: usize, mode: &Mode) -> Option<Decision> {
        self.known.get(partition).map(|known| decide(known, &self.identity, mode))
    }

    /// Reads one record batch of each partition, or of `only` this one, where it resumes, with a time limit.
    /// Returns the partitions where that failed.
    ///
    /// # Errors
    /// If the client cannot be created.
    pub async fn probe(
        &self,
        settings: &Settings,
        mode: &Mode,
        only: Option<Partition>,
    ) -> Result<BTreeMap<Partition, Unread>, CommandError> {
        let wanted = |known: &&Known| only.is_none_or(|only| only == known.partition);
        let position = |known: &Known| {
            let position = match decide(known, &self.identity, mode) {
                Decision::Go(start) => start.from,
                Decision::ScanOutputs { from } => {
                    known.row.as_ref().map_or(from, |row| row.applied.min(from))
                }
                Decision::Halt(_) | Decision::Stop(_) => return None,
            };
            Some((known.partition, position, known.bounds))
        };
        let positions: Vec<_> = self.known.iter().filter(wanted).filter_map(position).collect();
        let places: BTreeMap<_, _> = positions.iter().map(|(partition, at, _)| (*partition, *at)).collect();
        let kafka = settings.kafka.clone();
        let probed = blocking(move || probe(&kafka, &positions)).await?;
        let unread = |(partition, probed)| match probed {
            Probed::Readable => None,
            Probed::NoAnswer => Some((partition, Unread::NoAnswer)),
            Probed::Unreadable { fault, after } => {
                let reason = fault.reason(*places.get(&partition)?, after);
                Some((partition, Unread::Unreadable(reason)))
            }
        };
        Ok(probed.into_iter().filter_map(unread).collect())
    }
}

/// An operator's decision about a halted partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HaltResolution {
    /// Events of records before `published` were sent; those of later records are to be sent.
    Accept {
        /// The first record whose events are to be sent.
        published: NextOffset,
    },
    /// Resume at `to` and give up the records before it.
    Skip {
        /// The next offset to read.
        to: NextOffset,
    },
}

impl HaltResolution {
    /// The offset that the lane commits in the group.
    fn committed(self) -> NextOffset {
        match self {
            Self::Accept { published: committed } | Self::Skip { to: committed } => committed,
        }
    }
}

/// As on the command line, after `cursors`.
impl Display for HaltResolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept { published } => write!(f, "accept --published {published}"),
            Self::Skip { to } => write!(f, "skip --to {to}"),
        }
    }
}

/// A checked decision that can be applied.
pub struct Plan {
    partition: Partition,
    topic: String,
    topic_id: Uuid,
    reason: HaltReason,
    resolution: HaltResolution,
    before: Option<CursorRow>,
    after: CursorRow,
}

impl Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition, topic, after, .. } = self;
        let offset = |offset: Option<NextOffset>| offset.map_or_else(|| "none".to_owned(), |o| o.to_string());
        let before = self.before.as_ref();
        writeln!(f, "partition {partition} of {topic}: {}", self.reason.advice(*partition))?;
        writeln!(
            f,
            "applied {} -> {}, published and the group's offset {} -> {}",
            offset(before.map(|r| r.applied)),
            after.applied,
            offset(before.and_then(|r| r.published)),
            self.resolution.committed(),
        )?;
        match self.resolution {
            HaltResolution::Accept { published } if published < after.applied => write!(
                f,
                "events of records {published} to {} are sent, even if they were sent before",
                after.applied
            ),
            HaltResolution::Accept { published } => {
                write!(f, "events of records before {published} count as sent and are never sent again")
            }
            HaltResolution::Skip { to } => {
                write!(f, "records before {to} that were not written or published are given up permanently")
            }
        }
    }
}

/// Reads both cursors of every partition.
pub async fn view(settings: &Settings) -> Result<View, CommandError> {
    let (client, _) = settings.postgres.url.connect().await.or_failed()?;
    schema::check(&client).await.or_failed()?;
    let database_id = binding::database_id(&client).await.map_err(|e| describe(&e)).or_failed()?;
    let group = Arc::new(Group::observer(&settings.kafka).or_failed()?);
    let asked = Arc::clone(&group);
    let (topic_id, count) =
        blocking(move || topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT)).await?;
    let partitions: Vec<Partition> = (0..i32::try_from(count).unwrap_or(i32::MAX)).map(Partition).collect();
    let identity = Identity { topic_id, database_id };
    let pool = settings.postgres.url.pool(1).or_failed()?;
    let topic = settings.kafka.input_topic.clone();
    // The log's bounds are read last, so that a cursor that moves meanwhile is not beyond them.
    let rows = PgStore::new(pool, topic.clone(), identity.clone()).cursors(&partitions).await.or_failed()?;
    let ask = move || {
        Ok::<_, KafkaPortError>((group_offsets(&group, &partitions)?, log_bounds(&group, &partitions)?))
    };
    let (offsets, bounds) = blocking(ask).await?;
    let known = rows
        .into_iter()
        .zip(offsets)
        .zip(bounds)
        .map(|(((partition, row), group), bounds)| Known {
            partition,
            group,
            row,
            bounds,
            // Only a lane scans the outputs; this view shows what it cannot resolve by itself.
            scan: OutputScan::Unclear(NextOffset(0)),
        })
        .collect();
    Ok(View { identity, known, topic })
}

/// Fails unless the database belongs to the group, the topic and the mode of the settings.
async fn is_ours(settings: &Settings, view: &View) -> Result<(), CommandError> {
    let (client, _) = settings.postgres.url.connect().await.or_failed()?;
    let kafka = &settings.kafka;
    binding::is_bound_to(&client, &kafka.group_id, view.identity.topic_id, kafka.publish)
        .await
        .map_err(not_bound)
}

/// Checks a decision against the partition's current state: only a halted partition can be resolved.
pub async fn plan(
    settings: &Settings,
    partition: Partition,
    resolution: HaltResolution,
) -> Result<Plan, CommandError> {
    let view = view(settings).await?;
    is_ours(settings, &view).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    let Some(known) = view.known.iter().find(|known| known.partition == partition) else {
        return Err(CommandError::usage(format!("{} has no partition {partition}", view.topic)));
    };
    let reason = match decide(known, &view.identity, &mode) {
        Decision::Halt(reason) => Some(reason),
        Decision::Stop(mismatch) => return Err(CommandError::person_must_decide(mismatch.to_string())),
        // An unreadable partition can be skipped although its cursors agree.
        Decision::Go(_) | Decision::ScanOutputs { .. } => match resolution {
            HaltResolution::Accept { .. } => None,
            HaltResolution::Skip { .. } => {
                match view.probe(settings, &mode, Some(partition)).await?.remove(&partition) {
                    Some(Unread::Unreadable(reason)) => Some(reason),
                    Some(Unread::NoAnswer) | None => None,
                }
            }
        },
    };
    let Some(reason) = reason else {
        return Err(CommandError::failed(format!(
            "partition {partition} is not halted; there is nothing to resolve"
        )));
    };
    checked(&view, known, &mode, reason, resolution)
}

/// Checks a decision against what is known of the halted partition.
fn checked(
    view: &View,
    known: &Known,
    mode: &Mode,
    reason: HaltReason,
    resolution: HaltResolution,
) -> Result<Plan, CommandError> {
    let partition = known.partition;
    let (before, committed) = (known.row.clone(), resolution.committed());
    let LogBounds { start, end } = known.bounds;
    let written = before.as_ref().map_or(start, |row| row.applied);
    let after = CursorRow {
        applied: match resolution {
            HaltResolution::Accept { .. } => written,
            HaltResolution::Skip { to } => to,
        },
        published: mode.publishes.then_some(committed),
        applied_timestamp: None,
        settled: Some(Settlement { committed, replaces: Some(Settlement::replaced(known.group.as_ref())) }),
    };
    if committed < start || committed > end {
        return Err(CommandError::usage(format!(
            "offset {committed} is not in the log of partition {partition}, which has offsets {start} to {end}"
        )));
    }
    // In a restored database, `published` can be beyond `applied`.
    let sent_max = before.as_ref().and_then(|row| row.published).max(Some(written));
    if let HaltResolution::Accept { published } = resolution
        && !matches!(reason, HaltReason::Unproved { .. })
        && Some(published) > sent_max
    {
        return Err(CommandError::usage(format!(
            "records from {written} on are not written yet, so their events cannot have been sent; to give \
             them up, use cursors skip"
        )));
    }
    let resolved = Known { row: Some(after.clone()), ..known.clone() };
    if let Decision::Halt(reason) = decide(&resolved, &view.identity, mode) {
        let advice = reason.advice(partition);
        return Err(CommandError::usage(format!("the partition would stay halted: {advice}")));
    }
    let (topic, topic_id) = (view.topic.clone(), view.identity.topic_id);
    Ok(Plan { partition, topic, topic_id, reason, resolution, before, after })
}

/// Writes the decisions, each with its reason, in one transaction: none if any of the cursors was moved since
/// it was checked. If the connection is lost while it commits, either all of them are written or none.
pub async fn apply(settings: &Settings, plans: &[(Plan, &str)]) -> Result<(), CommandError> {
    let endpoint = &settings.postgres.url;
    let (mut client, _) = endpoint.connect().await.or_failed()?;
    let pid = backend_pid(&client).await.map_err(|error| describe(&error)).or_failed()?;
    let write = async {
        let transaction = client.transaction().await?;
        let mut moved = Vec::new();
        for (plan, reason) in plans {
            if !write(&transaction, plan, reason).await? {
                moved.push(plan.partition.to_string());
            }
        }
        if moved.is_empty() {
            transaction.commit().await?;
        }
        Ok::<_, tokio_postgres::Error>(moved)
    };
    let written = Waits::on_stderr(endpoint).or_failed()?.explain(pid, "writing cursors", write).await.0;
    let moved = written.map_err(|error| describe(&error)).or_failed()?;
    if moved.is_empty() {
        return Ok(());
    }
    Err(CommandError::failed(format!(
        "nothing was changed: the cursor of partition {} was moved meanwhile; look at cursors show and try again",
        moved.join(", ")
    )))
}

/// Writes one decision; false if its cursor is not as it was checked.
async fn write(
    transaction: &Transaction<'_>,
    plan: &Plan,
    reason: &str,
) -> Result<bool, tokio_postgres::Error> {
    let Plan { partition: Partition(partition), topic, topic_id, resolution, before, after, .. } = plan;
    let (applied, published) = (after.applied.0, after.published.map(|p| p.0));
    let replaces = after.settled.as_ref().and_then(|settled| settled.replaces.as_ref());
    let applied_before = before.as_ref().map(|row| row.applied.0);
    let published_before = before.as_ref().and_then(|row| row.published).map(|p| p.0);
    let changed = match applied_before {
        Some(applied_before) => {
            transaction
                .execute(
                    "UPDATE payment_writer.source_cursor SET applied = $3, published = $4
                     WHERE topic_id = $1 AND partition = $2 AND applied = $5
                         AND published IS NOT DISTINCT FROM $6",
                    &[topic_id, partition, &applied, &published, &applied_before, &published_before],
                )
                .await?
        }
        None => transaction
            .execute(
                "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied, published)
                     VALUES ($5, $1, $2, $3, $4) ON CONFLICT (topic_id, partition) DO NOTHING",
                &[topic_id, partition, &applied, &published, topic],
            )
            .await?,
    };
    if changed != 1 {
        return Ok(false);
    }
    transaction
        .execute(
            "DELETE FROM payment_writer.cursor_settlement WHERE topic_id = $1 AND partition = $2",
            &[topic_id, partition],
        )
        .await?;
    // Through JSON, since `replaces` is not there before step 9.
    transaction
        .execute(
            "INSERT INTO payment_writer.cursor_settlement
             SELECT r.* FROM jsonb_populate_record(NULL::payment_writer.cursor_settlement, jsonb_build_object(
                 'topic_id', $1::uuid, 'partition', $2::integer, 'committed', $3::bigint, 'settled_at', now(),
                 'replaces', $4::text)) AS r",
            &[topic_id, partition, &resolution.committed().0, &replaces],
        )
        .await?;
    transaction
        .execute(
            "INSERT INTO payment_writer.cursor_audit
                 (command, topic, topic_id, partition, before, after, reason)
             VALUES ($1, $2, $3, $4,
                 jsonb_build_object('applied', $5::bigint, 'published', $6::bigint,
                     'halt_reason', $7::text, 'doubt', $7::text),
                 jsonb_build_object('applied', $8::bigint, 'published', $9::bigint), $10)",
            &[
                &format!("cursors {resolution}"),
                topic,
                topic_id,
                partition,
                &applied_before,
                &published_before,
                &plan.reason.label(),
                &applied,
                &published,
                &reason,
            ],
        )
        .await?;
    Ok(true)
}
