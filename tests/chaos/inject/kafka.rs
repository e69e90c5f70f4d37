//! Faults of the brokers.

use std::time::Instant;

use payment_writer::kafka::publisher_settings::transactional_id;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::Done;
use crate::episode::{Episode, INPUT_PARTITIONS};
use crate::support::{Act, PATIENCE, coordinator_partition, wait_until_within};

/// With three brokers the others continue without this one: recovery is measured from its death. A single
/// broker is started again first.
fn dies(episode: &mut Episode<'_>, random: &mut ChaCha8Rng, broker: i32, act: Act, who: &str) -> Done {
    let servers = &episode.lab.servers;
    let is_held = hold_transactions(episode, random);
    let began_at = Instant::now();
    servers.broker(broker, act);
    if servers.brokers() >= 3 {
        return Done { dead_broker: Some(broker), ..Done::at(began_at, format!("broker {broker}{who}")) };
    }
    episode.hold(random, 0, 3_000);
    episode.lab.servers.broker(broker, Act::Start);
    release_transactions(episode, is_held);
    Done::now(format!("broker {broker}"))
}

/// Usually pauses the load's transactions while a single broker is killed: it drops their markers when it
/// restarts (known limits), and then nothing can be checked. Returns whether they are paused.
fn hold_transactions(episode: &Episode<'_>, random: &mut ChaCha8Rng) -> bool {
    let holds = random.random_bool(0.75) && episode.lab.servers.brokers() < 3;
    if holds {
        episode.flow.hold_transactions();
    }
    holds
}

fn release_transactions(episode: &Episode<'_>, is_held: bool) {
    if is_held {
        episode.scope.wait_for_brokers();
        episode.flow.release_transactions();
    }
}

/// Starts a stopped broker and waits until it is in sync, so that the next one may be killed.
pub fn mend(episode: &mut Episode<'_>, broker: i32) {
    episode.lab.servers.broker(broker, Act::Start);
    let scope = &episode.scope;
    let own = ["__consumer_offsets", "__transaction_state"];
    let topics = [&scope.input_topic, &scope.read_topic, &scope.email_topic, &scope.dead_letter_topic];
    for topic in topics.into_iter().map(String::as_str).chain(own) {
        wait_until_within(PATIENCE, &format!("{topic} is in sync"), || episode.watch.is_in_sync(topic, 3));
    }
}

fn any_broker(episode: &Episode<'_>, random: &mut ChaCha8Rng) -> i32 {
    random.random_range(1..=i32::try_from(episode.lab.servers.brokers()).unwrap())
}

pub fn kill(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let broker = any_broker(episode, random);
    dies(episode, random, broker, Act::Kill, "")
}

pub fn stop(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let broker = any_broker(episode, random);
    dies(episode, random, broker, Act::Stop, "")
}

pub fn pause(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let broker = any_broker(episode, random);
    let is_held = hold_transactions(episode, random);
    episode.lab.servers.broker(broker, Act::Pause);
    // Sometimes longer than the broker's session at the controller, and than the group's session timeout.
    episode.hold(random, 500, 9_000);
    episode.lab.servers.broker(broker, Act::Resume);
    release_transactions(episode, is_held);
    Done::now(format!("broker {broker}"))
}

fn leader_dies(
    episode: &mut Episode<'_>,
    random: &mut ChaCha8Rng,
    topic: &str,
    partition: i32,
    who: &str,
) -> Done {
    let mut leader = 0;
    wait_until_within(PATIENCE, &format!("{topic} {partition} has a leader"), || {
        leader = episode.watch.leader(topic, partition).map_or(0, |(leader, _)| leader);
        leader > 0
    });
    dies(episode, random, leader, Act::Kill, who)
}

pub fn leader_kill(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let partition = random.random_range(0..INPUT_PARTITIONS);
    let topic = episode.scope.input_topic.clone();
    leader_dies(episode, random, &topic, partition, &format!(", leader of input {partition}"))
}

pub fn group_coordinator_kill(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let partition = coordinator_partition(&episode.scope.group_id);
    leader_dies(episode, random, "__consumer_offsets", partition, ", coordinator of the group")
}

pub fn transaction_coordinator_kill(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let instance = &episode.instances[random.random_range(0..episode.instances.len())].name;
    let partition = coordinator_partition(&transactional_id(&episode.scope.group_id, instance, 0));
    leader_dies(episode, random, "__transaction_state", partition, &format!(", coordinator of {instance}'s"))
}
