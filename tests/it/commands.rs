//! Output and exit code of each command.

use std::process::{Command, Stdio};

use clap::CommandFactory;
use payment_writer::cli::Cli;
use serde_json::Value;

use crate::support::{
    AT_MS, Finished, Message, PATIENCE, Payment, Scope, Servers, free_address, uuid_v4, wait_until,
    wait_until_within,
};

/// Runs the program without servers, with only these settings.
fn offline(arguments: &[&str], settings: &[(&str, &str)]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_payment-writer"))
        .args(arguments)
        .envs(settings.iter().copied())
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn wrong_usage_ends_with_exit_code_2_and_a_hint() {
    for (arguments, words) in [
        (vec![], "Usage"),
        (vec!["rum"], "run"),
        (vec!["run", "--until-cought-up"], "--until-caught-up"),
        (vec!["topics", "create", "--partitions", "0"], "1..=10000"),
        (vec!["cursors", "skip", "--partition", "1"], "--to"),
        (vec!["cursors", "accept", "--partition", "1", "--published", "5", "--apply"], "--reason"),
        (vec!["--config", "absent.toml", "check-config"], "absent.toml"),
    ] {
        let finished = offline(&arguments, &[]);
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished:?}");
        assert!(finished.stderr.contains(words), "{arguments:?} does not say {words}: {}", finished.stderr);
    }
}

/// Names of the pages of this command and those below it.
fn pages(command: &clap::Command, above: &str) -> Vec<String> {
    let name = format!("{above}{}", command.get_name());
    let below = command.get_subcommands().flat_map(|command| pages(command, &format!("{name}-")));
    below.chain([format!("{name}.1")]).collect()
}

/// What bash offers to complete these words with.
fn completed(file: &std::path::Path, words: &[&str]) -> String {
    let script = r#"
        set -eu
        . "$1"; shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        function=$(complete -p payment-writer | sed 's/.* -F \([^ ]*\) .*/\1/')
        $function payment-writer "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        echo "${COMPREPLY[@]}""#;
    let output = Command::new("bash").args(["-c", script, "bash"]).arg(file).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn each_command_has_a_man_page_and_bash_completes_it() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("new");
    // Wrong settings do not matter.
    let wrong = [("PAYMENT_WRITER__LANES", "none")];
    let finished = offline(&["generate", directory.to_str().unwrap()], &wrong);
    assert_eq!(finished.code, Some(0), "{finished:?}");

    let mut expected = pages(&Cli::command(), "");
    expected.extend(["payment-writer.bash", "_payment-writer", "payment-writer.fish"].map(str::to_owned));
    expected.sort();
    let files = std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name());
    let mut files: Vec<String> = files.map(|name| name.into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, expected);

    let page = std::fs::read_to_string(directory.join("payment-writer.1")).unwrap();
    assert!(page.contains("\n.nf\nExamples:\n  payment\\-writer check\\-config  "), "{page}");
    let bash = directory.join("payment-writer.bash");
    assert_eq!(completed(&bash, &["payment-writer", "recon"]), "reconcile");
    assert_eq!(completed(&bash, &["payment-writer", "run", "--until"]), "--until-caught-up");

    let finished = offline(&["generate", "/dev/null/x"], &[]);
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("/dev/null/x"), "{}", finished.stderr);
}

#[test]
fn a_wrong_setting_ends_every_command_with_exit_code_2_and_its_name() {
    for command in [vec!["check-config"], vec!["run"], vec!["migrate"], vec!["config", "show"]] {
        for (name, value, words) in [
            ("PAYMENT_WRITER__KAFKA__GRUOP_ID", "x", "PAYMENT_WRITER__KAFKA__GROUP_ID"),
            ("PAYMENT_WRITER__BATCH__LINGER", "soon", "batch.linger"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__ISOLATION_LEVEL", "read_uncommitted", "isolation.level"),
        ] {
            let finished = offline(&command, &[(name, value)]);
            assert_eq!(finished.code, Some(2), "{command:?} {name}: {finished:?}");
            assert!(finished.stderr.contains(words), "{command:?} {name}: {}", finished.stderr);
        }
    }
    // For an unknown key in a file, too, the nearest known key is named.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    std::fs::write(&file, "[kafka]\ninput_topics = \"x\"\n").unwrap();
    let finished = offline(&["--config", file.to_str().unwrap(), "check-config"], &[]);
    assert_eq!(finished.code, Some(2));
    assert!(
        finished.stderr.contains("kafka.input_topics") && finished.stderr.contains("kafka.input_topic"),
        "{}",
        finished.stderr
    );
}

#[test]
fn help_and_version_end_with_exit_code_0() {
    for arguments in
        [vec!["--help"], vec!["--version"], vec!["run", "--help"], vec!["cursors", "skip", "--help"]]
    {
        let finished = offline(&arguments, &[]).succeeds();
        assert!(!finished.stdout.is_empty());
    }
    assert!(offline(&["--version"], &[]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn check_config_needs_no_server_and_config_show_hides_secrets() {
    // GIVEN settings with passwords, in a file and in the environment
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    std::fs::write(
        &file,
        "[postgres]\nurl = \"postgresql://me:hush-one@nowhere.invalid/db?application_name=shown\"\n\
         [kafka.properties]\n\"sasl.password\" = \"hush-two\"\n\"sasl.username\" = \"shown-too\"\n",
    )
    .unwrap();
    let config = ["--config", file.to_str().unwrap()];
    let settings = [
        ("PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL", "postgres://me:hush-three@nowhere.invalid/db"),
        ("PAYMENT_WRITER__KAFKA__PROPERTIES__SSL_KEY_PASSWORD", "hush-four"),
        ("PAYMENT_WRITER__KAFKA__GROUP_ID", "blue"),
    ];

    // WHEN they are validated and shown
    let checked = offline(&[&config[..], &["check-config"]].concat(), &settings).succeeds();
    let shown = offline(&[&config[..], &["config", "show"]].concat(), &settings).succeeds();
    let json = offline(&[&config[..], &["config", "show", "--json"]].concat(), &settings).succeeds();

    // THEN values are shown with their origins, and secrets are not
    for finished in [&checked, &shown, &json] {
        assert!(!finished.stdout.contains("hush") && !finished.stderr.contains("hush"), "{finished:?}");
    }
    assert!(
        shown.stdout.contains("shown-too") && shown.stdout.contains("nowhere.invalid"),
        "{}",
        shown.stdout
    );
    let entries: Vec<Value> = serde_json::from_str(&json.stdout).unwrap();
    let entry = |key: &str| entries.iter().find(|e| e["key"] == key).unwrap_or_else(|| panic!("{key}"));
    assert_eq!(entry("kafka.group_id")["value"], "blue");
    assert!(entry("kafka.group_id")["origin"].to_string().contains("PAYMENT_WRITER__KAFKA__GROUP_ID"));
    assert!(entry("postgres.url")["origin"].to_string().contains("settings.toml"));
    assert!(entry("batch.linger")["origin"].to_string().contains("default"));
}

#[test]
fn migrate_and_topics_create_may_be_repeated() {
    // GIVEN no schema and no topics
    let scope = Scope::new(Servers::shared(), "setup");
    assert_eq!(scope.command(&["migrate", "status"]).succeeds().stdout.matches("applied").count(), 0);

    // WHEN each command runs twice
    let first = scope.command(&["migrate"]).succeeds().stdout;
    let second = scope.command(&["migrate"]).succeeds().stdout;
    let create = ["topics", "create", "--partitions", "6", "--output-partitions", "3"];
    let created = scope.command(&create).succeeds().stdout;
    let found = scope.command(&create).succeeds();

    // THEN the second run finds everything in place
    assert!(first.contains("applied") && second.contains("nothing to do"), "{first}{second}");
    let status = scope.command(&["migrate", "status"]).succeeds().stdout;
    assert!(status.contains("applied") && !status.contains("pending"), "{status}");
    for (topic, partitions) in [
        (&scope.input_topic, 6),
        (&scope.read_topic, 3),
        (&scope.email_topic, 3),
        (&scope.dead_letter_topic, 3),
    ] {
        assert!(created.contains(&format!("{topic}: created, {partitions} partitions")), "{created}");
        assert!(
            found.stdout.contains(&format!("{topic}: already there, {partitions} partitions")),
            "{found:?}"
        );
    }
    assert_eq!(found.stderr, "", "the second run has no warnings");
    // AND what they created is what the daemon needs
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);
    scope.drain();
    assert_eq!(scope.count("payment_core"), 1);
}

#[test]
fn a_command_without_a_server_fails_with_exit_code_1() {
    // A port without a listener.
    let port = free_address().port();
    let url = format!("postgresql://nobody:hush@127.0.0.1:{port}/none");
    let settings = [("PAYMENT_WRITER__POSTGRES__URL", url.as_str())];
    for command in [vec!["migrate"], vec!["migrate", "status"]] {
        let finished = offline(&command, &settings);
        assert_eq!(finished.code, Some(1), "{command:?}: {finished:?}");
        assert!(finished.stderr.starts_with("error: ") && !finished.stderr.contains("hush"), "{finished:?}");
    }
}

#[test]
fn until_caught_up_stops_at_the_ends_seen_at_the_start() {
    // GIVEN records on some partitions, and none on others
    let scope = Scope::ready("caught_up", 5, 1);
    scope.produce(&scope.input_topic, (0..100).map(|i| Payment::new(uuid_v4(i), 31).message().partition(1)));
    scope.produce(&scope.input_topic, [Message::new("31", "{}").partition(3)]);

    // WHEN the daemon runs with --until-caught-up, twice
    let daemon = scope.drain();
    assert_eq!(scope.count("payment_core"), 100);
    scope.drain();

    // THEN every record has its outcome, none was processed twice, and each run ended with exit code 0
    assert_eq!(scope.count("payment_core"), 100);
    assert_eq!(scope.read_all(&scope.read_topic).len(), 100);
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 1);
    assert_eq!(scope.committed(1).unwrap().0, 100);
    assert_eq!(scope.committed(3).unwrap().0, 1);
    assert!(daemon.log().contains("written=100 duplicates=0 dead_letters=1"), "{}", daemon.log());
}

#[test]
fn until_caught_up_waits_for_the_cursors_of_partitions_without_records() {
    // GIVEN records in one partition, and a database that takes the cursor of an empty partition of the other lane
    // only at the fifth try after those records were written
    let scope = Scope::ready("caught_up_empty", 4, 1);
    scope.produce(&scope.input_topic, (0..10).map(|i| Payment::new(uuid_v4(i), 31).message().partition(1)));
    scope.execute(
        "CREATE SEQUENCE tries;
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF NEW.partition = 0 THEN
                 IF NOT EXISTS (SELECT FROM payment_writer.source_cursor WHERE partition = 1 AND applied = 10) THEN
                     RAISE 'not yet' USING ERRCODE = 'serialization_failure';
                 ELSIF nextval('tries') < 5 THEN
                     RAISE 'not yet' USING ERRCODE = 'serialization_failure';
                 END IF;
             END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON payment_writer.source_cursor FOR EACH ROW EXECUTE FUNCTION refuse()",
    );

    // WHEN the daemon runs with --until-caught-up THEN it ends when all partitions have cursors
    let daemon = scope.drain_with(&[("PAYMENT_WRITER__LANES", "2")]);
    let applied = scope.cursors().into_values().map(|(applied, _)| applied).collect::<Vec<_>>();
    assert_eq!(applied, [0, 10, 0, 0], "{}", daemon.log());
}

#[test]
#[ignore = "a minute; `make trials`"]
fn trials_until_caught_up_gives_partitions_without_records_a_minute() {
    // GIVEN records in one partition, and a database that takes no cursor of an empty one
    let scope = Scope::ready("caught_up_never", 2, 1);
    scope.produce(&scope.input_topic, (0..10).map(|i| Payment::new(uuid_v4(i), 31).message().partition(1)));
    scope.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN RAISE 'never' USING ERRCODE = 'serialization_failure'; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON payment_writer.source_cursor
             FOR EACH ROW WHEN (NEW.partition = 0) EXECUTE FUNCTION refuse()",
    );

    // WHEN the daemon runs with --until-caught-up THEN it ends, and tells it
    let mut daemon = scope.daemon_with(&["run", "--until-caught-up"], &[("PAYMENT_WRITER__LANES", "2")]);
    wait_until_within(PATIENCE, "it gives up", || !daemon.is_running());
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    let told = "caught up, except that partitions without records were not started in this time";
    assert!(daemon.log().contains(told), "{}", daemon.log());
    assert_eq!(scope.committed(1).unwrap().0, 10);
}

#[test]
fn sigterm_and_sigint_drain_and_end_with_exit_code_0() {
    for signal in ["TERM", "INT"] {
        // GIVEN a daemon that is processing a stream of records
        let scope = Scope::ready("drain", 3, 2);
        let mut daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__BATCH__MAX_PAYMENTS", "50")]);
        let sent = 6_000;
        scope.produce(
            &scope.input_topic,
            (0..sent).map(|i| Payment::new(uuid_v4(i), (i % 40) as i64).message()),
        );
        wait_until("some payments are written", || scope.count("payment_core") > 0);

        // WHEN it receives the signal
        daemon.signal(signal);
        let status = daemon.wait();

        // THEN it has published and committed everything that it wrote, and stored that
        assert_eq!(status.code(), Some(0), "SIG{signal}: {}", daemon.log());
        assert!(daemon.log().contains("draining"));
        let written = scope.count("payment_core");
        assert_eq!(scope.read_all(&scope.read_topic).len() as i64, written);
        let cursors = scope.sql(
            "SELECT partition, applied, published FROM payment_writer.source_cursor ORDER BY partition",
            &[],
        );
        let mut sum = 0;
        for row in &cursors {
            let (partition, applied, published): (i32, i64, Option<i64>) =
                (row.get(0), row.get(1), row.get(2));
            assert_eq!(published, Some(applied), "partition {partition}");
            assert_eq!(
                scope.committed(partition).map(|(offset, _)| offset),
                Some(applied),
                "partition {partition}"
            );
            sum += applied;
        }
        assert_eq!(sum, written);

        // AND the next run continues where it stopped
        scope.drain();
        assert_eq!(scope.count("payment_core"), sent as i64);
        assert_eq!(scope.read_all(&scope.read_topic).len(), sent as usize);
    }
}

#[test]
fn cursors_show_prints_what_is_written_published_and_committed() {
    // GIVEN two partitions: one drained and then sent more records, one never used
    let scope = Scope::ready("cursors_show", 2, 1);
    scope.produce(&scope.input_topic, (0..5).map(|i| Payment::new(uuid_v4(i), 31).message().partition(0)));
    scope.drain();
    scope.produce(&scope.input_topic, [Message::new("31", "{}").timestamp_ms(AT_MS).partition(0)]);

    // WHEN the cursors are shown
    let table = scope.command(&["cursors", "show"]).succeeds().stdout;
    let json = scope.command(&["cursors", "show", "--json"]).succeeds().stdout;

    // THEN the table and the JSON agree
    let partitions: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(partitions.len(), 2);
    let first = &partitions[0];
    for (field, expected) in [
        ("partition", 0),
        ("applied", 5),
        ("published", 5),
        ("committed", 5),
        ("log_start", 0),
        ("log_end", 6),
        ("lag_records", 1),
    ] {
        assert_eq!(first[field], expected, "{field}: {first}");
    }
    assert_eq!(first["state"], "fine");
    assert_eq!(partitions[1]["log_end"], 0);
    assert_eq!(partitions[1]["lag_records"], 0);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..4], ["partition", "applied", "published", "committed"]);
    assert_eq!(lines[1], ["0", "5", "5", "5", "ours", "0", "6", "1", "fine"]);
}

#[test]
fn a_daemon_of_another_group_is_refused_with_exit_code_3() {
    // GIVEN a database that one group writes to
    let scope = Scope::ready("other_group", 1, 1);
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);
    scope.drain();

    // WHEN another group starts with it
    let other = format!("{}-other", scope.group_id);
    let mut daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__KAFKA__GROUP_ID", &other)]);

    // THEN the daemon stops, and says what to check
    assert_eq!(daemon.wait().code(), Some(3), "{}", daemon.log());
    assert!(daemon.log().contains(&scope.group_id), "{}", daemon.log());
    assert_eq!(scope.read_all(&scope.read_topic).len(), 1);
}
