//! What systemd is told: `Type=notify` and `WatchdogSec=`.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::support::{Scope, Servers};

/// Waits for a message that has this text.
fn receive(socket: &UnixDatagram, expected: &str) -> String {
    let mut buffer = [0; 4_096];
    let mut seen = Vec::new();
    loop {
        let length =
            socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{expected}: {error}; came: {seen:?}"));
        let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if message.contains(expected) {
            return message;
        }
        seen.push(message);
    }
}

#[test]
fn systemd_is_told_that_it_is_up_why_it_waits_that_it_works_and_that_it_stops() {
    // GIVEN a database without a schema, and a socket of a service manager
    let scope = Scope::new(Servers::shared(), "notify");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();

    // WHEN the daemon starts
    let settings = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "1000000")];
    let mut daemon = scope.daemon_with(&["run"], &settings);

    // THEN it is up, although it waits, and says for what
    receive(&socket, "READY=1");
    let waiting = receive(&socket, "STATUS=waiting for");
    assert!(waiting.contains("WATCHDOG=1"), "{waiting}");
    receive(&socket, "migrate");
    // AND it says when it writes
    scope.command(&["migrate"]).succeeds();
    scope.create_topics(2, 1);
    receive(&socket, "STATUS=writing 2 partitions, 0 records wait");

    // WHEN it is stopped, it says so, and commands say nothing
    daemon.terminate();
    receive(&socket, "STOPPING=1");
    assert!(daemon.wait().success(), "{}", daemon.log());
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut [0; 4_096]).is_ok() {}
    scope.command_with(&["topics", "create"], &settings);
    assert!(socket.recv(&mut [0; 64]).is_err(), "a command is no service");
}
