//! The terminal view, as text.

use crate::support::{Payment, Scope, uuid_v4, wait_until};

#[test]
fn top_shows_a_running_daemon_and_reports_instances_that_do_not_answer() {
    let scope = Scope::ready("top", 3, 1);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, (0..50).map(|seed| Payment::new(uuid_v4(seed), seed as i64).message()));
    wait_until("all are written", || {
        daemon.metric("payment_writer_records_total", r#"outcome="written""#) == 50.0
            && daemon.metric("payment_writer_lag_records", "") == 0.0
    });

    let url = format!("http://{}", daemon.admin);
    let top = |more: &[&str]| {
        scope.command(&[&["top", "--once", "--interval", "200ms", "--url", &url], more].concat())
    };
    let shown = top(&[]).succeeds().stdout;
    for expected in [
        url.as_str(),
        "ready",
        &format!("group {}", scope.group_id),
        "partitions 3",
        "breaker closed",
        "written               0/s         50",
        "waiting",
        "lag: 0 records, the oldest 0ms old",
        "···",
    ] {
        assert!(shown.contains(expected), "{expected:?} is not in\n{shown}");
    }

    // If some instances do not answer, each gets a line; if none answers, the command fails.
    let shown = top(&["--url", "http://127.0.0.1:1"]).succeeds().stdout;
    assert!(shown.contains("http://127.0.0.1:1  not ready") && shown.contains("does not answer"), "{shown}");
    let failed = scope.command(&["top", "--once", "--url", "127.0.0.1:1"]);
    assert_eq!(failed.code, Some(1));
    assert!(
        failed.stderr.contains("http://127.0.0.1:1 does not answer as a daemon's admin port"),
        "{}",
        failed.stderr
    );
    let no_terminal = scope.command(&["top", "--url", &url]);
    assert_eq!(no_terminal.code, Some(2));
    assert!(no_terminal.stderr.contains("--once"), "{}", no_terminal.stderr);
}
