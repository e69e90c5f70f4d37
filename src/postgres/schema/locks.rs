//! Advisory locks, which coordinate all processes that use one database.
//!
//! All keys have the form `pg_advisory_lock(CLASS, key)`: the first number identifies this program, the
//! second the purpose. Keys are never reused for another purpose.

/// First number of every key: "PWRT" in ASCII.
pub const CLASS: i32 = 0x5057_5254;

/// Second number of a key: the purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum LockKey {
    /// Held by a session while it changes the schema.
    Migrate = 1,
    /// Held by a transaction while it creates or archives a month.
    Months = 2,
    /// Held in shared mode by every batch's transaction, in exclusive mode by a change of generations.
    Rotation = 3,
    /// Held by the one session that prunes.
    Prune = 4,
    /// Held by a transaction while it binds the database to a group.
    Binding = 5,
    /// Held by the one session that replays dead letters.
    Replay = 6,
}

impl LockKey {
    /// The number, for use as the second argument of `pg_advisory_lock` and similar functions.
    pub const fn number(self) -> i32 {
        self as i32
    }
}
