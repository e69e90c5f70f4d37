//! Database queries of the audit: one read-only session with short statements and a time limit for each.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, Statement};
use uuid::Uuid;

use super::suspects::Suspect;
use super::verdict::{Cursor, Owner, Payment, Pruned, Suspicion, standing};
use crate::config::Endpoint;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::postgres::connection::describe;
use crate::reconcile::database::{exempt, place, rows};
use crate::reconcile::range::Exempt;
use crate::reconcile::table::Place;
use crate::telemetry::metrics::AuditResult;

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

/// Result of one statement.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Cursors of the requested partitions.
    cursors: HashMap<Partition, Cursor>,
    /// Owners of the requested ids.
    owners: HashMap<Uuid, Vec<Owner>>,
    /// Claims that have been dropped.
    pruned: Pruned,
}

impl Snapshot {
    /// Judges a record; `None` if its cursor has not passed it, as in a database that was restored or
    /// replaced.
    pub fn standing(&self, payment: &Payment) -> Option<Result<AuditResult, Suspicion>> {
        let (partition, offset) = payment.place;
        self.cursors.get(&partition).filter(|cursor| cursor.applied.is_past(offset))?;
        let owners = self.owners.get(&payment.record.message_id).map(Vec::as_slice).unwrap_or_default();
        Some(standing(payment, owners, &self.pruned))
    }

    /// Whether the outputs of a record are published.
    pub fn is_published(&self, (partition, offset): Place) -> bool {
        self.cursors.get(&partition).and_then(|cursor| cursor.published).is_some_and(|p| p.is_past(offset))
    }
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
    question: impl Future<Output = Result<T, Error>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, question).await {
        Ok(answer) => answer.map_err(|error| format!("{doing}: {}", describe(&error))),
        Err(_) => Err(format!("{doing}: no answer within {} s", limit.as_secs())),
    }
}

impl Session {
    async fn open(endpoint: &Endpoint) -> Result<Self, String> {
        let (client, driver) = endpoint.connect().await.map_err(|error| error.to_string())?;
        let prepare = async {
            client.batch_execute(SESSION).await?;
            client.prepare(SNAPSHOT).await
        };
        let snapshot = within(ANSWER_WITHIN, "setting up the session", prepare).await?;
        Ok(Self { client, driver, snapshot })
    }
}

/// Errors are descriptions without payment data.
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

    /// Runs `question` on the session; closes the session after an error. `doing` describes it in errors.
    fn ask<T>(
        &mut self,
        limit: Duration,
        doing: &str,
        question: impl AsyncFnOnce(&Session, Uuid) -> Result<T, Error>,
    ) -> Result<T, String> {
        let Self { endpoint, topic_id, runtime, session } = self;
        runtime.block_on(async {
            let open = match session.take().filter(|session| !session.client.is_closed()) {
                Some(open) => open,
                None => Session::open(endpoint).await?,
            };
            let answer = within(limit, doing, question(&open, *topic_id)).await?;
            *session = Some(open);
            Ok(answer)
        })
    }

    /// Cursors of the payments' partitions and owners of their ids, in one snapshot.
    pub fn snapshot<'p>(&mut self, payments: impl Iterator<Item = &'p Payment>) -> Result<Snapshot, String> {
        let (partitions, ids): (HashSet<i32>, Vec<Uuid>) =
            payments.map(|payment| (payment.place.0.0, payment.record.message_id)).unzip();
        let partitions: Vec<i32> = partitions.into_iter().collect();
        self.ask(ANSWER_WITHIN, "asking who owns message ids", async |session, topic_id| {
            let mut found = Snapshot::default();
            for row in session.client.query(&session.snapshot, &[&topic_id, &partitions, &ids]).await? {
                let (first, second): (Option<i64>, Option<i64>) = (row.try_get(2)?, row.try_get(3)?);
                match (row.try_get::<_, i32>(0)?, first) {
                    (0, Some(applied)) => {
                        let cursor =
                            Cursor { applied: NextOffset(applied), published: second.map(NextOffset) };
                        found.cursors.insert(Partition(row.try_get(1)?), cursor);
                    }
                    (1, Some(_)) => {
                        let owner =
                            Owner { place: place(&row, 1)?, payload_hash: second.unwrap_or_default() };
                        found.owners.entry(row.try_get(4)?).or_default().push(owner);
                    }
                    _ => {
                        found.pruned = Pruned { until: first.map(TimestampMs), at: second.map(TimestampMs) };
                    }
                }
            }
            Ok(found)
        })
    }

    /// Records that operators skipped.
    pub fn exempt(&mut self) -> Result<Exempt, String> {
        self.ask(ANSWER_WITHIN, "reading cursor_audit", async |session, topic_id| {
            exempt(&session.client, topic_id).await
        })
    }

    /// Which of these records have a row in `payment_metadata`.
    pub fn rows(&mut self, suspects: &[Suspect]) -> Result<HashSet<Place>, String> {
        let (partitions, offsets): (Vec<i32>, Vec<i64>) =
            suspects.iter().map(|s| (s.payment.place.0.0, s.payment.place.1.0)).unzip();
        let times = || suspects.iter().map(|s| s.payment.record.timestamp.0);
        let (first, last) = (times().min().unwrap_or_default(), times().max().unwrap_or_default());
        self.ask(ROWS_WITHIN, "looking for rows of payment_metadata", async |Session { client, .. }, _| {
            client.batch_execute(ROWS_TIMEOUT).await?;
            let places =
                rows(client, ROWS, &[&partitions, &offsets, &first, &last], |row| place(row, 0)).await?;
            client.batch_execute(USUAL_TIMEOUT).await?;
            Ok(places.into_iter().collect())
        })
    }
}
