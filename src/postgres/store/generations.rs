//! Decides which ids of a batch cannot be in an older generation and need no lookup there. Pure.

/// A generation that batches read but do not write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct OlderGeneration {
    pub number: i64,
    /// Largest value of the first 48 bits of its ids that are UUIDv7s by their bits; `None` while not
    /// measured.
    pub v7_time_max: Option<i64>,
    /// The same for all other ids.
    pub other_time_max: Option<i64>,
}

/// The first 48 bits: milliseconds since 1970 in a UUIDv7 and in a ULID.
fn head(id: &[u8; 16]) -> i64 {
    id.iter().take(6).fold(0, |sum, byte| sum << 8 | i64::from(*byte))
}

/// Whether the bits are those of a UUID of version 7 and variant 10. Decided by the bits and not by the text
/// form, because an id can be sent once as a ULID and once as a UUID.
fn is_v7(id: &[u8; 16]) -> bool {
    let [_, _, _, _, _, _, version, _, variant, ..] = id;
    version >> 4 == 7 && variant >> 6 == 0b10
}

impl OlderGeneration {
    /// Returns false only if the id is certainly not in this generation: its first bits are larger than those
    /// of every row of its kind. The bounds were measured after the last row was committed, so this does not
    /// depend on clocks or settings. New ids soon exceed the bounds, because the time in an id is at most an
    /// hour ahead of its record.
    pub fn may_hold(&self, id: &[u8; 16]) -> bool {
        let bound = if is_v7(id) { self.v7_time_max } else { self.other_time_max };
        bound.is_none_or(|bound| head(id) <= bound)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn measured(rows: &[[u8; 16]]) -> OlderGeneration {
        let max = |v7: bool| rows.iter().filter(|id| is_v7(id) == v7).map(head).max().unwrap_or(-1);
        OlderGeneration { number: 1, v7_time_max: Some(max(true)), other_time_max: Some(max(false)) }
    }

    fn id() -> impl Strategy<Value = [u8; 16]> {
        // Times close together, and every second id a UUIDv7.
        (any::<bool>(), 0u8..8, any::<[u8; 16]>()).prop_map(|(v7, time, mut id)| {
            id[..5].copy_from_slice(&[1, 0x9a, 0, 0, 0]);
            id[5] = time;
            if v7 {
                id[6] = 0x70 | id[6] & 0xf;
                id[8] = 0x80 | id[8] & 0x3f;
            }
            id
        })
    }

    proptest! {
        #[test]
        fn an_id_that_is_in_a_generation_is_never_spared(rows in proptest::collection::vec(id(), 1..40)) {
            let generation = measured(&rows);
            for row in &rows {
                prop_assert!(generation.may_hold(row));
            }
        }

        #[test]
        fn an_id_later_than_all_of_its_kind_is_spared(rows in proptest::collection::vec(id(), 0..40), mut new in id()) {
            new[4] = 1;
            prop_assert!(!measured(&rows).may_hold(&new));
        }
    }

    #[test]
    fn a_ulid_that_was_claimed_as_a_plain_uuid_is_looked_for() {
        // The same 128 bits, first sent as a UUID of version 4, whose time is not checked, then as a ULID.
        let id = *b"\x01\x9a\x00\x00\x00\x07\x4a\x00\x80\x00\x00\x00\x00\x00\x00\x01";
        assert!(!is_v7(&id));
        assert!(measured(&[id]).may_hold(&id));
    }

    #[test]
    fn a_generation_that_was_not_measured_may_hold_anything() {
        let generation = OlderGeneration { number: 1, v7_time_max: None, other_time_max: None };
        assert!(generation.may_hold(&[0xff; 16]));
    }
}
