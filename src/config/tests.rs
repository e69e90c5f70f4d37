use super::*;
use std::fs;
use std::time::Duration;

use serde_json::Value;

fn load(toml: &str, variables: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("settings.toml");
    fs::write(&path, toml).unwrap();
    let variables = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Settings::load_from(Some(&path), Path::new("nowhere.toml"), variables)
}

fn problems(toml: &str, variables: &[(&str, &str)]) -> String {
    load(toml, variables).unwrap_err().to_string()
}

#[test]
fn without_file_and_environment_the_defaults_apply() {
    let loaded = Settings::load_from(None, Path::new("nowhere.toml"), []).unwrap();
    assert_eq!(loaded.file, None);
    assert!(loaded.effective.iter().all(|e| e.origin == Origin::Default));
    let s = loaded.settings;
    assert_eq!(s.kafka.bootstrap_servers, "127.0.0.1:9092");
    assert_eq!(s.kafka.group_id, "payment-writer");
    assert_eq!(s.kafka.instance_id, gethostname::gethostname().to_string_lossy());
    assert_eq!(s.kafka.dead_letter_topic, "payment_writer_topic.dlq");
    assert!(s.kafka.publish);
    assert_eq!(s.postgres.url, s.postgres.housekeeping_url);
    assert_eq!((s.lanes, s.batch.max_payments), (2, 20_000));
    assert_eq!(s.batch.max_bytes, 16 << 20);
    assert_eq!(s.batch.linger, Duration::from_millis(25));
    assert_eq!(s.payment.types, ["BWI", "VSA", "MSC"]);
    assert_eq!(s.payment.max_bytes, 16_384);
    assert_eq!(s.email.statuses, [2]);
    assert_eq!(s.idempotency.window, Duration::from_secs(7 * 86_400));
    assert_eq!(s.idempotency.prune_schedule.unwrap().to_string(), "0 3 * * 0");
    assert_eq!(s.audit, AuditSettings { share: 0.001 });
    assert_eq!(s.retention.payment_months, None);
    assert_eq!(s.admin.listen.to_string(), "127.0.0.1:9464");
    assert_eq!(s.shutdown.timeout, Duration::from_secs(30));
    assert_eq!((s.log.format, s.log.level.as_str()), (LogFormat::Text, "info"));
    assert_eq!(s.tracing, TracingSettings { otlp_endpoint: None, sample_ratio: 0.01 });
}

#[test]
fn the_shipped_file_says_what_the_defaults_are() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_PATH);
    let from_file = Settings::load_from(Some(&shipped), Path::new("nowhere.toml"), []).unwrap();
    let defaults = Settings::load_from(None, Path::new("nowhere.toml"), []).unwrap();
    assert_eq!(from_file.settings, defaults.settings);
    let text = fs::read_to_string(&shipped).unwrap();
    for Effective { key, .. } in &defaults.effective {
        let name = key.rsplit('.').next().unwrap();
        let documented = text
            .lines()
            .map(|line| line.trim_start_matches(['#', ' ']))
            .any(|line| line.starts_with(&format!("{name} =")) || line == format!("[{key}]"));
        assert!(documented, "{key} is not in {DEFAULT_PATH}");
    }
}

#[test]
fn the_environment_overrides_the_file_and_each_value_knows_its_origin() {
    let loaded = load(
        "lanes = 4\n[kafka]\ngroup_id = \"file\"\ninput_topic = \"in\"\n[kafka.properties]\n\"client.rack\" = \"a\"\n",
        &[
            ("PAYMENT_WRITER__KAFKA__GROUP_ID", "environment"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "9000"),
            ("PAYMENT_WRITER_CONFIG", "/not/read/because/a/path/was/given"),
            ("PAYMENT_WRITER_SERVICE_HOST", "made up by a platform"),
        ],
    )
    .unwrap();
    let origin = |key: &str| loaded.effective.iter().find(|e| e.key == key).unwrap().origin.clone();
    assert_eq!(loaded.settings.kafka.group_id, "environment");
    assert_eq!(loaded.settings.kafka.input_topic, "in");
    assert_eq!(loaded.settings.lanes, 4);
    assert_eq!(origin("kafka.group_id"), Origin::Environment("PAYMENT_WRITER__KAFKA__GROUP_ID".into()));
    assert_eq!(origin("kafka.input_topic"), Origin::File(loaded.file.clone().unwrap()));
    assert_eq!(origin("kafka.read_topic"), Origin::Default);
    let properties = &loaded.settings.kafka.properties;
    assert_eq!(properties.get("client.rack"), Some("a"));
    assert_eq!(properties.get("session.timeout.ms"), Some("9000"));
    assert_eq!(origin("kafka.properties.\"client.rack\""), Origin::File(loaded.file.clone().unwrap()));
}

#[test]
fn a_token_command_may_have_commas_and_is_asked_for_where_tokens_are_used_alone() {
    let mechanism = ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_MECHANISM", "OAUTHBEARER");
    let command = |text| [mechanism, ("PAYMENT_WRITER__KAFKA__TOKEN_COMMAND", text)];
    let taken = |text| load("", &command(text)).unwrap().settings.kafka.token_command;
    assert_eq!(taken(r#"["sh", "-c", "a, b"]"#), ["sh", "-c", "a, b"]);
    assert_eq!(taken("/usr/bin/token, 1"), ["/usr/bin/token, 1"]);
    let from_file = load("[kafka]\ntoken_command = [\"a\", \"b\"]", &[mechanism]).unwrap();
    assert_eq!(from_file.settings.kafka.token_command, ["a", "b"]);
    assert!(load("", &[]).unwrap().settings.kafka.token_command.is_empty());

    // Neither without the other, and in one way only.
    for variables in [
        vec![mechanism],
        vec![command("token")[1]],
        command("[broken").to_vec(),
        [&command("token")[..], &[("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_OAUTHBEARER_CONFIG", "x")]]
            .concat(),
    ] {
        let refused = load("", &variables).unwrap_err().to_string();
        assert!(refused.contains("kafka.token_command"), "{refused}");
    }
}

#[test]
fn a_password_comes_from_one_place_and_its_file_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    let path = file.to_str().unwrap();
    let password_file = ("PAYMENT_WRITER__KAFKA__PASSWORD_FILE", path);
    let refusal = |variables: &[(&str, &str)]| load("", variables).unwrap_err().to_string();
    assert!(refusal(&[password_file]).contains("must be the path of a file"));
    std::fs::write(&file, "\n").unwrap();
    assert!(refusal(&[password_file]).contains("must be the path of a file"));
    std::fs::write(&file, "sesame\r\n").unwrap();
    let property = ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_PASSWORD", "hush");
    let both = refusal(&[password_file, property]);
    assert!(both.contains("cannot be combined with sasl.password") && !both.contains("hush"), "{both}");
    let location = ("PAYMENT_WRITER__KAFKA__PROPERTIES__SSL_CA_LOCATION", "/etc/ca.pem");
    let kafka = load("", &[password_file, location]).unwrap().settings.kafka;
    assert_eq!(kafka.password().unwrap().as_deref(), Some("sesame"));
    assert_eq!(kafka.files().collect::<Vec<_>>(), ["/etc/ca.pem", path]);

    let command = ("PAYMENT_WRITER__POSTGRES__PASSWORD_COMMAND", r#"["print", "it"]"#);
    let urls = |url, owner| {
        let owner = ("PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL", owner);
        load("", &[command, ("PAYMENT_WRITER__POSTGRES__URL", url), owner])
    };
    let (url, with_password) = ("postgres://u@db/x", "postgres://o:hush@db/x");
    let postgres = urls(url, with_password).unwrap().settings.postgres;
    assert_eq!(postgres.url.password_command, ["print", "it"]);
    assert!(postgres.housekeeping_url.password_command.is_empty());
    let both = urls(with_password, url).unwrap_err().to_string();
    assert!(both.contains("postgres.password_command") && !both.contains("hush"), "{both}");
}

#[test]
fn lists_numbers_and_flags_can_be_given_by_environment() {
    let s = load(
        "",
        &[
            ("PAYMENT_WRITER__PAYMENT__TYPES", "BWI, XYZ"),
            ("PAYMENT_WRITER__EMAIL__STATUSES", "2,-2"),
            ("PAYMENT_WRITER__KAFKA__PUBLISH", "false"),
            ("PAYMENT_WRITER__LANES", "8"),
            ("PAYMENT_WRITER__BATCH__MAX_BYTES", "1MiB"),
            ("PAYMENT_WRITER__IDEMPOTENCY__PRUNE_SCHEDULE", ""),
        ],
    )
    .unwrap()
    .settings;
    assert_eq!(s.payment.types, ["BWI", "XYZ"]);
    assert_eq!(s.email.statuses, [2, -2]);
    assert!(!s.kafka.publish);
    assert_eq!(s.lanes, 8);
    assert_eq!(s.batch.max_bytes, 1 << 20);
    assert_eq!(s.idempotency.prune_schedule, None);
    let traces = |endpoint: &str, ratio: &str| {
        let names = ["PAYMENT_WRITER__TRACING__OTLP_ENDPOINT", "PAYMENT_WRITER__TRACING__SAMPLE_RATIO"];
        load("", &[(names[0], endpoint), (names[1], ratio)]).map(|loaded| loaded.settings.tracing)
    };
    let tracing = traces("http://collector:4318/", "1").unwrap();
    assert_eq!(
        (tracing.otlp_endpoint.as_deref(), tracing.sample_ratio),
        (Some("http://collector:4318/"), 1.0)
    );
    for (endpoint, ratio) in
        [("https://c:4318", "1"), ("c:4318", "1"), ("http://c", "1"), ("", "1.1"), ("", "nan")]
    {
        assert!(traces(endpoint, ratio).is_err(), "{endpoint} {ratio}");
    }
    assert!(load("[email]\nstatuses = []", &[]).unwrap().settings.email.statuses.is_empty());
}

#[test]
fn an_unknown_name_is_an_error_that_names_the_nearest_known_one() {
    let text =
        problems("[kafka]\ngroupid = \"x\"\n[kafak]\nx = 1", &[("PAYMENT_WRITER__KAFKA__GROUPID", "x")]);
    assert!(text.contains("unknown setting kafka.groupid (file "), "{text}");
    assert!(text.contains("the nearest known one is kafka.group_id"), "{text}");
    assert!(text.contains("unknown setting PAYMENT_WRITER__KAFKA__GROUPID in the environment"), "{text}");
    assert!(text.contains("the nearest known one is PAYMENT_WRITER__KAFKA__GROUP_ID"), "{text}");
    assert!(text.contains("unknown setting kafak"), "{text}");
    let text = problems("[kafka.properties]\n\"secruity.protocol\" = \"SSL\"", &[]);
    assert!(text.contains("nearest known one is kafka.properties.\"security.protocol\""), "{text}");
}

#[test]
fn all_problems_are_reported_at_once_each_with_what_is_allowed_and_its_origin() {
    let text = problems(
        r#"
lanes = 0
[kafka]
bootstrap_servers = "nowhere"
publish = "yes"
read_topic = "payment_email"
[batch]
linger = 5
max_bytes = "8 MB of ram"
max_payments = 100001
[payment]
types = []
[email]
statuses = [1]
[log]
level = "inof"
"#,
        &[("PAYMENT_WRITER__ADMIN__LISTEN", "localhost"), ("PAYMENT_WRITER__IDEMPOTENCY__WINDOW", "7")],
    );
    for expected in [
        "12 problems in the settings",
        "lanes = 0 (file ",
        "must be a whole number from 1 to 32",
        "kafka.bootstrap_servers = \"nowhere\"",
        "kafka.publish = \"yes\"",
        "kafka.email_topic = \"payment_email\" (default) must not be the same topic as kafka.read_topic",
        "batch.linger = 5 ",
        "from 0s to 10s",
        "must be a size, like 512, 16KiB or 8MiB, from 64KiB to 256MiB",
        "from 1 to 100000",
        "payment.types = []",
        "email.statuses = [1]",
        "log.level = \"inof\"",
        "admin.listen = \"localhost\" (environment PAYMENT_WRITER__ADMIN__LISTEN)",
        "idempotency.window = \"7\" (environment PAYMENT_WRITER__IDEMPOTENCY__WINDOW)",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
}

#[test]
fn properties_that_exactly_once_depends_on_are_rejected() {
    for name in [
        "enable.auto.commit",
        "isolation.level",
        "transactional.id",
        "group.id",
        "auto.offset.reset",
        "enable.idempotence",
        "partition.assignment.strategy",
        "group.instance.id",
        "group.protocol",
        "bootstrap.servers",
        "partitioner",
        "enable.partition.eof",
    ] {
        let text = problems(&format!("[kafka.properties]\n\"{name}\" = \"x\""), &[]);
        assert!(text.contains(name) && text.contains("cannot be set"), "{text}");
    }
    let text = problems("[kafka.properties]\n\"session.timeout.ms\" = \"soon\"", &[]);
    assert!(text.contains("refused by librdkafka"), "{text}");
}

#[test]
fn dotted_property_names_mean_the_same_with_and_without_quotes() {
    let s = load("[kafka.properties]\nclient.rack = \"r\"\nsession.timeout.ms = 9000", &[]).unwrap().settings;
    assert_eq!(s.kafka.properties.get("client.rack"), Some("r"));
    assert_eq!(s.kafka.properties.get("session.timeout.ms"), Some("9000"));
}

#[test]
fn no_secret_is_ever_shown() {
    let loaded = load(
        "[postgres]\nurl = \"postgresql://w:hunter2@db/p\"\n[kafka.properties]\nsasl.password = \"hunter2\"\n\
         ssl.key.pem = \"hunter2\"\nsasl.username = \"visible\"",
        &[("PAYMENT_WRITER__KAFKA__PROPERTIES__SSL_KEYSTORE_PASSWORD", "hunter2")],
    )
    .unwrap();
    let shown = format!("{loaded:?} {}", serde_json::to_string(&loaded.effective).unwrap());
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("visible") && shown.contains("postgres://w@db:5432/p"), "{shown}");
    assert_eq!(loaded.settings.kafka.properties.get("sasl.password"), Some("hunter2"));

    for (toml, variables) in [
        ("[postgres]\nurl = \"hunter2\"", vec![]),
        ("[postgres]\nurl = [\"hunter2\"]", vec![]),
        ("postgres = \"postgresql://w:hunter2@db/p\"", vec![]),
        ("[postgres]\npassword = \"hunter2\"", vec![]),
        ("[postgres]\nurl = \"postgresql://w:hunter2@db/p", vec![]),
        ("[postgres]\nurl = postgresql://w:hunter2@db/p", vec![]),
        ("[kafka.properties]\nsasl.password = [\"hunter2\"]", vec![]),
        ("[kafka.properties]\nssl.key.password = hunter2\n", vec![]),
        ("[kafka.properties]\nsasl.passwort = \"hunter2\"\n", vec![]),
        ("[kafka]\nproperties = \"hunter2\"\n", vec![]),
        ("", vec![("PAYMENT_WRITER__POSTGRES__URL", "hunter2")]),
        ("", vec![("PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL", "host=x port=hunter2")]),
        ("", vec![("PAYMENT_WRITER__POSTGRES", "hunter2")]),
        ("", vec![("PAYMENT_WRITER__POSTGRES__PASSWORD", "hunter2")]),
        ("", vec![("PAYMENT_WRITER__KAFKA__PROPERTIES", "hunter2")]),
    ] {
        let error = load(toml, &variables).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter2"), "{toml} {variables:?}: {shown}");
    }
}

#[test]
fn broken_toml_is_located_by_line_and_column() {
    let text = problems("lanes = 2\n[kafka\ngroup_id = 1", &[]);
    assert!(text.contains("is not valid TOML at line 2, column"), "{text}");
}

#[test]
fn a_file_that_was_named_must_be_there() {
    let missing = Path::new("/no/such/file.toml");
    let error = Settings::load_from(Some(missing), Path::new("nowhere.toml"), []).unwrap_err();
    assert!(error.to_string().contains("cannot read settings file /no/such/file.toml"), "{error}");
    let variables = [(OsString::from(PATH_VARIABLE), OsString::from("/no/such/other.toml"))];
    let error = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap_err();
    assert!(error.to_string().contains("/no/such/other.toml"), "{error}");
}

#[test]
fn the_same_setting_twice_in_the_environment_is_an_error() {
    let text = problems("", &[("PAYMENT_WRITER__LANES", "1"), ("PAYMENT_WRITER__lanes", "2")]);
    assert!(text.contains("setting lanes is given by two environment variables"), "{text}");
}

#[test]
fn a_filter_of_the_log_names_levels_and_targets_and_no_spans() {
    for good in ["info", "WARN", "off,payment_writer=debug", "info,payment_writer::lane=trace"] {
        assert_eq!(log_filter(good), Ok(()), "{good}");
    }
    for bad in ["", "inof", "info,[span]=debug", "payment_writer[{field=\"a.*\"}]=trace"] {
        assert!(log_filter(bad).is_err(), "{bad}");
    }
}

#[test]
fn durations_and_sizes_are_read_as_people_write_them() {
    let duration = |text: &str| values::duration(Value::from(text), "0s", "7d").ok();
    for (text, millis) in [("5ms", 5), ("7d", 604_800_000), ("1h 30m", 5_400_000), ("0", 0), (" 1s ", 1_000)]
    {
        assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text:?}");
    }
    for wrong in ["", "5", "-1s", "five", "1 fortnight", "8d"] {
        assert_eq!(duration(wrong), None, "{wrong:?}");
    }
    let size = |value: Value| values::size(value, "7B", "8MiB").ok();
    for (text, bytes) in [("16KiB", 16_384), ("8 MiB", 8 << 20), ("1MB", 1_000_000), ("512", 512), ("7B", 7)]
    {
        assert_eq!(size(text.into()), Some(bytes), "{text:?}");
    }
    assert_eq!(size(512.into()), Some(512));
    for wrong in ["", "KiB", "-1", "6B", "9MiB", "8 MB of ram", "99999999999GiB"] {
        assert_eq!(size(wrong.into()), None, "{wrong:?}");
    }
    for wrong in [Value::from(-1), Value::from(512.5), Value::from(true), Value::Null] {
        assert_eq!(size(wrong.clone()), None, "{wrong}");
    }
}

#[test]
fn a_schedule_has_five_cron_fields_in_utc() {
    let matches = |schedule: &str, minute: &str| cron(schedule).unwrap().matches(minute).unwrap();
    // 2026-07-12 is a Sunday.
    for weekly in ["0 3 * * 0", "0 3 * * sun", "0 3 * * 7"] {
        assert!(matches(weekly, "2026-07-12T03:00:00Z"), "{weekly}");
        assert!(!matches(weekly, "2026-07-13T03:00:00Z") && !matches(weekly, "2026-07-12T03:01:00Z"));
    }
    let several = "*/20 8-10,20 1 jan-mar *";
    assert!(matches(several, "2026-02-01T09:40:00Z") && matches(several, "2026-03-01T20:00:00Z"));
    assert!(!matches(several, "2026-04-01T20:00:00Z") && !matches(several, "2026-02-01T09:10:00Z"));
    // As in cron, a day matches by either of its two fields if both are restricted.
    let either = "0 0 1 * mon";
    assert!(matches(either, "2026-05-01T00:00:00Z") && matches(either, "2026-05-11T00:00:00Z"));
    assert!(!matches(either, "2026-05-09T00:00:00Z"));
    assert!(!matches("0 0 */2 * mon", "2026-05-12T00:00:00Z"));
    for wrong in [
        "",
        "* * * *",
        "* * * * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "5-1 * * * *",
        "*/0 * * * *",
        "a * * * *",
        "* * * * eight",
        "1,,2 * * * *",
        "* * * * * Europe/Berlin",
    ] {
        assert!(cron(wrong).is_none(), "{wrong:?}");
    }
}

#[test]
fn what_follows_from_a_wrong_value_is_not_reported() {
    // The default of the read topic would be the same as this e-mail topic.
    let text = problems("[kafka]\nread_topic = \"?\"\nemail_topic = \"payment_read_topic\"", &[]);
    assert!(text.starts_with("kafka.read_topic = \"?\" (file "), "{text}");
    // Nor does a URL that is used for two roles count twice.
    let text = problems("[postgres]\nurl = \"nowhere\"", &[]);
    assert!(text.starts_with("postgres.url = (hidden) (file "), "{text}");
}

#[test]
fn a_name_in_the_place_of_a_table_is_an_error() {
    for (toml, expected) in [
        ("kafka = 1", "kafka (file "),
        ("[[kafka]]", "kafka (file "),
        ("[kafka]\nproperties = 1", "kafka.properties (file "),
        ("[kafka.group_id]", "kafka.group_id = {} (file "),
        ("[kafak]", "unknown setting kafak (file "),
    ] {
        let text = problems(toml, &[]);
        assert!(text.starts_with(expected), "{toml}: {text}");
    }
}
