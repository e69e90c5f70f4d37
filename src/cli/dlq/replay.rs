//! `dlq replay`: replays selected dead letters to the input topic, each once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::super::output::{aligned, print, progress_bar, warn};
use super::super::produce::rate;
use super::super::stop_signal;
use super::FilterArgs;
use crate::config::Settings;
use crate::dlq::DlqError;
use crate::dlq::eligibility::Eligibility;
use crate::dlq::filter::{Filter, Ranges};
use crate::dlq::reader::Reader;
use crate::dlq::replay::{CHUNK_LETTERS_MAX, Chunk, Outcome, Replay, Statements, look_at};
use crate::dlq::replay_store::{Audit, ReplayStore};
use crate::dlq::run_metadata::ChunkOutcome;
use crate::error::CommandError;
use crate::kafka::scan::Scanner;
use crate::kafka::topic_rules::{Role, TIMESTAMP_TYPE};

/// Interval of checks for signals while waiting for the rate limit.
const PAUSE_MAX: Duration = Duration::from_millis(100);

const AFTER_HELP: &str = "\
Without --apply nothing is sent; the command shows how many dead letters would be replayed, how many
would be refused, and why. With --apply the user, the time, the selection and the reason are written to
the audit tables.

A replayed record has the original key, value, headers and timestamp, and the header dlq-replays, which
counts its replays. Its key determines its partition, as with any producer. The dead letter stays in its
topic and is replayed only once, even if the command is repeated. A record that is refused again gets a
new dead letter.

If the command was killed or interrupted, run it again with the same options: it first resolves the
interrupted chunk, and sends nothing twice. Ctrl-C stops after the chunk that is being sent.

Refused: records that were replayed --max-replays times; values that were left out; dead letters of
another topic; records without a timestamp. Also refused, unless --force is given, are records that could
be written twice: those older than idempotency.window, because another record with the same message id
may have been written and forgotten; and message_id_conflict, because another payment has the id. With
message.timestamp.type=LogAppendTime on the input, which changes the timestamps, all are refused.

Examples:
  payment-writer dlq replay --reason invalid_field --since 2h
  payment-writer dlq replay --reason invalid_field --since 2h --apply --note 'INC-7: type was missing'
  payment-writer dlq replay --at 3/120,3/121 --apply --note 'asked for by the bank'";

/// `dlq replay`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReplayArgs {
    /// Selection.
    #[command(flatten)]
    pub choice: FilterArgs,
    /// All dead letters; required if there is no other condition
    #[arg(long)]
    pub all: bool,
    /// Replay instead of only showing what would be replayed
    #[arg(long, requires = "note")]
    pub apply: bool,
    /// Reason, for the audit table
    #[arg(long, value_name = "TEXT")]
    pub note: Option<String>,
    /// Refuse records that have been replayed this many times
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_replays: u32,
    /// Send at most this many records per second
    #[arg(long, value_name = "PER_SECOND", default_value = "1000", value_parser = rate)]
    pub rate: f64,
    /// Also replay where a payment could be written twice: beyond the window, on conflicts, and if the brokers set
    /// the timestamps
    #[arg(long)]
    pub force: bool,
    /// Continue although the database was restored or replaced and does not have the last replay
    #[arg(long, requires = "apply")]
    pub after_restore: bool,
    /// State whether an interrupted replay was sent, if nothing proves it
    #[arg(long, value_enum, value_name = "OUTCOME", requires = "apply")]
    pub unfinished: Option<ChunkOutcome>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Replays dead letters, or shows what would be replayed.
pub fn replay(settings: &Settings, args: &ReplayArgs, runtime: &Handle) -> Result<(), CommandError> {
    let filter = args.choice.filter()?;
    if filter.is_everything() && !args.all {
        return Err(CommandError::usage(
            "select dead letters: --reason, --partition, --since, --until, --at, or --all",
        ));
    }
    if !settings.kafka.publish {
        return Err(CommandError::usage(
            "these settings are for a daemon that only writes rows (kafka.publish is false): it writes no \
             dead letters; use the settings of the daemon that publishes",
        ));
    }
    let stop = stop_signal()?;
    let reader = Reader::open(&settings.kafka)?;
    let ranges = reader.ranges(&filter)?;
    let input = Scanner::new(&settings.kafka, &settings.kafka.input_topic).map_err(DlqError::from)?;
    let (input_topic_id, _) = input.describe().map_err(DlqError::from)?;
    if let Ok(Some(violation)) = input.violation(&TIMESTAMP_TYPE, &settings.kafka, Role::Input)
        && !args.force
    {
        return Err(CommandError::person_must_decide(format!("{violation}; or replay with --force")));
    }
    drop(input);
    let store = ReplayStore::open(runtime, settings, input_topic_id)?;
    let eligibility = Eligibility {
        input_topic: settings.kafka.input_topic.clone(),
        now: store.now()?,
        window: settings.idempotency.window,
        replays_max: args.max_replays,
        is_forced: args.force,
    };
    let job = Job { settings, args, filter, eligibility, reader, ranges, stop: &stop };
    match args.note.as_deref().filter(|_| args.apply) {
        Some(note) => job.apply(store, note),
        None => job.look(&store),
    }
}

/// Inputs of both the dry run and the replay.
struct Job<'a> {
    settings: &'a Settings,
    args: &'a ReplayArgs,
    filter: Filter,
    eligibility: Eligibility,
    reader: Reader,
    ranges: Ranges,
    stop: &'a AtomicBool,
}

impl Job<'_> {
    fn look(&self, store: &ReplayStore) -> Result<(), CommandError> {
        let topic_id = self.reader.topic_id();
        let mut outcome = Outcome::default();
        self.run("looking", &mut outcome, CHUNK_LETTERS_MAX, |chunk, outcome| {
            look_at(chunk, store, topic_id, outcome)
        })?;
        self.report(&outcome, None)
    }

    fn apply(&self, store: ReplayStore, note: &str) -> Result<(), CommandError> {
        let audit = Audit {
            topic: self.settings.kafka.dead_letter_topic.clone(),
            topic_id: self.reader.topic_id(),
            filter: self.filter.to_string(),
            is_forced: self.args.force,
            note: note.to_owned(),
        };
        let statements =
            Statements { unfinished: self.args.unfinished, is_after_restore: self.args.after_restore };
        let mut replay = Replay::begin(store, self.settings, &audit, statements)?;
        // At most one second's worth per chunk.
        let letters_max = self.args.rate.ceil().min(CHUNK_LETTERS_MAX as f64) as usize;
        let (began, mut pace) = (Instant::now(), Pace::new(self.args.rate));
        let mut outcome = Outcome::default();
        let replayed = self.run("replaying", &mut outcome, letters_max, |chunk, outcome| {
            while let Some(pause) = pace.pause(began.elapsed()) {
                if self.is_stopped() {
                    return Ok(());
                }
                std::thread::sleep(pause);
            }
            let (sent_before, at) = (outcome.replayed, began.elapsed());
            replay.send(chunk, outcome)?;
            pace.sent(outcome.replayed - sent_before, at);
            Ok(())
        });
        replayed.inspect_err(|_| {
            // The caller reports the failure itself.
            warn(format_args!(
                "replayed before the failure: {}. Run the same command again: it first resolves the interrupted \
                 chunk, and no dead letter is sent twice",
                outcome.replayed
            ));
        })?;
        let run_id = replay.run_id();
        replay.finish(&outcome)?;
        self.report(&outcome, Some(run_id))
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reads the selected dead letters and passes them on in chunks, until a signal arrives.
    fn run(
        &self,
        doing: &'static str,
        outcome: &mut Outcome,
        letters_max: usize,
        mut flush: impl FnMut(&mut Chunk, &mut Outcome) -> Result<(), DlqError>,
    ) -> Result<(), DlqError> {
        let template = "{prefix} {wide_bar} {human_pos}/{human_len} read  {msg}  {eta} left";
        let progress = progress_bar(Some(self.ranges.offsets()), template).with_prefix(doing);
        let mut chunk = Chunk::new(letters_max);
        let flow = self.reader.read(&self.ranges, |letter| {
            progress.inc(1);
            if self.filter.has(letter) {
                chunk.consider(letter, &self.eligibility, outcome);
            }
            if chunk.is_full() {
                flush(&mut chunk, outcome)?;
                progress.set_message(format!("{} letters", outcome.replayed));
            }
            Ok(if self.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        let flushed = match flow {
            Ok(ControlFlow::Continue(())) => flush(&mut chunk, outcome),
            Ok(ControlFlow::Break(())) => Ok(()),
            Err(error) => Err(error),
        };
        outcome.is_interrupted = self.is_stopped();
        progress.finish_and_clear();
        flushed
    }

    /// Prints the outcome; `run` is absent in a dry run.
    fn report(&self, outcome: &Outcome, run: Option<Uuid>) -> Result<(), CommandError> {
        if !self.args.json {
            return print(self.as_text(outcome, run));
        }
        let kafka = &self.settings.kafka;
        let mut value = outcome.to_json();
        if let Some(object) = value.as_object_mut() {
            object.insert("topic".to_owned(), json!(kafka.dead_letter_topic));
            object.insert("input_topic".to_owned(), json!(kafka.input_topic));
            object.insert("dry_run".to_owned(), json!(run.is_none()));
            object.insert("run".to_owned(), json!(run.map(|run| run.to_string())));
        }
        print(value)
    }

    fn as_text(&self, outcome: &Outcome, run: Option<Uuid>) -> String {
        let row = |what: &str, count: u64, why: &str| [what.to_owned(), count.to_string(), why.to_owned()];
        let going = if run.is_some() { "replayed" } else { "would be replayed" };
        let mut rows = vec![
            row(going, outcome.replayed, ""),
            row("already replayed", outcome.already_replayed, "each dead letter is replayed once"),
        ];
        if outcome.unresolved > 0 {
            let why = "claimed by a running or interrupted replay; the next --apply resolves it";
            rows.push(row("under way", outcome.unresolved, why));
        }
        for (objection, count) in &outcome.refused {
            rows.push(row(&format!("refused: {}", objection.as_str()), *count, objection.why()));
        }
        let topic = &self.settings.kafka.dead_letter_topic;
        let mut text = vec![format!("{} dead letters chosen of {topic}", outcome.chosen), aligned(rows)];
        if outcome.at_risk > 0 {
            text.push(format!(
                "--force: {} of these records are older than idempotency.window ({}), or another payment has \
                 their message id. If a payment with such an id was written and the id has been forgotten, \
                 it is written, and its events are sent, a second time",
                outcome.at_risk,
                humantime::format_duration(self.settings.idempotency.window),
            ));
        }
        if outcome.is_interrupted {
            text.push("interrupted: the remaining dead letters were not replayed".to_owned());
        }
        text.push(match run {
            Some(run) => format!("run {run} in payment_writer.dead_letter_replay_run"),
            None => "nothing was sent; add --apply --note TEXT to replay".to_owned(),
        });
        text.join("\n")
    }
}

/// Rate limiter. Idle time is not made up for.
#[derive(Clone, Copy, Debug)]
struct Pace {
    per_second: f64,
    next_at: Duration,
}

impl Pace {
    fn new(per_second: f64) -> Self {
        Self { per_second, next_at: Duration::ZERO }
    }

    /// How long to wait, limited so that signals are noticed.
    fn pause(&self, now: Duration) -> Option<Duration> {
        let left = self.next_at.saturating_sub(now);
        (!left.is_zero()).then(|| left.min(PAUSE_MAX))
    }

    /// Counts this many records, sent from `at` on.
    fn sent(&mut self, letters: u64, at: Duration) {
        let takes = Duration::try_from_secs_f64(letters as f64 / self.per_second).unwrap_or(Duration::MAX);
        self.next_at = at.saturating_add(takes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_sent_than_the_rate_allows_whatever_was_before() {
        let at = Duration::from_millis;
        let mut pace = Pace::new(10.0);
        assert_eq!(pace.pause(at(0)), None);
        pace.sent(10, at(0));
        assert_eq!(pace.pause(at(0)), Some(PAUSE_MAX));
        assert_eq!(pace.pause(at(950)), Some(at(50)));
        assert_eq!(pace.pause(at(1_000)), None);
        // A minute without anything to send.
        pace.sent(10, at(60_000));
        assert_eq!(pace.pause(at(60_950)), Some(at(50)));
        pace.sent(0, at(61_000));
        assert_eq!(pace.pause(at(61_000)), None);
    }
}
