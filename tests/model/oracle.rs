//! Compares a world at rest with the contract. Independent of lanes, batches and cursors.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::records::{Expect, Record};
use crate::world::{Item, Message, World, refuses};

#[derive(Default)]
struct Sent<'w> {
    read: Vec<&'w Message>,
    email: Vec<&'w Message>,
    dead: Vec<&'w Message>,
}

impl Sent<'_> {
    fn counts(&self) -> (usize, usize, usize) {
        (self.read.len(), self.email.len(), self.dead.len())
    }
}

/// One valid record of an id.
struct Claimant<'w> {
    partition: i32,
    offset: i64,
    record: &'w Record,
    payload: u32,
    is_success: bool,
    /// The database never accepts it.
    is_refused: bool,
}

fn records(world: &World) -> impl Iterator<Item = (i32, i64, &Record)> {
    world.logs.iter().enumerate().flat_map(|(p, log)| {
        log.items.iter().enumerate().filter_map(move |(o, item)| match item {
            Item::Record(record) => Some((p as i32, o as i64, &**record)),
            Item::Hidden => None,
        })
    })
}

fn parse_source(world: &World, message: &Message) -> Result<(i32, i64), String> {
    let sources: Vec<_> = message.headers.iter().filter(|(name, _)| name == "source").collect();
    let [(_, text)] = sources.as_slice() else {
        return Err(format!("{} source headers on one output", sources.len()));
    };
    let mut parts = text.split('/');
    let prefix = world.topic_id.simple().to_string()[..8].to_owned();
    let wrong = || format!("source header {text}");
    if parts.next() != Some(&prefix) {
        return Err(wrong());
    }
    let partition = parts.next().and_then(|t| t.parse().ok()).ok_or_else(wrong)?;
    let offset = parts.next().and_then(|t| t.parse().ok()).ok_or_else(wrong)?;
    Ok((partition, offset))
}

/// Returns every violation. `halted` partitions need not be complete.
pub fn check(world: &World, halted: &BTreeSet<i32>) -> Vec<String> {
    let mut breaches = Vec::new();
    let mut sent: BTreeMap<(i32, i64), Sent<'_>> = BTreeMap::new();
    let mut latest: BTreeMap<(&str, i32), i64> = BTreeMap::new();
    for message in &world.outputs {
        match parse_source(world, message) {
            Err(breach) => breaches.push(breach),
            Ok((partition, offset)) => {
                if let Some(before) = latest.insert((message.topic, partition), offset)
                    && before >= offset
                {
                    breaches
                        .push(format!("{} of partition {partition}: {offset} after {before}", message.topic));
                }
                let entry = sent.entry((partition, offset)).or_default();
                match message.topic {
                    "read" => entry.read.push(message),
                    "email" => entry.email.push(message),
                    _ => entry.dead.push(message),
                }
            }
        }
    }
    if !world.publishes && !world.outputs.is_empty() {
        breaches.push("outputs, though kafka.publish is false".to_owned());
    }
    check_cursors(world, halted, &mut breaches);

    let mut ids: BTreeMap<Uuid, Vec<Claimant<'_>>> = BTreeMap::new();
    for (partition, offset, record) in records(world) {
        match &record.expect {
            Expect::Valid { id, payload, is_success } => ids.entry(*id).or_default().push(Claimant {
                partition,
                offset,
                record,
                payload: *payload,
                is_success: *is_success,
                is_refused: refuses(*id, i64::from(payload % 2 + 1)),
            }),
            Expect::Invalid(reason) => {
                let none = Sent::default();
                let sent = sent.get(&(partition, offset)).unwrap_or(&none);
                let at = format!("{partition}/{offset} ({reason})");
                let is_due = world.publishes && !halted.contains(&partition);
                match sent.counts() {
                    (0, 0, 1) => check_dead_letter(&at, record, sent.dead[0], reason, &mut breaches),
                    (0, 0, 0) if !is_due => {}
                    counts => breaches.push(format!("{at}: read, e-mail, dead letter: {counts:?}")),
                }
                if world.db.rows.iter().any(|r| (r.partition, r.offset) == (partition, offset)) {
                    breaches.push(format!("{at}: has rows"));
                }
            }
        }
    }
    for (id, claimants) in &ids {
        check_id(world, halted, *id, claimants, &sent, &mut breaches);
    }
    for row in &world.db.rows {
        let is_known = ids
            .get(&row.message_id)
            .is_some_and(|c| c.iter().any(|c| (c.partition, c.offset) == (row.partition, row.offset)));
        if !is_known {
            breaches.push(format!("a row without a record: {row:?}"));
        }
    }
    breaches
}

fn check_cursors(world: &World, halted: &BTreeSet<i32>, breaches: &mut Vec<String>) {
    for (p, log) in world.logs.iter().enumerate() {
        let partition = p as i32;
        if halted.contains(&partition) {
            continue;
        }
        let row = world.db.cursors.get(&partition);
        let (applied, published) = (row.map(|r| r.applied.0), row.and_then(|r| r.published).map(|k| k.0));
        let committed = world.offsets[p].as_ref().map(|o| o.position.0);
        let end = log.end();
        let wanted = (Some(end), Some(end), world.publishes.then_some(end));
        if (committed, applied, published) != wanted {
            breaches.push(format!(
                "partition {partition} after the drain: committed {committed:?}, applied {applied:?}, \
                 published {published:?}, end {end}"
            ));
        }
    }
}

fn check_id(
    world: &World,
    halted: &BTreeSet<i32>,
    id: Uuid,
    claimants: &[Claimant<'_>],
    sent: &BTreeMap<(i32, i64), Sent<'_>>,
    breaches: &mut Vec<String>,
) {
    let rows: Vec<_> = world.db.rows.iter().filter(|row| row.message_id == id).collect();
    let is_spread = claimants.iter().any(|c| c.partition != claimants[0].partition);
    let in_log = |c: &&Claimant<'_>| c.offset >= world.logs[c.partition as usize].start;
    let is_expired = !claimants.iter().all(|c| in_log(&c));
    // The contract's exception: after the loss of rows another record of the id may win, and records that
    // retention removed are not read again.
    let is_loose = world.has_rewound && (is_spread || is_expired);
    let is_due = claimants
        .iter()
        .any(|c| !c.is_refused && !halted.contains(&c.partition) && (!is_loose || in_log(&c)));
    let owner = match rows.as_slice() {
        [row] => claimants.iter().find(|c| (c.partition, c.offset) == (row.partition, row.offset)),
        [] if !is_due => None,
        rows => return breaches.push(format!("id {id}: {} rows: {rows:?}", rows.len())),
    };
    if let Some(owner) = owner
        && !is_loose
        && claimants
            .iter()
            .any(|c| c.partition == owner.partition && c.offset < owner.offset && !c.is_refused)
    {
        breaches.push(format!("id {id}: an earlier record of its partition does not own it"));
    }
    for c in claimants {
        let at = format!("{}/{} (id {id})", c.partition, c.offset);
        let none = Sent::default();
        let sent = sent.get(&(c.partition, c.offset)).unwrap_or(&none);
        for (message, row) in sent.read.iter().chain(&sent.email).filter_map(|m| Some((m, rows.first()?))) {
            check_event(&at, c, message, row.payment_id, is_loose, breaches);
        }
        for message in &sent.dead {
            // Unknown whether an accepted record of the same id came before it, or was decided again after a
            // crash.
            let is_rejected = message.header("dlq-reason") == Some("rejected_by_database") && c.is_refused;
            let reason = if is_rejected { "rejected_by_database" } else { "message_id_conflict" };
            check_dead_letter(&at, c.record, message, reason, breaches);
        }
        let counts = sent.counts();
        if !world.publishes || is_loose {
            // Sending the same output twice is never allowed.
            if counts.0 > 1 || counts.1 > counts.0 || counts.2 > 1 {
                breaches.push(format!("{at}: read, e-mail, dead letter: {counts:?}"));
            }
            continue;
        }
        let wanted = match owner {
            Some(owner) if owner.is_refused => {
                breaches.push(format!("{at}: written, though the database refuses it"));
                continue;
            }
            _ if c.is_refused => (0, 0, 1),
            Some(owner) if owner.offset == c.offset && owner.partition == c.partition => {
                (1, usize::from(c.is_success), 0)
            }
            Some(owner) if owner.payload == c.payload => (0, 0, 0),
            Some(_) => (0, 0, 1),
            None => (0, 0, 0),
        };
        let may_be_unsent = halted.contains(&c.partition) && counts == (0, 0, 0);
        if counts != wanted && !may_be_unsent {
            breaches.push(format!("{at}: read, e-mail, dead letter: {counts:?}, expected {wanted:?}"));
        }
    }
}

fn check_event(
    at: &str,
    claimant: &Claimant<'_>,
    message: &Message,
    payment_id: Uuid,
    is_loose: bool,
    breaches: &mut Vec<String>,
) {
    let value = message.value.as_deref().unwrap_or_default();
    let Ok(event) = serde_json::from_slice::<serde_json::Value>(value) else {
        return breaches.push(format!("{at}: an event that is not JSON"));
    };
    let is_right = event["messageId"] == claimant.record.id_text.as_str()
        && (is_loose || event["id"] == payment_id.to_string())
        && event["custId"] == i64::from(claimant.payload % 2 + 1)
        && message.key == claimant.record.key;
    if !is_right {
        breaches.push(format!("{at}: an event that differs from its record: {event}"));
    }
}

fn check_dead_letter(at: &str, record: &Record, message: &Message, reason: &str, breaches: &mut Vec<String>) {
    let place = at.split(' ').next().unwrap_or_default();
    let told = format!(
        "{}/{}",
        message.header("dlq-partition").unwrap_or_default(),
        message.header("dlq-offset").unwrap_or_default()
    );
    if message.header("dlq-reason") != Some(reason)
        || told != place
        || message.key != record.key
        || message.value != record.value
    {
        breaches.push(format!("{at}: a dead letter that differs from its record: {message:?}"));
    }
}
