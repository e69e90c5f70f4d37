//! The other daemons of `console.peers`: asked for their `/status` by this one, while a page is open. What they answer is
//! shown as text.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::net::lookup_host;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::About;
use super::source::Source;
use super::status::{PartitionRow, StatusAnswer};
use super::summary::Level;
use crate::config::read_token;

/// How old an answer may be.
pub const AGE: Duration = Duration::from_secs(2);
/// Maximum number of peers, with all addresses of a name.
const PEERS_MAX: usize = 64;
/// Maximum number of requests at the same time.
const REQUESTS_MAX: usize = 8;
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
    let (mut peers, mut addresses) = (Peers::default(), BTreeSet::new());
    let token = tokio::task::spawn_blocking(move || token_file.as_deref().map(read_token).transpose()).await;
    // Without it, each peer refuses, and its row says so.
    let token = token.ok().and_then(Result::ok).flatten();
    for name in &about.peers {
        match timeout(LOOKUP_LIMIT, lookup_host(name.as_str())).await {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => peers.rows.push(away(name.clone(), error.to_string())),
            Err(_) => peers.rows.push(away(name.clone(), "its name is not resolved in time".to_owned())),
        }
    }
    let turns = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut questions = JoinSet::new();
    for address in addresses.into_iter().take(PEERS_MAX) {
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
    while let Some(Ok((address, answer))) = questions.join_next().await {
        peers.add(&about, address, answer);
    }
    peers.rows.sort_by(|a, b| a.address.cmp(&b.address));
    peers
}

fn away(address: String, error: String) -> PeerRow {
    PeerRow { address, error: Some(text(&error)), level: Level::Bad, ..PeerRow::default() }
}

/// One line of limited length without control characters.
fn text(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl Peers {
    fn add(&mut self, about: &About, address: SocketAddr, answer: Result<StatusAnswer, String>) {
        let address = address.to_string();
        let answer = match answer {
            Ok(answer) if answer.group != about.group => {
                let error = format!("belongs to another group: {:?}", text(&answer.group));
                return self.rows.push(away(address, error));
            }
            Ok(answer) if answer.instance == about.instance => return,
            Ok(answer) => answer,
            Err(error) => return self.rows.push(away(address, error)),
        };
        let instance = text(&answer.instance);
        let partitions = answer.partitions.into_iter().filter_map(|(number, row)| {
            let halted = row.halted.map(|mut halted| {
                (halted.reason, halted.advice) = (text(&halted.reason), text(&halted.advice));
                halted.command = halted.command.as_deref().map(text);
                halted
            });
            let (partition, state) = (number.parse().ok()?, text(&row.state));
            Some(PartitionRow { partition, instance: instance.clone(), lane: None, state, halted, ..row })
        });
        let partitions: Vec<PartitionRow> = partitions.collect();
        let summary = answer.summary.unwrap_or_default();
        self.rows.push(PeerRow {
            address,
            error: None,
            version: text(&answer.build.version),
            ready: answer.missing.is_empty(),
            summary: text(&summary.text),
            level: summary.level,
            partitions: partitions.len(),
            lag_records: partitions.iter().filter_map(|row| row.lag_records).sum(),
            oldest_seconds: partitions.iter().filter_map(|row| row.lag_seconds).fold(0.0, f64::max),
            instance,
        });
        self.partitions.extend(partitions);
    }
}
