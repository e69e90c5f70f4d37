//! The ids that this lane has seen recently: a hint that saves looking up every id of a batch.
//!
//! Most repeated ids are retries of a producer, soon after the first attempt and in the same partition, so on
//! the same lane. The index finds the others.

use xxhash_rust::xxh3::xxh3_64;

/// Ids per line: as many as fit into a CPU cache line.
const LINE: usize = 16;
/// Approximate number of ids that are remembered; a power of two.
const SLOTS: usize = 1 << 22;
const LINES: usize = SLOTS / LINE;

/// A hash table of lines; in a full line a new id replaces the oldest one. 16 MiB after the first use.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// The upper half of the hash of each id, the latest first; 0: unused.
    lines: Vec<[u32; LINE]>,
}

impl Recent {
    /// Inserts an id; returns true if it may have been inserted before.
    pub(super) fn check_and_insert(&mut self, id: &[u8; 16]) -> bool {
        if self.lines.is_empty() {
            self.lines = vec![[0; LINE]; LINES];
        }
        let hash = xxh3_64(id);
        let tag = ((hash >> 32) as u32).max(1);
        let Some(line) = self.lines.get_mut(hash as usize & (LINES - 1)) else {
            return false;
        };
        if line.contains(&tag) {
            return true;
        }
        line.rotate_right(1);
        line[0] = tag;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_was_met_is_known_and_hardly_any_other() {
        let id = |n: u64| u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes();
        let mut recent = Recent::default();
        let mut count = |ids: std::ops::Range<u64>| ids.filter(|n| recent.check_and_insert(&id(*n))).count();
        let mistaken = count(0..1_500_000);
        assert!(mistaken <= 1, "{mistaken}");
        // Almost no line was full.
        let known = count(0..1_500_000);
        assert!(known > 1_499_000, "{known}");
    }

    #[test]
    fn the_first_ids_make_way_for_the_latest() {
        let mut recent = Recent::default();
        // Ids of one line, found by their hash.
        let in_one_line = |id: &[u8; 16]| xxh3_64(id) as usize & (LINES - 1) == 0;
        let ids: Vec<[u8; 16]> =
            (0_u128..).map(u128::to_be_bytes).filter(in_one_line).take(LINE + 1).collect();
        assert!(ids.iter().all(|id| !recent.check_and_insert(id)));
        assert!(ids[1..].iter().all(|id| recent.check_and_insert(id)));
        assert!(!recent.check_and_insert(&ids[0]));
    }
}
