//! Answers that are asked for in the background, and only while somebody looks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::domain::record::TimestampMs;
use crate::telemetry::metrics::now;

/// The last answer to one question.
pub struct OnDemand<T>(Arc<Mutex<Latest<T>>>);

struct Latest<T> {
    answer: Option<(TimestampMs, Arc<T>)>,
    asked: Option<(Instant, JoinHandle<()>)>,
}

impl<T> Default for OnDemand<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Latest { answer: None, asked: None })))
    }
}

impl<T: Send + Sync + 'static> OnDemand<T> {
    /// Returns the last answer and its time; asks again in the background if it was asked for longer than `age` ago and
    /// no question is open. `ask` must have a time limit.
    pub fn get(
        &self,
        age: Duration,
        ask: impl Future<Output = T> + Send + 'static,
    ) -> Option<(TimestampMs, Arc<T>)> {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.asked.as_ref().is_none_or(|(at, question)| at.elapsed() >= age && question.is_finished()) {
            let shared = Arc::clone(&self.0);
            let question = tokio::spawn(async move {
                let answer = (now(), Arc::new(ask.await));
                shared.lock().unwrap_or_else(PoisonError::into_inner).answer = Some(answer);
            });
            latest.asked = Some((Instant::now(), question));
        }
        latest.answer.clone()
    }
}
