//! Liveness, readiness, status and metrics.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::support::{AT_MS, Daemon, Member, Message, Payment, Scope, metrics_page, uuid_v4, wait_until};

fn json(daemon: &Daemon, path: &str) -> Option<(u16, Value)> {
    let reply = daemon.get(path)?;
    Some((reply.status, serde_json::from_str(&reply.body).unwrap()))
}

/// What keeps the daemon from being ready.
fn missing(daemon: &Daemon) -> Option<Vec<String>> {
    let (status, body) = json(daemon, "/readyz")?;
    assert_eq!(status, if body["ready"] == true { 200 } else { 503 });
    Some(body["missing"].as_object().unwrap().keys().cloned().collect())
}

#[test]
fn readiness_names_what_is_missing_until_nothing_is() {
    // GIVEN a database without a schema, and no topics
    let scope = Scope::new(crate::support::Servers::shared(), "readiness");

    // WHEN the daemon starts
    let mut daemon = scope.daemon(&["run"]);

    // THEN it is live, and reports one after the other what it waits for
    wait_until("the schema is missing", || {
        json(&daemon, "/readyz").is_some_and(|(status, body)| {
            status == 503 && body["missing"]["database"].as_str().is_some_and(|why| why.contains("migrate"))
        })
    });
    assert_eq!(daemon.get("/livez").unwrap().status, 200);
    let status = json(&daemon, "/status").unwrap().1;
    assert_eq!(status["breaker"], "open");
    let is_missing = |what: &str| daemon.metric("payment_writer_missing", &format!("what=\"{what}\""));
    assert_eq!((is_missing("database"), is_missing("group")), (1.0, 1.0));
    scope.command(&["migrate"]).succeeds();
    wait_until("the database is fine, the topic is missing", || {
        missing(&daemon).is_some_and(|missing| !missing.contains(&"database".to_owned()))
            && json(&daemon, "/readyz").is_some_and(|(_, body)| {
                body["missing"]["broker"].as_str().is_some_and(|why| why.contains(&scope.input_topic))
            })
    });
    scope.create_topics(2, 1);
    daemon.wait_until_ready();

    // AND it continues by itself
    assert_eq!(missing(&daemon), Some(vec![]));
    assert_eq!(["database", "broker", "group"].map(is_missing), [0.0; 3]);
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);
    wait_until("the payment is written", || scope.count("payment_core") == 1);
    assert!(daemon.is_running());
}

/// Name and labels of a sample with its value.
fn samples(daemon: &Daemon) -> Vec<(String, BTreeMap<String, String>, f64)> {
    let body = daemon.get("/metrics").unwrap().body;
    let parse = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels
            .trim_end_matches('}')
            .split(',')
            .filter_map(|label| label.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
            .collect();
        (name.to_owned(), labels, value.parse().unwrap())
    };
    body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse).collect()
}

#[test]
fn metrics_and_status_count_the_records_by_outcome() {
    // GIVEN a daemon that was sent payments, duplicates, a conflict and bad records
    let scope = Scope::ready("metrics", 3, 2);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    let payment = |seed: u64| Payment::new(uuid_v4(seed), seed as i64);
    let mut sent: Vec<Message> = (0..50).map(|seed| payment(seed).message()).collect();
    sent.extend((0..7).map(|seed| payment(seed).message()));
    sent.extend((0..3).map(|seed| payment(seed).amount("11").message()));
    sent.extend((50..60).map(|seed| payment(seed).status(0).message().header("dlq-replays", "1")));
    sent.extend((0..4).map(|_| Message::new("1", "{}").timestamp_ms(AT_MS)));
    sent.push(Message::new("1", "no json").timestamp_ms(AT_MS));
    let places = scope.produce(&scope.input_topic, sent.clone());

    // WHEN all of them have their outcome
    let count = |name: &str, label: &str| daemon.metric(&format!("payment_writer_{name}"), label);
    wait_until("every record is counted", || count("records_total", "") == sent.len() as f64);

    // THEN the counters match
    for (name, label, expected) in [
        ("records_total", r#"outcome="written""#, 60.0),
        ("records_total", r#"outcome="duplicate""#, 7.0),
        ("records_total", r#"outcome="dead_lettered""#, 8.0),
        ("published_total", r#"topic="read""#, 60.0),
        ("published_total", r#"topic="email""#, 50.0),
        ("published_total", r#"topic="dead_letter""#, 8.0),
        ("dead_letters_total", r#"reason="message_id_conflict""#, 3.0),
        ("dead_letters_total", r#"reason="missing_field""#, 4.0),
        ("dead_letters_total", r#"reason="malformed_json""#, 1.0),
        ("dead_letters_total", "", 8.0),
        ("partitions_assigned", "", 3.0),
        ("partitions_halted", "", 0.0),
        // One of each lane.
        ("database_up", "", 2.0),
        ("broker_up", "", 2.0),
        // Counters exist before the first event, so that `increase()` sees their first step.
        ("database_errors_total", r#"sqlstate_class="53""#, 0.0),
        ("batch_records_sum", "", sent.len() as f64),
    ] {
        assert_eq!(count(name, label), expected, "{name} {label}");
    }
    assert!(count("end_to_end_seconds_count", "") > 0.0, "sampled: about as many as records");
    // AND lag is 0 once the end offsets have been fetched
    wait_until("lag is known of all partitions", || {
        samples(&daemon).iter().filter(|(name, _, _)| name == "payment_writer_lag_records").count() == 3
    });
    wait_until("lag is 0", || count("lag_records", "") == 0.0 && count("lag_seconds", "") == 0.0);

    // AND every documented metric exists, with the prefix, and with labels from small sets
    let samples = samples(&daemon);
    let names: BTreeSet<&str> = samples.iter().map(|(name, _, _)| name.as_str()).collect();
    for name in [
        "records_total",
        "dead_letters_total",
        "published_total",
        "batches_total",
        "batch_records_bucket",
        "batch_bytes_bucket",
        "phase_seconds_bucket",
        "database_step_seconds_bucket",
        "kafka_step_seconds_bucket",
        "end_to_end_seconds_bucket",
        "lag_records",
        "lag_seconds",
        "database_errors_total",
        "partitions_assigned",
        "partitions_halted",
        "rebalances_total",
        "lane_resets_total",
        "database_up",
        "broker_up",
        "build_info",
    ] {
        assert!(names.contains(format!("payment_writer_{name}").as_str()), "{name} is not among {names:?}");
    }
    // AND each of them is documented, with its labels and, if there are few, their values
    let page = metrics_page();
    for (name, labels, _) in &samples {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
            let family = name.strip_suffix(end)?;
            page.get(family).filter(|entry| entry.kind == "histogram")
        });
        let entry =
            page.get(name).or(family).unwrap_or_else(|| panic!("{name} is not in docs/reference/metrics.md"));
        for (label, value) in labels.iter().filter(|(label, _)| *label != "le") {
            assert!(entry.labels.contains(&format!("`{label}`")), "{name} has a label {label}");
            let is_any = ["lane", "partition", "version", "group"].contains(&label.as_str());
            assert!(is_any || entry.labels.contains(&format!("`{value}`")), "{name} has {label}={value}");
        }
    }
    for (name, expected) in [
        ("input_partitions", 3.0),
        ("ready", 1.0),
        ("missing", 0.0),
        ("breaker_open", 0.0),
        ("oldest_pending_seconds", 0.0),
        ("replayed_records_total", 10.0),
    ] {
        assert_eq!(count(name, ""), expected, "{name}");
    }
    wait_until("the topic's retention is known", || count("input_retention_seconds", "") > 3_600.0);
    assert!(count("memory_limit_bytes", "") > 1e8);
    assert!(daemon.metric("process_resident_memory_bytes", "") > 1e6);
    assert!(daemon.metric("process_open_fds", "") > 10.0);
    assert!(count("build_info", &format!(r#"group="{}""#, scope.group_id)) == 1.0);
    let mut values: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (_, labels, _) in &samples {
        for (label, value) in labels {
            values.entry(label).or_default().insert(value);
        }
    }
    let labels: BTreeSet<&str> = values.keys().copied().collect();
    let allowed = BTreeSet::from([
        "age",
        "class",
        "client",
        "dependency",
        "group",
        "kind",
        "lane",
        "le",
        "outcome",
        "partition",
        "phase",
        "probe",
        "reason",
        "result",
        "setting",
        "sqlstate_class",
        "step",
        "task",
        "topic",
        "version",
        "what",
    ]);
    assert!(labels.is_subset(&allowed), "{labels:?}");
    for (label, found) in &values {
        assert!(found.len() <= 40, "label {label} has {} values: {found:?}", found.len());
    }
    assert_eq!(values["partition"], BTreeSet::from(["0", "1", "2"]));
    assert_eq!(values["client"], BTreeSet::from(["producer", "reader"]));
    assert_eq!(values["topic"], BTreeSet::from(["dead_letter", "email", "input", "read"]));
    assert_eq!(values["kind"], BTreeSet::from(["assigned", "lost", "revoked"]));
    assert_eq!(values["reason"].len(), 11);
    assert_eq!(values["outcome"], BTreeSet::from(["dead_lettered", "duplicate", "redelivered", "written"]));

    // AND the status page has each partition's positions, and the build
    wait_until("the status page has all partitions", || {
        json(&daemon, "/status")
            .is_some_and(|(_, status)| status["partitions"].as_object().unwrap().len() == 3)
    });
    let (code, status) = json(&daemon, "/status").unwrap();
    assert_eq!(code, 200);
    assert_eq!(status["breaker"], "closed");
    assert!(status["build"]["version"].as_str().unwrap().starts_with(env!("CARGO_PKG_VERSION")));
    assert_eq!(status["totals"]["written"], 60);
    assert_eq!(status["totals"]["duplicates"], 7);
    assert_eq!(status["totals"]["dead_letters"], 8);
    for partition in 0..3 {
        let end = places.iter().filter(|(p, _)| *p == partition).count();
        let found = &status["partitions"][partition.to_string()];
        for position in ["applied", "published", "end"] {
            assert_eq!(found[position], end, "{position} of partition {partition}: {found}");
        }
        assert_eq!(found["state"], "live");
        assert!(found["unpublished_from"].is_null(), "{found}");
        assert_eq!(found["lag_records"], 0);
        assert_eq!(found["lag_seconds"], 0.0);
    }
}

#[test]
fn lag_is_reported_in_records_and_seconds() {
    // GIVEN a daemon that has caught up with old records
    let scope = Scope::ready("lag", 1, 1);
    let daemon = scope.daemon(&["run"]);
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);
    wait_until("the payment is written", || scope.count("payment_core") == 1);

    // WHEN a lock blocks writes to the database, and records wait
    let lock = scope.connect();
    crate::support::block_on(lock.batch_execute("BEGIN; LOCK TABLE payment_writer.payment_core")).unwrap();
    scope.produce(&scope.input_topic, (2..12).map(|seed| Payment::new(uuid_v4(seed), 31).message()));

    // THEN status and metrics show how many wait, and the age of the last written one
    wait_until("10 records of lag", || {
        daemon.metric("payment_writer_lag_records", r#"partition="0""#) == 10.0
    });
    let status = json(&daemon, "/status").unwrap().1;
    assert_eq!(status["partitions"]["0"]["lag_records"], 10);
    assert_eq!(status["partitions"]["0"]["published"], 1);
    assert_eq!(status["partitions"]["0"]["end"], 11);
    // The last written one has a timestamp in the distant past.
    let years_ago = 365.0 * 86_400.0;
    assert!(status["partitions"]["0"]["lag_seconds"].as_f64().unwrap() > years_ago);
    assert!(daemon.metric("payment_writer_lag_seconds", "") > years_ago);
    assert!(daemon.metric("payment_writer_oldest_pending_seconds", "") > years_ago);

    // AND the log names who holds the lock, since when, and of what
    wait_until("the lock is named", || {
        let log = daemon.log();
        log.contains("a lock is held by the session with pid")
            && log.contains(" (idle in transaction, in a transaction since 20")
            && log.contains("Z), on payment_core; if")
    });

    // AND both are 0 when they are written
    crate::support::block_on(lock.batch_execute("COMMIT")).unwrap();
    wait_until("no lag", || daemon.metric("payment_writer_lag_records", r#"partition="0""#) == 0.0);
    assert_eq!(daemon.metric("payment_writer_lag_seconds", ""), 0.0);
    assert_eq!(scope.count("payment_core"), 11);
}

#[test]
fn lag_is_reported_for_a_partition_without_written_records() {
    // GIVEN a lock that blocks writes to the database, and a daemon that has just started
    let scope = Scope::ready("first_lag", 1, 1);
    let lock = scope.connect();
    crate::support::block_on(lock.batch_execute("BEGIN; LOCK TABLE payment_writer.payment_core")).unwrap();
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();

    // WHEN the first records arrive, with a timestamp in the distant past
    scope.produce(&scope.input_topic, (1..4).map(|seed| Payment::new(uuid_v4(seed), 31).message()));

    // THEN their number and age are reported
    wait_until("3 records of lag", || daemon.metric("payment_writer_lag_records", "") == 3.0);
    wait_until("their age", || daemon.metric("payment_writer_lag_seconds", "") > 365.0 * 86_400.0);
    crate::support::block_on(lock.batch_execute("COMMIT")).unwrap();
    wait_until("no lag", || daemon.metric("payment_writer_lag_records", "") == 0.0);
    assert_eq!(daemon.metric("payment_writer_oldest_pending_seconds", ""), 0.0);
}

#[test]
fn the_log_level_can_be_read_and_changed_while_the_daemon_runs() {
    // GIVEN a daemon that logs errors only
    let scope = Scope::ready("log_level", 1, 1);
    let daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__LOG__LEVEL", "error")]);
    daemon.wait_until_ready();
    let level = || daemon.get("/log-level").unwrap().body;
    let sent = std::cell::Cell::new(0.0);
    let settle = |message: Message| {
        scope.produce(&scope.input_topic, [message]);
        sent.set(sent.get() + 1.0);
        wait_until("it has its outcome", || daemon.metric("payment_writer_records_total", "") == sent.get());
    };
    let send_bad_record = || settle(Message::new("1", "{}").timestamp_ms(AT_MS));
    let told = || daemon.log().matches("a record is a dead letter").count();
    assert_eq!(level(), "error\n");
    send_bad_record();
    assert_eq!(told(), 0);

    // WHEN a filter is invalid, it is rejected with the reason
    for (bad, why) in [
        ("inof", "not a level"),
        ("payment_writer=loud", "error parsing"),
        ("info,[span{field=x}]=debug", "brackets"),
        ("", "empty"),
    ] {
        let reply = daemon.put("/log-level", bad).unwrap();
        assert_eq!(reply.status, 400, "{bad}");
        assert!(reply.body.contains(why), "{bad}: {}", reply.body);
    }
    assert_eq!(daemon.put("/log-level", &"a=info,".repeat(200)).unwrap().status, 413);
    assert_eq!(level(), "error\n");

    // WHEN everything is logged, the log contains no data of a payment
    assert_eq!(daemon.put("/log-level", "debug,tokio_postgres::query=trace").unwrap().status, 200);
    let id = uuid_v4(7);
    settle(Payment::new(id, 31).message());
    let log = daemon.log();
    let says = |line: &str| line.contains("tokio_postgres") && !line.contains("level was changed");
    assert!(!log.contains(&id.to_string()) && !log.lines().any(says), "{log}");
    assert_eq!(daemon.put("/log-level", "error").unwrap().status, 200);

    // WHEN the filter is valid, it takes effect, and can be set back
    assert_eq!(daemon.put("/log-level", "warn,payment_writer::lane=info\n").unwrap().status, 200);
    assert_eq!(level(), "warn,payment_writer::lane=info\n");
    send_bad_record();
    wait_until("the change is logged", || told() == 1);
    assert_eq!(daemon.put("/log-level", "off").unwrap().status, 200);
    send_bad_record();
    assert_eq!(told(), 1);

    // AND each change is logged, at any level
    let log = daemon.log();
    for change in ["from=error to=\"warn,payment_writer::lane=info\"", "to=\"off\""] {
        assert!(log.contains(change), "{change} is not in\n{log}");
    }
}

#[test]
fn lag_is_reported_during_a_database_outage_and_after_a_restart_in_it() {
    // GIVEN a daemon that has caught up, on a topic without retention
    let scope = Scope::new(crate::support::Servers::shared(), "lag_outage");
    scope.create_topic_with(&scope.input_topic, 1, &[("retention.ms", "-1")]);
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        scope.create_topic(topic, 1);
    }
    scope.command(&["migrate"]).succeeds();
    let member = Member::new("a").soon_forgotten().with("LANES", "1");
    let mut daemon = member.start(&scope);
    let payment = |seed| Message { timestamp_ms: None, ..Payment::new(uuid_v4(seed), 31).message() };
    scope.produce(&scope.input_topic, [payment(1)]);
    wait_until("the payment is written", || scope.count("payment_core") == 1);
    wait_until("unlimited retention is reported", || {
        daemon.metric("payment_writer_input_retention_seconds", "") == f64::INFINITY
    });
    let pending = |daemon: &Daemon| daemon.metric("payment_writer_oldest_pending_seconds", "");
    let open = |daemon: &Daemon, dependency: &str| {
        let label = format!("dependency=\"{dependency}\"");
        daemon.metric("payment_writer_breaker_open", &label)
    };
    wait_until("it has caught up", || pending(&daemon) == 0.0);
    assert_eq!((open(&daemon, "database"), open(&daemon, "broker")), (0.0, 0.0));

    // WHEN new connections to the database are rejected, and records wait
    let database = &scope.database;
    scope.on_server(&[format!("ALTER DATABASE \"{database}\" ALLOW_CONNECTIONS false")]);
    scope.cut_connections();
    scope.produce(&scope.input_topic, [payment(2), payment(3)]);

    // THEN it reports that, and for how long
    wait_until("the backoff is reported", || open(&daemon, "database") == 1.0);
    wait_until("their age is reported", || pending(&daemon) > 0.5);
    assert_eq!(daemon.metric("payment_writer_database_up", ""), 0.0);
    assert_eq!(open(&daemon, "broker"), 0.0);

    // AND so does one that was started meanwhile and has read no record yet
    daemon.kill();
    let daemon = member.start(&scope);
    wait_until("the backoff is reported", || open(&daemon, "database") == 1.0);
    wait_until("their age is reported", || pending(&daemon) > 0.5);

    // WHEN the database is back, lag returns to 0
    scope.on_server(&[format!("ALTER DATABASE \"{database}\" ALLOW_CONNECTIONS true")]);
    wait_until("the payments are written", || scope.count("payment_core") == 3);
    wait_until("nothing is pending", || {
        daemon.metric("payment_writer_partitions_assigned", "") == 1.0 && pending(&daemon) == 0.0
    });
    assert_eq!(open(&daemon, "database"), 0.0);
    assert_eq!(daemon.metric("payment_writer_database_up", ""), 1.0);
}
