//! Faults of the daemon processes.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::{Done, REACHED_WITHIN};
use crate::episode::{Episode, SESSION_TIMEOUT};
use crate::support::{PATIENCE, wait_until_within};

/// Failpoints in each batch, and in the recovery of partitions.
const STEPS: [&str; 10] = [
    "before_store_cursors",
    "after_store_cursors",
    "before_copy_ends",
    "before_postgres_commit",
    "after_postgres_commit",
    "before_kafka_begin",
    "after_produce",
    "after_send_offsets",
    "before_kafka_commit",
    "after_kafka_commit",
];

/// A failpoint, and the hit at which it takes effect.
fn step(random: &mut ChaCha8Rng) -> String {
    let step = STEPS.choose(random).copied().unwrap_or_default();
    // Recovery passes a failpoint once, batches pass it again and again.
    let hit = if step.ends_with("_store_cursors") { 1 } else { random.random_range(1..=6) };
    format!("{step}:{hit}")
}

fn victim(episode: &Episode<'_>, random: &mut ChaCha8Rng) -> usize {
    random.random_range(0..episode.instances.len())
}

/// Waits for `condition`; returns whether it became true.
fn comes(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while !condition() {
        if began.elapsed() > timeout {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

pub fn kill_at_step(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let index = victim(episode, random);
    let mut detail = episode.instances[index].name.clone();
    // Once, or again during recovery.
    for _ in 0..if random.random_bool(0.25) { 2 } else { 1 } {
        let step = step(random);
        episode.instances[index].daemon.kill();
        episode.restart_at(index, &step);
        let daemon = &mut episode.instances[index].daemon;
        let is_dead = comes(REACHED_WITHIN, || !daemon.is_running());
        detail += &format!(" at {step}{}", if is_dead { "" } else { ", not reached" });
        if !is_dead {
            daemon.kill();
        }
    }
    let ended_at = Instant::now();
    episode.restart_at(index, "");
    Done::at(ended_at, detail)
}

pub fn kill_anywhere(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let mut detail = String::new();
    for _ in 0..random.random_range(1..=3) {
        let index = victim(episode, random);
        let later = random.random_range(0..1_500);
        std::thread::sleep(Duration::from_millis(later));
        detail += &format!("{} after {later} ms ", episode.instances[index].name);
        episode.kill_and_restart(index);
    }
    Done::now(detail.trim_end())
}

pub fn kill_all(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    for instance in &mut episode.instances {
        instance.daemon.kill();
    }
    let away = random.random_range(0..3_000);
    std::thread::sleep(Duration::from_millis(away));
    let ended_at = Instant::now();
    for index in 0..episode.instances.len() {
        episode.restart_at(index, "");
    }
    Done::at(ended_at, format!("for {away} ms"))
}

/// Longer than the group's session timeout.
fn out_of_sight(random: &mut ChaCha8Rng) -> Duration {
    SESSION_TIMEOUT + Duration::from_millis(random.random_range(500..5_000))
}

pub fn zombie(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let index = victim(episode, random);
    let away = out_of_sight(random);
    episode.instances[index].daemon.signal("STOP");
    std::thread::sleep(away);
    episode.instances[index].daemon.signal("CONT");
    Done::now(format!("{} for {away:?}", episode.instances[index].name))
}

pub fn zombie_at_step(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let index = victim(episode, random);
    let (step, away) = (step(random), out_of_sight(random));
    episode.instances[index].daemon.kill();
    episode.restart_at(index, &format!("{step}:stop"));
    let daemon = &episode.instances[index].daemon;
    let is_stopped = comes(REACHED_WITHIN, || daemon.is_stopped());
    if is_stopped {
        std::thread::sleep(away);
    }
    daemon.signal("CONT");
    let reached = if is_stopped { "" } else { ", not reached" };
    Done::now(format!("{} at {step} for {away:?}{reached}", episode.instances[index].name))
}

pub fn partial_revoke(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let mut guest = episode.member("guest").start(&episode.scope);
    // It may be killed before it is assigned partitions, or after it has worked for a while.
    let stays = if random.random_bool(0.7) {
        wait_until_within(PATIENCE, "the joined instance has partitions", || guest.partitions() > 0);
        random.random_range(0..2_500)
    } else {
        random.random_range(0..2_500)
    };
    std::thread::sleep(Duration::from_millis(stays));
    let is_killed = random.random_bool(0.5);
    if is_killed {
        guest.kill();
    } else {
        guest.terminate();
        let status = guest.wait();
        assert_eq!(status.code(), Some(0), "draining the guest: {}", guest.log());
    }
    Done::now(if is_killed { "the guest was killed" } else { "the guest drained" })
}

pub fn revoke_at_step(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let index = victim(episode, random);
    let hangs = random.random_bool(0.5);
    let failpoint = if hangs { "before_revoked:1:stop" } else { "before_revoked" };
    episode.instances[index].daemon.kill();
    episode.restart_at(index, failpoint);
    let daemon = &mut episode.instances[index].daemon;
    wait_until_within(PATIENCE, "it has partitions to revoke", || daemon.partitions() > 0);
    let mut guest = episode.member("guest").start(&episode.scope);
    let daemon = &mut episode.instances[index].daemon;
    let is_reached =
        comes(Duration::from_secs(12), || if hangs { daemon.is_stopped() } else { !daemon.is_running() });
    if hangs {
        std::thread::sleep(if is_reached { out_of_sight(random) } else { Duration::ZERO });
        daemon.signal("CONT");
    } else {
        daemon.kill();
        episode.restart_at(index, "");
    }
    guest.terminate();
    assert_eq!(guest.wait().code(), Some(0), "draining the guest: {}", guest.log());
    let how = if hangs { "hung" } else { "died" };
    let reached = if is_reached { "" } else { ", not reached" };
    Done::now(format!("{} {how}{reached}", episode.instances[index].name))
}

fn restart_one_by_one(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) {
    for index in 0..episode.instances.len() {
        let instance = &mut episode.instances[index];
        instance.daemon.terminate();
        let status = instance.daemon.wait();
        assert_eq!(status.code(), Some(0), "draining {}: {}", instance.name, instance.daemon.log());
        episode.restart_at(index, "");
        // The next one starts without waiting for it.
        std::thread::sleep(Duration::from_millis(random.random_range(0..1_500)));
    }
}

pub fn rolling_restart(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    restart_one_by_one(episode, random);
    Done::now("")
}

pub fn rolling_upgrade(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.raise_schema();
    restart_one_by_one(episode, random);
    Done::now("")
}

pub fn same_instance_id(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let index = victim(episode, random);
    let mut second = episode.instances[index].member.start(&episode.scope);
    let first = &mut episode.instances[index].daemon;
    // An instance that lost its broker may take itself for fenced, and restart once.
    wait_until_within(PATIENCE, "one of the two is fenced", || !first.is_running() || !second.is_running());
    let ended_at = Instant::now();
    let is_first = !first.is_running();
    if is_first {
        std::mem::swap(first, &mut second);
    }
    second.ends_for_a_person("kafka.instance_id");
    let name = &episode.instances[index].name;
    Done::at(ended_at, format!("the {} {name} was fenced", if is_first { "first" } else { "second" }))
}
