//! Pending questions to the cluster (committed offsets, log bounds), and which of their answers still count.
//!
//! An answer describes the moment of its question. A revocation, an assignment, a reset or a new producer
//! outdates it: the question is forgotten, and the answer dropped when it arrives. Otherwise a committed
//! offset read before another owner's last transaction would make the lane send events twice.

use std::collections::BTreeMap;

use crate::domain::cursor::CursorRow;
use crate::domain::record::{Partition, TimestampMs};
use crate::ports::Question;

/// Pending questions, forgotten ones included, because each occupies a thread.
const QUESTIONS_MAX: usize = 8;
/// A question that failed is asked again, split into this many.
const DIVIDED_BY: usize = 8;

/// What the lane knew when it asked a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Asked {
    /// The cursor rows in the database.
    pub rows: BTreeMap<Partition, Option<CursorRow>>,
    /// Wall-clock time of the question.
    pub at: TimestampMs,
}

/// The questions of one lane.
#[derive(Default)]
pub(super) struct Questions {
    last_id: u64,
    under_way: BTreeMap<u64, Asked>,
    /// The question whose answer counts for a partition.
    current: BTreeMap<Partition, u64>,
    /// How many partitions a question with this one may have, after a larger one failed, as while an open
    /// transaction blocks one of the offsets. Splitting isolates that partition in a few rounds.
    together_max: BTreeMap<Partition, usize>,
}

impl Questions {
    /// Whether the limit of pending questions permits another one.
    pub fn has_room(&self) -> bool {
        self.under_way.len() < QUESTIONS_MAX
    }

    /// Whether an answer about `partition` is pending.
    pub fn is_asked(&self, partition: Partition) -> bool {
        self.current.contains_key(&partition)
    }

    /// Groups partitions into questions, no more than the limit of pending questions permits.
    pub fn divided(&self, partitions: Vec<Partition>) -> Vec<Vec<Partition>> {
        let mut by_max: BTreeMap<usize, Vec<Partition>> = BTreeMap::new();
        for partition in partitions {
            let together_max = self.together_max.get(&partition).copied().unwrap_or(usize::MAX);
            by_max.entry(together_max).or_default().push(partition);
        }
        // Partitions whose questions never failed come first.
        let parts = by_max.iter().rev().flat_map(|(max, partitions)| partitions.chunks((*max).max(1)));
        parts.map(<[Partition]>::to_vec).take(QUESTIONS_MAX.saturating_sub(self.under_way.len())).collect()
    }

    /// Creates a question and notes it as pending.
    pub fn ask(&mut self, asked: Asked) -> Question {
        self.last_id += 1;
        let partitions: Vec<Partition> = asked.rows.keys().copied().collect();
        self.current.extend(partitions.iter().map(|partition| (*partition, self.last_id)));
        self.under_way.insert(self.last_id, asked);
        Question { id: self.last_id, partitions }
    }

    /// Invalidates pending answers about these partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.current.remove(partition);
            self.together_max.remove(partition);
        }
    }

    /// Invalidates all pending answers.
    pub fn forget_all(&mut self) {
        self.current.clear();
    }

    /// Removes an answered question. Returns what was known when it was asked, and the partitions for which
    /// the answer still counts.
    pub fn take(&mut self, id: u64) -> Option<(Asked, Vec<Partition>)> {
        let asked = self.under_way.remove(&id)?;
        let counts = |partition: &Partition| self.current.get(partition) == Some(&id);
        let partitions: Vec<Partition> = asked.rows.keys().copied().filter(counts).collect();
        for partition in &partitions {
            self.current.remove(partition);
        }
        Some((asked, partitions))
    }

    /// Notes that a question failed: these partitions go into smaller questions next time.
    pub fn failed(&mut self, partitions: &[Partition]) {
        let together_max = (partitions.len() / DIVIDED_BY).max(1);
        self.together_max.extend(partitions.iter().map(|partition| (*partition, together_max)));
    }

    /// Lifts the limit of [`failed`](Self::failed).
    pub fn succeeded(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.together_max.remove(partition);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(partitions: &[i32]) -> Asked {
        let rows = partitions.iter().map(|p| (Partition(*p), None)).collect();
        Asked { rows, at: TimestampMs(0) }
    }

    #[test]
    fn an_answer_to_a_question_that_was_forgotten_does_not_count() {
        let mut questions = Questions::default();
        let first = questions.ask(asked(&[1, 2]));
        questions.forget(&[Partition(1)]);
        let second = questions.ask(asked(&[1]));
        assert_eq!(questions.take(first.id), Some((asked(&[1, 2]), vec![Partition(2)])));
        assert!(questions.is_asked(Partition(1)));
        questions.forget_all();
        assert_eq!(questions.take(second.id), Some((asked(&[1]), vec![])));
        assert_eq!(questions.take(second.id), None, "answered once");
    }

    #[test]
    fn questions_are_bounded_also_those_that_were_forgotten() {
        let mut questions = Questions::default();
        let mut last = 0;
        while questions.has_room() {
            last = questions.ask(asked(&[1])).id;
            questions.forget_all();
        }
        assert_eq!(last, QUESTIONS_MAX as u64);
        questions.take(last);
        assert!(questions.has_room());
    }

    #[test]
    fn what_failed_is_asked_about_in_ever_smaller_questions() {
        let mut questions = Questions::default();
        let all: Vec<Partition> = (0..40).map(Partition).collect();
        let sizes = |parts: Vec<Vec<Partition>>| -> Vec<usize> { parts.iter().map(Vec::len).collect() };
        assert_eq!(sizes(questions.divided(all.clone())), [40]);
        questions.failed(&all);
        assert_eq!(sizes(questions.divided(all.clone())), [5; 8]);
        // All but one of them answer.
        questions.succeeded(&all[5..]);
        questions.failed(&all[..5]);
        assert_eq!(sizes(questions.divided(all.clone())), [35, 1, 1, 1, 1, 1]);
        for partition in 0..6 {
            questions.ask(asked(&[partition]));
        }
        assert_eq!(sizes(questions.divided(all)), [35, 1]);
    }
}
