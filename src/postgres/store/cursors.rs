//! The rows of `source_cursor`: read, written at the start of a partition, and moved with each batch.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use futures_util::future;
use tokio_postgres::Row;
use tokio_postgres::types::{Timestamp, ToSql};
use uuid::Uuid;

use super::session::{self, Session, store_error};
use crate::domain::cursor::{CursorRow, Settlement};
use crate::domain::outcome::{FailureClass, SQLSTATE_CURSOR_MOVED};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::domain::wire;
use crate::ports::{CursorMove, StoreError};

/// The parameters of `move_cursors`: parallel arrays with one element per partition.
pub(super) struct Moves {
    partitions: Vec<i32>,
    seen: Vec<i64>,
    applied: Vec<i64>,
    published: Vec<Option<i64>>,
    timestamps: Vec<Option<Timestamp<SystemTime>>>,
}

impl Moves {
    pub fn new(moves: &[CursorMove]) -> Self {
        Self {
            partitions: moves.iter().map(|m| m.partition.0).collect(),
            seen: moves.iter().map(|m| m.seen.0).collect(),
            applied: moves.iter().map(|m| m.applied.0).collect(),
            published: moves.iter().map(|m| m.published.map(|p| p.0)).collect(),
            timestamps: moves.iter().map(|m| m.timestamp.map(timestamp)).collect(),
        }
    }

    /// Those of other partitions.
    fn without(&self, moved: &BTreeMap<i32, String>) -> Self {
        fn rest<T: Copy>(all: &[T], left: &[usize]) -> Vec<T> {
            left.iter().filter_map(|at| all.get(*at).copied()).collect()
        }
        let partitions = self.partitions.iter().enumerate();
        let left: Vec<usize> = partitions.filter(|(_, p)| !moved.contains_key(p)).map(|(at, _)| at).collect();
        Self {
            partitions: rest(&self.partitions, &left),
            seen: rest(&self.seen, &left),
            applied: rest(&self.applied, &left),
            published: rest(&self.published, &left),
            timestamps: rest(&self.timestamps, &left),
        }
    }

    /// The parameters of the statements, in their order, and further ones.
    fn parameters<'a>(
        &'a self,
        topic_id: &'a Uuid,
        more: &[&'a (dyn ToSql + Sync)],
    ) -> Vec<&'a (dyn ToSql + Sync)> {
        let own: [&(dyn ToSql + Sync); 6] =
            [topic_id, &self.partitions, &self.seen, &self.applied, &self.published, &self.timestamps];
        [&own[..], more].concat()
    }
}

/// The timestamp of a record; `-infinity` if it has none, or one outside the range of payments, as a dead
/// letter can.
fn timestamp(at: Option<TimestampMs>) -> Timestamp<SystemTime> {
    match at.filter(|at| (wire::TIMESTAMP_MIN..=wire::TIMESTAMP_MAX).contains(at)) {
        Some(at) => Timestamp::Value(SystemTime::UNIX_EPOCH + Duration::from_millis(at.0.unsigned_abs())),
        None => Timestamp::NegInfinity,
    }
}

/// Moves the cursors under their guard, and returns where they are now. Those whose place is not known, or who are not
/// there as expected, are left to the function in the database, which finds them and names one that was moved.
pub(super) async fn move_cursors(
    session: &Session,
    topic_id: &Uuid,
    moves: &Moves,
) -> Result<BTreeMap<i32, String>, StoreError> {
    let place_of = |row: &Row| Ok::<_, tokio_postgres::Error>((row.try_get(0)?, row.try_get(1)?));
    let mut places: BTreeMap<i32, String> = BTreeMap::new();
    let known: Vec<&str> =
        moves.partitions.iter().filter_map(|p| session.known_places.get(p)).map(String::as_str).collect();
    if !known.is_empty() {
        let moved = session.client.query(&session.move_known, &moves.parameters(topic_id, &[&known])).await?;
        places = moved.iter().map(place_of).collect::<Result<_, _>>()?;
    }
    let rest = moves.without(&places);
    if !rest.partitions.is_empty() {
        let (_, found) = future::try_join(
            session.client.query(&session.move_cursors, &rest.parameters(topic_id, &[])),
            session.client.query(&session.places, &[topic_id, &rest.partitions]),
        )
        .await?;
        for row in &found {
            let (partition, place) = place_of(row)?;
            places.insert(partition, place);
        }
    }
    Ok(places)
}

/// Writes rows before the first batch, under the guard of `applied` as it was read.
pub(super) async fn store_in(
    session: &mut Session,
    topic: &str,
    topic_id: &Uuid,
    rows: &[(Partition, Option<NextOffset>, CursorRow)],
) -> Result<(), StoreError> {
    let partitions: Vec<i32> = rows.iter().map(|(p, ..)| p.0).collect();
    let seen: Vec<Option<i64>> = rows.iter().map(|(_, seen, _)| seen.map(|s| s.0)).collect();
    let applied: Vec<i64> = rows.iter().map(|(.., row)| row.applied.0).collect();
    let published: Vec<Option<i64>> = rows.iter().map(|(.., row)| row.published.map(|p| p.0)).collect();
    let transaction = session.client.transaction().await?;
    let updated = transaction
        .execute(session::UPDATE_CURSORS, &[topic_id, &partitions, &seen, &applied, &published])
        .await?;
    let inserted = transaction
        .execute(session::INSERT_CURSORS, &[&topic, topic_id, &partitions, &seen, &applied, &published])
        .await?;
    if updated + inserted != rows.len() as u64 {
        let message = "a cursor changed during the recovery of its partition".to_owned();
        let error = store_error(FailureClass::Fenced, message);
        return Err(StoreError { sqlstate: Some(SQLSTATE_CURSOR_MOVED.to_owned()), ..error });
    }
    // Deletes only the resolutions that were applied; one stored since then is applied later.
    let committed: Vec<Option<i64>> =
        rows.iter().map(|(.., row)| row.settled.as_ref().map(|s| s.committed.0)).collect();
    transaction.execute(session::DELETE_SETTLEMENTS, &[topic_id, &partitions, &committed]).await?;
    transaction.commit().await?;
    Ok(())
}

/// Reads the rows of these partitions, in the order given.
pub(super) async fn cursors_in(
    session: &Session,
    topic_id: &Uuid,
    partitions: &[Partition],
) -> Result<Vec<(Partition, Option<CursorRow>)>, StoreError> {
    let numbers: Vec<i32> = partitions.iter().map(|p| p.0).collect();
    let mut found = HashMap::new();
    for row in session.client.query(&session.cursors, &[topic_id, &numbers]).await? {
        let timestamp: Option<SystemTime> = row.try_get(3)?;
        let replaces: Option<String> = row.try_get(5)?;
        let settlement = |committed| Settlement { committed: NextOffset(committed), replaces };
        found.insert(
            Partition(row.try_get(0)?),
            CursorRow {
                applied: NextOffset(row.try_get(1)?),
                published: row.try_get::<_, Option<i64>>(2)?.map(NextOffset),
                applied_timestamp: timestamp.and_then(milliseconds),
                settled: row.try_get::<_, Option<i64>>(4)?.map(settlement),
            },
        );
    }
    Ok(partitions.iter().map(|p| (*p, found.remove(p))).collect())
}

/// `None` outside the years -9999 to 9999.
fn milliseconds(at: SystemTime) -> Option<TimestampMs> {
    jiff::Timestamp::try_from(at).ok().map(|at| TimestampMs(at.as_millisecond()))
}
