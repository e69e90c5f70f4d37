//! Database queries of the audit: one read-only session with short statements and a time limit for each.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use super::verdict::{Cursor, Payment, Pruned};
use crate::config::Endpoint;
use crate::domain::batch::Owner;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::postgres::connection::describe;
use crate::reconcile::Exempt;
use crate::reconcile::database::skips;

/// Forces index lookups of ids, because planner statistics lag behind tables that grow fast. The short
/// timeouts keep housekeeping from waiting behind a statement that itself waits for a lock.
const SESSION: &str = "\
    SET default_transaction_read_only = on; \
    SET statement_timeout = '10s'; SET lock_timeout = '2s'; \
    SET enable_seqscan = off; SET max_parallel_workers_per_gather = 0";
/// Client-side limit: a stopped server does not enforce `statement_timeout`.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// The payment tables have no index on the source position, so a row lookup scans whole months.
const ROWS_TIMEOUT: &str = "SET statement_timeout = '60s'";
const ROWS_WITHIN: Duration = Duration::from_secs(65);
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
const USUAL_TIMEOUT: &str = "SET statement_timeout = '10s'";

/// Cursors, owners and pruning in one statement, hence one snapshot: the claims of every record below
/// `applied` are visible in it.
const SNAPSHOT: &str = "\
    SELECT 0 AS kind, partition, applied AS number, published AS other, NULL::uuid AS id
    FROM payment_writer.source_cursor WHERE topic_id = $1 AND partition = ANY ($2)
    UNION ALL
    SELECT 1, source_partition, source_offset, payload_hash, message_id
    FROM payment_writer.idempotency WHERE message_id = ANY ($3)
    UNION ALL
    SELECT 2, NULL, ceil(extract(epoch FROM nullif(max(youngest_record), '-infinity')) * 1000)::bigint,
        ceil(extract(epoch FROM max(greatest(retired_at, detached_at, dropped_at))) * 1000)::bigint, NULL
    FROM payment_writer.idempotency_generation WHERE state IN ('retired', 'detached', 'dropped')";

const ROWS: &str = "\
    SELECT m.source_partition, m.source_offset
    FROM unnest($1::integer[], $2::bigint[]) AS wanted (partition, number)
    JOIN payment_writer.payment_metadata m
        ON m.source_partition = wanted.partition AND m.source_offset = wanted.number
    WHERE m.created_at BETWEEN to_timestamp($3::bigint / 1000) AND to_timestamp($4::bigint / 1000 + 1)";

/// Why a query failed; contains no payment data.
pub type Unanswered = String;

/// Result of one statement.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Cursors of the requested partitions.
    pub cursors: HashMap<Partition, Cursor>,
    /// Owners of the requested ids.
    pub owners: HashMap<Uuid, Vec<Owner>>,
    /// Claims that have been dropped.
    pub pruned: Pruned,
}

struct Session {
    client: Client,
    driver: JoinHandle<()>,
    snapshot: Statement,
}

/// Database with a session that is opened on demand.
pub struct Database {
    endpoint: Endpoint,
    topic_id: Uuid,
    /// Runs on the audit's thread, so that its CPU time counts as the audit's.
    runtime: Runtime,
    session: Option<Session>,
}

async fn within<T>(
    limit: Duration,
    doing: &str,
    question: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Unanswered> {
    match tokio::time::timeout(limit, question).await {
        Ok(answer) => answer.map_err(|error| format!("{doing}: {}", describe(&error))),
        Err(_) => Err(format!("{doing}: no answer within {} s", limit.as_secs())),
    }
}

impl Session {
    async fn open(endpoint: &Endpoint) -> Result<Self, Unanswered> {
        let (client, driver) = endpoint.connect().await.map_err(|error| error.to_string())?;
        let prepare = async {
            client.batch_execute(SESSION).await?;
            client.prepare(SNAPSHOT).await
        };
        let snapshot = within(ANSWER_WITHIN, "setting up the session", prepare).await?;
        Ok(Self { client, driver, snapshot })
    }
}

impl Database {
    /// Creates a handle without opening a session.
    pub fn new(endpoint: Endpoint, topic_id: Uuid) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { endpoint, topic_id, runtime, session: None })
    }

    /// Closes the session until the next query.
    pub fn rest(&mut self) {
        if let Some(Session { client, driver, .. }) = self.session.take() {
            drop(client);
            // The connection sends its termination message only while this runtime runs.
            let _ = self.runtime.block_on(async { tokio::time::timeout(LEAVE_WITHIN, driver).await });
        }
    }

    /// Runs `question` on the session; closes the session after an error.
    fn ask<T>(
        &mut self,
        question: impl AsyncFnOnce(&Session, Uuid) -> Result<T, Unanswered>,
    ) -> Result<T, Unanswered> {
        let Self { endpoint, topic_id, runtime, session } = self;
        runtime.block_on(async {
            let open = match session.take().filter(|session| !session.client.is_closed()) {
                Some(open) => open,
                None => Session::open(endpoint).await?,
            };
            let answer = question(&open, *topic_id).await?;
            *session = Some(open);
            Ok(answer)
        })
    }

    /// Cursors of the payments' partitions and owners of their ids, in one snapshot.
    pub fn snapshot(&mut self, payments: &[Payment]) -> Result<Snapshot, Unanswered> {
        let partitions: HashSet<i32> = payments.iter().map(|p| p.partition.0).collect();
        let partitions: Vec<i32> = partitions.into_iter().collect();
        let ids: Vec<Uuid> = payments.iter().map(|p| p.message_id).collect();
        self.ask(async |Session { client, snapshot, .. }, topic_id| {
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&topic_id, &partitions, &ids];
            let asked = async {
                let rows = client.query(snapshot, &parameters).await?;
                let mut found = Snapshot::default();
                for row in rows {
                    let (first, second): (Option<i64>, Option<i64>) = (row.try_get(2)?, row.try_get(3)?);
                    match (row.try_get::<_, i32>(0)?, first) {
                        (0, Some(applied)) => {
                            let published = second.map(NextOffset);
                            let cursor = Cursor { applied: NextOffset(applied), published };
                            found.cursors.insert(Partition(row.try_get(1)?), cursor);
                        }
                        (1, Some(offset)) => {
                            let owner = Owner {
                                partition: Partition(row.try_get(1)?),
                                offset: Offset(offset),
                                payload_hash: second.unwrap_or_default(),
                            };
                            found.owners.entry(row.try_get(4)?).or_default().push(owner);
                        }
                        _ => {
                            found.pruned =
                                Pruned { until: first.map(TimestampMs), at: second.map(TimestampMs) };
                        }
                    }
                }
                Ok(found)
            };
            within(ANSWER_WITHIN, "asking who owns message ids", asked).await
        })
    }

    /// Records that operators skipped.
    pub fn exempt(&mut self) -> Result<Exempt, Unanswered> {
        self.ask(async |session, topic_id| {
            let asked = skips(&session.client, topic_id);
            Ok(Exempt::of(&within(ANSWER_WITHIN, "reading cursor_audit", asked).await?))
        })
    }

    /// Which of these payments have a row in `payment_metadata`.
    pub fn rows(&mut self, payments: &[Payment]) -> Result<HashSet<(Partition, Offset)>, Unanswered> {
        let partitions: Vec<i32> = payments.iter().map(|p| p.partition.0).collect();
        let offsets: Vec<i64> = payments.iter().map(|p| p.offset.0).collect();
        let times = || payments.iter().map(|p| p.timestamp.0);
        let (first, last) = (times().min().unwrap_or_default(), times().max().unwrap_or_default());
        self.ask(async |session, _| {
            let client = &session.client;
            let asked = async {
                client.batch_execute(ROWS_TIMEOUT).await?;
                let rows = client.query(ROWS, &[&partitions, &offsets, &first, &last]).await?;
                client.batch_execute(USUAL_TIMEOUT).await?;
                rows.iter()
                    .map(|row| Ok((Partition(row.try_get(0)?), Offset(row.try_get(1)?))))
                    .collect::<Result<HashSet<_>, tokio_postgres::Error>>()
            };
            within(ROWS_WITHIN, "looking for rows of payment_metadata", asked).await
        })
    }
}
