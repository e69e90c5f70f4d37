//! Questions to the cluster that are under way, and whose answers still count.
//!
//! An answer says how things stood when it was asked for. Whatever makes that out of date (the partition was taken
//! away or given again, the lane forgot what it held, its producer was made anew) forgets the question, and its answer
//! is dropped: a group offset from before another owner's last transaction would have events sent twice.

use std::collections::{BTreeMap, BTreeSet};

use super::ports::Question;
use crate::cursor::CursorRow;
use crate::record::{Partition, TimestampMs};

/// Questions under way, those that are forgotten included: each has a thread of its own.
const QUESTIONS_MAX: usize = 8;

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
    /// Asked about alone: a question about them and others failed, as where a transaction holds one of the offsets.
    alone: BTreeSet<Partition>,
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

    /// Which partitions go into one question.
    pub fn divided(&self, partitions: Vec<Partition>) -> Vec<Vec<Partition>> {
        let (alone, together): (Vec<_>, Vec<_>) =
            partitions.into_iter().partition(|partition| self.alone.contains(partition));
        let together = (!together.is_empty()).then_some(together);
        together.into_iter().chain(alone.into_iter().map(|partition| vec![partition])).collect()
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
            self.alone.remove(partition);
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

    /// The cluster did not tell: each of these is asked about alone.
    pub fn failed(&mut self, partitions: &[Partition]) {
        self.alone.extend(partitions);
    }

    /// The cluster told.
    pub fn succeeded(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.alone.remove(partition);
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
    fn what_failed_is_asked_about_alone() {
        let mut questions = Questions::default();
        let all = || [1, 2, 3].map(Partition).to_vec();
        assert_eq!(questions.divided(all()), [all()]);
        questions.failed(&[Partition(1), Partition(3)]);
        assert_eq!(questions.divided(all()), [[Partition(2)], [Partition(1)], [Partition(3)]]);
        questions.succeeded(&all());
        assert_eq!(questions.divided(all()), [all()]);
    }
}
