//! Properties of librdkafka transactions that the daemon depends on, checked against a real broker.

use std::time::Duration;

use payment_writer::domain::record::TimestampMs;
use payment_writer::kafka::callbacks::QuietLog;
use payment_writer::kafka::librdkafka::{ProducerClient, TxnProducer};

use crate::support::{DEADLINE, Scope, Servers};

#[test]
fn a_transaction_with_unsent_messages_is_aborted_and_the_next_one_commits() {
    // GIVEN an open transaction with messages still queued in the client, as after a rejected offset commit
    let scope = Scope::new(Servers::shared(), "abort");
    scope.create_topic(&scope.read_topic, 2);
    let mut config = scope.client_config();
    config
        .set("transactional.id", &scope.group_id)
        .set("linger.ms", "5000")
        .set("delivery.report.only.error", "true");
    let producer: ProducerClient<QuietLog> = config.create_with_context(QuietLog::default()).unwrap();
    let producer = TxnProducer::new(producer, &[&scope.read_topic]);
    let produce = |value| {
        let now = TimestampMs(rdkafka::util::current_time_millis());
        producer.produce_at(0, now, Some(b"57"), Some(value), std::iter::empty())
    };
    producer.init(DEADLINE).unwrap();
    producer.begin().unwrap();
    for _ in 0..10 {
        produce(b"aborted".as_slice()).unwrap();
    }

    // WHEN it is aborted
    let aborted = producer.abort(Duration::from_secs(20));

    // THEN the abort succeeds at once; it does not wait for the purged messages' reports until it times out
    aborted.unwrap();

    // AND the same producer can be used again
    producer.begin().unwrap();
    produce(b"committed".as_slice()).unwrap();
    while !producer.flush(Duration::from_millis(100)) {}
    producer.commit(DEADLINE).unwrap();
    let received = scope.read_all(&scope.read_topic);
    assert_eq!(received.iter().map(|r| r.value.as_deref().unwrap()).collect::<Vec<_>>(), [b"committed"]);
}
