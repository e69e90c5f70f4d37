//! Decides when to bootstrap a client again that may have lost all its brokers.
//!
//! A broker that was fenced for a moment, as after a pause, answers that the cluster has topics and no
//! brokers. librdkafka then forgets all its brokers, bootstrap servers included, and because of a race
//! between two of its threads it may never look for any again (librdkafka #5301). Adding brokers that the
//! client already knows has no effect, so an unnecessary re-bootstrap does no harm.

use std::time::{Duration, Instant};

/// First pause. A client that recovers by itself usually does so sooner.
const FIRST: Duration = Duration::from_secs(2);
/// Longest pause. Pauses grow because the client keeps each list of brokers in memory.
const LONGEST: Duration = Duration::from_secs(60);
/// Re-bootstraps of a client of which only a lost connection is known; they take about a minute.
const ATTEMPTS: u32 = 5;

/// The schedule of one client's re-bootstraps.
#[derive(Debug, Default)]
pub struct Rebootstrap {
    next: Option<Instant>,
    attempts: u32,
}

impl Rebootstrap {
    /// Notes that the client may have lost all its brokers. Repeated calls do not delay the first attempt.
    pub fn suspect(&mut self, now: Instant) {
        if self.next.is_none() || self.attempts > 1 {
            *self = Self { next: Some(now + FIRST), attempts: 0 };
        }
    }

    /// Notes that the client works.
    pub fn settle(&mut self) {
        *self = Self::default();
    }

    /// Whether to bootstrap the client now. `is_out`: the client is known not to work, so attempts go on
    /// until it does.
    pub fn is_due(&mut self, now: Instant, is_out: bool) -> bool {
        match self.next {
            None if is_out => {
                self.suspect(now);
                false
            }
            Some(next) if next <= now => {
                self.attempts += 1;
                let pause = FIRST.saturating_mul(1 << self.attempts.min(10)).min(LONGEST);
                self.next = (is_out || self.attempts < ATTEMPTS).then(|| now + pause);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds of an hour at which a client is bootstrapped again.
    fn seconds(rebootstrap: &mut Rebootstrap, start: Instant, is_out: bool) -> Vec<u64> {
        (0..3600).filter(|s| rebootstrap.is_due(start + Duration::from_secs(*s), is_out)).collect()
    }

    #[test]
    fn a_client_that_works_is_never_reminded() {
        assert!(seconds(&mut Rebootstrap::default(), Instant::now(), false).is_empty());
    }

    #[test]
    fn a_lost_connection_is_followed_by_a_few_reminders() {
        let start = Instant::now();
        let mut rebootstrap = Rebootstrap::default();
        rebootstrap.suspect(start);
        assert_eq!(seconds(&mut rebootstrap, start, false), [2, 6, 14, 30, 62]);
    }

    #[test]
    fn a_client_that_does_nothing_is_reminded_until_it_does_and_ever_more_rarely() {
        let start = Instant::now();
        let mut rebootstrap = Rebootstrap::default();
        let reminded = seconds(&mut rebootstrap, start, true);
        assert_eq!(reminded[..6], [2, 6, 14, 30, 62, 122]);
        assert_eq!(reminded.len(), 5 + (3600 - 62) / 60);
        rebootstrap.settle();
        assert!(seconds(&mut rebootstrap, start, false).is_empty());
    }

    #[test]
    fn a_broker_that_is_lost_again_in_a_long_outage_starts_them_anew() {
        let start = Instant::now();
        let mut rebootstrap = Rebootstrap::default();
        seconds(&mut rebootstrap, start, true);
        let later = start + Duration::from_secs(3600);
        rebootstrap.suspect(later);
        assert!(rebootstrap.is_due(later + FIRST, true));
    }
}
