//! The draft service as it comes and goes: what it says, what it does wrong, and what is made of that. What is asked of it is
//! decided elsewhere.

use std::time::{Duration, Instant};

use paceline_domain::{DraftAnswer, DraftControl, SequenceId};
use paceline_speculation::Fault;

use super::{
    Drafter,
    link::{About, LinkEvent, Outbox},
    remote,
    sequence::Sequence,
};

/// Silence beyond this many usual latencies is a fault, and beyond this time at least.
const PATIENCE: (f64, Duration) = (8.0, Duration::from_millis(500));
/// Further silence for each token that the service must read first.
const PATIENCE_A_TOKEN: Duration = Duration::from_millis(10);
/// How fast the service's latency is learnt.
const LATENCY_RATE: f64 = 0.2;
/// Between two times that waits in vain are forgiven: who fails all the time pays for it.
const FORGIVING_EVERY: Duration = Duration::from_secs(30);

/// A connection to the draft service. Dropped, the link makes another one.
#[derive(Debug)]
pub(super) struct Connection {
    pub about: About,
    pub outbox: Outbox,
}

/// Since the service last said something.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// Since when an answer is owed that was waited for in vain: nothing is waited for until one has come.
    pub owes_since: Option<Instant>,
    /// How long sequences that have ended waited for a first token: shorter ones than the service may be silent tell of it,
    /// too. Sequences that waited at the same time count once.
    outlived: Duration,
    outlived_until: Option<Instant>,
}

impl Silence {
    /// A sequence that waited since then has ended.
    pub fn outlived(&mut self, since: Instant, now: Instant) {
        self.outlived = self.with(since, now);
        self.outlived_until = Some(now);
    }

    /// How long it has been, where a sequence has waited since then.
    fn with(&self, since: Instant, now: Instant) -> Duration {
        let since = self.outlived_until.map_or(since, |until| until.max(since));
        self.outlived + now.saturating_duration_since(since)
    }
}

/// What was waited for in vain. A service that is well again is judged by what it was before, not by that.
#[derive(Debug, Default)]
pub(super) struct VainWaits {
    waited: Duration,
    forgiven: Option<Instant>,
}

impl VainWaits {
    /// A step waited in vain.
    pub fn add(&mut self, waited: Duration) {
        self.waited += waited;
    }

    /// It was late, and that is all.
    fn keep(&mut self) {
        self.waited = Duration::ZERO;
    }

    /// It is well again; what is to be forgiven.
    fn forgive(&mut self, now: Instant) -> Duration {
        let waited = std::mem::take(&mut self.waited);
        if self.forgiven.is_some_and(|at| now.saturating_duration_since(at) < FORGIVING_EVERY) {
            return Duration::ZERO;
        }
        self.forgiven = Some(now);
        waited
    }
}

impl Drafter {
    /// The service has budget and says nothing.
    pub(super) fn check_silence(&mut self, now: Instant) {
        let usual = Duration::from_secs_f64(PATIENCE.0 * self.latency_ms.unwrap_or(0.0) / 1e3);
        let least = usual.max(PATIENCE.1);
        let waiting: Vec<_> =
            self.sequences.values().filter_map(|sequence| sequence.remote.waiting()).collect();
        let is_silent = |one: &&remote::Waiting| {
            self.silence.with(one.since, now) > least + PATIENCE_A_TOKEN * one.n_unread as u32
        };
        let n_silent = waiting.iter().filter(is_silent).count();
        let is_owing =
            self.silence.owes_since.is_some_and(|since| now.saturating_duration_since(since) > least);
        // One session may starve behind others; when all are silent the service is.
        if is_owing || (n_silent > 0 && n_silent == waiting.len()) {
            self.fault(Fault::Dead, "it says nothing", now);
        }
    }

    pub(super) fn fault(&mut self, fault: Fault, problem: &str, now: Instant) {
        let was_left_out = !self.breaker.is_closed();
        self.breaker.fault(fault, now);
        self.note(format!("the draft service is left out for a while: {problem}"));
        self.silence = Silence::default();
        self.turns.forget();
        // It may be in any state: after the pause every session is opened anew.
        self.sequences.values_mut().for_each(|sequence| {
            sequence.remote.close(&mut self.farewells);
            sequence.forget_session();
        });
        // Nor does it answer a single question. Both ends of a stream may live and have lost each other's place in it.
        if was_left_out && fault == Fault::Dead {
            self.lose();
        }
    }

    pub(super) fn lose(&mut self) {
        self.connection = None;
        self.silence = Silence::default();
        self.turns.forget();
        self.farewells = DraftControl::default();
        self.sequences.values_mut().for_each(Sequence::forget_session);
    }

    fn note(&mut self, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            tracing::warn!(problem, "drafting");
            self.problem = Some(problem);
        }
    }

    pub(super) fn happened(&mut self, event: LinkEvent, now: Instant) {
        match event {
            LinkEvent::Up(about, outbox) => {
                tracing::info!(
                    model = about.model,
                    max_sessions = about.max_sessions,
                    "draft service connected"
                );
                self.lose();
                self.problem = None;
                // Whoever comes back reads a request while nobody waits, however long that takes, and is in use after that.
                if self.counters.n_connected > 0 {
                    self.breaker.replaced(now);
                }
                self.counters.n_connected += 1;
                self.connection = Some(Connection { about, outbox });
            }
            LinkEvent::Said(answer, n_malformed) => self.said(&answer, n_malformed, now),
            LinkEvent::Down(problem) | LinkEvent::Refused(problem) => {
                self.lose();
                self.breaker.renewed(now);
                self.note(problem);
            }
        }
    }

    fn said(&mut self, answer: &DraftAnswer, n_malformed: usize, now: Instant) {
        let mut nonsense = (n_malformed > 0).then(|| format!("{n_malformed} malformed messages"));
        let mut n_heard = answer.nacks.len();
        for proposal in &answer.proposals {
            let Some(sequence) = self.sequences.get_mut(&SequenceId(proposal.session)) else { continue };
            let waiting = sequence.remote.waiting();
            match sequence.proposed(proposal, self.config.target.n_vocab) {
                Ok(()) => {
                    n_heard += 1;
                    self.counters.n_proposed += proposal.tokens.len() as u64;
                    self.counters.computed_ms += f64::from(proposal.compute_us) / 1e3;
                }
                Err(remote::Nonsense(problem)) => nonsense = Some(problem),
            }
            let has_come = waiting.filter(|_| sequence.remote.waiting().is_none());
            if let Some(waiting) = has_come.filter(|waiting| waiting.n_unread <= remote::MANY_UNREAD) {
                let ms = now.saturating_duration_since(waiting.since).as_secs_f64() * 1e3;
                let usual = self.latency_ms.unwrap_or(ms);
                self.latency_ms = Some(usual + LATENCY_RATE * (ms - usual));
            }
        }
        for nack in &answer.nacks {
            let Some(sequence) = self.sequences.get_mut(&SequenceId(nack.session)) else { continue };
            match nack.have_len {
                0 => sequence.remote.given_up(nack.generation, now),
                have_len => sequence.remote.lacks(nack.generation, have_len as usize),
            }
        }
        match nonsense {
            Some(problem) => self.fault(Fault::Nonsense, &problem, now),
            None if n_heard > 0 => self.answered(now),
            None => {}
        }
    }

    fn answered(&mut self, now: Instant) {
        self.silence = Silence::default();
        match self.breaker.is_closed() {
            true => self.vain_waits.keep(),
            false => {
                let waited = self.vain_waits.forgive(now);
                self.goodput.forgive(waited.as_secs_f64() * 1e3);
            }
        }
        self.breaker.answered();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_of_ended_sequences_add_up_and_those_at_the_same_time_count_once() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        let ms = |silence: &Silence, since: u64, now: u64| silence.with(at(since), at(now)).as_millis();
        assert_eq!(ms(&silence, 100, 250), 150);
        silence.outlived(at(100), at(300));
        silence.outlived(at(150), at(350));
        assert_eq!(ms(&silence, 200, 400), 300, "from 100 to 400");
        assert_eq!(ms(&silence, 9_000, 9_100), 350, "nobody waited in between");
    }

    #[test]
    fn waits_in_vain_are_forgiven_once_in_a_while() {
        let (mut waits, start) = (VainWaits::default(), Instant::now());
        let (wait, second) = (Duration::from_millis(120), Duration::from_secs(1));
        waits.add(wait);
        waits.add(wait);
        assert_eq!(waits.forgive(start), 2 * wait);
        waits.add(wait);
        assert_eq!(waits.forgive(start + 29 * second), Duration::ZERO, "again so soon");
        assert_eq!(waits.forgive(start + 30 * second), Duration::ZERO, "that one is paid for");
        waits.add(wait);
        waits.keep();
        assert_eq!(waits.forgive(start + 90 * second), Duration::ZERO, "it was only late");
        waits.add(wait);
        assert_eq!(waits.forgive(start + 121 * second), wait);
    }
}
