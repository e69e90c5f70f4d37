use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};

/// How many records of the transaction are in the log. librdkafka can report one as delivered that is not; it then has
/// no offset.
#[derive(Default)]
struct Delivered(AtomicUsize);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();

    fn delivery(&self, report: &DeliveryResult<'_>, (): ()) {
        if report.as_ref().is_ok_and(|message| message.offset() >= 0) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let (topic, count) = (&args[2], args[3].parse::<usize>()?);
    let timeout = Duration::from_secs(60);
    let producer: BaseProducer<Delivered> = ClientConfig::new()
        .set("bootstrap.servers", &args[1])
        .set("transactional.id", "shop-rust-1")
        .set("partitioner", "murmur2_random")
        .set("compression.type", "zstd")
        .create_with_context(Delivered::default())?;
    producer.init_transactions(timeout)?;
    producer.begin_transaction()?;
    for n in 0..count {
        // The id is made once for each payment and stored with it: a repeat has the same one.
        let id = uuid::Uuid::now_v7();
        let account = (n % 50 + 1).to_string();
        let value = format!(
            r#"{{"messageId":"{id}","amount":{}.50,"status":2,"currency":"EUR","custId":{account},"type":"BWI"}}"#,
            n + 1
        );
        let trace = format!("00-{}-{:016x}-01", id.simple(), n + 1);
        let headers = OwnedHeaders::new()
            .insert(Header { key: "schema-version", value: Some("1") })
            .insert(Header { key: "correlation-id", value: Some(&format!("order-{n}")) })
            .insert(Header { key: "traceparent", value: Some(&trace) });
        producer
            .send(BaseRecord::to(topic).key(&account).payload(&value).headers(headers))
            .map_err(|(error, _)| error)?;
        producer.poll(Duration::ZERO);
    }
    producer.flush(timeout)?;
    if producer.context().0.swap(0, Ordering::Relaxed) != count {
        producer.abort_transaction(timeout)?;
        return Err("not all records are in the log: send the same payments again, with the same ids".into());
    }
    producer.commit_transaction(timeout)?;
    println!("sent {count}");
    Ok(())
}
