//! Three brokers: whichever of them is lost, payments flow again, and nothing is lost, duplicated or stuck.

use std::fs;
use std::time::Instant;

use payment_writer::kafka::publisher_settings::transactional_id;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::MetadataPartition;
use serde_json::json;

use crate::support::{
    Act, DEADLINE, Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, coordinator_partition,
    wait_until_within,
};

const BROKERS: usize = 3;
/// Read events that must arrive after a fault before it counts as survived.
const EVENTS: f64 = 200.0;

struct Cluster<'a> {
    servers: &'a Servers,
    scope: &'a Scope<'a>,
    consumer: BaseConsumer,
}

impl Cluster<'_> {
    /// The broker that leads a partition.
    fn leader(&self, topic: &str, partition: i32) -> i32 {
        let mut leader = -1;
        wait_until_within(PATIENCE, &format!("{topic} {partition} has a leader"), || {
            let Ok(metadata) = self.consumer.fetch_metadata(Some(topic), DEADLINE) else { return false };
            let found = metadata.topics()[0].partitions().iter().find(|p| p.id() == partition);
            leader = found.map_or(-1, |partition| partition.leader());
            leader >= 0
        });
        leader
    }

    fn every_partition(&self, what: &str, holds: impl Fn(&MetadataPartition) -> bool) {
        wait_until_within(PATIENCE, what, || {
            self.consumer.fetch_metadata(None, DEADLINE).is_ok_and(|metadata| {
                metadata.topics().iter().flat_map(|topic| topic.partitions()).all(&holds)
            })
        });
    }

    /// Waits until all replicas of all topics are in sync: then the next broker may be killed.
    fn is_whole(&self) {
        self.every_partition("all replicas are in sync", |partition| {
            partition.leader() >= 0 && partition.isr().len() >= partition.replicas().len().min(BROKERS)
        });
    }

    /// Moves every replica of a lost broker to another one, and makes that one the leader of all partitions.
    fn moves_to(&self, broker: i32, gone: i32) {
        // Until the controller has fenced the lost broker, Kafka's tool asks it for its folders and fails, and
        // partitions look whole that are not.
        wait_until_within(PATIENCE, "the lost broker is fenced, and its replacement is there", || {
            self.consumer.fetch_metadata(None, DEADLINE).is_ok_and(|metadata| {
                let brokers: Vec<i32> = metadata.brokers().iter().map(|broker| broker.id()).collect();
                let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
                !brokers.contains(&gone)
                    && brokers.contains(&broker)
                    && partitions.all(|partition| !partition.isr().contains(&gone))
            })
        });
        let metadata = self.consumer.fetch_metadata(None, DEADLINE).unwrap();
        let moves: Vec<_> = metadata
            .topics()
            .iter()
            .flat_map(|topic| topic.partitions().iter().map(move |partition| (topic.name(), partition)))
            .map(|(topic, partition)| {
                let stay = partition.replicas().iter().filter(|replica| **replica != gone).take(2);
                let replicas: Vec<i32> = std::iter::once(broker).chain(stay.copied()).collect();
                json!({"topic": topic, "partition": partition.id(), "replicas": replicas})
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let plan = folder.path().join("plan.json");
        fs::write(&plan, json!({"version": 1, "partitions": moves}).to_string()).unwrap();
        let tool = "org.apache.kafka.tools.reassign.ReassignPartitionsCommand";
        self.servers.kafka_tool(&[tool, "--execute", "--reassignment-json-file", plan.to_str().unwrap()]);
        self.every_partition("the replacement has every partition", |partition| {
            !partition.replicas().contains(&gone) && partition.isr().contains(&broker)
        });
        self.is_whole();
        let elect = ["--election-type", "preferred", "--all-topic-partitions"];
        self.servers.kafka_tool(&[&["org.apache.kafka.tools.LeaderElectionCommand"], &elect[..]].concat());
        self.every_partition("the replacement leads everything", |partition| partition.leader() == broker);
    }

    /// Asserts that payments flow again while this broker stays down.
    fn dies_for_good(&self, broker: i32, what: &str, daemon: &Daemon) {
        self.is_whole();
        self.servers.broker(broker, Act::Kill);
        let began = Instant::now();
        flows(daemon, what);
        eprintln!(
            "{what} (broker {broker}) died: payments flow again after {:.1} s",
            began.elapsed().as_secs_f64()
        );
        self.servers.broker(broker, Act::Start);
    }
}

/// Waits until a good number of the payments sent since are published.
fn flows(daemon: &Daemon, what: &str) {
    let published = || daemon.metric("payment_writer_published_total", "topic=\"read\"");
    let before = published();
    wait_until_within(PATIENCE, &format!("payments flow again: {what}"), || published() >= before + EVENTS);
}

#[test]
fn whichever_broker_dies_for_good_payments_flow_again_and_nothing_is_lost_or_duplicated() {
    // GIVEN three brokers, a flow of payments, half of them in transactions, and one daemon
    let servers = Servers::with_brokers(BROKERS);
    let scope = Scope::new(&servers, "failover");
    scope.prepare(12, 4);
    let cluster =
        Cluster { servers: &servers, scope: &scope, consumer: scope.client_config().create().unwrap() };
    let mut daemon = Member::new("a").start(&scope);
    let flow = Flow::start(&scope, Load::without_bad_records(71), 12);
    flows(&daemon, "at the start");

    // WHEN the group coordinator is killed
    let group = cluster.leader("__consumer_offsets", coordinator_partition(&scope.group_id));
    cluster.dies_for_good(group, "the group's coordinator", &daemon);

    // AND the transaction coordinator of a lane
    let id = transactional_id(&scope.group_id, "a", 0);
    let transactions = cluster.leader("__transaction_state", coordinator_partition(&id));
    cluster.dies_for_good(transactions, "the coordinator of a lane's transactions", &daemon);

    // AND a leader of an output partition
    let output = cluster.leader(&scope.read_topic, 0);
    cluster.dies_for_good(output, "the leader of an output partition", &daemon);

    // AND all three are restarted one after the other
    for broker in 1..=3 {
        cluster.is_whole();
        servers.broker(broker, Act::Stop);
        servers.broker(broker, Act::Start);
    }
    flows(&daemon, "after a rolling restart");

    // AND one is replaced by another, with another id and address, which then leads everything
    cluster.is_whole();
    let replacement = servers.replace_broker(3);
    cluster.moves_to(replacement, 3);
    flows(&daemon, "after a broker was replaced");

    // THEN every record has exactly one outcome
    cluster.is_whole();
    flow.end();
    cluster.scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert!(outcomes.written > 1_000, "{outcomes:?}");
}
