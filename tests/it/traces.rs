//! Traces, as received by a third-party collector.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use serde_json::Value;

use crate::support::{Daemon, Payment, Scope, free_address, listen, uuid_v4, wait_until};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// The collector's program, built once by Cargo, separately from the program under test.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".local/otlp-collector");
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/otlp/Cargo.toml"))
            .arg("--target-dir")
            .arg(&folder)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        folder.join("debug/otlp-collector")
    })
}

/// A third-party OTLP collector (HTTP, protobuf).
struct Collector {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    port: u16,
}

impl Collector {
    fn start(port: u16) -> Self {
        let mut child = Command::new(program())
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ask = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        Self { child, ask, answers, port: line.trim().parse().unwrap() }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// All spans so far, each with its resource.
    fn spans(&mut self) -> Vec<Value> {
        self.ask.write_all(b"\n").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address where the collector does not answer properly.
struct NoCollector {
    address: SocketAddr,
    /// What was sent, each request once: a retried request is identical.
    exports: Arc<Mutex<BTreeSet<Vec<u8>>>>,
    thread: Option<JoinHandle<()>>,
}

impl NoCollector {
    /// Accepts every connection, and answers 503 or never.
    fn start(answers: bool) -> Self {
        let listener = listen();
        let address = listener.local_addr().unwrap();
        let exports = Arc::new(Mutex::new(BTreeSet::new()));
        let noted = Arc::clone(&exports);
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                // The test's own connection that ends the thread: it sends nothing.
                let Some(body) = request(&connection) else { return };
                noted.lock().unwrap().insert(body);
                if answers {
                    let answer =
                        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                    let _ = connection.write_all(answer.as_bytes());
                } else {
                    kept.push(connection);
                }
            }
        });
        Self { address, exports, thread: Some(thread) }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn exports(&self) -> usize {
        self.exports.lock().unwrap().len()
    }
}

impl Drop for NoCollector {
    /// The port is free afterwards.
    fn drop(&mut self) {
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The body of a request; `None` if there was none.
fn request(connection: &TcpStream) -> Option<Vec<u8>> {
    let mut reader = BufReader::new(connection);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(body)
}

/// An attribute as OTLP's JSON has it: a list of keys, each with a value named by its type.
fn attribute<'v>(attributes: &'v Value, key: &str) -> Option<&'v Value> {
    let found = attributes.as_array()?.iter().find(|attribute| attribute["key"] == key)?;
    found["value"].as_object()?.values().next()
}

fn traced<'s>(scope: &'s Scope<'s>, endpoint: &str, more: &[(&str, &str)]) -> Daemon {
    let mut settings = vec![
        ("PAYMENT_WRITER__TRACING__OTLP_ENDPOINT", endpoint),
        ("PAYMENT_WRITER__TRACING__SAMPLE_RATIO", "1"),
    ];
    settings.extend_from_slice(more);
    scope.daemon_with(&["run"], &settings)
}

#[test]
fn a_collector_receives_a_batch_with_its_phases_and_the_links_to_its_payments() {
    // GIVEN a daemon that traces every batch
    let mut collector = Collector::start(free_address().port());
    let scope = Scope::ready("traces", 1, 1);
    let mut daemon = traced(&scope, &collector.endpoint(), &[("PAYMENT_WRITER__LOG__FORMAT", "json")]);
    daemon.wait_until_ready();

    // WHEN it writes a payment with a trace context, and then a conflict
    let payment = Payment::new(uuid_v4(1), 31);
    let conflict = Payment::new(uuid_v4(1), 31).amount("11").message();
    scope.produce(&scope.input_topic, [payment.message().header("traceparent", PARENT), conflict]);
    wait_until("both have their outcome", || daemon.metric("payment_writer_records_total", "") == 2.0);
    daemon.terminate();
    assert!(daemon.wait().success());

    // THEN the collector has spans of the batch, with the attributes of the semantic conventions
    let all = collector.spans();
    let batch = format!("process {}", scope.input_topic);
    let roots: Vec<&Value> = all.iter().filter(|s| s["span"]["name"] == *batch).collect();
    assert!(!roots.is_empty(), "{all:#?}");
    for root in &roots {
        let service = attribute(&root["resource"], "service.name").unwrap();
        assert_eq!(service, "payment-writer");
        for (key, value) in [
            ("messaging.system", "kafka"),
            ("messaging.operation.type", "process"),
            ("messaging.destination.name", scope.input_topic.as_str()),
            ("messaging.consumer.group.name", scope.group_id.as_str()),
        ] {
            assert_eq!(attribute(&root["span"]["attributes"], key).unwrap(), value, "{key}");
        }
        // AND of its phases and their steps
        let below = |parent: &Value| -> Vec<&Value> {
            all.iter().filter(|s| s["span"]["parentSpanId"] == parent["span"]["spanId"]).collect()
        };
        let names = |spans: &[&Value]| -> Vec<String> {
            spans.iter().map(|s| s["span"]["name"].as_str().unwrap().to_owned()).collect()
        };
        let phases = below(root);
        assert_eq!(names(&phases), ["assemble", "database", "kafka"]);
        assert_eq!(names(&below(phases[1])), ["claim", "copy", "commit"]);
        assert_eq!(names(&below(phases[2])), ["produce", "offsets", "deliver", "commit"]);
    }
    // AND the link to the payment's trace
    let links: Vec<&Value> = roots.iter().flat_map(|r| r["span"]["links"].as_array().unwrap()).collect();
    assert_eq!(links.iter().map(|link| link["traceId"].as_str().unwrap()).collect::<Vec<_>>(), [TRACE]);
    // AND the dead letter's log line names the trace
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("a payment is a dead letter")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert!(roots.iter().any(|root| root["span"]["traceId"] == line["trace_id"]), "{line}");
    // AND no span contains data of a payment
    let text = serde_json::to_string(&all).unwrap();
    assert!(!text.contains(&uuid_v4(1).to_string()) && !text.contains("123131"), "{text}");

    // AND the payment's trace context is passed on in its outputs
    let outputs = [&scope.read_topic, &scope.email_topic].map(|topic| scope.read_all(topic));
    for output in outputs.iter().flatten() {
        assert_eq!(output.header("traceparent"), PARENT);
    }
    assert_eq!(outputs.iter().map(Vec::len).sum::<usize>(), 2);
}

#[test]
fn an_unavailable_collector_blocks_nothing_and_is_logged_once() {
    // GIVEN a server that rejects everything at the collector's address
    let nobody = NoCollector::start(true);
    let port = nobody.address.port();
    let scope = Scope::ready("traces_away", 1, 1);
    let daemon = traced(&scope, &nobody.endpoint(), &[]);
    daemon.wait_until_ready();

    // WHEN payments arrive, they are still written, and the log says once that spans are lost
    let told = || daemon.log().matches("spans cannot be exported").count();
    let mut seed = 0;
    let mut pay = || {
        seed += 1;
        scope.produce(&scope.input_topic, [Payment::new(uuid_v4(seed), 31).message()]);
        wait_until("it is written", || scope.count("payment_core") == seed as i64);
    };
    // Exports are sequential: when the third starts, two have failed.
    wait_until("three exports were attempted", || {
        pay();
        nobody.exports() >= 3
    });
    assert_eq!(told(), 1);
    assert!(daemon.log().contains("the collector answers 503"), "{}", daemon.log());

    // AND when the collector is back, spans arrive again, which is logged once
    drop(nobody);
    let mut collector = Collector::start(port);
    wait_until("a span arrives", || {
        pay();
        !collector.spans().is_empty()
    });
    wait_until("the change is logged", || daemon.log().contains("spans are exported again"));
    assert_eq!(told(), 1);
}

#[test]
fn a_collector_that_never_answers_does_not_prevent_shutdown() {
    let silent = NoCollector::start(false);
    let scope = Scope::ready("traces_silent", 1, 1);
    let mut daemon = traced(&scope, &silent.endpoint(), &[]);
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, [Payment::new(uuid_v4(1), 31).message()]);
    wait_until("its spans were sent", || silent.exports() > 0);

    daemon.terminate();

    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert_eq!(scope.count("payment_core"), 1);
}
