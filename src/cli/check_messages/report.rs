//! Prints what would become of each message, and the summary.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::dlq::{contents, escaped};
use super::super::output::print;
use super::checker::{Place, Verdict};
use super::range::Skipped;
use crate::domain::batch::Batch;
use crate::domain::record::RecordView;
use crate::domain::wire::Reason;
use crate::error::CommandError;
use crate::kafka::scan::ScanRange;

/// Where messages come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// Lines of a file; the offset of a message is the number of its line.
    Lines,
    /// A topic.
    Topic,
}

/// Counts of messages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Counts {
    written: u64,
    emails: u64,
    duplicates: u64,
    dead_lettered: BTreeMap<Reason, u64>,
}

impl Counts {
    fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Written { has_email } => {
                self.written += 1;
                self.emails += u64::from(*has_email);
            }
            Verdict::Duplicate { .. } => self.duplicates += 1,
            Verdict::DeadLettered { reason, .. } => *self.dead_lettered.entry(*reason).or_default() += 1,
        }
    }

    fn dead_lettered(&self) -> u64 {
        self.dead_lettered.values().sum()
    }

    fn messages(&self) -> u64 {
        self.written + self.duplicates + self.dead_lettered()
    }
}

/// What is printed, and what it counts.
pub(super) struct Report {
    origin: Origin,
    is_json: bool,
    is_quiet: bool,
    has_payload: bool,
    counts: Counts,
    /// Keys were assumed to be right.
    pub(super) keys_are_unknown: bool,
    /// Offsets of a topic that are checked.
    pub(super) ranges: Vec<ScanRange>,
    /// Offsets of a topic that are not checked.
    pub(super) skipped: Vec<Skipped>,
    /// The time limit ended the check.
    pub(super) is_out_of_time: bool,
}

impl Report {
    pub(super) fn new(origin: Origin, is_json: bool, is_quiet: bool, has_payload: bool) -> Self {
        Self {
            origin,
            is_json,
            is_quiet,
            has_payload,
            counts: Counts::default(),
            keys_are_unknown: false,
            ranges: Vec::new(),
            skipped: Vec::new(),
            is_out_of_time: false,
        }
    }

    /// Prints and counts one message.
    pub(super) fn message(&mut self, batch: &Batch, verdict: &Verdict) -> Result<(), CommandError> {
        self.counts.add(verdict);
        if self.is_quiet && !matches!(verdict, Verdict::DeadLettered { .. }) {
            return Ok(());
        }
        let Some(record) = batch.source().get(0) else { return Ok(()) };
        if self.is_json {
            print(self.as_json(&record, verdict))
        } else {
            print(self.as_text(&record, verdict))
        }
    }

    fn place(&self, (partition, offset): Place) -> String {
        match self.origin {
            Origin::Lines => format!("line {offset}"),
            Origin::Topic => format!("partition {partition}, offset {offset}"),
        }
    }

    fn as_text(&self, record: &RecordView<'_>, verdict: &Verdict) -> String {
        let mut text = self.place((record.partition, record.offset));
        text.push_str(&match verdict {
            Verdict::Written { .. } => ": written".to_owned(),
            Verdict::Duplicate { first } => format!(": duplicate of {}", self.place(*first)),
            Verdict::DeadLettered { reason, detail, first } => {
                let first = first.map(|first| format!(" ({})", self.place(first))).unwrap_or_default();
                format!(": dead-lettered: {reason}: {detail}{first}")
            }
        });
        if self.has_payload {
            let shown = |bytes: Option<&[u8]>| bytes.map_or_else(|| "null".to_owned(), escaped);
            if !self.keys_are_unknown {
                text.push_str(&format!("\n  key: {}", shown(record.key)));
            }
            for (name, value) in record.headers.iter() {
                text.push_str(&format!("\n  header {}: {}", escaped(name), shown(value)));
            }
            text.push_str(&format!("\n  value: {}", shown(record.value)));
        }
        text
    }

    fn place_json(&self, (partition, offset): Place) -> Value {
        match self.origin {
            Origin::Lines => json!({ "line": offset.0 }),
            Origin::Topic => json!({ "partition": partition.0, "offset": offset.0 }),
        }
    }

    fn as_json(&self, record: &RecordView<'_>, verdict: &Verdict) -> Value {
        let (outcome, first) = match verdict {
            Verdict::Written { .. } => ("written", None),
            Verdict::Duplicate { first } => ("duplicate", Some(*first)),
            Verdict::DeadLettered { first, .. } => ("dead_lettered", *first),
        };
        let mut value = self.place_json((record.partition, record.offset));
        let mut set = |name: &str, field: Value| {
            if let Some(object) = value.as_object_mut() {
                object.insert(name.to_owned(), field);
            }
        };
        set("outcome", json!(outcome));
        if let Verdict::Written { has_email } = verdict {
            set("email", json!(has_email));
        }
        if let Verdict::DeadLettered { reason, detail, .. } = verdict {
            set("reason", json!(reason.as_str()));
            set("detail", json!(detail));
        }
        if let Some(first) = first {
            set("first", self.place_json(first));
        }
        if self.has_payload {
            let headers = record.headers.iter();
            let headers =
                headers.map(|(name, value)| json!([String::from_utf8_lossy(name), contents(value)]));
            set("headers", headers.collect());
            if !self.keys_are_unknown {
                set("key", contents(record.key));
            }
            set("value", contents(record.value));
        }
        value
    }

    /// Prints the summary. Fails if a message would be dead-lettered, or if messages were not checked that
    /// were asked for.
    pub(super) fn finish(&self) -> Result<(), CommandError> {
        let (messages, dead_lettered) = (self.counts.messages(), self.counts.dead_lettered());
        if self.is_json {
            print(json!({ "summary": self.summary_json() }))?;
        } else {
            print(self.summary())?;
        }
        if dead_lettered > 0 {
            return Err(CommandError::failed(format!(
                "{dead_lettered} of {messages} messages would be dead-lettered"
            )));
        }
        if self.is_out_of_time {
            return Err(CommandError::failed("not all messages were checked within --time-limit"));
        }
        if messages == 0 {
            return Err(CommandError::usage("there is no message to check"));
        }
        Ok(())
    }

    fn summary(&self) -> String {
        let Counts { written, emails, duplicates, .. } = self.counts;
        let mut text = vec![format!(
            "messages: {}, written: {written} (e-mail events: {emails}), duplicates: {duplicates}, dead-lettered: {}",
            self.counts.messages(),
            self.counts.dead_lettered()
        )];
        text.extend(self.counts.dead_lettered.iter().map(|(reason, count)| format!("  {reason}: {count}")));
        if self.keys_are_unknown {
            text.push("not checked: keys, which these lines do not have".to_owned());
        }
        text.extend(self.skipped.iter().map(|skipped| format!("not checked: {skipped}")));
        text.join("\n")
    }

    fn summary_json(&self) -> Value {
        let range = |range: &ScanRange| json!({ "partition": range.partition.0, "from": range.from.0, "to": range.to.0 });
        let by_reason = self.counts.dead_lettered.iter().map(|(r, count)| (r.to_string(), json!(count)));
        let skipped = self.skipped.iter().map(|skipped| {
            let mut value = range(&skipped.range);
            if let Some(object) = value.as_object_mut() {
                object.insert("why".to_owned(), json!(skipped.why));
            }
            value
        });
        let mut value = json!({
            "messages": self.counts.messages(),
            "written": self.counts.written,
            "emails": self.counts.emails,
            "duplicate": self.counts.duplicates,
            "dead_lettered": self.counts.dead_lettered(),
            "by_reason": by_reason.collect::<serde_json::Map<_, _>>(),
            "keys_checked": !self.keys_are_unknown,
        });
        if let (Origin::Topic, Some(object)) = (self.origin, value.as_object_mut()) {
            object.insert("ranges".to_owned(), self.ranges.iter().map(range).collect());
            object.insert("not_checked".to_owned(), skipped.collect());
        }
        value
    }
}
