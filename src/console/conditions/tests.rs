use super::super::status::HaltedRow;
use super::*;
use crate::domain::batch::OutcomeCounts;
use crate::domain::cursor::HaltReason;
use crate::domain::record::{NextOffset, Offset, Partition};

/// Alerts that the daemon cannot answer itself, and why.
const NOT_ANSWERED: &[(&str, &str)] = &[
    ("PaymentWriterBudgetBurnFast", "hours of history"),
    ("PaymentWriterBudgetBurnSlow", "hours of history"),
    ("PaymentWriterBudgetBurnLong", "days of history"),
    ("PaymentWriterLowThroughput", "a day of history"),
    ("PaymentWriterErrors", "rates of all tries"),
    ("PaymentWriterDeadLettersOld", "days of history"),
    ("PaymentWriterPartitionsAdded", "an hour of history"),
    ("PaymentWriterNoPartitionsAssigned", "all daemons"),
    ("PaymentWriterPartitionsUnassigned", "all daemons"),
    ("PaymentWriterDatabaseSlow", "rates of a histogram"),
    ("PaymentWriterCursorDeadRows", "an exporter of Postgres"),
    ("PaymentWriterLongTransaction", "an exporter of Postgres"),
    ("PaymentWriterAbsent", "a daemon that is not there"),
    ("PaymentWriterDaemonDown", "a daemon that is not there"),
    ("PaymentWriterRestarting", "a daemon that is not there"),
];

/// Name and severity of each alert of the rules.
fn alerts() -> Vec<(String, String)> {
    let rules = include_str!("../../../ops/prometheus/rules.yml");
    let mut alerts = Vec::new();
    for line in rules.lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            alerts.push((name.to_owned(), String::new()));
        } else if let Some(severity) = line.trim().strip_prefix("severity: ")
            && let Some(last) = alerts.last_mut()
        {
            severity.clone_into(&mut last.1);
        }
    }
    alerts
}

#[test]
fn each_alert_is_answered_with_its_severity_or_cannot_be() {
    let answered = CONDITIONS.iter().map(|c| (c.alert.to_owned(), c.severity.to_owned()));
    let alerts = alerts();
    let severity =
        |name: &str| alerts.iter().find(|(alert, _)| alert == name).map(|(_, severity)| severity.clone());
    let not_answered =
        NOT_ANSWERED.iter().map(|(name, _)| ((*name).to_owned(), severity(name).unwrap_or_default()));
    let mut known: Vec<_> = answered.chain(not_answered).collect();
    let mut expected = alerts.clone();
    known.sort();
    expected.sort();
    assert_eq!(known, expected);
}

/// What a daemon with these metrics observes, to which nothing has happened.
fn observed<'o>(metrics: &str) -> Observed<'o> {
    Observed {
        now: TimestampMs(1_000_000_000),
        metrics: Box::leak(Box::new(Samples::parse(metrics))),
        history: Box::leak(Box::default()),
        missing: &[],
        partitions: &[],
        dead_letters: &[],
        lanes: &[],
        dead_letter_topic: Some("payments.dlq"),
        dead_letter_times: Box::leak(Box::default()),
        throttled: &["reader"],
        kafka_client: "client.id \"x\" or its user",
        increases: Box::leak(Box::default()),
        oldest_ms: 0,
        lag: 0,
    }
}

/// The conditions that hold.
fn holding<'o>(metrics: &str, change: impl FnOnce(&mut Observed<'o>)) -> Vec<(&'static str, String)> {
    let mut observed = observed(metrics);
    change(&mut observed);
    let answers = answers(&observed);
    assert!(answers.is_sorted_by_key(|answer| !answer.holds));
    answers.into_iter().filter(|answer| answer.holds).map(|answer| (answer.alert, answer.detail)).collect()
}

#[test]
fn a_condition_holds_by_what_the_daemon_observes() {
    assert_eq!(holding("", |_| {}), []);
    for (metrics, alert, detail) in [
        (
            "payment_writer_topic_misconfigured{topic=\"read\",setting=\"cleanup.policy\"} 1\n\
             payment_writer_topic_misconfigured{topic=\"email\",setting=\"message.timestamp.type\"} 1",
            "PaymentWriterTopicCompacted",
            "topics of role read: brokers remove records",
        ),
        (
            "payment_writer_audit_records_total{result=\"unaccounted\"} 2\n\
             payment_writer_audit_records_total{result=\"owned\"} 5",
            "PaymentWriterAuditUnaccounted",
            "2 since the start; the log names partitions and offsets",
        ),
        (
            "process_resident_memory_bytes 90\npayment_writer_memory_limit_bytes 100\n",
            "PaymentWriterMemory",
            "90 % of what it may have",
        ),
        (
            "payment_writer_housekeeping_last_pass_timestamp_seconds 1\npayment_writer_months_ahead 2",
            "PaymentWriterPruneStale",
            "the last complete pass began 11 d ago",
        ),
        (
            "payment_writer_housekeeping_last_pass_timestamp_seconds 999999\npayment_writer_months_ahead 1",
            "PaymentWriterMonthsMissing",
            "1 of the next two months have partitions",
        ),
        (
            "payment_writer_housekeeping_failing{task=\"months\"} 1\n\
             payment_writer_housekeeping_failing{task=\"pruning\"} 0",
            "PaymentWriterHousekeepingFailing",
            "tasks: months",
        ),
        (
            "payment_writer_audit_behind_seconds 2000",
            "PaymentWriterAuditBehind",
            "behind by 33 min, 0 offsets not audited since the start",
        ),
        (
            "process_open_fds 9\nprocess_max_fds 10",
            "PaymentWriterFileDescriptors",
            "90 % of what it may have",
        ),
        (
            "payment_writer_config_last_reload_successful 0",
            "PaymentWriterReloadFailed",
            "those from before stay in use; the log says why",
        ),
        (
            "payment_writer_horizon_held 1\nprocess_start_time_seconds 100000\n\
             payment_writer_horizon_timestamp_seconds 900000",
            "PaymentWriterHorizonHeld",
            "for 27 h 46 min it could not be determined up to when everything is written",
        ),
        (
            "payment_writer_fetch_gaps_total 2\npayment_writer_fetch_clients_renewed_total 1",
            "PaymentWriterFetchFaults",
            "3 times since the start; they were found and read",
        ),
        ("payment_writer_default_partition_rows 3", "PaymentWriterDefaultPartitionRows", "3 rows"),
    ] {
        assert_eq!(holding(metrics, |_| {}), [(alert, detail.to_owned())]);
    }
}

#[test]
fn the_sentence_is_raised_to_the_worst_condition_and_names_it() {
    let observed = observed(
        "payment_writer_audit_records_total{result=\"unaccounted\"} 2\npayment_writer_horizon_held 1\n\
         payment_writer_default_partition_rows 3",
    );
    assert!(is_at_risk(&observed));
    let mut summary = Summary { level: Level::Ok, text: "Idle".to_owned() };
    add_to(&mut summary, &["PaymentWriterHorizonHeld"], &answers(&observed));
    assert_eq!(summary.level, Level::Bad);
    assert_eq!(
        summary.text,
        "Payments are not accounted for: 2 since the start; the log names partitions and offsets. Idle. Also: Rows are in \
         default partitions"
    );

    // What is wrong now comes before what was, and after what may be lost.
    let answer = |alert| Answered {
        alert,
        severity: "page",
        title: "T",
        holds: true,
        detail: alert.to_owned(),
        since_ms: None,
        runbook: String::new(),
    };
    let all = [answer("PaymentWriterDeadLetterShare"), answer("PaymentWriterRetentionAtRisk")];
    for (level, expected) in [
        (Level::Ok, "T: PaymentWriterRetentionAtRisk. T: PaymentWriterDeadLetterShare. Now"),
        (Level::Bad, "T: PaymentWriterRetentionAtRisk. Now. T: PaymentWriterDeadLetterShare"),
    ] {
        let mut summary = Summary { level, text: "Now".to_owned() };
        add_to(&mut summary, &[], &all);
        assert_eq!(summary.text, expected);
    }
}

#[test]
fn a_quota_is_told_with_its_name_and_whom_it_is_for() {
    assert_eq!(limited(&["reader"]), "readers (consumer_byte_rate or request_percentage)");
    let both = "readers (consumer_byte_rate or request_percentage) and producers (producer_byte_rate or request_percentage)";
    assert_eq!(limited(&["reader", "producer"]), both);
    assert_eq!(limited(&[]), "clients");
}

#[test]
fn nothing_is_lost_is_said_only_where_that_is_known() {
    let live = PartitionRow { applied: Some(5), ..PartitionRow::default() };
    let halted = |reason: HaltReason| PartitionRow {
        halted: Some(HaltedRow { may_lose_records: reason.may_lose_records(), ..HaltedRow::default() }),
        ..live.clone()
    };
    let at = NextOffset(1);
    let moved = HaltReason::MovedForward { committed: at, applied: at, published: at };
    let gap = HaltReason::LogGap { needed: at, log_start: at };
    let beyond = HaltReason::BeyondEnd { position: at, end: at };
    let (code, remedy) = (String::new(), "");
    let unreadable = HaltReason::Unreadable { position: at, batch: None, after: None, code, remedy };
    let day = "payment_writer_input_retention_seconds 86400\n";
    let compacted = "payment_writer_topic_misconfigured{topic=\"input\",setting=\"cleanup.policy\"} 1";
    for (metrics, row, oldest_ms, is_risk) in [
        (day.to_owned(), live.clone(), 0, false),
        (day.to_owned(), halted(moved), 0, false),
        (day.to_owned(), halted(gap), 0, true),
        (day.to_owned(), halted(beyond), 0, true),
        (day.to_owned(), halted(unreadable), 0, true),
        (day.to_owned(), live.clone(), 50_000_000, true),
        (day.to_owned() + compacted, live.clone(), 0, true),
        ("payment_writer_input_retention_seconds +Inf".to_owned(), live.clone(), 50_000_000, false),
        // Not known yet: the retention, and where the partition goes on.
        (String::new(), live, 0, true),
        (day.to_owned(), PartitionRow::default(), 0, true),
    ] {
        let mut observed = observed(&metrics);
        let rows = [row];
        (observed.partitions, observed.oldest_ms) = (&rows, oldest_ms);
        assert_eq!(is_at_risk(&observed), is_risk, "{metrics} {rows:?} {oldest_ms}");
    }
}

#[test]
fn a_lane_that_hangs_and_a_partition_that_is_not_opened_are_told() {
    let lane = LaneRow {
        lane: 1,
        doing: "database",
        since_ms: Some(1_000_000_000 - 45_000),
        records: 4,
        partitions: 2,
        halted: 0,
        database: None,
        broker: None,
    };
    let short = LaneRow { lane: 0, since_ms: Some(999_999_000), ..lane.clone() };
    let opening = PartitionRow {
        partition: 7,
        state: "opening".to_owned(),
        since_ms: Some(999_960_000),
        ..PartitionRow::default()
    };
    let stalled = |lanes: &[LaneRow], rows: &[PartitionRow]| {
        let (lanes, rows) = (lanes.to_vec().leak(), rows.to_vec().leak());
        holding("", |observed| (observed.lanes, observed.partitions) = (lanes, rows))
    };
    let told = |detail: &str| vec![("PaymentWriterPartitionStalled", detail.to_owned())];
    assert_eq!(stalled(std::slice::from_ref(&short), &[]), []);
    assert_eq!(stalled(&[short.clone(), lane], &[]), told("lane 1 has been in one step for 45 s: database"));
    assert_eq!(stalled(std::slice::from_ref(&short), &[opening]), told("partition 7 is being opened"));
    // A live one beside a lane that waits for records.
    let stuck = |partition, ms: i64| PartitionRow {
        partition,
        state: "live".to_owned(),
        stuck_since_ms: Some(1_000_000_000 - ms),
        ..PartitionRow::default()
    };
    assert_eq!(stalled(std::slice::from_ref(&short), &[stuck(3, 600_000)]), []);
    let rows = [stuck(3, 720_000), stuck(4, 30_000), stuck(5, 660_000)];
    assert_eq!(stalled(&[short], &rows), told("3, 5: records wait, and none was written for 12 min"));
}

#[test]
fn what_the_last_minutes_were_like_is_told() {
    let of = |throttled_ms, database, dead_letters| {
        let outcomes = OutcomeCounts { written: 9, dead_letters, ..OutcomeCounts::default() };
        &*Box::leak(Box::new(History::of_equal_seconds(900, outcomes, throttled_ms, database)))
    };
    let quiet = of(0, 0.5, 0);
    let none: [&str; 0] = [];
    let names = |history, oldest_ms, lag| -> Vec<&str> {
        let change = |observed: &mut Observed<'static>| {
            (observed.history, observed.oldest_ms, observed.lag) = (history, oldest_ms, lag);
        };
        holding("", change).into_iter().map(|(alert, _)| alert).collect()
    };
    assert_eq!(names(quiet, 0, 0), none);
    assert_eq!(names(quiet, 61_000, 299), none, "the lag is that of ten minutes ago");
    assert_eq!(names(quiet, 61_000, 300), ["PaymentWriterLagGrowing"]);
    assert_eq!(names(of(0, 5.0, 0), 31_000, 299), ["PaymentWriterDatabaseSaturated"]);
    assert_eq!(names(of(0, 5.0, 0), 29_000, 299), none);
    assert_eq!(names(of(2_000, 0.5, 0), 0, 0), ["PaymentWriterThrottled"]);
    assert_eq!(names(of(0, 0.5, 1), 0, 0), ["PaymentWriterDeadLetterShare"]);

    let halted = [PartitionRow {
        partition: 3,
        since_ms: Some(999_000_000),
        halted: Some(HaltedRow::default()),
        ..PartitionRow::default()
    }];
    let broker = [("broker", "no answer".to_owned(), TimestampMs(999_000_000))];
    let held = holding("", |observed| (observed.partitions, observed.missing) = (&halted, &broker));
    let expected = [
        (
            "PaymentWriterPartitionsHalted",
            "3; the panel of each has the reason and the command that resolves it; the others go on",
        ),
        ("PaymentWriterBrokerAway", "no answer; it goes on by itself once that is over"),
        (
            "PaymentWriterNotReady",
            "/readyz names what is missing: broker; the same fault as \"Waiting for Kafka\"",
        ),
    ];
    assert_eq!(held, expected.map(|(alert, detail)| (alert, detail.to_owned())));
}

#[test]
fn an_increase_counts_for_an_hour() {
    let increases = Increases::default();
    assert_eq!(increases.recent("a", 0.0), None);
    assert_eq!(increases.recent("a", 2.0), Some(2.0));
    for (_, at) in increases.0.lock().unwrap().values_mut() {
        *at = Instant::now().checked_sub(INCREASE_COUNTS).unwrap();
    }
    assert_eq!(increases.recent("a", 2.0), None);
    assert_eq!(increases.recent("a", 3.0), Some(3.0));
}

#[test]
fn what_waits_is_dead_lettered_or_missing_is_told() {
    let missing = [("database", "connection refused".to_owned(), TimestampMs(999_000_000))];
    let times = DeadLetterTimes { count: 4, since: TimestampMs(999_000_000), last: TimestampMs(999_990_000) };
    let old = DeadLetterTimes { last: TimestampMs(997_000_000), ..times };
    let by_reason = [("malformed_json", times), ("too_large", old), ("message_id_conflict", old)].into();
    let letters = [DeadLettered {
        at: TimestampMs(999_990_000),
        partition: Partition(3),
        offset: Offset(17),
        reason: Reason::MalformedJson,
    }];
    let open = [PartitionRow { partition: 4, open_transaction_seconds: 400.0, ..PartitionRow::default() }];
    let held = holding("payment_writer_input_retention_seconds 600", |observed| {
        observed.missing = &missing;
        observed.dead_letters = &letters;
        observed.dead_letter_times = &by_reason;
        observed.partitions = &open;
        (observed.oldest_ms, observed.lag) = (400_000, 5);
    });
    let names: Vec<&str> = held.iter().map(|(alert, _)| *alert).collect();
    assert_eq!(
        names,
        [
            "PaymentWriterRetentionAtRisk",
            "PaymentWriterOpenTransaction",
            "PaymentWriterDatabaseAway",
            "PaymentWriterNotReady",
            "PaymentWriterDeadLetters",
            // Within an hour.
            "PaymentWriterMessageIdConflicts",
        ]
    );
    assert_eq!(
        held[2].1,
        "connection refused; nothing listens at postgres.url: start Postgres, or correct the address; it goes on by \
         itself once that is over"
    );
    assert_eq!(
        held[4].1,
        "since the start 4 malformed_json; the last one of partition 3 at offset 17; \
                            all are in payments.dlq: `payment-writer dlq list` shows them. Their senders have to correct them; once a cause in \
         the database or the settings is mended, `payment-writer dlq replay` sends them again"
    );
}
