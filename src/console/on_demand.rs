//! Answers that are asked for in the background, and only while somebody looks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::domain::record::TimestampMs;
use crate::telemetry::metrics::now;

/// How often a waiting caller looks.
const LOOK: Duration = Duration::from_millis(50);

/// The last answer to one question.
pub struct OnDemand<T> {
    /// An answer of this age is asked for again.
    age: Duration,
    /// An older one is not given.
    stale: Duration,
    /// Time limit of a question.
    limit: Duration,
    latest: Arc<Mutex<Latest<T>>>,
}

struct Latest<T> {
    answer: Option<(Instant, TimestampMs, Arc<T>)>,
    asked: Option<(Instant, JoinHandle<()>)>,
}

impl<T: Send + Sync + 'static> OnDemand<T> {
    /// Without an answer. One is given for as long as two more questions may take.
    pub fn new(age: Duration, limit: Duration) -> Self {
        let latest = Arc::new(Mutex::new(Latest { answer: None, asked: None }));
        Self { age, stale: (age + limit) * 2, limit, latest }
    }

    /// Returns the last answer and its time, unless it is too old; asks again in the background if it is not fresh and no
    /// question is open.
    pub fn get(&self, ask: impl Future<Output = T> + Send + 'static) -> Option<(TimestampMs, Arc<T>)> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest
            .asked
            .as_ref()
            .is_none_or(|(at, question)| at.elapsed() >= self.age && question.is_finished())
        {
            let (shared, limit) = (Arc::clone(&self.latest), self.limit);
            let question = tokio::spawn(async move {
                if let Ok(answer) = timeout(limit, ask).await {
                    let answer = (Instant::now(), now(), Arc::new(answer));
                    shared.lock().unwrap_or_else(PoisonError::into_inner).answer = Some(answer);
                }
            });
            latest.asked = Some((Instant::now(), question));
        }
        let (_, at, answer) = latest.answer.as_ref().filter(|(since, ..)| since.elapsed() < self.stale)?;
        Some((*at, Arc::clone(answer)))
    }

    /// Waits until no question is open, within its time limit.
    pub async fn settled(&self) {
        let is_open = || {
            let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
            latest.asked.as_ref().is_some_and(|(_, question)| !question.is_finished())
        };
        while is_open() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_question_at_a_time_is_asked_and_no_old_answer_is_given() {
        let long = Duration::from_secs(3_600);
        let answers = OnDemand::new(long, long);
        assert!(answers.get(async { 1 }).is_none(), "it is asked in the background");
        answers.settled().await;
        assert_eq!(answers.get(async { 2 }).map(|(_, answer)| *answer), Some(1), "a fresh one is kept");

        let answers = OnDemand::new(Duration::ZERO, long);
        assert!(answers.get(async { std::future::pending::<u8>().await }).is_none());
        assert!(answers.get(async { panic!("a question is open") }).is_none());

        let answers = OnDemand::new(Duration::ZERO, Duration::ZERO);
        answers.get(async { std::future::pending::<u8>().await });
        answers.settled().await;
        assert!(answers.get(async { 1 }).is_none());
        answers.settled().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(answers.get(async { 2 }).is_none(), "it is too old");
    }
}
