//! Secrets, certificates and settings that change while the daemon runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Authority, grant_rights, missing, set_password};
use crate::support::{
    Act, Daemon, Load, Member, PATIENCE, Payment, Scope, Servers, block_on, uuid_v4, wait_until_within,
};

const RELOADED: &str = "payment_writer_config_last_reload_successful";

/// Waits for a line with these words behind this place of the log; returns the place behind it.
#[track_caller]
fn says(daemon: &Daemon, from: usize, words: &[&str]) -> usize {
    let mut end = 0;
    wait_until_within(PATIENCE, &words.join(" "), || {
        let log = daemon.log();
        end = from;
        log[from..].split_inclusive('\n').any(|line| {
            end += line.len();
            words.iter().all(|word| line.contains(word))
        })
    });
    end
}

#[test]
fn sighup_reloads_without_a_rebalance_and_says_what_needs_a_restart() {
    // GIVEN two members of the group, one of them with a settings file
    let scope = Scope::new(Servers::shared(), "sighup");
    scope.prepare(4, 2);
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let write = |text: &str| fs::write(path, text).unwrap();
    write("lanes = 2\n");
    let mut daemon = Member::new("a").with_variable("PAYMENT_WRITER_CONFIG", path).start(&scope);
    let mut other = Member::new("b").start(&scope);
    let shared = || daemon.partitions() == 2 && other.partitions() == 2;
    wait_until_within(PATIENCE, "the partitions are shared", shared);
    let mut load = Load::new(91);
    scope.feed(load.take(300));

    // WHEN the file is broken at SIGHUP, THEN the daemon says where, and goes on
    write("lanes = 2\n[kafka]\nproperties = { \"sasl.password\" = \"hush\"\n");
    daemon.signal("HUP");
    let at = says(&daemon, 0, &["ERROR", "SIGHUP", path, "line 3"]);
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);
    scope.feed(load.take(300));
    scope.wait_until_caught_up();

    // WHEN the new clients do not work, THEN those in use stay
    write("[kafka.properties]\n\"security.protocol\" = \"SSL\"\n");
    daemon.signal("HUP");
    let at = says(&daemon, at, &["WARN", "do not work"]);
    scope.feed(load.take(300));
    scope.wait_until_caught_up();
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);

    let rebalances = other.metric("payment_writer_rebalances_total", "");

    // WHEN it is right, THEN all connections are made anew, and the rest is named
    write("lanes = 3\n[log]\nlevel = \"debug\"\n[kafka.properties]\n\"compression.type\" = \"gzip\"\n");
    daemon.signal("HUP");
    scope.feed(load.take(600));
    says(&daemon, at, &["WARN", "need a restart", "lanes"]);
    let at = says(&daemon, at, &["INFO", "reloaded", "SIGHUP", "compression.type"]);
    says(&daemon, at, &["INFO", "started", "lanes=2"]);
    wait_until_within(PATIENCE, "it has its partitions again", shared);
    assert_eq!(daemon.metric(RELOADED, ""), 1.0);
    assert!(daemon.log().contains("DEBUG"), "{}", daemon.log());

    // AND the other member keeps its partitions without a rebalance
    assert_eq!(other.metric("payment_writer_rebalances_total", ""), rebalances);

    // WHEN SIGHUP comes again and again, THEN several within five seconds count as one, and nothing is lost or doubled
    let (reloads, began) = (daemon.log().matches("reason=\"SIGHUP\"").count(), Instant::now());
    for _ in 0..40 {
        daemon.signal("HUP");
        scope.feed(load.take(20));
        std::thread::sleep(Duration::from_millis(200));
    }
    scope.wait_until_caught_up();
    let reloads = daemon.log().matches("reason=\"SIGHUP\"").count() - reloads;
    let elapsed = usize::try_from(began.elapsed().as_secs()).unwrap();
    assert!((1..=2 + elapsed / 5).contains(&reloads), "{reloads} in {elapsed} s");

    // AND the new clients are as the settings say, which had changed once
    let written = [0, 1].map(|partition| scope.batches(&scope.read_topic, partition)).concat();
    assert!(written.iter().any(|batch| batch.codec == "gzip"), "{written:?}");
    let log = daemon.log();
    let told = log.lines().filter(|line| line.contains("reloaded") && line.contains("compression.type"));
    assert_eq!(told.count(), 1);

    // AND the log does not say that the daemon stops
    let log = daemon.log();
    assert!(
        log.contains("draining, to make all connections anew")
            && log.contains("the lanes have ended, starting again")
    );
    assert!(!log.contains("stopped") && !log.contains("shutdown.timeout"), "{log}");
    daemon.drains();
    other.drains();
    scope.assert_exactly_once();
    assert!(!daemon.log().contains("hush"), "{}", daemon.log());
}

#[test]
fn certificates_and_authorities_of_both_servers_are_replaced_under_a_running_daemon() {
    // GIVEN servers that ask for a client's certificate, and trust two authorities
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &[&str]| fs::write(folder.path().join(name), text.concat()).unwrap();
    let (first, second) = (Authority::new("the first authority"), Authority::new("the second authority"));
    let (server, key) = first.issue();
    let both = [first.certificate.as_str(), second.certificate.as_str()];
    write("server.crt", &[&server]);
    write("server.key", &[&key]);
    write("kafka.pem", &[&key, &server]);
    write("trusted.pem", &both);
    let settings = format!(
        "listener.name.secure.ssl.client.auth=required\nlistener.name.secure.ssl.truststore.type=PEM\n\
         listener.name.secure.ssl.truststore.location={}\nlistener.name.secure.ssl.keystore.location={}\n",
        at("trusted.pem"),
        at("kafka.pem")
    );
    let servers = Servers::with_tls_and(folder.path(), &settings);
    let scope = Scope::new(&servers, "certificates");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    scope.execute_as_admin(include_str!("../../../sql/roles.sql"));
    let role = format!("{}_writer", scope.database);
    scope.execute_as_admin(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'u' IN ROLE payment_writer_app"));
    let rows = scope.sql("SELECT setting FROM pg_settings WHERE name = 'ssl_cert_file'", &[]);
    let postgres_files = Path::new(&rows[0].get::<_, String>(0)).parent().unwrap().to_owned();
    let hba = as_admin(&scope, "SHOW hba_file");
    let rules = fs::read_to_string(&hba).unwrap();
    let own = format!("hostssl all \"{role}\" 127.0.0.1/32 scram-sha-256 clientcert=verify-ca");
    fs::write(&hba, format!("{own}\nhost all \"{role}\" 127.0.0.1/32 reject\n{rules}")).unwrap();
    fs::write(postgres_files.join("ca.crt"), both.concat()).unwrap();
    let ca = postgres_files.join("ca.crt");
    scope.on_server(&[
        format!("ALTER SYSTEM SET ssl_ca_file = '{}'", ca.display()),
        "SELECT pg_reload_conf()".to_owned(),
    ]);

    let client = |authority: &Authority| {
        let (certificate, key) = authority.issue();
        write("client.crt", &[&certificate]);
        write("client.key", &[&key]);
    };
    write("ca.crt", &both[..1]);
    client(&first);
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}:u@"));
    let options =
        format!("sslrootcert={}&sslcert={}&sslkey={}", at("ca.crt"), at("client.crt"), at("client.key"));
    let member = Member::new("a")
        .with_sasl(&servers, folder.path(), "SCRAM-SHA-512")
        .with("KAFKA__PROPERTIES__SASL_USERNAME", "writer")
        .with("KAFKA__PROPERTIES__SASL_PASSWORD", "sesame")
        .with("KAFKA__PROPERTIES__SSL_CERTIFICATE_LOCATION", &at("client.crt"))
        .with("KAFKA__PROPERTIES__SSL_KEY_LOCATION", &at("client.key"))
        .with("POSTGRES__URL", &format!("{url}?sslmode=verify-full&{options}"))
        .with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url());
    let mut daemon = member.start(&scope);
    daemon.wait_until_ready();
    let mut load = Load::new(92);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN the client's certificate is replaced but its key not yet, THEN the daemon keeps what it has
    let former_key = fs::read_to_string(folder.path().join("client.key")).unwrap();
    write("ca.crt", &both);
    client(&second);
    let new_key = fs::read_to_string(folder.path().join("client.key")).unwrap();
    write("client.key", &[&former_key]);
    daemon.signal("HUP");
    let seen = says(&daemon, 0, &["WARN", "do not work"]);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();
    // AND then the key, THEN all connections have the new one
    write("client.key", &[&new_key]);
    scope.feed(load.take(200));
    let seen = says(&daemon, seen, &["INFO", "reloaded"]);
    scope.wait_until_caught_up();
    let issuers = "SELECT DISTINCT s.issuer_dn FROM pg_stat_ssl s JOIN pg_stat_activity USING (pid)
                   WHERE usename LIKE 'certificates%writer'";
    wait_until_within(PATIENCE, "all sessions have the new certificate", || {
        as_admin(&scope, issuers).ends_with("CN=the second authority")
            && !as_admin(&scope, issuers).contains("; ")
    });

    // WHEN both servers have certificates of the second authority and trust no other
    let (server, key) = second.issue();
    write("kafka.pem", &[&key, &server]);
    write("trusted.pem", &both[1..]);
    for (name, text) in [("server.crt", &server), ("server.key", &key), ("ca.crt", &second.certificate)] {
        fs::write(postgres_files.join(name), text).unwrap();
    }
    scope.on_server(&["SELECT pg_reload_conf()".to_owned()]);
    scope.feed(load.take(200));
    scope.cut_connections();
    servers.kafka(Act::Stop);
    servers.kafka(Act::Start);
    // THEN payments go on
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN a file changes without SIGHUP, THEN that is noticed
    write("ca.crt", &both[1..]);
    scope.feed(load.take(200));
    let seen = says(&daemon, seen, &["INFO", "reloaded", "a file has changed"]);
    let seen = says(&daemon, seen, &["INFO", "started"]);
    daemon.wait_for_partitions("it has its partitions again", |count| count == 4);
    scope.wait_until_caught_up();

    // AND a certificate of the first authority is refused by both
    client(&first);
    says(&daemon, seen, &["WARN", "do not work"]);
    scope.cut_connections();
    wait_until_within(PATIENCE, "the certificate is refused", || missing(&daemon).contains("database"));
    // AND a file without a certificate is named
    write("ca.crt", &["none\n"]);
    wait_until_within(PATIENCE, "the file is named", || {
        missing(&daemon).contains("sslrootcert of the Postgres URL")
            && missing(&daemon).contains(&at("ca.crt"))
    });
    // AND right files are enough to go on
    write("ca.crt", &both[1..]);
    client(&second);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
    fs::write(&hba, rules).unwrap();
}

#[test]
fn files_on_a_drive_that_hangs_are_named_and_stop_neither_payments_nor_the_drain() {
    // GIVEN a daemon with a certificate's file and a password's file
    let scope = Scope::new(Servers::shared(), "drive");
    scope.prepare(4, 2);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("ca.crt", "none");
    write("pass", "*:*:*:*:payment_writer");
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", "//payment_writer@");
    let mut daemon = Member::new("a")
        .with("KAFKA__PROPERTIES__SSL_CA_LOCATION", &at("ca.crt"))
        .with("POSTGRES__URL", &format!("{url}?passfile={}", at("pass")))
        .start(&scope);
    daemon.wait_until_ready();
    let mut load = Load::new(94);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN the certificate's file cannot be read to its end, THEN it is named, and payments go on
    let hangs = |name: &str| {
        fs::remove_file(at(name)).unwrap();
        assert!(Command::new("mkfifo").arg(at(name)).status().unwrap().success());
    };
    hangs("ca.crt");
    says(&daemon, 0, &["WARN", "those in use stay", &at("ca.crt"), "not done within"]);
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN the password's file cannot be read as connections are lost, THEN that is named
    hangs("pass");
    scope.cut_connections();
    wait_until_within(PATIENCE, "the reason is named", || {
        missing(&daemon).contains("files of the Postgres URL: not done within")
    });

    // WHEN the drive answers again, THEN payments go on
    fs::rename(at("pass"), at("former")).unwrap();
    write("pass", "*:*:*:*:payment_writer");
    drop(fs::File::options().read(true).write(true).open(at("former")).unwrap());
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // AND the daemon drains, while the other file still cannot be read
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn sighup_makes_a_new_token_and_a_command_that_fails_leaves_all_as_it_is() {
    // GIVEN a daemon that authenticates with tokens of 8 s, whose command is in a settings file
    let folder = tempfile::tempdir().unwrap();
    super::make_certificates(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "sighup_tokens");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    let command = super::token_command(folder.path());
    let file = folder.path().join("settings.toml");
    let runs = |command: &str| fs::write(&file, format!("kafka.token_command = [\"{command}\"]\n")).unwrap();
    runs(&command);
    let member = super::with_tokens(&servers, folder.path())
        .with_variable("PAYMENT_WRITER_CONFIG", file.to_str().unwrap());
    let mut daemon = member.start(&scope);
    let mut load = Load::new(95);
    scope.feed(load.take(100));
    scope.wait_until_caught_up();

    // WHEN the command fails at SIGHUP, THEN that is said, and the clients in use stay
    let works = fs::read_to_string(&command).unwrap();
    fs::write(&command, "#!/bin/sh\nexit 3\n").unwrap();
    daemon.signal("HUP");
    let at = says(
        &daemon,
        0,
        &["WARN", "those in use stay", "the token command created no token", "exit status: 3"],
    );
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);

    // WHEN another one is set that works, THEN all clients have a new token, and payments flow beyond its expiry
    let other = folder.path().join("other");
    fs::copy(&command, &other).unwrap();
    fs::write(&other, &works).unwrap();
    runs(other.to_str().unwrap());
    daemon.signal("HUP");
    let at = says(&daemon, at, &["INFO", "reloaded", "SIGHUP"]);
    let mut at = says(&daemon, at, &["INFO", "started"]);
    let ran = || fs::read(folder.path().join("runs")).map_or(0, |runs| runs.len());
    let before = ran();
    wait_until_within(PATIENCE, "tokens are renewed", || ran() > before + 2);
    // AND while tokens are valid for long, each reload makes one to try it and one for all clients
    fs::write(&other, works.replace("now + 8", "now + 3600")).unwrap();
    for _ in 0..2 {
        let before = ran();
        daemon.signal("HUP");
        at = says(&daemon, at, &["INFO", "reloaded", "SIGHUP"]);
        at = says(&daemon, at, &["INFO", "started"]);
        wait_until_within(PATIENCE, "a token is made", || ran() >= before + 2);
    }
    // AND there was one reload for each SIGHUP
    assert_eq!(daemon.log().matches("reason=\"SIGHUP\"").count(), 3, "{}", daemon.log());
    scope.feed(load.take(100));
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
    assert!(!daemon.log().contains("eyJ"), "{}", daemon.log());
}

#[test]
fn a_reload_that_would_lead_to_another_database_changes_nothing() {
    // GIVEN a daemon with open sessions, and another database at the same address
    let scope = Scope::ready("elsewhere", 2, 1);
    let mut daemon = Member::new("a").start(&scope);
    let mut load = Load::new(96);
    scope.feed(load.take(100));
    scope.wait_until_caught_up();
    let id = as_admin(&scope, "SELECT database_id::text FROM payment_writer.database_identity");
    let replace =
        |id: &str| scope.execute(&format!("UPDATE payment_writer.database_identity SET database_id = {id}"));
    replace("gen_random_uuid()");

    // WHEN it is to reload, THEN it says so and goes on
    daemon.signal("HUP");
    let at = says(&daemon, 0, &["WARN", "those in use stay", "leads to another database"]);
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);

    // AND it reloads by itself once its own database is back
    replace(&format!("'{id}'"));
    let at = says(&daemon, at, &["INFO", "reloaded", "SIGHUP"]);
    says(&daemon, at, &["INFO", "started"]);
    assert_eq!(daemon.metric(RELOADED, ""), 1.0);
    scope.feed(load.take(100));
    scope.drains_exactly_once([&mut daemon]);
}

#[test]
fn sighup_takes_other_users_and_files_and_no_other_cluster() {
    // GIVEN a settings file with all that SIGHUP applies, and a file whose password is wrong
    let folder = tempfile::tempdir().unwrap();
    super::make_certificates(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "sighup_all");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    scope.execute_as_admin(include_str!("../../../sql/roles.sql"));
    let [former, next] = ["former", "next"].map(|name| format!("{}_{name}", scope.database));
    for role in [&former, &next] {
        scope.execute_as_admin(&format!(
            "CREATE ROLE \"{role}\" LOGIN PASSWORD '{role}' IN ROLE payment_writer_app"
        ));
    }
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let settings = |brokers: &str, protocol: &str, password: &str, role: &str| {
        let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}@"));
        let text = format!(
            "[kafka]\nbootstrap_servers = \"{brokers}\"\npassword_file = \"{}\"\n\
             [kafka.properties]\n\"security.protocol\" = \"{protocol}\"\n\"sasl.mechanism\" = \"SCRAM-SHA-512\"\n\
             \"sasl.username\" = \"writer\"\n\"ssl.ca.location\" = \"{}\"\n\
             [postgres]\nurl = \"{url}\"\nhousekeeping_url = \"{}\"\npassword_command = [\"echo\", \"{role}\"]\n",
            at(password),
            at("ca.crt"),
            scope.postgres_url()
        );
        write("settings.toml", &text);
    };
    write("kafka1", "sesame1");
    write("kafka2", "sesame");
    settings(servers.kafka_secure(), "SASL_SSL", "kafka1", &former);
    let member = Member::new("a")
        .without("KAFKA__BOOTSTRAP_SERVERS")
        .without("POSTGRES__URL")
        .with_variable("PAYMENT_WRITER_CONFIG", &at("settings.toml"));
    let mut daemon = member.start(&scope);
    wait_until_within(PATIENCE, "the password is refused", || {
        missing(&daemon).contains("uthentication failed")
    });

    // WHEN the file is right, THEN the daemon that waits starts with new clients
    write("kafka1", "sesame");
    let seen = says(&daemon, 0, &["INFO", "reloaded", "a file has changed"]);
    let mut load = Load::new(97);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN SIGHUP leads to another cluster that has a topic of that name, THEN the daemon refuses it
    let other = Scope::new(Servers::shared(), "sighup_all_other");
    other.create_topic(&scope.input_topic, 4);
    settings(other.servers.bootstrap_servers(), "PLAINTEXT", "kafka1", &former);
    daemon.signal("HUP");
    let seen = says(&daemon, seen, &["WARN", "those in use stay", "leads to another input topic"]);
    assert_eq!(daemon.metric(RELOADED, ""), 0.0);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();
    other.delete_topic(&scope.input_topic);

    // WHEN it leads to another user of the database and another password file, THEN all connections use them
    let brokers = format!("{},127.0.0.1:1", servers.kafka_secure());
    settings(&brokers, "SASL_SSL", "kafka2", &next);
    fs::remove_file(at("kafka1")).unwrap();
    daemon.signal("HUP");
    let changed =
        ["kafka.bootstrap_servers", "kafka.password_file", "postgres.password_command", "postgres.url"];
    let seen = says(&daemon, seen, &[&["INFO", "reloaded", "SIGHUP"], &changed[..]].concat());
    says(&daemon, seen, &["INFO", "started"]);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "all sessions are of the other user", || {
        as_admin(
            &scope,
            "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE usename LIKE 'sighup_all%'",
        ) == next
    });
    // AND the file that is gone is not missed
    assert_eq!(daemon.metric(RELOADED, ""), 1.0);
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn until_caught_up_keeps_the_ends_of_its_start_over_a_reload() {
    // GIVEN records of one partition that wait for a lock, and an empty partition that is halted
    let scope = Scope::ready("until", 2, 1);
    let payments = |seeds: std::ops::Range<u64>, partition| {
        let payments = seeds.map(move |seed| Payment::new(uuid_v4(seed), 31).message().partition(partition));
        scope.produce(&scope.input_topic, payments.collect::<Vec<_>>());
    };
    payments(0..10, 0);
    scope.move_group_offset(1, 3, "");
    let client = scope.connect_to(&scope.postgres_url());
    block_on(client.batch_execute("BEGIN; LOCK TABLE payment_writer.payment_core IN ACCESS EXCLUSIVE MODE"))
        .unwrap();
    let mut daemon = Member::new("a").run(&scope, &["run", "--until-caught-up"]);
    let at = says(&daemon, 0, &["INFO", "runs until", "partitions=2 without_records=1"]);

    // WHEN the other partition gets records before a reload
    payments(10..15, 1);
    let at = says(&daemon, at, &["WARN", "writing a batch", "a lock is held"]);
    daemon.signal("HUP");
    // The lane that waits for the lock gets less time than at a stop.
    let at = says(&daemon, at, &["WARN", "not drained in time before the reload", "seconds=5"]);
    says(&daemon, at, &["INFO", "started"]);
    block_on(client.batch_execute("ROLLBACK")).unwrap();

    // THEN the daemon ends at the ends that it saw first, and tells the halted partition
    daemon.ends_for_a_person("caught up, except for 1 halted partition(s)");
    assert_eq!(daemon.log().matches("runs until").count(), 1, "{}", daemon.log());
}

/// The first value of a query as superuser, as text.
fn as_admin(scope: &Scope<'_>, query: &str) -> String {
    let client = scope.connect_to(&scope.servers.postgres_admin_url(&scope.database));
    let rows = block_on(client.query(query, &[])).unwrap();
    rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join("; ")
}

#[test]
fn passwords_of_both_servers_are_changed_under_a_running_daemon() {
    // GIVEN a daemon with a password file for Kafka, and a password command for Postgres
    let folder = tempfile::tempdir().unwrap();
    super::make_certificates(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "passwords");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    scope.execute_as_admin(include_str!("../../../sql/roles.sql"));
    let role = format!("{}_writer", scope.database);
    scope.execute_as_admin(&format!(
        "CREATE ROLE \"{role}\" LOGIN PASSWORD 'hush1' IN ROLE payment_writer_app"
    ));
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("kafka", "sesame\n");
    write("postgres", "hush1\n");
    let script = format!(
        "echo hush2 >&2; test $PGUSER:$PGDATABASE = {role}:{} && cat {}",
        scope.database,
        at("postgres")
    );
    let command = serde_json::json!(["sh", "-c", script]).to_string();
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}@"));
    let member = Member::new("a")
        .with_sasl(&servers, folder.path(), "SCRAM-SHA-512")
        .with("KAFKA__PROPERTIES__SASL_USERNAME", "writer")
        .with("KAFKA__PASSWORD_FILE", &at("kafka"))
        .with("POSTGRES__URL", &url)
        .with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url())
        .with("POSTGRES__PASSWORD_COMMAND", &command);
    let mut daemon = member.start(&scope);
    let mut load = Load::new(93);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // THEN the commands take the same
    let mut shown = member.run(&scope, &["cursors", "show"]);
    assert_eq!(shown.wait().code(), Some(0), "{}", shown.log());

    // WHEN Kafka's password is changed, and then the file, without SIGHUP
    set_password(&servers, "sesame2");
    scope.feed(load.take(200));
    write("kafka", "sesame2");
    says(&daemon, 0, &["INFO", "reloaded", "a file has changed"]);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();

    // WHEN the file is wrong for a while, THEN a metric tells so, until it is as before
    let is_told = |value: f64| {
        wait_until_within(PATIENCE, "the metric tells it", || daemon.metric(RELOADED, "") == value);
    };
    write("kafka", "sesame1");
    is_told(0.0);
    // AND the log has the broker's reason, and that of a file without a password
    let reason = ["WARN", "those in use stay", "asking for the input topic", "uthentication failed"];
    let said = says(&daemon, 0, &reason);
    write("kafka", "");
    says(&daemon, said, &["WARN", "those in use stay", "kafka.password_file", &at("kafka"), "empty"]);
    write("kafka", "sesame2");
    is_told(1.0);

    // WHEN the password command fails as connections are lost, THEN this is named
    fs::remove_file(folder.path().join("postgres")).unwrap();
    scope.cut_connections();
    scope.feed(load.take(200));
    let words = "postgres.password_command: it failed (exit status: 1)";
    wait_until_within(PATIENCE, words, || missing(&daemon).contains(words));
    assert!(daemon.status()["missing"].to_string().contains(words), "{}", daemon.status());
    says(&daemon, 0, &["WARN", words]);

    // WHEN it prints the new password, THEN payments go on
    scope.execute_as_admin(&format!("ALTER ROLE \"{role}\" PASSWORD 'hush3'"));
    write("postgres", "hush3\n");
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
    let log = daemon.log();
    assert!(!log.contains("hush") && !log.contains("sesame"), "{log}");
}
