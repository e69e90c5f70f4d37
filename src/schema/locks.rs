//! Advisory locks: who may do what alone, over all daemons of one database.
//!
//! All keys are of the two-number form, `pg_advisory_lock(CLASS, key)`: the first number keeps us apart from
//! other users of the database, the second says what for. Keys are never reused for another meaning.

/// First number of every key: "PWRT" in ASCII.
pub const CLASS: i32 = 0x5057_5254;

/// The second number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum LockKey {
    /// Held by a session while it changes the schema.
    Migrate = 1,
    /// Held by a transaction while it makes a month.
    Months = 2,
    /// Shared by every batch's transaction; exclusive for the flip to another generation.
    Rotation = 3,
    /// Held by the one session that prunes.
    Prune = 4,
    /// Held by a transaction while it binds the database to a group.
    Binding = 5,
    /// Held by the one session that replays dead letters.
    Replay = 6,
}

impl LockKey {
    /// The number, for use as the second argument of `pg_advisory_lock` and its kin.
    pub const fn number(self) -> i32 {
        self as i32
    }
}
