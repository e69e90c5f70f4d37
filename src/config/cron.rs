//! Cron text of five fields: minute, hour, day of month, month, day of week.

use std::fmt;
use std::ops::RangeInclusive;

const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// When something is to happen by itself, in UTC.
#[derive(Clone, PartialEq, Eq)]
pub struct CronSchedule {
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    days_restricted: bool,
    weekdays_restricted: bool,
}

impl CronSchedule {
    /// Reads lists, ranges, steps and the English short names of months and weekdays;
    /// 0 and 7 are both Sunday.
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split_ascii_whitespace();
        let mut next = |range, names: &[&str], first| field(fields.next()?, range, names, first);
        let minutes = next(0..=59, &[], 0)?;
        let hours = next(0..=23, &[], 0)?;
        let days = next(1..=31, &[], 1)?;
        let months = next(1..=12, &MONTHS, 1)?;
        let weekdays = next(0..=7, &WEEKDAYS, 0)?;
        let mut words = text.split_ascii_whitespace();
        let (day_field, weekday_field) = (words.nth(2)?, words.nth(1)?);
        if words.next().is_some() {
            return None;
        }
        let sunday = (weekdays | weekdays >> 7) & 1;
        Some(Self {
            text: text.split_ascii_whitespace().collect::<Vec<_>>().join(" "),
            minutes,
            hours,
            days,
            months,
            weekdays: weekdays & 0x7e | sunday,
            days_restricted: !day_field.starts_with('*'),
            weekdays_restricted: !weekday_field.starts_with('*'),
        })
    }

    /// Whether the schedule names this minute. `weekday` counts from Sunday, 0. As in cron, a day
    /// matches by either of its two fields when both are restricted.
    pub fn matches(&self, minute: u8, hour: u8, day: u8, month: u8, weekday: u8) -> bool {
        let has = |mask: u64, value: u8| value < 64 && mask >> value & 1 == 1;
        let (day, weekday) = (has(self.days, day), has(self.weekdays, weekday));
        let date =
            if self.days_restricted && self.weekdays_restricted { day || weekday } else { day && weekday };
        date && has(self.minutes, minute) && has(self.hours, hour) && has(self.months, month)
    }
}

impl fmt::Display for CronSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for CronSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CronSchedule({})", self.text)
    }
}

fn field(text: &str, range: RangeInclusive<u32>, names: &[&str], first: u32) -> Option<u64> {
    let mut mask = 0u64;
    for part in text.split(',') {
        let (span, step) = match part.split_once('/') {
            Some((span, step)) => (span, step.parse::<u32>().ok().filter(|s| (1..=59).contains(s))?),
            None => (part, 1),
        };
        let (low, high) = if span == "*" {
            (*range.start(), *range.end())
        } else if let Some((low, high)) = span.split_once('-') {
            (number(low, names, first)?, number(high, names, first)?)
        } else {
            let low = number(span, names, first)?;
            (low, if part.contains('/') { *range.end() } else { low })
        };
        if low > high || !range.contains(&low) || !range.contains(&high) {
            return None;
        }
        for value in (low..=high).step_by(step as usize) {
            mask |= 1 << value;
        }
    }
    Some(mask)
}

fn number(text: &str, names: &[&str], first: u32) -> Option<u32> {
    if !text.is_empty() && text.len() <= 2 && text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok();
    }
    let at = names.iter().position(|name| name.eq_ignore_ascii_case(text))?;
    u32::try_from(at).ok().map(|at| at + first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weekly_default_names_three_o_clock_on_sundays() {
        let weekly = CronSchedule::parse("0 3 * * 0").unwrap();
        assert!(weekly.matches(0, 3, 12, 7, 0));
        assert!(!weekly.matches(0, 3, 12, 7, 1));
        assert!(!weekly.matches(1, 3, 12, 7, 0));
        assert!(CronSchedule::parse("0 3 * * sun").unwrap().matches(0, 3, 12, 7, 0));
        assert!(CronSchedule::parse("0 3 * * 7").unwrap().matches(0, 3, 12, 7, 0));
    }

    #[test]
    fn lists_ranges_and_steps_are_read() {
        let schedule = CronSchedule::parse("*/20 8-10,20 1 jan-mar *").unwrap();
        assert!(schedule.matches(40, 9, 1, 2, 4));
        assert!(schedule.matches(0, 20, 1, 3, 4));
        assert!(!schedule.matches(0, 20, 1, 4, 4));
        assert!(!schedule.matches(10, 9, 1, 2, 4));
        let either = CronSchedule::parse("0 0 1 * mon").unwrap();
        assert!(either.matches(0, 0, 1, 5, 3) && either.matches(0, 0, 9, 5, 1));
        assert!(!either.matches(0, 0, 9, 5, 3));
    }

    #[test]
    fn what_cron_would_refuse_is_refused() {
        for wrong in ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *"] {
            assert!(CronSchedule::parse(wrong).is_none(), "{wrong:?}");
        }
        for wrong in ["5-1 * * * *", "*/0 * * * *", "a * * * *", "* * * * eight", "1,,2 * * * *"] {
            assert!(CronSchedule::parse(wrong).is_none(), "{wrong:?}");
        }
    }
}
