//! `reconcile` accepts a correct state, also beside a running daemon, and reports each difference by
//! partition and offset.

use std::collections::BTreeSet;

use rdkafka::admin::AdminOptions;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::input::{configure_topic, leave_open};
use crate::support::{
    AT_MS, Check, Finished, Flow, Load, Member, Message, PATIENCE, Payment, Scope, Servers, block_on,
    uuid_v4, wait_until_within,
};

fn member() -> Member {
    Member::new("a").soon_forgotten()
}

/// Runs it, and returns its output as JSON.
#[track_caller]
pub fn reconcile_with(
    scope: &Scope<'_>,
    arguments: &[&str],
    settings: &[(&str, &str)],
) -> (Option<i32>, Value) {
    let Finished { code, stdout, stderr } =
        scope.command_with(&[&["reconcile", "--json"], arguments].concat(), settings);
    let said = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("no JSON: {stdout}{stderr}"));
    (code, said)
}

#[track_caller]
pub fn is_fine(scope: &Scope<'_>, arguments: &[&str]) -> Value {
    let (code, said) = reconcile_with(scope, arguments, &[]);
    assert_eq!((code, &said["findings"]["count"]), (Some(0), &json!(0)), "{said:#}");
    said
}

/// The findings, as `partition/offset: what`.
#[track_caller]
fn findings_with(scope: &Scope<'_>, settings: &[(&str, &str)]) -> Vec<String> {
    let (code, said) = reconcile_with(scope, &[], settings);
    assert_eq!(code, Some(1), "{said:#}");
    texts(&said["findings"])
}

pub fn texts(findings: &Value) -> Vec<String> {
    let text = |f: &Value| format!("{}/{}: {}", f["partition"], f["offset"], f["what"].as_str().unwrap());
    findings["named"].as_array().unwrap().iter().map(text).collect()
}

fn payment(seed: u64, account: i64) -> Payment {
    Payment::new(uuid_v4(seed), account)
}

/// Records of every outcome, written and published.
fn settled(name: &str) -> Scope<'static> {
    let scope = Scope::new(Servers::shared(), name);
    scope.prepare(3, 2);
    let noted = payment(1, 5).more(r#","comment":"zażółć","externalRefId":"r-1""#);
    let records = vec![
        noted.message(),
        payment(2, 6).status(0).message(),
        noted.message(),
        noted.clone().amount("10.51").message(),
        Message::new("5", "{}"),
        payment(3, 7).message().header("correlation-id", "c-1"),
    ];
    for (record, partition) in records.into_iter().zip([0, 0, 0, 0, 0, 1]) {
        scope.produce(&scope.input_topic, [record.partition(partition)]);
    }
    member().catch_up(&scope);
    scope
}

#[test]
fn a_healthy_system_has_no_findings_with_any_memory_and_exact_sums() {
    // GIVEN records of all outcomes, ids on several partitions, and amounts of every size
    let scope = Scope::new(Servers::shared(), "reconcile_fine");
    scope.prepare(4, 3);
    scope.spread(Load::new(71).take(400), &[0, 1, 2]);
    member().catch_up(&scope);
    let outcomes = scope.assert_exactly_once();
    let large = [
        ("CLF", "99999999999999.9999"),
        ("CLF", "0.0001"),
        ("KWD", "99999999999999.999"),
        ("KWD", "0.001"),
        ("KWD", "0.001"),
        ("JPY", "99999999999999"),
        ("JPY", "1"),
    ];
    let payments = large.iter().zip(1_000..).map(|((currency, amount), seed)| {
        payment(seed, 90).currency(currency).amount(amount).message().partition(3)
    });
    scope.produce(&scope.input_topic, payments);
    // One whose dead letter omits the value, and one without a key.
    scope.produce(&scope.input_topic, [Message::new("1", "x".repeat(600 * 1024)).partition(3)]);
    let keyless = Message { key: None, ..payment(2_000, 90).message() };
    scope.produce_in_transaction(&scope.input_topic, [keyless.clone().partition(3)], false);
    scope.produce_in_transaction(&scope.input_topic, [keyless.partition(3)], true);
    member().catch_up(&scope);

    // WHEN it is compared
    let said = is_fine(&scope, &[]);

    // THEN every record is counted, as an independent check counts them
    let count = |outcome: &str| {
        let outcomes = said["outcomes"].as_object().unwrap();
        let counts = outcomes.iter().filter(|(name, _)| name.starts_with(outcome));
        counts.map(|(_, count)| count.as_u64().unwrap()).sum::<u64>() as usize
    };
    assert_eq!(said["records"], 400 + 7 + 2);
    assert_eq!(
        (count("written"), count("duplicate"), count("dead-lettered")),
        (outcomes.written + 7, outcomes.duplicates, outcomes.dead_letters + 2)
    );
    assert_eq!(said["outcomes"]["dead-lettered: too_large"], 1);
    assert_eq!(said["outcomes"]["dead-lettered: key_mismatch"], 1);
    // AND amounts by currency, to the last digit, in all three places
    for (currency, payments, sum) in
        [("CLF", 2, "100000000000000"), ("KWD", 3, "100000000000000.001"), ("JPY", 2, "100000000000000")]
    {
        let expected = json!({ "count": payments, "sum": sum });
        let found = &said["currencies"][currency];
        assert_eq!((&found["log"], &found["rows"], &found["read_events"]), (&expected, &expected, &expected));
    }
    let eur: String = scope.sql(
        "SELECT trim_scale(sum(amount))::text FROM payment_writer.payment_core WHERE currency = 'EUR'",
        &[],
    )[0]
    .get(0);
    assert_eq!(said["currencies"]["EUR"]["log"]["sum"], eur);

    // AND with little memory it takes many passes and prints the same
    let mut in_slices = is_fine(&scope, &["--memory", "4KiB"]);
    assert!(in_slices["slices"].as_u64().unwrap() > 5, "{in_slices:#}");
    in_slices["slices"] = said["slices"].clone();
    assert_eq!(in_slices, said);

    // AND ranges restrict the comparison
    let part = is_fine(&scope, &["--partition", "1", "--from-offset", "10", "--to-offset", "30"]);
    assert_eq!((&part["records"], part["partitions"].as_array().unwrap().len()), (&json!(20), 1));
    let old = is_fine(&scope, &["--partition", "3", "--until", "2025-01-01T00:00:00Z"]);
    let young = is_fine(&scope, &["--partition", "3", "--since", "2025-01-01T00:00:00Z"]);
    assert_eq!((&old["records"], &young["records"]), (&json!(7), &json!(1 + 1)), "{old:#} {young:#}");
    assert_eq!(is_fine(&scope, &["--since", "2090-01-01T00:00:00Z"])["records"], 0);
    let shown = scope.command(&["reconcile"]).succeeds().stdout;
    assert!(shown.contains("everything is correct") && shown.contains("100000000000000.001"), "{shown}");
    for (arguments, words) in [
        (&["--from-offset", "1"][..], "--partition"),
        (&["--partition", "0", "--partition", "1", "--to-offset", "1"], "exactly one --partition"),
        (&["--partition", "9"], "no partition 9"),
        (&["--since", "yesterday"], "2026-03-01T00:00:00Z"),
    ] {
        let refused = scope.command(&[&["reconcile"], arguments].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
}

#[test]
fn beside_a_running_daemon_there_is_no_false_alarm() {
    // GIVEN a running daemon, and a flow of records
    let scope = Scope::new(Servers::shared(), "reconcile_beside");
    scope.prepare(4, 2);
    let mut daemon = member().start(&scope);
    let flow = Flow::start(&scope, Load::new(72), 5);
    wait_until_within(PATIENCE, "payments are written", || scope.count("payment_core") > 100);

    // WHEN it is compared again and again
    let mut compared = Vec::new();
    for memory in ["256MiB", "64KiB", "256MiB", "32KiB"] {
        let said = is_fine(&scope, &["--memory", memory]);
        compared.push(said["records"].as_u64().unwrap());
    }

    // THEN each run finds more records, and nothing wrong
    assert!(compared[0] > 0 && compared.windows(2).all(|w| w[0] <= w[1]), "{compared:?}");
    drop(flow.end());
    scope.wait_until_caught_up();
    daemon.drains();
    let all = is_fine(&scope, &[])["records"].as_u64().unwrap();
    assert_eq!(
        all,
        scope.read_all(&scope.input_topic).len() as u64,
        "all records with an outcome are compared"
    );
}

/// The plans of the statements on payments and claims that auto_explain has logged for these databases.
fn logged_plans(servers: &Servers, databases: &[&str]) -> Vec<String> {
    let log = std::fs::read_to_string(servers.dir().join("data/logs/postgres.log")).unwrap();
    let mut entries: Vec<String> = Vec::new();
    for line in log.lines() {
        match entries.last_mut() {
            Some(entry) if line.starts_with('\t') => entry.push_str(&format!("\n{line}")),
            _ => entries.push(line.to_owned()),
        }
    }
    let is_plan = |entry: &String| {
        let is_ours = databases.iter().any(|name| entry.contains(&format!("@{name} ")));
        is_ours && entry.contains(" plan:") && entry.contains("payment_metadata m")
    };
    entries.into_iter().filter(is_plan).collect()
}

/// Rows that the scans of this table passed on, by analyzed plans.
fn rows_scanned(plans: &[String], table: &str) -> f64 {
    let scan = format!("Scan on {table}_");
    let number = |line: &str, name: &str| {
        let (_, actual) = line.split_once("(actual ").unwrap_or_else(|| panic!("{line}"));
        let (_, rest) = actual.split_once(name).unwrap_or_else(|| panic!("no {name}: {line}"));
        rest.split([' ', ')']).next().unwrap().parse::<f64>().unwrap()
    };
    let lines = plans.iter().flat_map(|plan| plan.lines());
    let scanned = lines.filter(|line| line.contains(&scan) && !line.contains("never executed"));
    scanned.map(|line| number(line, "rows=") * number(line, "loops=")).sum()
}

#[test]
fn no_plan_depends_on_statistics() {
    // GIVEN payments in tables that were never analyzed, as right after the first start or a restore
    let scope = Scope::new(Servers::shared(), "reconcile_plans");
    scope.prepare(2, 1);
    scope.produce(
        &scope.input_topic,
        (0..1_000).map(|seed| payment(seed, 5).message().partition((seed % 2) as i32)),
    );
    member().catch_up(&scope);
    let second = format!("{}_second", scope.database);
    scope.on_server(&[format!("CREATE DATABASE \"{second}\" OWNER payment_writer")]);
    for database in [&scope.database, &second] {
        scope.execute_as_admin(&format!(
            "ALTER DATABASE \"{database}\" SET session_preload_libraries = 'auto_explain';
             ALTER DATABASE \"{database}\" SET auto_explain.log_min_duration = 0"
        ));
    }

    // WHEN its rows are compared with the log, and with a second database
    is_fine(&scope, &["--orphans"]);
    let into = scope.servers.postgres_url(&second);
    scope.command_with(&["rebuild"], &[("PAYMENT_WRITER_REBUILD_INTO", &into)]).succeeds();

    // THEN no row of one table is looked up by reading another table again
    let plans = logged_plans(scope.servers, &[&scope.database, &second]);
    assert!(plans.len() >= 5, "{plans:#?}");
    let nested: Vec<&String> = plans.iter().filter(|plan| plan.contains("Nested Loop")).collect();
    assert!(nested.is_empty(), "{nested:#?}");
}

#[test]
fn a_slice_joins_its_own_rows_and_no_others() {
    // GIVEN payments of three hours
    let scope = Scope::new(Servers::shared(), "reconcile_slices");
    scope.prepare(2, 1);
    let began_ms = jiff::Timestamp::now().as_millisecond() - 1_000 * 10_000;
    let payments = (0..1_000).map(|seed| {
        let noted = payment(seed, 5).more(r#","comment":"noted""#).message();
        noted.partition((seed % 2) as i32).timestamp_ms(began_ms + i64::try_from(seed).unwrap() * 10_000)
    });
    scope.produce(&scope.input_topic, payments);
    member().catch_up(&scope);
    scope.execute_as_admin(&format!(
        "ALTER DATABASE \"{0}\" SET session_preload_libraries = 'auto_explain';
         ALTER DATABASE \"{0}\" SET auto_explain.log_analyze = on;
         ALTER DATABASE \"{0}\" SET auto_explain.log_min_duration = 0",
        scope.database
    ));

    // WHEN they are compared in slices
    let slices = is_fine(&scope, &["--memory", "16KiB"])["slices"].as_u64().unwrap();
    assert!(slices > 3, "{slices}");

    // THEN the rows of core and notes that are hashed or sorted are those of the slice
    let plans = logged_plans(scope.servers, &[&scope.database]);
    for table in ["payment_core", "payment_notes"] {
        let scanned = rows_scanned(&plans, table);
        assert!(
            (1_000.0..1_000.0 + 10.0 * slices as f64).contains(&scanned),
            "{table}: {scanned} {plans:#?}"
        );
    }
}

#[test]
fn each_change_to_the_tables_is_reported_by_partition_and_offset() {
    let scope = settled("reconcile_rows");
    is_fine(&scope, &[]);
    let join = "(SELECT payment_id FROM payment_metadata WHERE source_offset = 1)";
    for (harm, expected) in [
        (format!("DELETE FROM payment_core WHERE payment_id IN {join}"), vec!["0/1: no row in payment_core"]),
        (
            "INSERT INTO payment_metadata SELECT * FROM payment_metadata WHERE source_offset = 1".to_owned(),
            vec!["0/1: its rows exist more than once (2 in a join of the tables)"],
        ),
        (
            format!("INSERT INTO payment_core SELECT * FROM payment_core WHERE payment_id IN {join}"),
            vec!["0/1: its rows exist more than once (2 in a join of the tables)"],
        ),
        (
            format!("UPDATE payment_core SET amount = amount + 0.000001 WHERE payment_id IN {join}"),
            vec!["0/1: its row in payment_core is not what the record says"],
        ),
        (
            format!("UPDATE payment_core SET type = 'VSA' WHERE payment_id IN {join}"),
            vec!["0/1: its row in payment_core is not what the record says"],
        ),
        (
            "UPDATE payment_metadata SET version = 2 WHERE source_partition = 1".to_owned(),
            vec!["1/0: its row in payment_metadata is not what the record says"],
        ),
        ("DELETE FROM payment_notes".to_owned(), vec!["0/0: no row in payment_notes"]),
        (
            "UPDATE payment_notes SET comment = comment || ' '".to_owned(),
            vec!["0/0: its row in payment_notes is not what the record says"],
        ),
        // A claim without rows.
        (
            "DELETE FROM payment_metadata WHERE source_partition = 1".to_owned(),
            vec!["1/0: no row in payment_metadata"],
        ),
        (
            "UPDATE idempotency SET payload_hash = payload_hash + 1 WHERE source_partition = 1".to_owned(),
            vec!["1/0: its row in idempotency is not what the record says"],
        ),
        (
            "DELETE FROM idempotency WHERE source_partition = 1".to_owned(),
            vec!["1/0: written, but its message id is not in idempotency"],
        ),
        // Rows of an invalid record, and of one that was dead-lettered.
        (
            "UPDATE payment_metadata SET source_offset = 4 WHERE source_offset = 1".to_owned(),
            vec![
                "0/1: no row in payment_metadata",
                "0/4: a row in payment_core, though it should be dead-lettered: missing_field",
                "0/4: a row in payment_metadata, though it should be dead-lettered: missing_field",
            ],
        ),
    ] {
        let tables = ["payment_core", "payment_metadata", "payment_notes", "idempotency_g1"];
        let each = |f: &dyn Fn(&str) -> String| tables.map(f).concat();
        scope.execute(&each(&|t| format!("CREATE TABLE kept_{t} AS TABLE payment_writer.{t};")));
        scope.execute_unguarded(&format!("SET search_path = payment_writer; {harm}"));

        assert_eq!(findings_with(&scope, &[]), expected, "{harm}");

        scope.execute_unguarded(&each(&|t| {
            format!("TRUNCATE payment_writer.{t}; INSERT INTO payment_writer.{t} TABLE kept_{t}; DROP TABLE kept_{t};")
        }));
    }
    is_fine(&scope, &["--orphans"]);

    // AND rows that belong to no record are counted on request
    scope.execute(
        "SET search_path = payment_writer;
         INSERT INTO payment_core SELECT gen_random_uuid(), created_at, cust_id, amount, currency, status, type FROM payment_core;
         INSERT INTO payment_notes SELECT gen_random_uuid(), created_at, 'x', NULL FROM payment_notes;
         INSERT INTO idempotency_g1 VALUES (gen_random_uuid(), 7, 7, now(), 0)",
    );
    is_fine(&scope, &[]);
    let (code, said) = reconcile_with(&scope, &["--orphans"], &[]);
    assert_eq!(code, Some(1));
    assert_eq!(said["orphans"], json!({ "payment_core": 3, "payment_notes": 1, "idempotency": 1 }));
}

#[test]
fn each_change_to_the_outputs_is_reported_by_partition_and_offset() {
    let scope = settled("reconcile_outputs");
    is_fine(&scope, &[]);
    // GIVEN copies of the outputs, each altered in another way
    let copy = |name: &str, topic: &str, harm: &dyn Fn(Vec<Message>) -> Vec<Message>| {
        let copy = format!("{topic}_{name}");
        scope.create_topic(&copy, 2);
        let records = scope.read_all(topic).into_iter().map(|r| Message {
            key: r.key,
            value: r.value,
            headers: r.headers,
            timestamp_ms: None,
            partition: Some(r.partition),
        });
        scope.produce(&copy, harm(records.collect()));
        copy
    };
    let of = |offset: &'static str| {
        move |m: &Message| {
            m.headers.iter().any(|(n, v)| n == "source" && v.as_deref().unwrap().ends_with(offset.as_bytes()))
        }
    };
    let without =
        |offset: &'static str| move |all: Vec<Message>| all.into_iter().filter(|m| !of(offset)(m)).collect();
    let doubled = |offset: &'static str| {
        move |all: Vec<Message>| {
            let again: Vec<Message> = all.iter().filter(|m| of(offset)(m)).cloned().collect();
            [all, again].concat()
        }
    };
    let changed = |offset: &'static str, from: &'static str, to: &'static str| {
        move |mut all: Vec<Message>| {
            for message in all.iter_mut().filter(|m| of(offset)(m)) {
                let text = String::from_utf8(message.value.take().unwrap()).unwrap();
                assert!(text.contains(from), "{text}");
                message.value = Some(text.replace(from, to).into_bytes());
            }
            all
        }
    };
    let relabelled = |offset: &'static str, name: &'static str, value: &'static str| {
        move |mut all: Vec<Message>| {
            for message in all.iter_mut().filter(|m| of(offset)(m)) {
                for header in message.headers.iter_mut().filter(|(n, _)| n == name) {
                    header.1 = Some(value.into());
                }
            }
            all
        }
    };
    let source = scope.source(0, 2);
    let duplicate_source: &'static str = source.leak();
    let (read, email, dead) = (&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic);
    for (setting, topic, expected) in [
        ("READ", copy("without", read, &without("/0/1")), "0/1: no read event"),
        ("READ", copy("twice", read, &doubled("/0/1")), "0/1: its read event is there 2 times"),
        (
            "READ",
            copy("changed", read, &changed("/1/0", "10.5", "10.51")),
            "1/0: its read event is not what the record says",
        ),
        (
            "READ",
            copy("moved", read, &relabelled("/0/1", "source", duplicate_source)),
            "0/1: no read event; 0/2: a read event, though it should be duplicate",
        ),
        ("EMAIL", copy("without", email, &without("/1/0")), "1/0: no e-mail event"),
        ("EMAIL", copy("twice", email, &doubled("/1/0")), "1/0: its e-mail event is there 2 times"),
        ("DEAD_LETTER", copy("without", dead, &without("/0/4")), "0/4: no dead letter"),
        ("DEAD_LETTER", copy("twice", dead, &doubled("/0/3")), "0/3: its dead letter is there 2 times"),
        (
            "DEAD_LETTER",
            copy("reason", dead, &relabelled("/0/4", "dlq-reason", "invalid_field")),
            "0/4: dead-lettered as invalid_field, not as missing_field",
        ),
        (
            "DEAD_LETTER",
            copy("changed", dead, &changed("/0/3", "10.51", "10.52")),
            "0/3: its dead letter is not what the record says",
        ),
    ] {
        // WHEN that copy is configured as the output
        let setting = format!("PAYMENT_WRITER__KAFKA__{setting}_TOPIC");
        let found = findings_with(&scope, &[(&setting, &topic)]);
        // THEN exactly that is found
        assert_eq!(found.join("; "), expected, "{topic}");
    }

    // WHEN an event is sent again by hand, another names a record that does not exist, and some are from
    // others
    let event = scope.read_all(read).into_iter().find(|r| r.header("source").ends_with("/1/0")).unwrap();
    let again = |source: &str| Message::new("7", event.value.clone().unwrap()).header("source", source);
    let topic_id = scope.topic_id_text();
    scope.produce(
        read,
        [
            again(&format!("{topic_id}/1/0")),
            again("00000000/1/0"),
            again("?"),
            again(&format!("{topic_id}/1/700")),
        ],
    );

    // THEN events beyond the cursors, or from others, are no finding
    let (_, said) = reconcile_with(&scope, &[], &[]);
    assert_eq!(texts(&said["findings"]), ["1/0: its read event is there 2 times"]);
    assert_eq!(said["outputs"]["foreign"], 2);
    let shown = scope.command(&["reconcile", "--limit", "0"]);
    assert!(
        shown.stdout.contains("and 1 more") && shown.stderr.contains("findings: 1, in 6 records"),
        "{shown:?}"
    );
}

#[test]
fn data_removed_for_a_known_reason_is_no_finding() {
    // GIVEN records that an operator skipped, behind and before others
    let scope = settled("reconcile_reasons");
    scope.spread(Load::new(73).take(30), &[0, 1, 2]);
    scope.move_group_offset(2, 6, "");
    let skip = ["cursors", "skip", "--partition", "2", "--to", "6", "--apply", "--reason", "a test"];
    scope.command(&skip).succeeds();
    member().catch_up(&scope);
    let said = is_fine(&scope, &[]);
    assert_eq!(said["outcomes"]["given up"], 6, "{said:#}");
    assert_eq!(Check::of(&scope).given_up(2, 0..6).holds().given_up, 6);

    // WHEN the log of a partition was truncated, its offsets were used again, and the operator resolved that
    let topic = scope.topic_id_text();
    scope.execute(&format!(
        "SET search_path = payment_writer;
         INSERT INTO cursor_audit (command, topic, topic_id, partition, before, after)
         SELECT 'cursors skip --to 3', topic, topic_id, 1, '{{\"applied\":5,\"published\":5}}', '{{\"applied\":3}}'
             FROM bound_group;
         INSERT INTO payment_metadata VALUES
             ('{0}', now(), now(), 1, '{0}', 1, 3), ('{0}', now(), now(), 1, '{0}', 1, 2);
         INSERT INTO payment_core VALUES ('{0}', now(), 1, 1, 'EUR', 2, 'BWI');",
        uuid_v4(700)
    ));
    let event = Message::new("1", "{}").header("source", format!("{topic}/1/4"));
    scope.produce(&scope.read_topic, [event]);
    // THEN rows and events of the lost records are counted in that range; anywhere else they are findings
    let (_, said) = reconcile_with(&scope, &[], &[]);
    assert_eq!(said["of_lost_records"], 2, "{said:#}");
    let places = texts(&said["findings"]);
    assert!(!places.is_empty() && places.iter().all(|text| text.starts_with("1/2: ")), "{places:?}");
    scope.execute("DELETE FROM payment_writer.payment_metadata WHERE source_partition = 1 AND source_offset = 2 AND version = 1
         AND payment_id = message_id");
    is_fine(&scope, &[]);

    // WHEN claims were pruned with their generation
    scope.execute_unguarded(
        "INSERT INTO payment_writer.idempotency_generation (generation, leaf, state, youngest_record)
         VALUES (99, 'gone', 'dropped', '2024-03-01'); DELETE FROM payment_writer.idempotency",
    );
    // THEN the rows show what was written, but only for records that are old enough
    let (_, said) = reconcile_with(&scope, &[], &[]);
    let old: BTreeSet<String> = ["0/0", "0/1", "0/2", "0/3", "1/0"].map(str::to_owned).into();
    let named: BTreeSet<String> =
        texts(&said["findings"]).iter().map(|t| t.split(':').next().unwrap().to_owned()).collect();
    assert!(named.is_disjoint(&old) && !named.is_empty(), "{said:#}");
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET youngest_record = now() WHERE generation = 99",
    );
    is_fine(&scope, &[]);

    // WHEN retention removes the start of the read topic
    let mut list = TopicPartitionList::new();
    for partition in [0, 1] {
        list.add_partition_offset(&scope.read_topic, partition, Offset::End).unwrap();
    }
    block_on(scope.admin().delete_records(&list, &AdminOptions::new())).unwrap();
    // THEN the removed events cannot be checked, and the output says so
    let said = is_fine(&scope, &[]);
    assert_eq!(said["outputs"]["read"], 0);
    assert!(said["outputs"]["beyond_retention"].as_u64().unwrap() > 0, "{said:#}");
    // AND the later events are still compared
    scope.produce(&scope.input_topic, [payment(400, 5).message().partition(0)]);
    member().catch_up(&scope);
    assert_eq!(is_fine(&scope, &[])["outputs"]["read"], 1);

    // WHEN the oldest event that is left in a partition is older than the records
    let event = scope.read_all(&scope.read_topic).pop().unwrap();
    block_on(scope.admin().delete_records(&list, &AdminOptions::new())).unwrap();
    let oldest = Message {
        key: event.key,
        value: event.value,
        headers: event.headers,
        timestamp_ms: Some(AT_MS - 5_000_000),
        partition: Some(event.partition),
    };
    scope.produce(&scope.read_topic, [oldest]);
    // THEN retention has not removed their events
    let missing = findings_with(&scope, &[]);
    assert!(!missing.is_empty() && missing.iter().all(|text| text.ends_with("no read event")), "{missing:?}");
}

/// What was not compared, as `partition/from-to: why`, with `!` where that may hide a loss.
pub fn not_compared(said: &Value) -> Vec<String> {
    let text = |part: &Value| {
        let mark = if part["may_hide_loss"] == true { "!" } else { "" };
        let why = part["why"].as_str().unwrap();
        match part["partition"].is_null() {
            true => format!("{mark}{why}"),
            false => format!("{mark}{}/{}-{}: {why}", part["partition"], part["from"], part["to"]),
        }
    };
    let mut parts: Vec<String> = said["not_compared"].as_array().unwrap().iter().map(text).collect();
    parts.sort();
    parts
}

/// Payments on this partition.
fn payments(seeds: std::ops::Range<u64>, partition: i32) -> Vec<Message> {
    seeds.map(|seed| payment(seed, 5).message().partition(partition)).collect()
}

#[test]
fn records_behind_an_open_transaction_are_named() {
    // GIVEN a transaction that a producer left open, records behind it, and a large aborted one
    let scope = Scope::new(Servers::shared(), "reconcile_open");
    scope.prepare(2, 1);
    scope.produce_in_transaction(&scope.input_topic, payments(1_000..2_100, 0), false);
    scope.produce(&scope.input_topic, payments(0..5, 1));
    let _producer = leave_open(&scope, &scope.input_topic, 1);
    scope.produce(&scope.input_topic, payments(5..30, 1));
    member().catch_up(&scope);

    // THEN what is behind the open transaction is named, and nothing else
    let said = is_fine(&scope, &[]);
    assert_eq!(not_compared(&said), ["1/5-31: behind an open transaction"]);
    let shown = scope.command(&["reconcile"]).succeeds().stdout;
    let line = "not compared: behind an open transaction; partition 1 from 5 to before 31";
    assert!(shown.contains(line), "{shown}");
    assert_eq!(not_compared(&is_fine(&scope, &["--partition", "0"])), [""; 0]);

    // WHEN the cursors are beyond it
    scope.execute("UPDATE payment_writer.source_cursor SET applied = 31, published = 31 WHERE partition = 1");
    // THEN a loss may be hidden there
    let (code, said) = reconcile_with(&scope, &[], &[]);
    assert_eq!(code, Some(1), "{said:#}");
    let expected = "!1/5-31: before the cursors, but beyond what can be read of the log";
    assert_eq!(not_compared(&said), [expected]);
    let shown = scope.command(&["reconcile"]);
    assert!(shown.stdout.contains("NOT COMPARED") && shown.stderr.contains("hidden: 1"), "{shown:?}");
    assert!(!shown.stdout.contains("is correct"), "{shown:?}");
}

#[test]
fn records_that_left_the_log_and_partitions_without_a_cursor_are_named() {
    let scope = Scope::new(Servers::shared(), "reconcile_gone");
    scope.prepare(3, 1);
    for partition in 0..3 {
        let from = 10 * partition as u64;
        scope.produce(&scope.input_topic, payments(from..from + 10, partition));
    }
    member().catch_up(&scope);
    assert_eq!(not_compared(&is_fine(&scope, &[])), [""; 0]);

    // WHEN retention removes records while they are compared
    let stopped = [("PAYMENT_WRITER_FAILPOINT", "before_slice:1:stop")];
    let mut command = scope.daemon_with(&["reconcile", "--json"], &stopped);
    wait_until_within(PATIENCE, "it is about to read the log", || command.is_stopped());
    scope.delete_records(0, 4);
    command.signal("CONT");
    assert_eq!(command.wait().code(), Some(0), "{}", command.log());
    let log = command.log();
    let said = log.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{log}"));
    let said: Value = serde_json::from_str(said).unwrap();
    // THEN they are named, then and later
    assert_eq!(not_compared(&said), ["0/0-4: left the log during the comparison"]);
    assert_eq!((&said["records"], &said["findings"]["count"]), (&json!(26), &json!(0)));
    assert_eq!(not_compared(&is_fine(&scope, &[])), ["0/0-4: no longer in the log"]);
    assert_eq!(not_compared(&is_fine(&scope, &["--partition", "0", "--from-offset", "5"])), [""; 0]);

    // WHEN records are not written yet
    scope.produce(&scope.input_topic, payments(40..45, 1));
    let part = ["--partition", "1"];
    assert_eq!(not_compared(&is_fine(&scope, &part)), ["1/10-15: not written and published yet"]);
    // AND are removed before they are, or the cursor of a partition is lost
    scope.delete_records(1, 12);
    scope.execute("DELETE FROM payment_writer.source_cursor WHERE partition = 2");
    // THEN a loss may be hidden there
    let (code, said) = reconcile_with(&scope, &[], &[]);
    assert_eq!(code, Some(1), "{said:#}");
    assert_eq!(
        not_compared(&said),
        [
            "!1/10-12: left the log before they were written and published",
            "!1/12-15: halted: log_gap",
            "!2/0-10: the group has an offset, but the database has no cursor",
            "0/0-4: no longer in the log",
            "1/0-10: no longer in the log",
        ]
    );
}

#[test]
fn compacted_topics_are_named() {
    let scope = settled("reconcile_compacted");
    for topic in [&scope.input_topic, &scope.dead_letter_topic] {
        configure_topic(&scope, topic, &[("cleanup.policy", "compact")]);
        let (code, said) = reconcile_with(&scope, &[], &[]);
        assert_eq!((code, &said["findings"]["count"]), (Some(1), &json!(0)), "{said:#}");
        let named = not_compared(&said);
        assert_eq!(named.len(), 1);
        assert!(named[0].starts_with(&format!("!{topic} has cleanup.policy=compact")), "{named:?}");
        configure_topic(&scope, topic, &[("cleanup.policy", "delete")]);
    }
    is_fine(&scope, &[]);
}

#[test]
#[ignore = "waits for the log cleaner; `make trials`"]
fn trials_offsets_that_compaction_removed_are_named() {
    // GIVEN records with one key
    let scope = Scope::new(Servers::shared(), "reconcile_cleaned");
    scope.prepare(1, 1);
    scope.produce(&scope.input_topic, payments(0..2_000, 0));
    member().catch_up(&scope);
    // WHEN the topic is compacted for a while
    let compact = [
        ("cleanup.policy", "compact"),
        ("segment.ms", "100"),
        ("min.cleanable.dirty.ratio", "0.001"),
        ("max.compaction.lag.ms", "1"),
    ];
    configure_topic(&scope, &scope.input_topic, &compact);
    scope.produce(&scope.input_topic, payments(2_000..2_001, 0));
    wait_until_within(2 * PATIENCE, "records are removed", || {
        scope.produce(&scope.input_topic, [Message::new("6", "x")]);
        scope.read_all(&scope.input_topic).iter().filter(|record| record.offset < 2_000).count() < 10
    });
    configure_topic(&scope, &scope.input_topic, &[("cleanup.policy", "delete")]);
    member().catch_up(&scope);
    // THEN the gap is named, also if no slice is as long as the gap
    for memory in ["256MiB", "32KiB"] {
        let (code, said) = reconcile_with(&scope, &["--memory", memory], &[]);
        assert_eq!(code, Some(1), "{said:#}");
        let named = not_compared(&said);
        assert!(named[0].contains("without a record, removed by compaction or lost"), "{named:?}");
    }
}

#[test]
fn a_dead_letter_without_its_long_key_is_recognized() {
    let scope = Scope::new(Servers::shared(), "reconcile_long_key");
    scope.prepare(2, 3);
    let long = |partition| Message::new(vec![b'k'; 70 * 1024], "{}").partition(partition);
    scope.produce(&scope.input_topic, [long(0), long(1)]);
    member().catch_up(&scope);
    assert_eq!(is_fine(&scope, &[])["outputs"]["dead_letter"], 2);
}

#[test]
fn a_lost_record_is_no_duplicate_of_a_later_one_and_a_row_in_another_month_is_found() {
    // GIVEN a lost payment, whose id a later record has, and claims that were pruned
    let scope = Scope::new(Servers::shared(), "reconcile_later");
    scope.prepare(2, 1);
    let rows_only = [("PAYMENT_WRITER__KAFKA__PUBLISH", "false")];
    let catch_up = || drop(member().with("KAFKA__PUBLISH", "false").catch_up(&scope));
    scope.produce(&scope.input_topic, payments(0..3, 0));
    catch_up();
    scope.execute_unguarded(
        "SET search_path = payment_writer;
         DELETE FROM payment_core USING payment_metadata m
             WHERE m.payment_id = payment_core.payment_id AND source_offset = 1;
         DELETE FROM payment_metadata WHERE source_offset = 1;
         DELETE FROM idempotency WHERE source_offset = 1",
    );
    // And a duplicate of a record of another partition, whose claim was pruned.
    scope.produce(&scope.input_topic, payments(1..2, 0));
    scope.produce(&scope.input_topic, payments(2..3, 1));
    catch_up();
    scope.execute_unguarded(
        "SET search_path = payment_writer;
         INSERT INTO idempotency_generation (generation, leaf, state, youngest_record)
             VALUES (99, 'gone', 'dropped', now() + interval '1 day');
         DELETE FROM idempotency",
    );
    // THEN it is lost
    let (code, said) = reconcile_with(&scope, &[], &rows_only);
    let lost = "0/1: lost: it is valid, its id is not claimed, and it has no outcome";
    assert_eq!((code, texts(&said["findings"])), (Some(1), vec![lost.to_owned()]), "{said:#}");
    assert_eq!(said["outcomes"]["duplicate"], 1);

    // WHEN a row was written again, in another month
    scope.execute(
        "SET search_path = payment_writer;
         INSERT INTO payment_metadata
             SELECT payment_id, created_at - interval '70 days', updated_at, version, message_id,
                 source_partition, source_offset
             FROM payment_metadata WHERE source_partition = 0 AND source_offset = 2",
    );
    // THEN it is found when all months are read
    let (_, said) = reconcile_with(&scope, &["--orphans"], &rows_only);
    let other = "0/2: a row in payment_metadata, in a month that is not its own";
    assert_eq!(texts(&said["findings"]), [lost, other]);
    assert_eq!(said["orphans"], json!({ "payment_core": 0, "payment_notes": 0, "idempotency": 0 }));
}

#[test]
fn a_database_of_another_group_is_not_compared() {
    let scope = settled("reconcile_strangers");
    let group = format!("{}_other", scope.group_id);
    let refused = scope.command_with(&["reconcile"], &[("PAYMENT_WRITER__KAFKA__GROUP_ID", &group)]);
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(refused.stderr.contains("bound to group"), "{refused:?}");
    // Rows without events, by a group of its own: the outputs are not compared.
    let rows_only = Scope::new(Servers::shared(), "reconcile_rows_only");
    rows_only.create_topic(&rows_only.input_topic, 2);
    rows_only.command(&["migrate"]).succeeds();
    rows_only.produce(&rows_only.input_topic, Load::new(74).take(60));
    let publish = [("PAYMENT_WRITER__KAFKA__PUBLISH", "false")];
    member().with("KAFKA__PUBLISH", "false").catch_up(&rows_only);
    let (code, said) = reconcile_with(&rows_only, &[], &publish);
    assert_eq!((code, &said["records"]), (Some(0), &json!(60)), "{said:#}");
}

#[test]
fn after_each_recovery_there_are_no_findings() {
    // GIVEN a backup from the middle of the history
    let mut scope = Scope::new(Servers::shared(), "reconcile_recoveries");
    scope.prepare(3, 2);
    let mut load = Load::new(75);
    scope.produce(&scope.input_topic, load.take(80));
    member().catch_up(&scope);
    scope.back_up_database();
    scope.produce(&scope.input_topic, load.take(80));
    member().catch_up(&scope);
    assert_eq!(is_fine(&scope, &[])["records"], 160);

    // WHEN it is restored
    scope.restore_database();
    // THEN it is correct up to the backup's cursors, and entirely once the rows are written again
    assert_eq!(is_fine(&scope, &[])["records"], 80);
    member().catch_up(&scope);
    assert_eq!(is_fine(&scope, &[])["records"], 160);

    // WHEN the group's offsets are lost after a clean stop
    scope.delete_group_when_empty();
    scope.produce(&scope.input_topic, load.take(20));
    // THEN the database's copy of them is used
    assert_eq!(is_fine(&scope, &[])["records"], 160);
    member().catch_up(&scope);
    assert_eq!(is_fine(&scope, &["--orphans"])["records"], 180);

    // WHEN an empty database replaces the old one
    scope.recreate_database();
    scope.command(&["migrate"]).succeeds();
    // THEN it is not compared until it is the group's database
    let refused = scope.command(&["reconcile"]);
    assert_eq!((refused.code, refused.stderr.contains("--adopt-database")), (Some(3), true), "{refused:?}");
    let mut adopting = member().run(&scope, &["run", "--until-caught-up", "--adopt-database"]);
    assert_eq!(adopting.wait().code(), Some(0), "{}", adopting.log());
    assert_eq!(is_fine(&scope, &["--orphans"])["records"], 180);

    // WHEN the topic is created again, and a new group starts with a new database
    scope.delete_topic(&scope.input_topic);
    wait_until_within(PATIENCE, "the topic is created again", || {
        std::panic::catch_unwind(|| scope.create_topic(&scope.input_topic, 3)).is_ok()
    });
    assert_eq!(scope.command(&["reconcile"]).code, Some(3));
    let sent = scope.read_all(&scope.read_topic).len();
    scope.group_id = format!("{}_new", scope.group_id);
    scope.recreate_database();
    scope.command(&["migrate"]).succeeds();
    scope.produce(&scope.input_topic, load.take(30));
    member().catch_up(&scope);
    // THEN its records are correct, and the old events belong to another topic
    let said = is_fine(&scope, &["--orphans"]);
    assert_eq!(said["records"], 30);
    assert!(said["outputs"]["foreign"].as_u64().unwrap() as usize >= sent, "{said:#}");
}
