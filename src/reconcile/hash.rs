//! 32-bit hashes of rows and outputs; a difference stays undetected with probability 1 in 2^32. Pure.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::domain::publication::{DEAD_LETTER_KEY_BYTES_MAX, DEAD_LETTER_VALUE_BYTES_MAX};

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

/// Hash of the dead letter of a record; the SHA-256 represents a key or value that was left out for its length.
pub fn dead_letter(key: Option<&[u8]>, value: Option<&[u8]>) -> u32 {
    let digest = |long: &[u8]| Sha256::digest(long).iter().map(|byte| format!("{byte:02x}")).collect();
    let digest_over = |max, part: Option<&[u8]>| part.filter(|part| part.len() > max).map(digest);
    let keys: Option<String> = digest_over(DEAD_LETTER_KEY_BYTES_MAX, key);
    let values: Option<String> = digest_over(DEAD_LETTER_VALUE_BYTES_MAX, value);
    message(keys.as_ref().map(String::as_bytes).or(key), values.as_ref().map(String::as_bytes).or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_empty_are_not_the_same() {
        assert_ne!(message(None, Some(b"a")), message(Some(b""), Some(b"a")));
        assert_ne!(message(Some(b"a"), Some(b"b")), message(Some(b"ab"), Some(b"")));
        let long = vec![b'x'; DEAD_LETTER_VALUE_BYTES_MAX + 1];
        assert_eq!(dead_letter(Some(b"1"), Some(b"x")), message(Some(b"1"), Some(b"x")));
        assert_ne!(dead_letter(Some(b"1"), Some(&long)), message(Some(b"1"), Some(&long)));
    }
}
