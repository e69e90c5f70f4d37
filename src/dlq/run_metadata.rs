//! Commit metadata of each replay transaction, and what it proves. Pure.

use std::fmt;

use uuid::Uuid;

/// Metadata of the replay group's only offset: `pwr1 <run or chunk> <database>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunMetadata {
    /// Chunk sent in the transaction, or the run that had just started.
    pub id: Uuid,
    /// Database that holds the run or chunk.
    pub database_id: Uuid,
}

impl fmt::Display for RunMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pwr1 {} {}", self.id.simple(), self.database_id.simple())
    }
}

impl RunMetadata {
    /// Parses commit metadata; `None` if a replay did not write it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("pwr1 ")?.split(' ').map(|part| part.parse().ok());
        let (Some(id), Some(database_id), None) = (parts.next()?, parts.next()?, parts.next()) else {
            return None;
        };
        let mark = Self { id, database_id };
        (mark.to_string() == text).then_some(mark)
    }
}

/// A claimed chunk that is not recorded as sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfinished {
    /// Id of the chunk.
    pub chunk_id: Uuid,
    /// Id that the commit metadata named when the chunk was claimed.
    pub previous: Uuid,
    /// Number of claimed dead letters.
    pub letters: i32,
    /// Time of the claim, as formatted by the database.
    pub claimed_at: String,
}

/// Whether a chunk was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum ChunkOutcome {
    /// Its records are in the input topic
    Sent,
    /// Its records are not in the input topic
    NotSent,
}

/// Cases that only the operator can decide.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnknownOutcome {
    /// The commit metadata proves nothing about an unfinished chunk.
    #[error(
        "a replay of {letters} dead letters, claimed {claimed_at}, was interrupted, and the offset of group \
         {group} that shows whether they were sent was deleted, expired, or set by hand. Look in the input \
         topic for records with the header dlq-replays of that time; then add --unfinished sent or \
         --unfinished not-sent"
    )]
    Unfinished {
        /// Replay group.
        group: String,
        /// Number of dead letters in the chunk.
        letters: i32,
        /// Time of the claim.
        claimed_at: String,
    },
    /// The commit metadata names a chunk that is not in the database.
    #[error(
        "group {group} names a replay that this database does not have: it was recorded in another database, \
         or this one was restored to an older state. Dead letters replayed since would be replayed again, \
         within idempotency.window as duplicates. To continue, add --after-restore"
    )]
    Forgotten {
        /// Replay group.
        group: String,
    },
}

/// What the commit metadata, read after `init_transactions`, says about a chunk; `None` if it proves nothing.
pub fn outcome(
    chunk: &Unfinished,
    committed: Option<&RunMetadata>,
    database_id: Uuid,
) -> Option<ChunkOutcome> {
    let mark = committed.filter(|mark| mark.database_id == database_id)?;
    match mark.id {
        id if id == chunk.chunk_id => Some(ChunkOutcome::Sent),
        id if id == chunk.previous => Some(ChunkOutcome::NotSent),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATABASE: Uuid = Uuid::from_u128(9);

    fn mark(id: u128) -> RunMetadata {
        RunMetadata { id: Uuid::from_u128(id), database_id: DATABASE }
    }

    #[test]
    fn a_mark_reads_back_as_itself_and_nothing_else_does() {
        let mark = mark(0xabc);
        assert_eq!(RunMetadata::parse(&mark.to_string()), Some(mark));
        let text = mark.to_string();
        for wrong in [
            "",
            "pwr1",
            "pwr1 ",
            &text.to_uppercase(),
            &format!("{text} "),
            &format!("{text} x"),
            &text.replace("pwr1", "pw1"),
            &format!("pwr1 {} {}", mark.id, mark.database_id),
        ] {
            assert_eq!(RunMetadata::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn only_the_mark_of_the_chunk_or_of_what_was_before_it_proves_anything() {
        let chunk = Unfinished {
            chunk_id: Uuid::from_u128(2),
            previous: Uuid::from_u128(1),
            letters: 5,
            claimed_at: String::new(),
        };
        let proved = |mark: Option<RunMetadata>| outcome(&chunk, mark.as_ref(), DATABASE);
        assert_eq!(proved(Some(mark(2))), Some(ChunkOutcome::Sent));
        assert_eq!(proved(Some(mark(1))), Some(ChunkOutcome::NotSent));
        assert_eq!(proved(Some(mark(3))), None);
        assert_eq!(proved(None), None);
        assert_eq!(proved(Some(RunMetadata { database_id: Uuid::from_u128(8), ..mark(2) })), None);
    }
}
