//! Records written by Apache Kafka's own client: a Java process that receives whole transactions.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::support::{Message, Scope, TransactionWriter};

/// Longer than all timeouts of one transaction in `WriteRecords.java` together.
const ANSWER_MAX: Duration = Duration::from_secs(60);

fn tool(name: &str) -> PathBuf {
    std::env::var_os("JAVA_HOME").map_or(name.into(), |home| PathBuf::from(home).join("bin").join(name))
}

/// Kafka's client, fetched by `dev/servers install` with the broker.
fn class_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".local/kafka/libs/*")
}

/// Folder of the compiled program; it is compiled once in a run.
fn classes() -> &'static Path {
    static CLASSES: OnceLock<PathBuf> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("java-{}", std::process::id()));
        let compiled = Command::new(tool("javac"))
            .arg("-cp")
            .arg(class_path())
            .arg("-d")
            .arg(&folder)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/java/WriteRecords.java"))
            .output()
            .expect("dev/install installs a JDK");
        assert!(compiled.status.success(), "javac: {}", String::from_utf8_lossy(&compiled.stderr));
        folder
    })
}

/// A Java process that is replaced when it does not answer any more.
pub struct JavaWriter {
    arguments: [String; 4],
    process: Option<Process>,
}

struct Process {
    child: Child,
    records: BufWriter<ChildStdin>,
    answers: Receiver<String>,
}

impl JavaWriter {
    pub fn new(scope: &Scope<'_>, compression: &str) -> JavaWriter {
        let topic = scope.input_topic.clone();
        let transactional_id = format!("{topic}_java");
        let servers = scope.servers.bootstrap_servers().to_owned();
        let arguments = [servers, topic, transactional_id, compression.to_owned()];
        JavaWriter { process: Some(Process::start(&arguments)), arguments }
    }
}

impl TransactionWriter for JavaWriter {
    fn write(&mut self, records: &[Message], is_committed: bool) -> Result<(), String> {
        let mut process = self.process.take().unwrap_or_else(|| Process::start(&self.arguments));
        let answer = process.write(records, is_committed)?;
        self.process = Some(process);
        match answer.strip_prefix("failed ") {
            None => Ok(()),
            Some(why) => Err(format!("Kafka's Java client: {why}")),
        }
    }
}

impl Process {
    fn start(arguments: &[String]) -> Process {
        let class_path = std::env::join_paths([classes().to_owned(), class_path()]).unwrap();
        let mut child = Command::new(tool("java"))
            .args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx96m"])
            // Outages are expected here: the client's log is not needed.
            .arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=off")
            .arg("-cp")
            .arg(class_path)
            .arg("WriteRecords")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("dev/install installs a JDK");
        let records = BufWriter::new(child.stdin.take().unwrap());
        let output = BufReader::new(child.stdout.take().unwrap());
        let (said, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        Process { child, records, answers }
    }

    fn write(&mut self, records: &[Message], is_committed: bool) -> Result<String, String> {
        for record in records {
            self.write_line(&line(record))?;
        }
        self.write_line(if is_committed { "commit" } else { "abort" })?;
        self.records.flush().map_err(|error| format!("the Java process: {error}"))?;
        self.answers.recv_timeout(ANSWER_MAX).map_err(|error| format!("the Java process: {error}"))
    }

    fn write_line(&mut self, line: &str) -> Result<(), String> {
        writeln!(self.records, "{line}").map_err(|error| format!("the Java process: {error}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The input format of `WriteRecords.java`.
fn line(record: &Message) -> String {
    let partition = record.partition.map_or("-".to_owned(), |partition| partition.to_string());
    let mut words = vec![partition, word(record.key.as_deref()), word(record.value.as_deref())];
    for (name, value) in &record.headers {
        words.extend([word(Some(name.as_bytes())), word(value.as_deref())]);
    }
    words.join(" ")
}

fn word(bytes: Option<&[u8]>) -> String {
    match bytes {
        None => "-".to_owned(),
        Some([]) => ".".to_owned(),
        Some(bytes) => openssl::base64::encode_block(bytes),
    }
}
