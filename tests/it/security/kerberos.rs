//! Kerberos towards Kafka, with a KDC that each test starts for itself.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{grant_rights, make_certificates, missing};
use crate::support::{Load, Member, PATIENCE, Scope, Servers, free_address, wait_until_within};

const REALM: &str = "PAYMENTS.TEST";

/// Lifetime of the daemon's tickets.
const TICKET_LIFETIME_S: i64 = 20;

/// A KDC with its own realm, and keytabs for a broker and a daemon. It ends when dropped, and with the thread
/// that started it.
struct Kdc {
    folder: PathBuf,
    address: SocketAddr,
    process: Option<Child>,
}

impl Kdc {
    /// Creates the realm in this folder, with `krb5.conf` for all, `kafka.keytab` for the broker, and for the
    /// daemon `writer.keytab` and, with a key that is no longer valid, `outdated.keytab`.
    fn start_in(folder: &Path) -> Kdc {
        let mut kdc = Kdc { folder: folder.to_owned(), address: free_address(), process: None };
        let (address, path) = (kdc.address, folder.to_str().unwrap());
        let clients = format!(
            "[libdefaults]
                default_realm = {REALM}
                dns_lookup_kdc = false
                dns_canonicalize_hostname = false
                rdns = false
                udp_preference_limit = 1
            [realms]
                {REALM} = {{
                    kdc = {address}
                }}
            "
        );
        let server = format!(
            "[realms]
                {REALM} = {{
                    database_name = {path}/principals
                    key_stash_file = {path}/stash
                    kdc_listen = {address}
                    kdc_tcp_listen = {address}
                    default_principal_flags = +preauth
                }}
            [logging]
                kdc = FILE:{path}/kdc.log
            "
        );
        fs::write(folder.join("krb5.conf"), clients).unwrap();
        fs::write(folder.join("kdc.conf"), server).unwrap();
        kdc.run("kdb5_util", &["create", "-s", "-P", "master"]);
        kdc.administer("addprinc -randkey kafka/127.0.0.1");
        kdc.administer(&format!("ktadd -k {path}/kafka.keytab kafka/127.0.0.1"));
        kdc.administer(&format!("addprinc -randkey -maxlife \"{TICKET_LIFETIME_S} seconds\" writer"));
        // Each export creates a new key.
        kdc.administer(&format!("ktadd -k {path}/outdated.keytab writer"));
        kdc.administer(&format!("ktadd -k {path}/writer.keytab writer"));
        kdc.start();
        kdc
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("KRB5_CONFIG", self.folder.join("krb5.conf"))
            .env("KRB5_KDC_PROFILE", self.folder.join("kdc.conf"))
            // Where Debian has the programs of a KDC; an ordinary user may not have them in the path.
            .env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap()))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let output = self.command(program).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    }

    fn administer(&self, query: &str) {
        self.run("kadmin.local", &["-q", query]);
    }

    fn start(&mut self) {
        let output = File::options().create(true).append(true).open(self.folder.join("kdc.out")).unwrap();
        let process = self
            .command("setpriv")
            .args(["--pdeathsig", "KILL", "krb5kdc", "-n", "-r", REALM])
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        self.process = Some(process);
        wait_until_within(PATIENCE, "the KDC listens", || TcpStream::connect(self.address).is_ok());
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// When each ticket of the daemon began with which it was given one for the broker, in seconds.
    fn authentications(&self) -> Vec<i64> {
        let log = fs::read_to_string(self.folder.join("kdc.log")).unwrap();
        let given = format!("writer@{REALM} for kafka/127.0.0.1@{REALM}");
        let began = |line: &str| line.split_once("ISSUE: authtime ")?.1.split_once(',')?.0.parse().ok();
        log.lines().filter(|line| line.contains(&given)).filter_map(began).collect()
    }
}

impl Drop for Kdc {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A member that authenticates with Kerberos.
fn with_kerberos(servers: &Servers, folder: &Path) -> Member {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    Member::new("a")
        .with_sasl(servers, folder, "GSSAPI")
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_SERVICE_NAME", "kafka")
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_PRINCIPAL", &format!("writer@{REALM}"))
        .with_variable("KRB5_CONFIG", &path("krb5.conf"))
}

/// Sends payments and waits for them, each time after another ticket has expired.
fn flow_beyond_the_expiry_of_tickets(scope: &Scope<'_>, kdc: &Kdc, load: &mut Load) {
    for expired in [1, 2] {
        wait_until_within(PATIENCE, "a ticket expires, and another one is used", || {
            let began = kdc.authentications();
            began.iter().any(|last| last - began[0] > expired * TICKET_LIFETIME_S)
        });
        scope.produce(&scope.input_topic, load.take(100));
        scope.wait_until_caught_up();
    }
}

#[test]
fn with_kinit_payments_flow_beyond_the_expiry_of_tickets_and_a_daemon_without_one_waits_and_logs_why() {
    // GIVEN a broker that accepts tickets and requires re-authentication, and a keytab with an outdated key
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    make_certificates(folder.path());
    let mut kdc = Kdc::start_in(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "kinit");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    let keytab = path("daemon.keytab");
    fs::copy(path("outdated.keytab"), &keytab).unwrap();
    let kinit = "kinit -k -t \"%{sasl.kerberos.keytab}\" %{sasl.kerberos.principal}";
    let member = with_kerberos(&servers, folder.path())
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_KEYTAB", keytab.to_str().unwrap())
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_KINIT_CMD", kinit)
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_MIN_TIME_BEFORE_RELOGIN", "8000")
        .with_variable("KRB5CCNAME", path("tickets").to_str().unwrap());
    let mut load = Load::new(54);
    scope.produce(&scope.input_topic, load.take(100));

    // WHEN it starts, THEN it waits and logs why
    let mut daemon = member.start(&scope);
    let words = "No Kerberos credentials available";
    wait_until_within(PATIENCE, words, || missing(&daemon).contains(words));
    let blocked = |line: &str| line.contains("blocked until this is fixed") && line.contains(words);
    wait_until_within(PATIENCE, "the reason is logged", || daemon.log().lines().any(blocked));
    assert!(daemon.log().contains("kinit: Preauthentication failed"), "{}", daemon.log());
    assert!(daemon.is_running());

    // AND with the right keytab it continues, while one ticket after the other expires
    fs::copy(path("writer.keytab"), &keytab).unwrap();
    wait_until_within(PATIENCE, "it is ready", || missing(&daemon).contains("\"ready\":true"));
    flow_beyond_the_expiry_of_tickets(&scope, &kdc, &mut load);

    // WHEN no ticket can be renewed, THEN it waits again, and continues when one can
    kdc.stop();
    wait_until_within(PATIENCE, "Ticket expired", || missing(&daemon).contains("Ticket expired"));
    let unreachable = "kinit: Cannot contact any KDC";
    wait_until_within(PATIENCE, unreachable, || daemon.log().contains(unreachable));
    assert!(daemon.is_running());
    scope.produce(&scope.input_topic, load.take(100));
    kdc.start();
    wait_until_within(PATIENCE, "it is ready", || missing(&daemon).contains("\"ready\":true"));
    scope.wait_until_caught_up();

    // THEN each payment has its outcome
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn with_a_client_keytab_payments_flow_beyond_the_expiry_of_tickets_without_kinit() {
    // GIVEN a daemon whose Kerberos library gets tickets by itself and keeps them in memory
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let kdc = Kdc::start_in(folder.path());
    let servers = Servers::with_tls(folder.path());
    let scope = Scope::new(&servers, "client_keytab");
    scope.prepare(4, 2);
    grant_rights(&scope, "a");
    let member = with_kerberos(&servers, folder.path())
        .with("KAFKA__PROPERTIES__SASL_KERBEROS_MIN_TIME_BEFORE_RELOGIN", "0")
        .with_variable("KRB5_CLIENT_KTNAME", folder.path().join("writer.keytab").to_str().unwrap())
        .with_variable("KRB5CCNAME", "MEMORY:payment-writer");

    // WHEN payments arrive while one ticket after the other expires
    let mut daemon = member.start(&scope);
    let mut load = Load::new(55);
    flow_beyond_the_expiry_of_tickets(&scope, &kdc, &mut load);

    // THEN each has its outcome
    daemon.drains();
    scope.assert_exactly_once();
}
