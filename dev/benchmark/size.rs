//! Disk space of payments: bytes in each table, index and topic, and in the WAL.

use std::path::Path;
use std::time::Duration;

use clap::Parser;
use payment_writer::postgres::connection::describe;
use serde_json::json;
use tokio_postgres::Client;

use crate::report::{self, Lines};
use crate::row;
use crate::site::{Servers, Site, failed};
use crate::throughput::{PRODUCE_LIMIT, settle};
use crate::{Outcome, ServersArguments};

/// Time limit for writing the records of one measurement.
const DRAIN_LIMIT: Duration = Duration::from_secs(1_200);

/// `bench size`
#[derive(Parser)]
pub struct Arguments {
    #[command(flatten)]
    servers: ServersArguments,
    /// Payments in a measurement; with few, partly filled pages and batches distort the result
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    count: u64,
}

/// What uses the space, and how many bytes.
type Sizes = Vec<(&'static str, u64)>;

const TABLES: [&str; 3] = ["payment_core", "payment_metadata", "payment_notes"];

async fn number(client: &Client, statement: &str) -> Result<u64, String> {
    let row = client.query_one(statement, &[]).await.map_err(|error| describe(&error))?;
    u64::try_from(row.get::<_, i64>(0)).map_err(|_| format!("{statement}: a negative number"))
}

/// Bytes of WAL that the server has written so far.
async fn wal_position(client: &Client) -> Result<u64, String> {
    number(client, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint").await
}

/// Size of a table or its indexes, in bytes, including partitions and TOAST.
async fn tree(client: &Client, what: &str, table: &str) -> Result<u64, String> {
    let statement = format!(
        "SELECT coalesce(sum({what}(inhrelid)), 0)::bigint FROM pg_inherits
         WHERE inhparent = 'payment_writer.{table}'::regclass"
    );
    number(client, &statement).await
}

/// Bytes in the segments of a topic, in the broker's folders under `folder`. Indexes are not counted: they
/// have about ten bytes for 4 KiB.
fn topic_bytes(folder: &Path, topic: &str) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        let is_segment = path.extension().is_some_and(|extension| extension == "log")
            && folder.file_name().is_some_and(|of| is_partition(&of.to_string_lossy(), topic));
        if is_segment {
            sum += path.metadata()?.len();
        } else if path.is_dir()
            && (is_partition(&name.to_string_lossy(), topic) || holds_logs(&name.to_string_lossy()))
        {
            sum += topic_bytes(&path, topic)?;
        }
    }
    Ok(sum)
}

/// Whether a folder with this name contains a partition of this topic.
fn is_partition(folder: &str, topic: &str) -> bool {
    let number = folder.strip_prefix(topic).and_then(|rest| rest.strip_prefix('-'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether a folder with this name is a broker's log folder, as named by `dev/servers`.
fn holds_logs(folder: &str) -> bool {
    folder.starts_with("kafka-")
}

fn measure(site: &Site<'_>, folder: &Path, ids: &str, count: u64) -> Outcome<Sizes> {
    let sent = site.produce(&["--ids", ids, "--count", &count.to_string()])?.finish(PRODUCE_LIMIT)?;
    if sent.expected.written != count {
        return Err(format!("{} payments were sent instead of {count}", sent.expected.written));
    }
    settle(site.servers)?;
    let before = site.servers.connected(&site.url, async |client| wal_position(client).await)?;
    site.start(&["run", "--until-caught-up"], &[])?.succeed(DRAIN_LIMIT)?;
    let mut sizes = site.servers.connected(&site.url, async |client| {
        let mut sizes: Sizes = vec![("WAL", wal_position(client).await? - before)];
        for table in TABLES {
            sizes.push((table, tree(client, "pg_table_size", table).await?));
        }
        sizes.push(("idempotency", tree(client, "pg_table_size", "idempotency").await?));
        sizes.push(("idempotency, its index", tree(client, "pg_indexes_size", "idempotency").await?));
        let rows = number(client, "SELECT count(*) FROM payment_writer.payment_core").await?;
        match rows == count {
            true => Ok(sizes),
            false => Err(format!("{rows} payments were written instead of {count}")),
        }
    })?;
    let kafka = site.settings()?.kafka;
    for (what, topic) in [
        ("input topic", &kafka.input_topic),
        ("read topic", &kafka.read_topic),
        ("e-mail topic", &kafka.email_topic),
    ] {
        sizes.push((what, topic_bytes(folder, topic).map_err(failed("measuring a topic"))?));
    }
    match sizes.iter().find(|(_, bytes)| *bytes == 0) {
        None => Ok(sizes),
        Some((what, _)) => Err(format!("{what} was not found, or has no bytes")),
    }
}

/// `bench size`
pub fn run(arguments: &Arguments) -> Outcome<()> {
    let mut lines = Lines::new(arguments.servers.json.as_deref())?;
    let servers = Servers::find(&arguments.servers)?;
    let mut columns = Vec::new();
    for ids in ["v7", "v4"] {
        eprintln!("bench: {} payments with {ids} ids", arguments.count);
        let sizes = measure(&Site::create(&servers)?, &arguments.servers.servers, ids, arguments.count)?;
        for (what, bytes) in &sizes {
            lines.add(json!({
                "benchmark": "size", "ids": ids, "payments": arguments.count, "of": what, "bytes": bytes,
            }))?;
        }
        columns.push(sizes);
    }
    let a_payment = |bytes: u64| format!("{:.1}", bytes as f64 / arguments.count as f64);
    let mut rows = vec![row!["bytes a payment", "v7", "v4"]];
    for (v7, v4) in columns[0].iter().zip(&columns[1]) {
        rows.push(row![v7.0, a_payment(v7.1), a_payment(v4.1)]);
    }
    report::print("Disk space of a payment", &rows);
    lines.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_of_one_topic_are_counted_wherever_the_broker_keeps_them() {
        let folder = tempfile::tempdir().unwrap();
        for (path, bytes) in [
            ("kafka-1/bench_1_read-0/00.log", 10),
            ("kafka-1/bench_1_read-19/00.log", 20),
            ("kafka-1/bench_1_read-19/00.index", 400),
            ("kafka-1/bench_1_read-more-1/00.log", 8_000),
            ("kafka-1/bench_11_read-0/00.log", 16_000),
            ("postgres/bench_1_read-0/00.log", 32_000),
        ] {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![0; bytes]).unwrap();
        }
        assert_eq!(topic_bytes(folder.path(), "bench_1_read").unwrap(), 30);
    }
}
