//! Whoever speaks with the brokers, and in whichever of the protocol's two ways of transactions: the same holds.

use std::path::Path;

use kafka_protocol::messages::ApiKey;
use payment_writer::batch::{Batch, Fates, Progress};
use payment_writer::config::Settings;
use payment_writer::cursor::Identity;
use payment_writer::disposition::{FailureClass, Fate};
use payment_writer::kafka::direct::{DirectSettings, DirectTransactions};
use payment_writer::kafka::publisher::{PublisherSettings, Transactions};
use payment_writer::kafka_client::partition_counts;
use payment_writer::lane::ports::PublishFailure;
use payment_writer::publication::{Publication, Span};
use payment_writer::record::{Headers, NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::wire::Rules;
use rdkafka::consumer::{BaseConsumer, Consumer};
use uuid::Uuid;

use crate::crash::{kill_at_each_step, small_batches};
use crate::support::{KafkaProxy, Load, Lost, Member, Message, Payment, Scope, Servers, uuid_v4, wait_until};

/// A cluster whose transactions are as they were before KIP-890: partitions join by a request, and a producer keeps
/// its epoch.
fn older_transactions() -> Servers {
    let servers = Servers::own();
    let feature = ["downgrade", "--feature", "transaction.version=1"];
    servers.kafka_tool(&[&["FeatureCommand"], &feature[..]].concat());
    // Brokers hear of it a little later, and a test of the newer way would prove nothing here.
    let scope = Scope::new(&servers, "older");
    scope.create_topics(1, 1);
    wait_until("transactions are of the older kind", || {
        let mut producer = producer(&scope);
        producer.init().unwrap();
        !producer.joins_by_itself()
    });
    drop(scope);
    servers
}

#[test]
fn with_librdkafka_a_kill_at_any_step_loses_and_doubles_nothing() {
    let scope = Scope::new(Servers::shared(), "kill_librdkafka");
    let member = small_batches().with("KAFKA__PRODUCER", "librdkafka");
    kill_at_each_step(&scope, &member, 2, Load::new(61));
}

#[test]
fn with_older_transactions_a_kill_at_any_step_loses_and_doubles_nothing() {
    let servers = older_transactions();
    let scope = Scope::new(&servers, "kill_older");
    kill_at_each_step(&scope, &small_batches(), 2, Load::new(62));

    // AND none that is lost on the way
    let requests = [ApiKey::AddPartitionsToTxn, ApiKey::AddOffsetsToTxn];
    whatever_is_lost_on_the_way_loses_and_doubles_nothing(&servers, &requests, 63);

    // AND what can go wrong in a transaction goes as well as with newer ones
    what_is_refused_is_aborted_and_the_same_producer_goes_on(&servers);
    a_producer_that_was_succeeded_commits_nothing(&servers);
}

fn producer(scope: &Scope<'_>) -> DirectTransactions {
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
    let direct = DirectSettings::of(&kafka, 0).unwrap();
    DirectTransactions::new(direct, PublisherSettings::of(&kafka, &identity, 0))
}

fn whatever_is_lost_on_the_way_loses_and_doubles_nothing(servers: &Servers, more: &[ApiKey], seed: u64) {
    // GIVEN a daemon that reaches its broker by a network with accidents
    let scope = Scope::new(servers, "lost");
    scope.prepare(4, 2);
    let proxy = KafkaProxy::to(servers.bootstrap_servers());
    let member = small_batches().with("KAFKA__BOOTSTRAP_SERVERS", &proxy.address());
    let mut load = Load::new(seed);
    let requests = [ApiKey::InitProducerId, ApiKey::Produce, ApiKey::TxnOffsetCommit, ApiKey::EndTxn];
    for api in requests.iter().chain(more) {
        for lost in [Lost::Request, Lost::Answer] {
            scope.feed(load.take(60));

            // WHEN one request of a transaction is lost, or the answer to it
            proxy.lose(*api, lost);
            member.catch_up(&scope);
            assert!(proxy.has_lost(), "no {api:?} was made");

            // THEN
            eprintln!("{api:?}, {lost:?}: {:?}", scope.assert_exactly_once());
        }
    }
}

#[test]
fn a_request_or_an_answer_that_is_lost_on_the_way_loses_and_doubles_nothing() {
    whatever_is_lost_on_the_way_loses_and_doubles_nothing(Servers::shared(), &[], 64);
}

/// The outputs of payments of these accounts.
fn publication(accounts: impl Iterator<Item = i64>) -> Publication {
    let mut source = SourceBatch::default();
    let mut count = 0;
    for account in accounts {
        let value = Payment::new(uuid_v4(count as u64), account).json();
        let (key, at) = (account.to_string(), Some(TimestampMs(1_751_050_608_500)));
        source.push(
            Partition(0),
            Offset(count),
            at,
            Some(key.as_bytes()),
            Some(value.as_bytes()),
            Headers::NONE.iter(),
        );
        count += 1;
    }
    let reached = NextOffset(count);
    let progress = vec![Progress { partition: Partition(0), seen: NextOffset(0), reached, timestamp: None }];
    let batch = Batch::assemble(source, progress, &Rules::default());
    let fates = Fates(vec![Fate::Written; batch.len()]);
    let spans = vec![Span { partition: Partition(0), gate: NextOffset(0), commit: reached }];
    Publication::of_batch(batch, fates, spans, true)
}

fn accounts_of(scope: &Scope<'_>, topic: &str) -> Vec<i64> {
    let mut accounts: Vec<_> =
        scope.read_all(topic).iter().map(|event| event.json()["custId"].as_i64().unwrap()).collect();
    accounts.sort_unstable();
    accounts
}

fn a_producer_that_was_succeeded_commits_nothing(servers: &Servers) {
    // GIVEN two producers of one transactional id
    let scope = Scope::new(servers, "succeeded");
    scope.create_topics(4, 2);
    let (mut first, mut second) = (producer(&scope), producer(&scope));
    first.init().unwrap();
    first.send_alone(&publication(1..=3)).unwrap();
    second.init().unwrap();

    // WHEN the one that was there before goes on
    let refused = first.send_alone(&publication(4..=6)).unwrap_err();

    // THEN it has to find out, and none of it is to be seen
    assert!(matches!(refused, PublishFailure::Unknown(_)), "{refused}");
    let is_fenced =
        ["ProducerFenced", "InvalidProducerEpoch"].iter().any(|code| refused.to_string().contains(code));
    assert!(is_fenced, "{refused}");
    second.send_alone(&publication(7..=9)).unwrap();
    let again = first.send_alone(&publication(4..=6)).unwrap_err();
    assert!(matches!(again, PublishFailure::Unknown(_)), "{again}");
    assert_eq!(accounts_of(&scope, &scope.read_topic), [1, 2, 3, 7, 8, 9]);
}

#[test]
fn a_producer_that_was_succeeded_by_another_commits_nothing() {
    a_producer_that_was_succeeded_commits_nothing(Servers::shared());
}

fn what_is_refused_is_aborted_and_the_same_producer_goes_on(servers: &Servers) {
    // GIVEN a producer that knows its topics
    let scope = Scope::new(servers, "refused");
    scope.create_topics(4, 2);
    let mut producer = producer(&scope);
    producer.init().unwrap();
    producer.send_alone(&publication(1..=20)).unwrap();

    // WHEN one of them is gone
    scope.delete_topic(&scope.email_topic);
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    wait_until("the topic is gone", || {
        !partition_counts(consumer.client()).unwrap().contains_key(&scope.email_topic)
    });
    let refused = producer.send_alone(&publication(21..=40)).unwrap_err();

    // THEN what went to the others is not to be seen, and a person is wanted
    let is_systemic = matches!(refused, PublishFailure::Aborted { class: FailureClass::Systemic, .. });
    assert!(is_systemic, "{refused}");
    let still = producer.send_alone(&publication(21..=40)).unwrap_err();
    assert!(still.to_string().contains(&scope.email_topic), "{still}");

    // AND when it is there again, with more partitions, it goes on
    scope.create_topic(&scope.email_topic, 3);
    wait_until("the topic is served", || producer.send_alone(&publication(41..=60)).is_ok());
    producer.send_alone(&publication(61..=80)).unwrap();
    let expected: Vec<_> = (1..=20).chain(41..=80).collect();
    assert_eq!(accounts_of(&scope, &scope.read_topic), expected);
    assert_eq!(accounts_of(&scope, &scope.email_topic), (41..=80).collect::<Vec<_>>());
}

#[test]
fn what_a_broker_refuses_is_aborted_and_the_same_producer_goes_on() {
    what_is_refused_is_aborted_and_the_same_producer_goes_on(Servers::shared());
}

/// Each dead letter here fills a batch of its own, and together they fill more than one request.
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
