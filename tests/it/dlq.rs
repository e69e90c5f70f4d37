//! Dead letters: counted, shown without their contents, and replayed exactly once, even if processes are
//! killed.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use rdkafka::admin::AdminOptions;
use serde_json::Value;

use crate::support::{
    Daemon, Finished, Flow, Load, Member, Message, Payment, Received, Scope, Servers, block_on, uuid_v4,
    uuid_v7, wait_until,
};

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
const APPLY: [&str; 3] = ["--apply", "--note", "a test"];

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}

#[track_caller]
fn says(finished: &Finished, code: i32, text: &str) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    assert!(finished.stdout.contains(text) || finished.stderr.contains(text), "no {text:?}: {finished:?}");
}

fn replay(scope: &Scope<'_>, arguments: &[&str]) -> Finished {
    scope.command(&[&["dlq", "replay"], arguments].concat())
}

/// Replays, and returns how many were sent, had been sent before, and were rejected.
#[track_caller]
fn applied(scope: &Scope<'_>, arguments: &[&str]) -> (i64, i64, i64) {
    let told = json(&replay(scope, &[arguments, &APPLY, &["--json"]].concat()).succeeds());
    assert_eq!((&told["dry_run"], &told["interrupted"]), (&false.into(), &false.into()), "{told}");
    counts(&told)
}

fn counts(told: &Value) -> (i64, i64, i64) {
    let number = |name: &str| told[name].as_i64().unwrap();
    let refused = told["refused"].as_object().unwrap().values().map(|n| n.as_i64().unwrap()).sum();
    (number("replayed"), number("already_replayed"), refused)
}

/// A dead letter as the daemon writes it, written without a daemon. `n` makes it distinct.
fn letter(scope: &Scope<'_>, n: u64, timestamp_ms: i64) -> Message {
    let message = Message::new("7", Payment::new(uuid_v4(n), 7).kind("NEW").json());
    [
        ("n", n.to_string()),
        ("dlq-reason", "invalid_field".to_owned()),
        ("dlq-detail", "type: not one of payment.types".to_owned()),
        ("dlq-topic", scope.input_topic.clone()),
        ("dlq-partition", "0".to_owned()),
        ("dlq-offset", n.to_string()),
        ("dlq-timestamp", timestamp_ms.to_string()),
        ("source", format!("00000000/0/{n}")),
    ]
    .into_iter()
    .fold(message, |message, (name, value)| message.header(name, value))
}

/// Topics, schema, and this many dead letters from `first` on, over two partitions.
fn with_letters(name: &str, numbers: std::ops::Range<u64>) -> Scope<'static> {
    let scope = Scope::ready(name, 2, 2);
    add_letters(&scope, numbers);
    scope
}

fn add_letters(scope: &Scope<'_>, numbers: std::ops::Range<u64>) {
    let letters =
        numbers.map(|n| letter(scope, n, now_ms() - HOUR_MS).partition(i32::try_from(n % 2).unwrap()));
    scope.produce(&scope.dead_letter_topic, letters);
}

/// How often each letter occurs in the input topic.
fn replayed(scope: &Scope<'_>) -> BTreeMap<u64, usize> {
    let mut found = BTreeMap::new();
    for record in scope.read_all(&scope.input_topic) {
        assert_eq!(record.header("dlq-replays"), "1");
        assert!(!record.has_header("dlq-reason") && !record.has_header("source"));
        *found.entry(record.header("n").parse().unwrap()).or_default() += 1;
    }
    found
}

#[track_caller]
fn assert_each_once(scope: &Scope<'_>, numbers: std::ops::Range<u64>) {
    let found = replayed(scope);
    let wrong: Vec<_> =
        numbers.clone().filter(|n| found.get(n) != Some(&1)).map(|n| (n, found.get(&n))).collect();
    assert!(wrong.is_empty(), "not exactly once in the topic, of {numbers:?}: {wrong:?}");
    assert_eq!(found.len() as u64, numbers.end - numbers.start, "unexpected letters: {found:?}");
}

/// A run that stops itself at a failpoint, like a process that hangs.
fn stopped_at(scope: &Scope<'_>, failpoint: &str, arguments: &[&str]) -> Daemon {
    let failpoint = format!("{failpoint}:stop");
    let run = scope.daemon_with(
        &[&["dlq", "replay"], arguments, &APPLY].concat(),
        &[("PAYMENT_WRITER_FAILPOINT", &failpoint)],
    );
    wait_until("the run hangs", || run.is_stopped());
    run
}

#[track_caller]
fn dies_at(scope: &Scope<'_>, failpoint: &str, arguments: &[&str]) {
    let arguments = [&["dlq", "replay"], arguments, &APPLY].concat();
    let finished = scope.command_with(&arguments, &[("PAYMENT_WRITER_FAILPOINT", failpoint)]);
    assert_eq!(finished.code, None, "{failpoint} was not reached: {finished:?}");
}

fn delete_replay_group(scope: &Scope<'_>) {
    let group = format!("{}-dlq-replay", scope.group_id);
    for result in block_on(scope.admin().delete_groups(&[&group], &AdminOptions::new())).unwrap() {
        result.unwrap();
    }
}

#[test]
fn list_counts_by_reason_partition_day_and_replays_and_needs_no_database() {
    // GIVEN records that were dead-lettered for several reasons, from two partitions
    let scope = Scope::ready("dlq_list", 2, 2);
    let secret = Payment::new(uuid_v4(1), 31).kind("SECRET");
    scope.produce(
        &scope.input_topic,
        [
            secret.message().partition(0),
            Message::new("31", "").partition(0),
            Message::new("31", "").partition(1),
            Message::new("31", "").partition(1).header("dlq-replays", "2"),
            Payment::new(uuid_v4(2), 31).message().partition(1),
        ],
    );
    scope.drain();
    let without_database = |arguments: &[&str]| {
        let nowhere = ("PAYMENT_WRITER__POSTGRES__URL", "postgres://nobody@127.0.0.1:1/nothing");
        scope.command_with(arguments, &[nowhere]).succeeds()
    };

    // WHEN they are listed
    let told = json(&without_database(&["dlq", "list", "--json"]));

    // THEN each is counted in every breakdown
    assert_eq!((&told["letters"], &told["topic"]), (&4.into(), &scope.dead_letter_topic.as_str().into()));
    let by = |name: &str, key: &str| -> Vec<(Value, i64)> {
        let groups = told[name].as_array().unwrap();
        groups.iter().map(|g| (g[key].clone(), g["letters"].as_i64().unwrap())).collect()
    };
    assert_eq!(by("by_reason", "reason"), [("empty_value".into(), 3), ("invalid_field".into(), 1)]);
    assert_eq!(by("by_partition", "partition"), [(0.into(), 2), (1.into(), 2)]);
    assert_eq!(by("by_replays", "replays"), [(0.into(), 3), (2.into(), 1)]);
    assert_eq!(by("by_day", "day").iter().map(|(_, letters)| letters).sum::<i64>(), 4);
    assert_eq!((&told["not_dead_letters"], &told["of_other_topics"]), (&0.into(), &0.into()));

    // AND a filter restricts the list
    let letters = scope.read_all(&scope.dead_letter_topic);
    let place = format!("{}/{}", letters[0].partition, letters[0].offset);
    for (arguments, letters) in [
        (&["--reason", "empty_value"][..], 3),
        (&["--reason", "empty_value,invalid_field", "--partition", "0"], 2),
        (&["--reason", "too_large"], 0),
        (&["--since", "1h"], 4),
        (&["--until", "1h"], 0),
        (&["--since", "2100-01-01"], 0),
        (&["--at", &place], 1),
    ] {
        let told = json(&without_database(&[&["dlq", "list", "--json"], arguments].concat()));
        assert_eq!(told["letters"], letters, "{arguments:?}");
    }

    // AND shown one by one, newest first, up to the limit, and never with contents
    let told = json(&without_database(&["dlq", "list", "--each", "--limit", "3", "--json"]));
    let each = told["each"].as_array().unwrap();
    assert_eq!((each.len(), &told["more"]), (3, &1.into()));
    let told = json(&without_database(&["dlq", "list", "--each", "--json", "--reason", "invalid_field"]));
    let each = &told["each"][0];
    assert_eq!((&each["partition"], &each["offset"]), (&0.into(), &0.into()));
    assert_eq!(each["topic"], scope.input_topic.as_str());
    assert!(each["detail"].as_str().unwrap().contains("type"), "{each}");
    let text = without_database(&["dlq", "list", "--each"]);
    assert!(text.stdout.contains("4 dead letters") && text.stdout.contains("empty_value"), "{text:?}");
    assert!(!text.stdout.contains("SECRET"));
    says(&scope.command(&["dlq", "list", "--reason", "no_reason"]), 2, "empty_value");
    says(&scope.command(&["dlq", "list", "--at", "7/0"]), 2, "holds no record at 7/0");
}

#[test]
fn show_prints_the_origin_of_a_letter_and_its_contents_only_on_request() {
    // GIVEN a dead letter that has every field
    let scope = Scope::ready("dlq_show", 1, 1);
    let secret = Payment::new(uuid_v4(1), 31).kind("SECRET").message();
    let value = secret.value.clone().unwrap();
    scope.produce(&scope.input_topic, [secret.header("own-name", "own-value\u{1b}").timestamp_ms(now_ms())]);
    scope.drain();

    // WHEN it is shown
    let text = scope.command(&["dlq", "show", "0/0"]).succeeds();
    let told = json(&scope.command(&["dlq", "show", "0/0", "--json"]).succeeds());

    // THEN the output has its origin and reason, and none of its contents
    assert!(text.stdout.contains("invalid_field"), "{text:?}");
    for hidden in ["SECRET", "own-name", "own-value", "31\n"] {
        assert!(!text.stdout.contains(hidden) && !told.to_string().contains(hidden), "{hidden}: {text:?}");
    }
    assert_eq!((&told["reason"], &told["partition"]), (&"invalid_field".into(), &0.into()));
    assert_eq!((&told["own_headers"], &told["key_bytes"]), (&1.into(), &2.into()));
    assert_eq!(told["value_bytes"], value.len());

    // AND its contents on request, escaped for a terminal or raw
    let text = scope.command(&["dlq", "show", "0/0", "--payload"]).succeeds();
    assert!(text.stdout.contains("SECRET") && text.stdout.contains("own-value\\u{1b}"), "{text:?}");
    let told = json(&scope.command(&["dlq", "show", "0/0", "--payload", "--json"]).succeeds());
    assert_eq!((&told["key"]["text"], &told["headers"][0][0]), (&"31".into(), &"own-name".into()));
    let raw = scope.command(&["dlq", "show", "0/0", "--payload", "--raw"]).succeeds();
    assert_eq!(raw.stdout.as_bytes(), value);
    says(&scope.command(&["dlq", "show", "0/0", "--raw"]), 2, "--payload");
    says(&scope.command(&["dlq", "show", "0/9"]), 2, "holds no record at 0/9");
    // The control record of the letter's transaction takes the next offset.
    says(&scope.command(&["dlq", "show", "0/1"]), 2, "a transaction marker");
}

#[test]
fn a_letter_is_written_when_its_cause_is_fixed_and_it_is_replayed() {
    // GIVEN payments of three days ago with ids that contain a time, dead-lettered for their type
    let scope = Scope::ready("dlq_mended", 2, 2);
    let then = now_ms() - 3 * DAY_MS;
    let payment = |n: u64| Payment::new(uuid_v7(then, n), 30 + n as i64).kind("NEW");
    scope.produce(&scope.input_topic, (0..5).map(|n| payment(n).message().timestamp_ms(then)));
    scope.produce(&scope.input_topic, [Message::new("31", "{}")]);
    scope.drain();
    assert_eq!((scope.read_all(&scope.dead_letter_topic).len(), scope.count("payment_core")), (6, 0));

    // WHEN the type is allowed and they are replayed
    assert_eq!(applied(&scope, &["--reason", "invalid_field"]), (5, 0, 0));
    let mended = [("PAYMENT_WRITER__PAYMENT__TYPES", "BWI,NEW")];
    scope.drain_with(&mended);

    // THEN each is written with its original time: none is stale
    assert_eq!(scope.count("payment_core"), 5);
    let read = scope.read_all(&scope.read_topic);
    assert_eq!(read.len(), 5);
    let created = jiff(then);
    assert!(read.iter().all(|event| event.json()["createdAt"] == created.as_str()));
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 6);

    // AND a second replay sends nothing
    assert_eq!(applied(&scope, &["--reason", "invalid_field"]), (0, 5, 0));
    let told = json(&replay(&scope, &["--all", "--json"]).succeeds());
    assert_eq!((counts(&told), &told["dry_run"]), ((1, 5, 0), &true.into()));
    scope.drain_with(&mended);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 5);

    // AND the operator and the reason are recorded
    let runs = scope.sql(
        "SELECT note, choice, who, finished_at IS NOT NULL, (outcome->>'replayed')::int
         FROM payment_writer.dead_letter_replay_run ORDER BY started_at",
        &[],
    );
    let run = &runs[0];
    assert_eq!((run.get::<_, &str>(0), run.get::<_, &str>(1)), ("a test", "reason invalid_field"));
    assert_eq!(
        (run.get::<_, &str>(2), run.get::<_, bool>(3), run.get::<_, i32>(4)),
        ("payment_writer", true, 5)
    );
}

/// The time format of events.
fn jiff(at_ms: i64) -> String {
    let at = UNIX_EPOCH + std::time::Duration::from_millis(u64::try_from(at_ms).unwrap());
    humantime::format_rfc3339_millis(at).to_string()
}

#[test]
fn a_replayed_record_is_identical_to_the_original() {
    // GIVEN dead letters of records with null, empty and unusual parts
    let scope = Scope::ready("dlq_bytes", 1, 1);
    let at = now_ms() - HOUR_MS;
    let good = Payment::new(uuid_v4(1), 31).message();
    let records = [
        Message { key: None, value: good.value.clone(), ..Message::default() },
        Message { key: Some(Vec::new()), value: good.value.clone(), ..Message::default() },
        Message { key: Some(b"31".to_vec()), value: None, ..Message::default() },
        Message::new("31", "").header("own", "1").header("own", ""),
        Message::new(vec![0xff, 0, 1], vec![0, 0xfe, 0xff]).header("correlation-id", vec![0xff, 0xfe]),
        Message {
            headers: vec![("null".into(), None), ("last".into(), Some(b"2".to_vec()))],
            ..Message::new("31", "{}")
        },
    ];
    scope.produce(&scope.input_topic, records.map(|record| record.timestamp_ms(at)));
    scope.drain();
    let originals = scope.read_all(&scope.input_topic);
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), originals.len());

    // WHEN they are replayed
    assert_eq!(applied(&scope, &["--all"]), (6, 0, 0));

    // THEN key, value, headers and timestamp are unchanged, and the replay is counted
    let all = scope.read_all(&scope.input_topic);
    let (before, after): (Vec<Received>, Vec<Received>) =
        all.into_iter().partition(|record| !record.has_header("dlq-replays"));
    assert_eq!((before, after.len()), (originals.clone(), 6));
    for (original, replayed) in originals.iter().zip(&after) {
        assert_eq!((&replayed.key, &replayed.value), (&original.key, &original.value));
        assert_eq!(replayed.timestamp_ms, Some(at));
        let mut expected = original.headers.clone();
        expected.push(("dlq-replays".to_owned(), Some(b"1".to_vec())));
        assert_eq!(replayed.headers, expected);
    }
}

#[test]
fn a_record_that_stays_invalid_reaches_the_limit_of_replays() {
    // GIVEN a record that stays invalid
    let scope = Scope::ready("dlq_loop", 1, 1);
    scope.produce(&scope.input_topic, [Message::new("31", "{}").timestamp_ms(now_ms())]);
    scope.drain();

    // WHEN it is replayed each time it is dead-lettered again
    for round in 0..2 {
        assert_eq!(applied(&scope, &["--all", "--max-replays", "2"]), (1, round, 0));
        scope.drain();
        let letters = scope.read_all(&scope.dead_letter_topic);
        assert_eq!(letters.last().unwrap().header("dlq-replays"), (round + 1).to_string());
    }

    // THEN replays stop at the limit, and the operator can raise the limit
    let guarded = replay(&scope, &["--all", "--max-replays", "2"]);
    says(&guarded, 0, "too_many_replays");
    assert_eq!(applied(&scope, &["--all", "--max-replays", "2"]), (0, 2, 1));
    assert_eq!(scope.read_all(&scope.input_topic).len(), 3);
    assert_eq!(applied(&scope, &["--all"]), (1, 2, 0));
}

#[test]
fn a_letter_that_could_be_written_twice_is_replayed_only_with_force() {
    // GIVEN letters older than the window, a conflict, and one that is neither
    let scope = Scope::ready("dlq_window", 1, 1);
    let (old, fresh) = (now_ms() - 8 * DAY_MS, now_ms() - HOUR_MS);
    let payment = |n| Payment::new(uuid_v4(n), 31);
    scope.produce(
        &scope.input_topic,
        [
            payment(1).kind("NEW").message().timestamp_ms(old),
            payment(2).kind("NEW").message().timestamp_ms(fresh),
            payment(3).message().timestamp_ms(fresh),
            payment(3).amount("99").message().timestamp_ms(fresh),
        ],
    );
    scope.drain();

    // WHEN all are selected for replay
    let dry = replay(&scope, &["--all"]);

    // THEN those that could be written twice are not sent, and the output says why
    says(&dry, 0, "beyond_window");
    says(&dry, 0, "message_id_conflict");
    assert_eq!(applied(&scope, &["--all"]), (1, 0, 2));
    let sent = |scope: &Scope<'_>| {
        let replays = |record: &Received| record.has_header("dlq-replays");
        scope.read_all(&scope.input_topic).into_iter().filter(replays).collect::<Vec<_>>()
    };
    assert_eq!(sent(&scope).len(), 1);

    // AND with --force they are, after a warning
    let forced = replay(&scope, &["--all", "--force"]);
    says(&forced, 0, "--force: 2 of these records");
    assert_eq!(sent(&scope).len(), 1, "a dry run");
    let forced = json(&replay(&scope, &[&["--all", "--force", "--json"], &APPLY[..]].concat()).succeeds());
    assert_eq!((counts(&forced), &forced["at_risk"]), ((2, 1, 0), &2.into()));
    assert_eq!(sent(&scope).iter().filter(|record| record.timestamp_ms == Some(old)).count(), 1);
    let is_forced = scope.sql(
        "SELECT is_forced FROM payment_writer.dead_letter_replay_run ORDER BY started_at DESC LIMIT 1",
        &[],
    );
    assert!(is_forced[0].get::<_, bool>(0));
}

#[test]
fn a_dry_run_changes_nothing_and_a_careless_command_is_rejected() {
    // GIVEN letters, one of them of another topic, and a record that is no dead letter
    let scope = with_letters("dlq_dry", 0..3);
    let mut foreign = letter(&scope, 3, now_ms());
    foreign.headers.iter_mut().find(|(name, _)| name == "dlq-topic").unwrap().1 = Some(b"elsewhere".to_vec());
    scope.produce(&scope.dead_letter_topic, [foreign, Message::new("1", "2")]);

    // WHEN a dry run shows what would be replayed
    let told = json(&replay(&scope, &["--all", "--json"]).succeeds());
    let text = replay(&scope, &["--at", "0/0,1/0"]);

    // THEN that is printed, and nothing else has happened
    assert_eq!(counts(&told), (3, 0, 2));
    assert_eq!(told["refused"]["other_topic"], 1);
    assert_eq!(told["refused"]["not_a_dead_letter"], 1);
    says(&text, 0, "nothing was sent; add --apply --note TEXT");
    says(&text, 0, "2 dead letters chosen");
    for table in ["dead_letter_replay", "dead_letter_replay_chunk", "dead_letter_replay_run"] {
        assert_eq!(scope.count(table), 0, "{table}");
    }
    assert!(scope.read_all(&scope.input_topic).is_empty());

    // AND careless commands are rejected
    says(&replay(&scope, &APPLY), 2, "--all");
    says(&replay(&scope, &["--all", "--apply"]), 2, "--note");
    says(&replay(&scope, &["--at", "0/100"]), 2, "holds no record at 0/100");
    let rows_only = [("PAYMENT_WRITER__KAFKA__PUBLISH", "false")];
    says(&scope.command_with(&["dlq", "replay", "--all"], &rows_only), 2, "kafka.publish");
    scope.command(&["migrate", "undo", "--count", "4"]).succeeds();
    says(&replay(&scope, &["--all"]), 1, "payment-writer migrate");
    assert!(scope.read_all(&scope.input_topic).is_empty());
}

#[test]
fn the_writers_role_is_enough_to_replay() {
    // GIVEN a role with only these privileges
    let scope = with_letters("dlq_grants", 0..10);
    let role = format!("{}_w", scope.database);
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    scope.execute_as_admin(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'w' IN ROLE payment_writer_app"));
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}:w@"));
    let run = |failpoint: &str| {
        let settings =
            [("PAYMENT_WRITER__POSTGRES__URL", url.as_str()), ("PAYMENT_WRITER_FAILPOINT", failpoint)];
        scope.command_with(&[&["dlq", "replay", "--all"], &APPLY[..]].concat(), &settings)
    };

    // WHEN it replays, and resolves what a killed run left behind, sent or not
    assert_eq!(run("dlq_before_commit:2").code, None);
    assert_eq!(run("dlq_after_commit:1").code, None);
    run("").succeeds();

    // THEN
    assert_each_once(&scope, 0..10);
    scope.execute_as_admin(&format!("DROP ROLE \"{role}\""));
}

#[test]
fn letters_selected_one_by_one_are_replayed_alone() {
    let scope = with_letters("dlq_named", 0..10);
    assert_eq!(applied(&scope, &["--at", "0/1,0/3", "--at", "1/0"]), (3, 0, 0));
    // Even numbers are in partition 0, odd ones in 1, each in order.
    assert_eq!(replayed(&scope), BTreeMap::from([(1, 1), (2, 1), (6, 1)]));
    assert_eq!(applied(&scope, &["--since", "1h"]), (7, 3, 0));
    assert_each_once(&scope, 0..10);
}

#[test]
fn a_replay_killed_at_any_step_and_run_again_sends_each_letter_once() {
    const LETTERS: u64 = 30;
    // A run has two chunks, preceded by a transaction that commits only the run's metadata.
    let arguments = ["--all", "--rate", "20"];
    let scope = with_letters("dlq_kill", 0..0);
    let steps = [
        "dlq_after_take_over",
        "dlq_after_fence",
        "dlq_after_resolve",
        "dlq_after_produce:1",
        "dlq_after_offsets:1",
        "dlq_before_commit:1",
        "dlq_after_metadata",
        "dlq_after_claim:1",
        "dlq_after_produce:2",
        "dlq_after_offsets:2",
        "dlq_before_commit:2",
        "dlq_after_commit:1",
        "dlq_after_note:1",
        "dlq_after_claim:2",
        "dlq_before_commit:3",
        "dlq_after_commit:2",
        "dlq_after_note:2",
    ];
    for (step, first) in steps.into_iter().zip((0..).step_by(LETTERS as usize)) {
        // GIVEN letters that were never replayed
        add_letters(&scope, first..first + LETTERS);

        // WHEN the command dies there, and is run again
        dies_at(&scope, step, &arguments);
        let (_, already, refused) = applied(&scope, &["--all"]);

        // THEN
        assert!(already >= first as i64 && refused == 0, "{step}");
        assert_each_once(&scope, 0..first + LETTERS);
    }

    // AND it may also die while it resolves what an earlier run left behind
    let first = LETTERS * steps.len() as u64;
    for (left, step, first) in [
        ("dlq_after_commit:1", "dlq_after_resolve_one", first),
        ("dlq_before_commit:2", "dlq_after_resolve_one", first + LETTERS),
        ("dlq_after_claim:1", "dlq_after_fence", first + 2 * LETTERS),
    ] {
        add_letters(&scope, first..first + LETTERS);
        dies_at(&scope, left, &arguments);
        dies_at(&scope, step, &arguments);
        applied(&scope, &["--all"]);
        assert_each_once(&scope, 0..first + LETTERS);
    }
    let states = "SELECT count(*) FROM payment_writer.dead_letter_replay_chunk WHERE state = 'claimed'";
    assert_eq!(scope.sql(states, &[])[0].get::<_, i64>(0), 0, "nothing is left open");
}

#[test]
fn of_two_concurrent_runs_one_replays_and_a_hung_one_is_fenced() {
    let scope = with_letters("dlq_two", 0..0);
    let steps = [
        "dlq_after_take_over:1",
        "dlq_after_fence:1",
        "dlq_before_commit:1",
        "dlq_after_claim:1",
        "dlq_after_produce:2",
        "dlq_before_commit:2",
        "dlq_after_commit:1",
    ];
    for (step, first) in steps.into_iter().zip((0..).step_by(10)) {
        // GIVEN a run that hangs
        add_letters(&scope, first..first + 10);
        let mut hung = stopped_at(&scope, step, &["--all"]);

        // WHEN another starts beside it
        says(&replay(&scope, &[&["--all"], &APPLY[..]].concat()), 1, "under way");
        // and once more, when the database has ended the hung run's session
        scope.cut_connections();
        applied(&scope, &["--all"]);
        assert_each_once(&scope, 0..first + 10);

        // THEN the hung one can do nothing when it resumes
        hung.signal("CONT");
        assert_eq!(hung.wait().code(), Some(1), "{step}: {}", hung.log());
        assert_each_once(&scope, 0..first + 10);
    }
}

#[test]
fn runs_that_fence_each_other_leave_nothing_sent_twice() {
    // GIVEN a run that hangs after it has taken over in the database, and a later one that hangs in the middle
    // of its work
    let scope = with_letters("dlq_cross", 0..20);
    let mut first = stopped_at(&scope, "dlq_after_take_over:1", &["--all"]);
    scope.cut_connections();
    let mut second = stopped_at(&scope, "dlq_before_commit:2", &["--all"]);

    // WHEN the first resumes, fences the second in Kafka, and finds that the database has another owner
    first.signal("CONT");
    assert_eq!(first.wait().code(), Some(1), "{}", first.log());
    second.signal("CONT");
    assert_eq!(second.wait().code(), Some(1), "{}", second.log());

    // THEN a third one completes the replay
    assert_eq!(replayed(&scope), BTreeMap::new());
    assert_eq!(applied(&scope, &["--all"]), (20, 0, 0));
    assert_each_once(&scope, 0..20);

    // AND a run that is no longer the owner in the database detects that
    add_letters(&scope, 20..40);
    for (step, sent) in [("dlq_after_fence:1", 20), ("dlq_after_resolve:1", 20), ("dlq_before_commit:2", 40)]
    {
        let mut late = stopped_at(&scope, step, &["--all"]);
        scope.execute("UPDATE payment_writer.dead_letter_replay_owner SET run_id = gen_random_uuid()");
        late.signal("CONT");
        assert_eq!(late.wait().code(), Some(1), "{step}: {}", late.log());
        assert!(late.log().contains("took over"), "{}", late.log());
        assert_each_once(&scope, 0..sent);
    }
    assert_eq!(applied(&scope, &["--all"]), (0, 40, 0));
    assert_each_once(&scope, 0..40);
}

#[test]
fn a_replay_without_proof_waits_for_the_operators_decision() {
    let scope = with_letters("dlq_doubt", 0..10);
    let apply = |more: &[&str]| replay(&scope, &[&["--all"], &APPLY[..], more].concat());

    // GIVEN a chunk that was sent but not recorded, and a group that was deleted
    dies_at(&scope, "dlq_after_commit:1", &["--all"]);
    delete_replay_group(&scope);
    let told = json(&replay(&scope, &["--all", "--json"]).succeeds());
    assert_eq!((counts(&told), &told["unsettled"]), ((0, 0, 0), &10.into()));

    // WHEN and THEN: nothing is sent until the operator says whether the chunk was
    says(&apply(&[]), 3, "--unfinished");
    assert_each_once(&scope, 0..10);
    apply(&["--unfinished", "sent"]).succeeds();
    assert_each_once(&scope, 0..10);

    // AND the same for a chunk that was not sent
    add_letters(&scope, 10..20);
    dies_at(&scope, "dlq_before_commit:2", &["--all"]);
    delete_replay_group(&scope);
    says(&apply(&[]), 3, "10 dead letters");
    apply(&["--unfinished", "not-sent"]).succeeds();
    assert_each_once(&scope, 0..20);
}

#[test]
fn a_database_restored_from_before_a_replay_is_detected() {
    // GIVEN a backup that is older than a replay
    let scope = with_letters("dlq_restored", 0..10);
    scope.back_up_database();
    assert_eq!(applied(&scope, &["--all"]), (10, 0, 0));

    // WHEN it is restored
    scope.restore_database();

    // THEN its record that nothing was replayed is not trusted
    let refused = replay(&scope, &[&["--all"], &APPLY[..]].concat());
    says(&refused, 3, "this database does not have");
    assert_each_once(&scope, 0..10);

    // AND the operator can accept it anyway
    assert_eq!(applied(&scope, &["--all", "--after-restore"]), (10, 0, 0));
    assert!(replayed(&scope).values().all(|times| *times == 2));
    assert_eq!(applied(&scope, &["--all"]), (0, 10, 0));
}

#[test]
fn an_interrupted_replay_ends_between_two_chunks_and_continues_when_run_again() {
    // GIVEN a replay that would take days
    let scope = with_letters("dlq_interrupt", 0..4);
    let arguments = ["dlq", "replay", "--all", "--rate", "0.001", "--json", APPLY[0], APPLY[1], APPLY[2]];
    let mut run = scope.daemon(&arguments);
    wait_until("one letter is sent", || {
        scope.sql("SELECT FROM payment_writer.dead_letter_replay_chunk WHERE state = 'sent'", &[]).len() == 1
    });

    // WHEN it is interrupted
    run.signal("INT");
    let status = run.wait();

    // THEN it reports its progress, and the rest is sent by the next run
    assert_eq!(status.code(), Some(0), "{}", run.log());
    let told: Value = serde_json::from_str(run.log().lines().last().unwrap()).unwrap();
    assert_eq!((&told["replayed"], &told["interrupted"]), (&1.into(), &true.into()));
    assert_eq!(replayed(&scope).len(), 1);
    assert_eq!(applied(&scope, &["--all"]), (3, 1, 0));
    assert_each_once(&scope, 0..4);
}

#[test]
fn replays_beside_a_running_daemon_leave_every_record_with_one_outcome() {
    // GIVEN a daemon that has dead-lettered some of its records
    let scope = Scope::new(Servers::shared(), "dlq_beside");
    scope.prepare(4, 2);
    let (member, mut load) = (Member::new("a"), Load::new(31));
    scope.produce(&scope.input_topic, load.take(300));
    member.catch_up(&scope);
    let letters = scope.read_all(&scope.dead_letter_topic).len();
    assert!(letters > 0);
    let mut daemon = member.start(&scope);

    // WHEN all of them are replayed under load, by commands that are killed, and once more when dead-lettered
    // again
    let flow = Flow::start(&scope, load, 5);
    let all = ["--all", "--force"];
    for step in ["dlq_before_commit:2", "dlq_after_commit:1"] {
        dies_at(&scope, step, &all);
    }
    applied(&scope, &all);
    let came_back = |scope: &Scope<'_>| {
        let letters = scope.read_all(&scope.dead_letter_topic);
        letters.iter().filter(|letter| letter.has_header("dlq-replays")).count() >= 1
    };
    wait_until("the replayed record is dead-lettered again", || came_back(&scope));
    applied(&scope, &all);
    flow.end();
    daemon.drains();
    member.catch_up(&scope);

    // THEN each record, replayed or not, has exactly one outcome, and each original letter was sent once
    scope.assert_exactly_once();
    let all = scope.read_all(&scope.input_topic);
    let first: Vec<_> = all
        .iter()
        .filter(|record| record.has_header("dlq-replays") && record.header("dlq-replays") == "1")
        .collect();
    assert!(first.len() >= letters);
    let claimed = scope.count("dead_letter_replay");
    assert_eq!(all.iter().filter(|record| record.has_header("dlq-replays")).count() as i64, claimed);
}
