//! Questions to the cluster that are under way, and whose answers still count.
//!
//! An answer says how things stood when it was asked for. Whatever makes that out of date (the partition was taken
//! away or given again, the lane forgot what it held, its producer was made anew) forgets the question, and its answer
//! is dropped: a group offset from before another owner's last transaction would have events sent twice.

use std::collections::BTreeMap;

use super::ports::Question;
use crate::cursor::CursorRow;
use crate::record::{Partition, TimestampMs};

/// Questions under way, those that are forgotten included: each has a thread of its own.
const QUESTIONS_MAX: usize = 8;
/// Partitions of a question that failed are asked about again in so many questions.
const DIVIDED_BY: usize = 8;

/// What was known when a question was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Asked {
    /// The database's rows.
    pub rows: BTreeMap<Partition, Option<CursorRow>>,
    /// By the wall clock.
    pub at: TimestampMs,
}

/// The questions of one lane.
#[derive(Default)]
pub(super) struct Questions {
    last_id: u64,
    under_way: BTreeMap<u64, Asked>,
    /// The question whose answer counts for a partition.
    current: BTreeMap<Partition, u64>,
    /// How many of these may be in one question: one about them and others failed, as where a transaction holds one of
    /// the offsets. The others are found in a few rounds.
    together_max: BTreeMap<Partition, usize>,
}

impl Questions {
    /// Whether another question may be asked.
    pub fn has_room(&self) -> bool {
        self.under_way.len() < QUESTIONS_MAX
    }

    /// Whether an answer about `partition` is waited for.
    pub fn is_asked(&self, partition: Partition) -> bool {
        self.current.contains_key(&partition)
    }

    /// Which partitions go into one question, as far as there is room for questions.
    pub fn divided(&self, partitions: Vec<Partition>) -> Vec<Vec<Partition>> {
        let mut by_max: BTreeMap<usize, Vec<Partition>> = BTreeMap::new();
        for partition in partitions {
            let together_max = self.together_max.get(&partition).copied().unwrap_or(usize::MAX);
            by_max.entry(together_max).or_default().push(partition);
        }
        // Those that never failed first.
        let parts = by_max.iter().rev().flat_map(|(max, partitions)| partitions.chunks((*max).max(1)));
        parts.map(<[Partition]>::to_vec).take(QUESTIONS_MAX.saturating_sub(self.under_way.len())).collect()
    }

    /// The next question.
    pub fn ask(&mut self, asked: Asked) -> Question {
        self.last_id += 1;
        let partitions: Vec<Partition> = asked.rows.keys().copied().collect();
        self.current.extend(partitions.iter().map(|partition| (*partition, self.last_id)));
        self.under_way.insert(self.last_id, asked);
        Question { id: self.last_id, partitions }
    }

    /// Answers about these partitions that are under way do not count any more.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.current.remove(partition);
            self.together_max.remove(partition);
        }
    }

    /// No answer that is under way counts any more.
    pub fn forget_all(&mut self) {
        self.current.clear();
    }

    /// An answer came: what was known when it was asked for, and for which partitions it counts.
    pub fn take(&mut self, id: u64) -> Option<(Asked, Vec<Partition>)> {
        let asked = self.under_way.remove(&id)?;
        let counts = |partition: &Partition| self.current.get(partition) == Some(&id);
        let partitions: Vec<Partition> = asked.rows.keys().copied().filter(counts).collect();
        for partition in &partitions {
            self.current.remove(partition);
        }
        Some((asked, partitions))
    }

    /// The cluster did not tell: these are asked about in smaller questions.
    pub fn failed(&mut self, partitions: &[Partition]) {
        let together_max = (partitions.len() / DIVIDED_BY).max(1);
        self.together_max.extend(partitions.iter().map(|partition| (*partition, together_max)));
    }

    /// The cluster told.
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
        // No more than there is room for.
        for partition in 0..6 {
            questions.ask(asked(&[partition]));
        }
        assert_eq!(sizes(questions.divided(all)), [35, 1]);
    }
}
