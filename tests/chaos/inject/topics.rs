//! Manual changes to the group's offsets and to topics.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

use super::Done;
use crate::episode::{Episode, INPUT_PARTITIONS, OUTPUT_PARTITIONS};
use crate::report::Checked;
use crate::support::{
    Check, Message, PATIENCE, Payment, Received, Remade, Scope, wait_until, wait_until_within,
};

pub fn offsets_moved_back(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.drain();
    let scope = &episode.scope;
    let committed = scope.committed_all();
    let detail = if random.random_bool(0.25) {
        scope.delete_group_when_empty();
        "deleted"
    } else {
        for (partition, (offset, mark)) in &committed {
            if random.random_bool(0.3) {
                continue;
            }
            // Sometimes with the metadata that an earlier commit really had.
            let text = ["", "by hand", mark.as_str()][random.random_range(0..3)];
            scope.move_group_offset(*partition, random.random_range(0..=*offset), text);
        }
        "moved back"
    };
    let ended_at = Instant::now();
    for index in 0..episode.instances.len() {
        episode.restart_at(index, "");
    }
    Done::at(ended_at, detail)
}

/// Records of a topic that was created again, fewer than a partition of the old one had.
const STRANGERS: i64 = 15;

fn make_again(scope: &Scope<'_>, topic: &str, partitions: i32) {
    // Deletion completes some time after the request.
    wait_until("the topic is created again", || {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let made = catch_unwind(AssertUnwindSafe(|| scope.create_topic(topic, partitions))).is_ok();
        std::panic::set_hook(hook);
        made
    });
}

/// The topic's contents are deleted, including what was sent between the last read and the deletion.
/// Everything else must exist exactly once, in the old topic or in the new one.
pub fn output_recreated(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let scope = &episode.scope;
    let topic = if random.random_bool(0.5) { &scope.read_topic } else { &scope.email_topic }.clone();
    let seen: Vec<(i32, i64)> = scope.committed_all().iter().map(|(p, (offset, _))| (*p, *offset)).collect();
    let former = scope.read_all(&topic);
    scope.delete_topic(&topic);
    episode.hold(random, 0, 4_000);
    make_again(&episode.scope, &topic, OUTPUT_PARTITIONS);
    let ended_at = Instant::now();
    // What is being published now was fetched before now.
    let ends = episode.scope.ends();
    let recovery = episode.recover(ended_at);
    episode.flow.pause();
    episode.wait_until_settled();
    let since = |partition: i32| seen.iter().find(|(p, _)| *p == partition).map_or(0, |(_, offset)| *offset);
    let unseen = ends.iter().map(|(partition, end)| (*partition, since(*partition)..*end)).collect();
    let remade = Remade { topic: topic.clone(), former, unseen };
    let outcomes = Check::of(&episode.scope).remade(remade).holds();
    episode.drain();
    let (written, duplicates, dead_letters) = (outcomes.written, outcomes.duplicates, outcomes.dead_letters);
    let records = written + duplicates + dead_letters;
    let checked = Checked { records, written, duplicates, dead_letters, ..Checked::default() };
    Done { verdict: Some((recovery, checked)), ..Done::at(ended_at, topic) }
}

fn message_ids(records: &[Received]) -> HashSet<Uuid> {
    let id = |record: &Received| {
        let json: serde_json::Value = serde_json::from_slice(record.value.as_deref()?).ok()?;
        let text = json.get("messageId")?.as_str()?;
        text.parse().ok().or_else(|| Some(Uuid::from_u128(text.parse::<ulid::Ulid>().ok()?.0)))
    };
    records.iter().filter_map(id).collect()
}

/// An identity mismatch: all daemons stop, and nothing of the new topic is written or published.
pub fn input_recreated(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let is_old = |episode: &Episode<'_>| {
        let committed = episode.watch.committed().unwrap_or_default();
        (0..INPUT_PARTITIONS).all(|partition| committed.get(&partition).is_some_and(|at| *at > STRANGERS))
    };
    wait_until_within(PATIENCE, "more records were read than the new topic will have", || is_old(episode));
    // Batches in flight stay in flight.
    episode.flow.pause();
    let scope = &episode.scope;
    let records = scope.read_all(&scope.input_topic);
    let former = message_ids(&records);
    scope.delete_topic(&scope.input_topic);
    std::thread::sleep(Duration::from_millis(random.random_range(0..3_000)));
    make_again(scope, &scope.input_topic, INPUT_PARTITIONS);
    let ended_at = Instant::now();
    // Records at offsets already read from the old topic would be taken for the old ones: a known limit.
    let strangers = (0..STRANGERS.unsigned_abs()).map(u128::from);
    let strangers = strangers.map(|n| Payment::new(Uuid::from_u128(0x5742_0000 + n), 7).message());
    scope.produce(&scope.input_topic, strangers.map(|message| Message { timestamp_ms: None, ..message }));

    for instance in &mut episode.instances {
        let daemon = &mut instance.daemon;
        wait_until_within(PATIENCE, "the daemon stops", || !daemon.is_running());
        assert_eq!(daemon.wait().code(), Some(3), "{}: {}", instance.name, daemon.log());
    }
    let stopped_after = ended_at.elapsed();
    let scope = &episode.scope;
    episode.member("a").refuses(scope, &["run"], "deleted and recreated");

    let rows = scope.sql("SELECT message_id FROM payment_writer.payment_metadata", &[]);
    let stranger = rows.iter().map(|row| row.get::<_, Uuid>(0)).find(|id| !former.contains(id));
    assert_eq!(stranger, None, "a payment of the new topic was written");
    for topic in [&scope.read_topic, &scope.email_topic] {
        let events = scope.read_all(topic);
        let sources: HashSet<&str> = events.iter().map(|event| event.header("source")).collect();
        assert_eq!(sources.len(), events.len(), "{topic} has an event twice");
        assert!(message_ids(&events).is_subset(&former), "{topic} has an event of the new topic");
    }
    let checked = Checked { records: records.len(), written: rows.len(), ..Checked::default() };
    let done = Done::at(ended_at, "all stopped with exit code 3");
    Done { verdict: Some((stopped_after, checked)), ..done }
}
