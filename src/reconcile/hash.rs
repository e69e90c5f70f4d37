//! 32-bit hashes of rows and outputs; a difference stays undetected with probability 1 in 2^32. Pure.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::domain::publication::DEAD_LETTER_VALUE_BYTES_MAX;

// 0 means "none".
fn folded(hash: u64) -> u32 {
    ((hash ^ (hash >> 32)) as u32).max(1)
}

/// Hash of a row in the format of a binary COPY.
pub fn row(bytes: &[u8]) -> u32 {
    folded(xxh3_64(bytes))
}

/// Hash of a key and a value.
pub fn message(key: Option<&[u8]>, value: Option<&[u8]>) -> u32 {
    let mut hash = Xxh3::new();
    for part in [key, value] {
        hash.update(&part.map_or(-1, |p| p.len() as i64).to_be_bytes());
        hash.update(part.unwrap_or_default());
    }
    folded(hash.digest())
}

/// Hash of the dead letter of a record; the SHA-256 represents a value that was left out for its length.
pub fn dead_letter(key: Option<&[u8]>, value: Option<&[u8]>) -> u32 {
    match value.filter(|v| v.len() > DEAD_LETTER_VALUE_BYTES_MAX) {
        None => message(key, value),
        Some(long) => {
            let digest: String = Sha256::digest(long).iter().map(|byte| format!("{byte:02x}")).collect();
            message(key, Some(digest.as_bytes()))
        }
    }
}

/// Hash by which Java's partitioner assigns a key, before the modulo: murmur2 (`Utils.murmur2`), made
/// positive.
pub fn java_partition_hash(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c_u32 ^ key.len() as u32;
    let mut words = key.chunks_exact(4);
    for word in words.by_ref() {
        let mut k = word.iter().rev().fold(0_u32, |k, byte| (k << 8) | u32::from(*byte));
        k = k.wrapping_mul(M);
        k ^= k >> 24;
        k = k.wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash ^= rest.iter().rev().fold(0_u32, |k, byte| (k << 8) | u32::from(*byte));
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^= hash >> 15;
    hash & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_where_javas_partitioner_puts_them() {
        // From the tests of Apache Kafka, UtilsTest.testMurmur2.
        for (key, expected) in [
            ("21", -973_932_308_i32),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(java_partition_hash(key.as_bytes()), expected.cast_unsigned() & 0x7fff_ffff, "{key}");
        }
    }

    #[test]
    fn null_and_empty_are_not_the_same() {
        assert_ne!(message(None, Some(b"a")), message(Some(b""), Some(b"a")));
        assert_ne!(message(Some(b"a"), Some(b"b")), message(Some(b"ab"), Some(b"")));
        let long = vec![b'x'; DEAD_LETTER_VALUE_BYTES_MAX + 1];
        assert_eq!(dead_letter(Some(b"1"), Some(b"x")), message(Some(b"1"), Some(b"x")));
        assert_ne!(dead_letter(Some(b"1"), Some(&long)), message(Some(b"1"), Some(&long)));
    }
}
