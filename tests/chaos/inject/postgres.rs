//! Faults of Postgres, and of the network to it.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Done, REACHED_WITHIN};
use crate::episode::Episode;
use crate::proxy::OnCommit;
use crate::support::{Act, PATIENCE, block_on, wait_until_within};

pub fn immediate(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.lab.servers.postgres(Act::Immediate);
    episode.hold(random, 0, 3_000);
    episode.lab.servers.postgres(Act::Start);
    Done::now("")
}

pub fn kill(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.lab.servers.postgres(Act::Kill);
    episode.hold(random, 0, 3_000);
    episode.lab.servers.postgres(Act::Start);
    Done::now("")
}

pub fn pause(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.lab.servers.postgres(Act::Pause);
    episode.hold(random, 500, 8_000);
    episode.lab.servers.postgres(Act::Resume);
    Done::now("")
}

pub fn backends_terminated(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let times = random.random_range(3..=12);
    for _ in 0..times {
        episode.scope.cut_connections();
        std::thread::sleep(Duration::from_millis(random.random_range(10..400)));
    }
    Done::now(format!("{times} times"))
}

pub fn connections_cut(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let times = random.random_range(1..=6);
    for _ in 0..times {
        episode.lab.proxy.cut();
        std::thread::sleep(Duration::from_millis(random.random_range(0..500)));
    }
    Done::now(format!("{times} times"))
}

pub fn black_hole(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    episode.lab.proxy.set_open(false);
    episode.hold(random, 500, 8_000);
    let is_cut = random.random_bool(0.5);
    if is_cut {
        episode.lab.proxy.cut();
    }
    episode.lab.proxy.set_open(true);
    Done::now(if is_cut { "then cut" } else { "then open" })
}

pub fn half_open(episode: &mut Episode<'_>) -> Done {
    episode.lab.proxy.forget();
    Done::now("")
}

fn at_next_commit(episode: &mut Episode<'_>, trap: OnCommit) -> Done {
    let is_sprung = episode.lab.proxy.at_next_commit(trap, REACHED_WITHIN);
    assert!(is_sprung, "STUCK: no COMMIT within {REACHED_WITHIN:?} under load");
    Done::now("")
}

pub fn swallowed_commit(episode: &mut Episode<'_>) -> Done {
    at_next_commit(episode, OnCommit::SwallowReply)
}

pub fn lost_commit(episode: &mut Episode<'_>) -> Done {
    at_next_commit(episode, OnCommit::Lose)
}

pub fn late_commit(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let delay = Duration::from_millis(random.random_range(5..3_000));
    let done = at_next_commit(episode, OnCommit::Delay(delay));
    Done { detail: format!("by {delay:?}"), ..done }
}

pub fn restored(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let database = episode.scope.database.clone();
    let allow = |is_allowed: bool| format!("ALTER DATABASE \"{database}\" ALLOW_CONNECTIONS {is_allowed}");
    // A copy needs a database without connections.
    episode.scope.on_server(&[allow(false)]);
    episode.scope.cut_connections();
    episode.scope.back_up_database();
    episode.scope.on_server(&[allow(true)]);
    // Something must have been written since, or nothing would be lost.
    episode.recover(Instant::now());
    episode.hold(random, 500, 3_000);
    episode.scope.restore_database();
    Done::now("")
}

pub fn standby_promoted(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let standby = episode.lab.servers.make_standby();
    let ask = |statement: &'static str| {
        block_on(async {
            let (client, connection) =
                tokio_postgres::connect(&standby, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            client.simple_query(statement).await.unwrap()
        })
    };
    let is_followed = || {
        let rows = ask("SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'");
        rows.iter().any(|row| matches!(row, tokio_postgres::SimpleQueryMessage::Row(_)))
    };
    wait_until_within(PATIENCE, "the standby replicates", is_followed);
    episode.recover(Instant::now());
    // From here on it receives no commit.
    ask("ALTER SYSTEM SET primary_conninfo = ''");
    ask("SELECT pg_reload_conf()");
    wait_until_within(PATIENCE, "the standby has lost its primary", || !is_followed());
    episode.recover(Instant::now());
    episode.hold(random, 100, 2_000);
    episode.lab.servers.promote_standby();
    episode.lab.proxy.point_at(episode.lab.servers.postgres_port());
    Done::now("")
}

pub fn disk_full(episode: &mut Episode<'_>, random: &mut ChaCha8Rng) -> Done {
    let disk = episode.lab.servers.small_disk().expect("a small disk");
    let refused = |episode: &Episode<'_>| -> f64 {
        let metric = "payment_writer_database_errors_total";
        episode.instances.iter().map(|i| i.daemon.metric(metric, "sqlstate_class=\"53\"")).sum()
    };
    let before = refused(episode);
    let mut ballast = std::fs::File::create(disk.join("ballast")).unwrap();
    let block = [1; 8192];
    // Writes until the disk is full.
    while std::io::Write::write_all(&mut ballast, &block).is_ok() {}
    wait_until_within(PATIENCE, "the database rejects writes because the disk is full", || {
        refused(episode) > before
    });
    episode.hold(random, 500, 4_000);
    std::fs::remove_file(disk.join("ballast")).unwrap();
    Done::now("")
}
