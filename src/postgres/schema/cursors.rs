//! The SQL function that moves cursors, and its errors.

use serde::Deserialize;

use crate::domain::record::{NextOffset, Partition};

/// Moves the cursors of a batch: topic id (uuid), partitions (int4[]), seen, applied and published (int8[]),
/// timestamps (timestamptz[]). The arrays are parallel. `sql/V3__cursors_and_identity.sql` documents the
/// elements, including nulls.
pub const MOVE_CURSORS: &str = "SELECT payment_writer.move_cursors_v1($1, $2, $3, $4, $5, $6)";

/// SQLSTATE of a failed cursor guard: another writer moved the cursor, or its row is missing. The transaction
/// must not commit, and the lane's state is stale.
pub const CURSOR_GUARD: &str = "PW001";

/// SQLSTATE of inconsistent arguments: an error in this program.
pub const CURSOR_ARGUMENTS: &str = "PW002";

/// The cursor that differs from what the lane last read or wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LostGuard {
    /// The lowest partition whose guard failed; there may be more.
    pub partition: Partition,
    /// `applied` as the lane last read or wrote it.
    pub seen: Option<NextOffset>,
    /// `applied` in the database; `None` without a row.
    pub applied: Option<NextOffset>,
}

#[derive(Deserialize)]
struct Detail {
    partition: i32,
    seen: Option<i64>,
    applied: Option<i64>,
}

impl LostGuard {
    /// Parses a database error; `None` if it is another error.
    pub fn from_error(error: &tokio_postgres::Error) -> Option<Self> {
        let db = error.as_db_error().filter(|db| db.code().code() == CURSOR_GUARD)?;
        Self::from_detail(db.detail()?)
    }

    fn from_detail(detail: &str) -> Option<Self> {
        let detail: Detail = serde_json::from_str(detail).ok()?;
        Some(Self {
            partition: Partition(detail.partition),
            seen: detail.seen.map(NextOffset),
            applied: detail.applied.map(NextOffset),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detail_of_a_lost_guard_is_understood() {
        assert_eq!(
            LostGuard::from_detail(r#"{"partition" : 9, "seen" : 0, "applied" : null}"#),
            Some(LostGuard { partition: Partition(9), seen: Some(NextOffset(0)), applied: None })
        );
        assert_eq!(LostGuard::from_detail("Key (x)=(y)"), None);
    }
}
