//! Generations, pruning and months: exact across rotations, held back by any partition that lags, harmless to
//! writers, and completed by the next pass after an interruption.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use payment_writer::config::Endpoint;
use payment_writer::domain::batch::{Batch, Progress};
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::outcome::Outcome;
use payment_writer::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::Rules;
use payment_writer::housekeeping::generations;
use payment_writer::ports::{CursorMove, Store};
use payment_writer::postgres::store::PgStore;
use uuid::Uuid;

use crate::support::{
    Daemon, Finished, Flow, Load, Member, Message, Payment, Scope, Servers, block_on, payment_id, ulid,
    uuid_v4, uuid_v7, wait_until,
};

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// The generations that have a table, as (number, state).
fn live(scope: &Scope<'_>) -> Vec<(i64, String)> {
    let query = "SELECT generation, state FROM payment_writer.idempotency_generation
                 WHERE state <> 'dropped' ORDER BY generation";
    scope.sql(query, &[]).iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn states(scope: &Scope<'_>) -> String {
    // One table is always ready for the next rotation.
    let in_use = live(scope).into_iter().filter(|(_, state)| state != "ready");
    in_use.map(|(n, state)| format!("{n} {state}")).collect::<Vec<_>>().join(", ")
}

/// Makes the current generation old enough for a rotation.
fn age_current(scope: &Scope<'_>) {
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET made_current_at = made_current_at - interval '8 days'
         WHERE state = 'current'",
    );
}

/// Runs one pass; waits for a pass of a daemon that is in progress.
fn prune(scope: &Scope<'_>) -> Finished {
    let mut finished = None;
    wait_until("no other pass is under way", || {
        finished = Some(scope.command(&["prune"]).succeeds());
        finished.as_ref().is_some_and(|f| !f.stdout.contains("another pass is under way"))
    });
    finished.unwrap()
}

/// A payment on a record with this timestamp.
fn record(seed: u64, timestamp_ms: i64) -> Message {
    Payment::new(uuid_v4(seed), 7).message().timestamp_ms(timestamp_ms)
}

fn settled(daemon: &crate::support::Daemon, outcome: &str) -> usize {
    // The last line of a run counts the records by outcome.
    let log = daemon.log();
    log.lines()
        .rev()
        .find_map(|line| line.split(&format!("{outcome}=")).nth(1))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no {outcome} in:\n{log}"))
}

/// One lane of the race: writes all ids as records of its own partition, and counts what it wrote.
async fn race(
    scope_url: String,
    topic: String,
    identity: Identity,
    partition: i32,
    from: i64,
    ids: Vec<Uuid>,
) -> usize {
    const BATCH: usize = 2_500;
    let mut store = PgStore::new(Endpoint::parse(&scope_url).unwrap().pool(1).unwrap(), topic, identity);
    let partition = Partition(partition);
    let mut seen = NextOffset(from);
    let mut written = 0;
    for ids in ids.chunks(BATCH) {
        let mut source = SourceBatch::new();
        for (n, id) in ids.iter().enumerate() {
            source.push(
                partition,
                Offset(seen.0 + n as i64),
                Some(TimestampMs(now_ms())),
                Some(b"7"),
                Some(Payment::new(id, 7).json().as_bytes()),
                [],
            );
        }
        let reached = NextOffset(seen.0 + ids.len() as i64);
        let progress = Progress { partition, seen, reached, timestamp: None };
        let batch = Batch::assemble(source, vec![progress], &Rules::default());
        let moved = CursorMove { partition, seen, applied: reached, published: None, timestamp: None };
        let (fates, ..) = store.write(&batch, &[moved]).await.unwrap();
        written += fates.iter().filter(|fate| **fate == Outcome::Written).count();
        assert!(fates.iter().all(|fate| matches!(fate, Outcome::Written | Outcome::Duplicate)), "{fates:?}");
        seen = reached;
    }
    written
}

#[test]
fn lanes_that_race_the_same_ids_across_a_rotation_claim_each_once() {
    const ROUNDS: u64 = 40;
    const IDS: u64 = 10_000;
    let scope = Scope::new(Servers::shared(), "rotation_race");
    scope.command(&["migrate"]).succeeds();
    let topic_id = Uuid::from_u128(7);
    let database_id: Uuid =
        scope.sql("SELECT database_id FROM payment_writer.database_identity", &[])[0].get(0);
    let identity = Identity { topic_id, database_id };
    for partition in 0..2 {
        scope.sql(
            "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied) VALUES ('t', $1, $2, 0)",
            &[&topic_id, &partition],
        );
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    for round in 0..ROUNDS {
        // GIVEN ids of all kinds, in two orders
        let id = |n: u64| match n % 2 {
            0 => uuid_v4(round * IDS + n),
            _ => uuid_v7(now_ms(), round * IDS + n),
        };
        let ids: Vec<Uuid> = (0..IDS).map(id).collect();
        let mut other = ids.clone();
        other.reverse();
        let from = i64::try_from(round * IDS).unwrap();
        let lane = |partition, ids| {
            runtime.spawn(race(scope.postgres_url(), "t".to_owned(), identity.clone(), partition, from, ids))
        };
        // WHEN two lanes write them while generations are rotated, and each closed one is measured at once
        let (first, second) = (lane(0, ids), lane(1, other));
        let url = scope.postgres_url();
        let rotations = async {
            let (mut client, _driver) = Endpoint::parse(&url).unwrap().connect().await.unwrap();
            for _ in 0..2 {
                let all = generations::list(&client).await.unwrap();
                let current = all.iter().find(|g| g.state == generations::State::Current).unwrap().number;
                let next = all.iter().map(|g| g.number).max().unwrap() + 1;
                tokio::time::sleep(Duration::from_millis(10 + round % 40)).await;
                generations::make(&client, next).await.unwrap();
                assert_eq!(
                    generations::rotate(&client, current, next).await.unwrap(),
                    generations::Step::Done
                );
                let closed = generations::list(&client).await.unwrap();
                let closed = closed.iter().find(|g| g.number == current).unwrap();
                generations::measure(&mut client, closed).await.unwrap();
            }
        };
        let written = runtime.block_on(async {
            rotations.await;
            first.await.unwrap() + second.await.unwrap()
        });
        // THEN each was claimed once across all generations
        assert_eq!(written as u64, IDS, "round {round}");
        let counts =
            scope.sql("SELECT count(*), count(DISTINCT message_id) FROM payment_writer.idempotency", &[]);
        assert_eq!(
            (counts[0].get::<_, i64>(0), counts[0].get::<_, i64>(1)),
            (10_000, 10_000),
            "round {round}"
        );
        // The next round does not need the older ones.
        runtime.block_on(async {
            let (client, _driver) = Endpoint::parse(&scope.postgres_url()).unwrap().connect().await.unwrap();
            for generation in generations::list(&client).await.unwrap() {
                if generation.state == generations::State::Older {
                    generations::retire(&client, generation.number).await.unwrap();
                    generations::detach(&client, &generation).await.unwrap();
                    generations::drop_table(&client, &generation).await.unwrap();
                }
            }
        });
        // The current one is emptied now, and dropped after the next round.
        scope.execute_unguarded(
            "DO $$ BEGIN EXECUTE format('TRUNCATE payment_writer.idempotency_g%s',
                (SELECT current_generation FROM payment_writer.idempotency_current)); END $$",
        );
    }
    assert_eq!(scope.count("payment_core"), i64::try_from(ROUNDS * IDS).unwrap());
}

#[test]
fn after_eight_days_without_the_daemon_duplicates_are_recognised() {
    // GIVEN a payment written more than eight days ago, and repeats of it in the log that are still unread
    let scope = Scope::ready("daemon_away", 2, 2);
    let then = now_ms() - 8 * DAY_MS;
    scope.produce(&scope.input_topic, [record(1, then - HOUR_MS).partition(0)]);
    scope.drain();
    let repeats = [record(1, then).partition(0), record(1, then).partition(1), record(2, then).partition(1)];
    scope.produce(&scope.input_topic, repeats);

    // WHEN the clock says that it is time to rotate and to prune
    age_current(&scope);
    let pass = prune(&scope);
    assert!(pass.stdout.contains("held there by partition"), "{pass:?}");
    assert_eq!(states(&scope), "1 older, 2 current");
    age_current(&scope);
    prune(&scope);
    assert_eq!(states(&scope), "1 older, 2 current", "an empty generation is not rotated");

    // THEN the repeats are duplicates when the daemon is back, and only then the old ids are pruned
    let daemon = scope.drain();
    assert_eq!((settled(&daemon, "written"), settled(&daemon, "duplicates")), (1, 2));
    assert_eq!(scope.count("payment_core"), 2);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 2);
    // All of it is older than the window, including the generation that this pass closed.
    prune(&scope);
    assert_eq!(states(&scope), "3 current");
    assert_eq!(scope.count("idempotency"), 0);
}

#[test]
fn after_eight_days_without_an_output_topic_written_ids_are_still_owned() {
    // GIVEN rows of eight days ago without events: the daemon crashed between the two commits
    let scope = Scope::ready("output_away", 1, 1);
    let then = now_ms() - 8 * DAY_MS;
    scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, then)));
    Member::new("drain").die_at(&scope, "after_postgres_commit");
    let written = scope.count("payment_core");
    assert!(written > 0);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 0);

    // WHEN the generation that owns them is old enough to prune
    age_current(&scope);
    prune(&scope);
    let dry = scope.command(&["prune", "--dry-run"]).succeeds();
    assert!(dry.stdout.contains("held there by partition 0"), "{dry:?}");
    assert!(live(&scope).contains(&(1, "older".to_owned())));

    // THEN the redelivered records are recognised, and each event is sent once
    scope.drain();
    assert_eq!(scope.count("payment_core"), 20);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 20);
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 0);
    prune(&scope);
    assert!(!live(&scope).iter().any(|(n, _)| *n == 1), "{}", states(&scope));
}

#[test]
fn a_halted_partition_or_an_unreachable_broker_blocks_pruning() {
    let scope = Scope::ready("held_back", 2, 1);
    let then = now_ms() - 20 * DAY_MS;
    scope.produce(&scope.input_topic, [record(1, then).partition(0), record(2, then).partition(1)]);
    scope.drain();
    age_current(&scope);

    // A partition whose offset was moved over records that were never written.
    scope.produce(&scope.input_topic, (3..6).map(|n| record(n, then).partition(1)));
    scope.move_group_offset(1, 3, "");
    let pass = prune(&scope);
    assert!(pass.stdout.contains("partition 1 is halted (moved_forward)"), "{pass:?}");
    let rows =
        scope.sql("SELECT is_complete FROM payment_writer.housekeeping_pass ORDER BY id DESC LIMIT 1", &[]);
    assert!(!rows[0].get::<_, bool>(0), "a pass that was held back is repeated within a week");

    // An unreachable broker is an error in the output, for the reader of cron's mails, and nothing is pruned.
    let away = scope.command_with(&["prune"], &[("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")]);
    assert_eq!(away.code, Some(1), "{away:?}");
    assert!(away.stderr.contains("nothing was pruned"), "{away:?}");
    assert!(live(&scope).contains(&(1, "older".to_owned())));

    // After the halt is resolved, it is pruned.
    let settle = ["cursors", "accept", "--partition", "1", "--published", "1", "--apply", "--reason", "test"];
    scope.command(&settle).succeeds();
    scope.drain();
    prune(&scope);
    assert!(!live(&scope).iter().any(|(n, _)| *n == 1), "{}", states(&scope));
}

#[test]
fn settings_of_another_log_prune_nothing() {
    // GIVEN ids that are old enough to prune
    let scope = Scope::ready("other_log", 1, 1);
    scope.produce(&scope.input_topic, (1..=5).map(|n| record(n, now_ms() - 20 * DAY_MS)));
    scope.drain();
    age_current(&scope);
    // WHEN cron's settings name another group, mode or topic THEN nothing is pruned, and the output says so
    let other_topic = format!("{}_other", scope.input_topic);
    scope.create_topic(&other_topic, 1);
    for (name, value) in [("GROUP_ID", "other"), ("PUBLISH", "false"), ("INPUT_TOPIC", &other_topic)] {
        let settings = [(format!("PAYMENT_WRITER__KAFKA__{name}"), value)];
        let settings: Vec<_> = settings.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        for arguments in [&["prune"][..], &["prune", "--dry-run"]] {
            let refused = scope.command_with(arguments, &settings);
            assert_eq!(refused.code, Some(3), "{name}: {refused:?}");
            assert!(
                refused.stderr.contains("bound to") || refused.stderr.contains("written from"),
                "{refused:?}"
            );
        }
    }
    assert_eq!(scope.count("idempotency"), 5);
    prune(&scope);
    assert_eq!(scope.count("idempotency"), 0);
}

#[test]
fn a_dry_run_prints_what_would_be_pruned_and_changes_nothing() {
    let scope = Scope::ready("dry_run", 1, 1);
    scope.produce(&scope.input_topic, (1..=50).map(|n| record(n, now_ms() - 9 * DAY_MS)));
    scope.drain();
    age_current(&scope);
    let dry = scope.command(&["prune", "--dry-run"]).succeeds();
    assert!(dry.stdout.contains("would be rotated"), "{dry:?}");
    assert_eq!(states(&scope), "1 current");
    // The pass rotates, and drops the generation that it closed: everything in it is older than the window.
    let before = scope.count("idempotency");
    assert_eq!(before, 50);
    let pass = prune(&scope);
    assert!(pass.stdout.contains("generations dropped: 1, 50 rows"), "{pass:?}");
    assert_eq!(scope.count("idempotency"), 0);
    // It is no error if there is nothing to do.
    let again = prune(&scope);
    assert!(again.stdout.contains("no generation to drop"), "{again:?}");
}

#[test]
fn no_writer_waits_for_a_prune_behind_a_long_reader() {
    // GIVEN a running daemon, an old generation that can be dropped, and a session that keeps reading the ids
    let scope = Scope::ready("long_reader", 4, 2);
    scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, now_ms() - 20 * DAY_MS)));
    scope.drain();
    age_current(&scope);
    let reader = scope.connect();
    block_on(reader.batch_execute("BEGIN; SELECT count(*) FROM payment_writer.idempotency")).unwrap();
    let held = prune(&scope);
    assert!(held.stdout.contains("another session uses its table"), "{held:?}");
    let daemon = Member::new("drain").with("IDEMPOTENCY__PRUNE_SCHEDULE", "").start(&scope);
    daemon.wait_until_ready();
    let flow = Flow::start(&scope, Load::without_bad_records(5), 200);

    // WHEN passes run, and the server's own view of lock waits is sampled
    let is_over = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (url, is_over) = (scope.postgres_url(), Arc::clone(&is_over));
        std::thread::spawn(move || {
            block_on(async {
                let (client, _driver) = Endpoint::parse(&url).unwrap().connect().await.unwrap();
                let mut longest = 0.0f64;
                while !is_over.load(Ordering::Relaxed) {
                    let row = client
                        .query_one(
                            "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0)::float8
                             FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                             WHERE NOT l.granted AND a.datname = current_database() AND a.query !~ 'NO INHERIT'",
                            &[],
                        )
                        .await
                        .unwrap();
                    longest = longest.max(row.get(0));
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                longest
            })
        })
    };
    wait_until("the lanes write", || scope.count("idempotency_g2") > 0);
    age_current(&scope);
    let rotated = prune(&scope);
    assert!(rotated.stdout.contains("another session uses its table"), "{rotated:?}");
    assert!(rotated.stdout.contains("rotated: generation 3"), "{rotated:?}");
    is_over.store(true, Ordering::Relaxed);
    let longest = watcher.join().unwrap();
    println!("longest wait of a writer for a lock: {:.0} ms", longest * 1_000.0);
    // The promise is 100 ms; the margin is for stalled machines.
    assert!(longest < 2.0, "a writer waited for {longest} s");

    // THEN the next pass after the reader has ended drops it, and nothing was lost meanwhile
    block_on(reader.batch_execute("COMMIT")).unwrap();
    prune(&scope);
    assert!(!live(&scope).iter().any(|(n, _)| *n == 1), "{}", states(&scope));
    flow.end();
    scope.wait_until_caught_up();
    drop(daemon);
}

#[test]
fn a_pass_that_dies_between_its_steps_is_finished_by_the_next() {
    for failpoint in ["after_retire", "after_detach"] {
        let scope = Scope::ready(failpoint, 1, 1);
        scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, now_ms() - 20 * DAY_MS)));
        scope.drain();
        age_current(&scope);
        let died = scope.command_with(&["prune"], &[("PAYMENT_WRITER_FAILPOINT", failpoint)]);
        assert_eq!(died.code, None, "{died:?}");
        let left = live(&scope);
        assert!(
            left.iter().any(|(n, s)| *n == 1 && ["retired", "detached"].contains(&s.as_str())),
            "{left:?}"
        );

        // The daemon is not affected, and the next pass completes.
        scope.produce(&scope.input_topic, [record(21, now_ms())]);
        scope.drain();
        prune(&scope);
        assert_eq!(states(&scope), "2 current", "{failpoint}");
        let tables = scope.sql("SELECT FROM pg_tables WHERE tablename = 'idempotency_g1'", &[]);
        assert!(tables.is_empty());
        assert_eq!(scope.count("idempotency"), 1);
    }
}

#[test]
fn a_clock_that_steps_back_or_a_late_rotation_only_delays_pruning() {
    let scope = Scope::ready("clock", 1, 1);
    scope.produce(&scope.input_topic, [record(1, now_ms())]);
    scope.drain();
    // It was made current tomorrow, by the clock that was set back.
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET made_current_at = now() + interval '1 day' WHERE generation = 1",
    );
    prune(&scope);
    assert_eq!(states(&scope), "1 current");
    // A month late.
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET made_current_at = now() - interval '40 days' WHERE generation = 1",
    );
    prune(&scope);
    assert_eq!(states(&scope), "1 older, 2 current");
    scope.produce(&scope.input_topic, [record(1, now_ms()), record(2, now_ms())]);
    let daemon = scope.drain();
    assert_eq!((settled(&daemon, "written"), settled(&daemon, "duplicates")), (1, 1));
}

#[test]
fn ids_with_a_recent_time_skip_the_lookup_in_the_older_generation() {
    // GIVEN an older generation with ids of all kinds, one of them a ULID that was written as a plain UUID
    let scope = Scope::ready("spared", 1, 1);
    let then = now_ms() - 2 * DAY_MS;
    let strange = Uuid::from_u128((u128::try_from(now_ms()).unwrap() << 80) | (0x4 << 76) | (0b10 << 62) | 5);
    let old = [
        Payment::new(uuid_v7(then, 1), 7).message().timestamp_ms(then),
        Payment::new(strange, 7).message().timestamp_ms(then),
    ];
    scope.produce(&scope.input_topic, old);
    scope.drain();
    age_current(&scope);
    prune(&scope);
    assert_eq!(states(&scope), "1 older, 2 current");

    // WHEN the same bits arrive as a ULID, whose time is recent, with a new id and a repeat of the old one
    scope.produce(
        &scope.input_topic,
        [
            Payment::new(ulid(strange), 7).message().timestamp_ms(now_ms()),
            Payment::new(uuid_v7(now_ms(), 2), 7).message().timestamp_ms(now_ms()),
            Payment::new(uuid_v7(then, 1), 7).message().timestamp_ms(now_ms()),
        ],
    );
    let daemon = Member::new("drain").start(&scope);
    scope.wait_until_caught_up();

    // THEN only the new one skips the lookup, and the others are recognised
    wait_until("the outcomes are counted", || {
        daemon.metric("payment_writer_records_total", "outcome=\"duplicate\"") == 2.0
    });
    assert_eq!(daemon.metric("payment_writer_claims_older_total", "probe=\"spared\""), 1.0);
    assert_eq!(daemon.metric("payment_writer_claims_older_total", "probe=\"probed\""), 2.0);
    assert_eq!(scope.count("payment_core"), 3);
}

#[test]
fn one_of_several_daemons_runs_a_missed_pass() {
    // GIVEN a database that has had no pass for longer than the schedule allows
    let scope = Scope::ready("missed_pass", 2, 1);
    scope.produce(&scope.input_topic, [record(1, now_ms() - 20 * DAY_MS)]);
    scope.drain();
    age_current(&scope);
    scope.execute("TRUNCATE payment_writer.housekeeping_pass");
    scope.execute("UPDATE payment_writer.database_identity SET created_at = now() - interval '8 days'");

    // WHEN two daemons start
    let daemons = ["a", "b"].map(|name| Member::new(name).soon_forgotten().start(&scope));

    // THEN one of them runs a pass, and both report it
    let passes = || scope.count("housekeeping_pass");
    wait_until("a pass was made", || passes() == 1);
    wait_until("the old generation is gone", || !live(&scope).iter().any(|(n, _)| *n == 1));
    wait_until("the metrics say so", || {
        daemons.iter().any(|d| d.metric("payment_writer_generations_dropped_total", "") == 1.0)
    });
    assert_eq!(passes(), 1);
    let log: String = daemons.iter().map(|daemon| daemon.log()).collect();
    assert_eq!(log.matches("housekeeping pass").count(), 1, "{log}");
}

#[test]
fn a_writer_without_ddl_claims_in_generations_that_another_role_created() {
    let scope = Scope::ready("roles_rotation", 1, 1);
    let database = scope.sql("SELECT current_database()", &[])[0].get::<_, String>(0);
    let writer = format!("{database}_w");
    scope.execute_as_admin(&format!(
        "CREATE ROLE \"{writer}\" LOGIN PASSWORD 'w';
         GRANT USAGE ON SCHEMA payment_writer TO \"{writer}\";
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA payment_writer TO \"{writer}\";
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA payment_writer TO \"{writer}\";"
    ));
    let owner = scope.postgres_url();
    let url = owner.replace("//payment_writer:payment_writer@", &format!("//{writer}:w@"));
    let roles = [
        ("PAYMENT_WRITER__POSTGRES__URL", url.as_str()),
        ("PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL", &owner),
    ];
    scope.produce(&scope.input_topic, [record(1, now_ms())]);
    scope.drain_with(&roles);
    age_current(&scope);
    scope.command_with(&["prune"], &roles).succeeds();
    assert_eq!(states(&scope), "1 older, 2 current");
    scope.produce(&scope.input_topic, [record(1, now_ms()), record(2, now_ms())]);
    let daemon = scope.drain_with(&roles);
    assert_eq!((settled(&daemon, "written"), settled(&daemon, "duplicates")), (1, 1));
    // The writer's role alone cannot prune.
    age_current(&scope);
    let refused = scope.command_with(&["prune"], &[("PAYMENT_WRITER__POSTGRES__URL", &url)]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    scope.execute_as_admin(&format!("DROP OWNED BY \"{writer}\"; DROP ROLE \"{writer}\""));
}

#[test]
fn rows_in_a_default_partition_move_to_their_month_and_old_months_are_detached() {
    let scope = Scope::ready("months_kept", 1, 1);
    // GIVEN payments of a month that has no table
    let long_ago = now_ms() - 100 * DAY_MS;
    scope.produce(&scope.input_topic, (1..=30).map(|n| record(n, long_ago)));
    scope.drain();
    assert_eq!(scope.count("payment_core_default"), 30);

    // WHEN a pass runs
    let pass = prune(&scope);
    assert!(pass.stdout.contains("rows moved from the default partitions: 60"), "{pass:?}");

    // THEN they are in their month's table, and nothing is lost
    assert_eq!((scope.count("payment_core_default"), scope.count("payment_core")), (0, 30));
    assert_eq!((scope.count("payment_metadata_default"), scope.count("payment_metadata")), (0, 30));

    // WHEN only two months are retained THEN older ones are detached and renamed, with all their rows
    let kept = [("PAYMENT_WRITER__RETENTION__PAYMENT_MONTHS", "2")];
    let pass = scope.command_with(&["prune"], &kept).succeeds();
    assert!(
        pass.stdout.contains("detached for archiving: payment_writer.archived_payment_core_"),
        "{pass:?}"
    );
    assert_eq!(scope.count("payment_core"), 0);
    let archived = scope
        .sql("SELECT tablename::text FROM pg_tables WHERE tablename LIKE 'archived_payment_core_%'", &[]);
    assert_eq!(archived.len(), 1);
    assert_eq!(scope.count(archived[0].get::<_, &str>(0)), 30);

    // WHEN another payment of that month arrives late THEN it is stored beside them, and nothing is blocked
    scope.produce(&scope.input_topic, [record(31, long_ago)]);
    scope.drain();
    let pass = scope.command_with(&["prune"], &kept).succeeds();
    let second = format!("{}_2", archived[0].get::<_, &str>(0));
    assert!(pass.stdout.contains(&second), "{pass:?}");
    assert_eq!(scope.count(&second), 1);
}

#[test]
fn each_task_fails_apart_where_ddl_is_refused_and_metrics_name_it() {
    // GIVEN a rotation that is due, a month that is missing, and an event trigger that refuses DDL
    let scope = Scope::ready("ddl_refused", 1, 1);
    scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, now_ms() - 20 * DAY_MS)));
    scope.drain();
    prune(&scope);
    age_current(&scope);
    let newest =
        "SELECT max(tablename)::text FROM pg_tables WHERE tablename ~ '^payment_core_[0-9]{4}_[0-9]{2}$'";
    let newest: String = scope.sql(newest, &[])[0].get(0);
    scope.execute(&format!("DROP TABLE payment_writer.{newest}"));
    scope.execute_as_admin(
        "CREATE FUNCTION refuse_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
             IF session_user = 'payment_writer' THEN
                 RAISE insufficient_privilege USING MESSAGE = 'schema changes are frozen';
             END IF;
         END $$;
         CREATE EVENT TRIGGER no_ddl ON ddl_command_start EXECUTE FUNCTION refuse_ddl()",
    );

    // WHEN a pass runs THEN it does what needs no DDL, and names what failed and why
    let failed = scope.command(&["prune"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert_eq!(live(&scope), [(1, "retired".to_owned()), (2, "current".to_owned())], "{failed:?}");
    for task in ["generation", "pruning", "months"] {
        assert!(failed.stderr.contains(&format!("{task}: ")), "{task}: {failed:?}");
    }
    assert!(failed.stderr.contains("schema changes are frozen"), "{failed:?}");

    // and a daemon writes payments and reports the same
    scope.produce(&scope.input_topic, [record(21, now_ms())]);
    let daemon = Member::new("frozen").start(&scope);
    wait_until("the payment is written", || scope.count("payment_core") == 21);
    let failing = |daemon: &Daemon, task: &str| {
        daemon.metric("payment_writer_housekeeping_failing", &format!("task=\"{task}\""))
    };
    wait_until("the pass is reported", || failing(&daemon, "months") == 1.0);
    assert_eq!(failing(&daemon, "generation"), 1.0);
    assert_eq!(failing(&daemon, "pruning"), 1.0);
    assert_eq!(failing(&daemon, "rotation"), 0.0);
    assert_eq!(daemon.metric("payment_writer_months_ahead", ""), 1.0);
    drop(daemon);

    // WHEN DDL is allowed again THEN the next pass completes all of it
    scope.execute_as_admin("DROP EVENT TRIGGER no_ddl");
    prune(&scope);
    assert_eq!(states(&scope), "2 current");
    let daemon = Member::new("thawed").start(&scope);
    wait_until("all months are there", || daemon.metric("payment_writer_months_ahead", "") == 2.0);
    for task in ["generation", "rotation", "pruning", "months"] {
        assert_eq!(failing(&daemon, task), 0.0, "{task}");
    }
}

#[test]
fn status_prints_what_is_known_about_an_id() {
    let scope = Scope::ready("status_of_id", 2, 1);
    let id = uuid_v7(now_ms(), 9);
    let at = now_ms();
    let message = Payment::new(id, 7).message().timestamp_ms(at).partition(1);
    scope.produce(&scope.input_topic, [message.clone(), message]);
    scope.drain();
    let text = id.to_string();
    let written = scope.command(&["status", &ulid(id)]).succeeds().stdout;
    assert!(written.starts_with("written: "), "{written}");
    assert!(written.contains("partition 1, offset 0"), "{written}");
    assert!(written.contains(&payment_id(id, at)), "{written}");
    assert!(written.contains("events      published"), "{written}");
    let second =
        scope.command(&["status", &text, "--partition", "1", "--offset", "1", "--json"]).succeeds().stdout;
    let second: serde_json::Value = serde_json::from_str(&second).unwrap();
    assert_eq!(second["state"], "duplicate or conflict");
    assert_eq!((&second["partition"], &second["offset"]), (&1.into(), &0.into()));
    let other = scope.command(&["status", &uuid_v4(77).to_string()]).succeeds().stdout;
    assert!(other.starts_with("unknown"), "{other}");
    // The idempotency table no longer has it, the payment tables do.
    scope.execute_unguarded("TRUNCATE payment_writer.idempotency_g1");
    assert!(scope.command(&["status", &text]).succeeds().stdout.starts_with("unknown"));
    assert!(scope.command(&["status", &text, "--search"]).succeeds().stdout.starts_with("written"));
    assert_eq!(scope.command(&["status", "no-id"]).code, Some(2));
}

#[test]
fn message_ids_are_not_removed_by_hand_but_by_housekeeping_and_replication() {
    // GIVEN ids in the current generation
    let scope = Scope::ready("ids_stay", 1, 1);
    scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, now_ms())));
    scope.command(&["run", "--until-caught-up"]).succeeds();

    // WHEN its owner, or a superuser, removes some of them or all, THEN that is refused, with the remedy
    let next = "SELECT payment_writer.make_generation_v1(2)";
    scope.execute(next);
    for table in ["idempotency", "idempotency_g1", "idempotency_g2"] {
        for statement in ["DELETE FROM", "TRUNCATE"] {
            let removed = format!("{statement} payment_writer.{table}");
            let client = scope.connect_to(&scope.servers.postgres_admin_url(&scope.database));
            for refused in [
                block_on(client.batch_execute(&removed)).unwrap_err(),
                block_on(scope.connect().batch_execute(&removed)).unwrap_err(),
            ] {
                let refused = refused.as_db_error().unwrap();
                assert_eq!(refused.code().code(), "55000", "{removed}");
                assert!(refused.message().contains("could be written twice"), "{refused:?}");
                assert!(refused.hint().unwrap().contains("payment-writer prune"), "{refused:?}");
            }
        }
    }
    assert_eq!(scope.count("idempotency"), 20);
    // AND a row can still be corrected
    scope.execute("UPDATE payment_writer.idempotency SET payload_hash = payload_hash");

    // AND doctor names a generation without its trigger, and no trigger of ours as foreign
    let says = |finding: &str| {
        let finished = scope.command(&["doctor", "--json"]);
        let found: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
        let one = found.as_array().unwrap().iter().find(|one| one["what"] == finding);
        one.map_or(String::new(), |one| format!("{} {}", one["severity"], one["says"]))
    };
    assert!(!says("generation_guard").contains("warn"), "{}", says("generation_guard"));
    assert!(!says("foreign_objects").contains("warn"), "{}", says("foreign_objects"));
    scope.execute("ALTER TABLE payment_writer.idempotency_g2 DISABLE TRIGGER message_ids_stay");
    assert!(
        says("generation_guard").contains("missing: trigger on idempotency_g2"),
        "{}",
        says("generation_guard")
    );
    scope.command(&["migrate"]).succeeds();
    assert!(!says("generation_guard").contains("warn"), "{}", says("generation_guard"));

    // AND where changes are replicated, they are applied
    scope.execute_unguarded("DELETE FROM payment_writer.idempotency_g1 WHERE source_offset = 3");
    assert_eq!(scope.count("idempotency"), 19);
}

#[test]
fn a_month_that_was_detached_by_hand_is_named_until_its_payments_are_back() {
    // GIVEN payments of the current month, which somebody detaches
    let scope = Scope::ready("month_detached", 1, 1);
    scope.produce(&scope.input_topic, (1..=20).map(|n| record(n, now_ms())));
    scope.drain();
    let month = "SELECT to_char(now() AT TIME ZONE 'UTC', '\"payment_core_\"YYYY_MM')";
    let month: String = scope.sql(month, &[])[0].get(0);
    scope
        .execute(&format!("ALTER TABLE payment_writer.payment_core DETACH PARTITION payment_writer.{month}"));

    // THEN the daemon writes new ones, and metric and log name the month
    scope.produce(&scope.input_topic, (21..=30).map(|n| record(n, now_ms())));
    let mut daemon = Member::new("a").start(&scope);
    wait_until("the payments are written", || scope.count("payment_core") == 10);
    let failing = |daemon: &Daemon| daemon.metric("payment_writer_housekeeping_failing", "task=\"months\"");
    wait_until("the metric tells it", || failing(&daemon) == 1.0);
    assert!(daemon.log().contains(&format!("{month} is detached")), "{}", daemon.log());
    daemon.drains();

    // WHEN the operator does as it says, THEN all payments are there, and nothing is told any more
    scope.execute(&format!("ALTER TABLE payment_writer.{month} RENAME TO found"));
    prune(&scope);
    scope.execute("INSERT INTO payment_writer.payment_core SELECT * FROM payment_writer.found");
    assert_eq!((scope.count("payment_core"), scope.count("payment_core_default")), (30, 0));
    let daemon = Member::new("b").start(&scope);
    wait_until("the months are there", || daemon.metric("payment_writer_months_ahead", "") == 2.0);
    assert_eq!(failing(&daemon), 0.0);
}
