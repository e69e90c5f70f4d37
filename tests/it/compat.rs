//! Exactly once with other versions of Kafka and Postgres: those of the variables `KAFKA` and `POSTGRES`.

use crate::audit::audit;
use crate::reconcile::is_fine;
use crate::support::{Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, wait_until_within};

#[test]
#[ignore = "of other versions: make compat"]
fn kills_and_rebalances_lose_and_duplicate_nothing() {
    // GIVEN two instances, and a flow of records with and without transactions
    let servers = Servers::own();
    let scope = Scope::new(&servers, "compat");
    scope.prepare(12, 4);
    let member = |name: &str| Member::new(name).with("BATCH__MAX_PAYMENTS", "100").soon_forgotten();
    let flow = Flow::start(&scope, Load::new(73), 20);
    let mut daemons = [member("a").start(&scope), member("b").start(&scope)];
    for daemon in &daemons {
        daemon.wait_for_partitions("each has its half", |partitions| partitions == 6);
    }
    let publish = |daemons: &[&Daemon], what: &str| {
        let published = |daemon: &Daemon| daemon.metric("payment_writer_published_total", "topic=\"read\"");
        let before: Vec<f64> = daemons.iter().map(|daemon| published(daemon)).collect();
        wait_until_within(PATIENCE, what, || {
            daemons.iter().zip(&before).all(|(daemon, before)| published(daemon) >= before + 200.0)
        });
    };
    publish(&[&daemons[0], &daemons[1]], "both publish");

    // WHEN one is killed and comes back, and another one joins and leaves
    daemons[0].kill();
    daemons[0] = member("a").start(&scope);
    publish(&[&daemons[0], &daemons[1]], "both publish after a kill");
    let mut third = member("c").start(&scope);
    third.wait_for_partitions("it has its share", |partitions| partitions == 4);
    publish(&[&daemons[0], &daemons[1], &third], "all three publish");
    third.drains();
    publish(&[&daemons[0], &daemons[1]], "both publish after a departure");

    // AND one dies between its two commits
    daemons[1].kill();
    member("b").die_at(&scope, "after_postgres_commit:3");
    daemons[1] = member("b").start(&scope);
    publish(&[&daemons[0], &daemons[1]], "both publish after a death between the commits");

    // THEN every offset has its outcome: by the tests' check, the auditor and reconcile
    drop(flow.end());
    scope.wait_until_caught_up();
    daemons.iter_mut().for_each(Daemon::drains);
    let outcomes = scope.assert_exactly_once();
    let audit = audit(&scope);
    assert_eq!(audit.code, Some(0), "{}{}", audit.stdout, audit.stderr);
    is_fine(&scope, &[]);
    let postgres: String = scope.sql("SHOW server_version", &[])[0].get(0);
    println!("Postgres {postgres}: {outcomes:?}");
}
