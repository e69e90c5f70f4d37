//! COPY of a batch's rows into the three payment tables.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{SinkExt, future};
use tokio_postgres::{CopyInSink, Statement};

use super::session::{Session, store_error};
use crate::domain::batch::{Rows, TableRows};
use crate::domain::columns::{COPY_HEADER, COPY_TRAILER};
use crate::domain::outcome::FailureClass;
use crate::failpoint;
use crate::ports::StoreError;

/// Bytes of one COPY message. The server receives a whole message before it parses it, so a message of
/// megabytes has left the CPU cache by then.
const COPY_CHUNK_BYTES: usize = 128 << 10;
/// Sends bytes of a COPY in messages of at most 128 KiB.
pub async fn feed(
    mut sink: Pin<&mut CopyInSink<Bytes>>,
    mut bytes: Bytes,
) -> Result<(), tokio_postgres::Error> {
    while !bytes.is_empty() {
        sink.feed(bytes.split_to(bytes.len().min(COPY_CHUNK_BYTES))).await?;
    }
    Ok(())
}

/// Copies rows into one table.
pub(super) async fn copy_rows(
    session: &Session,
    table: &str,
    statement: &Statement,
    rows: &Rows,
) -> Result<(), StoreError> {
    if rows.count == 0 {
        return Ok(());
    }
    let sink: CopyInSink<Bytes> = session.client.copy_in(statement).await?;
    let mut sink = std::pin::pin!(sink);
    sink.feed(Bytes::from_static(COPY_HEADER)).await?;
    feed(sink.as_mut(), rows.bytes.clone()).await?;
    sink.feed(Bytes::from_static(COPY_TRAILER)).await?;
    failpoint::hit("before_copy_ends");
    let copied = sink.finish().await?;
    if copied == rows.count as u64 {
        Ok(())
    } else {
        let message = format!(
            "{table} took {copied} of {} rows: a trigger or a rule drops rows; remove it, or let it pass these",
            rows.count
        );
        Err(store_error(FailureClass::Persistent, message))
    }
}

/// Copies into all three tables in one round trip.
pub(super) async fn copy_at_once(session: &Session, rows: &TableRows) -> Result<(), StoreError> {
    future::try_join3(
        copy_rows(session, "payment_core", &session.copy_core, &rows.core),
        copy_rows(session, "payment_metadata", &session.copy_metadata, &rows.metadata),
        copy_rows(session, "payment_notes", &session.copy_notes, &rows.notes),
    )
    .await?;
    Ok(())
}

/// Copies into one table after the other, so that the session stays usable after a refusal.
pub(super) async fn copy_in_turn(session: &Session, rows: &TableRows) -> Result<(), StoreError> {
    copy_rows(session, "payment_core", &session.copy_core, &rows.core).await?;
    copy_rows(session, "payment_metadata", &session.copy_metadata, &rows.metadata).await?;
    copy_rows(session, "payment_notes", &session.copy_notes, &rows.notes).await
}
