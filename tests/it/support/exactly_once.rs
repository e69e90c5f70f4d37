//! The check at the end of a test: every input record has had exactly one outcome, and both cursors are at
//! the end. It uses only the input, the outputs and the tables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::time::{Duration, Instant};

use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::Value;
use uuid::Uuid;

use super::servers::block_on;
use super::{DEADLINE, Message, Received, Scope, wait_until, wait_until_within};

/// Longer than any recovery that has to wait for a time limit of a server or of a group.
pub const PATIENCE: Duration = Duration::from_secs(150);

type Place = (i32, i64);

/// Expected state. Deviations from "everything was written and published" are listed one by one.
pub struct Check<'s> {
    scope: &'s Scope<'s>,
    /// Records that retention removed from the log after they were written.
    removed: Vec<Received>,
    /// Records that an operator skipped: they have at most one outcome.
    given_up: BTreeSet<Place>,
    /// Outputs that retention removed after they were sent: read events, e-mail events, dead letters.
    outputs_removed: [Vec<Received>; 3],
    remade: Option<Remade>,
    publishes: bool,
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

struct Row {
    message_id: Uuid,
    payment_id: Uuid,
    cust_id: Option<i64>,
    amount: Option<String>,
    status: Option<i16>,
    has_notes: bool,
}

/// A payload independent of its spelling.
#[derive(PartialEq, Debug)]
struct Payload(Vec<Value>, String);

fn payload(record: &Received) -> Option<(Uuid, Payload)> {
    let json: Value = serde_json::from_slice(record.value.as_deref()?).ok()?;
    let id = json.get("messageId")?.as_str()?;
    // Both spellings are the same id.
    let id = id.parse().ok().or_else(|| Some(Uuid::from_u128(id.parse::<ulid::Ulid>().ok()?.0)))?;
    let fields = ["custId", "currency", "status", "type", "comment", "externalRefId"];
    let fields = fields.iter().map(|field| json.get(field).cloned().unwrap_or_default()).collect();
    // Two decimals and few digits: a binary float is exact enough.
    let amount = json.get("amount")?;
    let amount = amount.as_f64().or_else(|| amount.as_str()?.parse().ok())?;
    Some((id, Payload(fields, format!("{amount:.2}"))))
}

fn by_source(
    scope: &Scope<'_>,
    topic: &str,
    removed: Vec<Received>,
    topic_id: &str,
    remade: Option<&Remade>,
) -> BTreeMap<Place, Received> {
    let former = remade.filter(|r| r.topic == topic).map_or(&[][..], |remade| &remade.former);
    let mut found = BTreeMap::new();
    for record in former.iter().cloned().chain(removed).chain(scope.read_all(topic)) {
        let source = record.header("source").to_owned();
        let mut parts = source.split('/');
        assert_eq!(parts.next(), Some(topic_id), "{topic}: source {source}");
        let place = (parts.next().unwrap().parse().unwrap(), parts.next().unwrap().parse().unwrap());
        let former = found.insert(place, record);
        assert!(former.is_none(), "{topic} holds source {source} twice");
    }
    found
}

impl<'s> Check<'s> {
    pub fn of(scope: &'s Scope<'s>) -> Check<'s> {
        Check {
            scope,
            removed: Vec::new(),
            given_up: BTreeSet::new(),
            outputs_removed: Default::default(),
            remade: None,
            publishes: true,
        }
    }

    pub fn removed(mut self, records: Vec<Received>) -> Check<'s> {
        self.removed = records;
        self
    }

    pub fn given_up(mut self, partition: i32, offsets: Range<i64>) -> Check<'s> {
        self.given_up.extend(offsets.map(|offset| (partition, offset)));
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
        self.publishes = false;
        self
    }

    #[track_caller]
    pub fn holds(self) -> Outcomes {
        let Check { scope, removed, given_up, outputs_removed, remade, publishes } = self;
        let [read_removed, email_removed, dead_removed] = outputs_removed;
        let inputs: BTreeMap<Place, Received> = scope
            .read_all(&scope.input_topic)
            .into_iter()
            .chain(removed)
            .map(|record| ((record.partition, record.offset), record))
            .collect();
        let topic_id = scope.topic_id_text();
        let rows = rows(scope);
        let owners = owners(scope);
        let read = by_source(scope, &scope.read_topic, read_removed, &topic_id, remade.as_ref());
        let email = by_source(scope, &scope.email_topic, email_removed, &topic_id, remade.as_ref());
        let dead = by_source(scope, &scope.dead_letter_topic, dead_removed, &topic_id, remade.as_ref());
        let places = rows.keys().chain(read.keys()).chain(email.keys()).chain(dead.keys());
        if let Some(place) = places.into_iter().find(|place| !inputs.contains_key(place)) {
            panic!("an outcome of a record that was never sent: {place:?}");
        }

        // If the topic was created again, it is unknown for some records whether their event was sent.
        let is_unseen = |topic: &str, place: &Place| {
            remade.as_ref().is_some_and(|remade| {
                let mut unseen = remade.unseen.iter();
                remade.topic == topic
                    && unseen.any(|(p, offsets)| *p == place.0 && offsets.contains(&place.1))
            })
        };
        let mut outcomes = Outcomes::default();
        for (place, input) in &inputs {
            let (row, letter) = (rows.get(place), dead.get(place));
            let (event, mail) = (read.get(place), email.get(place));
            if given_up.contains(place) {
                outcomes.given_up += 1;
                continue;
            }
            match (row, letter) {
                (Some(row), None) => {
                    outcomes.written += 1;
                    let (id, Payload(fields, amount)) =
                        payload(input).expect("a written record is not a payment");
                    assert_eq!(owners.get(&row.message_id), Some(place), "the owner of {place:?}");
                    assert_eq!((row.message_id, row.cust_id), (id, fields[0].as_i64()), "{place:?}");
                    assert_eq!(row.status.map(i64::from), fields[2].as_i64(), "{place:?}");
                    assert_eq!(row.amount.as_deref(), Some(amount.as_str()), "{place:?}");
                    assert_eq!(row.has_notes, !fields[4].is_null() || !fields[5].is_null(), "{place:?}");
                    let is_lost = event.is_none() && is_unseen(&scope.read_topic, place);
                    assert!(event.is_some() == publishes || is_lost, "the read event of {place:?}");
                    let has_mail = publishes && row.status == Some(2);
                    let is_lost = mail.is_none() && is_unseen(&scope.email_topic, place);
                    assert!(mail.is_some() == has_mail || is_lost, "the e-mail of {place:?}");
                    for event in event.into_iter().chain(mail) {
                        assert_eq!(event.json()["id"], row.payment_id.to_string(), "{place:?}");
                        assert_eq!(event.key, input.key, "{place:?}");
                    }
                }
                (None, letter) => {
                    assert!(event.is_none() && mail.is_none(), "events of an unwritten payment {place:?}");
                    let owner = payload(input).and_then(|(id, payload)| {
                        let owner =
                            inputs.get(owners.get(&id)?).expect("the owner of an id is not in the log");
                        Some((payload, owner))
                    });
                    let is_same = owner.map(|(payload, owner)| payload == self::payload(owner).unwrap().1);
                    match (letter, is_same) {
                        (Some(letter), is_same) => {
                            outcomes.dead_letters += 1;
                            assert_eq!((&letter.key, &letter.value), (&input.key, &input.value), "{place:?}");
                            let is_conflict = letter.header("dlq-reason") == "message_id_conflict";
                            // The id of a rejected row may have another record that the database accepted,
                            // then or later.
                            if letter.header("dlq-reason") != "rejected_by_database" {
                                assert_eq!(is_conflict, is_same == Some(false), "dead letter of {place:?}");
                                assert!(is_same != Some(true), "a good record was dead-lettered: {place:?}");
                            }
                        }
                        (None, Some(true)) => outcomes.duplicates += 1,
                        // Without events there are no dead letters.
                        (None, _) if !publishes => outcomes.dead_letters += 1,
                        (None, _) => panic!("record {place:?} has no outcome"),
                    }
                }
                (Some(_), Some(_)) => panic!("record {place:?} is both written and dead-lettered"),
            }
        }
        assert_in_order(&scope.read_all(&scope.read_topic));
        assert_in_order(&scope.read_all(&scope.email_topic));
        assert_cursors_at_end(scope, publishes);
        outcomes
    }
}

/// For each account (key), the events must be in the order of the records' offsets.
#[track_caller]
fn assert_in_order(events: &[Received]) {
    let mut last: HashMap<&[u8], Place> = HashMap::new();
    for event in events {
        let mut source = event.header("source").split('/').skip(1).map(|part| part.parse::<i64>().unwrap());
        let place = (source.next().unwrap() as i32, source.next().unwrap());
        let key = event.key.as_deref().unwrap();
        if let Some(former) = last.insert(key, place) {
            // Tests that choose partitions explicitly spread an account over several.
            assert!(former.0 != place.0 || former < place, "{former:?} before {place:?}");
        }
    }
}

fn rows(scope: &Scope<'_>) -> BTreeMap<Place, Row> {
    let found = scope.sql(
        "SELECT m.source_partition, m.source_offset, m.message_id, m.payment_id, c.cust_id,
             to_char(c.amount, 'FM99999999999990.00'), c.status, n.payment_id IS NOT NULL
         FROM payment_writer.payment_metadata m
         LEFT JOIN payment_writer.payment_core c USING (payment_id, created_at)
         LEFT JOIN payment_writer.payment_notes n USING (payment_id, created_at)",
        &[],
    );
    let count = found.len();
    let rows: BTreeMap<Place, Row> = found
        .iter()
        .map(|row| {
            let value = Row {
                message_id: row.get(2),
                payment_id: row.get(3),
                cust_id: row.get(4),
                amount: row.get(5),
                status: row.get(6),
                has_notes: row.get(7),
            };
            ((row.get(0), row.get(1)), value)
        })
        .collect();
    assert_eq!(rows.len(), count, "a payment has more than one row");
    for table in ["payment_core", "payment_metadata", "idempotency"] {
        assert_eq!(scope.count(table), i64::try_from(count).unwrap(), "rows in {table}");
    }
    rows
}

fn owners(scope: &Scope<'_>) -> HashMap<Uuid, Place> {
    let found =
        scope.sql("SELECT message_id, source_partition, source_offset FROM payment_writer.idempotency", &[]);
    found.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
}

#[track_caller]
fn assert_cursors_at_end(scope: &Scope<'_>, publishes: bool) {
    let (ends, committed, cursors) = (scope.ends(), scope.committed_all(), scope.cursors());
    for (partition, end) in ends {
        let (applied, published) = *cursors.get(&partition).unwrap_or(&(0, publishes.then_some(0)));
        assert_eq!(applied, end, "applied of partition {partition}");
        assert_eq!(published, publishes.then_some(end), "published of partition {partition}");
        assert_eq!(committed.get(&partition).map_or(0, |k| k.0), end, "K of partition {partition}");
    }
}

impl Scope<'_> {
    /// [`Check`] without exceptions.
    #[track_caller]
    pub fn assert_exactly_once(&self) -> Outcomes {
        Check::of(self).holds()
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
