//! What containers do to the program: it is process 1, and its own HTTP client for probes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{PATIENCE, Scope, Servers, TESTED_PROGRAM, wait_until_within};

/// Parent and state of all processes, by id.
fn processes() -> Vec<(u32, u32, String)> {
    let ids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter_map(|id: u32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The name before the state may contain anything, including parentheses.
        let mut words = stat.rsplit_once(") ")?.1.split(' ');
        let state = words.next()?.to_owned();
        Some((id, words.next()?.parse().ok()?, state))
    })
    .collect()
}

/// Words that start a program in namespaces of its own; `None` where that is not allowed.
fn unshare(namespaces: &[&'static str]) -> Option<Vec<&'static str>> {
    [&[][..], &["--user", "--map-root-user"]].into_iter().find_map(|user| {
        let words = [&["unshare"], user, namespaces].concat();
        let mut command = Command::new(words[0]);
        let tried = command.args(&words[1..]).arg("true").stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success()).then_some(words)
    })
}

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn as_process_1_it_reaps_what_password_commands_leave_behind_and_drains() {
    let Some(unshare) = unshare(&["--pid", "--fork", "--kill-child"]) else {
        eprintln!("not tested: this user may not make a process namespace");
        return;
    };
    // GIVEN a password command that leaves a process in its group and one outside
    let scope = Scope::new(Servers::shared(), "process1");
    scope.prepare(2, 1);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let runs = at("runs");
    let leaves = "sleep 1000 >/dev/null & setsid -f sleep 0.2 >/dev/null";
    script(&at("password"), &format!("{leaves}; echo >>{}; echo payment_writer", runs.display()));
    // The command prints the password that the URL had.
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", "//payment_writer@");
    let program = std::env::var(TESTED_PROGRAM).unwrap_or(env!("CARGO_BIN_EXE_payment-writer").to_owned());
    script(&at("program"), &format!("exec {} '{program}' \"$@\"", unshare.join(" ")));

    // WHEN the daemon runs as process 1, and connects again and again
    let command = format!("[\"{}\"]", at("password").display());
    let mut daemon = scope.daemon_with(
        &["run"],
        &[
            (TESTED_PROGRAM, at("program").to_str().unwrap()),
            ("PAYMENT_WRITER__POSTGRES__URL", &url),
            ("PAYMENT_WRITER__POSTGRES__PASSWORD_COMMAND", &command),
        ],
    );
    daemon.wait_until_ready();
    wait_until_within(PATIENCE, "five passwords are asked for", || {
        scope.cut_connections();
        fs::read_to_string(&runs).is_ok_and(|runs| runs.len() >= 5)
    });

    // THEN no zombie stays
    let own = processes().iter().find(|(_, parent, _)| *parent == daemon.id()).unwrap().0;
    wait_until_within(PATIENCE, "no zombie is left", || {
        !processes().iter().any(|(_, parent, state)| *parent == own && state == "Z")
    });

    // AND SIGTERM drains
    daemon.wait_until_ready();
    assert!(Command::new("sh").args(["-c", &format!("kill -s TERM {own}")]).status().unwrap().success());
    assert!(daemon.wait().success(), "{}", daemon.log());
}

#[test]
fn without_time_zones_of_the_system_the_shipped_settings_are_valid() {
    let Some(unshare) = unshare(&["--mount"]) else {
        eprintln!("not tested: this user may not make a mount namespace");
        return;
    };
    let zones = "/usr/share/zoneinfo";
    let hide = format!("! test -d {zones} || mount -t tmpfs none {zones} && exec \"$0\" check-config");
    let mut command = Command::new(unshare[0]);
    command.args(&unshare[1..]).args(["sh", "-c", &hide, env!("CARGO_BIN_EXE_payment-writer")]);
    let checked = command.output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn healthcheck_says_whether_the_daemon_answers_and_whether_it_is_ready() {
    // GIVEN a daemon that waits for a schema, and listens on any address
    let scope = Scope::new(Servers::shared(), "healthcheck");
    let mut daemon = scope.daemon(&["run"]);
    let listen = format!("0.0.0.0:{}", daemon.admin.port());
    let check = |words: &[&str]| {
        let words = [&["healthcheck"], words].concat();
        scope.command_with(&words, &[("PAYMENT_WRITER__ADMIN__LISTEN", &listen)])
    };
    // THEN it answers and is not ready, with the reason
    wait_until_within(PATIENCE, "it answers", || check(&[]).code == Some(0));
    let not_ready = |words: &str| {
        let checked = check(&["--ready"]);
        checked.code == Some(1) && checked.stderr.contains("/readyz: 503") && checked.stderr.contains(words)
    };
    wait_until_within(PATIENCE, "it names the schema", || not_ready("migrate"));

    // WHEN all is there, THEN it is ready
    scope.prepare(2, 1);
    wait_until_within(PATIENCE, "it is ready", || check(&["--ready"]).code == Some(0));

    // WHEN it has ended, THEN it does not answer
    daemon.kill();
    let checked = check(&[]);
    assert!(checked.code == Some(1) && checked.stderr.contains("does not answer"), "{checked:?}");
}
