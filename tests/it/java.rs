//! Messages of the Java original's producer are processed, and its reader can parse the events.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{AT_ISO, AT_MS, Message, Payment, Scope, payment_id, uuid_v4};

/// The libraries of the original's reader, fetched once by Maven.
fn jackson() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".local/java-reader");
    let pom = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/java/pom.xml");
    let (wanted, stamp) = (std::fs::read_to_string(&pom).unwrap(), folder.join("pom.xml"));
    if std::fs::read_to_string(&stamp).ok().as_ref() != Some(&wanted) {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let fetched = Command::new("mvn")
            .args(["-q", "-B", "-f"])
            .arg(&pom)
            .arg("package")
            .stdin(Stdio::null())
            .output()
            .expect("dev/install brings Maven");
        assert!(fetched.status.success(), "Maven: {}", String::from_utf8_lossy(&fetched.stdout));
        std::fs::write(&stamp, wanted).unwrap();
    }
    folder.join("libs")
}

/// What the original's reader parses from these events, one a line.
fn read_by_jackson(events: &[String]) -> String {
    let java =
        std::env::var_os("JAVA_HOME").map_or("java".into(), |home| PathBuf::from(home).join("bin/java"));
    let mut child = Command::new(java)
        .args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-cp"])
        .arg(jackson().join("*"))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/java/ReadEvents.java"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("dev/install installs a JDK");
    child.stdin.take().unwrap().write_all(events.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_originals_payment_is_written_its_warm_up_is_a_dead_letter_and_its_reader_reads_the_event() {
    // GIVEN the warm-up message of the original's producer, then a payment exactly as it sends them
    let scope = Scope::ready("java", 1, 1);
    let (first, second) = (uuid_v4(1), uuid_v4(2));
    let message = |id| {
        let value = format!(
            r#"{{"messageId":"{id}","amount":123131.21,"status":2,"currency":"EUR","custId":57,"type":"BWI","comment":"Creating BWI trn in EUR"}}"#
        );
        Message::new("57", value)
    };
    // AND one at a full second, with more characters to escape
    let odd = Payment::new(second, 57)
        .amount("99999999999999.99")
        .more(r#","comment":"\"é\\😀 \u0007""#)
        .message()
        .timestamp_ms(AT_MS + 1);
    scope.produce(
        &scope.input_topic,
        [Message::new("57", "{}"), message(first).timestamp_ms(AT_MS), odd, message(uuid_v4(3))],
    );

    // WHEN the daemon has processed them
    scope.drain();

    // THEN the warm-up message blocked nothing
    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].header("dlq-reason"), "missing_field");
    assert_eq!(letters[0].value.as_deref(), Some(&b"{}"[..]));
    // AND the payments are written
    assert_eq!(scope.count("payment_core"), 3);
    // AND the events have exactly the fields of the original's events
    let read = scope.read_all(&scope.read_topic);
    let mut fields: Vec<String> = read[0].json().as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(
        fields,
        [
            "amount",
            "comment",
            "createdAt",
            "currency",
            "custId",
            "id",
            "messageId",
            "status",
            "type",
            "updatedAt",
            "version"
        ]
    );
    assert_eq!(read[0].json()["createdAt"], AT_ISO);
    assert_eq!(read[1].json()["createdAt"], "2024-03-01T00:00:00.000Z");
    // AND the original's reader finds every value
    let events: Vec<String> =
        read[..2].iter().map(|event| String::from_utf8(event.value.clone().unwrap()).unwrap()).collect();
    let (first_id, second_id) = (payment_id(first, AT_MS), payment_id(second, AT_MS + 1));
    assert_eq!(
        read_by_jackson(&events),
        format!(
            "{first}|{first_id}|2024-02-29T23:59:59.999|2024-02-29T23:59:59.999|123131.21|2|EUR|57|BWI|Creating BWI trn in EUR|1\n\
             {second}|{second_id}|2024-03-01T00:00|2024-03-01T00:00|99999999999999.99|2|EUR|57|BWI|\"é\\😀 \u{7}|1\n"
        )
    );
}
