//! Compares rows with their records.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;

use futures_util::TryStreamExt;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{Checker, Result, hash};

impl Checker {
    /// Reads the id of the input topic, which all sources begin with.
    pub async fn read_topic_id(&mut self, postgres: &Client, input_topic: &str) -> Result<()> {
        let rows = postgres
            .query(
                "SELECT DISTINCT topic_id::text FROM payment_writer.source_cursor WHERE topic = $1",
                &[&input_topic],
            )
            .await?;
        let topics: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
        match topics.iter().next() {
            None if self.partitions.is_empty() => {}
            Some(topic_id) if topics.len() == 1 => self.topic_id_prefix = topic_id[..8].to_owned(),
            _ => self.wrong(format!("source_cursor has {} topics with that name", topics.len())),
        }
        Ok(())
    }

    /// Finds every row's record, and compares the two.
    pub async fn read_tables(&mut self, postgres: &Client) -> Result<()> {
        let mut places: HashMap<u128, (i32, i64)> = HashMap::new();
        let rows = postgres.query_raw(
            "SELECT payment_id, message_id, source_partition, source_offset,
                    (extract(epoch FROM created_at) * 1000)::bigint,
                    version = 1 AND updated_at = created_at
             FROM payment_writer.payment_metadata",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let (payment_id, message_id) = (row.get::<_, Uuid>(0).as_u128(), row.get::<_, Uuid>(1).as_u128());
            let (partition, offset): (i32, i64) = (row.get(2), row.get(3));
            let Some(record) = self.record(partition, offset) else {
                self.wrong(format!("payment_metadata: {partition}/{offset} is not in the input"));
                continue;
            };
            record.found.metadata = record.found.metadata.saturating_add(1);
            let same = record.payment_id == payment_id
                && record.message_id == message_id
                && record.timestamp_ms == row.get::<_, i64>(4)
                && row.get::<_, bool>(5);
            if !same {
                self.wrong(format!(
                    "payment_metadata: the row of {partition}/{offset} differs from its record"
                ));
            }
            places.insert(payment_id, (partition, offset));
        }

        let rows = postgres.query_raw(
            "SELECT payment_id, (extract(epoch FROM created_at) * 1000)::bigint, cust_id, (amount * 10000)::bigint,
                    amount * 10000 = trunc(amount * 10000), currency, status, type
             FROM payment_writer.payment_core",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let payment_id = row.get::<_, Uuid>(0);
            let Some(&(partition, offset)) = places.get(&payment_id.as_u128()) else {
                self.wrong(format!("payment_core: {payment_id} is not in payment_metadata"));
                continue;
            };
            let status = i8::try_from(row.get::<_, i16>(6)).unwrap_or(i8::MAX);
            let (timestamp_ms, cust_id, amount): (i64, i64, i64) = (row.get(1), row.get(2), row.get(3));
            let core =
                hash((timestamp_ms, cust_id, amount, row.get::<_, &str>(5), status, row.get::<_, &str>(7)));
            let record = self.record(partition, offset).unwrap();
            record.found.core = record.found.core.saturating_add(1);
            if record.core != core || !row.get::<_, bool>(4) {
                self.wrong(format!("payment_core: the row of {partition}/{offset} differs from its record"));
            }
        }

        let rows = postgres.query_raw(
            "SELECT payment_id, (extract(epoch FROM created_at) * 1000)::bigint, external_ref_id, comment
             FROM payment_writer.payment_notes",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let payment_id = row.get::<_, Uuid>(0);
            let Some(&(partition, offset)) = places.get(&payment_id.as_u128()) else {
                self.wrong(format!("payment_notes: {payment_id} is not in payment_metadata"));
                continue;
            };
            let notes =
                hash((row.get::<_, i64>(1), row.get::<_, Option<&str>>(2), row.get::<_, Option<&str>>(3)));
            let record = self.record(partition, offset).unwrap();
            record.found.notes = record.found.notes.saturating_add(1);
            if record.notes != Some(notes) {
                self.wrong(format!("payment_notes: the row of {partition}/{offset} differs from its record"));
            }
        }

        let rows = postgres.query_raw(
            "SELECT message_id, source_partition, source_offset, (extract(epoch FROM created_at) * 1000)::bigint
             FROM payment_writer.idempotency",
            None::<i32>,
        );
        let mut rows = pin!(rows.await?);
        while let Some(row) = rows.try_next().await? {
            let (partition, offset): (i32, i64) = (row.get(1), row.get(2));
            let Some(record) = self.record(partition, offset) else {
                self.wrong(format!("idempotency: {partition}/{offset} is not in the input"));
                continue;
            };
            record.found.idempotency = record.found.idempotency.saturating_add(1);
            let same = record.message_id == row.get::<_, Uuid>(0).as_u128()
                && record.timestamp_ms == row.get::<_, i64>(3);
            if !same {
                self.wrong(format!("idempotency: the row of {partition}/{offset} differs from its record"));
            }
        }
        Ok(())
    }

    /// Checks that both cursors are at the end of the log: nothing is in flight. With the group's `committed`
    /// offsets, these have to be there, too.
    pub async fn check_cursors(
        &mut self,
        postgres: &Client,
        input_topic: &str,
        ends: &BTreeMap<i32, i64>,
        committed: Option<&BTreeMap<i32, i64>>,
    ) -> Result<()> {
        let rows = postgres
            .query(
                "SELECT partition, applied, published FROM payment_writer.source_cursor
                 WHERE topic = $1 AND topic_id::text LIKE $2 || '%'",
                &[&input_topic, &self.topic_id_prefix],
            )
            .await?;
        let cursors: HashMap<i32, (i64, Option<i64>)> =
            rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
        for (&partition, &end) in ends {
            let published = (!self.exceptions.rows_only).then_some(end);
            match cursors.get(&partition) {
                Some(found) if *found == (end, published) => {}
                // A partition that never had a record.
                None if end == 0 => {}
                None if committed.is_none()
                    && self.partitions.get(usize::try_from(partition)?).is_none_or(Vec::is_empty) => {}
                found => self.wrong(format!(
                    "cursor of partition {partition} (applied, published) is {found:?}, the log's end {end}"
                )),
            }
            if let Some(committed) = committed {
                let offset = committed.get(&partition).copied().unwrap_or_default();
                if offset != end {
                    self.wrong(format!(
                        "the group's offset of partition {partition} is {offset}, the log's end {end}"
                    ));
                }
            }
        }
        Ok(())
    }
}
