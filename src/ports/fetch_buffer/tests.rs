use super::*;

fn push(buffer: &mut FetchBuffer, partition: i32, offset: i64) {
    buffer.record(Partition(partition), Offset(offset), None, None, Some(b"v"), []);
}

fn offsets(buffer: &FetchBuffer) -> Vec<(i32, i64)> {
    buffer.source.iter().map(|r| (r.partition.0, r.offset.0)).collect()
}

#[test]
fn a_record_delivered_twice_is_taken_once() {
    let mut buffer = FetchBuffer::new(10, 1_000);
    buffer.begin(Partition(1), NextOffset(5));
    for offset in [4, 5, 6, 5, 6, 9] {
        push(&mut buffer, 1, offset);
    }
    push(&mut buffer, 2, 0);
    assert_eq!(offsets(&buffer), [(1, 5), (1, 6), (1, 9)]);
}

#[test]
fn what_is_forgotten_leaves_the_others_in_order() {
    let mut buffer = FetchBuffer::new(10, 1_000);
    for partition in [1, 2] {
        buffer.begin(Partition(partition), NextOffset(0));
    }
    for (partition, offset) in [(1, 0), (2, 0), (1, 1), (2, 1)] {
        push(&mut buffer, partition, offset);
    }
    buffer.end(Partition(1), NextOffset(3));
    buffer.forget(&[Partition(1)]);
    push(&mut buffer, 1, 2);
    push(&mut buffer, 2, 2);
    assert_eq!(offsets(&buffer), [(2, 0), (2, 1), (2, 2)]);
    assert!(buffer.take(SourceBatch::new()).1.is_empty());
}

#[test]
fn an_end_moves_the_position_over_control_records() {
    let mut buffer = FetchBuffer::new(10, 1_000);
    buffer.begin(Partition(1), NextOffset(0));
    push(&mut buffer, 1, 0);
    assert!(buffer.is_delivering(Partition(1)));
    buffer.end(Partition(1), NextOffset(1));
    assert!(buffer.ends.is_empty(), "nothing beyond the record itself");
    buffer.end(Partition(1), NextOffset(2));
    assert_eq!(buffer.ends.get(&Partition(1)), Some(&NextOffset(2)));
}

#[test]
fn what_comes_first_after_a_begin_must_be_at_the_position_asked_for() {
    let gap = |from, to| Interruption::Gap { from: NextOffset(from), to: NextOffset(to) };
    let mut buffer = FetchBuffer::new(10, 1_000);
    for partition in 1..=4 {
        buffer.begin(Partition(partition), NextOffset(5));
    }
    // A record or an end beyond it interrupts the partition.
    push(&mut buffer, 1, 7);
    push(&mut buffer, 1, 8);
    buffer.end(Partition(2), NextOffset(6));
    push(&mut buffer, 2, 6);
    // After a first record or end at the position, later offsets may skip, as over a transaction marker.
    push(&mut buffer, 3, 5);
    push(&mut buffer, 3, 9);
    buffer.end(Partition(4), NextOffset(5));
    push(&mut buffer, 4, 7);
    assert_eq!(offsets(&buffer), [(3, 5), (3, 9), (4, 7)]);
    assert_eq!(buffer.take_interruptions(), [(Partition(1), gap(5, 7)), (Partition(2), gap(5, 6))]);
    assert_eq!(buffer.position(Partition(1)), Some(NextOffset(5)), "it did not move");
    // The gap is empty: the position advances without a record.
    buffer.begin_after_gap(Partition(2), NextOffset(6));
    assert_eq!(buffer.ends.get(&Partition(2)), Some(&NextOffset(6)));
    push(&mut buffer, 2, 6);
    assert_eq!(offsets(&buffer).last(), Some(&(2, 6)));
}

#[test]
fn nothing_behind_an_error_is_taken() {
    let fault = FetchFault { code: RDKafkaErrorCode::BadMessage, batch: Some(NextOffset(2)) };
    let mut buffer = FetchBuffer::new(10, 1_000);
    buffer.begin(Partition(1), NextOffset(0));
    push(&mut buffer, 1, 0);
    push(&mut buffer, 1, 1);
    buffer.fail(Partition(1), fault);
    push(&mut buffer, 1, 4);
    buffer.end(Partition(1), NextOffset(9));
    buffer.fail(Partition(1), fault);
    assert_eq!(offsets(&buffer), [(1, 0), (1, 1)]);
    let position = NextOffset(2);
    assert_eq!(
        buffer.take_interruptions(),
        [(Partition(1), Interruption::Failed { position, fault })],
        "reported once"
    );
    assert!(buffer.ends.is_empty());
    // A new begin continues at the position before the error.
    buffer.begin(Partition(1), position);
    push(&mut buffer, 1, 2);
    assert_eq!(offsets(&buffer), [(1, 0), (1, 1), (1, 2)]);
}
