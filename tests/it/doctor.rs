//! `doctor` names what would stop or harm the daemon, with its remedy, and writes nothing.

use std::collections::BTreeMap;

use payment_writer::dependencies::Dependency;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::Value;
use strum::VariantArray;

use crate::input::set_topic;
use crate::security::make_certificates;
use crate::support::{DEADLINE, Finished, Load, PATIENCE, Scope, Servers, free_address, wait_until_within};

/// The findings, and the exit code.
fn examine(scope: &Scope<'_>, settings: &[(&str, &str)]) -> (Vec<Value>, Finished) {
    let own = [("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "drain")];
    let finished = scope.command_with(&["doctor", "--json"], &[&own[..], settings].concat());
    assert!(!finished.stdout.contains("sesame") && !finished.stderr.contains("sesame"), "{finished:?}");
    let found: Vec<Value> = serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("{finished:?}"));
    (found, finished)
}

fn text<'v>(finding: &'v Value, field: &str) -> &'v str {
    finding[field].as_str().unwrap()
}

/// The findings of this severity, as `what where`.
fn of(severity: &str, found: &[Value]) -> Vec<String> {
    let of = found.iter().filter(|finding| finding["severity"] == severity);
    of.map(|finding| format!("{} {}", text(finding, "what"), text(finding, "where"))).collect()
}

/// Checks that there is an error with this name, place and remedy.
#[track_caller]
fn names(found: &[Value], what: &str, place: &str, remedy: &str) {
    let is_this =
        |f: &&Value| f["what"] == what && text(f, "where").contains(place) && f["severity"] == "error";
    let finding =
        found.iter().find(is_this).unwrap_or_else(|| panic!("no error {what} at {place}: {found:#?}"));
    assert!(text(finding, "remedy").contains(remedy), "{finding}");
}

/// End offsets of all topics, the group's offsets, and a hash of each table.
fn state(scope: &Scope<'_>) -> String {
    let consumer: BaseConsumer = scope.client_config().create().unwrap();
    let metadata = consumer.fetch_metadata(None, DEADLINE).unwrap();
    let prefix = scope.input_topic.strip_suffix("input").unwrap();
    let ends = metadata.topics().iter().filter(|topic| topic.name().starts_with(prefix)).map(|topic| {
        let end = |p: &rdkafka::metadata::MetadataPartition| {
            consumer.fetch_watermarks(topic.name(), p.id(), DEADLINE).unwrap().1
        };
        (topic.name().to_owned(), topic.partitions().iter().map(end).collect())
    });
    let tables = scope.sql(
        "SELECT relname || ' ' || (xpath('//row/h/text()', query_to_xml(format(
             'SELECT md5(coalesce(string_agg(t::text, '','' ORDER BY t::text), '''')) AS h FROM payment_writer.%I t',
             relname), false, false, '')))[1]::text
         FROM pg_class WHERE relnamespace = 'payment_writer'::regnamespace AND relkind IN ('r', 'p') ORDER BY 1",
        &[],
    );
    let tables: Vec<String> = tables.iter().map(|row| row.get(0)).collect();
    format!("{:#?}", (ends.collect::<BTreeMap<String, Vec<i64>>>(), scope.committed_all(), tables))
}

#[test]
fn a_healthy_installation_is_fine_and_nothing_is_written() {
    // GIVEN nothing THEN topics and schema are missing, and none is made
    let scope = Scope::new(Servers::shared(), "doctor_fine");
    let (found, finished) = examine(&scope, &[]);
    assert_eq!(finished.code, Some(1));
    names(&found, "input_topic", &scope.input_topic, "payment-writer topics create");
    names(&found, "output_topics", &scope.read_topic, "payment-writer topics create");
    names(&found, "schema_version", &scope.database, "payment-writer migrate");
    let create = ["topics", "create", "--partitions", "2", "--output-partitions", "1"];

    // GIVEN what docs/how-to/deploy.md makes, before the first start
    let made = scope.command(&create).succeeds().stdout;
    assert_eq!(made.matches(": created").count(), 4, "{made}");
    scope.command(&["migrate"]).succeeds();
    let fine = |when: &str| {
        let before = state(&scope);
        let (found, finished) = examine(&scope, &[]);
        // THEN each dependency is found to be met, and the cluster of one broker is warned of
        assert_eq!(finished.code, Some(0), "{when}: {found:#?}");
        assert!(of("error", &found).is_empty(), "{when}: {found:#?}");
        let warned = of("warn", &found);
        assert!(warned.iter().all(|what| what.starts_with("replication ")), "{when}: {warned:?} {found:#?}");
        let ok = of("ok", &found);
        for dependency in Dependency::VARIANTS.iter().filter(|d| **d != Dependency::Replication) {
            let name = format!("{} ", dependency.name());
            assert!(ok.iter().any(|what| what.starts_with(&name)), "{when}: {name}: {found:#?}");
        }
        assert_eq!(state(&scope), before, "{when}");
    };
    fine("before the first start");

    // AND after it has written payments, and beside it
    scope.produce(&scope.input_topic, Load::new(81).take(100));
    scope.drain();
    fine("after a run");
    let mut daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "drain")]);
    daemon.wait_until_ready();
    fine("beside a daemon");
    assert!(daemon.is_running());
    assert!(!daemon.log().contains("fenced"), "{}", daemon.log());

    // AND another group is told that the database is not its own
    let other = format!("{}_other", scope.group_id);
    let (found, finished) = examine(&scope, &[("PAYMENT_WRITER__KAFKA__GROUP_ID", &*other)]);
    assert_eq!(finished.code, Some(1));
    names(&found, "binding", &other, "kafka.group_id");

    // AND the table says the same in one line each
    let said = scope.command(&["doctor"]).succeeds().stdout;
    assert!(said.lines().last().unwrap().starts_with("0 errors, "), "{said}");
    assert!(said.lines().any(|line| line.starts_with("ok ") && line.contains(" cleanup_policy ")), "{said}");
}

#[test]
fn what_is_wrong_with_topics_schema_and_role_is_named_with_its_remedy() {
    // GIVEN a compacted input, outputs that take nothing or little, lost keys, and a role without a grant
    let scope = Scope::new(Servers::shared(), "doctor_wrong");
    scope.create_topic_with(
        &scope.input_topic,
        2,
        &[("cleanup.policy", "compact"), ("retention.ms", "1000")],
    );
    scope.create_topic_with(&scope.read_topic, 1, &[("min.insync.replicas", "2")]);
    scope.create_topic_with(&scope.email_topic, 1, &[]);
    scope.create_topic_with(&scope.dead_letter_topic, 1, &[("max.message.bytes", "100000")]);
    scope.command(&["migrate"]).succeeds();
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    let user = format!("{}_user", scope.database);
    scope.execute_as_admin(&format!(
        "CREATE ROLE \"{user}\" LOGIN PASSWORD 'sesame' IN ROLE payment_writer_app;
         REVOKE INSERT ON payment_writer.payment_notes FROM payment_writer_app;
         ALTER TABLE payment_writer.idempotency_g1 DROP CONSTRAINT idempotency_g1_pkey;
         ALTER TABLE payment_writer.payment_core ALTER amount DROP NOT NULL"
    ));
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{user}:sesame@"));
    let owner = scope.postgres_url();
    let settings =
        [("PAYMENT_WRITER__POSTGRES__URL", &*url), ("PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL", &*owner)];

    // THEN each is named with its remedy
    let (found, finished) = examine(&scope, &settings);
    assert_eq!(finished.code, Some(1), "{found:#?}");
    let of_topic =
        |topic: &str, setting: &str| format!("--entity-name {topic} --alter --add-config {setting}");
    let compacted = of_topic(&scope.input_topic, "cleanup.policy=delete");
    names(&found, "cleanup_policy", &scope.input_topic, &compacted);
    let insync = of_topic(&scope.read_topic, "min.insync.replicas=1");
    names(&found, "output_replicas", &scope.read_topic, &insync);
    let size = of_topic(&scope.dead_letter_topic, "max.message.bytes=1048576");
    names(&found, "output_sizes", &scope.dead_letter_topic, &size);
    let key = "ALTER TABLE payment_writer.idempotency_g1 ADD PRIMARY KEY (message_id)";
    names(&found, "generation_key", &scope.database, key);
    names(&found, "schema_shape", &scope.database, "ALTER TABLE");
    names(&found, "role_rights", &scope.database, "-f sql/roles.sql");
    assert!(found.iter().any(|f| text(f, "says") == "missing: INSERT on payment_notes"), "{found:#?}");
    let warned = of("warn", &found);
    assert!(warned.contains(&format!("input_retention {}", scope.input_topic)), "{warned:?}");
    assert_eq!(of("error", &found).len(), 6, "{found:#?}");

    scope.execute_as_admin(&format!("DROP OWNED BY payment_writer_app; DROP ROLE \"{user}\""));
}

#[test]
fn with_one_server_away_the_findings_about_the_other_are_still_there() {
    // GIVEN a compacted input, and a generation without its key
    let scope = Scope::new(Servers::shared(), "doctor_away");
    scope.create_topics(1, 1);
    set_topic(&scope, &scope.input_topic, "cleanup.policy", "compact");
    scope.command(&["migrate"]).succeeds();
    scope.execute("ALTER TABLE payment_writer.idempotency_g1 DROP CONSTRAINT idempotency_g1_pkey");

    // WHEN the database does not answer
    let nowhere = format!("postgresql://somebody:sesame@{}/none", free_address());
    let (found, finished) = examine(&scope, &[("PAYMENT_WRITER__POSTGRES__URL", &*nowhere)]);
    assert_eq!(finished.code, Some(1));
    names(&found, "database_reachable", "somebody", "postgres.url");
    names(&found, "cleanup_policy", &scope.input_topic, "cleanup.policy=delete");
    // THEN what could not be checked is said
    assert!(of("warn", &found).contains(&"schema_shape postgres".to_owned()), "{found:#?}");

    // WHEN the brokers do not answer
    let nowhere = free_address().to_string();
    let (found, finished) = examine(&scope, &[("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", &*nowhere)]);
    assert_eq!(finished.code, Some(1));
    names(&found, "brokers_reachable", &nowhere, "kafka.bootstrap_servers");
    names(&found, "generation_key", &scope.database, "ADD PRIMARY KEY (message_id)");
    assert!(of("warn", &found).contains(&"cleanup_policy kafka".to_owned()), "{found:#?}");
}

#[test]
fn missing_rights_on_topics_group_and_transactional_ids_are_named_with_the_command_that_grants_them() {
    // GIVEN a principal with rights on all topics but Write on one output, and none on the transactional ids
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "doctor_rights");
    scope.prepare(2, 1);
    let ca = folder.path().join("ca.crt");
    let settings = [
        ("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", servers.kafka_secure()),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SASL_SSL"),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_MECHANISM", "SCRAM-SHA-512"),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_USERNAME", "writer"),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_PASSWORD", "sesame"),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SSL_CA_LOCATION", ca.to_str().unwrap()),
    ];
    let transactions =
        format!("--transactional-id {}-drain- --resource-pattern-type prefixed", scope.group_id);

    // THEN without any right each one is named
    let (found, finished) = examine(&scope, &settings);
    assert_eq!(finished.code, Some(1));
    names(&found, "input_rights", &scope.input_topic, "--operation Read --operation Describe");
    names(&found, "group_rights", &scope.group_id, &format!("--group {}", scope.group_id));
    names(&found, "transaction_rights", &scope.group_id, &transactions);

    // AND with most of them, those that are missing
    let add = |arguments: &[&str]| {
        let tool = ["AclCommand", "--add", "--allow-principal", "User:writer"];
        servers.kafka_tool(&[&tool[..], arguments].concat());
    };
    let all = [&scope.input_topic, &scope.read_topic, &scope.email_topic, &scope.dead_letter_topic];
    let topics: Vec<&str> = all.iter().flat_map(|topic| ["--topic", topic]).collect();
    let reads = ["--operation", "Read", "--operation", "Describe", "--group", &scope.group_id];
    add(&[&reads[..], &topics].concat());
    add(&["--operation", "Write", "--topic", &scope.read_topic, "--topic", &scope.email_topic]);
    let (found, finished) = examine(&scope, &settings);
    assert_eq!(finished.code, Some(1));
    names(&found, "output_rights", &scope.dead_letter_topic, &format!("--topic {}", scope.dead_letter_topic));
    assert!(found.iter().any(|f| text(f, "says") == "missing: WRITE"), "{found:#?}");
    names(&found, "transaction_rights", &format!("{}-drain-", scope.group_id), &transactions);
    assert_eq!(of("error", &found).len(), 2, "{found:#?}");

    // AND what cannot be asked without further rights is said, never passed over
    let warned = of("warn", &found);
    for topic in all {
        assert!(warned.contains(&format!("cleanup_policy {topic}")), "{warned:?}");
    }
    assert!(warned.iter().any(|what| what.starts_with("session_timeout broker")), "{warned:?}");
}

#[test]
fn what_others_added_to_the_tables_and_what_they_detached_is_named() {
    // GIVEN a schema with a trigger, a rule, a constraint and a column of others, and a month that is detached
    let scope = Scope::ready("doctor_others", 1, 1);
    scope.execute(
        "CREATE FUNCTION payment_writer.nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
         CREATE TRIGGER theirs BEFORE INSERT ON payment_writer.payment_core
             FOR EACH ROW EXECUTE FUNCTION payment_writer.nothing();
         CREATE RULE keep AS ON DELETE TO payment_writer.idempotency_g1 DO INSTEAD NOTHING;
         ALTER TABLE payment_writer.payment_notes ADD CONSTRAINT short CHECK (length(comment) < 20);
         ALTER TABLE payment_writer.payment_metadata ADD COLUMN tenant integer NOT NULL",
    );
    let month: String =
        scope.sql("SELECT to_char(now() AT TIME ZONE 'UTC', '\"payment_core_\"YYYY_MM')", &[])[0].get(0);
    let detach = format!("ALTER TABLE payment_writer.payment_core DETACH PARTITION payment_writer.{month}");
    scope.command(&["prune"]).succeeds();
    scope.execute(&detach);

    // THEN each is named
    let (found, finished) = examine(&scope, &[]);
    assert_eq!(finished.code, Some(1));
    names(&found, "foreign_columns", &scope.database, "DROP NOT NULL");
    assert_eq!(of("error", &found).len(), 1, "{found:#?}");
    let warned = |what: &str| {
        let finding = found.iter().find(|f| f["what"] == what && f["severity"] == "warn");
        text(finding.unwrap_or_else(|| panic!("no {what}: {found:#?}")), "says")
    };
    for name in
        ["trigger theirs on payment_core", "rule keep on idempotency_g1", "constraint short on payment_notes"]
    {
        assert!(warned("foreign_objects").contains(name), "{name}: {}", warned("foreign_objects"));
    }
    assert!(warned("months").contains(&format!("{month} is detached")), "{}", warned("months"));

    // AND beside a daemon what keeps it from being ready
    let mut daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "drain")]);
    scope.produce(&scope.input_topic, Load::without_bad_records(82).take(20));
    wait_until_within(PATIENCE, "it waits", || {
        daemon.get("/readyz").is_some_and(|reply| reply.body.contains("column tenant"))
    });
    let admin = daemon.admin.to_string();
    let (found, _) = examine(&scope, &[("PAYMENT_WRITER__ADMIN__LISTEN", &*admin)]);
    let readiness = found.iter().find(|f| f["what"] == "readiness").unwrap_or_else(|| panic!("{found:#?}"));
    assert_eq!(readiness["severity"], "warn");
    assert!(text(readiness, "says").contains("column tenant"), "{readiness}");
    daemon.kill();
}
