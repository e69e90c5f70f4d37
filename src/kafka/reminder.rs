//! When a client that may know of no broker any more is told of them again.
//!
//! A broker that was fenced for a moment, as after a pause, answers that the cluster has topics and no brokers. The
//! client library then forgets all that it knew, bootstrap servers included, and where two of its threads meet in
//! the wrong order it never looks for any again (librdkafka #5301). Brokers that it does know are not disturbed by
//! being named once more, so a reminder does no harm when the suspicion was wrong.

use std::time::{Duration, Instant};

/// A client that finds its brokers by itself mostly does so sooner.
const FIRST: Duration = Duration::from_secs(2);
/// Each reminder stays in the client's memory, so that they become rarer in a long outage.
const LONGEST: Duration = Duration::from_secs(60);
/// So often a client is reminded of which nothing but a lost connection is known: over about a minute.
const ATTEMPTS: u32 = 5;

/// The reminders of one client.
#[derive(Debug, Default)]
pub struct Reminder {
    next: Option<Instant>,
    attempts: u32,
}

impl Reminder {
    /// The client may have lost all brokers. One suspicion after another prolongs nothing.
    pub fn suspect(&mut self, now: Instant) {
        if self.next.is_none() || self.attempts > 1 {
            *self = Self { next: Some(now + FIRST), attempts: 0 };
        }
    }

    /// The client has been heard of.
    pub fn settle(&mut self) {
        *self = Self::default();
    }

    /// Whether to remind the client now. `is_out`: it is known to do nothing yet, so that it is reminded until that
    /// ends.
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

    /// At which seconds of an hour a client is reminded.
    fn seconds(reminder: &mut Reminder, start: Instant, is_out: bool) -> Vec<u64> {
        (0..3600).filter(|s| reminder.is_due(start + Duration::from_secs(*s), is_out)).collect()
    }

    #[test]
    fn a_client_that_works_is_never_reminded() {
        assert!(seconds(&mut Reminder::default(), Instant::now(), false).is_empty());
    }

    #[test]
    fn a_lost_connection_is_followed_by_a_few_reminders() {
        let start = Instant::now();
        let mut reminder = Reminder::default();
        reminder.suspect(start);
        assert_eq!(seconds(&mut reminder, start, false), [2, 6, 14, 30, 62]);
    }

    #[test]
    fn a_client_that_does_nothing_is_reminded_until_it_does_and_ever_more_rarely() {
        let start = Instant::now();
        let mut reminder = Reminder::default();
        let reminded = seconds(&mut reminder, start, true);
        assert_eq!(reminded[..6], [2, 6, 14, 30, 62, 122]);
        assert_eq!(reminded.len(), 5 + (3600 - 62) / 60);
        reminder.settle();
        assert!(seconds(&mut reminder, start, false).is_empty());
    }

    #[test]
    fn a_broker_that_is_lost_again_in_a_long_outage_starts_them_anew() {
        let start = Instant::now();
        let mut reminder = Reminder::default();
        seconds(&mut reminder, start, true);
        let later = start + Duration::from_secs(3600);
        reminder.suspect(later);
        assert!(reminder.is_due(later + FIRST, true));
    }
}
