//! An earlier build and this one side by side, as in a rolling upgrade and a rollback.

use crate::audit::audit;
use crate::support::{Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, wait_until_within};

/// Variable with the path of the earlier build.
const FORMER_PROGRAM: &str = "PAYMENT_WRITER_FORMER_PROGRAM";

/// How an instance ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Drains,
    Killed,
}

fn published(daemon: &Daemon) -> f64 {
    daemon.metric("payment_writer_published_total", "topic=\"read\"")
}

/// Replaces one instance after the other by the new build, back by the earlier one, and forward again.
#[test]
#[ignore = "needs an earlier build: make upgrade"]
fn instances_change_to_this_build_and_back_under_load_and_nothing_is_lost_or_duplicated() {
    // GIVEN two instances of the earlier build, and a flow of records of all kinds of producers
    let former = std::env::var(FORMER_PROGRAM).expect("the earlier build: make upgrade FROM=COMMIT");
    let scope = Scope::new(Servers::shared(), "upgrade");
    scope.create_topics(12, 4);
    let this = |name: &str| Member::new(name).with("BATCH__MAX_PAYMENTS", "100").soon_forgotten();
    let earlier = |name: &str| this(name).of_program(&former);
    let version =
        || -> i32 { scope.sql("SELECT max(version) FROM payment_writer.schema_history", &[])[0].get(0) };
    assert_eq!(earlier("a").run(&scope, &["migrate"]).wait().code(), Some(0));
    let former_version = version();
    let flow = Flow::start(&scope, Load::new(71), 20);
    let mut daemons = [earlier("a").start(&scope), earlier("b").start(&scope)];
    for daemon in &daemons {
        daemon.wait_for_partitions("each has its half", |partitions| partitions == 6);
    }

    // WHEN the steps of the schema that came since are run beside them, under load
    let before = daemons.each_ref().map(published);
    let migrated = scope.command(&["migrate"]).succeeds().stdout;
    println!("{migrated}the schema was {former_version}, and is {}", version());
    assert!(former_version < version(), "both builds have the same schema: name an earlier one");
    // THEN both go on
    wait_until_within(PATIENCE, "both publish on the new schema", || {
        let now = daemons.each_ref().map(published);
        now[0] >= before[0] + 200.0 && now[1] >= before[1] + 200.0
    });

    // WHEN each is replaced, drained or killed in the middle of a batch, forward, back and forward again
    let forward = [(0, true, End::Killed), (1, true, End::Drains)];
    let back = [(0, false, End::Drains), (1, false, End::Killed)];
    let again = [(0, true, End::Drains), (1, true, End::Killed)];
    for (place, is_new, end) in [forward, back, again].concat() {
        let name = ["a", "b"][place];
        match end {
            End::Drains => daemons[place].drains(),
            End::Killed => daemons[place].kill(),
        }
        let member = if is_new { this(name) } else { earlier(name) };
        daemons[place] = member.start(&scope);
        // THEN both builds publish side by side
        let before = daemons.each_ref().map(published);
        let what =
            format!("both publish after {name} {end:?} for {}", if is_new { "this" } else { "former" });
        wait_until_within(PATIENCE, &what, || {
            let now = daemons.each_ref().map(published);
            now[0] >= before[0] + 200.0 && now[1] >= before[1] + 200.0
        });
    }

    // AND every offset has its outcome, according to the tests' own check and the independent auditor
    drop(flow.end());
    scope.wait_until_caught_up();
    daemons.iter_mut().for_each(Daemon::drains);
    scope.assert_exactly_once();
    let audit = audit(&scope);
    assert_eq!(audit.code, Some(0), "{}{}", audit.stdout, audit.stderr);
}
