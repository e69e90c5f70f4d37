//! Progress of the daemons, read from Kafka and Postgres.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio_postgres::NoTls;

use crate::support::{Scope, block_on};

/// Short: while this blocks, records may already flow again.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// A client without any response for this long may have lost all its brokers for good (librdkafka #5301).
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Offsets by partition.
pub type Offsets = BTreeMap<i32, i64>;

/// Uses a separate client for each question, as servers may not answer.
pub struct Watch {
    config: ClientConfig,
    consumer: RefCell<BaseConsumer>,
    answered_at: Cell<Instant>,
    topic: String,
    partitions: i32,
}

impl Watch {
    pub fn over(scope: &Scope<'_>, partitions: i32) -> Watch {
        let mut config = scope.client_config();
        config
            .set("group.id", &scope.group_id)
            // Otherwise a response waits for a moment without a transaction, and a busy group has few of
            // those.
            .set("isolation.level", "read_uncommitted")
            .set("topic.metadata.refresh.interval.ms", "2000")
            .set("reconnect.backoff.max.ms", "500");
        let (consumer, topic) = (RefCell::new(config.create().unwrap()), scope.input_topic.clone());
        Watch { config, consumer, answered_at: Cell::new(Instant::now()), topic, partitions }
    }

    /// Queries with the client, which is recreated after a long silence.
    fn asked<T>(&self, question: impl FnOnce(&BaseConsumer) -> Option<T>) -> Option<T> {
        let asked_at = Instant::now();
        let answer = question(&self.consumer.borrow());
        if answer.is_some() {
            self.answered_at.set(Instant::now());
        } else if asked_at.duration_since(self.answered_at.get()) > SILENCE_MAX {
            self.consumer.replace(self.config.create().unwrap());
            self.answered_at.set(Instant::now());
        }
        answer
    }

    /// The input's end offsets; `None` while the brokers do not answer.
    pub fn ends(&self) -> Option<Offsets> {
        let end = |consumer: &BaseConsumer, partition| {
            let (_, end) = consumer.fetch_watermarks(&self.topic, partition, ANSWER_MAX).ok()?;
            Some((partition, end))
        };
        self.asked(|consumer| (0..self.partitions).map(|partition| end(consumer, partition)).collect())
    }

    /// The group's offsets, 0 where there is none; `None` while the brokers do not answer.
    pub fn committed(&self) -> Option<Offsets> {
        let mut list = TopicPartitionList::new();
        for partition in 0..self.partitions {
            list.add_partition(&self.topic, partition);
        }
        let answer = self.asked(|consumer| consumer.committed_offsets(list, ANSWER_MAX).ok())?;
        let offset = |offset| match offset {
            Offset::Offset(offset) => offset,
            _ => 0,
        };
        Some(answer.elements().iter().map(|e| (e.partition(), offset(e.offset()))).collect())
    }

    /// `applied` of the cursors; `None` while the database does not answer.
    pub fn applied(&self, scope: &Scope<'_>) -> Option<Offsets> {
        let asked = async {
            let (client, connection) = tokio_postgres::connect(&scope.postgres_url(), NoTls).await.ok()?;
            tokio::spawn(connection);
            let query = "SELECT partition, applied FROM payment_writer.source_cursor";
            let rows = client.query(query, &[]).await.ok()?;
            Some(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
        };
        block_on(async { tokio::time::timeout(ANSWER_MAX, asked).await.ok().flatten() })
    }

    /// The leader of a partition, and its in-sync replicas.
    pub fn leader(&self, topic: &str, partition: i32) -> Option<(i32, usize)> {
        let metadata = self.asked(|consumer| consumer.fetch_metadata(Some(topic), ANSWER_MAX).ok())?;
        let found = metadata.topics().first()?.partitions().iter().find(|p| p.id() == partition)?;
        Some((found.leader(), found.isr().len()))
    }

    /// Whether every partition of the topic has `replicas` in sync.
    pub fn is_in_sync(&self, topic: &str, replicas: usize) -> bool {
        let metadata = self.asked(|consumer| consumer.fetch_metadata(Some(topic), ANSWER_MAX).ok());
        metadata.is_some_and(|metadata| {
            let partitions = metadata.topics().first().map_or(&[][..], |topic| topic.partitions());
            !partitions.is_empty() && partitions.iter().all(|p| p.leader() >= 0 && p.isr().len() >= replicas)
        })
    }
}

/// Whether every partition has reached `ends`.
pub fn has_reached(found: &Offsets, ends: &Offsets) -> bool {
    ends.iter().all(|(partition, end)| found.get(partition).copied().unwrap_or(0) >= *end)
}
