//! `dlq`: shows dead letters and replays them to the input topic.

use clap::{Args, Subcommand};
use tokio::runtime::Handle;

use super::reason;
use crate::config::Settings;
use crate::dlq::filter::{Filter, PLACES_MAX};
use crate::dlq::letter::Place;
use crate::domain::record::{Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::error::CommandError;

mod list;
mod replay;
mod show;

pub use list::ListArgs;
pub use replay::ReplayArgs;
pub use show::ShowArgs;
pub(super) use show::contents;

/// `dlq`
#[derive(Clone, Debug, Subcommand)]
pub enum DlqCommand {
    /// Count dead letters by reason, partition, day and replays, or list them one by one
    List(ListArgs),
    /// Show one dead letter: its origin, reason and time; its contents only on request
    Show(ShowArgs),
    /// Replay dead letters to the input topic, each once; a dry run unless --apply
    Replay(ReplayArgs),
}

/// Selects dead letters; all given conditions must hold.
#[derive(Clone, Debug, Args)]
pub struct FilterArgs {
    /// Only this reason; can be repeated
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    pub reason: Vec<Reason>,
    /// Only records of this partition of the input topic; can be repeated
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: Vec<i32>,
    /// Only dead letters written at this time or later: 2026-03-01T12:00:00Z, 2026-03-01, or an age such as
    /// 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub since: Option<TimestampMs>,
    /// Only dead letters written before this time
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub until: Option<TimestampMs>,
    /// Only this dead letter, by its place in the dead-letter topic; can be repeated
    #[arg(long, value_name = "PARTITION/OFFSET", value_delimiter = ',')]
    pub at: Vec<Place>,
}

impl FilterArgs {
    fn filter(&self) -> Result<Filter, CommandError> {
        if self.at.len() > PLACES_MAX {
            return Err(CommandError::usage(format!("--at can name at most {PLACES_MAX} dead letters")));
        }
        Ok(Filter {
            reasons: self.reason.clone(),
            partitions: self.partition.iter().copied().map(Partition).collect(),
            since: self.since,
            until: self.until,
            places: self.at.iter().copied().collect(),
        })
    }
}

/// Runs a `dlq` command.
pub fn dlq(settings: &Settings, command: &DlqCommand, runtime: &Handle) -> Result<(), CommandError> {
    match command {
        DlqCommand::List(args) => list::list(settings, args),
        DlqCommand::Show(args) => show::show(settings, args),
        DlqCommand::Replay(args) => replay::replay(settings, args, runtime),
    }
}

fn moment(text: &str) -> Result<TimestampMs, String> {
    if let Ok(ago) = humantime::parse_duration(text.trim()) {
        let now = jiff::Timestamp::now().as_millisecond();
        return Ok(TimestampMs(now.saturating_sub_unsigned(ago.as_millis() as u64)));
    }
    let of_day = format!("{text}T00:00:00Z");
    let parsed: Result<jiff::Timestamp, _> = text.parse().or_else(|_| of_day.parse());
    parsed.map(|at| TimestampMs(at.as_millisecond())).map_err(|_| {
        "a time such as 2026-03-01T12:00:00Z or 2026-03-01, or an age such as 30m or 2h".to_owned()
    })
}

fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

fn reason_text(reason: Option<Reason>) -> &'static str {
    reason.map_or("unknown", Reason::as_str)
}

/// Foreign bytes as text for a terminal: control characters and invalid UTF-8 are escaped.
pub(super) fn escaped(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_a_day_or_an_age() {
        assert_eq!(moment("2024-02-29T23:59:59.999Z"), Ok(TimestampMs(1_709_251_199_999)));
        assert_eq!(moment("2024-03-01T01:00:00+01:00"), Ok(TimestampMs(1_709_251_200_000)));
        assert_eq!(moment("2024-03-01"), Ok(TimestampMs(1_709_251_200_000)));
        assert!(moment("2h").unwrap() < moment("1h").unwrap());
        for wrong in ["", "yesterday", "5", "2024-13-01"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_reason_is_one_of_the_contracts() {
        assert_eq!(reason("empty_value"), Ok(Reason::EmptyValue));
        assert!(reason("empty").unwrap_err().contains("empty_value, too_large"));
    }

    #[test]
    fn bytes_of_others_cannot_steer_a_terminal() {
        assert_eq!(escaped("ä {\"a\":1}".as_bytes()), "ä {\"a\":1}");
        assert_eq!(escaped(b"\x1b[2J\xff\n"), "\\u{1b}[2J\\xff\\n");
    }
}
