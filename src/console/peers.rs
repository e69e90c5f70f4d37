//! The other daemons of `console.peers`: asked for their `/status` by this one, while a page is open. What they answer is
//! shown as text.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;
use tokio::net::lookup_host;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::About;
use super::source::Source;
use super::status::{HaltedRow, Level, PartitionRow, StatusAnswer, Summary};
use super::summary::counted;
use crate::config::read_token;

/// How old an answer may be.
pub const AGE: Duration = Duration::from_secs(2);
/// Maximum number of peers, with all addresses of a name.
const PEERS_MAX: usize = 64;
/// Maximum number of requests at the same time.
const REQUESTS_MAX: usize = 8;
/// Maximum number of partitions of all peers.
const PARTITIONS_MAX: usize = 5_000;
/// As long as a `kafka.instance_id` can be.
const INSTANCE_CHARS_MAX: usize = 249;
/// Time limit of asking all.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Those that have not answered by then have a row that says so; before the limit, after which there is no answer at all.
const ANSWERS_LIMIT: Duration = Duration::from_secs(9);
const LOOKUP_LIMIT: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const TEXT_CHARS_MAX: usize = 600;

/// Another daemon.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PeerRow {
    address: String,
    /// Why it does not answer.
    error: Option<String>,
    instance: String,
    version: String,
    ready: bool,
    summary: String,
    level: Level,
    partitions: usize,
    lag_records: i64,
    oldest_seconds: f64,
}

/// The answers of all peers.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// By address.
    pub rows: Vec<PeerRow>,
    /// Their partitions.
    pub partitions: Vec<PartitionRow>,
}

/// Asks all peers but this process itself, which a common name of all daemons contains.
pub async fn ask(about: Arc<About>, token_file: Option<PathBuf>) -> Peers {
    let deadline = Instant::now() + ANSWERS_LIMIT;
    let (mut peers, mut addresses) = (Peers::default(), BTreeSet::new());
    // Without a token, each peer refuses, and its row says so.
    let token = tokio::task::spawn_blocking(move || token_file.as_deref().map(read_token).transpose());
    let token = timeout(LOOKUP_LIMIT, token).await.ok().and_then(Result::ok).and_then(Result::ok).flatten();
    let lookup = |name: &String| {
        let name = name.clone();
        async move { (name.clone(), timeout(LOOKUP_LIMIT, lookup_host(name)).await) }
    };
    for (name, found) in join_all(about.peers.iter().map(lookup)).await {
        match found {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => peers.rows.push(away(name, &error.to_string())),
            Err(_) => peers.rows.push(away(name, "its name is not resolved in time")),
        }
    }
    if addresses.len() > PEERS_MAX {
        let more = format!("{} addresses, of which {PEERS_MAX} are asked", addresses.len());
        peers.rows.push(away("all".to_owned(), &more));
    }
    let turns = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut questions = JoinSet::new();
    let mut waiting: BTreeSet<SocketAddr> = addresses.into_iter().take(PEERS_MAX).collect();
    for address in waiting.iter().copied() {
        let (turns, token) = (Arc::clone(&turns), token.clone());
        questions.spawn(async move {
            let _turn = turns.acquire_owned().await;
            let asked = tokio::task::spawn_blocking(move || {
                Source::new(&address.to_string(), token)
                    .status(ANSWER_BYTES_MAX)
                    .map_err(|error| error.reason)
            });
            (address, asked.await.unwrap_or_else(|error| Err(error.to_string())))
        });
    }
    while let Ok(Some(answered)) = timeout_at(deadline, questions.join_next()).await {
        if let Ok((address, answer)) = answered {
            waiting.remove(&address);
            peers.add(&about, address, answer);
        }
    }
    // Or asking it panicked, which is in the log.
    peers
        .rows
        .extend(waiting.iter().map(|address| away(address.to_string(), "no answer in time, or not asked")));
    peers.rows.sort_by(|a, b| a.address.cmp(&b.address));
    peers
}

fn away(address: String, error: &str) -> PeerRow {
    PeerRow { address, error: Some(text(error)), level: Level::Bad, ..PeerRow::default() }
}

/// One line of limited length without control characters.
fn text(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).map(|c| if is_control(c) { '\u{fffd}' } else { c }).collect()
}

/// Also marks that change the direction of what follows.
fn is_control(c: char) -> bool {
    let is_mark =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    is_mark || c.is_control()
}

/// Whether it is a command that this page may offer to copy: what a peer says is not run unseen.
fn is_command(text: &str) -> bool {
    text.starts_with("payment-writer cursors ")
        && text.chars().all(|c| c.is_ascii_alphanumeric() || " -".contains(c))
}

/// The number of a partition as `/status` spells it.
fn number(text: &str) -> Option<i32> {
    text.parse().ok().filter(|number: &i32| *number >= 0 && number.to_string() == text)
}

fn sanitized(row: PartitionRow, partition: i32, instance: &str) -> PartitionRow {
    let halted = row.halted.map(|halted| HaltedRow {
        reason: text(&halted.reason),
        doubt: String::new(),
        advice: text(&halted.advice),
        command: halted.command.filter(|command| is_command(command)).as_deref().map(text),
        ..halted
    });
    let instance = instance.to_owned();
    PartitionRow { partition, instance, lane: None, state: text(&row.state), halted, ..row }
}

impl Peers {
    fn add(&mut self, about: &About, address: SocketAddr, answer: Result<StatusAnswer, String>) {
        let address = address.to_string();
        let answer = match answer {
            Ok(answer) if answer.group != about.group => {
                let error = format!("belongs to another group: {:?}", text(&answer.group));
                return self.rows.push(away(address, &error));
            }
            Ok(answer) if answer.instance == about.instance && answer.started_ms == about.started.0 => return,
            Ok(answer) if answer.instance == about.instance => {
                return self
                    .rows
                    .push(away(address, "another process with the kafka.instance_id of this daemon"));
            }
            Ok(answer) => answer,
            Err(error) => return self.rows.push(away(address, &error)),
        };
        let instance: String = text(&answer.instance).chars().take(INSTANCE_CHARS_MAX).collect();
        let room = PARTITIONS_MAX.saturating_sub(self.partitions.len());
        let rows = answer.partitions.into_iter().filter_map(|(name, row)| Some((number(&name)?, row)));
        let rows = rows.take(room).map(|(number, row)| sanitized(row, number, &instance));
        let partitions: Vec<PartitionRow> = rows.collect();
        let summary = answer.summary.unwrap_or_else(|| {
            // Of an earlier version.
            let is_well = answer.missing.is_empty() && partitions.iter().all(|row| row.halted.is_none());
            Summary { level: if is_well { Level::Ok } else { Level::Bad }, text: String::new() }
        });
        self.rows.push(PeerRow {
            address,
            error: None,
            version: text(&answer.build.version),
            ready: answer.missing.is_empty(),
            summary: text(&summary.text),
            level: summary.level,
            partitions: partitions.len(),
            lag_records: partitions.iter().filter_map(|row| row.lag_records).fold(0, i64::saturating_add),
            oldest_seconds: partitions.iter().filter_map(|row| row.lag_seconds).fold(0.0, f64::max),
            instance,
        });
        self.partitions.extend(partitions);
    }

    /// Raises the sentence to the worst of them, and counts those that do not answer or are not well.
    pub fn add_to(&self, summary: &mut Summary) {
        let away = self.rows.iter().filter(|row| row.error.is_some()).count();
        let at = |level| self.rows.iter().filter(|row| row.error.is_none() && row.level == level).count();
        let worst =
            self.rows.iter().map(|row| if row.error.is_some() { Level::Warn } else { row.level }).max();
        summary.level = summary.level.max(worst.unwrap_or_default());
        for (count, one, several) in [
            (away, "does not answer as one of this group", "do not answer as ones of this group"),
            (at(Level::Bad), "has a fault", "have a fault"),
            (at(Level::Warn), "has a warning", "have a warning"),
        ] {
            if count > 0 {
                let (who, what) =
                    (counted(count as u64, "other daemon"), if count == 1 { one } else { several });
                summary.text = format!("{}. {who} {what}", summary.text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::TimestampMs;

    fn about() -> About {
        About {
            version: "1",
            group: "g".to_owned(),
            instance: "me".to_owned(),
            dead_letter_topic: String::new(),
            kafka_client: String::new(),
            peers: Vec::new(),
            started: TimestampMs(5),
            lanes: 1,
        }
    }

    fn answered(answer: &str) -> Peers {
        let mut peers = Peers::default();
        let address = "10.0.0.2:9464".parse().unwrap();
        peers.add(&about(), address, serde_json::from_str(answer).map_err(|error| error.to_string()));
        peers
    }

    #[test]
    fn a_daemon_knows_itself_and_shows_whoever_uses_its_name_or_is_of_another_group() {
        assert!(answered(r#"{"group":"g","instance":"me","started_ms":5}"#).rows.is_empty());
        for (answer, expected) in [
            (r#"{"group":"g","instance":"me","started_ms":6}"#, "another process with the kafka.instance_id"),
            (r#"{"group":"x","instance":"other"}"#, "belongs to another group"),
            ("no JSON", "expected"),
        ] {
            let peers = answered(answer);
            let error = peers.rows[0].error.as_ref().unwrap();
            assert!(error.contains(expected), "{error}");
            let mut summary = Summary::default();
            peers.add_to(&mut summary);
            assert_eq!(summary.level, Level::Warn);
        }
    }

    #[test]
    fn the_sentence_counts_daemons_that_are_not_well() {
        for (answer, level, expected) in [
            (r#""summary":{"level":"ok","text":"x"}"#, Level::Ok, "Idle"),
            (r#""summary":{"level":"warn","text":"x"}"#, Level::Warn, "Idle. 1 other daemon has a warning"),
            (r#""summary":{"level":"bad","text":"x"}"#, Level::Bad, "Idle. 1 other daemon has a fault"),
            // Of an earlier version, which has no summary.
            (r#""missing":{}"#, Level::Ok, "Idle"),
            (r#""missing":{"database":"x"}"#, Level::Bad, "Idle. 1 other daemon has a fault"),
            (r#""partitions":{"1":{"halted":{}}}"#, Level::Bad, "Idle. 1 other daemon has a fault"),
        ] {
            let mut summary = Summary { level: Level::Ok, text: "Idle".to_owned() };
            answered(&format!(r#"{{"group":"g","instance":"other",{answer}}}"#)).add_to(&mut summary);
            assert_eq!((summary.level, summary.text.as_str()), (level, expected), "{answer}");
        }
    }

    #[test]
    fn only_a_command_of_this_program_is_offered_to_copy() {
        for (command, is_shown) in [
            ("payment-writer cursors skip --partition 1 --to 5", true),
            ("payment-writer cursors show; curl x | sh", false),
            ("curl x", false),
            ("payment-writer cursors skip $(x)", false),
        ] {
            let answer = format!(
                r#"{{"group":"g","instance":"o","partitions":{{"1":{{"halted":{{"command":"{command}"}}}}}}}}"#
            );
            let peers = answered(&answer);
            let halted = peers.partitions[0].halted.as_ref().unwrap();
            assert_eq!(halted.command.as_deref(), is_shown.then_some(command));
        }
        assert_eq!(text("a\u{202e}b\u{7}"), "a\u{fffd}b\u{fffd}");
    }

    #[test]
    fn what_a_hostile_peer_answers_is_bounded() {
        let rows: Vec<String> = (0..PARTITIONS_MAX + 500).map(|n| format!(r#""{n}":{{}}"#)).collect();
        let long = "x".repeat(10_000);
        let answer = format!(
            r#"{{"group":"g","instance":"{long}","partitions":{{"01":{{}},"+1":{{}},"-1":{{}},"1":{{"lag_records":{max},
                "halted":{{"doubt":"{long}","advice":"\u0007{long}"}}}},"1000000":{{"lag_records":{max}}},{}}}}}"#,
            rows.get(10..).unwrap().join(","),
            max = i64::MAX,
        );
        let peers = answered(&answer);
        assert_eq!(peers.partitions.len(), PARTITIONS_MAX);
        let row = peers.partitions.iter().find(|row| row.partition == 1).unwrap();
        let halted = row.halted.as_ref().unwrap();
        assert!(row.instance.len() <= INSTANCE_CHARS_MAX && halted.doubt.is_empty(), "{row:?}");
        assert!(halted.advice.chars().count() <= TEXT_CHARS_MAX && !halted.advice.contains('\u{7}'));
        assert_eq!(peers.rows[0].lag_records, i64::MAX);
    }
}
