//! Resolves halted partitions by an operator's decision. The decision is written to the database with an
//! audit row; the partition's lane reads it and commits the group's offset in its own transaction.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use tokio_postgres::Client;
use uuid::Uuid;

use crate::config::Settings;
use crate::domain::cursor::{
    CursorRow, Decision, HaltReason, Identity, Known, LogBounds, Mode, Proof, decide,
};
use crate::domain::record::{NextOffset, Partition};
use crate::error::CommandError;
use crate::kafka::group::Group;
use crate::kafka::librdkafka::topic_id;
use crate::kafka::offsets::{group_offsets, log_bounds};
use crate::kafka::probe::{Probed, probe};
use crate::ports::Store;
use crate::postgres::binding;
use crate::postgres::store::PgStore;

const REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Both cursors of every partition at one time.
pub struct View {
    /// Ids of the topic and the database.
    pub identity: Identity,
    /// What is known about each partition, from 0 on.
    pub known: Vec<Known>,
    /// Results of reading at the positions where partitions resume.
    probed: BTreeMap<Partition, Probed>,
    places: BTreeMap<Partition, NextOffset>,
    topic: String,
}

impl View {
    /// What a lane would decide about this partition; `None` if the topic does not have it.
    pub fn decision(&self, partition: usize, mode: &Mode) -> Option<Decision> {
        self.known.get(partition).map(|known| decide(known, &self.identity, mode))
    }

    /// Reads one record batch of each partition, or of `only` this one, where it resumes, with a time limit.
    ///
    /// # Errors
    /// If the client cannot be created.
    pub async fn probe(
        &mut self,
        settings: &Settings,
        mode: &Mode,
        only: Option<Partition>,
    ) -> Result<(), CommandError> {
        let wanted = |known: &&Known| only.is_none_or(|only| only == known.partition);
        let positions: Vec<_> = self
            .known
            .iter()
            .filter(wanted)
            .filter_map(|known| {
                let position = match decide(known, &self.identity, mode) {
                    Decision::Go(start) => start.from,
                    Decision::Prove { from } => known.row.as_ref().map_or(from, |row| row.applied.min(from)),
                    Decision::Halt(_) | Decision::Stop(_) => return None,
                };
                Some((known.partition, position, known.bounds))
            })
            .collect();
        let kafka = settings.kafka.clone();
        let places: BTreeMap<_, _> = positions.iter().map(|(partition, at, _)| (*partition, *at)).collect();
        let probed = tokio::task::spawn_blocking(move || probe(&kafka, &positions))
            .await
            .map_err(failed)?
            .map_err(failed)?;
        self.probed = probed;
        self.places = places;
        Ok(())
    }

    /// Why a partition cannot be read; `None` if it can be or was not probed.
    pub fn unreadable(&self, partition: Partition) -> Option<HaltReason> {
        match (self.probed.get(&partition)?, self.places.get(&partition)?) {
            (Probed::Unreadable { fault, after }, place) => Some(fault.reason(*place, *after)),
            _ => None,
        }
    }

    /// Whether a partition was probed without an answer in time.
    pub fn is_silent(&self, partition: Partition) -> bool {
        self.probed.get(&partition) == Some(&Probed::NoAnswer)
    }

    /// Whether a resolution is stored that the lane has not applied yet.
    pub fn is_settled(&self, partition: usize) -> bool {
        self.known.get(partition).and_then(|k| k.row.as_ref()).is_some_and(|r| r.settled.is_some())
    }
}

/// An operator's decision about a halted partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Settlement {
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

/// A checked decision that can be applied.
pub struct Plan {
    partition: Partition,
    topic: String,
    topic_id: Uuid,
    reason: HaltReason,
    settlement: Settlement,
    before: Option<CursorRow>,
    after: CursorRow,
}

fn offset(offset: Option<NextOffset>) -> String {
    offset.map_or_else(|| "none".to_owned(), |o| o.to_string())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.before.as_ref();
        writeln!(
            f,
            "partition {} of {}: {}",
            self.partition,
            self.topic,
            self.reason.advice(self.partition)
        )?;
        writeln!(
            f,
            "applied {} -> {}, published and the group's offset {} -> {}",
            offset(before.map(|r| r.applied)),
            self.after.applied,
            offset(before.and_then(|r| r.published)),
            offset(self.after.settled),
        )?;
        match self.settlement {
            Settlement::Accept { published } if published < self.after.applied => write!(
                f,
                "events of records {published} to {} are sent, even if they were sent before",
                self.after.applied
            ),
            Settlement::Accept { published } => {
                write!(f, "events of records before {published} count as sent and are never sent again")
            }
            Settlement::Skip { to } => {
                write!(f, "records before {to} that were not written or published are given up permanently")
            }
        }
    }
}

async fn connected(settings: &Settings) -> Result<Client, CommandError> {
    let endpoint = &settings.postgres.url;
    let (client, _) = endpoint.connect().await.map_err(|error| CommandError::failed(error.to_string()))?;
    Ok(client)
}

fn failed(error: impl fmt::Display) -> CommandError {
    CommandError::failed(error.to_string())
}

/// Reads both cursors of every partition.
pub async fn view(settings: &Settings) -> Result<View, CommandError> {
    let client = connected(settings).await?;
    crate::postgres::schema::check(&client).await.map_err(failed)?;
    let database_id =
        binding::database_id(&client).await.map_err(|e| failed(crate::postgres::connection::describe(&e)))?;
    let group = Arc::new(Group::observer(&settings.kafka).map_err(failed)?);
    let asked = Arc::clone(&group);
    let (topic_id, count) = tokio::task::spawn_blocking(move || {
        topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT).map_err(failed)
    })
    .await
    .map_err(failed)??;
    let partitions: Vec<Partition> = (0..i32::try_from(count).unwrap_or(i32::MAX)).map(Partition).collect();
    let identity = Identity { topic_id, database_id };
    let pool = settings.postgres.url.pool(1).map_err(failed)?;
    let topic = settings.kafka.input_topic.clone();
    // The log's bounds are read last, so that a cursor that moves meanwhile is not beyond them.
    let rows =
        PgStore::new(pool, topic.clone(), identity.clone()).cursors(&partitions).await.map_err(failed)?;
    let (offsets, bounds) = tokio::task::spawn_blocking(move || {
        let offsets = group_offsets(&group, &partitions).map_err(failed)?;
        let bounds: Vec<LogBounds> = log_bounds(&group, &partitions).map_err(failed)?;
        Ok::<_, CommandError>((offsets, bounds))
    })
    .await
    .map_err(failed)??;
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
            proof: Proof::Unclear(NextOffset(0)),
        })
        .collect();
    Ok(View { identity, known, probed: BTreeMap::new(), places: BTreeMap::new(), topic })
}

/// Checks a decision against the partition's current state: only a halted partition can be resolved.
pub async fn plan(
    settings: &Settings,
    partition: Partition,
    settlement: Settlement,
) -> Result<Plan, CommandError> {
    let mut view = view(settings).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    if matches!(settlement, Settlement::Skip { .. }) {
        view.probe(settings, &mode, Some(partition)).await?;
    }
    let index = usize::try_from(partition.0).unwrap_or(usize::MAX);
    let (Some(known), Some(decision)) = (view.known.get(index), view.decision(index, &mode)) else {
        return Err(CommandError::usage(format!("{} has no partition {partition}", view.topic)));
    };
    let reason = match decision {
        Decision::Halt(reason) => reason,
        // An unreadable partition can be skipped although its cursors agree.
        Decision::Go(_) | Decision::Prove { .. } => match view.unreadable(partition) {
            Some(reason) => reason,
            None => {
                return Err(CommandError::failed(format!(
                    "partition {partition} is not halted; there is nothing to resolve"
                )));
            }
        },
        Decision::Stop(mismatch) => return Err(CommandError::person_must_decide(mismatch.to_string())),
    };
    let applied = known.row.as_ref().map_or(known.bounds.start, |r| r.applied);
    let after = match settlement {
        Settlement::Accept { published } => CursorRow {
            applied,
            published: mode.publishes.then_some(published),
            applied_timestamp: None,
            settled: Some(published),
        },
        Settlement::Skip { to } => CursorRow {
            applied: to,
            published: mode.publishes.then_some(to),
            applied_timestamp: None,
            settled: Some(to),
        },
    };
    let target = after.settled.unwrap_or(applied);
    let LogBounds { start, end } = known.bounds;
    if target < start || target > end {
        return Err(CommandError::usage(format!(
            "offset {target} is not in the log of partition {partition}, which has offsets {start} to {end}"
        )));
    }
    // In a restored database, `published` can be beyond `applied`.
    let sent_max = known.row.as_ref().and_then(|row| row.published).max(Some(applied));
    if let Settlement::Accept { published } = settlement
        && !matches!(reason, HaltReason::Unproved { .. })
        && Some(published) > sent_max
    {
        return Err(CommandError::usage(format!(
            "records from {applied} on are not written yet, so their events cannot have been sent; to give \
             them up, use cursors skip"
        )));
    }
    let settled = Known { row: Some(after.clone()), ..known.clone() };
    if let Decision::Halt(reason) = decide(&settled, &view.identity, &mode) {
        return Err(CommandError::usage(format!(
            "the partition would stay halted: {}",
            reason.advice(partition)
        )));
    }
    Ok(Plan {
        partition,
        topic: view.topic,
        topic_id: view.identity.topic_id,
        reason,
        settlement,
        before: known.row.clone(),
        after,
    })
}

/// Writes the decision, unless the cursor was moved since the plan was created.
pub async fn apply(settings: &Settings, plan: &Plan, reason: &str) -> Result<(), CommandError> {
    let mut client = connected(settings).await?;
    let described = |error: tokio_postgres::Error| failed(crate::postgres::connection::describe(&error));
    let transaction = client.transaction().await.map_err(described)?;
    let (applied, published) = (plan.after.applied.0, plan.after.published.map(|p| p.0));
    let seen = plan.before.as_ref().map(|r| r.applied.0);
    let partition = plan.partition.0;
    let changed = match seen {
        Some(seen) => {
            transaction
                .execute(
                    "UPDATE payment_writer.source_cursor SET applied = $3, published = $4
             WHERE topic_id = $1 AND partition = $2 AND applied = $5",
                    &[&plan.topic_id, &partition, &applied, &published, &seen],
                )
                .await
        }
        None => transaction
            .execute(
                "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied, published)
             VALUES ($5, $1, $2, $3, $4) ON CONFLICT (topic_id, partition) DO NOTHING",
                &[&plan.topic_id, &partition, &applied, &published, &plan.topic],
            )
            .await,
    }
    .map_err(described)?;
    if changed != 1 {
        return Err(CommandError::failed(
            "the cursor was moved meanwhile; look at cursors show and try again",
        ));
    }
    transaction
        .execute(
            "INSERT INTO payment_writer.cursor_settlement (topic_id, partition, committed) VALUES ($1, $2, $3)
             ON CONFLICT (topic_id, partition) DO UPDATE
             SET committed = excluded.committed, settled_at = now()",
            &[&plan.topic_id, &partition, &plan.after.settled.map(|s| s.0)],
        )
        .await
        .map_err(described)?;
    let command = match plan.settlement {
        Settlement::Accept { published } => format!("cursors accept --published {published}"),
        Settlement::Skip { to } => format!("cursors skip --to {to}"),
    };
    transaction
        .execute(
            "INSERT INTO payment_writer.cursor_audit
                 (command, topic, topic_id, partition, before, after, reason)
             VALUES ($1, $2, $3, $4,
                 jsonb_build_object('applied', $5::bigint, 'published', $6::bigint,
                     'halt_reason', $7::text, 'doubt', $7::text),
                 jsonb_build_object('applied', $8::bigint, 'published', $9::bigint), $10)",
            &[
                &command,
                &plan.topic,
                &plan.topic_id,
                &partition,
                &seen,
                &plan.before.as_ref().and_then(|r| r.published).map(|p| p.0),
                &plan.reason.label(),
                &applied,
                &published,
                &reason,
            ],
        )
        .await
        .map_err(described)?;
    transaction.commit().await.map_err(described)
}
