//! The database's id and the group and topic that it is bound to, which are checked before anything is
//! written.

use tokio_postgres::{Client, GenericClient};
use uuid::Uuid;

use crate::domain::cursor::IdentityMismatch;
use crate::postgres::schema::locks::LockKey;

const BIND: &str = "
    INSERT INTO payment_writer.bound_group (group_id, cluster_id, topic, topic_id, publishes)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (only_row) DO UPDATE
    SET group_id = excluded.group_id, publishes = excluded.publishes, bound_at = now()";
const AUDIT: &str = "
    INSERT INTO payment_writer.cursor_audit (command, topic, topic_id, before, after, reason)
    VALUES ('run --adopt-database', $1, $2, jsonb_build_object('group', $3::text),
        jsonb_build_object('group', $4::text), 'started with --adopt-database')";

/// The group and topic that the first daemon binds a database to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Binding {
    /// Consumer group.
    pub group_id: String,
    /// Id of the Kafka cluster.
    pub cluster_id: String,
    /// Name of the input topic.
    pub topic: String,
    /// Id of the input topic.
    pub topic_id: Uuid,
    /// `kafka.publish`
    pub publishes: bool,
}

impl Binding {
    fn group(&self) -> String {
        let mode = if self.publishes { "publishing" } else { "writing rows only" };
        format!("group {:?}, {mode}", self.group_id)
    }

    fn log(&self) -> String {
        format!("topic {:?} with id {} of cluster {}", self.topic, self.topic_id, self.cluster_id)
    }
}

/// Why the binding could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum BindingError {
    /// The database failed.
    #[error("{}", crate::postgres::connection::describe(.0))]
    Database(#[from] tokio_postgres::Error),
    /// The binding does not match; an operator must decide.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
}

/// The database's id, which was generated when the schema was created.
pub async fn database_id(client: &Client) -> Result<Uuid, tokio_postgres::Error> {
    client.query_one("SELECT database_id FROM payment_writer.database_identity", &[]).await?.try_get(0)
}

async fn bound(client: &impl GenericClient) -> Result<Option<Binding>, tokio_postgres::Error> {
    let query = "SELECT group_id, cluster_id, topic, topic_id, publishes FROM payment_writer.bound_group";
    let Some(row) = client.query_opt(query, &[]).await? else { return Ok(None) };
    Ok(Some(Binding {
        group_id: row.try_get(0)?,
        cluster_id: row.try_get(1)?,
        topic: row.try_get(2)?,
        topic_id: row.try_get(3)?,
        publishes: row.try_get(4)?,
    }))
}

/// Checks that the database is bound to this group, topic and mode, or not bound at all.
pub async fn is_bound_to(
    client: &Client,
    group_id: &str,
    topic_id: Uuid,
    publishes: bool,
) -> Result<(), BindingError> {
    let Some(found) = bound(client).await? else { return Ok(()) };
    let wanted = Binding { group_id: group_id.to_owned(), topic_id, publishes, ..found.clone() };
    if found.log() != wanted.log() {
        let mismatch =
            IdentityMismatch::OtherLog { bound: found.log(), found: format!("topic id {topic_id}") };
        return Err(mismatch.into());
    }
    if found.group() != wanted.group() {
        return Err(IdentityMismatch::OtherGroup { bound: found.group(), found: wanted.group() }.into());
    }
    Ok(())
}

/// Binds the database to `wanted`, or checks that it already is. With `adopts`, a database of another group
/// is bound to this one. A database of another topic never is, because its cursors are offsets of that topic.
pub async fn bind(client: &mut Client, wanted: &Binding, adopts: bool) -> Result<(), BindingError> {
    let transaction = client.transaction().await?;
    // The server does not notice that a client gave up while it waits for a lock, here or below.
    let lock = format!("SET LOCAL lock_timeout = '30s'; SELECT pg_advisory_xact_lock({})", LockKey::Binding);
    transaction.batch_execute(&lock).await?;
    let found = bound(&transaction).await?;
    match &found {
        Some(found) if found == wanted => return Ok(()),
        Some(found) if found.log() != wanted.log() => {
            return Err(IdentityMismatch::OtherLog { bound: found.log(), found: wanted.log() }.into());
        }
        Some(found) if !adopts => {
            return Err(IdentityMismatch::OtherGroup { bound: found.group(), found: wanted.group() }.into());
        }
        _ => {}
    }
    let Binding { group_id, cluster_id, topic, topic_id, publishes } = wanted;
    transaction.execute(BIND, &[group_id, cluster_id, topic, topic_id, publishes]).await?;
    if let Some(found) = found {
        // `published` refers to the other group's events; this group's own offsets replace it.
        let forget = "UPDATE payment_writer.source_cursor SET published = NULL WHERE topic_id = $1";
        transaction.execute(forget, &[topic_id]).await?;
        transaction.execute(AUDIT, &[topic, topic_id, &found.group(), &wanted.group()]).await?;
    }
    transaction.commit().await?;
    Ok(())
}
