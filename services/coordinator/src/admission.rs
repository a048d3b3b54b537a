//! A place for a request, or a refusal at once. It counts tokens, prompt and output still allowed, of all requests
//! that were accepted and have not ended; order is the scheduler's matter.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Shortest and longest time a refused client is told to wait.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The token budget.
#[derive(Debug)]
pub struct Admission {
    max_tokens: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    n_tokens: u64,
    /// Tokens of ended requests since `busy_since`: how fast places become free.
    n_released: u64,
    busy_since: Instant,
}

/// A refusal, with the numbers.
#[derive(thiserror::Error, Clone, PartialEq, Debug)]
#[error(
    "{n_tokens} tokens of other requests are ahead and at most {max_tokens} may be; try again in {} ms or ask for fewer tokens",
    retry_after.as_millis()
)]
pub struct Busy {
    n_tokens: u64,
    max_tokens: u64,
    /// When it is worth trying again.
    pub retry_after: Duration,
}

/// A place that was granted; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    n_tokens: u64,
}

impl Admission {
    /// A budget of this many tokens.
    pub fn new(max_tokens: u64, now: Instant) -> Arc<Self> {
        let state = Mutex::new(State { n_tokens: 0, n_released: 0, busy_since: now });
        Arc::new(Self { max_tokens, state })
    }

    /// A place for `n_tokens`. A request alone is always accepted.
    ///
    /// # Errors
    /// When the budget is used up; the hint follows from how fast requests ended so far.
    pub fn admit(self: &Arc<Self>, n_tokens: u64, now: Instant) -> Result<Place, Busy> {
        let mut state = self.lock();
        if state.n_tokens == 0 {
            (state.n_released, state.busy_since) = (0, now);
        } else if state.n_tokens + n_tokens > self.max_tokens {
            let excess = state.n_tokens + n_tokens - self.max_tokens;
            let seconds_per_token = now.saturating_duration_since(state.busy_since).as_secs_f64()
                / state.n_released.max(1) as f64;
            let wait =
                Duration::try_from_secs_f64(seconds_per_token * excess as f64).unwrap_or(RETRY_AFTER.1);
            let retry_after = wait.clamp(RETRY_AFTER.0, RETRY_AFTER.1);
            return Err(Busy { n_tokens: state.n_tokens, max_tokens: self.max_tokens, retry_after });
        }
        state.n_tokens += n_tokens;
        Ok(Place { admission: self.clone(), n_tokens })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("invariant: no panic while the lock is held")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.n_tokens -= self.n_tokens;
        state.n_released += self.n_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_and_the_hint_follows_the_rate() {
        let start = Instant::now();
        let admission = Admission::new(100, start);
        let first = admission.admit(60, start).unwrap();
        let second = admission.admit(40, start).unwrap();
        drop(second);
        // 40 tokens in 4 s: 10 tokens a second; 20 tokens too many.
        let busy = admission.admit(60, start + Duration::from_secs(4)).unwrap_err();
        assert_eq!(busy.retry_after, Duration::from_secs(2));
        assert!(busy.to_string().contains("60 tokens of other requests"), "{busy}");
        drop(first);
        assert!(admission.admit(100, start).is_ok());
    }

    #[test]
    fn a_request_alone_is_never_too_large() {
        let now = Instant::now();
        let admission = Admission::new(10, now);
        let _place = admission.admit(1000, now).unwrap();
        assert!(admission.admit(1, now).is_err());
    }
}
