//! Latency as a consumer of the read topic sees it: from the input record's timestamp, which is the event's
//! `createdAt`, to the moment at which a `read_committed` consumer gets the event. Prints percentiles.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

/// Latency of read events, seen from outside
#[derive(Parser)]
struct Arguments {
    /// Brokers
    #[arg(long)]
    kafka: String,
    /// The read topic
    #[arg(long, default_value = "payment_read_topic")]
    topic: String,
    /// How long to listen
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

fn main() {
    let arguments = Arguments::parse();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &arguments.kafka)
        .set("group.id", "latency-probe")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "10")
        .create()
        .expect("a consumer");
    let metadata =
        consumer.fetch_metadata(Some(&arguments.topic), Duration::from_secs(10)).expect("metadata");
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|t| t.partitions()) {
        list.add_partition_offset(&arguments.topic, partition.id(), Offset::End).expect("a partition");
    }
    consumer.assign(&list).expect("an assignment");
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut latencies_ms = Vec::new();
    while Instant::now() < until {
        let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_millis() as i64;
        let event: serde_json::Value =
            serde_json::from_slice(message.payload().unwrap_or_default()).expect("a read event");
        let created: jiff::Timestamp =
            event.get("createdAt").and_then(|v| v.as_str()).expect("createdAt").parse().expect("a time");
        latencies_ms.push(now - created.as_millisecond());
    }
    latencies_ms.sort_unstable();
    let at = |share: f64| {
        latencies_ms
            .get((latencies_ms.len() as f64 * share) as usize)
            .or(latencies_ms.last())
            .copied()
            .unwrap_or(-1)
    };
    println!(
        "latency of {} read events in ms: p50 {}  p90 {}  p99 {}  p99.9 {}  max {}",
        latencies_ms.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        latencies_ms.last().copied().unwrap_or(-1)
    );
}
