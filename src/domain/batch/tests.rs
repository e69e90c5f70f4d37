use std::collections::HashMap;

use super::*;
use crate::domain::outcome::SqlState;
use crate::domain::wire::Reason;

const NOW: TimestampMs = TimestampMs(1_767_225_600_000);

/// A message id with this last digit; ids are ordered by it.
fn id(n: u8) -> [u8; 16] {
    *uuid::Uuid::from_u128(0x0190_0000_0000_4000_8000_0000_0000_0000 | u128::from(n)).as_bytes()
}

fn json(n: u8, amount: u32, more: &str) -> String {
    let id = uuid::Uuid::from_bytes(id(n));
    format!(
        r#"{{"messageId":"{id}","amount":{amount},"status":0,"currency":"EUR","custId":7,"type":"BWI"{more}}}"#
    )
}

fn source(records: &[(i32, i64, String)]) -> SourceBatch {
    let mut source = SourceBatch::new();
    for (partition, offset, value) in records {
        source.push(
            Partition(*partition),
            Offset(*offset),
            Some(NOW),
            Some(b"7"),
            Some(value.as_bytes()),
            [],
        );
    }
    source
}

/// A batch of records (partition, offset, id, amount) over partitions whose `applied` is `seen`.
fn batch(seen: i64, records: &[(i32, i64, u8, u32)]) -> Batch {
    let texts: Vec<_> = records.iter().map(|(p, o, n, amount)| (*p, *o, json(*n, *amount, ""))).collect();
    let mut progress: Vec<Progress> = Vec::new();
    for (p, o, ..) in records {
        let partition = Partition(*p);
        progress.retain(|known| known.partition != partition);
        let reached = Offset(*o).next();
        progress.push(Progress { partition, seen: NextOffset(seen), reached, timestamp: Some(Some(NOW)) });
    }
    Batch::assemble(source(&texts), progress, &Rules::default())
}

fn owner(batch: &Batch, index: usize, partition: i32, offset: i64) -> Owner {
    let candidate = batch.places[index].payment.as_ref().unwrap();
    Owner { partition: Partition(partition), offset: Offset(offset), payload_hash: candidate.payload_hash }
}

fn claimed(batch: &Batch) -> Vec<([u8; 16], i32, i64)> {
    batch.claims(&Refused::default()).map(|c| (c.message_id, c.partition.0, c.offset.0)).collect()
}

const CONFLICT: Outcome = Outcome::DeadLetter(Reason::MessageIdConflict);

#[test]
fn ids_are_claimed_in_their_order_each_once_by_the_lowest_offset() {
    let batch = batch(0, &[(1, 5, 3, 1), (0, 9, 1, 1), (1, 6, 1, 1), (0, 10, 3, 1), (0, 11, 2, 1)]);
    assert_eq!(claimed(&batch), [(id(1), 1, 6), (id(2), 0, 11), (id(3), 1, 5)]);
    assert_eq!(batch.lookups().count(), 0);
}

#[test]
fn of_twins_in_a_batch_the_lower_offset_is_written() {
    let batch = batch(0, &[(0, 4, 1, 10), (0, 5, 1, 10), (0, 6, 1, 99), (1, 3, 2, 10), (0, 7, 2, 10)]);
    let outcomes = batch.decide(&Answer::default(), &Refused::default());
    assert_eq!(
        outcomes,
        [Outcome::Written, Outcome::Duplicate, CONFLICT, Outcome::Written, Outcome::Duplicate]
    );
}

#[test]
fn twins_of_a_stranger_are_all_measured_by_the_stranger() {
    let batch = batch(0, &[(0, 4, 1, 10), (0, 5, 1, 99), (0, 6, 1, 99)]);
    // The owner's payload is that of the second record.
    let answer = Answer { owners: HashMap::from([(id(1), owner(&batch, 1, 8, 0))]) };
    assert_eq!(
        batch.decide(&answer, &Refused::default()),
        [CONFLICT, Outcome::Duplicate, Outcome::Duplicate]
    );
}

#[test]
fn a_record_that_owns_its_id_was_written_before() {
    let batch = batch(0, &[(0, 4, 1, 10), (0, 5, 1, 10), (1, 4, 1, 10)]);
    let answer = Answer { owners: HashMap::from([(id(1), owner(&batch, 0, 0, 4))]) };
    assert_eq!(
        batch.decide(&answer, &Refused::default()),
        [Outcome::WrittenBefore, Outcome::Duplicate, Outcome::Duplicate]
    );
    assert_eq!(
        batch.rows(&batch.decide(&answer, &Refused::default())).core.count,
        0,
        "no rows a second time"
    );
}

#[test]
fn records_below_the_cursor_are_looked_up_and_never_claimed() {
    let batch = batch(6, &[(0, 4, 1, 10), (0, 5, 2, 10), (0, 6, 3, 10), (0, 7, 1, 10)]);
    assert_eq!(batch.lookups().collect::<Vec<_>>(), [id(1), id(2)]);
    assert_eq!(claimed(&batch), [(id(1), 0, 7), (id(3), 0, 6)]);
    let answer = Answer { owners: HashMap::from([(id(1), owner(&batch, 0, 0, 4))]) };
    let outcomes = batch.decide(&answer, &Refused::default());
    // Id 2 has no owner, and its record is below the cursor: the database refused it.
    let refused = Outcome::Rejected(None);
    assert_eq!(outcomes, [Outcome::WrittenBefore, refused, Outcome::Written, Outcome::Duplicate]);
}

#[test]
fn each_partition_has_its_own_cursor() {
    let texts = [(0, 5, json(1, 1, "")), (1, 5, json(2, 1, ""))];
    let progress = |p, seen| Progress {
        partition: Partition(p),
        seen: NextOffset(seen),
        reached: NextOffset(6),
        timestamp: None,
    };
    let batch = Batch::assemble(source(&texts), vec![progress(1, 6), progress(0, 5)], &Rules::default());
    assert_eq!(claimed(&batch), [(id(1), 0, 5)]);
    assert_eq!(batch.lookups().collect::<Vec<_>>(), [id(2)]);
    // A cursor that is ahead of the batch does not move.
    let applied: Vec<_> = batch.progress().iter().map(|p| (p.partition.0, p.applied().0)).collect();
    assert_eq!(applied, [(0, 6), (1, 6)]);
}

#[test]
fn an_invalid_record_claims_no_id() {
    let texts = [(0, 4, json(1, 0, "")), (0, 5, json(1, 5, ""))];
    let progress =
        Progress { partition: Partition(0), seen: NextOffset(4), reached: NextOffset(6), timestamp: None };
    let batch = Batch::assemble(source(&texts), vec![progress], &Rules::default());
    assert_eq!(claimed(&batch), [(id(1), 0, 5)]);
    let outcomes = batch.decide(&Answer::default(), &Refused::default());
    assert_eq!(outcomes, [Outcome::DeadLetter(Reason::InvalidField), Outcome::Written]);
}

#[test]
fn after_a_lost_reply_ownership_tells_the_same_fates() {
    let records = [(0, 4, 1, 10), (0, 5, 1, 10), (0, 6, 1, 99), (0, 7, 2, 10), (0, 8, 3, 10)];
    let mut batch = batch(4, &records);
    // GIVEN a transaction in which another record owned id 2 and the others were claimed
    let stranger = Answer { owners: HashMap::from([(id(2), owner(&batch, 3, 8, 1))]) };
    let first = batch.decide(&stranger, &Refused::default());
    assert_eq!(first, [Outcome::Written, Outcome::Duplicate, CONFLICT, Outcome::Duplicate, Outcome::Written]);
    // WHEN the transaction turns out to be committed
    let mut owners = stranger.owners;
    owners.insert(id(1), owner(&batch, 0, 0, 4));
    owners.insert(id(3), owner(&batch, 4, 0, 8));
    batch.mark_committed();
    // THEN nothing is claimed or written, and each record keeps its outcome
    assert_eq!(batch.claims(&Refused::default()).count(), 0);
    assert_eq!(batch.lookups().count(), 5);
    assert_eq!(batch.progress()[0].seen, NextOffset(9));
    let outcomes = batch.decide(&Answer { owners }, &Refused::default());
    let again =
        [Outcome::WrittenBefore, Outcome::Duplicate, CONFLICT, Outcome::Duplicate, Outcome::WrittenBefore];
    assert_eq!(outcomes, again);
    let rows = batch.rows(&outcomes);
    assert_eq!((rows.core.count, rows.metadata.count, rows.notes.count), (0, 0, 0));
    assert!(rows.core.bytes.is_empty());
}

#[test]
fn rows_are_those_of_the_written_records() {
    let texts = [
        (0, 4, json(1, 1, r#","comment":"a""#)),
        (0, 5, json(1, 1, r#","comment":"a""#)),
        (0, 6, json(2, 1, "")),
        (0, 7, json(3, 1, r#","externalRefId":"x""#)),
    ];
    let progress = |seen| Progress {
        partition: Partition(0),
        seen: NextOffset(seen),
        reached: NextOffset(8),
        timestamp: None,
    };
    let counts = |rows: &TableRows| (rows.core.count, rows.metadata.count, rows.notes.count);
    // All records are new: the buffers are used without copying.
    let all = Batch::assemble(source(&texts[1..]), vec![progress(0)], &Rules::default());
    let rows = all.rows(&all.decide(&Answer::default(), &Refused::default()));
    assert_eq!(counts(&rows), (3, 3, 2));
    // With a repeated id before them: the same rows, copied.
    let some = Batch::assemble(source(&texts), vec![progress(0)], &Rules::default());
    let copied = some.rows(&some.decide(&Answer::default(), &Refused::default()));
    assert_eq!(counts(&copied), (3, 3, 2));
    assert_eq!(copied.core.bytes, rows.core.bytes);
    assert_eq!(copied.notes.bytes, rows.notes.bytes);
}

fn refused(indices: &[u32]) -> Refused {
    let mut refused = Refused::default();
    for index in indices {
        refused.insert(*index, SqlState::new("23514").unwrap());
    }
    refused
}

#[test]
fn what_the_database_refused_claims_nothing_and_its_twins_are_decided_anew() {
    let rejected = Outcome::Rejected(SqlState::new("23514"));
    let batch = batch(0, &[(0, 4, 1, 10), (0, 5, 1, 10), (0, 6, 1, 99), (0, 7, 2, 10)]);
    let claims = |refused: &Refused| batch.claims(refused).map(|c| c.index).collect::<Vec<_>>();
    let answer = Answer::default();
    assert_eq!(claims(&refused(&[])), [0, 3]);
    assert_eq!(claims(&refused(&[0])), [1, 3]);
    assert_eq!(claims(&refused(&[0, 1])), [2, 3]);
    assert_eq!(claims(&refused(&[0, 1, 2])), [3]);
    let outcomes = |indices: &[u32]| batch.decide(&answer, &refused(indices));
    assert_eq!(outcomes(&[0]), [rejected, Outcome::Written, CONFLICT, Outcome::Written]);
    assert_eq!(outcomes(&[0, 1]), [rejected, rejected, Outcome::Written, Outcome::Written]);
    assert_eq!(outcomes(&[0, 1, 2, 3]), [rejected; 4]);
    let rows = batch.rows(&batch.decide(&answer, &refused(&[0, 3])));
    assert_eq!(rows.core.count, 1);
    assert_eq!(rows.core.bytes, batch.rows_at(&[1]).core.bytes);
    assert_eq!(rows.metadata.bytes, batch.rows_at(&[1]).metadata.bytes);
}

#[test]
fn a_refused_record_stays_refused_when_a_later_one_of_its_partition_was_taken() {
    // GIVEN records with one id below the cursor: the first was refused, the second was written
    let again = batch(9, &[(0, 4, 1, 10), (0, 5, 1, 10), (0, 6, 1, 99), (1, 3, 1, 10)]);
    let owners = HashMap::from([(id(1), owner(&again, 1, 0, 5))]);
    // THEN only records after the owner, or in another partition, are compared with it
    let outcomes = again.decide(&Answer { owners }, &Refused::default());
    assert_eq!(outcomes, [Outcome::Rejected(None), Outcome::WrittenBefore, CONFLICT, Outcome::Duplicate]);
}
