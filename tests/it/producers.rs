//! Transactions of the producer, in both versions of the protocol: lost requests, rejected messages and
//! fenced producers cause no loss and no duplicates.

use std::path::Path;

use kafka_protocol::messages::ApiKey;
use payment_writer::config::Settings;
use payment_writer::domain::batch::{Batch, Progress};
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::outcome::Outcome;
use payment_writer::domain::publication::{OffsetCommit, Publication};
use payment_writer::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::Rules;
use payment_writer::kafka::client::partition_counts;
use payment_writer::kafka::publisher_settings::PublisherSettings;
use payment_writer::kafka::transactions::{ProducerSlot, Transactions};
use payment_writer::ports::PublishError;
use rdkafka::TopicPartitionList;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use uuid::Uuid;

use crate::crash::{kill_at_each_step, small_batches};
use crate::support::{
    DEADLINE, KafkaProxy, Load, Lost, Member, Message, PATIENCE, Payment, Scope, Servers, uuid_v4,
    wait_until, wait_until_within,
};

/// A cluster with transactions as before KIP-890: partitions are added by a request, and the producer epoch
/// does not change.
fn older_transactions() -> Servers {
    let servers = Servers::own();
    let feature = ["downgrade", "--feature", "transaction.version=1"];
    servers.kafka_tool(&[&["FeatureCommand"], &feature[..]].concat());
    // Brokers apply the feature level with a delay; with the new protocol the test would prove nothing here.
    wait_until("transactions use the older protocol", || {
        let told = servers.kafka_tool(&["FeatureCommand", "describe"]);
        told.lines()
            .any(|line| line.contains("transaction.version") && line.contains("FinalizedVersionLevel: 1"))
    });
    servers
}

#[test]
fn with_older_transactions_a_kill_at_any_step_loses_and_duplicates_nothing() {
    let servers = older_transactions();
    let scope = Scope::new(&servers, "kill_older");
    kill_at_each_step(&scope, &small_batches(), 2, Load::new(62));

    // AND neither does one that is lost in the network
    let requests = [ApiKey::AddPartitionsToTxn, ApiKey::AddOffsetsToTxn];
    lost_requests_and_responses_lose_and_duplicate_nothing(&servers, &requests, 63);

    // AND other errors in a transaction are handled as in the new protocol
    rejected_messages_abort_the_transaction_and_the_producer_continues(&servers);
    fenced_producers_commit_nothing(&servers);
}

fn producer(scope: &Scope<'_>) -> Transactions {
    let variables = [
        ("BOOTSTRAP_SERVERS", scope.servers.bootstrap_servers()),
        ("GROUP_ID", &scope.group_id),
        ("INSTANCE_ID", "a"),
        ("INPUT_TOPIC", &scope.input_topic),
        ("READ_TOPIC", &scope.read_topic),
        ("EMAIL_TOPIC", &scope.email_topic),
        ("DEAD_LETTER_TOPIC", &scope.dead_letter_topic),
    ];
    let variables = variables
        .map(|(name, value)| (format!("PAYMENT_WRITER__KAFKA__{name}").into(), value.to_owned().into()));
    let loaded = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap();
    let kafka = loaded.settings.kafka;
    let identity = Identity { topic_id: Uuid::nil(), database_id: Uuid::nil() };
    Transactions::new(PublisherSettings::of(&kafka, &identity, 0), ProducerSlot::default())
}

fn lost_requests_and_responses_lose_and_duplicate_nothing(servers: &Servers, more: &[ApiKey], seed: u64) {
    // GIVEN a daemon that reaches its broker through a proxy
    let scope = Scope::new(servers, "lost");
    scope.prepare(4, 2);
    let proxy = KafkaProxy::to(servers.bootstrap_servers());
    let member = small_batches().with("KAFKA__BOOTSTRAP_SERVERS", &proxy.address());
    let mut load = Load::new(seed);
    let requests = [ApiKey::InitProducerId, ApiKey::Produce, ApiKey::TxnOffsetCommit, ApiKey::EndTxn];
    for api in requests.iter().chain(more) {
        for lost in [Lost::Request, Lost::Answer] {
            scope.feed(load.take(60));

            // WHEN one request of a transaction, or its response, is lost
            proxy.lose(*api, lost);
            member.catch_up(&scope);
            assert!(proxy.has_lost(), "no {api:?} was made");

            // THEN
            eprintln!("{api:?}, {lost:?}: {:?}", scope.assert_exactly_once());
        }
    }
}

#[test]
fn a_lost_request_or_response_loses_and_duplicates_nothing() {
    lost_requests_and_responses_lose_and_duplicate_nothing(Servers::shared(), &[], 64);
}

/// Requests to one partition, to a broker that refuses the first of them, while the next one is on its way. The broker
/// accepts that one, because it knows no sequence numbers of a new producer, and librdkafka concludes that it has the first
/// one, too.
fn first_request_refused<'s>(servers: &'s Servers, name: &str) -> (Scope<'s>, KafkaProxy, Member) {
    let scope = Scope::new(servers, name);
    scope.prepare(1, 1);
    let proxy = KafkaProxy::to(servers.bootstrap_servers());
    // The client sends a second request to a partition only while the first one has less than five messages.
    let member = Member::new("a")
        .with("KAFKA__BOOTSTRAP_SERVERS", &proxy.address())
        .with("KAFKA__PROPERTIES__BATCH_NUM_MESSAGES", "3");
    proxy.lose(ApiKey::Produce, Lost::Refused);
    (scope, proxy, member)
}

#[test]
fn events_that_a_later_request_only_seems_to_confirm_are_not_lost() {
    // GIVEN payments
    let (scope, proxy, member) = first_request_refused(Servers::shared(), "implied");
    let payment = |seed: u64| Payment::new(uuid_v4(seed), 31).status(0).message();
    scope.produce(&scope.input_topic, (0..40).map(payment));

    // WHEN the first request with their read events is refused, and the next one is not
    let daemon = member.catch_up(&scope);
    assert!(proxy.has_lost(), "nothing was produced");

    // THEN each payment has its event, once, and the log says why the transaction was repeated
    assert_eq!(scope.read_all(&scope.read_topic).len(), 40);
    scope.assert_exactly_once();
    assert!(daemon.log().contains("no broker confirmed 3 messages"), "{}", daemon.log());
}

#[test]
fn produce_says_that_a_later_request_only_seems_to_confirm_records() {
    for transactions in [&[][..], &["--transaction-size", "100"]] {
        // GIVEN a broker that refuses the first request, and not the next one
        let (scope, proxy, member) = first_request_refused(Servers::shared(), "implied_input");

        // WHEN `produce` sends records
        let arguments = [&["produce", "--yes", "--count", "40", "--seed", "5"], transactions].concat();
        let mut producing = member.run(&scope, &arguments);

        // THEN it does not say that all of them are in the log
        assert_eq!(producing.wait().code(), Some(1), "{}", producing.log());
        assert!(proxy.has_lost(), "nothing was produced");
        assert!(producing.log().contains("not delivered"), "{}", producing.log());
    }
}

/// The outputs of payments of these accounts.
fn publication(accounts: impl Iterator<Item = i64>) -> Publication {
    let mut source = SourceBatch::default();
    let mut count = 0;
    for account in accounts {
        let value = Payment::new(uuid_v4(count as u64), account).json();
        let (key, at) = (account.to_string(), Some(TimestampMs(1_751_050_608_500)));
        source.push(Partition(0), Offset(count), at, Some(key.as_bytes()), Some(value.as_bytes()), []);
        count += 1;
    }
    let reached = NextOffset(count);
    let progress = vec![Progress { partition: Partition(0), seen: NextOffset(0), reached, timestamp: None }];
    let batch = Batch::assemble(source, progress, &Rules::default());
    let fates = vec![Outcome::Written; batch.len()];
    let spans = vec![OffsetCommit { partition: Partition(0), publish_from: NextOffset(0), commit: reached }];
    Publication::of_batch(batch, fates, spans, true)
}

fn accounts_of(scope: &Scope<'_>, topic: &str) -> Vec<i64> {
    let mut accounts: Vec<_> =
        scope.read_all(topic).iter().map(|event| event.json()["custId"].as_i64().unwrap()).collect();
    accounts.sort_unstable();
    accounts
}

fn fenced_producers_commit_nothing(servers: &Servers) {
    // GIVEN two producers with one transactional id
    let scope = Scope::new(servers, "succeeded");
    scope.create_topics(4, 2);
    let (mut first, mut second) = (producer(&scope), producer(&scope));
    first.init().unwrap();
    first.publish(&publication(1..=3), None).unwrap();
    second.init().unwrap();

    // WHEN the earlier one continues
    let refused = first.publish(&publication(4..=6), None).unwrap_err();

    // THEN it gets an error, and nothing of its transaction is visible
    assert!(matches!(refused, PublishError::ReplaceProducer(_)), "{refused}");
    let is_fenced = ["ProducerFenced", "InvalidProducerEpoch", "Fenced"]
        .iter()
        .any(|code| refused.to_string().contains(code));
    assert!(is_fenced, "{refused}");
    second.publish(&publication(7..=9), None).unwrap();
    let again = first.publish(&publication(4..=6), None).unwrap_err();
    assert!(matches!(again, PublishError::ReplaceProducer(_)), "{again}");
    assert_eq!(accounts_of(&scope, &scope.read_topic), [1, 2, 3, 7, 8, 9]);
}

#[test]
fn a_fenced_producer_commits_nothing() {
    fenced_producers_commit_nothing(Servers::shared());
}

fn rejected_messages_abort_the_transaction_and_the_producer_continues(servers: &Servers) {
    // GIVEN a producer that has metadata of its topics
    let scope = Scope::new(servers, "refused");
    scope.create_topics(4, 2);
    let mut producer = producer(&scope);
    producer.init().unwrap();
    producer.publish(&publication(1..=20), None).unwrap();

    // WHEN one of them is deleted
    scope.delete_topic(&scope.email_topic);
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    wait_until("the topic is gone", || {
        !partition_counts(consumer.client()).unwrap().contains_key(&scope.email_topic)
    });
    let refused = producer.publish(&publication(21..=40), None).unwrap_err();

    // THEN what was sent to the others is not visible, and the next attempt names the missing topic
    assert!(matches!(refused, PublishError::ReplaceProducer(_) | PublishError::Aborted { .. }), "{refused}");
    let missing = producer.init().unwrap_err().to_string();
    assert!(missing.contains(&scope.email_topic), "{missing}");

    // AND after it is created again, with more partitions, the producer continues
    scope.create_topic(&scope.email_topic, 3);
    wait_until("the topic is available", || {
        producer.init().is_ok() && producer.publish(&publication(41..=60), None).is_ok()
    });
    producer.publish(&publication(61..=80), None).unwrap();
    let expected: Vec<_> = (1..=20).chain(41..=80).collect();
    assert_eq!(accounts_of(&scope, &scope.read_topic), expected);
    assert_eq!(accounts_of(&scope, &scope.email_topic), (41..=80).collect::<Vec<_>>());
}

#[test]
fn a_rejected_message_aborts_the_transaction_and_the_producer_continues() {
    rejected_messages_abort_the_transaction_and_the_producer_continues(Servers::shared());
}

/// Each dead letter here fills a record batch of its own, and together they fill more than one request.
#[test]
fn outputs_that_fill_many_requests_keep_their_order() {
    let scope = Scope::new(Servers::shared(), "large_outputs");
    scope.prepare(2, 2);
    let large =
        |n: usize| Message::new(n.to_string(), format!("{n:04}").repeat(125_000)).partition((n % 2) as i32);
    scope.produce(&scope.input_topic, (0..80).map(large));
    let member =
        Member::new("a").with("LANES", "1").with("BATCH__MAX_BYTES", "64MiB").with("BATCH__LINGER", "2s");
    member.catch_up(&scope);
    scope.assert_exactly_once();
    let letters = scope.read_all(&scope.dead_letter_topic);
    for (partition, output_partition) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let offsets: Vec<i64> = letters
            .iter()
            .filter(|l| l.partition == output_partition && l.header("dlq-partition") == partition.to_string())
            .map(|letter| letter.header("dlq-offset").parse().unwrap())
            .collect();
        assert!(offsets.len() > 1 && offsets.is_sorted(), "{offsets:?}");
    }
}

#[test]
fn small_batch_limits_of_outputs_are_respected_and_one_below_an_event_is_reported() {
    // GIVEN output topics that accept batches of 20 kB at most, and one batch of hundreds of payments
    let scope = Scope::new(Servers::shared(), "small_batches");
    scope.create_topic(&scope.input_topic, 2);
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        scope.create_topic_with(topic, 2, &[("max.message.bytes", "20000")]);
    }
    scope.command(&["migrate"]).succeeds();
    scope.feed(Load::without_bad_records(65).take(2_000));

    // WHEN they are published, THEN in record batches that the topics accept
    let member = Member::new("a").with("LANES", "1").with("BATCH__LINGER", "500ms");
    member.catch_up(&scope);
    scope.assert_exactly_once();

    // AND if not even one event fits, the error names topic, setting and remedy, and publishing resumes
    // afterwards
    set_topic(&scope, &scope.read_topic, "max.message.bytes=100");
    scope.feed(Load::without_bad_records(66).take(20));
    let mut daemon = member.start(&scope);
    let told = || daemon.get("/readyz").map_or(String::new(), |reply| reply.body);
    wait_until("the error names the setting", || {
        told().contains("max.message.bytes") || daemon.log().contains("raise max.message.bytes")
    });
    let log = daemon.log();
    assert!(log.contains(&format!("raise max.message.bytes of {}", scope.read_topic)), "{log}");
    set_topic(&scope, &scope.read_topic, "max.message.bytes=20000");
    scope.drains_exactly_once([&mut daemon]);
}

fn set_topic(scope: &Scope<'_>, topic: &str, setting: &str) {
    let entity = ["--alter", "--entity-type", "topics", "--entity-name", topic, "--add-config", setting];
    scope.servers.kafka_tool(&[&["kafka.admin.ConfigCommand"], &entity[..]].concat());
}

#[test]
fn no_client_creates_topics_automatically() {
    // GIVEN brokers that create topics automatically
    let servers = Servers::with_kafka_settings("auto.create.topics.enable=true\n");
    let scope = Scope::new(&servers, "created");
    scope.create_topic(&scope.input_topic, 2);
    scope.command(&["migrate"]).succeeds();

    // WHEN the outputs do not exist, the daemon has payments, and every command looks at the outputs
    scope.feed(Load::without_bad_records(67).take(20));
    let mut daemon = Member::new("a").start(&scope);
    wait_until("the missing output is reported", || {
        daemon.get("/readyz").is_some_and(|reply| reply.body.contains("output topic"))
    });
    for words in
        [&["cursors", "show"][..], &["reconcile"], &["dlq", "list"], &["topics", "check"], &["check-config"]]
    {
        scope.command(words);
    }

    // THEN none of them exists
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    let topics = consumer.fetch_metadata(None, DEADLINE).unwrap();
    let names: Vec<&str> = topics.topics().iter().map(|topic| topic.name()).collect();
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        assert!(!names.contains(&topic.as_str()), "{names:?}");
    }
    daemon.kill();
}

/// Changes the quotas of the daemon's clients.
fn change_quota(servers: &Servers, change: &[&str]) {
    let whose = ["--alter", "--entity-type", "clients", "--entity-name", "payment-writer"];
    servers.kafka_tool(&[&["kafka.admin.ConfigCommand"], &whose[..], change].concat());
}

#[test]
#[ignore = "takes minutes; `make trials`"]
fn trials_a_producer_quota_is_logged_and_payments_flow_at_its_rate() {
    // GIVEN a quota that allows a fraction of a batch within the transaction timeout
    let servers = Servers::own();
    let scope = Scope::new(&servers, "quota");
    scope.prepare(4, 2);
    scope.feed(Load::without_bad_records(68).take(12_000));
    let quota = |change: &[&str]| change_quota(&servers, change);
    quota(&["--add-config", "producer_byte_rate=100000"]);

    // WHEN they are published, THEN the throttling is logged, and some of them get through, again and again
    let mut daemon = Member::new("a").with("LANES", "1").start(&scope);
    let published = || daemon.metric("payment_writer_published_total", "topic=\"read\"");
    wait_until_within(PATIENCE, "the quota is told", || {
        daemon.log().contains("brokers throttle this client")
    });
    for _ in 0..3 {
        let before = published();
        wait_until_within(PATIENCE, "some are published", || published() > before);
    }
    assert!(published() < 12_000.0, "the quota had no effect");

    // AND without the quota the rest follows at once, exactly once
    quota(&["--delete-config", "producer_byte_rate"]);
    scope.drains_exactly_once([&mut daemon]);
}

#[test]
fn an_open_transaction_of_an_older_version_is_waited_for() {
    // GIVEN payments that are written and published, and an open transaction under the older version's
    // transactional id, with an event and the group's offsets in it
    let scope = Scope::new(Servers::shared(), "former_name");
    scope.prepare(2, 2);
    let mut load = Load::without_bad_records(69);
    scope.feed(load.take(50));
    let member = Member::new("a").with("LANES", "1");
    member.catch_up(&scope);
    let former: BaseProducer = scope
        .client_config()
        .set("transactional.id", format!("{}-a-0", scope.group_id))
        .set("transaction.timeout.ms", "8000")
        .create()
        .unwrap();
    former.init_transactions(DEADLINE).unwrap();
    former.begin_transaction().unwrap();
    let event = BaseRecord::<[u8], [u8]>::to(&scope.read_topic).key(b"1").payload(b"never to be seen");
    former.send(event).map_err(|(error, _)| error).unwrap();
    let consumer: BaseConsumer = scope.client_config().set("group.id", &scope.group_id).create().unwrap();
    let mut offsets = TopicPartitionList::new();
    for (partition, (offset, mark)) in scope.committed_all() {
        let mut element = offsets.add_partition(&scope.input_topic, partition);
        element.set_offset(rdkafka::Offset::Offset(offset + 7)).unwrap();
        element.set_metadata(mark);
    }
    former.send_offsets_to_transaction(&offsets, &consumer.group_metadata().unwrap(), DEADLINE).unwrap();
    former.flush(DEADLINE).unwrap();

    // WHEN this version continues with more payments
    scope.feed(load.take(50));
    let mut daemon = member.start(&scope);
    scope.wait_until_caught_up();
    daemon.drains();

    // THEN the open transaction was aborted, and every record has exactly one outcome
    scope.assert_exactly_once();
}

#[test]
fn an_output_topic_that_is_missing_or_created_again_is_named() {
    // GIVEN a daemon that publishes
    let scope = Scope::new(Servers::shared(), "made_again");
    scope.prepare(2, 2);
    let mut daemon = Member::new("a").with("LANES", "1").start(&scope);
    let mut load = Load::without_bad_records(70);
    scope.feed(load.take(20));
    scope.wait_until_caught_up();
    let before = scope.count("payment_core");

    // WHEN an output topic is deleted, THEN it is named
    scope.delete_topic(&scope.read_topic);
    scope.feed(load.take(20));
    wait_until_within(PATIENCE, "the missing topic is named", || {
        daemon.get("/readyz").is_some_and(|reply| reply.body.contains(&scope.read_topic))
    });

    // AND when it is there again, what that means
    wait_until_within(PATIENCE, "the topic is created again", || {
        std::panic::catch_unwind(|| scope.create_topic(&scope.read_topic, 2)).is_ok()
    });
    scope.wait_until_caught_up();
    let line = format!("output topic {} was deleted and created again", scope.read_topic);
    wait_until_within(PATIENCE, "it is told", || daemon.log().contains(&line));
    assert_eq!(daemon.log().matches(&line).count(), 1, "{}", daemon.log());
    daemon.drains();
    assert_eq!(scope.read_all(&scope.read_topic).len() as i64, scope.count("payment_core") - before);
}

#[test]
#[ignore = "takes minutes; `make trials`"]
fn trials_a_reader_quota_is_logged_once_and_its_client_is_kept() {
    // GIVEN a quota on reading far below the load
    let servers = Servers::own();
    let scope = Scope::new(&servers, "read_quota");
    scope.prepare(8, 2);
    scope.feed(Load::without_bad_records(71).take(12_000));
    let quota = |change: &[&str]| change_quota(&servers, change);
    quota(&["--add-config", "consumer_byte_rate=20000"]);

    // WHEN the daemon reads for a while
    let mut daemon = Member::new("a").with("LANES", "1").start(&scope);
    let read = || daemon.metric("payment_writer_records_total", "");
    wait_until_within(PATIENCE, "the quota is told", || {
        daemon.log().contains("brokers throttle this client")
    });
    let throttled =
        || daemon.metric("payment_writer_kafka_throttled_milliseconds_total", "client=\"reader\"");
    wait_until_within(2 * PATIENCE, "it was throttled for a minute", || throttled() > 60_000.0);

    // THEN that was told once, and the client was not replaced
    let log = daemon.log();
    assert!(read() < 12_000.0, "the quota had no effect");
    assert_eq!(log.matches("replacing the client").count(), 0, "{log}");
    assert_eq!(log.matches("throttle this client").count(), 1, "{log}");

    // AND without the quota the rest follows, exactly once
    quota(&["--delete-config", "consumer_byte_rate"]);
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
}
