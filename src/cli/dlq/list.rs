//! `dlq list`: counts or lists dead letters.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use clap::Args;
use serde_json::{Value, json};

use super::super::output::{print, table};
use super::{FilterArgs, escaped, reason_text, time};
use crate::config::Settings;
use crate::dlq::letter::{Letter, Place};
use crate::dlq::reader::Reader;
use crate::dlq::summary::{Group, Groups, REPLAYS_SHOWN_MAX, Summary};
use crate::domain::record::TimestampMs;
use crate::error::CommandError;

/// Maximum number of listed dead letters.
const LIMIT_MAX: u64 = 100_000;
/// Maximum length of a printed detail; the daemon's own details are far shorter.
const DETAIL_CHARS_MAX: usize = 200;

const AFTER_HELP: &str = "\
Reads only the dead-letter topic, not the database. Times are those at which the dead letters were
written. The output contains no values of records.

Examples:
  payment-writer dlq list
  payment-writer dlq list --reason invalid_field --since 2h --each
  payment-writer dlq list --partition 7 --json";

/// `dlq list`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ListArgs {
    /// Selection.
    #[command(flatten)]
    pub choice: FilterArgs,
    /// List the dead letters one by one, newest last
    #[arg(long)]
    pub each: bool,
    /// With --each: list at most this many, the newest
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=LIMIT_MAX))]
    pub limit: u64,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// A dead letter without its contents.
struct Line {
    reason: &'static str,
    detail: String,
    topic: String,
    partition: i32,
    offset: i64,
    record_at: Option<TimestampMs>,
    replays: u32,
    bytes: usize,
}

/// The newest dead letters, up to a limit.
struct Newest {
    limit: usize,
    lines: BTreeMap<(Option<TimestampMs>, Place), Line>,
}

impl Newest {
    fn add(&mut self, letter: &Letter<'_>) {
        let Some(label) = &letter.label else { return };
        let line = Line {
            reason: reason_text(label.reason),
            detail: escaped(label.detail.as_bytes()).chars().take(DETAIL_CHARS_MAX).collect(),
            topic: escaped(label.topic.as_bytes()).chars().take(DETAIL_CHARS_MAX).collect(),
            partition: label.partition.0,
            offset: label.offset.0,
            record_at: label.timestamp,
            replays: letter.replays,
            bytes: letter.bytes(),
        };
        self.lines.insert((letter.lettered_at, letter.place), line);
        if self.lines.len() > self.limit {
            self.lines.pop_first();
        }
    }
}

/// Prints the counts or the list.
pub fn list(settings: &Settings, args: &ListArgs) -> Result<(), CommandError> {
    let choice = args.choice.choice()?;
    let reader = Reader::open(&settings.kafka)?;
    let mut tally = Summary::default();
    let limit = if args.each { usize::try_from(args.limit).unwrap_or(usize::MAX) } else { 0 };
    let mut newest = Newest { limit, lines: BTreeMap::new() };
    // Up to the current end of the topic.
    let _ = reader.read(&reader.ranges(&choice)?, |letter| {
        if choice.has(letter) {
            tally.add(letter, &settings.kafka.input_topic);
            if limit > 0 {
                newest.add(letter);
            }
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let topic = &settings.kafka.dead_letter_topic;
    if args.json {
        print(&as_json(topic, &tally, args, &newest).to_string())
    } else {
        print(&as_text(topic, &tally, args, &newest))
    }
}

fn more(tally: &Summary, newest: &Newest) -> u64 {
    tally.all.letters.saturating_sub(newest.lines.len() as u64)
}

fn section<K: Ord>(name: &str, groups: &Groups<K>, shown: impl Fn(&K) -> String) -> String {
    let row =
        |key: String, group: &Group| [key, group.letters.to_string(), time(group.oldest), time(group.newest)];
    let mut rows = vec![[name, "letters", "oldest", "newest"].map(str::to_owned)];
    rows.extend(groups.iter().map(|(key, group)| row(shown(key), group)));
    if groups.others.letters > 0 {
        rows.push(row("all others".to_owned(), &groups.others));
    }
    table(&rows)
}

fn replays(count: u32) -> String {
    if count >= REPLAYS_SHOWN_MAX { format!("{count} or more") } else { count.to_string() }
}

fn as_text(topic: &str, tally: &Summary, args: &ListArgs, newest: &Newest) -> String {
    let mut text = vec![format!(
        "{} dead letters in {topic}, keys and values {}",
        tally.all.letters,
        indicatif::BinaryBytes(tally.bytes)
    )];
    if tally.all.letters > 0 {
        text.push(section("reason", &tally.by_reason, |reason| reason_text(*reason).to_owned()));
        text.push(section("partition", &tally.by_partition, ToString::to_string));
        text.push(section("day (UTC)", &tally.by_day, ToString::to_string));
        text.push(section("replays", &tally.by_replays, |count| replays(*count)));
    }
    if args.each && tally.all.letters > 0 {
        let header = ["at", "dead-lettered", "reason", "record", "timestamp", "replays", "bytes", "detail"];
        let mut rows = vec![header.map(str::to_owned)];
        rows.extend(newest.lines.iter().map(|((at, place), line)| {
            [
                place.to_string(),
                time(*at),
                line.reason.to_owned(),
                format!("{}/{}/{}", line.topic, line.partition, line.offset),
                time(line.record_at),
                line.replays.to_string(),
                line.bytes.to_string(),
                line.detail.clone(),
            ]
        }));
        text.push(table(&rows));
        if more(tally, newest) > 0 {
            text.push(format!("{} older ones are not listed; raise --limit for more", more(tally, newest)));
        }
    }
    if tally.of_other_topics > 0 {
        text.push(format!("{} of them are from topics other than kafka.input_topic", tally.of_other_topics));
    }
    if tally.not_dead_letters > 0 {
        text.push(format!("{} other records in the topic are not dead letters", tally.not_dead_letters));
    }
    text.join("\n\n")
}

fn groups<K: Ord>(name: &str, groups: &Groups<K>, shown: impl Fn(&K) -> Value) -> Value {
    let object = |key: Value, group: &Group| {
        json!({
            name: key,
            "letters": group.letters,
            "oldest": group.oldest.map(|at| time(Some(at))),
            "newest": group.newest.map(|at| time(Some(at))),
        })
    };
    let mut all: Vec<Value> = groups.iter().map(|(key, group)| object(shown(key), group)).collect();
    if groups.others.letters > 0 {
        all.push(object(Value::Null, &groups.others));
    }
    Value::Array(all)
}

fn as_json(topic: &str, tally: &Summary, args: &ListArgs, newest: &Newest) -> Value {
    let mut value = json!({
        "topic": topic,
        "letters": tally.all.letters,
        "bytes": tally.bytes,
        "oldest": tally.all.oldest.map(|at| time(Some(at))),
        "newest": tally.all.newest.map(|at| time(Some(at))),
        "by_reason": groups("reason", &tally.by_reason, |reason| json!(reason_text(*reason))),
        "by_partition": groups("partition", &tally.by_partition, |partition| json!(partition.0)),
        "by_day": groups("day", &tally.by_day, |day| json!(day.to_string())),
        "by_replays": groups("replays", &tally.by_replays, |count| json!(count)),
        "of_other_topics": tally.of_other_topics,
        "not_dead_letters": tally.not_dead_letters,
    });
    if let (true, Some(object)) = (args.each, value.as_object_mut()) {
        let each = newest.lines.iter().map(|((at, place), line)| {
            json!({
                "at": place.to_string(),
                "dead_lettered": at.map(|at| time(Some(at))),
                "reason": line.reason,
                "detail": line.detail,
                "topic": line.topic,
                "partition": line.partition,
                "offset": line.offset,
                "timestamp": line.record_at.map(|at| time(Some(at))),
                "replays": line.replays,
                "bytes": line.bytes,
            })
        });
        object.insert("each".to_owned(), each.collect());
        object.insert("more".to_owned(), json!(more(tally, newest)));
    }
    value
}
