//! Which ids this lane has met lately: a hint, never a proof.
//!
//! Most repeats are a producer's second try, soon after the first and on the same partition, so on the same lane. To know
//! of them saves asking the index for every id of a batch. What is forgotten, or was met elsewhere, the index tells.

use xxhash_rust::xxh3::xxh3_64;

/// Ids that share a line: as many as a cache line holds.
const LINE: usize = 16;
/// Ids that are remembered, about; a power of two.
const SLOTS: usize = 1 << 22;
const LINES: usize = SLOTS / LINE;

/// Lines of the ids whose hashes end alike; in a full line the next one takes the place of the first. 16 MiB, once it
/// is used.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// The leading half of the hash of each id, the latest first; 0: none yet.
    lines: Vec<[u32; LINE]>,
}

impl Recent {
    /// Remembers an id; true if it may have been there before.
    pub(super) fn meet(&mut self, id: &[u8; 16]) -> bool {
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
        let mut count = |ids: std::ops::Range<u64>| ids.filter(|n| recent.meet(&id(*n))).count();
        let mistaken = count(0..1_500_000);
        assert!(mistaken <= 1, "{mistaken}");
        // Hardly a line was full.
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
        assert!(ids.iter().all(|id| !recent.meet(id)));
        assert!(ids[1..].iter().all(|id| recent.meet(id)));
        assert!(!recent.meet(&ids[0]));
    }
}
