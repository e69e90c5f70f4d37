use super::super::status::HaltedRow;
use super::*;
use crate::domain::batch::OutcomeCounts;
use crate::domain::record::{Offset, Partition};
use crate::domain::wire::Reason;

const NOW: TimestampMs = TimestampMs(1_000_000_000);

/// What is not as in a daemon that writes 1,012 payments a second.
#[derive(Default)]
struct Case {
    missing: Vec<(&'static str, &'static str, i64)>,
    halted: usize,
    reason: Option<&'static str>,
    lane: Option<(&'static str, i64)>,
    waiting: i64,
    oldest_ms: i64,
    minute: Recent,
    dead_letters: Vec<DeadLettered>,
    is_idle: bool,
    has_no_partitions: bool,
    is_at_risk: bool,
    is_rows_only: bool,
    opening: usize,
    lane_without_database: bool,
}

impl Case {
    fn summary(self) -> (Level, String) {
        let row = |partition| PartitionRow {
            partition,
            state: if (partition as usize) < self.opening { "opening" } else { "live" }.to_owned(),
            since_ms: Some(NOW.0 - 45_000),
            lag_records: Some(if partition == 0 { self.waiting } else { 0 }),
            halted: ((partition as usize) < self.halted).then(|| HaltedRow {
                reason: if partition == 1 { "fetch_gap" } else { self.reason.unwrap_or("log_gap") }
                    .to_owned(),
                is_retried: partition == 1,
                may_lose_records: partition != 1 && self.reason != Some("moved_forward"),
                ..HaltedRow::default()
            }),
            ..PartitionRow::default()
        };
        let partitions: Vec<PartitionRow> =
            if self.has_no_partitions { Vec::new() } else { (0..8).map(row).collect() };
        let (doing, lasted) = self.lane.unwrap_or(("waiting", 0));
        let lane = LaneRow {
            lane: 1,
            doing,
            since_ms: (lasted > 0).then_some(NOW.0 - lasted),
            records: 400,
            partitions: 4,
            halted: 0,
            database: self.lane_without_database.then(|| "lock".to_owned()),
            broker: None,
        };
        let other = LaneRow { lane: 0, doing: "waiting", since_ms: None, database: None, ..lane.clone() };
        let written = if self.is_idle { 0 } else { 10_120 };
        let facts = Facts {
            now: NOW,
            missing: &self.missing.iter().map(|(what, reason, _)| (*what, (*reason).to_owned())).collect(),
            missing_since: &self
                .missing
                .iter()
                .map(|(what, _, lasted)| (*what, TimestampMs(NOW.0 - lasted)))
                .collect(),
            partitions: &partitions,
            lanes: &[lane, other],
            seconds: Recent {
                seconds: 10.0,
                outcomes: OutcomeCounts { written, ..OutcomeCounts::default() },
                ..Recent::default()
            },
            minute: Recent { seconds: 60.0, ..self.minute },
            dead_letters: &self.dead_letters,
            kafka_client: "client.id \"x\" or user \"writer\"",
            oldest_ms: self.oldest_ms,
            is_at_risk: self.is_at_risk,
            publishes: !self.is_rows_only,
        };
        let (Summary { level, text }, said) = facts.summary();
        // Each part that is said is not said again as a condition.
        assert_eq!(text.contains("halted"), said.contains(&"PaymentWriterPartitionsHalted"), "{text}");
        assert_eq!(text.contains("dead letter"), said.contains(&"PaymentWriterDeadLetters"), "{text}");
        (level, text)
    }
}

#[test]
fn the_sentence_names_what_is_worst_since_when_and_whether_anything_is_lost() {
    let at = |ms| TimestampMs(NOW.0 - ms);
    let letter = |ms, reason| DeadLettered { at: at(ms), partition: Partition(0), offset: Offset(1), reason };
    let refused = "connection refused (os error 111)";
    let others = "Writing 1,012 payments/s; oldest waiting record of the other partitions 0.0 s";
    let flow = "Writing 1,012 payments/s; oldest waiting record 0.2 s";
    for (case, level, expected) in [
        (Case { oldest_ms: 200, ..Case::default() }, Level::Ok, flow.to_owned()),
        (
            Case { is_idle: true, ..Case::default() },
            Level::Ok,
            "Idle: every record that can be read is written and published".to_owned(),
        ),
        (
            Case { has_no_partitions: true, ..Case::default() },
            Level::Ok,
            "Ready, without partitions: other members of the group have them".to_owned(),
        ),
        (
            Case { missing: vec![("database", refused, 185_000)], ..Case::default() },
            Level::Bad,
            format!("Waiting for Postgres for 3 min: {refused}; nothing is lost, no action in Kafka is needed"),
        ),
        (
            Case {
                missing: vec![("broker", "x", 5), ("database", refused, 185_000)],
                halted: 1,
                is_at_risk: true,
                ..Case::default()
            },
            Level::Bad,
            format!(
                "Waiting for Postgres, and for Kafka, for 3 min: {refused}; it goes on by itself once both answer. \
                 Partition 0 is halted for 45 s, until a person decides: records were deleted from the log before they were written (log_gap); records may be lost, the partition's panel \
                 says which, the others go on"
            ),
        ),
        (
            Case {
                missing: vec![("database", "lock", 20_000)],
                lane_without_database: true,
                oldest_ms: 200,
                ..Case::default()
            },
            Level::Bad,
            format!(
                "Lane 1 waits for Postgres for 20 s: lock; nothing is lost, no action in Kafka is needed. {flow}"
            ),
        ),
        (
            Case { opening: 2, oldest_ms: 200, is_idle: true, ..Case::default() },
            Level::Bad,
            "Still finding where to continue in 2 partitions (0, 1). Writing 0 payments/s; oldest waiting record 0.2 s"
                .to_owned(),
        ),
        (
            Case { missing: vec![("group", "not joined yet", 2_000)], ..Case::default() },
            Level::Warn,
            "Waiting to join the consumer group for 2.0 s: not joined yet; nothing is lost, the records wait in Kafka"
                .to_owned(),
        ),
        (
            Case {
                halted: 1,
                reason: Some("moved_forward"),
                oldest_ms: 90_000,
                waiting: 5,
                ..Case::default()
            },
            Level::Bad,
            format!(
                "Partition 0 is halted for 45 s, until a person decides: another program moved the group's offset past unwritten records (moved_forward); nothing is lost, its records wait \
                 in Kafka, the others go on. {others}"
            ),
        ),
        (
            Case { halted: 1, reason: Some("beyond_end"), oldest_ms: 200, ..Case::default() },
            Level::Bad,
            format!(
                "Partition 0 is halted for 45 s, until a person decides: its cursor is beyond the end of the log (beyond_end); records may be lost, the partition's \
                 panel says which, the others go on. {others}"
            ),
        ),
        (
            // The worst level counts, also of what there is no room for.
            Case {
                missing: vec![("database", "x", 5_000)],
                lane: Some(("database", 20_000)),
                lane_without_database: true,
                opening: 1,
                oldest_ms: 200,
                ..Case::default()
            },
            Level::Bad,
            format!(
                "Lane 1 waits for Postgres for 5.0 s: x; nothing is lost, no action in Kafka is needed. Lane 1 is slow: \
                 waiting for Postgres in one transaction for 20 s; nothing is lost, its 4 partitions wait. {flow}"
            ),
        ),
        (
            Case { is_idle: true, is_rows_only: true, ..Case::default() },
            Level::Ok,
            "Idle: every record that can be read is written".to_owned(),
        ),
        (
            Case { oldest_ms: 6_000, waiting: 5, ..Case::default() },
            Level::Warn,
            "Writing 1,012 payments/s; oldest waiting record 6.0 s".to_owned(),
        ),
        (
            Case { halted: 7, oldest_ms: 200, ..Case::default() },
            Level::Bad,
            format!(
                "7 partitions are halted (0, 1, 2, 3, 4, …) for 45 s, until a person decides: records were deleted from the log before they were written (log_gap), the client library skips records (fetch_gap); \
                 records may be lost, the partition's panel says which, the others go on. {others}"
            ),
        ),
        (
            Case { lane: Some(("database", 240_000)), oldest_ms: 200, ..Case::default() },
            Level::Bad,
            format!(
                "Lane 1 hangs: waiting for Postgres in one transaction for 4 min; nothing is lost, its 4 partitions \
                 wait. {flow}"
            ),
        ),
        (
            Case {
                minute: Recent { throttled_ms: 60_000, ..Recent::default() },
                oldest_ms: 200,
                ..Case::default()
            },
            Level::Warn,
            format!(
                "Kafka slows this daemon down by a quota; nothing is lost, payments take longer; if lag grows, have the quota \
                 of client.id \"x\" or user \"writer\" raised. {flow}"
            ),
        ),
        (
            Case {
                minute: Recent {
                    outcomes: OutcomeCounts { written: 97, dead_letters: 3, ..OutcomeCounts::default() },
                    ..Recent::default()
                },
                dead_letters: vec![
                    letter(1_000, Reason::MalformedJson),
                    letter(2_000, Reason::MalformedJson),
                    letter(3_000, Reason::TooLarge),
                    letter(90_000, Reason::TooLarge),
                    letter(90_000, Reason::TooLarge),
                ],
                oldest_ms: 200,
                ..Case::default()
            },
            Level::Warn,
            format!("3 dead letters in the last minute (3 % of the records), mostly malformed_json; they are not written to Postgres, and kept in the dead-letter topic. {flow}"),
        ),
        (
            Case {
                waiting: 1_200_000,
                oldest_ms: 3_900_000,
                minute: Recent { lag_before: Some(1_260_000), ..Recent::default() },
                ..Case::default()
            },
            Level::Warn,
            "Behind by 1,200,000 records, the oldest 1 h 5 min old; working off 1,012 records/s, about 20 min left"
                .to_owned(),
        ),
        (
            Case {
                waiting: 5,
                oldest_ms: 61_000,
                is_idle: true,
                minute: Recent { lag_before: Some(5), ..Recent::default() },
                ..Case::default()
            },
            Level::Warn,
            "Behind by 5 records, the oldest 1 min old; working off 0 records/s, and the backlog does not shrink"
                .to_owned(),
        ),
    ] {
        assert_eq!(case.summary(), (level, expected));
    }
}

#[test]
fn numbers_and_durations_have_units() {
    for (number, expected) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
        assert_eq!(grouped(number), expected);
    }
    for (ms, expected) in [
        (-5, "0.0 s"),
        (230, "0.2 s"),
        (59_900, "59 s"),
        (60_000, "1 min"),
        (3_600_000, "1 h"),
        (7_500_000, "2 h 5 min"),
        (172_800_000, "2 d"),
    ] {
        assert_eq!(duration(ms), expected);
    }
}

#[test]
fn a_small_share_is_not_none() {
    let shown = [0.0, 0.000_1, 0.01, 0.25, 1.0].map(percent);
    assert_eq!(shown, ["0 %", "less than 1 %", "1 %", "25 %", "100 %"]);
}
