//! The check at the end of a test: every input record has had exactly one outcome, and both cursors are at
//! the end. It uses only the input, the outputs and the tables, and the checker of the auditor.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use uuid::Uuid;

use super::checker::{Checker, Exceptions, Outcome, Output, Rules, Seen};
use super::servers::{block_on, connect};
use super::{DEADLINE, Daemon, Message, Received, Scope, wait_until, wait_until_within};

/// Longer than any recovery that has to wait for a time limit of a server or of a group.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// Expected state. Deviations from "everything was written and published" are listed one by one.
pub struct Check<'s> {
    scope: &'s Scope<'s>,
    /// Records that retention removed from the log after they were written.
    removed: Vec<Received>,
    /// Outputs that retention removed after they were sent: read events, e-mail events, dead letters.
    outputs_removed: [Vec<Received>; 3],
    remade: Option<Remade>,
    exceptions: Exceptions,
}

/// A topic of events that was deleted and created again.
pub struct Remade {
    pub topic: String,
    /// Its contents when it was last read.
    pub former: Vec<Received>,
    /// Records whose events may have been sent between that read and the deletion.
    pub unseen: Vec<(i32, Range<i64>)>,
}

/// Records counted by outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcomes {
    pub written: usize,
    pub duplicates: usize,
    pub dead_letters: usize,
    pub given_up: usize,
}

fn seen(record: &Received) -> Seen<'_> {
    Seen {
        partition: record.partition,
        offset: record.offset,
        timestamp_ms: record.timestamp_ms,
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers: record.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect(),
    }
}

impl<'s> Check<'s> {
    pub fn of(scope: &'s Scope<'s>) -> Check<'s> {
        Check {
            scope,
            removed: Vec::new(),
            outputs_removed: Default::default(),
            remade: None,
            exceptions: Exceptions::default(),
        }
    }

    pub fn removed(mut self, records: Vec<Received>) -> Check<'s> {
        self.removed = records;
        self
    }

    pub fn given_up(mut self, partition: i32, offsets: Range<i64>) -> Check<'s> {
        self.exceptions.given_up.extend(offsets.map(|offset| (partition, offset)));
        self
    }

    pub fn outputs_removed(mut self, records: [Vec<Received>; 3]) -> Check<'s> {
        self.outputs_removed = records;
        self
    }

    pub fn remade(mut self, remade: Remade) -> Check<'s> {
        self.remade = Some(remade);
        self
    }

    pub fn rows_only(mut self) -> Check<'s> {
        self.exceptions.rows_only = true;
        self
    }

    #[track_caller]
    pub fn holds(self) -> Outcomes {
        let Check { scope, removed, outputs_removed, mut remade, mut exceptions } = self;
        let topics = [
            (Output::Read, &scope.read_topic),
            (Output::Email, &scope.email_topic),
            (Output::DeadLetter, &scope.dead_letter_topic),
        ];
        if let Some(remade) = &mut remade {
            let (output, _) = topics.iter().find(|(_, topic)| **topic == remade.topic).unwrap();
            exceptions.unseen = Some((*output, std::mem::take(&mut remade.unseen)));
        }
        let mut checker = Checker::new(&scope.input_topic, Rules::default(), exceptions);
        let mut inputs = [removed, scope.read_all(&scope.input_topic)].concat();
        inputs.sort_by_key(|record| (record.partition, record.offset));
        inputs.iter().for_each(|record| checker.add_input(&seen(record)));
        let committed =
            scope.committed_all().into_iter().map(|(partition, (at, _))| (partition, at)).collect();
        block_on(async {
            let postgres = connect(&scope.postgres_url()).await;
            checker.read_topic_id(&postgres, &scope.input_topic).await?;
            checker.check_cursors(&postgres, &scope.input_topic, &scope.ends(), Some(&committed)).await?;
            checker.read_tables(&postgres).await
        })
        .unwrap();
        let prefix = &checker.topic_id_prefix;
        assert!(prefix.is_empty() || *prefix == scope.topic_id_text(), "the cursors are of another topic");
        for ((output, topic), removed) in topics.into_iter().zip(outputs_removed) {
            let former = remade.iter().filter(|remade| remade.topic == *topic).flat_map(|r| r.former.clone());
            for record in former.chain(removed).chain(scope.read_all(topic)) {
                checker.add_output(output, topic, &seen(&record));
            }
        }
        let counts = checker.judge();
        assert!(
            checker.wrong_count == 0,
            "{} findings:\n{}",
            checker.wrong_count,
            checker.findings.join("\n")
        );
        let count = |wanted: fn(&Outcome) -> bool| {
            let counts = counts.iter().filter(|(outcome, _)| wanted(outcome));
            counts.map(|(_, count)| usize::try_from(*count).unwrap()).sum()
        };
        Outcomes {
            written: count(|outcome| *outcome == Outcome::Written),
            duplicates: count(|outcome| *outcome == Outcome::Duplicate),
            dead_letters: count(|outcome| matches!(outcome, Outcome::DeadLettered(_))),
            given_up: count(|outcome| *outcome == Outcome::GivenUp),
        }
    }
}

impl Scope<'_> {
    /// [`Check`] without exceptions.
    #[track_caller]
    pub fn assert_exactly_once(&self) -> Outcomes {
        Check::of(self).holds()
    }

    /// Waits until everything is written and published, drains the daemons, and checks the outcome.
    #[track_caller]
    pub fn drains_exactly_once<'d>(&self, daemons: impl IntoIterator<Item = &'d mut Daemon>) {
        self.wait_until_caught_up();
        for daemon in daemons {
            daemon.drains();
        }
        self.assert_exactly_once();
    }

    /// A scope with topics and schema, ready for the daemon.
    pub fn prepare(&self, input_partitions: i32, output_partitions: i32) {
        self.create_topics(input_partitions, output_partitions);
        self.command(&["migrate"]).succeeds();
    }

    /// Sends records to the input topic, to each of `partitions` in turn, whatever their keys.
    pub fn spread(&self, records: Vec<Message>, partitions: &[i32]) {
        let records = records.into_iter().zip(partitions.iter().cycle());
        self.produce(&self.input_topic, records.map(|(record, partition)| record.partition(*partition)));
    }

    /// `applied` and `published` by partition.
    pub fn cursors(&self) -> BTreeMap<i32, (i64, Option<i64>)> {
        let rows = self.sql("SELECT partition, applied, published FROM payment_writer.source_cursor", &[]);
        rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
    }

    /// The prefix of all `source` headers.
    pub fn topic_id_text(&self) -> String {
        let rows = self.sql("SELECT topic_id FROM payment_writer.bound_group", &[]);
        rows[0].get::<_, Uuid>(0).simple().to_string()[..8].to_owned()
    }

    fn inquirer(&self) -> BaseConsumer {
        self.client_config().set("group.id", &self.group_id).create().unwrap()
    }

    fn partitions(&self, consumer: &BaseConsumer) -> TopicPartitionList {
        let metadata = consumer.fetch_metadata(Some(&self.input_topic), DEADLINE).unwrap();
        let mut list = TopicPartitionList::new();
        for partition in metadata.topics()[0].partitions() {
            list.add_partition(&self.input_topic, partition.id());
        }
        list
    }

    /// The input's end offsets by partition.
    pub fn ends(&self) -> BTreeMap<i32, i64> {
        let consumer = self.inquirer();
        let list = self.partitions(&consumer);
        let began = Instant::now();
        let end = |partition| loop {
            match consumer.fetch_watermarks(&self.input_topic, partition, DEADLINE) {
                Ok((_, end)) => break end,
                // A new leader may not be in every broker's metadata yet.
                Err(error) => {
                    assert!(began.elapsed() < DEADLINE, "fetching the input's end offsets: {error}")
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        list.elements().iter().map(|e| (e.partition(), end(e.partition()))).collect()
    }

    /// The group's committed offsets and their metadata by partition.
    pub fn committed_all(&self) -> BTreeMap<i32, (i64, String)> {
        let consumer = self.inquirer();
        let list = self.partitions(&consumer);
        // A broker may not know yet that it has become the coordinator.
        let began = Instant::now();
        let answer = loop {
            match consumer.committed_offsets(list.clone(), DEADLINE) {
                Ok(answer) => break answer,
                Err(error) => {
                    assert!(began.elapsed() < PATIENCE, "fetching the group's offsets: {error}")
                }
            }
        };
        let offset = |e: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match e.offset() {
            Offset::Offset(offset) => Some((e.partition(), (offset, e.metadata().to_owned()))),
            _ => None,
        };
        answer.elements().iter().filter_map(offset).collect()
    }

    /// Waits until everything sent so far is written and published, and the database has stored that.
    #[track_caller]
    pub fn wait_until_caught_up(&self) {
        self.await_input_markers();
        let ends = self.ends();
        wait_until_within(PATIENCE, "everything is written and published", || {
            let (committed, cursors) = (self.committed_all(), self.cursors());
            ends.iter().all(|(partition, end)| {
                *end == 0
                    || committed.get(partition).is_some_and(|k| k.0 >= *end)
                        && cursors
                            .get(partition)
                            .is_some_and(|c| c.0 >= *end && c.1.is_none_or(|p| p >= *end))
            })
        });
    }

    /// Sets the group's offset as an operator's tool would. Waits until the group has no members.
    pub fn move_group_offset(&self, partition: i32, offset: i64, metadata: &str) {
        let consumer = self.inquirer();
        let mut list = TopicPartitionList::new();
        let mut element = list.add_partition(&self.input_topic, partition);
        element.set_offset(Offset::Offset(offset)).unwrap();
        element.set_metadata(metadata);
        wait_until("the group has no members", || consumer.commit(&list, CommitMode::Sync).is_ok());
    }

    /// Deletes the group's offsets. Waits until the group has no members.
    pub fn delete_group_when_empty(&self) {
        wait_until("the group has no members", || {
            let results =
                block_on(self.admin().delete_groups(&[&self.group_id], &AdminOptions::new())).unwrap();
            results.iter().all(Result::is_ok)
        });
    }

    /// Deletes the input's records before `offset`, as retention would.
    pub fn delete_records(&self, partition: i32, offset: i64) {
        self.delete_records_of(&self.input_topic, partition, offset);
    }

    /// Deletes the records of a topic's partition before `offset`, as retention would.
    pub fn delete_records_of(&self, topic: &str, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, Offset::Offset(offset)).unwrap();
        let answer = block_on(self.admin().delete_records(&list, &AdminOptions::new())).unwrap();
        assert!(answer.elements().iter().all(|e| e.error().is_ok()), "{answer:?}");
    }
}
