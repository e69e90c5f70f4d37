//! How long the audit rests, so that it takes a small share of one processor however much there is to audit.

use std::fs;
use std::time::Duration;

/// After each piece it rests so many times as long as its thread ran for it. The client's threads run nearly as long
/// again, so that the whole takes less than half a percent of one core.
const REST: u32 = 400;
/// While a backlog is worked off: the processor is wanted elsewhere, and others may have most of it.
const REST_IN_BACKLOG: u32 = 1_000;
/// Records between what is written and published and the log's end that are a backlog.
const BACKLOG: i64 = 10_000;
/// Where the system does not say how long a thread ran: what a piece of usual size takes.
const USUAL: Duration = Duration::from_millis(3);
/// After a piece that took unusually long.
const REST_MAX: Duration = Duration::from_secs(20);

/// Time that this thread has spent on a processor, if the system says it.
pub fn thread_time() -> Option<Duration> {
    parse(&fs::read_to_string("/proc/thread-self/schedstat").ok()?)
}

fn parse(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// How long to rest after a piece, by the thread's time before and after it, and the process's lag in records.
pub fn rest(before: Option<Duration>, after: Option<Duration>, lag: i64) -> Duration {
    let ran = before.zip(after).map_or(USUAL, |(before, after)| after.saturating_sub(before));
    let times = if lag >= BACKLOG { REST_IN_BACKLOG } else { REST };
    ran.saturating_mul(times).min(REST_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_in_proportion_to_the_work_and_bounded() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(rest(ms(10), ms(12), 0), Duration::from_millis(800));
        assert_eq!(rest(ms(10), ms(12), BACKLOG), Duration::from_secs(2));
        assert_eq!(rest(None, ms(12), 0), USUAL * REST);
        assert_eq!(rest(ms(0), ms(900), 0), REST_MAX);
        assert_eq!(rest(ms(5), ms(5), 0), Duration::ZERO);
    }

    #[test]
    fn the_time_of_this_thread_is_read() {
        assert_eq!(parse("1500000 27 3\n"), Some(Duration::from_micros(1_500)));
        assert_eq!(parse(""), None);
        if let Some(before) = thread_time() {
            let mut sum = 0_u64;
            while thread_time().is_some_and(|now| now <= before) {
                sum = std::hint::black_box(sum + 1);
            }
        }
    }
}
