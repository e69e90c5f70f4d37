//! Limits that hold for any input: memory, nesting, sizes, numbers of partitions.

use payment_writer::config::Endpoint;
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::record::{NextOffset, Partition};
use payment_writer::ports::{CursorMove, Store};
use payment_writer::postgres::store::PgStore;
use uuid::Uuid;

use crate::support::{
    Act, Daemon, Load, Member, Message, PATIENCE, Scope, Servers, block_on, uuid_v4, wait_until,
    wait_until_within,
};

/// Memory limit of one instance with the default settings, with any backlog. Measured here: 96 MB while the
/// database did not answer, 122 MB in all; 296 MB where small records are drained as fast as a release build
/// can.
const RESIDENT_MB_MAX: u64 = 320;

fn padded(seed: u64, bytes: usize) -> Message {
    let account = seed % 50;
    let (id, comment) = (uuid_v4(seed), "c".repeat(900));
    let start = format!(
        r#"{{"messageId":"{id}","amount":1.50,"status":2,"currency":"EUR","custId":{account},"type":"BWI","comment":"{comment}","unknown":""#
    );
    let padding = "x".repeat(bytes - start.len() - 2);
    Message::new(account.to_string(), format!("{start}{padding}\"}}"))
}

/// Peak memory of the process so far.
pub fn resident_peak_mb(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "takes minutes; `make trials`"]
fn trials_memory_is_bounded_with_a_full_batch_of_the_largest_values_and_a_hanging_database() {
    // GIVEN a backlog of values of the largest allowed size, far more than may be held in memory
    let servers = Servers::own();
    let scope = Scope::new(&servers, "memory");
    scope.prepare(6, 3);
    for chunk in 0..40_u64 {
        scope.produce(&scope.input_topic, (chunk * 1_000..(chunk + 1) * 1_000).map(|n| padded(n, 16_384)));
    }

    // WHEN the database accepts connections and does not answer
    let mut daemon = Member::new("a").start(&scope);
    wait_until_within(PATIENCE, "the first batches are written", || scope.count("payment_core") > 1_000);
    servers.postgres(Act::Pause);
    wait_until_within(PATIENCE, "the missing database is reported", || {
        daemon.get("/readyz").is_some_and(|reply| reply.status == 503 && reply.body.contains("database"))
    });
    let blocked = resident_peak_mb(&daemon);
    servers.postgres(Act::Resume);

    // THEN memory is bounded, then and while it catches up
    scope.wait_until_caught_up();
    let peak = resident_peak_mb(&daemon);
    eprintln!("resident at most {blocked} MB while blocked, {peak} MB in all");
    assert!(peak < RESIDENT_MB_MAX, "{peak} MB");
    daemon.drains();
    assert_eq!(scope.count("payment_core"), 40_000);
}

#[test]
fn deeply_nested_values_and_very_long_numbers_are_ordinary_dead_letters() {
    let scope = Scope::new(Servers::shared(), "bombs");
    scope.prepare(1, 1);
    let id = uuid_v4(1);
    let payment = |amount: &str, more: &str| {
        Message::new(
            "7",
            format!(
                r#"{{"messageId":"{id}","amount":{amount},"status":2,"currency":"EUR","custId":7,"type":"BWI"{more}}}"#
            ),
        )
    };
    let deep = |open: &str, close: &str, levels: usize| {
        payment("1.00", &format!(r#","x":{}{}{}"#, open.repeat(levels), "1", close.repeat(levels)))
    };
    let bombs = [
        Message::new("7", "[".repeat(16_000)),
        Message::new("7", r#"{"a":"#.repeat(3_000)),
        Message::new("7", r#"{"":"#.repeat(4_000)),
        deep("[", "]", 7_000),
        deep(r#"{"a":"#, "}", 2_000),
        deep("[", "]", 32),
        payment(&"9".repeat(16_000), ""),
        payment(&format!("0.{}1", "0".repeat(16_000)), ""),
        payment("1e999999999999999999", ""),
        payment("1e-999999999999999999", ""),
        payment("\"1E+400000000\"", ""),
        Message::new("7", format!(r#"{{"{}":1}}"#, "k".repeat(16_000))),
        Message::new("7", format!("{{{}\"z\":1}}", r#""\ud83d\ude00":0,"#.repeat(700))),
        Message::new("7", vec![0xff; 16_000]),
        Message::new("7", vec![0; 16_384]),
    ];
    let count = bombs.len();
    scope.produce(&scope.input_topic, bombs.into_iter().chain([deep("[", "]", 31), payment("2.00", "")]));
    Member::new("a").soon_forgotten().catch_up(&scope);
    // The last two: one at the nesting limit, and one that conflicts with it.
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), count + 1);
    assert_eq!(scope.count("payment_core"), 1);
}

#[test]
#[ignore = "takes minutes; `make trials`"]
fn trials_a_topic_of_two_thousand_partitions_is_written_and_published() {
    // GIVEN many more partitions than usual, with records in all of them
    let servers = Servers::own();
    let scope = Scope::new(&servers, "thousands");
    scope.prepare(2_000, 4);
    let mut load = Load::new(61);
    let partitions: Vec<i32> = (0..2_000).collect();
    scope.spread(load.take(2_000), &partitions);

    // WHEN an instance is assigned all of them, and another joins
    let member = |name| Member::new(name).soon_forgotten();
    let mut first = member("a").start(&scope);
    first.wait_for_partitions("the first has all", |partitions| partitions == 2_000);
    let mut second = member("b").start(&scope);
    second.wait_for_partitions("the second has its share", |partitions| partitions == 1_000);
    scope.spread(load.take(2_000), &partitions);

    // THEN every record is written and published exactly once
    scope.wait_until_caught_up();
    for daemon in [&first, &second] {
        let peak = resident_peak_mb(daemon);
        assert!(peak < RESIDENT_MB_MAX, "{peak} MB");
    }
    first.drains();
    second.drains();
    scope.assert_exactly_once();
}

/// Blocks of `source_cursor` and its index that the server looked at, and updates of its rows.
fn cursor_work(scope: &Scope<'_>) -> (i64, i64) {
    let rows = scope.sql(
        "SELECT io.heap_blks_hit + io.heap_blks_read + io.idx_blks_hit + io.idx_blks_read, st.n_tup_upd
         FROM pg_statio_user_tables io JOIN pg_stat_user_tables st USING (relid) WHERE io.relname = 'source_cursor'",
        &[],
    );
    (rows[0].get(0), rows[0].get(1))
}

#[test]
fn a_held_snapshot_does_not_make_each_batch_dearer() {
    const MOVES: i64 = 3_000;
    // GIVEN a lane with a partition, and a snapshot that keeps all dead versions of its cursor
    let scope = Scope::new(Servers::shared(), "held_snapshot");
    scope.command(&["migrate"]).succeeds();
    let database_id = scope.sql("SELECT database_id FROM payment_writer.database_identity", &[])[0].get(0);
    let identity = Identity { topic_id: Uuid::from_u128(7), database_id };
    scope.sql(
        "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied) VALUES ('t', $1, 0, 0)",
        &[&identity.topic_id],
    );
    let holder = scope.connect();
    block_on(holder.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")).unwrap();
    let url = Endpoint::parse(&scope.postgres_url()).unwrap();
    let mut store = block_on(async { PgStore::new(url.pool(1).unwrap(), "t".to_owned(), identity) });

    // WHEN it moves its cursor again and again
    let mut at = 0;
    let mut move_on = |count: i64| {
        for _ in 0..count {
            let moved = CursorMove {
                partition: Partition(0),
                seen: NextOffset(at),
                applied: NextOffset(at + 1),
                published: Some(NextOffset(at)),
                timestamp: None,
            };
            block_on(store.move_cursors(&[moved])).unwrap();
            at += 1;
        }
        // The server reports its statistics once a second, with the next transaction.
        wait_until("the moves are in the server's statistics", || {
            let reported = cursor_work(&scope).1 >= at;
            if !reported {
                block_on(store.cursors(&[Partition(0)])).unwrap();
            }
            reported
        });
        cursor_work(&scope).0
    };
    let first = move_on(MOVES / 5);
    let middle = move_on(MOVES - 2 * (MOVES / 5));
    let last = move_on(MOVES / 5) - middle;

    // THEN the last moves need hardly more work than the first
    block_on(holder.batch_execute("COMMIT")).unwrap();
    println!("{first} blocks for the first {} moves, {last} for the last", MOVES / 5);
    assert!(last < 3 * first, "{first} blocks for the first {} moves, {last} for the last", MOVES / 5);
}
