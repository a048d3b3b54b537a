//! A place for a request, or a refusal at once. It counts tokens, prompt and output still allowed, of all requests
//! that were accepted and have not ended, in all and by tenant; order is the scheduler's matter.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Shortest and longest time a refused client is told to wait.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Whose requests are ahead when a tenant's own limit is reached.
const OWN: &str = "this tenant's";

/// How much is let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    /// Tokens of all requests.
    pub n_tokens: u64,
    /// Percent of them that one tenant may have: however much it sends, others find room.
    pub tenant_percent: u32,
}

/// What is known of a request before any work is done for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outline {
    /// Fewest tokens, prompt and output still allowed, that it can count as.
    pub n_least: u64,
    /// Bytes of text that are still to be tokenized.
    pub n_bytes: usize,
}

/// The token budget.
#[derive(Debug)]
pub struct Admission {
    budget: Budget,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    n_tokens: u64,
    /// Of those that have some.
    by_tenant: HashMap<Arc<str>, u64>,
    /// Tokens of ended requests since `busy_since`: how fast places become free.
    n_released: u64,
    busy_since: Instant,
    /// The last request that was refused for its length, unless a place came back since.
    refused: Option<Refused>,
}

#[derive(Debug)]
struct Refused {
    /// For whose limit: none for that of all.
    tenant: Option<Box<str>>,
    outline: Outline,
    busy: Busy,
}

/// A refusal, with the numbers.
#[derive(thiserror::Error, Clone, PartialEq, Debug)]
#[error(
    "{n_tokens} tokens of {whose} requests are ahead and at most {max_tokens} may be; try again in {} ms or ask for \
     fewer tokens",
    retry_after.as_millis()
)]
pub struct Busy {
    whose: &'static str,
    n_tokens: u64,
    max_tokens: u64,
    /// When it is worth trying again.
    pub retry_after: Duration,
}

/// A place that was granted; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    tenant: Arc<str>,
    n_tokens: u64,
}

impl Admission {
    /// Nobody has a place.
    pub fn new(budget: Budget, now: Instant) -> Arc<Self> {
        let state =
            State { n_tokens: 0, by_tenant: HashMap::new(), n_released: 0, busy_since: now, refused: None };
        Arc::new(Self { budget, state: Mutex::new(state) })
    }

    /// A place for `n_tokens` of a tenant. A request alone is always accepted, and a tenant's only one as long as there
    /// is room.
    ///
    /// # Errors
    /// When the budget is used up, or the tenant's part of it; the hint follows from how fast requests ended so far.
    pub fn admit(
        self: &Arc<Self>,
        tenant: &str,
        (outline, n_tokens): (Outline, u64),
        now: Instant,
    ) -> Result<Place, Busy> {
        let mut state = self.lock();
        if state.n_tokens == 0 {
            (state.n_released, state.busy_since) = (0, now);
        }
        state.check(&self.budget, tenant, n_tokens, now).inspect_err(|busy| {
            let tenant = (busy.whose == OWN).then(|| tenant.into());
            state.refused = Some(Refused { tenant, outline, busy: busy.clone() });
        })?;
        let tenant: Arc<str> = tenant.into();
        state.n_tokens += n_tokens;
        *state.by_tenant.entry(tenant.clone()).or_default() += n_tokens;
        Ok(Place { admission: self.clone(), tenant, n_tokens })
    }

    /// Whether a request would be refused now, before work is done to find out how many tokens it really has. It is also
    /// when it is no smaller than the last one that was, and no place came back since: under a flood tokens of those who are
    /// refused would otherwise be counted all the time. More bytes are taken for more tokens, which is a guess; a request
    /// alone is never refused by it.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn check(&self, tenant: &str, outline: Outline, now: Instant) -> Result<(), Busy> {
        let state = self.lock();
        state.check(&self.budget, tenant, outline.n_least, now)?;
        match &state.refused {
            Some(refused) if refused.covers(tenant, outline) => Err(refused.busy.clone()),
            _ => Ok(()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("invariant: no panic while the lock is held")
    }
}

impl Refused {
    fn covers(&self, tenant: &str, outline: Outline) -> bool {
        let is_same_limit = self.tenant.as_deref().is_none_or(|refused| refused == tenant);
        is_same_limit && outline.n_least >= self.outline.n_least && outline.n_bytes >= self.outline.n_bytes
    }
}

impl State {
    fn check(&self, budget: &Budget, tenant: &str, n_tokens: u64, now: Instant) -> Result<(), Busy> {
        let n_of_tenant = self.by_tenant.get(tenant).copied().unwrap_or(0);
        let max_of_tenant = (budget.n_tokens as u128 * u128::from(budget.tenant_percent) / 100) as u64;
        for (whose, n_ahead, max_tokens) in
            [("other", self.n_tokens, budget.n_tokens), (OWN, n_of_tenant, max_of_tenant)]
        {
            let excess = (n_ahead + n_tokens).saturating_sub(max_tokens);
            if n_ahead > 0 && excess > 0 {
                let retry_after = self.wait_for(excess, now);
                return Err(Busy { whose, n_tokens: n_ahead, max_tokens, retry_after });
            }
        }
        Ok(())
    }

    /// How long it takes until so many tokens have ended, at the rate so far.
    fn wait_for(&self, n_tokens: u64, now: Instant) -> Duration {
        let seconds_per_token =
            now.saturating_duration_since(self.busy_since).as_secs_f64() / self.n_released.max(1) as f64;
        let wait = Duration::try_from_secs_f64(seconds_per_token * n_tokens as f64).unwrap_or(RETRY_AFTER.1);
        wait.clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.n_tokens -= self.n_tokens;
        state.n_released += self.n_tokens;
        state.refused = None;
        let left = state.by_tenant.get_mut(&self.tenant).map(|n| {
            *n -= self.n_tokens;
            *n
        });
        if left == Some(0) {
            state.by_tenant.remove(&self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(n_tokens: u64, tenant_percent: u32, now: Instant) -> Arc<Admission> {
        Admission::new(Budget { n_tokens, tenant_percent }, now)
    }

    /// A request whose prompt came as tokens.
    fn tokens(n: u64) -> (Outline, u64) {
        (Outline { n_least: n, n_bytes: 0 }, n)
    }

    #[test]
    fn places_come_back_and_the_hint_follows_the_rate() {
        let start = Instant::now();
        let admission = admission(100, 100, start);
        let first = admission.admit("a", tokens(60), start).unwrap();
        let second = admission.admit("b", tokens(40), start).unwrap();
        drop(second);
        // 40 tokens in 4 s: 10 tokens a second; 20 tokens too many.
        let busy = admission.admit("a", tokens(60), start + Duration::from_secs(4)).unwrap_err();
        assert_eq!(busy.retry_after, Duration::from_secs(2));
        assert!(busy.to_string().contains("60 tokens of other requests"), "{busy}");
        assert!(admission.check("a", tokens(41).0, start).is_err());
        drop(first);
        assert!(admission.admit("a", tokens(100), start).is_ok());
    }

    #[test]
    fn who_is_no_smaller_than_the_last_refused_is_refused_until_a_place_comes_back() {
        let now = Instant::now();
        let admission = admission(100, 60, now);
        let text = |n_least, n_bytes| Outline { n_least, n_bytes };
        let places =
            [("a", 50), ("b", 20)].map(|(tenant, n)| admission.admit(tenant, tokens(n), now).unwrap());
        // Ten tokens are left to tenant a, thirty to others.
        assert!(admission.check("a", text(5, 40), now).is_ok(), "it may be short enough");
        let busy = admission.admit("a", (text(5, 40), 12), now).unwrap_err();
        assert_eq!(admission.check("a", text(5, 40), now), Err(busy));
        assert!(admission.check("a", text(6, 41), now).is_err());
        assert!(
            admission.check("a", text(5, 39), now).is_ok() && admission.check("a", text(4, 40), now).is_ok()
        );
        assert!(admission.check("b", text(5, 40), now).is_ok(), "it was the tenant's limit");
        admission.admit("b", (text(5, 100), 31), now).unwrap_err();
        assert!(admission.check("c", text(5, 100), now).is_err(), "it was the limit of all");
        drop(places);
        assert!(
            admission.check("a", text(5, 40), now).is_ok() && admission.check("c", text(5, 100), now).is_ok()
        );
    }

    #[test]
    fn a_request_alone_is_never_too_large() {
        let now = Instant::now();
        let admission = admission(10, 50, now);
        let _place = admission.admit("a", tokens(1000), now).unwrap();
        assert!(admission.admit("b", tokens(1), now).is_err());
    }

    #[test]
    fn a_tenant_leaves_room_for_others() {
        let now = Instant::now();
        let admission = admission(100, 70, now);
        let flood: Vec<Place> = (0..7).map(|_| admission.admit("flood", tokens(10), now).unwrap()).collect();
        let busy = admission.admit("flood", tokens(1), now).unwrap_err();
        assert!(
            busy.to_string().starts_with("70 tokens of this tenant's requests are ahead and at most 70"),
            "{busy}"
        );
        let light = admission.admit("light", tokens(30), now).unwrap();
        let busy = admission.admit("third", tokens(1), now).unwrap_err();
        assert!(busy.to_string().starts_with("100 tokens of other requests"), "{busy}");
        drop(flood);
        assert!(admission.admit("flood", tokens(70), now).is_ok());
        drop(light);
        assert!(admission.lock().by_tenant.is_empty(), "nothing is kept of who is gone");
    }
}
