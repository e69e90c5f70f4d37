//! Who may use the admin port, and what a slow or hostile client can do to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Payment, Reply, Scope, ask, block_on, free_address, uuid_v4, wait_until};

const TOKEN: &str = "first-token-of-the-test";
const NEXT: &str = "second-token-of-the-test";

fn status_of(admin: SocketAddr, method: &str, path: &str, headers: &[&str]) -> u16 {
    ask(admin, method, path, headers, if method == "PUT" { "warn" } else { "" }).unwrap().status
}

#[test]
fn a_token_and_a_known_name_are_needed_for_everything_but_probes() {
    // GIVEN a daemon with a token, a name of the host, and an address for metrics alone
    let scope = Scope::ready("admin_token", 1, 1);
    let (file, metrics) = (scope.servers.dir().join("admin-token"), free_address());
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let metrics_listen = metrics.to_string();
    let settings = [
        ("PAYMENT_WRITER__ADMIN__TOKEN_FILE", file.to_str().unwrap()),
        ("PAYMENT_WRITER__ADMIN__HOSTS", "payments.example"),
        ("PAYMENT_WRITER__ADMIN__METRICS_LISTEN", &metrics_listen),
    ];
    let daemon = scope.daemon_with(&["run"], &settings);
    daemon.wait_until_ready();
    let (here, named, other) = ("Host: 127.0.0.1", "Host: Payments.Example:9464", "Host: other.example");
    let bearer = |token: &str| format!("Authorization: Bearer {token}");
    let right = bearer(TOKEN);
    let basic =
        format!("Authorization: Basic {}", openssl::base64::encode_block(format!("me:{TOKEN}").as_bytes()));

    // THEN each path answers whom it should
    for (method, path, headers, expected) in [
        ("GET", "/livez", &[other][..], 200),
        ("GET", "/readyz", &[other], 200),
        ("GET", "/status", &[here], 401),
        ("GET", "/status", &[here, "Authorization: Bearer wrong"], 401),
        ("GET", "/status", &[here, "Authorization: Basic d3Jvbmc6d3Jvbmc="], 401),
        ("GET", "/status", &[here, &right], 200),
        ("GET", "/status", &[named, &right], 200),
        ("GET", "/status", &[here, &basic], 200),
        ("GET", "/status", &[other, &right], 403),
        ("GET", "/status/history", &[here], 401),
        ("GET", "/status/history", &[here, &basic], 200),
        ("GET", "/metrics", &[other], 401),
        ("GET", "/metrics", &[other, &right], 200),
        ("GET", "/log-level", &[here], 401),
        ("PUT", "/log-level", &[here], 401),
        ("PUT", "/log-level", &[other, &right], 403),
        ("PUT", "/log-level", &[here, &right], 200),
        ("GET", "/none", &[here], 401),
    ] {
        assert_eq!(status_of(daemon.admin, method, path, headers), expected, "{method} {path} {headers:?}");
    }
    for path in ["/", "/console/state", "/console/main.js", "/console/runbooks"] {
        for (headers, expected) in
            [(&[here][..], 401), (&[other], 403), (&[other, &right], 403), (&[here, &basic], 200)]
        {
            assert_eq!(status_of(daemon.admin, "GET", path, headers), expected, "{path} {headers:?}");
        }
    }
    let refused = ask(daemon.admin, "GET", "/status", &[here], "").unwrap();
    assert!(refused.head.contains("www-authenticate: basic"), "a browser asks for it: {}", refused.head);
    for (path, expected) in
        [("/metrics", 200), ("/livez", 200), ("/readyz", 200), ("/status", 404), ("/log-level", 404)]
    {
        assert_eq!(status_of(metrics, "GET", path, &[here]), expected, "{path} of the address for metrics");
    }
    // AND answers tell browsers to keep, guess and embed nothing
    let Reply { head, .. } = ask(daemon.admin, "GET", "/status", &[here, &right], "").unwrap();
    for expected in [
        "x-content-type-options: nosniff",
        "content-security-policy: default-src 'none'",
        "cache-control: no-store",
    ] {
        assert!(head.contains(expected), "{expected}: {head}");
    }
    assert!(!head.contains("set-cookie"), "{head}");

    // AND `top` sends the token of the settings
    let address = daemon.admin.to_string();
    let own = [&settings[..], &[("PAYMENT_WRITER__ADMIN__LISTEN", address.as_str())]].concat();
    scope.command_with(&["top", "--once", "--interval", "100ms"], &own).succeeds();

    // WHEN the file changes, the next request needs the new token
    std::fs::write(&file, NEXT).unwrap();
    assert_eq!(status_of(daemon.admin, "GET", "/status", &[here, &right]), 401);
    assert_eq!(status_of(daemon.admin, "GET", "/status", &[here, &bearer(NEXT)]), 200);
    // WHEN it is gone, nobody may ask, and the log says why
    std::fs::remove_file(&file).unwrap();
    assert_eq!(status_of(daemon.admin, "GET", "/status", &[here, &bearer(NEXT)]), 503);
    assert_eq!(status_of(daemon.admin, "GET", "/readyz", &[here]), 200);
    wait_until("the log says why", || daemon.log().contains("it has no token to compare"));
    for secret in [TOKEN, NEXT] {
        assert!(!daemon.log().contains(secret), "the log has a token");
    }
    // AND a daemon does not start with it
    let failed = scope.command_with(&["run"], &settings);
    assert_eq!(failed.code, Some(2), "{}", failed.stderr);
    assert!(failed.stderr.contains("admin.token_file"), "{}", failed.stderr);
}

/// Sends what it is given, and returns the first line of the answer; empty if the connection was closed.
fn first_line(admin: SocketAddr, sent: &[u8]) -> String {
    answer_of(TcpStream::connect(admin).unwrap(), sent)
}

fn answer_of(mut stream: TcpStream, sent: &[u8]) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The server may answer and close before everything is sent.
    let _ = stream.write_all(sent);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn requests_are_limited_and_clients_that_hold_all_connections_are_cut_off() {
    // GIVEN a daemon
    let scope = Scope::ready("admin_limits", 1, 1);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();

    // WHEN a head or a body is too large, it is refused
    let long = format!("GET /status HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "a".repeat(20_000));
    assert_eq!(first_line(daemon.admin, long.as_bytes()), "HTTP/1.1 431 Request Header Fields Too Large");
    let many: String = (0..100).map(|n| format!("X-{n}: 1\r\n")).collect();
    let many = format!("GET /status HTTP/1.1\r\nHost: localhost\r\n{many}\r\n");
    assert_eq!(first_line(daemon.admin, many.as_bytes()), "HTTP/1.1 431 Request Header Fields Too Large");
    let body = format!(
        "PUT /log-level HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5000\r\n\r\n{}",
        "a".repeat(5_000)
    );
    assert_eq!(first_line(daemon.admin, body.as_bytes()), "HTTP/1.1 413 Payload Too Large");

    // WHEN a client opens all connections that it may have, and sends half of a request
    let held: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.admin).unwrap();
            let _ = stream.write_all(b"GET /status HTTP/1.1\r\nHost:");
            stream
        })
        .collect();

    // THEN another address is answered
    let probe = |from: &str| {
        let stream = block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
            socket.connect(daemon.admin).await.unwrap().into_std().unwrap()
        });
        stream.set_nonblocking(false).unwrap();
        answer_of(stream, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    };
    assert_eq!(probe("127.0.0.2"), "HTTP/1.1 200 OK");
    // AND its own are closed, or cut off after a while; then it is answered, too
    wait_until("it is cut off", || probe("127.0.0.1") == "HTTP/1.1 200 OK");
    drop(held);
}

#[test]
fn the_last_minutes_can_be_asked_for_after_the_event() {
    // GIVEN a daemon that wrote payments, a duplicate and a dead letter
    let scope = Scope::ready("history", 1, 2);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    let payment = |seed: u64| Payment::new(uuid_v4(seed), 31).message();
    scope.produce(&scope.input_topic, (0..20).map(payment).chain([payment(3)]));
    wait_until("all have their outcome", || daemon.metric("payment_writer_records_total", "") == 21.0);

    // WHEN its history is asked for
    let history = |path: &str| -> Value { serde_json::from_str(&daemon.get(path).unwrap().body).unwrap() };
    let sum = |history: &Value, name: &str| -> u64 {
        history["points"][name].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum()
    };

    // THEN the points add up to what was done
    wait_until("the points have it", || sum(&history("/status/history"), "written") == 20);
    let all = history("/status/history");
    assert_eq!(sum(&all, "duplicates"), 1);
    assert_eq!(all["interval_seconds"], 1);
    let points = all["points"].as_object().unwrap();
    let count = points["at_ms"].as_array().unwrap().len();
    for (name, column) in points {
        assert_eq!(column.as_array().unwrap().len(), count, "{name}");
    }
    assert!(points["latency_p50_seconds"].as_array().unwrap().iter().any(Value::is_f64));
    assert!(
        points["resident_bytes"].as_array().unwrap().iter().all(|bytes| bytes.as_u64().unwrap() > 1 << 20)
    );

    // AND a caller that has some of them gets the others alone
    let last = points["at_ms"].as_array().unwrap()[count - 1].as_i64().unwrap();
    wait_until("there is a newer one", || {
        history(&format!("/status/history?after={last}"))["points"]["at_ms"].as_array().unwrap().len() == 1
    });
    assert_eq!(daemon.get("/status/history?after=soon").unwrap().status, 400);
}
