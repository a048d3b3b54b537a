//! Questions to the draft service, and waits for its answers. What is worth asking for was decided before.

use std::time::{Duration, Instant};

use paceline_domain::{DraftControl, SequenceId, TokenId};
use paceline_speculation::{Fault, ProposedToken, Source, StepCost as _, StepTimes};
use tokio::{
    sync::mpsc,
    time::{Instant as TokioInstant, timeout_at},
};
use tracing::{Instrument as _, Span};

use super::{Connection, Drafter, Open, Placement, WORTH_A_SESSION, clock, link::Link, sequence::Sequence};

impl Drafter {
    /// Takes in what has come, without waiting, and tells the service what changed: one frame for everything.
    pub fn flush(&mut self, now: Instant) {
        while let Some(event) = self.link.as_mut().and_then(Link::try_next) {
            self.happened(event, now);
        }
        self.check_silence(now);
        // Where there is nothing to ask for, a question would be wasted.
        let has_questions =
            self.breaker.is_closed() || self.sequences.values().any(|one| one.allows(Source::Draft));
        if self.connection.is_none() || !has_questions || !self.breaker.allows(now) {
            return;
        }
        let mut frame = std::mem::take(&mut self.farewells);
        match self.placement {
            Placement::Apart => self.fill(&mut frame, now),
            Placement::Together if !self.breaker.is_closed() => self.ask_one(&mut frame, now),
            Placement::Together => {}
        }
        self.send(&frame, now);
    }

    fn fill(&mut self, frame: &mut DraftControl, now: Instant) {
        let Some(Connection { about, .. }) = &self.connection else { return };
        let may_draft = self.goodput.may_draft_ahead();
        let mut n_open = self.sequences.values().filter(|sequence| sequence.remote.is_open()).count();
        for sequence in self.sequences.values_mut() {
            let ahead = sequence.worth_ahead(self.config.max_ahead);
            let is_open = sequence.remote.is_open();
            let is_worth = is_open || (n_open < about.max_sessions && sequence.n_left() >= WORTH_A_SESSION);
            let fits = sequence.tokens().len() + ahead as usize <= about.context;
            let is_wanted = sequence.is_drafted_for && sequence.allows(Source::Draft);
            let may_draft = may_draft && fits && is_worth && is_wanted;
            sequence.tell(if may_draft { ahead } else { 0 }, now, frame);
            n_open += usize::from(sequence.remote.is_open() && !is_open);
        }
    }

    /// A service that was left out is asked for one token, to see whether it is well. Nobody waits for it. The sequence it is
    /// asked about has a session then, so it should have much to generate beside what must be read.
    fn ask_one(&mut self, frame: &mut DraftControl, now: Instant) {
        let context = self.connection.as_ref().map_or(0, |connection| connection.about.context);
        let could = |sequence: &&mut Sequence| {
            sequence.allows(Source::Draft) && sequence.n_left() > 1 && sequence.tokens().len() < context
        };
        let worth = |sequence: &&mut Sequence| sequence.n_left() as i64 - sequence.tokens().len() as i64;
        if let Some(sequence) = self.sequences.values_mut().filter(could).max_by_key(worth) {
            sequence.tell(1, now, frame);
        }
    }

    /// Asks for what was decided to be worth a turn, for the sequences that can use it now.
    fn ask_turn(&mut self, open: &[Open], now: Instant) {
        self.turns.members.clear();
        if self.turns.n_tokens == 0 || !self.can_ask() {
            return;
        }
        let (mut frame, mut members) = (DraftControl::default(), Vec::new());
        let (mut n_passes, mut n_unread) = (0, 0);
        for (id, room) in open {
            let Some(sequence) = self.sequences.get_mut(id).filter(|sequence| sequence.is_drafted_for) else {
                continue;
            };
            let n_tokens = self.turns.n_tokens.min(*room).min(self.config.max_ahead as usize);
            let n_before = sequence.remote.n_unread(sequence.tokens().len());
            sequence.tell(n_tokens as u32, now, &mut frame);
            let n_missing = n_tokens.saturating_sub(sequence.remote.buffer().count());
            if sequence.remote.is_drafting() && n_missing > 0 {
                n_unread += n_before;
                n_passes = n_passes.max(n_missing);
                members.push((*id, n_tokens));
            }
        }
        if !members.is_empty() {
            self.turns.ask(members, n_passes, n_unread, now);
            match self.turns.is_trial {
                true => self.turns.probes.try_it(),
                false => self.turns.probes.used(),
            }
            self.send(&frame, now);
        }
    }

    fn send(&mut self, frame: &DraftControl, now: Instant) {
        let Some(connection) = self.connection.as_ref().filter(|_| !frame.is_empty()) else { return };
        match connection.outbox.try_send(frame.into()) {
            Ok(()) => {}
            // What it missed it cannot be told later: it has to be told everything, on a new connection.
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.fault(Fault::Dead, "it does not read", now);
                self.lose();
            }
            // The link will say why.
            Err(mpsc::error::TrySendError::Closed(_)) => self.lose(),
        }
    }

    /// Tells the service what changed, and waits for its tokens where that is worth it, never beyond the configured time.
    /// `open` are the sequences that proposals can be used for; `span` is made for a wait.
    pub async fn collect(&mut self, open: &[Open], times: &StepTimes, span: impl FnOnce() -> Span) {
        let (now, was_owing) = (clock(), self.silence.owes_since.is_some());
        self.flush(now);
        if was_owing {
            self.note_turn(times, now);
        }
        if self.placement == Placement::Together {
            self.ask_turn(open, now);
        }
        self.waited = Duration::ZERO;
        let wait = self.patience(open, times).min(self.config.max_wait);
        if wait.is_zero() || self.n_missing(open) == 0 {
            return;
        }
        self.wait(open, now + wait).instrument(span()).await;
        let end = clock();
        self.waited = end.saturating_duration_since(now);
        self.counters.n_waits += 1;
        self.counters.waited_ms += self.waited.as_secs_f64() * 1e3;
        if self.n_missing(open) > 0 {
            self.counters.n_late += 1;
            self.vain_waits.add(self.waited);
            self.silence.owes_since.get_or_insert(now);
        }
        self.note_turn(times, end);
    }

    async fn wait(&mut self, open: &[Open], deadline: Instant) {
        while self.n_missing(open) > 0 {
            let Some(link) = self.link.as_mut() else { return };
            match timeout_at(TokioInstant::from_std(deadline), link.next()).await {
                Ok(Some(event)) => self.happened(event, clock()),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// A turn that came late is measured when it comes.
    fn note_turn(&mut self, times: &StepTimes, now: Instant) {
        if self.turns.is_asked() && self.silence.owes_since.is_none() {
            self.turns.answered(now, times);
        }
    }

    /// Tokens that are waited for: of a turn, or the first of each sequence.
    fn n_missing(&self, open: &[Open]) -> usize {
        match self.placement {
            Placement::Apart => open.iter().filter(|(id, _)| self.is_awaited(*id)).count(),
            Placement::Together => {
                let missing = |(id, n): &(SequenceId, usize)| {
                    let sequence = self.sequences.get(id).filter(|sequence| sequence.remote.is_open());
                    sequence.map_or(0, |sequence| n.saturating_sub(sequence.remote.buffer().count()))
                };
                self.turns.members.iter().map(missing).sum()
            }
        }
    }

    pub(super) fn is_awaited(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.remote.waiting().is_some())
    }

    /// How long to wait: for a turn; or for a first token, if one that comes as quickly as usual would raise the rate.
    fn patience(&self, open: &[Open], times: &StepTimes) -> Duration {
        if self.placement == Placement::Together {
            return self.turns.patience(times);
        }
        let (Some(latency_ms), n) = (self.latency_ms, open.len()) else { return Duration::ZERO };
        let n_awaited = self.n_missing(open);
        let is_paying = self.can_ask() && self.goodput.may_draft_ahead();
        let Some(costs) = self.costs(open, times).filter(|_| n_awaited > 0 && is_paying) else {
            return Duration::ZERO;
        };
        let typical =
            ProposedToken { token: TokenId(0), source: Source::Draft, confidence: 0.8, second: None };
        let gain = n_awaited as f64 * self.table.estimate(0, &typical);
        let plain_rate = n as f64 / costs.plain_ms();
        let rate = (n as f64 + gain) / (costs.step_ms(n + n_awaited) + latency_ms);
        let is_worth = rate > 1.05 * plain_rate;
        if is_worth { Duration::from_secs_f64(1.5 * latency_ms / 1e3) } else { Duration::ZERO }
    }
}
