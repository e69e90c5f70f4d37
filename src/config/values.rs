//! From a value of a layer to its type. Errors say what is allowed, and never contain the value, which may be
//! secret.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::Ipv6Addr;
use std::time::Duration;

use bytesize::ByteSize;
use cronexpr::{Crontab, FallbackTimezoneOption, ParseOptions};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error};
use serde_json::Value;

/// Deserializes and converts a value; `rule` is the error if either fails.
pub(super) fn checked<'de, D: Deserializer<'de>, T: DeserializeOwned, U>(
    deserializer: D,
    rule: impl Display,
    convert: impl FnOnce(T) -> Option<U>,
) -> Result<U, D::Error> {
    // Not directly as a `T`: the path of the error would end inside of a list.
    let value = Value::deserialize(deserializer)?;
    serde_json::from_value(value).ok().and_then(convert).ok_or_else(|| D::Error::custom(rule))
}

/// Converts a text.
pub(super) fn text<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    rule: impl Display,
    convert: impl FnOnce(&str) -> Option<T>,
) -> Result<T, D::Error> {
    let text: String = checked(deserializer, "must be a text in quotes", Some)?;
    convert(&text).ok_or_else(|| D::Error::custom(rule))
}

pub(super) fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    checked(deserializer, "must be true or false", Some)
}

pub(super) fn integer<'de, D, T, const LOW: i64, const HIGH: i64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<i64>,
{
    checked(deserializer, format!("must be a whole number from {LOW} to {HIGH}"), |number: i64| {
        (LOW..=HIGH).contains(&number).then(|| T::try_from(number).ok()).flatten()
    })
}

pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    checked(deserializer, "must be a number from 0 to 1", |share: f64| {
        (0.0..=1.0).contains(&share).then_some(share)
    })
}

pub(super) fn duration<'de, D>(deserializer: D, low: &str, high: &str) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    let rule = format!("must be a duration with its unit, like 5ms, 30s, 2h or 7d, from {low} to {high}");
    checked(deserializer, rule, |text: String| {
        let [low, duration, high] = [low, text.trim(), high].map(humantime::parse_duration);
        let duration = duration.ok()?;
        (low.ok()?..=high.ok()?).contains(&duration).then_some(duration)
    })
}

/// A number of bytes, with or without a unit.
pub(super) fn size<'de, D>(deserializer: D, low: &str, high: &str) -> Result<usize, D::Error>
where
    D: Deserializer<'de>,
{
    let rule = format!("must be a size, like 512, 16KiB or 8MiB, from {low} to {high}");
    checked(deserializer, rule, |size: ByteSize| {
        let is_allowed = (low.parse().ok()?..=high.parse().ok()?).contains(&size);
        usize::try_from(size.as_u64()).ok().filter(|_| is_allowed)
    })
}

/// Kafka's rule for topic names, which also applies to `group.instance.id` (KIP-345).
pub(super) fn name<'de, D, const CHARS_MAX: usize>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let rule = format!("must be 1 to {CHARS_MAX} ASCII letters, digits, dots, underscores or hyphens");
    text(deserializer, rule, |text| {
        let is_allowed = text != "." && text != ".." && is_word(text, "._-", CHARS_MAX);
        is_allowed.then(|| text.to_owned())
    })
}

/// Whether the text consists of 1 to `chars_max` ASCII letters, digits and characters of `others`.
pub(super) fn is_word(text: &str, others: &str, chars_max: usize) -> bool {
    (1..=chars_max).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
}

pub(super) fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => is_word(host, "._-", usize::MAX),
    };
    is_host && port.parse::<u16>().is_ok_and(|port| port > 0)
}

pub(super) fn are_different<T: Ord>(items: &[T]) -> bool {
    items.iter().collect::<BTreeSet<_>>().len() == items.len()
}

/// Reads five cron fields: minute, hour, day of month, month, day of week, in UTC.
pub fn cron(fields: &str) -> Option<Crontab> {
    // A sixth field would be a time zone. UTC by its name would be searched in the system's time zones, which an image
    // may lack.
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let mut options = ParseOptions::default();
    options.fallback_timezone_option = FallbackTimezoneOption::UTC;
    cronexpr::parse_crontab_with(&fields.join(" "), options).ok().filter(|_| fields.len() == 5)
}

/// Checks a log filter as used by `log.level`.
///
/// # Errors
/// A description of what is wrong.
pub fn log_filter(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("empty: expected a level or directives".to_owned());
    }
    if text.contains('[') {
        return Err("no spans and fields in brackets: expected a level, or a target and a level".to_owned());
    }
    tracing_subscriber::EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    // EnvFilter takes a word that is not a level for a target, and enables only that target.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let mistyped = text.split(',').map(str::trim).find(|directive| {
        !directive.contains(['=', ':']) && !levels.iter().any(|level| level.eq_ignore_ascii_case(directive))
    });
    match mistyped {
        Some(word) => Err(format!("{word:?} is not a level: off, error, warn, info, debug or trace")),
        None => Ok(()),
    }
}
