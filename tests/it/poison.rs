//! Rows that only the database rejects are found and dead-lettered, and no others. While the database rejects
//! everything, the daemon waits and dead-letters nothing.

use serde_json::Value;

use crate::support::{
    Check, Flow, Load, Member, Message, PATIENCE, Scope, Servers, uuid_v4, wait_until_within,
};

fn member() -> Member {
    Member::new("a").soon_forgotten()
}

fn payment(seed: u64, account: u64, amount: &str, comment: &str) -> Message {
    let id = uuid_v4(seed);
    Message::new(
        account.to_string(),
        format!(
            r#"{{"messageId":"{id}","amount":{amount},"status":2,"currency":"EUR","custId":{account},"type":"BWI","comment":"{comment}"}}"#
        ),
    )
}

/// The sources of dead letters that the database rejected, with their error details.
fn rejected(scope: &Scope<'_>) -> Vec<(i32, i64, String)> {
    let mut found: Vec<(i32, i64, String)> = scope
        .read_all(&scope.dead_letter_topic)
        .iter()
        .filter(|letter| letter.header("dlq-reason") == "rejected_by_database")
        .map(|letter| {
            let number = |name| letter.header(name).parse::<i64>().unwrap();
            (number("dlq-partition") as i32, number("dlq-offset"), letter.header("dlq-detail").to_owned())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn rows_that_the_database_rejects_are_dead_lettered_and_all_others_are_written_once() {
    // GIVEN constraints of every kind on every table, added later
    let scope = Scope::new(Servers::shared(), "poison");
    scope.prepare(4, 2);
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT no_thirteen CHECK (cust_id <> 70131013);
         ALTER TABLE payment_writer.payment_notes ADD CONSTRAINT short CHECK (length(comment) < 20);
         CREATE FUNCTION payment_writer.refuses() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'account % is closed', NEW.cust_id; END $$;
         CREATE FUNCTION payment_writer.overflows() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION USING ERRCODE = '22003', MESSAGE = 'numeric field overflow'; END $$;
         CREATE TRIGGER too_large BEFORE INSERT ON payment_writer.payment_core
             FOR EACH ROW WHEN (NEW.amount > 9999999999) EXECUTE FUNCTION payment_writer.overflows();
         CREATE TRIGGER closed BEFORE INSERT ON payment_writer.payment_core
             FOR EACH ROW WHEN (NEW.cust_id = 1014) EXECUTE FUNCTION payment_writer.refuses();
         CREATE CONSTRAINT TRIGGER closed_later AFTER INSERT ON payment_writer.payment_core
             DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW WHEN (NEW.cust_id = 1015) EXECUTE FUNCTION payment_writer.refuses();",
    );
    let mut load = Load::new(41);
    let mut records = load.take(600);
    let bad = [
        (90, payment(9001, 70131013, "1.00", "c"), "23514"),
        (91, payment(9002, 7, "99999999999.00", "c"), "22003"),
        (250, payment(9003, 8, "1.00", "a comment that is too long"), "23514"),
        (401, payment(9004, 1014, "1.00", "c"), "P0001"),
        (599, payment(9005, 1015, "1.00", "c"), "P0001"),
    ];
    for (place, record, _) in &bad {
        records.insert(*place, record.clone());
    }
    // Repeats of rejected rows: an identical one, and one that the database accepts.
    records.push(payment(9001, 70131013, "1.00", "c"));
    records.push(payment(9003, 8, "1.00", "short"));
    records.push(payment(9003, 8, "1", "short"));
    scope.produce(&scope.input_topic, records);

    // WHEN all of it is written as one batch
    let daemon = member().with("LANES", "1").with("BATCH__LINGER", "2s").catch_up(&scope);

    // THEN the rejected ones are dead letters with their SQLSTATE, and all others are written
    let outcomes = scope.assert_exactly_once();
    let letters = rejected(&scope);
    assert_eq!(letters.len(), 6, "{letters:?}");
    for sqlstate in ["23514", "22003", "P0001"] {
        let expected = bad.iter().filter(|b| b.2 == sqlstate).count() + usize::from(sqlstate == "23514");
        let named = format!("SQLSTATE {sqlstate}");
        assert_eq!(letters.iter().filter(|l| l.2.ends_with(&named)).count(), expected, "{letters:?}");
    }
    let twins = scope.sql("SELECT count(*) FROM payment_writer.payment_notes WHERE comment = 'short'", &[]);
    assert_eq!(
        twins[0].get::<_, i64>(0),
        1,
        "the twin that the database takes is written, its own twin is not"
    );
    assert!(outcomes.written > 400, "{outcomes:?}");
    // AND the log contains no payment data
    for secret in ["70131013", "is closed", "too long", "99999999999", &uuid_v4(9001).to_string()] {
        assert!(!daemon.log().contains(secret), "{secret} in:\n{}", daemon.log());
    }
}

#[test]
fn a_kill_while_rejected_rows_are_dead_lettered_loses_and_duplicates_nothing() {
    let scope = Scope::new(Servers::shared(), "poison_kill");
    scope.prepare(4, 2);
    scope.execute("ALTER TABLE payment_writer.payment_core ADD CONSTRAINT odd CHECK (cust_id % 20 <> 3)");
    let member = member().with("LANES", "1").with("BATCH__MAX_PAYMENTS", "150");
    let mut load = Load::new(42);
    let mut refused = 0;
    for step in [
        "after_part_refused:2",
        "before_postgres_commit:2",
        "after_postgres_commit:2",
        "before_kafka_commit:2",
        "after_kafka_commit:2",
    ] {
        scope.produce(&scope.input_topic, load.take(500));
        // WHEN the process crashes there, and another continues
        member.die_at(&scope, step);
        member.catch_up(&scope);
        // THEN
        scope.assert_exactly_once();
        let now = rejected(&scope).len();
        assert!(now > refused, "{step}: none was refused");
        refused = now;
    }
}

#[test]
fn a_database_that_rejects_too_much_is_waited_for_and_causes_no_dead_letters() {
    // GIVEN a flow of small batches, and a database that accepts them
    let scope = Scope::new(Servers::shared(), "ill");
    scope.prepare(4, 2);
    let flow = Flow::start(&scope, Load::without_bad_records(43), 3);
    let mut daemon = member().with("LANES", "1").with("BATCH__LINGER", "5ms").start(&scope);
    daemon.wait_until_ready();
    wait_until_within(PATIENCE, "payments are written", || scope.count("payment_core") > 100);

    // WHEN it begins to reject every row
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT nothing CHECK (cust_id < 0) NOT VALID",
    );

    // THEN the daemon stops reading records, and logs an error
    let database = || {
        let reply = daemon.get("/readyz").unwrap();
        let body: Value = serde_json::from_str(&reply.body).unwrap_or_default();
        body["missing"]["database"].as_str().unwrap_or_default().to_owned() + &body.to_string()
    };
    wait_until_within(PATIENCE, "it is not ready", || database().contains("assumed to be at fault"));
    assert!(daemon.log().contains("blocked until this is fixed"), "{}", daemon.log());
    let diverted = rejected(&scope).len();
    assert_eq!(diverted, 0, "good records were dead-lettered");
    // AND stays blocked: no further record is dead-lettered
    let tries = || daemon.metric("payment_writer_database_errors_total", "sqlstate_class=\"23\"");
    let before = tries();
    wait_until_within(PATIENCE, "it tries again", || tries() >= before + 2.0);
    assert_eq!(rejected(&scope).len(), diverted);

    // WHEN the cause is fixed
    scope.execute("ALTER TABLE payment_writer.payment_core DROP CONSTRAINT nothing");

    // THEN the daemon continues by itself
    daemon.wait_until_ready();
    drop(flow.end());
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = Check::of(&scope).holds();
    assert_eq!(outcomes.dead_letters, diverted);
}

#[test]
fn a_batch_of_which_more_than_a_tenth_is_rejected_blocks_and_one_with_less_does_not() {
    let scope = Scope::new(Servers::shared(), "a_tenth");
    scope.prepare(1, 1);
    scope.execute("ALTER TABLE payment_writer.payment_core ADD CONSTRAINT lucky CHECK (cust_id <> 13)");
    let records = |from: u64, good: u64, bad: u64| -> Vec<Message> {
        (from..from + good + bad)
            .map(|n| payment(n, if n < from + bad { 13 } else { 5 }, "1.00", "c"))
            .collect()
    };
    let member = member().with("LANES", "1").with("BATCH__LINGER", "2s");

    // WHEN one in ten is rejected, THEN those are dead-lettered
    scope.produce(&scope.input_topic, records(1_000, 180, 20));
    member.catch_up(&scope);
    scope.assert_exactly_once();
    assert_eq!(rejected(&scope).len(), 20);

    // WHEN one more is, THEN nothing is written and nothing is dead-lettered
    scope.produce(&scope.input_topic, records(2_000, 180, 21));
    let mut daemon = member.start(&scope);
    wait_until_within(PATIENCE, "it blocks", || daemon.log().contains("assumed to be at fault"));
    assert_eq!((scope.count("payment_core"), rejected(&scope).len()), (180, 20));

    // WHEN the constraint is dropped, THEN all of them are written
    scope.execute("ALTER TABLE payment_writer.payment_core DROP CONSTRAINT lucky");
    scope.drains_exactly_once([&mut daemon]);
    assert_eq!((scope.count("payment_core"), rejected(&scope).len()), (381, 20));
}
