use std::collections::HashSet;
use std::error::Error;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Headers, Message};
use serde_json::Value;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &args[1])
        .set("group.id", &args[3])
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .create()?;
    consumer.subscribe(&[&args[2]])?;
    let mut seen = HashSet::new(); // in a service: a unique column of its database
    let mut uncommitted = 0;
    let mut end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        let polled = consumer.poll(Duration::from_millis(200)).transpose()?;
        if let Some(record) = &polled {
            let source =
                record.headers().and_then(|headers| headers.iter().find(|header| header.key == "source"));
            let source = str::from_utf8(source.and_then(|header| header.value).ok_or("no header source")?)?;
            // The same for a record that this group reads twice, as after a crash before its commit.
            if seen.insert(source.to_owned()) {
                // serde_json with `arbitrary_precision`: a number keeps its text, no binary float.
                let event: Value = serde_json::from_slice(record.payload().ok_or("no value")?)?;
                let key = str::from_utf8(record.key().ok_or("no key")?)?;
                println!("{source} {key} {} {}", event["id"].as_str().ok_or("no id")?, event["amount"]); // the work
            }
            uncommitted += 1;
            end = Instant::now() + Duration::from_secs(5);
        }
        if uncommitted == 500 || uncommitted > 0 && polled.is_none() {
            consumer.commit_consumer_state(CommitMode::Sync)?; // after the work, never before
            uncommitted = 0;
        }
    }
    Ok(())
}
