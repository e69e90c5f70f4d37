//! Fetching: positions move only over offsets that are accounted for, and some partitions cannot be read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use payment_writer::kafka::librdkafka::GroupMetadata;
use rdkafka::consumer::BaseConsumer;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use crate::support::{
    Act, Check, DEADLINE, Daemon, Member, Message, PATIENCE, Payment, Scope, Servers, uuid_v4,
    wait_until_within,
};

/// Distinct payments for one partition.
fn payments(seeds: std::ops::Range<u64>, partition: i32) -> Vec<Message> {
    let payment = |seed| Payment::new(uuid_v4(seed), i64::from(partition)).message().partition(partition);
    seeds.map(payment).collect()
}

/// A daemon whose client drops the first deliveries after a fetch starts: the number of records or
/// end-of-partition events, at this number of starts, of this partition.
fn forgetful(scope: &Scope<'_>, withheld: &str, failpoint: &str) -> Daemon {
    // As in `Member::run_at`: without the feature nothing would be dropped.
    assert!(
        withheld == "0" || cfg!(feature = "failpoints"),
        "this test needs `cargo test --features failpoints`"
    );
    let settings = [
        ("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "forgetful"),
        ("PAYMENT_WRITER__LANES", "1"),
        // Longer than a test pauses it.
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "60000"),
        ("PAYMENT_WRITER_WITHHOLD", withheld),
        ("PAYMENT_WRITER_FAILPOINT", failpoint),
    ];
    scope.daemon_with(&["run"], &settings)
}

fn halted(daemon: &Daemon, partition: i32) -> Value {
    daemon.status()["partitions"][partition.to_string()]["halted"].clone()
}

fn gaps(daemon: &Daemon) -> f64 {
    daemon.metric("payment_writer_fetch_gaps_total", "")
}

#[test]
fn records_that_the_client_skips_when_fetching_starts_are_found_and_read() {
    // GIVEN records in two partitions, where the client starts to deliver behind the requested position
    let scope = Scope::ready("passed_over", 2, 2);
    for partition in [0_i32, 1] {
        let seeds = u64::from(partition.unsigned_abs()) * 100;
        scope.produce(&scope.input_topic, payments(seeds..seeds + 50, partition));
    }
    let mut daemon = forgetful(&scope, "7:1", "");
    // THEN they are read anyway, counted and logged
    scope.wait_until_caught_up();
    assert_eq!(gaps(&daemon), 2.0);
    assert!(daemon.log().contains("the client passed over records"), "{}", daemon.log());
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn a_gap_without_records_is_checked_and_skipped() {
    // GIVEN a log that starts and ends with an aborted transaction
    let scope = Scope::ready("empty_gap", 1, 1);
    scope.produce_in_transaction(&scope.input_topic, payments(0..20, 0), false);
    scope.produce_in_transaction(&scope.input_topic, payments(100..120, 0), true);
    scope.produce_in_transaction(&scope.input_topic, payments(200..205, 0), false);
    let mut daemon = forgetful(&scope, "0", "");
    scope.wait_until_caught_up();
    // AND a restart in the middle: the group's offset is that of a control record
    daemon.drains();
    scope.produce_in_transaction(&scope.input_topic, payments(300..310, 0), false);
    let mut daemon = forgetful(&scope, "0", "");
    // THEN the position moves to the end, and no record was skipped
    scope.wait_until_caught_up();
    assert_eq!(gaps(&daemon), 0.0);
    assert_eq!(scope.assert_exactly_once().written, 20);
    daemon.drains();
}

#[test]
fn a_gap_that_cannot_be_checked_blocks_only_its_partition() {
    // GIVEN a daemon that is about to check a gap that has records
    let servers = Servers::own();
    let scope = Scope::new(&servers, "unproved_gap");
    scope.prepare(2, 2);
    scope.produce(&scope.input_topic, payments(0..50, 0));
    let mut daemon = forgetful(&scope, "7:1:0", "before_gap_check:1:stop");
    wait_until_within(PATIENCE, "it is about to check the gap", || daemon.is_stopped());
    // WHEN the broker is stopped meanwhile
    servers.kafka(Act::Stop);
    daemon.signal("CONT");
    wait_until_within(PATIENCE, "it says that it cannot be told", || {
        daemon.log().contains("could not check whether records were passed over")
    });
    assert_eq!(scope.count("payment_core"), 0, "nothing behind the gap is written");
    // THEN it continues by itself once the broker is back
    servers.kafka(Act::Start);
    scope.wait_until_caught_up();
    daemon.drains();
    assert_eq!(scope.assert_exactly_once().written, 50);
}

#[test]
fn a_gap_that_retention_truncates_halts_its_partition() {
    // GIVEN a daemon that is about to check a gap that has records
    let scope = Scope::ready("removed_gap", 2, 2);
    scope.produce(&scope.input_topic, payments(0..50, 0));
    let mut daemon = forgetful(&scope, "7:1:0", "before_gap_check:1:stop");
    wait_until_within(PATIENCE, "it is about to check the gap", || daemon.is_stopped());
    // WHEN retention removes some of them
    scope.delete_records(0, 5);
    daemon.signal("CONT");
    // THEN the partition halts until an operator resolves it
    wait_until_within(PATIENCE, "it halts", || halted(&daemon, 0)["doubt"] == "log_gap");
    let skip = ["cursors", "skip", "--partition", "0", "--to", "5", "--apply", "--reason", "test"];
    scope.command(&skip).succeeds();
    scope.wait_until_caught_up();
    daemon.drains();
    assert_eq!(scope.assert_exactly_once().written, 45);
}

#[test]
fn the_same_gap_repeatedly_halts_only_its_partition() {
    let scope = Scope::ready("stubborn_gap", 2, 2);
    scope.produce(&scope.input_topic, payments(0..50, 0));
    scope.produce(&scope.input_topic, payments(100..150, 1));
    // GIVEN a client that skips records of one partition each time
    let mut daemon = forgetful(&scope, "7:1000:0", "");
    wait_until_within(PATIENCE, "it halts", || halted(&daemon, 0)["doubt"] == "fetch_gap");
    assert!(gaps(&daemon) >= 3.0);
    wait_until_within(PATIENCE, "the other one is written", || scope.count("payment_core") == 50);
    // WHEN it is restarted with a working client, THEN everything is written
    daemon.drains();
    let mut daemon = forgetful(&scope, "0", "");
    scope.wait_until_caught_up();
    daemon.drains();
    assert_eq!(scope.assert_exactly_once().written, 100);
}

#[test]
fn a_silent_partition_is_read_by_a_new_client() {
    let scope = Scope::ready("silent", 2, 2);
    scope.produce(&scope.input_topic, payments(0..50, 0));
    scope.produce(&scope.input_topic, payments(100..150, 1));
    // GIVEN a client that never delivers anything from one partition
    let mut daemon = forgetful(&scope, "1000000:1:0", "");
    // THEN that is detected, and a new client reads the partition
    scope.wait_until_caught_up();
    assert!(daemon.metric("payment_writer_fetch_clients_renewed_total", "") >= 1.0);
    assert!(daemon.log().contains("nothing was fetched of this partition"), "{}", daemon.log());
    daemon.drains();
    assert_eq!(scope.assert_exactly_once().written, 100);
}

#[test]
fn an_open_transaction_on_one_group_offset_does_not_stop_the_other_partitions() {
    // GIVEN a transaction of a crashed member, with a pending offset of the group for one partition
    let scope = Scope::ready("held_offset", 3, 2);
    let peer: BaseProducer = scope
        .client_config()
        .set("transactional.id", format!("{}-dead-peer", scope.group_id))
        .set("transaction.timeout.ms", "600000")
        .create()
        .unwrap();
    peer.init_transactions(DEADLINE).unwrap();
    peer.begin_transaction().unwrap();
    let consumer: BaseConsumer = scope.client_config().set("group.id", &scope.group_id).create().unwrap();
    let mut offsets = TopicPartitionList::new();
    offsets.add_partition_offset(&scope.input_topic, 1, Offset::Offset(0)).unwrap();
    let metadata = rdkafka::consumer::Consumer::group_metadata(&consumer).unwrap();
    peer.send_offsets_to_transaction(&offsets, &metadata, DEADLINE).unwrap();
    assert!(GroupMetadata::of(&consumer).is_some_and(|metadata| metadata.generation() < 0));
    for partition in 0..3_i32 {
        let seeds = u64::from(partition.unsigned_abs()) * 100;
        scope.produce(&scope.input_topic, payments(seeds..seeds + 20, partition));
    }
    // WHEN a daemon with a single lane is assigned all partitions
    let mut daemon = Member::new("heir").with("LANES", "1").start(&scope);
    // THEN the others are written, and continue to be
    wait_until_within(PATIENCE, "the others are written", || scope.count("payment_core") == 40);
    scope.produce(&scope.input_topic, payments(1_000..1_020, 0));
    wait_until_within(PATIENCE, "more of their records are written", || scope.count("payment_core") == 60);
    assert_eq!(daemon.status()["partitions"]["1"]["state"], "opening");
    // AND that one is written once the transaction has ended
    peer.abort_transaction(DEADLINE).unwrap();
    scope.wait_until_caught_up();
    daemon.drains();
    assert_eq!(scope.assert_exactly_once().written, 80);
}

/// Path of a partition's first segment on a broker.
fn segment(folder: &Path, topic: &str, partition: i32) -> PathBuf {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.ends_with(format!("{topic}-{partition}")) {
                return path.join("00000000000000000000.log");
            }
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    panic!("no segment of {topic}-{partition}")
}

/// Changes one digit of an amount on the broker's disk.
fn damage(servers: &Servers, topic: &str, partition: i32, amount: &str, by: &str) {
    let path = segment(servers.dir(), topic, partition);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(amount.len()).position(|found| found == amount.as_bytes()).unwrap();
    bytes[at..at + by.len()].copy_from_slice(by.as_bytes());
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn damaged_batches_halt_only_their_partition_until_they_are_repaired_or_skipped() {
    // GIVEN three batches of three payments in each of four partitions
    let servers = Servers::own();
    let scope = Scope::new(&servers, "damaged");
    scope.prepare(4, 2);
    for partition in 0..4_i32 {
        for batch in 0..3_u64 {
            let seeds = u64::from(partition.unsigned_abs()) * 100 + batch * 10;
            let payment = |seed| {
                let id = uuid_v4(seed);
                let amount = format!("{}.61", 700_000 + seed);
                Payment::new(id, i64::from(partition)).amount(&amount).message().partition(partition)
            };
            scope.produce(&scope.input_topic, (seeds..seeds + 3).map(payment));
        }
    }
    // WHEN a digit in the first, a middle or the last batch of a partition changes on the broker's disk
    servers.kafka(Act::Stop);
    for (partition, batch) in [(0, 0), (1, 1), (2, 2)] {
        let amount = format!("{}.61", 700_000 + partition * 100 + batch * 10 + 1);
        let other = amount.replacen('7', "9", 1);
        damage(&servers, &scope.input_topic, partition, &amount, &other);
    }
    servers.kafka(Act::Start);
    scope.wait_for_brokers();
    let mut daemon = Member::new("a").with("LANES", "1").start(&scope);

    // THEN that partition halts at that batch, even with good batches behind it, and the others are written
    let doubts =
        || -> Vec<Value> { (0..4).map(|partition| halted(&daemon, partition)["doubt"].clone()).collect() };
    wait_until_within(PATIENCE, "they halt", || {
        doubts() == [Value::from("unreadable"), "unreadable".into(), "unreadable".into(), Value::Null]
    });
    wait_until_within(PATIENCE, "the others are written", || scope.count("payment_core") == 9 + 3 + 6);
    let log = daemon.log();
    for (partition, first) in [(0, 0), (1, 3), (2, 6)] {
        let advice = halted(&daemon, partition)["advice"].as_str().unwrap().to_owned();
        assert!(
            advice.contains(&format!("the batch at offset {first} cannot be read (BadMessage)")),
            "{advice}"
        );
        assert!(log.contains(&advice), "{log}");
    }
    assert_eq!(daemon.metric("payment_writer_partitions_halted", ""), 3.0);

    // AND another process reports the same, and the offset after the batch
    let shown = scope.command(&["cursors", "show"]).succeeds().stdout;
    for (partition, after) in [(0, 3), (1, 6), (2, 9)] {
        assert!(shown.contains(&format!("cursors skip --partition {partition} --to {after}")), "{shown}");
    }
    // AND new records of the good partition are written
    scope.produce(&scope.input_topic, payments(5_000..5_005, 3));
    wait_until_within(PATIENCE, "new records of the good one are written", || {
        scope.count("payment_core") == 18 + 5
    });

    // WHEN one is repaired, THEN it continues by itself
    servers.kafka(Act::Stop);
    damage(&servers, &scope.input_topic, 1, "900111.61", "700111.61");
    servers.kafka(Act::Start);
    wait_until_within(Duration::from_secs(120), "it continues by itself", || halted(&daemon, 1).is_null());
    // AND the records of the others are skipped by the command
    for (partition, after) in [("0", "3"), ("2", "9")] {
        let skip =
            ["cursors", "skip", "--partition", partition, "--to", after, "--apply", "--reason", "test"];
        scope.command(&skip).succeeds();
    }
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = Check::of(&scope).given_up(0, 0..3).given_up(2, 6..9).holds();
    assert_eq!((outcomes.written, outcomes.given_up), (35, 6));
}

#[test]
fn a_batch_that_decompresses_beyond_a_limit_halts_only_its_partition_until_the_limit_is_raised() {
    // GIVEN a few kilobytes of zstd that decompress to 120 MB
    let scope = Scope::ready("bomb", 2, 2);
    let producer: BaseProducer = scope
        .client_config()
        .set("compression.type", "zstd")
        .set("message.max.bytes", "1000000000")
        .set("batch.size", "200000000")
        .set("batch.num.messages", "120")
        .set("queue.buffering.max.kbytes", "2000000")
        .set("linger.ms", "60000")
        .create()
        .unwrap();
    let value = vec![b'x'; 1_000_000];
    for _ in 0..120 {
        let record =
            rdkafka::producer::BaseRecord::to(&scope.input_topic).key("1").payload(&value).partition(0);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(DEADLINE).unwrap();
    scope.produce(&scope.input_topic, payments(0..10, 0));
    scope.produce(&scope.input_topic, payments(100..110, 1));

    // THEN that partition halts, which is logged, and the other one is written
    let mut daemon = Member::new("a").with("LANES", "1").start(&scope);
    wait_until_within(PATIENCE, "it halts", || halted(&daemon, 0)["doubt"] == "unreadable");
    wait_until_within(PATIENCE, "the other one is written", || scope.count("payment_core") == 10);
    let advice = halted(&daemon, 0)["advice"].as_str().unwrap().to_owned();
    assert!(advice.contains("receive.message.max.bytes"), "{advice}");
    let shown = scope.command(&["cursors", "show"]).succeeds().stdout;
    assert!(shown.contains("cursors skip --partition 0 --to 120"), "{shown}");
    daemon.drains();

    // WHEN the limit is raised, THEN its records get their normal outcomes
    let mut raised = Member::new("a")
        .with("LANES", "1")
        .with("KAFKA__PROPERTIES__RECEIVE_MESSAGE_MAX_BYTES", "400000000")
        .start(&scope);
    scope.wait_until_caught_up();
    raised.drains();
    assert_eq!(scope.count("payment_core"), 20);
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 120);
}
