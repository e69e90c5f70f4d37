//! `dlq list`: counts or lists dead letters.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::output::{print, table};
use super::{FilterArgs, escaped, or_dash, reason_text};
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
#[derive(Serialize)]
struct Line {
    at: String,
    dead_lettered: Option<String>,
    reason: &'static str,
    detail: String,
    topic: String,
    partition: i32,
    offset: i64,
    timestamp: Option<String>,
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
            at: letter.place.to_string(),
            dead_lettered: letter.lettered_at.map(|at| at.to_string()),
            reason: reason_text(label.reason),
            detail: escaped(label.detail.as_bytes()).chars().take(DETAIL_CHARS_MAX).collect(),
            topic: escaped(label.topic.as_bytes()).chars().take(DETAIL_CHARS_MAX).collect(),
            partition: label.partition.0,
            offset: label.offset.0,
            timestamp: label.timestamp.map(|at| at.to_string()),
            replays: letter.replays,
            bytes: letter.bytes(),
        };
        self.lines.insert((letter.lettered_at, letter.place), line);
        if self.lines.len() > self.limit {
            self.lines.pop_first();
        }
    }

    /// Number of dead letters that are not listed.
    fn more(&self, summary: &Summary) -> u64 {
        summary.all.letters.saturating_sub(self.lines.len() as u64)
    }
}

/// Prints the counts or the list.
pub fn list(settings: &Settings, args: &ListArgs) -> Result<(), CommandError> {
    let filter = args.choice.filter()?;
    let reader = Reader::open(&settings.kafka)?;
    let mut summary = Summary::default();
    let limit = if args.each { usize::try_from(args.limit).unwrap_or(usize::MAX) } else { 0 };
    let mut newest = Newest { limit, lines: BTreeMap::new() };
    // Up to the current end of the topic.
    let _ = reader.read(&reader.ranges(&filter)?, |letter| {
        if filter.has(letter) {
            summary.add(letter, &settings.kafka.input_topic);
            if limit > 0 {
                newest.add(letter);
            }
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let topic = &settings.kafka.dead_letter_topic;
    print(match args.json {
        true => as_json(topic, &summary, args, &newest).to_string(),
        false => as_text(topic, &summary, args, &newest),
    })
}

/// The groups of a property, under its names in text and in JSON. All others have no key.
type Section = (&'static str, &'static str, Vec<(Value, Group)>);

fn groups(summary: &Summary) -> [Section; 4] {
    fn of<K: Ord>(groups: &Groups<K>, key: impl Fn(&K) -> Value) -> Vec<(Value, Group)> {
        let others = (groups.others.letters > 0).then_some((Value::Null, groups.others));
        groups.iter().map(|(found, group)| (key(found), *group)).chain(others).collect()
    }
    [
        ("reason", "reason", of(&summary.by_reason, |reason| json!(reason_text(*reason)))),
        ("partition", "partition", of(&summary.by_partition, |partition| json!(partition.0))),
        ("day (UTC)", "day", of(&summary.by_day, |day| json!(day.to_string()))),
        ("replays", "replays", of(&summary.by_replays, |count| json!(count))),
    ]
}

fn key_text(name: &str, key: &Value) -> String {
    match key {
        Value::Null => "all others".to_owned(),
        Value::String(text) => text.clone(),
        count if name == "replays" && count.as_u64() >= Some(REPLAYS_SHOWN_MAX.into()) => {
            format!("{count} or more")
        }
        number => number.to_string(),
    }
}

fn as_text(topic: &str, summary: &Summary, args: &ListArgs, newest: &Newest) -> String {
    let mut text = vec![format!(
        "{} dead letters in {topic}, keys and values {}",
        summary.all.letters,
        indicatif::BinaryBytes(summary.bytes)
    )];
    if summary.all.letters > 0 {
        text.extend(groups(summary).map(|(title, name, groups)| {
            let rows = groups.into_iter().map(|(key, group)| {
                let Group { letters, oldest, newest } = group;
                [key_text(name, &key), letters.to_string(), or_dash(oldest), or_dash(newest)]
            });
            table([title, "letters", "oldest", "newest"], rows)
        }));
    }
    if args.each && summary.all.letters > 0 {
        let header = ["at", "dead-lettered", "reason", "record", "timestamp", "replays", "bytes", "detail"];
        let rows = newest.lines.values().map(|line| {
            [
                line.at.clone(),
                or_dash(line.dead_lettered.as_ref()),
                line.reason.to_owned(),
                format!("{}/{}/{}", line.topic, line.partition, line.offset),
                or_dash(line.timestamp.as_ref()),
                line.replays.to_string(),
                line.bytes.to_string(),
                line.detail.clone(),
            ]
        });
        text.push(table(header, rows));
        let more = newest.more(summary);
        if more > 0 {
            text.push(format!("{more} older ones are not listed; raise --limit for more"));
        }
    }
    if summary.of_other_topics > 0 {
        let count = summary.of_other_topics;
        text.push(format!("{count} of them are from topics other than kafka.input_topic"));
    }
    if summary.not_dead_letters > 0 {
        text.push(format!("{} other records in the topic are not dead letters", summary.not_dead_letters));
    }
    text.join("\n\n")
}

fn as_json(topic: &str, summary: &Summary, args: &ListArgs, newest: &Newest) -> Value {
    let time = |at: Option<TimestampMs>| at.map(|at| at.to_string());
    let mut value = json!({
        "topic": topic,
        "letters": summary.all.letters,
        "bytes": summary.bytes,
        "oldest": time(summary.all.oldest),
        "newest": time(summary.all.newest),
        "of_other_topics": summary.of_other_topics,
        "not_dead_letters": summary.not_dead_letters,
    });
    let mut insert =
        |name: String, more: Value| value.as_object_mut().map(|object| object.insert(name, more));
    for (_, name, groups) in groups(summary) {
        let group = |(key, group): (Value, Group)| {
            let (oldest, newest) = (time(group.oldest), time(group.newest));
            json!({ name: key, "letters": group.letters, "oldest": oldest, "newest": newest })
        };
        insert(format!("by_{name}"), groups.into_iter().map(group).collect());
    }
    if args.each {
        insert("each".to_owned(), newest.lines.values().map(|line| json!(line)).collect());
        insert("more".to_owned(), json!(newest.more(summary)));
    }
    value
}
