//! Three faults, one after the other, as seen by Prometheus and Alertmanager. The rules are the shipped ones
//! with an hour shortened to a minute; promtool tests the real windows.

use std::time::Instant;

use crate::site::Site;
use crate::support::{Act, Daemon, Flow, Load, Scope, Servers};

/// Alerts of severity ticket with windows of hours or days, such as the three-day error budget that an outage
/// uses up.
const LONG_MEMORY: [&str; 1] = ["PaymentWriterBudgetBurnLong"];

/// Alerts that none of the three faults causes.
const NEVER: [&str; 6] = [
    "PaymentWriterPartitionsHalted",
    "PaymentWriterPartitionsAdded",
    "PaymentWriterRetentionAtRisk",
    "PaymentWriterTopicCompacted",
    "PaymentWriterAbsent",
    "PaymentWriterAuditUnaccounted",
];

fn start(scope: &Scope<'_>, instance_id: &str) -> Daemon {
    scope.daemon_with(&["run"], &[("PAYMENT_WRITER__KAFKA__INSTANCE_ID", instance_id)])
}

/// Starts the same instance again, at the same address.
fn restart(scope: &Scope<'_>, instance_id: &str, mut former: Daemon) -> Daemon {
    former.drains();
    scope.daemon_at(former.admin, &["run"], &[("PAYMENT_WRITER__KAFKA__INSTANCE_ID", instance_id)])
}

fn never_fired(site: &Site, since: Instant, others: &[&str]) {
    site.never_fired(since, &[&NEVER, others].concat());
}

#[test]
fn the_dashboard_has_data_and_each_fault_its_own_alert_until_it_is_fixed() {
    // GIVEN two daemons under a steady load, and the monitoring programs
    let servers = Servers::own();
    let scope = Scope::new(&servers, "observed");
    scope.prepare(8, 2);
    let (a, b) = (start(&scope, "a"), start(&scope, "b"));
    a.wait_until_ready();
    b.wait_until_ready();
    let flow = Flow::start(&scope, Load::without_bad_records(71), 3);
    let site = Site::start(&scope, &[&a, &b]);
    site.wait_for_series("up == 1", 6);
    site.wait_for_series("sum(payment_writer_partitions_assigned) == 8", 1);

    // THEN every query has data, and nothing fires
    site.dashboard_has_data(false);
    site.wait_until_clear(&[]);

    // WHEN the database is stopped, THEN exactly one page is sent
    let since = Instant::now();
    servers.postgres(Act::Immediate);
    site.wait_for_pages(
        &["PaymentWriterDatabaseAway"],
        &["PaymentWriterNotReady", "PaymentWriterLagGrowing"],
    );
    site.wait_for_series(r#"ALERTS{alertname="PaymentWriterDatabaseAway",alertstate="firing"}"#, 2);
    // AND all alerts end soon after it is back
    servers.postgres(Act::Start);
    site.wait_until_clear(&LONG_MEMORY);
    never_fired(&site, since, &["PaymentWriterBrokerAway", "PaymentWriterDeadLetter.*"]);

    // WHEN the broker is stopped, also for longer than the group's session. No transaction is open meanwhile:
    // a single broker may drop transaction markers when it restarts (known limits).
    let since = Instant::now();
    let load = flow.end();
    scope.wait_until_caught_up();
    servers.kafka(Act::Kill);
    site.wait_for_pages(
        &["PaymentWriterBrokerAway"],
        &["PaymentWriterNotReady", "PaymentWriterNoPartitionsAssigned"],
    );
    site.wait_for_series(r#"ALERTS{alertname="PaymentWriterBrokerAway",alertstate="firing"}"#, 2);
    servers.kafka(Act::Start);
    let flow = Flow::start(&scope, load, 3);
    site.wait_until_clear(&LONG_MEMORY);
    never_fired(&site, since, &["PaymentWriterDatabaseAway", "PaymentWriterDeadLetter.*"]);

    // WHEN the database rejects rows, and many records are invalid
    let since = Instant::now();
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT no_13 CHECK (cust_id <> 13) NOT VALID",
    );
    let bad = Flow::start(&scope, Load::of_bad_records(72), 1);
    site.wait_for_series(
        r#"count by (reason) (ALERTS{alertname="PaymentWriterDeadLetters",alertstate="firing"})"#,
        2,
    );
    site.wait_for_pages(&["PaymentWriterDeadLetterShare"], &["PaymentWriterDeadLetters"]);
    // THEN the dashboard's queries about faults have data, with a restart in between
    let b = restart(&scope, "b", b);
    site.wait_for_series(
        "changes(process_start_time_seconds[30s]) > 0 and on (instance) payment_writer_ready > 0",
        1,
    );
    site.dashboard_has_data(true);
    // AND all alerts end when there are no more bad records
    drop(bad.end());
    scope.execute("ALTER TABLE payment_writer.payment_core DROP CONSTRAINT no_13");
    site.wait_until_clear(&LONG_MEMORY);
    never_fired(&site, since, &["PaymentWriterDatabaseAway", "PaymentWriterBrokerAway"]);
    drop(flow.end());
    drop((a, b));
}
