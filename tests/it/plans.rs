//! Plans that resolve all halted partitions at once.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use serde_json::Value;

use crate::support::{
    Check, Finished, Load, Member, PATIENCE, Received, Scope, Servers, wait_until, wait_until_within,
};

/// A consumer in the daemon's group that commits what it read, as a console consumer does.
struct Console<'s> {
    scope: &'s Scope<'s>,
    consumer: BaseConsumer,
}

/// Joins and waits for this many partitions.
fn console_consumer<'s>(scope: &'s Scope<'s>, partitions: usize) -> Console<'s> {
    let mut config = scope.client_config();
    // The assignor that the daemon and the console consumer's defaults have in common.
    config
        .set("group.id", &scope.group_id)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false");
    let consumer: BaseConsumer = config.create().unwrap();
    consumer.subscribe(&[&scope.input_topic]).unwrap();
    let console = Console { scope, consumer };
    wait_until_within(PATIENCE, "it has its partitions", || {
        console.poll();
        console.consumer.assignment().unwrap().count() == partitions
    });
    console
}

impl Console<'_> {
    fn poll(&self) {
        drop(self.consumer.poll(Duration::from_millis(20)).transpose());
    }

    /// Reads its partitions to these ends, commits them and leaves. Returns its partitions in order.
    fn read_up_to(self, ends: &BTreeMap<i32, i64>) -> Vec<i32> {
        let assignment = self.consumer.assignment().unwrap();
        let mut taken: Vec<i32> = assignment.elements().iter().map(|e| e.partition()).collect();
        taken.sort_unstable();
        wait_until("it has read its partitions", || {
            self.poll();
            let positions = self.consumer.position().unwrap();
            let position = |p: &i32| positions.find_partition(&self.scope.input_topic, *p)?.offset().to_raw();
            taken.iter().all(|p| position(p) == Some(ends[p]))
        });
        self.consumer.commit_consumer_state(CommitMode::Sync).unwrap();
        taken
    }
}

#[track_caller]
fn refused(finished: &Finished, code: i32, texts: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    assert!(texts.iter().all(|text| finished.stderr.contains(text)), "no {texts:?}: {finished:?}");
}

#[test]
fn one_plan_resolves_twelve_partitions_and_one_that_is_not_as_planned_changes_nothing() {
    // GIVEN records that nobody wrote, and a console consumer in the daemon's group that read them all
    let scope = Scope::new(Servers::shared(), "plan");
    scope.prepare(12, 2);
    let mut load = Load::new(76);
    let all: Vec<i32> = (0..12).collect();
    scope.spread(load.take(60), &all);
    let taken = console_consumer(&scope, 12);
    taken.read_up_to(&scope.ends());

    // WHEN a plan is made
    let plan = scope.command(&["cursors", "show", "--plan"]).succeeds().stdout;
    let line = "applied=- published=- group=5 halt_reason=moved_forward accept --published 0 # ";
    assert_eq!(plan.matches(line).count(), 12, "{plan}");

    // AND it is applied without a confirmation, or to something else, or with an error, or too late
    let file = tempfile::NamedTempFile::new().unwrap();
    let apply = |plan: &str, arguments: &[&str]| {
        std::fs::write(file.path(), plan).unwrap();
        scope.command(&[&["cursors", "apply", file.path().to_str().unwrap()], arguments].concat())
    };
    refused(&apply(&plan, &[]), 2, &["--yes", &scope.input_topic]);
    let value = |name: &str| plan.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let mut others = plan.clone();
    for name in ["group: ", "topic: "] {
        others = others.replace(&format!("\n{name}{}\n", value(name)), &format!("\n{name}other\n"));
    }
    for name in ["topic_id: ", "database_id: "] {
        others = others.replace(value(name), "00000000-0000-0000-0000-000000000001");
    }
    let named = ["nothing was changed", "group other", "topic other", "topic_id 0000", "database_id 0000"];
    refused(&apply(&others, &["--yes"]), 2, &named);
    let number = plan.lines().count() + 1;
    refused(&apply(&format!("{plan}garbage\n"), &["--yes"]), 2, &[&format!("line {number}: expected")]);
    refused(&scope.command(&["cursors", "apply", "-", "--yes"]), 2, &["line 1: expected"]);
    scope.move_group_offset(3, 4, "");
    scope.move_group_offset(7, 3, "");
    let late = apply(&plan, &["--yes"]);
    refused(&late, 1, &["nothing was changed", "\npartition 3: ", "group=4", "\npartition 7: ", "group=3"]);
    assert_eq!(late.stderr.matches("\npartition ").count(), 2, "{late:?}");

    // THEN nothing is changed
    assert_eq!(
        ["cursor_audit", "cursor_settlement", "source_cursor"].map(|table| scope.count(table)),
        [0; 3]
    );

    // WHEN it is applied to the state that it was made for
    scope.move_group_offset(3, 5, "");
    scope.move_group_offset(7, 5, "");
    apply(&plan, &["--yes"]).succeeds();

    // THEN each decision is recorded, the plan cannot be applied again, and nothing is lost or doubled
    let audit = scope.sql(
        "SELECT partition, command, before->>'halt_reason', reason FROM payment_writer.cursor_audit ORDER BY id",
        &[],
    );
    for (row, partition) in audit.iter().zip(&all) {
        let (command, halt_reason, reason): (&str, &str, &str) = (row.get(1), row.get(2), row.get(3));
        assert_eq!((row.get::<_, i32>(0), command), (*partition, "cursors accept --published 0"));
        assert!(halt_reason == "moved_forward" && reason.contains("another program moved"), "{reason}");
    }
    assert_eq!(audit.len(), 12);
    refused(&apply(&plan, &["--yes"]), 1, &["partition 11: ", "now not halted"]);
    Member::new("a").soon_forgotten().catch_up(&scope);
    scope.assert_exactly_once();
}

#[test]
#[ignore = "minutes"]
fn trials_a_plan_resolves_what_a_console_consumer_took_from_a_running_daemon() {
    // GIVEN a running daemon, and a console consumer in its group that took half of the partitions
    let scope = Scope::new(Servers::shared(), "plan_beside");
    scope.prepare(26, 2);
    let mut load = Load::new(77);
    let all: Vec<i32> = (0..26).collect();
    scope.spread(load.take(260), &all);
    let mut daemon = Member::new("a").soon_forgotten().start(&scope);
    scope.wait_until_caught_up();
    let console = console_consumer(&scope, 13);
    scope.spread(load.take(130), &all);
    let taken = console.read_up_to(&scope.ends());
    let halted = || daemon.metric("payment_writer_partitions_halted", "");
    wait_until_within(PATIENCE, "what it had is halted", || halted() == 13.0);

    // AND one of them lost records that were not written
    let gap = taken[0];
    let written = |record: &Received| record.partition == gap && record.offset < 10;
    let removed: Vec<_> = scope.read_all(&scope.input_topic).into_iter().filter(written).collect();
    scope.delete_records(gap, 12);

    // AND the database's copy of the group's offset is older than the last events of another one
    let copied_late = taken[1];
    let copy = "UPDATE payment_writer.source_cursor SET published = 2 WHERE partition =";
    scope.execute(&format!("{copy} {copied_late}"));

    // WHEN a plan is made
    let plan = scope.command(&["cursors", "show", "--plan"]).succeeds().stdout;

    // THEN it resolves each without losing or doubling anything, except for the one where that is impossible
    let found = |partition: i32, published: i32| {
        format!("partition={partition} applied=10 published={published} group=15 halt_reason=moved_forward")
    };
    for partition in &taken[2..] {
        let line = format!("\n{} accept --published 10 # ", found(*partition, 10));
        assert!(plan.contains(&line), "no {line:?} in {plan}");
    }
    assert!(plan.contains(&format!("\n{} accept --published ", found(copied_late, 2))), "{plan}");
    let left_out = format!("\n# {} none # ", found(gap, 10));
    assert!(plan.contains(&left_out) && plan.matches("partition=").count() == 13, "{plan}");
    let json = scope.command(&["cursors", "show", "--plan", "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["group"], &json["partitions"][0]["decision"]),
        (&scope.group_id.as_str().into(), &Value::Null)
    );
    assert_eq!(json["partitions"][2]["decision"], "accept --published 10");

    // WHEN it is applied
    let file = tempfile::NamedTempFile::new().unwrap();
    let apply = |plan: &str, arguments: &[&str]| {
        std::fs::write(file.path(), plan).unwrap();
        scope.command(&[&["cursors", "apply", file.path().to_str().unwrap()], arguments].concat()).succeeds();
    };
    apply(&plan, &["--yes"]);

    // THEN the daemon goes on with all of them
    wait_until_within(PATIENCE, "the others continue", || halted() == 1.0);

    // AND with the last one as an operator decides it
    let line = left_out.replace("# p", "p").replace("none", "skip --to 12");
    let decided = plan.replace("\npartition=", "\n# partition=").replace(&left_out, &line);
    apply(&decided, &["--yes", "--reason", "INC-1234"]);
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "no partition is halted", || halted() == 0.0);
    assert_eq!(scope.sql("SELECT FROM payment_writer.cursor_audit WHERE reason = 'INC-1234'", &[]).len(), 1);
    daemon.drains();
    Check::of(&scope).removed(removed).holds();
}
