//! Record batches that are small in the log and huge when decompressed: the worst that the topic's
//! `max.message.bytes` allows, in each codec. librdkafka decompresses a batch as a whole, and limits the size
//! for zstd alone.

use sha2::{Digest, Sha256};

use crate::limits::resident_peak_mb;
use crate::support::{Member, Message, Payment, Scope, uuid_v4};

/// A value of one repeated byte that a batch of 1,048,588 bytes, the default of `max.message.bytes`, can hold.
struct Bomb {
    codec: &'static str,
    bytes: usize,
    /// Memory that the daemon may use when each of two lanes reads one, as in docs/sizing.md.
    resident_mb_max: u64,
}

/// librdkafka limits zstd to `receive.message.max.bytes`, 100 MB, and in some cases to a third of that.
const ZSTD: Bomb = Bomb { codec: "zstd", bytes: 30_000_000, resident_mb_max: 320 };
const SNAPPY: Bomb = Bomb { codec: "snappy", bytes: 20_000_000, resident_mb_max: 320 };
const LZ4: Bomb = Bomb { codec: "lz4", bytes: 240_000_000, resident_mb_max: 1_200 };
/// A ratio of a thousand to one, and as large as a librdkafka producer can send.
const GZIP: Bomb = Bomb { codec: "gzip", bytes: 999_000_000, resident_mb_max: 4_096 };

impl Bomb {
    fn write(&self, scope: &Scope<'_>, partition: i32) {
        let message = Message::new("7", vec![b' '; self.bytes]).partition(partition);
        scope.produce_compressed(self.codec, message);
    }
}

fn payments(scope: &Scope<'_>, seeds: std::ops::Range<u64>, partition: i32) {
    let payment = |seed| Payment::new(uuid_v4(seed), i64::from(partition)).message().partition(partition);
    scope.produce(&scope.input_topic, seeds.map(payment));
}

/// Two lanes read the batch at the same time; a third partition has only payments.
fn drill(name: &str, bomb: &Bomb) {
    // GIVEN payments before and after the batch
    let scope = Scope::ready(name, 3, 2);
    for partition in 0..3 {
        let first = u64::try_from(partition).unwrap() * 100;
        payments(&scope, first..first + 5, partition);
        if partition < 2 {
            bomb.write(&scope, partition);
        }
        payments(&scope, first + 5..first + 10, partition);
    }

    // WHEN they are drained
    let mut daemon = Member::new("a").start(&scope);

    // THEN the value is a dead letter with its size, and everything else is written
    scope.wait_until_caught_up();
    assert_eq!(scope.count("payment_core"), 30);
    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 2);
    for letter in &letters {
        assert_eq!(letter.header("dlq-reason"), "too_large");
        assert_eq!(letter.header("dlq-value-bytes"), bomb.bytes.to_string());
    }
    // AND memory use stays below the limit
    let peak = resident_peak_mb(&daemon);
    println!("{}: {} bytes in each of two lanes, resident at most {peak} MB", bomb.codec, bomb.bytes);
    assert!(peak < bomb.resident_mb_max, "{}: {peak} MB", bomb.codec);
    daemon.drains();
}

#[test]
fn a_batch_that_decompresses_to_a_hundred_times_its_size_is_read_within_a_memory_limit() {
    drill("grows_zstd", &ZSTD);
}

/// The worst batch of each other codec.
#[test]
#[ignore = "takes minutes and gigabytes: make worst-batches"]
fn the_worst_batch_of_each_codec_is_survived() {
    drill("grows_snappy", &SNAPPY);
    drill("grows_lz4", &LZ4);
    drill("grows_gzip", &GZIP);
}

#[test]
fn keys_and_headers_too_large_for_any_output_do_not_stop_their_partition() {
    // GIVEN what fits into a compressed batch: a key of megabytes, and many headers with empty names and
    // values
    let scope = Scope::ready("large_keys", 1, 1);
    let key = "3".repeat(3_000_000);
    let crowd = (0..300_000).fold(Message::new("31", "{"), |message, _| message.header("", ""));
    let payment = Payment::new(uuid_v4(1), 31).message();
    let other_key = Message { key: Some(key.clone().into_bytes()), ..payment.clone() };
    for message in [Message::new(key.as_str(), "{"), other_key, crowd, payment] {
        scope.produce_compressed("gzip", message);
    }

    // WHEN the daemon has processed them
    scope.drain();

    // THEN each has its outcome; the key is replaced by its size and hash
    assert_eq!(scope.count("payment_core"), 1);
    let letters = scope.read_all(&scope.dead_letter_topic);
    let reasons: Vec<&str> = letters.iter().map(|letter| letter.header("dlq-reason")).collect();
    assert_eq!(reasons, ["malformed_json", "key_mismatch", "malformed_json"]);
    let hash: String = Sha256::digest(&key).iter().map(|b| format!("{b:02x}")).collect();
    for letter in &letters[..2] {
        assert_eq!(letter.key, None);
        assert_eq!(letter.header("dlq-key-bytes"), "3000000");
        assert_eq!(letter.header("dlq-key-sha256"), hash);
    }
    // AND the command that shows a dead letter says so, and that it cannot be replayed
    let shown = scope.command(&["dlq", "show", &format!("0/{}", letters[0].offset)]).succeeds().stdout;
    assert!(
        shown.contains(&format!("a key of 3000000 bytes, SHA-256 {hash}; cannot be replayed")),
        "{shown}"
    );
    let replay = scope.command(&["dlq", "replay", "--all"]).stdout;
    assert!(replay.contains("key_left_out"), "{replay}");
}
