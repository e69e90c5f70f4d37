//! What other programs do to the topics and the group: settings that lose or delay payments, transactions
//! left open, members that keep the daemon out. The daemon names the cause and the remedy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::support::{
    DEADLINE, Daemon, Message, Payment, Scope, Servers, block_on, uuid_v4, wait_until, wait_until_within,
};

fn payments(seeds: std::ops::Range<u64>) -> impl Iterator<Item = Message> {
    seeds.map(|seed| Payment::new(uuid_v4(seed), seed as i64).message().partition((seed % 2) as i32))
}

/// Why the daemon is not ready; empty while it does not answer or is ready.
fn missing(daemon: &Daemon, what: &str) -> String {
    let Some(reply) = daemon.get("/readyz") else { return String::new() };
    let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    body["missing"][what].as_str().unwrap_or_default().to_owned()
}

/// Sets one setting of a topic, and resets all others.
pub fn set_topic(scope: &Scope<'_>, topic: &str, name: &str, value: &str) {
    configure_topic(scope, topic, &[(name, value)]);
}

/// Sets these settings of a topic, and resets all others.
pub fn configure_topic(scope: &Scope<'_>, topic: &str, settings: &[(&str, &str)]) {
    let config = AlterConfig::new(ResourceSpecifier::Topic(topic));
    let config = settings.iter().fold(config, |config, (name, value)| config.set(name, value));
    for result in block_on(scope.admin().alter_configs([&config], &AdminOptions::new())).unwrap() {
        result.unwrap();
    }
}

#[test]
fn a_compacted_topic_is_refused_by_name_until_its_policy_is_changed() {
    // GIVEN topics of which each is compacted
    let scope = Scope::new(Servers::shared(), "compacted");
    let topics = [&scope.input_topic, &scope.read_topic, &scope.email_topic, &scope.dead_letter_topic];
    for topic in topics {
        scope.create_topic_with(topic, 2, &[("cleanup.policy", "compact,delete")]);
    }
    scope.command(&["migrate"]).succeeds();
    scope.produce(&scope.input_topic, payments(0..10));

    // THEN `topics create` names each
    let said = scope.command(&["topics", "create", "--partitions", "2"]).succeeds().stderr;
    for topic in topics {
        assert!(said.contains(&format!("{topic} has cleanup.policy=compact,delete")), "{said}");
    }

    // AND the daemon waits, and names those that are left, with the command that changes them
    let mut daemon = scope.daemon(&["run"]);
    for (index, topic) in topics.into_iter().enumerate() {
        wait_until("the daemon names the topics that are left", || {
            let missing = missing(&daemon, "broker");
            topics.iter().enumerate().all(|(other, topic)| {
                let named = format!("--entity-name {topic} --alter --add-config cleanup.policy=delete");
                missing.contains(&named) == (other >= index)
            })
        });
        assert!(daemon.is_running());
        assert_eq!(scope.count("payment_core"), 0);
        set_topic(&scope, topic, "cleanup.policy", "delete");
    }
    daemon.wait_until_ready();
    wait_until("all are written", || scope.count("payment_core") == 10);
    assert!(daemon.log().contains("ERROR"), "{}", daemon.log());
}

#[test]
fn a_daemon_that_only_writes_rows_does_not_look_at_the_outputs() {
    let scope = Scope::new(Servers::shared(), "compacted_outputs");
    scope.create_topic(&scope.input_topic, 2);
    scope.create_topic_with(&scope.read_topic, 2, &[("cleanup.policy", "compact")]);
    scope.command(&["migrate"]).succeeds();
    scope.produce(&scope.input_topic, payments(0..10));
    scope.drain_with(&[("PAYMENT_WRITER__KAFKA__PUBLISH", "false")]);
    assert_eq!(scope.count("payment_core"), 10);
}

#[test]
#[ignore = "topic settings are read once a minute; `make trials`"]
fn trials_a_topic_that_becomes_compacted_is_reported_while_the_daemon_runs() {
    let scope = Scope::ready("becomes_compacted", 2, 1);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    let compacted = |topic: &str| {
        let labels = format!(r#"topic="{topic}",setting="cleanup.policy""#);
        daemon.metric("payment_writer_topic_misconfigured", &labels)
    };
    assert_eq!((compacted("input"), compacted("read")), (0.0, 0.0));

    set_topic(&scope, &scope.input_topic, "cleanup.policy", "compact");
    wait_until_within(2 * DEADLINE, "the metric names the input", || compacted("input") == 1.0);
    let named = format!("{} has cleanup.policy=compact", scope.input_topic);
    wait_until("the log names the input", || {
        daemon.log().lines().any(|line| line.contains("ERROR") && line.contains(&named))
    });
    // Readiness does not change: to stop reading would lose more.
    assert_eq!(daemon.get("/readyz").unwrap().status, 200);

    set_topic(&scope, &scope.input_topic, "cleanup.policy", "delete");
    wait_until_within(2 * DEADLINE, "the metric is reset", || compacted("input") == 0.0);
}

/// Begins a transaction and writes a payment to this partition.
pub fn leave_open(scope: &Scope<'_>, topic: &str, partition: i32) -> BaseProducer {
    let producer: BaseProducer =
        scope.client_config().set("transactional.id", format!("{topic}_left_open")).create().unwrap();
    producer.init_transactions(DEADLINE).unwrap();
    producer.begin_transaction().unwrap();
    let Message { key, value, .. } = Payment::new(uuid_v4(100), 1).message();
    let (key, value) = (key.unwrap(), value.unwrap());
    producer.send(BaseRecord::to(topic).key(&key).payload(&value).partition(partition)).unwrap();
    producer.flush(DEADLINE).unwrap();
    producer
}

#[test]
fn records_behind_an_open_transaction_are_reported() {
    // GIVEN a transaction that a producer left open, with other records behind it
    let scope = Scope::ready("left_open", 2, 1);
    scope.produce(&scope.input_topic, payments(0..10));
    let producer = leave_open(&scope, &scope.input_topic, 1);
    scope.produce(&scope.input_topic, payments(200..250));

    // WHEN the daemon has caught up
    let mut daemon = scope.daemon(&["run", "--until-caught-up"]);
    assert!(daemon.wait().success(), "{}", daemon.log());

    // THEN it says how many records it could not read
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("open transaction")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("WARN") && line.contains("records=26") && line.contains("partitions=1"), "{line}");
    assert_eq!(scope.count("payment_core"), 35);

    // AND a running daemon is ready, and reports them by partition
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    let records = |partition: i32| {
        daemon.metric("payment_writer_open_transaction_records", &format!(r#"partition="{partition}""#))
    };
    let seconds = || daemon.metric("payment_writer_open_transaction_seconds", r#"partition="1""#);
    wait_until("the metric counts them", || records(1) == 26.0 && seconds() > 0.0);
    assert_eq!(records(0), 0.0);
    let status = daemon.status();
    assert_eq!(status["partitions"]["1"]["open_transaction_records"], 26);
    assert!(status["partitions"]["1"]["open_transaction_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(status["partitions"]["1"]["lag_records"], 0);
    let top = scope.command(&["top", "--once", "--url", &format!("http://{}", daemon.admin)]).succeeds();
    assert!(top.stdout.contains("26 records behind open transactions"), "{}", top.stdout);

    // AND they are written once the transaction ends
    producer.commit_transaction(DEADLINE).unwrap();
    wait_until("all are written", || scope.count("payment_core") == 61 && records(1) == 0.0);
    assert_eq!(seconds(), 0.0);
}

#[test]
fn an_input_with_times_of_the_brokers_is_named_and_replay_needs_force() {
    let scope = Scope::new(Servers::shared(), "append_time");
    scope.create_topics_with(2, 1, &[("message.timestamp.type", "LogAppendTime")]);
    scope.command(&["migrate"]).succeeds();
    let named = format!("{} has message.timestamp.type=LogAppendTime", scope.input_topic);
    let said = scope.command(&["topics", "create", "--partitions", "2"]).succeeds().stderr;
    assert!(said.contains(&named), "{said}");

    // The daemon warns, and works.
    scope.produce(&scope.input_topic, [Message::new("1", "no payment")]);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    wait_until("the daemon warns", || {
        daemon.log().lines().any(|line| line.contains("WARN") && line.contains(&named))
    });
    wait_until("the dead letter is there", || scope.read_all(&scope.dead_letter_topic).len() == 1);

    let replay = |more: &[&str]| scope.command(&[&["dlq", "replay", "--all"], more].concat());
    for apply in [&[][..], &["--apply", "--note", "a test"]] {
        let refused = replay(apply);
        assert_eq!(refused.code, Some(3), "{refused:?}");
        assert!(refused.stderr.contains(&named) && refused.stderr.contains("--force"), "{refused:?}");
    }
    let replayed = replay(&["--force", "--apply", "--note", "a test"]).succeeds();
    assert!(replayed.stdout.contains("replayed"), "{replayed:?}");
    wait_until("it is dead-lettered again", || scope.read_all(&scope.dead_letter_topic).len() == 2);
}

/// A member of the daemon's group with other settings, polled until it is dropped.
struct Stranger(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Stranger {
    fn joins(scope: &Scope<'_>, settings: &[(&str, &str)]) -> Stranger {
        let mut config: ClientConfig = scope.client_config();
        config.set("group.id", &scope.group_id);
        for (name, value) in settings {
            config.set(*name, *value);
        }
        let consumer: BaseConsumer = config.create().unwrap();
        consumer.subscribe(&[&scope.input_topic]).unwrap();
        wait_until("the other member has joined", || {
            let _ = consumer.poll(Duration::from_millis(50));
            consumer.assignment().unwrap().count() > 0
        });
        let ends = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&ends);
        let polling = std::thread::spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                let _ = consumer.poll(Duration::from_millis(50));
            }
        });
        Stranger(ends, Some(polling))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        if let Some(polling) = self.1.take() {
            polling.join().unwrap();
        }
    }
}

#[test]
fn why_the_group_cannot_be_joined_is_reported_with_the_setting_that_decides_it() {
    // GIVEN a member with another assignor
    let scope = Scope::ready("kept_out", 2, 1);
    let stranger = Stranger::joins(&scope, &[("partition.assignment.strategy", "range")]);
    let reported = |daemon: &Daemon, words: &[&str]| {
        wait_until("readiness and the log name the reason", || {
            let missing = missing(daemon, "group");
            let is_logged =
                |line: &str| line.contains("WARN") && words.iter().all(|word| line.contains(word));
            words.iter().all(|word| missing.contains(word)) && daemon.log().lines().any(is_logged)
        });
    };

    // THEN the daemon names the reason
    let daemon = scope.daemon(&["run"]);
    reported(&daemon, &["InconsistentGroupProtocol", "partition.assignment.strategy"]);
    assert!(daemon.status()["missing"]["group"].as_str().unwrap().contains("InconsistentGroupProtocol"));

    // AND joins once the other member has left
    drop(stranger);
    daemon.wait_until_ready();
    drop(daemon);

    // AND it names a session timeout that the brokers do not accept
    let daemon = scope.daemon_with(
        &["run"],
        &[
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "900"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "300"),
        ],
    );
    reported(&daemon, &["InvalidSessionTimeout", "session.timeout.ms", "group.min.session.timeout.ms"]);
}

#[test]
#[ignore = "minutes"]
fn trials_a_group_without_a_coordinator_is_reported_within_seconds_and_joined_once_it_has_one() {
    // GIVEN a broker that cannot create the topic of the groups' offsets
    let servers = Servers::with_kafka_settings("offsets.topic.replication.factor=3\n");
    let scope = Scope::new(&servers, "no_coordinator");
    scope.prepare(2, 1);

    // THEN the daemon names the reason at warn, once, and in /readyz
    let daemon = scope.daemon(&["run"]);
    let told = |daemon: &Daemon| {
        let log = daemon.log();
        log.lines().filter(|line| line.contains("WARN") && line.contains("__consumer_offsets")).count()
    };
    wait_until("it is in the log", || told(&daemon) > 0);
    wait_until("it is in /readyz", || missing(&daemon, "group").contains("offsets.topic.replication.factor"));
    std::thread::sleep(Duration::from_secs(15));
    assert_eq!(told(&daemon), 1, "{}", daemon.log());

    // WHEN the topic is there
    scope.create_topic_with("__consumer_offsets", 10, &[("cleanup.policy", "compact")]);

    // THEN the group is joined, and the log says so
    daemon.wait_until_ready();
    wait_until("the log says so", || daemon.log().contains("no longer missing"));
}
