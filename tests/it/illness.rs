//! A database that temporarily rejects good rows, all or some of them. No good record becomes a dead letter,
//! at any rate; a record that is itself bad still does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::{
    AT_MS, Daemon, Flow, Load, Member, Message, PATIENCE, Payment, Scope, Servers, block_on, uuid_v4,
    wait_until, wait_until_within,
};

/// Rounds in which each table alone rejects rows; after twice as many, both have been rejecting at once.
const TABLES: usize = 5;

fn member() -> Member {
    Member::new("a").soon_forgotten().with("LANES", "1")
}

fn ready(name: &str) -> Scope<'static> {
    let scope = Scope::new(Servers::shared(), name);
    scope.prepare(4, 2);
    scope.execute(
        "CREATE FUNCTION payment_writer.refuses() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no'; END $$",
    );
    scope
}

/// SQL that makes a table reject every row, and SQL that ends it.
fn illness(scope: &Scope<'_>, round: usize) -> (String, String) {
    let month = &scope.sql("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')", &[])[0];
    let table = match round % TABLES {
        0 => "payment_core".to_owned(),
        1 => "payment_metadata".to_owned(),
        2 => "payment_notes".to_owned(),
        3 => "idempotency_g1".to_owned(),
        _ => format!("payment_core_{}", month.get::<_, &str>(0)),
    };
    let table = format!("payment_writer.{table}");
    if round.is_multiple_of(2) {
        (
            format!("ALTER TABLE {table} ADD CONSTRAINT ill CHECK (false) NOT VALID"),
            format!("ALTER TABLE {table} DROP CONSTRAINT ill"),
        )
    } else {
        (
            format!(
                "CREATE TRIGGER ill BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION payment_writer.refuses()"
            ),
            format!("DROP TRIGGER ill ON {table}"),
        )
    }
}

/// Makes one table after the other reject rows, each for 50 ms to `longest`, while payments flow.
fn fall_ill(scope: &Scope<'_>, daemon: &Daemon, rounds: usize, longest: Duration, chance: &mut Load) {
    let longest_ms = u64::try_from(longest.as_millis()).unwrap();
    for round in 0..rounds {
        let written = scope.count("payment_core");
        wait_until_within(PATIENCE, "payments are written", || scope.count("payment_core") > written);
        let (fall, mend) = illness(scope, round);
        scope.execute(&fall);
        // Durations are distributed logarithmically.
        let exponent = chance.number(0, 1_000) as f64 / 1_000.0;
        let ms = 50.0 * (longest_ms as f64 / 50.0).powf(exponent);
        thread::sleep(Duration::from_millis(ms as u64));
        scope.execute(&mend);
        assert_eq!(rejected(scope), 0, "good records were dead-lettered in round {round}, {fall}, {ms} ms");
    }
    assert!(
        daemon.metric("payment_writer_database_errors_total", "") >= 1.0,
        "no database error was counted"
    );
}

/// Dead letters caused by the database.
fn rejected(scope: &Scope<'_>) -> usize {
    let letters = scope.read_all(&scope.dead_letter_topic);
    letters.iter().filter(|letter| letter.header("dlq-reason") == "rejected_by_database").count()
}

/// Asserts that every payment was written and that there are no dead letters.
#[track_caller]
fn all_is_written(scope: &Scope<'_>, daemon: &mut Daemon) {
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert_eq!(outcomes.dead_letters, 0, "{outcomes:?}");
    assert!(outcomes.written > 0, "{outcomes:?}");
}

fn at_five_a_second(name: &str, rounds: usize, longest: Duration) {
    let scope = ready(name);
    let mut daemon = member().start(&scope);
    daemon.wait_until_ready();
    let is_over = AtomicBool::new(false);
    thread::scope(|threads| {
        threads.spawn(|| {
            let mut load = Load::without_bad_records(51);
            while !is_over.load(Ordering::Relaxed) {
                scope.produce(&scope.input_topic, load.take(1));
                thread::sleep(Duration::from_millis(180));
            }
        });
        // Runs even if this statement fails.
        let over = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            fall_ill(&scope, &daemon, rounds, longest, &mut Load::new(52));
        }));
        is_over.store(true, Ordering::Relaxed);
        over.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
    });
    all_is_written(&scope, &mut daemon);
}

fn at_five_hundred_a_second(name: &str, rounds: usize, longest: Duration) {
    let scope = ready(name);
    let mut daemon = member().start(&scope);
    daemon.wait_until_ready();
    let flow = Flow::start(&scope, Load::without_bad_records(53), 10);
    fall_ill(&scope, &daemon, rounds, longest, &mut Load::new(54));
    drop(flow.end());
    all_is_written(&scope, &mut daemon);
}

/// As fast as the daemon can: more than 50,000 a second with enough cores.
fn in_a_backlog(name: &str, backlog: usize, rounds: usize, longest: Duration) {
    let scope = ready(name);
    let mut load = Load::without_bad_records(55);
    for _ in 0..backlog / 10_000 {
        scope.produce(&scope.input_topic, load.take(10_000));
    }
    // This flow keeps batches coming after the backlog is written.
    let flow = Flow::start(&scope, load, 10);
    let mut daemon = member().start(&scope);
    daemon.wait_until_ready();
    fall_ill(&scope, &daemon, rounds, longest, &mut Load::new(56));
    drop(flow.end());
    all_is_written(&scope, &mut daemon);
}

#[test]
fn a_database_that_rejects_everything_for_a_while_causes_no_dead_letters_at_5_payments_a_second() {
    at_five_a_second("ill_5", TABLES, Duration::from_secs(2));
}

#[test]
fn a_database_that_rejects_everything_for_a_while_causes_no_dead_letters_at_500_payments_a_second() {
    at_five_hundred_a_second("ill_500", 2 * TABLES, Duration::from_secs(1));
}

#[test]
fn a_database_that_rejects_everything_for_a_while_causes_no_dead_letters_in_a_backlog() {
    in_a_backlog("ill_backlog", 60_000, 2 * TABLES, Duration::from_millis(500));
}

#[test]
#[ignore = "a quarter of an hour: all three rates, each table rejects rows in each way five times, for 50 ms to 10 s"]
fn a_database_that_rejects_everything_for_up_to_ten_seconds_causes_no_dead_letters_at_any_rate() {
    let longest = Duration::from_secs(10);
    at_five_a_second("ill_long_5", 10 * TABLES, longest);
    at_five_hundred_a_second("ill_long_500", 10 * TABLES, longest);
    in_a_backlog("ill_long_backlog", 300_000, 10 * TABLES, longest);
}

#[test]
fn a_constraint_dropped_while_rejected_rows_are_searched_for_causes_no_dead_letters() {
    // GIVEN a constraint that rejects every row, and a daemon paused when it has found the first rejected one
    let scope = ready("ill_gone");
    scope.execute("ALTER TABLE payment_writer.payment_core ADD CONSTRAINT ill CHECK (false) NOT VALID");
    let records = (1..=200).map(|seed| Payment::new(uuid_v4(seed), 7).message());
    scope.produce(&scope.input_topic, records);
    let member = member().with("BATCH__LINGER", "2s");
    let mut daemon = member.start_at(&scope, "after_part_refused:1:stop");
    wait_until_within(PATIENCE, "it hangs", || daemon.is_stopped());

    // WHEN the constraint is dropped as soon as the daemon's locks allow it, and the daemon continues
    let mending = scope.connect();
    let mended = thread::spawn(move || {
        let mend = "ALTER TABLE payment_writer.payment_core DROP CONSTRAINT ill";
        block_on(mending.batch_execute(mend)).unwrap();
    });
    wait_until("the constraint is dropped, or its lock is waited for", || {
        let waits = "SELECT FROM pg_stat_activity WHERE datname = current_database()
                     AND query LIKE '%DROP CONSTRAINT ill' AND wait_event_type = 'Lock'";
        mended.is_finished() || !scope.sql(waits, &[]).is_empty()
    });
    daemon.signal("CONT");
    mended.join().unwrap();

    // THEN all payments are written
    all_is_written(&scope, &mut daemon);
}

#[test]
fn a_row_that_is_rejected_once_and_then_accepted_is_written() {
    // GIVEN a trigger that rejects rows depending on another table, which locks on the payment tables do not
    // protect
    let scope = ready("ill_moody");
    scope.execute(
        "CREATE TABLE payment_writer.mood AS SELECT true AS is_bad;
         CREATE FUNCTION payment_writer.moody() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF (SELECT is_bad FROM payment_writer.mood) THEN RAISE EXCEPTION 'no'; END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER ill BEFORE INSERT ON payment_writer.payment_core
             FOR EACH ROW EXECUTE FUNCTION payment_writer.moody()",
    );
    let records = (1..=200).map(|seed| Payment::new(uuid_v4(seed), 7).message());
    scope.produce(&scope.input_topic, records);
    let member = member().with("BATCH__LINGER", "2s");
    let mut daemon = member.start_at(&scope, "after_part_refused:3:stop");
    wait_until_within(PATIENCE, "it hangs", || daemon.is_stopped());

    // WHEN it accepts all rows again after it has rejected three
    scope.execute("UPDATE payment_writer.mood SET is_bad = false");
    daemon.signal("CONT");

    // THEN those three are written like the others
    all_is_written(&scope, &mut daemon);
}

/// A constraint that every one of these payments satisfies except those of `account`.
const LIMIT: &str = "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT closed CHECK (cust_id <> 13)";

fn of_account(seed: u64, account: i64) -> Message {
    Message { timestamp_ms: None, ..Payment::new(uuid_v4(seed), account).message() }
}

#[test]
fn a_bad_record_is_dead_lettered_even_if_no_other_record_arrives() {
    let scope = ready("poison_alone");
    scope.execute(LIMIT);
    scope.produce(&scope.input_topic, [of_account(1, 7)]);
    member().catch_up(&scope);

    // GIVEN a month whose table has its own constraint, so that other months' rows are no evidence
    scope.execute(
        "ALTER TABLE payment_writer.payment_metadata_default ADD CONSTRAINT own CHECK (version < 9)",
    );

    // WHEN bad records arrive one at a time: of this month, with a note, and of a month without payments
    for (seed, at, more) in [(2, None, ""), (3, None, r#","comment":"c""#), (4, Some(AT_MS), "")] {
        let payment = Payment::new(uuid_v4(seed), 13).more(more).message();
        scope.produce(&scope.input_topic, [Message { timestamp_ms: at, ..payment }]);
        member().catch_up(&scope);
    }

    // THEN each becomes a dead letter
    let outcomes = scope.assert_exactly_once();
    assert_eq!((outcomes.written, outcomes.dead_letters, rejected(&scope)), (1, 3, 3));
}

#[test]
fn a_single_good_record_is_not_dead_lettered_by_a_database_that_rejects_everything() {
    let scope = ready("ill_alone");
    scope.produce(&scope.input_topic, [of_account(1, 7)]);
    member().catch_up(&scope);
    for round in 0..TABLES {
        // GIVEN a table that rejects everything, WHEN one record arrives
        let (fall, mend) = illness(&scope, round);
        scope.execute(&fall);
        let payment = Payment::new(uuid_v4(round as u64 + 2), 7).more(r#","comment":"c""#).message();
        scope.produce(&scope.input_topic, [Message { timestamp_ms: None, ..payment }]);
        let mut daemon = member().start(&scope);
        let tries = || daemon.metric("payment_writer_database_errors_total", "");
        wait_until_within(PATIENCE, "it is tried three times", || tries() >= 3.0);
        // THEN it waits
        assert_eq!(rejected(&scope), 0, "{fall}");
        scope.execute(&mend);
        scope.wait_until_caught_up();
        daemon.drains();
    }
    let outcomes = scope.assert_exactly_once();
    assert_eq!((outcomes.written, outcomes.dead_letters), (1 + TABLES, 0));
}

#[test]
fn a_bad_first_record_waits_for_another_record_and_does_not_block_it() {
    // GIVEN the first record ever, which the database rejects: it is not known whether another row would be
    // accepted
    let scope = ready("poison_first");
    scope.execute(LIMIT);
    scope.produce(&scope.input_topic, [of_account(1, 13).partition(0)]);
    let mut daemon = member().start(&scope);
    wait_until_within(PATIENCE, "it waits", || daemon.log().contains("assumed to be at fault"));
    assert_eq!(rejected(&scope), 0);

    // WHEN a good one arrives on another partition
    scope.produce(&scope.input_topic, [of_account(2, 7).partition(1)]);

    // THEN both have their outcome
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert_eq!((outcomes.written, outcomes.dead_letters, rejected(&scope)), (1, 1, 1));
}

#[test]
fn a_month_that_rejects_everything_causes_no_dead_letters_among_many_other_rows() {
    // GIVEN a default partition that rejects everything
    let scope = ready("ill_month");
    let ill = "payment_writer.payment_metadata_default";
    scope.execute(&format!("ALTER TABLE {ill} ADD CONSTRAINT ill CHECK (false) NOT VALID"));

    // WHEN three payments for it arrive among 200 others
    let few = (1..=3).map(|seed| Payment::new(uuid_v4(seed), 7).message());
    let many = (4..=203).map(|seed| of_account(seed, 7));
    scope.produce(&scope.input_topic, few.chain(many));
    let mut daemon = member().with("BATCH__LINGER", "2s").start(&scope);

    // THEN all wait until the constraint is dropped
    wait_until_within(PATIENCE, "it waits", || daemon.log().contains("assumed to be at fault"));
    assert_eq!((rejected(&scope), scope.count("payment_core")), (0, 0));
    scope.execute(&format!("ALTER TABLE {ill} DROP CONSTRAINT ill"));
    all_is_written(&scope, &mut daemon);
}

#[test]
fn a_record_with_a_timestamp_that_the_database_rejects_is_dead_lettered() {
    let scope = ready("poison_time");
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT recent CHECK (created_at >= '2025-01-01')",
    );
    // Among other records, and alone.
    scope.produce(&scope.input_topic, [of_account(1, 7), Payment::new(uuid_v4(2), 7).message()]);
    member().with("BATCH__LINGER", "2s").catch_up(&scope);
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(3), 7).message()]);
    member().catch_up(&scope);
    let outcomes = scope.assert_exactly_once();
    assert_eq!((outcomes.written, outcomes.dead_letters, rejected(&scope)), (1, 2, 2));
}
