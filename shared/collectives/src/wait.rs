//! Deadline, abort flag and spinning, for all transports. It does not know what is waited for, only for whom.

use crate::collective::AbortFlag;
use crate::error::CollectiveError;
use std::time::{Duration, Instant};

/// Longest sleep between two looks at the abort flag and at dead peers.
pub(crate) const NAP: Duration = Duration::from_millis(10);
/// Turns of a spin loop between two looks at the clock.
pub(crate) const SPINS_PER_LOOK: u32 = 64;

/// What bounds the waits of a member.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) deadline: Duration,
    pub(crate) abort: AbortFlag,
    /// How long to spin before sleeping.
    pub(crate) spin: Duration,
}

impl Limits {
    /// Starts the clock of one operation.
    pub(crate) fn watch(&self, during: &'static str) -> Watch {
        Watch { abort: self.abort.clone(), start: Instant::now(), deadline: self.deadline, during }
    }
}

/// The clock of one operation.
#[derive(Debug)]
pub(crate) struct Watch {
    abort: AbortFlag,
    start: Instant,
    deadline: Duration,
    pub(crate) during: &'static str,
}

impl Watch {
    /// How long to sleep before the next look.
    ///
    /// # Errors
    /// When the deadline is over or the abort flag is set; `rank` is who is waited for.
    pub(crate) fn nap(&self, rank: usize) -> Result<Duration, CollectiveError> {
        if self.abort.is_set() {
            return Err(CollectiveError::Aborted { rank, during: self.during });
        }
        let left = self.deadline.saturating_sub(self.start.elapsed());
        if left.is_zero() {
            return Err(CollectiveError::Timeout { rank, deadline: self.deadline, during: self.during });
        }
        Ok(left.min(NAP))
    }

    pub(crate) fn left(&self, rank: usize) -> CollectiveError {
        CollectiveError::PeerLeft { rank, during: self.during }
    }
}

/// How long to spin when `n_local` ranks share this host. Waking a sleeper costs some 50 us, so spinning that long
/// pays; but where ranks outnumber cores, spinning takes the core from the rank that is waited for.
pub(crate) fn spin_time(n_local: usize) -> Duration {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    match n_cores / n_local.max(1) {
        0 => Duration::ZERO,
        1 => Duration::from_micros(50),
        _ => Duration::from_micros(200),
    }
}
