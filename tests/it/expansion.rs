//! Record batches that are small in the log and huge once they are decompressed: the worst that the topic's
//! `max.message.bytes` lets in, in each codec. The library decompresses a batch as a whole, and has a limit of its own
//! for zstd alone.

use sha2::{Digest, Sha256};

use crate::limits::resident_peak_mb;
use crate::support::{Member, Message, Payment, Scope, uuid_v4};

/// A value of one repeated byte that a batch of 1,048,588 bytes, the default of `max.message.bytes`, can hold.
struct Bomb {
    codec: &'static str,
    bytes: usize,
    /// What the daemon may take when each of two lanes meets one, as docs/sizing.md says it.
    resident_mb_max: u64,
}

/// The library gives zstd no more than `receive.message.max.bytes`, 100 MB, and of that a third at times.
const ZSTD: Bomb = Bomb { codec: "zstd", bytes: 30_000_000, resident_mb_max: 320 };
const SNAPPY: Bomb = Bomb { codec: "snappy", bytes: 20_000_000, resident_mb_max: 320 };
const LZ4: Bomb = Bomb { codec: "lz4", bytes: 240_000_000, resident_mb_max: 1_200 };
/// A thousand to one, and as large as a librdkafka producer can send it.
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

/// Two lanes meet the bomb at the same time; a third partition has payments alone.
fn drill(name: &str, bomb: &Bomb) {
    // GIVEN payments before and behind the batch
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

    // THEN the value is a dead letter that names its size, and everything else is written
    scope.wait_until_caught_up();
    assert_eq!(scope.count("payment_core"), 30);
    let letters = scope.read_all(&scope.dead_letter_topic);
    assert_eq!(letters.len(), 2);
    for letter in &letters {
        assert_eq!(letter.header("dlq-reason"), "too_large");
        assert_eq!(letter.header("dlq-value-bytes"), bomb.bytes.to_string());
    }
    // AND the memory that it took has a limit
    let peak = resident_peak_mb(&daemon);
    println!("{}: {} bytes in each of two lanes, resident at most {peak} MB", bomb.codec, bomb.bytes);
    assert!(peak < bomb.resident_mb_max, "{}: {peak} MB", bomb.codec);
    daemon.drains();
}

#[test]
fn a_batch_that_grows_a_hundredfold_is_read_within_a_limit_of_memory() {
    drill("grows_zstd", &ZSTD);
}

/// The worst of each other codec.
#[test]
#[ignore = "takes minutes and gigabytes: make worst-batches"]
fn the_worst_batch_of_each_codec_is_survived() {
    drill("grows_snappy", &SNAPPY);
    drill("grows_lz4", &LZ4);
    drill("grows_gzip", &GZIP);
}

#[test]
fn keys_and_crowds_of_headers_too_large_for_any_output_do_not_stop_their_partition() {
    // GIVEN what fits into a compressed batch: a key of megabytes, and headers without names and values
    let scope = Scope::ready("large_keys", 1, 1);
    let key = "3".repeat(3_000_000);
    let crowd = (0..300_000).fold(Message::new("31", "{"), |message, _| message.header("", ""));
    let payment = Payment::new(uuid_v4(1), 31).message();
    let other_key = Message { key: Some(key.clone().into_bytes()), ..payment.clone() };
    for message in [Message::new(key.as_str(), "{"), other_key, crowd, payment] {
        scope.produce_compressed("gzip", message);
    }

    // WHEN the daemon has seen them
    scope.drain();

    // THEN each has its outcome, the key by size and hash
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
    // AND the command that shows a letter says so, and that it cannot be replayed
    let shown = scope.command(&["dlq", "show", &format!("0/{}", letters[0].offset)]).succeeds().stdout;
    assert!(
        shown.contains(&format!("a key of 3000000 bytes, SHA-256 {hash}; cannot be replayed")),
        "{shown}"
    );
    let replay = scope.command(&["dlq", "replay", "--all"]).stdout;
    assert!(replay.contains("key_left_out"), "{replay}");
}
