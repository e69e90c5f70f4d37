//! What a person decides about a halted partition, and how the daemon learns of it: the decision is
//! written to the database, with an audit row; the partition's lane takes it up and moves the group's
//! offset in a transaction of its own.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use tokio_postgres::Client;
use uuid::Uuid;

use crate::binding;
use crate::cli::Failure;
use crate::config::Settings;
use crate::cursor::{CursorRow, Decision, Doubt, Identity, Known, LogBounds, Mode, Proof, decide};
use crate::daemon::bystander;
use crate::kafka::librdkafka::topic_id;
use crate::kafka::log::{group_offsets, log_bounds};
use crate::kafka::probe::{Probed, probe};
use crate::lane::ports::Ledger;
use crate::ledger::PgLedger;
use crate::record::{NextOffset, Partition};

const REQUEST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Both cursors of every partition, at one moment.
pub struct View {
    /// Topic and database.
    pub identity: Identity,
    /// What is known, by partition from 0.
    pub known: Vec<Known>,
    /// What is at the places where partitions are to be read on, as far as it was looked at.
    probed: BTreeMap<Partition, Probed>,
    places: BTreeMap<Partition, NextOffset>,
    topic: String,
}

impl View {
    /// What a lane would do with this partition.
    pub fn decision(&self, partition: usize, mode: &Mode) -> Option<Decision> {
        self.known.get(partition).map(|known| decide(known, &self.identity, mode))
    }

    /// Reads one batch of each of these partitions, where it is to go on, with a time limit.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub async fn probe(
        &mut self,
        settings: &Settings,
        mode: &Mode,
        only: Option<Partition>,
    ) -> Result<(), Failure> {
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

    /// Why a partition cannot be read, if it was looked at and cannot.
    pub fn unreadable(&self, partition: Partition) -> Option<Doubt> {
        match (self.probed.get(&partition)?, self.places.get(&partition)?) {
            (Probed::Unreadable { fault, after }, place) => Some(fault.doubt(*place, *after)),
            _ => None,
        }
    }

    /// Whether a partition was looked at, and nothing of it came in time.
    pub fn is_silent(&self, partition: Partition) -> bool {
        self.probed.get(&partition) == Some(&Probed::NoAnswer)
    }

    /// Whether a decision waits for its lane.
    pub fn is_settled(&self, partition: usize) -> bool {
        self.known.get(partition).and_then(|k| k.row.as_ref()).is_some_and(|r| r.settled.is_some())
    }
}

/// What is decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Settlement {
    /// Events of records before `published` were sent, later ones are to be sent.
    Accept {
        /// The first record whose events are to be sent.
        published: NextOffset,
    },
    /// Go on at `to`, whatever lies before it.
    Skip {
        /// The next offset to read.
        to: NextOffset,
    },
}

/// A checked decision, ready to be applied.
pub struct Plan {
    partition: Partition,
    topic: String,
    topic_id: Uuid,
    doubt: Doubt,
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
        writeln!(f, "partition {} of {}: {}", self.partition, self.topic, self.doubt.advice(self.partition))?;
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
                "events of records {published} to {} are sent, whether or not they were sent before",
                self.after.applied
            ),
            Settlement::Accept { published } => {
                write!(f, "events of records before {published} count as sent and are never sent again")
            }
            Settlement::Skip { to } => {
                write!(f, "records before {to} that were not written or published are given up for good")
            }
        }
    }
}

async fn connected(settings: &Settings) -> Result<Client, Failure> {
    let endpoint = settings.postgres.url.endpoint();
    let (client, _) = endpoint.connect().await.map_err(|error| Failure::failed(error.to_string()))?;
    Ok(client)
}

fn failed(error: impl fmt::Display) -> Failure {
    Failure::failed(error.to_string())
}

/// Reads both cursors of every partition.
pub async fn view(settings: &Settings) -> Result<View, Failure> {
    let client = connected(settings).await?;
    crate::schema::check(&client).await.map_err(failed)?;
    let database_id =
        binding::database_id(&client).await.map_err(|e| failed(crate::postgres::describe(&e)))?;
    let group = Arc::new(bystander(settings)?);
    let asked = Arc::clone(&group);
    let (topic_id, count) = tokio::task::spawn_blocking(move || {
        topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT).map_err(failed)
    })
    .await
    .map_err(failed)??;
    let partitions: Vec<Partition> = (0..i32::try_from(count).unwrap_or(i32::MAX)).map(Partition).collect();
    let identity = Identity { topic_id, database_id };
    let pool = settings.postgres.url.endpoint().pool(1).map_err(failed)?;
    let topic = settings.kafka.input_topic.clone();
    // The log's ends last: what moves on meanwhile must not look as if it lay beyond them.
    let rows =
        PgLedger::new(pool, topic.clone(), identity.clone()).cursors(&partitions).await.map_err(failed)?;
    let (offsets, bounds) = tokio::task::spawn_blocking(move || {
        let offsets = group_offsets(&group, &partitions).map_err(failed)?;
        let bounds: Vec<LogBounds> = log_bounds(&group, &partitions).map_err(failed)?;
        Ok::<_, Failure>((offsets, bounds))
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
            // A lane asks the outputs; here only what it cannot settle by itself is of interest.
            proof: Proof::Unclear(NextOffset(0)),
        })
        .collect();
    Ok(View { identity, known, probed: BTreeMap::new(), places: BTreeMap::new(), topic })
}

/// Checks a decision against the partition as it is: only what is in doubt can be settled.
pub async fn plan(
    settings: &Settings,
    partition: Partition,
    settlement: Settlement,
) -> Result<Plan, Failure> {
    let mut view = view(settings).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    if matches!(settlement, Settlement::Skip { .. }) {
        view.probe(settings, &mode, Some(partition)).await?;
    }
    let index = usize::try_from(partition.0).unwrap_or(usize::MAX);
    let (Some(known), Some(decision)) = (view.known.get(index), view.decision(index, &mode)) else {
        return Err(Failure::usage(format!("{} has no partition {partition}", view.topic)));
    };
    let doubt = match decision {
        Decision::Halt(doubt) => doubt,
        // What cannot be read can be skipped, though nothing is in doubt.
        Decision::Go(_) | Decision::Prove { .. } => match view.unreadable(partition) {
            Some(doubt) => doubt,
            None => {
                return Err(Failure::failed(format!(
                    "partition {partition} is not in doubt; nothing to settle"
                )));
            }
        },
        Decision::Stop(doubt) => return Err(Failure::person_must_decide(doubt.to_string())),
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
        return Err(Failure::usage(format!(
            "offset {target} is not in the log of partition {partition}, which has {start} to {end}"
        )));
    }
    // Of a database that was restored, more is known to be sent than is written.
    let sent_max = known.row.as_ref().and_then(|row| row.published).max(Some(applied));
    if let Settlement::Accept { published } = settlement
        && !matches!(doubt, Doubt::Unproved { .. })
        && Some(published) > sent_max
    {
        return Err(Failure::usage(format!(
            "records from {applied} on are not written yet, their events cannot have been sent; to give them up, \
             use cursors skip"
        )));
    }
    let settled = Known { row: Some(after.clone()), ..known.clone() };
    if let Decision::Halt(doubt) = decide(&settled, &view.identity, &mode) {
        return Err(Failure::usage(format!(
            "that would leave the partition halted: {}",
            doubt.advice(partition)
        )));
    }
    Ok(Plan {
        partition,
        topic: view.topic,
        topic_id: view.identity.topic_id,
        doubt,
        settlement,
        before: known.row.clone(),
        after,
    })
}

/// Writes the decision, unless the cursor was moved since the plan was made.
pub async fn apply(settings: &Settings, plan: &Plan, reason: &str) -> Result<(), Failure> {
    let mut client = connected(settings).await?;
    let described = |error: tokio_postgres::Error| failed(crate::postgres::describe(&error));
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
        return Err(Failure::failed("the cursor was moved meanwhile; look at cursors show and try again"));
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
                 jsonb_build_object('applied', $5::bigint, 'published', $6::bigint, 'doubt', $7::text),
                 jsonb_build_object('applied', $8::bigint, 'published', $9::bigint), $10)",
            &[
                &command,
                &plan.topic,
                &plan.topic_id,
                &partition,
                &seen,
                &plan.before.as_ref().and_then(|r| r.published).map(|p| p.0),
                &plan.doubt.label(),
                &applied,
                &published,
                &reason,
            ],
        )
        .await
        .map_err(described)?;
    transaction.commit().await.map_err(described)
}
