//! Which ids this lane has met lately: a hint, never a proof.
//!
//! Most repeats are a producer's second try, soon after the first and on the same partition, so on the same lane. To know
//! of them saves asking the index for every id of a batch. What is forgotten, or was met elsewhere, the index tells.

use xxhash_rust::xxh3::xxh3_64;

/// Ids that are remembered, about; a power of two.
const SLOTS: usize = 1 << 22;

/// A table with one place for each id, in which the next one with the same place takes over. 16 MiB, once it is used.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// The leading half of the hash of the id in each place; 0: none yet.
    tags: Vec<u32>,
}

impl Recent {
    /// Remembers an id; true if it may have been there before.
    pub(super) fn meet(&mut self, id: &[u8; 16]) -> bool {
        if self.tags.is_empty() {
            self.tags = vec![0; SLOTS];
        }
        let hash = xxh3_64(id);
        let tag = ((hash >> 32) as u32).max(1);
        match self.tags.get_mut(hash as usize & (SLOTS - 1)) {
            Some(place) => std::mem::replace(place, tag) == tag,
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_was_met_is_known_and_hardly_any_other() {
        let id = |n: u64| u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes();
        let mut recent = Recent::default();
        let mistaken = (0..100_000).filter(|n| recent.meet(&id(*n))).count();
        assert!(mistaken <= 1, "{mistaken}");
        // Some places were taken over meanwhile.
        let known = (0..100_000).filter(|n| recent.meet(&id(*n))).count();
        assert!(known > 97_000, "{known}");
    }
}
