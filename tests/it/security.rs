//! TLS and authentication towards both servers, and the least privileges that the daemon needs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509NameBuilder};

use crate::support::{Daemon, Load, Member, PATIENCE, Scope, Servers, wait_until_within};

#[cfg(feature = "gssapi")]
mod kerberos;
mod rotation;

fn builder(name: &str, key: &PKey<Private>) -> X509Builder {
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_serial_number(&BigNum::from_u32(1).unwrap().to_asn1_integer().unwrap()).unwrap();
    builder.set_subject_name(&subject.build()).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(30).unwrap()).unwrap();
    builder
}

/// A CA, with its certificate in PEM.
struct Authority {
    key: PKey<Private>,
    own: X509,
    certificate: String,
}

fn new_key() -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap()
}

impl Authority {
    fn new(name: &str) -> Authority {
        let key = new_key();
        let mut own = builder(name, &key);
        let mut issuer = X509NameBuilder::new().unwrap();
        issuer.append_entry_by_text("CN", name).unwrap();
        own.set_issuer_name(&issuer.build()).unwrap();
        own.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        own.sign(&key, MessageDigest::sha256()).unwrap();
        let own = own.build();
        let certificate = String::from_utf8(own.to_pem().unwrap()).unwrap();
        Authority { key, own, certificate }
    }

    /// A certificate for 127.0.0.1, and its key.
    fn issue(&self) -> (String, String) {
        let key = new_key();
        let mut issued = builder("a test's host", &key);
        issued.set_issuer_name(self.own.subject_name()).unwrap();
        let context = issued.x509v3_context(Some(&self.own), None);
        let names = SubjectAlternativeName::new().ip("127.0.0.1").build(&context).unwrap();
        issued.append_extension(names).unwrap();
        issued.sign(&self.key, MessageDigest::sha256()).unwrap();
        let [certificate, key] = [issued.build().to_pem(), key.private_key_to_pem_pkcs8()]
            .map(|pem| String::from_utf8(pem.unwrap()).unwrap());
        (certificate, key)
    }
}

/// A CA certificate, and a certificate for 127.0.0.1 signed by it.
pub fn make_certificates(folder: &Path) {
    let authority = Authority::new("a test's authority");
    let (certificate, key) = authority.issue();
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("ca.crt"), authority.certificate).unwrap();
    fs::write(folder.join("server.crt"), certificate).unwrap();
    fs::write(folder.join("server.key"), key).unwrap();
}

fn missing(daemon: &Daemon) -> String {
    daemon.get("/readyz").map_or(String::new(), |reply| reply.body)
}

/// Changes the password of the secure listener's user.
fn set_password(servers: &Servers, password: &str) {
    let user = ["--entity-type", "users", "--entity-name", "writer"];
    let changed = ["--add-config", &format!("SCRAM-SHA-512=[password={password}]")];
    servers.kafka_tool(&[&["kafka.admin.ConfigCommand", "--alter"], &user[..], &changed[..]].concat());
}

/// Grants a principal the ACLs that docs/how-to/secure.md names.
fn grant_rights(scope: &Scope<'_>, instance: &str) {
    let principal = "User:writer";
    let add = |arguments: &[&str]| {
        let tool = ["AclCommand", "--add", "--allow-principal", principal];
        scope.servers.kafka_tool(&[&tool[..], arguments].concat());
    };
    add(&["--operation", "Read", "--operation", "Describe", "--topic", &scope.input_topic]);
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        let operations = ["--operation", "Write", "--operation", "Read", "--operation", "Describe"];
        add(&[&operations[..], &["--topic", topic]].concat());
    }
    add(&["--operation", "Read", "--operation", "Describe", "--group", &scope.group_id]);
    let ids = format!("{}-{instance}-", scope.group_id);
    let operations = ["--operation", "Write", "--operation", "Describe"];
    add(&[&operations[..], &["--transactional-id", &ids, "--resource-pattern-type", "prefixed"]].concat());
}

#[test]
fn certificates_passwords_and_acls_are_checked_and_a_daemon_without_them_waits_and_logs_why() {
    let folder = tempfile::tempdir().unwrap();
    let (certificates, others) = (folder.path().join("ours"), folder.path().join("others"));
    make_certificates(&certificates);
    make_certificates(&others);
    let servers = Servers::with_tls(&certificates);
    let scope = Scope::new(&servers, "secure");
    scope.prepare(4, 2);
    let ca = |folder: &Path| folder.join("ca.crt").to_str().unwrap().to_owned();
    let postgres = |host: &str, folder: &Path, mode: &str| {
        let url = scope.postgres_url().replace("127.0.0.1", host);
        format!("{url}?sslmode={mode}&sslrootcert={}", ca(folder))
    };
    let member = Member::new("a")
        .soon_forgotten()
        .with_sasl(&servers, &certificates, "SCRAM-SHA-512")
        .with("KAFKA__PROPERTIES__SASL_USERNAME", "writer")
        .with("KAFKA__PROPERTIES__SASL_PASSWORD", "sesame")
        .with("POSTGRES__URL", &postgres("127.0.0.1", &certificates, "verify-full"));
    let mut load = Load::new(51);
    scope.produce(&scope.input_topic, load.take(100));
    let waits = |member: &Member, words: &str| {
        let daemon = member.start(&scope);
        wait_until_within(PATIENCE, words, || missing(&daemon).contains(words));
        assert!(daemon.log().contains("blocked until this is fixed"), "{}", daemon.log());
        assert!(!daemon.log().contains("sesame"), "{}", daemon.log());
        daemon
    };

    // WHEN the server's certificate is from another CA, or for another host, THEN nothing is sent to it
    let strangers = postgres("127.0.0.1", &others, "verify-full");
    let daemon = member.clone().with("POSTGRES__URL", &strangers).start(&scope);
    wait_until_within(PATIENCE, "the certificate is refused", || {
        missing(&daemon).contains("certificate verify failed")
    });
    drop(daemon);
    let elsewhere = postgres("localhost", &certificates, "verify-full");
    let daemon = member.clone().with("POSTGRES__URL", &elsewhere).start(&scope);
    wait_until_within(PATIENCE, "the host is refused", || {
        missing(&daemon).contains("certificate verify failed")
    });
    drop(daemon);
    drop(waits(
        &member.clone().with("KAFKA__PROPERTIES__SSL_CA_LOCATION", &ca(&others)),
        "certificate verify failed",
    ));

    // WHEN the password is wrong
    set_password(&servers, "another");
    let mut daemon = waits(&member, "uthentication failed");
    // AND then right but without ACLs, THEN the daemon names what is missing, and continues when each is
    // granted
    set_password(&servers, "sesame");
    wait_until_within(PATIENCE, "rights are missing", || missing(&daemon).contains("uthorization failed"));
    assert!(daemon.is_running());
    grant_rights(&scope, "a");
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, load.take(100));
    scope.wait_until_caught_up();

    // THEN all connections used TLS
    let open = scope.sql(
        "SELECT count(*) FILTER (WHERE s.ssl), count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
         WHERE a.application_name = 'payment-writer' AND a.datname = current_database()",
        &[],
    );
    let (with_tls, all) = (open[0].get::<_, i64>(0), open[0].get::<_, i64>(1));
    assert!(all > 0 && with_tls == all, "{with_tls} of {all} sessions");
    daemon.drains();
    assert!(!daemon.log().contains("sesame"), "{}", daemon.log());

    // AND these ACLs are enough to scan the outputs after the group's offsets were deleted
    scope.produce(&scope.input_topic, load.take(100));
    member.die_at(&scope, "after_postgres_commit");
    scope.delete_group_when_empty();
    member.catch_up(&scope);
    scope.assert_exactly_once();

    // AND without them it halts until they are granted
    scope.produce(&scope.input_topic, load.take(100));
    member.die_at(&scope, "after_postgres_commit");
    scope.delete_group_when_empty();
    let read = |change: &str| {
        let rule =
            ["AclCommand", change, "--allow-principal", "User:writer", "--operation", "Read", "--topic"];
        let force = if change == "--remove" { &["--force"][..] } else { &[] };
        servers.kafka_tool(&[&rule[..], &[&scope.email_topic], force].concat());
    };
    read("--remove");
    let mut daemon = member.start(&scope);
    wait_until_within(PATIENCE, "it halts", || daemon.status().to_string().contains("unproved_events"));
    read("--add");
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn the_daemon_needs_no_more_than_the_writers_role() {
    // GIVEN a schema with its owner, and a user that has only the writer role
    let servers = Servers::shared();
    let scope = Scope::new(servers, "least_rights");
    scope.prepare(3, 2);
    let user = format!("{}_user", scope.database);
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    scope.execute_as_admin(&format!("CREATE ROLE \"{user}\" LOGIN PASSWORD 'u' IN ROLE payment_writer_app"));
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{user}:u@"));
    let member = Member::new("a")
        .soon_forgotten()
        .with("POSTGRES__URL", &url)
        .with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url());
    let mut load = Load::new(52);

    // WHEN it writes, crashes between its commits, finds its group's offsets moved, and has rows rejected
    scope.produce(&scope.input_topic, load.take(150));
    member.catch_up(&scope);
    scope.produce(&scope.input_topic, load.take(150));
    member.die_at(&scope, "after_postgres_commit");
    member.catch_up(&scope);
    scope
        .execute("ALTER TABLE payment_writer.payment_core ADD CONSTRAINT one CHECK (cust_id <> 7) NOT VALID");
    scope.produce(&scope.input_topic, load.take(150));
    member.catch_up(&scope);

    // THEN every record has its outcome
    scope.assert_exactly_once();
    let settings = [("PAYMENT_WRITER__POSTGRES__URL", url.as_str())];
    scope.command_with(&["cursors", "show"], &settings).succeeds();

    // AND that user can neither change the schema nor delete anything
    for forbidden in [
        "DROP TABLE payment_writer.payment_core",
        "ALTER TABLE payment_writer.payment_core ADD COLUMN x integer",
        "CREATE TABLE payment_writer.mine (x integer)",
        "DELETE FROM payment_writer.payment_core",
        "UPDATE payment_writer.payment_core SET amount = 0",
        "TRUNCATE payment_writer.idempotency",
        "DELETE FROM payment_writer.idempotency",
        "DELETE FROM payment_writer.cursor_audit",
        "UPDATE payment_writer.database_identity SET database_id = gen_random_uuid()",
    ] {
        let refused = scope.execute_as(&url, forbidden);
        assert_eq!(refused.as_deref(), Some("42501"), "{forbidden}");
    }
    scope.execute_as_admin(&format!("DROP ROLE \"{user}\"; DROP OWNED BY payment_writer_app"));
}

/// Writes an unsigned token that names its bearer and expires in 8 s, and counts its runs.
fn token_command(folder: &Path) -> String {
    let command = folder.join("token");
    let script = r#"#!/bin/sh
printf x >>"$(dirname "$0")/runs"
part() { printf '%s' "$1" | base64 -w 0 | tr '+/' '-_' | tr -d '='; }
now=$(date +%s)
printf '%s.%s.' "$(part '{"alg":"none"}')" "$(part "{\"sub\":\"writer\",\"iat\":$now,\"exp\":$((now + 8))}")"
"#;
    fs::write(&command, script).unwrap();
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).unwrap();
    command.to_str().unwrap().to_owned()
}

/// A member that authenticates with tokens.
fn with_tokens(servers: &Servers, certificates: &Path) -> Member {
    Member::new("a").with_sasl(servers, certificates, "OAUTHBEARER")
}

#[test]
fn with_tokens_from_a_command_payments_flow_beyond_the_expiry_of_each() {
    // GIVEN a listener that accepts tokens and requires re-authentication on open connections
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "tokens");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    let command = token_command(folder.path());
    let member = with_tokens(&servers, folder.path());

    // WHEN the token command is not set, the error asks for it
    let mut refused = member.run(&scope, &["check-config"]);
    assert_eq!(refused.wait().code(), Some(2), "{}", refused.log());
    assert!(refused.log().contains("must be the command that prints tokens"), "{}", refused.log());

    // AND with one, payments arrive while one token after the other expires
    let mut daemon = member.with("KAFKA__TOKEN_COMMAND", &command).start(&scope);
    let mut load = Load::new(52);
    let ran = || fs::read(folder.path().join("runs")).map_or(0, |runs| runs.len());
    for tokens in [1, 3, 5, 7] {
        wait_until_within(PATIENCE, "another token is made", || ran() >= tokens);
        scope.produce(&scope.input_topic, load.take(100));
        scope.wait_until_caught_up();
    }

    // THEN each has its outcome, and no token was logged
    daemon.drains();
    scope.assert_exactly_once();
    assert!(!daemon.log().contains("eyJ"), "{}", daemon.log());
}

#[cfg(feature = "curl")]
mod oidc {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A token endpoint: answers each request with the client's id and secret with a token of 8 s, and counts
    /// them.
    fn token_endpoint(command: String) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/token", listener.local_addr().unwrap());
        let given = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&given);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 4096];
                let length = stream.read(&mut request).unwrap();
                let request = String::from_utf8_lossy(&request[..length]).to_lowercase();
                // The base64 of "writer:sesame".
                let is_known = request.contains("authorization: basic d3jpdgvyonnlc2ftzq==");
                let token = Command::new(&command).output().unwrap().stdout;
                let body = format!(
                    r#"{{"access_token":"{}","token_type":"Bearer","expires_in":8}}"#,
                    String::from_utf8(token).unwrap().trim()
                );
                let (status, body) =
                    if is_known { ("200 OK", body) } else { ("401 Unauthorized", "{}".into()) };
                let head = "Content-Type: application/json\r\nConnection: close";
                let length = body.len();
                write!(stream, "HTTP/1.1 {status}\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}")
                    .unwrap();
                count.fetch_add(usize::from(is_known), Ordering::Relaxed);
            }
        });
        (url, given)
    }

    #[test]
    fn with_oidc_payments_flow_beyond_the_expiry_of_each_token() {
        // GIVEN a listener that accepts tokens, and an endpoint that issues them for the client's secret
        let folder = tempfile::tempdir().unwrap();
        make_certificates(folder.path());
        let servers = Servers::with_tls(folder.path());
        let scope = Scope::new(&servers, "oidc");
        scope.prepare(4, 2);
        grant_rights(&scope, "a");
        let (url, given) = token_endpoint(token_command(folder.path()));
        let member = with_tokens(&servers, folder.path())
            .with("KAFKA__PROPERTIES__SASL_OAUTHBEARER_METHOD", "oidc")
            .with("KAFKA__PROPERTIES__SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL", &url)
            .with("KAFKA__PROPERTIES__SASL_OAUTHBEARER_CLIENT_ID", "writer")
            .with("KAFKA__PROPERTIES__SASL_OAUTHBEARER_CLIENT_SECRET", "sesame");

        // WHEN payments arrive while one token after the other expires
        let mut daemon = member.start(&scope);
        let mut load = Load::new(53);
        for tokens in [1, 3, 5] {
            wait_until_within(PATIENCE, "another token is given", || given.load(Ordering::Relaxed) >= tokens);
            scope.produce(&scope.input_topic, load.take(100));
            scope.wait_until_caught_up();
        }

        // THEN each has its outcome, and neither token nor secret was logged
        daemon.drains();
        scope.assert_exactly_once();
        assert!(!daemon.log().contains("eyJ") && !daemon.log().contains("sesame"), "{}", daemon.log());
    }
}
