//! The mark that each transaction of a replay leaves in Kafka, and what it proves: pure.

use std::fmt;

use uuid::Uuid;

/// The metadata of the replay group's one offset: `pwr1 <run or chunk> <database>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// The chunk that the transaction carried, or the run that had just begun.
    pub id: Uuid,
    /// The database that knows it.
    pub database_id: Uuid,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pwr1 {} {}", self.id.simple(), self.database_id.simple())
    }
}

impl Mark {
    /// Reads a mark; `None` for a text of other hands.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("pwr1 ")?.split(' ').map(|part| part.parse().ok());
        let (Some(id), Some(database_id), None) = (parts.next()?, parts.next()?, parts.next()) else {
            return None;
        };
        let mark = Self { id, database_id };
        (mark.to_string() == text).then_some(mark)
    }
}

/// A chunk that was claimed, and not noted as sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfinished {
    /// Its id.
    pub chunk_id: Uuid,
    /// What the mark named when it was claimed.
    pub previous: Uuid,
    /// How many letters it claims.
    pub letters: i32,
    /// When it was claimed, as the database shows it.
    pub claimed_at: String,
}

/// What became of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Its records are in the input topic.
    Sent,
    /// They are not, and never will be.
    NotSent,
}

/// What only a person can decide.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Doubt {
    /// The mark proves nothing about an unfinished chunk.
    #[error(
        "a replay of {letters} dead letters, claimed {claimed_at}, was cut off, and the offset of group {group} that \
         would tell whether they were sent was deleted, expired, or set by others. Look in the input topic for \
         records with the header dlq-replays of that time; then add --unfinished sent or --unfinished not-sent"
    )]
    Unfinished {
        /// The replay group.
        group: String,
        /// Letters of the chunk.
        letters: i32,
        /// When it was claimed.
        claimed_at: String,
    },
    /// The mark names a chunk that the database does not know.
    #[error(
        "group {group} says that the last replay was recorded in another database, or this one was restored to an \
         older state and has forgotten it: dead letters that were replayed meanwhile would be replayed again, within \
         idempotency.window as duplicates. --after-restore goes on"
    )]
    Forgotten {
        /// The replay group.
        group: String,
    },
}

/// What the mark that stands in Kafka says about a chunk, after `init_transactions`; `None` if it proves nothing.
pub fn fate(chunk: &Unfinished, committed: Option<&Mark>, database_id: Uuid) -> Option<Fate> {
    let mark = committed.filter(|mark| mark.database_id == database_id)?;
    match mark.id {
        id if id == chunk.chunk_id => Some(Fate::Sent),
        id if id == chunk.previous => Some(Fate::NotSent),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATABASE: Uuid = Uuid::from_u128(9);

    fn mark(id: u128) -> Mark {
        Mark { id: Uuid::from_u128(id), database_id: DATABASE }
    }

    #[test]
    fn a_mark_reads_back_as_itself_and_nothing_else_does() {
        let mark = mark(0xabc);
        assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
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
            assert_eq!(Mark::parse(wrong), None, "{wrong:?}");
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
        let told = |mark: Option<Mark>| fate(&chunk, mark.as_ref(), DATABASE);
        assert_eq!(told(Some(mark(2))), Some(Fate::Sent));
        assert_eq!(told(Some(mark(1))), Some(Fate::NotSent));
        assert_eq!(told(Some(mark(3))), None);
        assert_eq!(told(None), None);
        assert_eq!(told(Some(Mark { database_id: Uuid::from_u128(8), ..mark(2) })), None);
    }
}
