//! What may be proposed for the next steps, decided once a step: whose next step must wait for its last token, for whom
//! the draft service drafts, and how much. It neither asks nor waits.

use std::time::Instant;

use paceline_domain::SequenceId;
use paceline_speculation::{Drafting, Promise, Source, StepLoad, StepTimes, Turn};

use super::{
    Connection, Drafter, Placement, WORTH_A_SESSION,
    goodput::Costs,
    sequence::{NextStep, Sequence, expected_length},
    turns::least_patience,
};

/// Steps that drafting ahead is tried for when it seems not worth it.
const TRIED_FOR: u32 = 8;
/// Rows that a step is thought to have room for.
const SPARE_ROWS: usize = 256;
/// A text must promise this many times what reading it takes.
const READING_MARGIN: f64 = 2.5;
/// Who has no more tokens to catch up with than this is read up to them on the way.
const FEW_UNREAD: usize = 8;
/// Plain steps that turns after the first may cost one sequence in all; more, and nothing is drafted for it any more.
const MOST_LOST: f64 = 3.0;
/// Tokens that a draft must be expected to give beyond those that cost nothing.
const BEYOND_OWN: f64 = 0.3;

/// Sequences that are decoding, and what they can expect.
struct View<'a> {
    ids: Vec<SequenceId>,
    /// Of their own tokens.
    own: Vec<Vec<f64>>,
    costs: Costs<'a>,
    load: StepLoad,
    /// The best without a draft.
    base: Promise,
}

/// A turn that would be better than none.
struct Found {
    members: Vec<SequenceId>,
    n_tokens: usize,
    promise: Promise,
}

impl Drafter {
    /// Decides, once after each step.
    pub(super) fn decide(&mut self, times: &StepTimes, now: Instant) {
        self.sequences.values_mut().for_each(|sequence| sequence.needs_each_token = false);
        self.check_placement(times);
        let Some(view) = self.view(times) else {
            self.turns.n_tokens = 0;
            return;
        };
        match self.placement {
            Placement::Apart => self.decide_ahead(&view),
            Placement::Together => self.decide_turn(&view, times, now),
        }
    }

    /// A draft that is said to have a machine of its own and makes steps take twice as long has none: it takes turns from
    /// then on.
    fn check_placement(&mut self, times: &StepTimes) {
        if self.placement == Placement::Apart && times.shows_shared_cores() {
            let slowness = times.slowness(Drafting::Busy);
            tracing::warn!(
                slowness,
                "the draft service shares the cores of shards: they take turns from now on"
            );
            self.placement = Placement::Together;
        }
    }

    /// Rates what there is to propose without a draft, and makes steps wait where that is worth it.
    fn view<'a>(&mut self, times: &'a StepTimes) -> Option<View<'a>> {
        // A step that runs ahead is told nothing; what is decided now is for the one after it.
        let is_ahead = !self.in_flight.is_empty();
        let next = if is_ahead { NextStep::AfterOneSent } else { NextStep::AfterKnown };
        let (table, mut ids, mut own, mut lengths) = (&self.table, Vec::new(), Vec::new(), Vec::new());
        for (id, sequence) in self.sequences.iter_mut().filter(|(_, sequence)| sequence.n_generated() > 0) {
            ids.push(*id);
            own.push(sequence.expected_of_own(table, next));
            lengths.push(sequence.tokens().len());
        }
        let costs = self.costs_of(lengths.into_iter(), times)?;
        let n = ids.len();
        let load = StepLoad { n_rows: n, n_tokens: n, n_spare_rows: SPARE_ROWS };
        let plain = self.goodput.plain(&costs);
        let found = self.goodput.promised_within_means(&own, load, &costs);
        let found = found.filter(|found| self.goodput.is_worth_it(found, &plain));
        let has_offers = own.iter().any(|offer| !offer.is_empty());
        if found.is_some() || (has_offers && self.goodput.went_without()) {
            for (id, _) in ids.iter().zip(&own).filter(|(_, offer)| !offer.is_empty()) {
                self.sequence(*id).needs_each_token = true;
            }
        }
        Some(View { ids, own, costs, load, base: found.unwrap_or(plain) })
    }

    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("invariant: it was found a moment ago")
    }

    /// Whether the draft service is there and can be asked.
    pub(super) fn can_ask(&self) -> bool {
        self.connection.is_some() && self.breaker.is_closed() && self.silence.owes_since.is_none()
    }

    /// A draft on a machine of its own costs no time, but steps must wait for the tokens it has to know, and rows cost.
    fn decide_ahead(&mut self, view: &View<'_>) {
        // Nobody would draft; what is drafted for whom is decided anew when somebody can.
        if self.connection.is_none() {
            return;
        }
        let expected = |(id, own): (&SequenceId, &Vec<f64>)| {
            let mut drafted = self.sequences[id].expected_of_draft(&self.table, &self.newcomers);
            // What is drafted too late is worth nothing.
            drafted.iter_mut().take(1).for_each(|first| *first *= self.availability);
            if expected_length(&drafted) > expected_length(own) { drafted } else { own.clone() }
        };
        let offers: Vec<Vec<f64>> = view.ids.iter().zip(&view.own).map(expected).collect();
        let found = self.goodput.promised(&offers, view.load, &view.costs);
        let is_worth = found.is_some_and(|found| self.goodput.is_worth_it(&found, &view.base));
        if is_worth {
            self.turns.probes.was_worth_it();
        } else if self.turns.probes.went_without() && self.goodput.can_pay() {
            self.turns.probes.try_it();
            self.n_tries = TRIED_FOR;
        }
        self.n_tries = self.n_tries.saturating_sub(1);
        let is_drafting = is_worth || self.n_tries > 0;
        let can_ask = self.connection.is_some() && self.breaker.is_closed() && self.goodput.may_draft_ahead();
        for sequence in self.sequences.values_mut() {
            sequence.is_drafted_for = is_drafting;
            sequence.needs_each_token |= is_drafting && can_ask && sequence.allows(Source::Draft);
        }
    }

    /// A draft on the target's machine costs the time it computes.
    fn decide_turn(&mut self, view: &View<'_>, times: &StepTimes, now: Instant) {
        self.sequences.values_mut().for_each(|sequence| sequence.is_drafted_for = false);
        (self.turns.n_tokens, self.turns.is_trial) = (0, false);
        // While prompts are read, their readers would wait for tokens of others, and proposals take their rows.
        let has_unread = self.sequences.values().any(|sequence| sequence.n_generated() == 0);
        if has_unread || !self.can_ask() || !self.goodput.can_pay() {
            return;
        }
        let members = self.readers(view);
        let found = self.turn_of(&members, view, times).filter(|found| self.is_better(found, view));
        let found = self.with_new_readers(&members, found, (view, now), times);
        let found = match found {
            Some(found) => {
                self.turns.probes.was_worth_it();
                found
            }
            None if !members.is_empty() && self.turns.probes.went_without() => {
                self.turns.is_trial = true;
                Found { members, n_tokens: 1, promise: view.base }
            }
            None => return,
        };
        self.turns.n_tokens = found.n_tokens;
        for id in found.members {
            let sequence = self.sequence(id);
            (sequence.is_drafted_for, sequence.needs_each_token) = (true, true);
        }
    }

    fn is_better(&self, found: &Found, view: &View<'_>) -> bool {
        self.goodput.is_worth_it(&found.promise, &view.base)
    }

    /// Sequences the draft service has read for which it can be expected to know more than their own tokens say.
    fn readers(&self, view: &View<'_>) -> Vec<SequenceId> {
        let most_ms = MOST_LOST * view.costs.plain_ms();
        let is_reader = |(id, own): &(&SequenceId, &Vec<f64>)| {
            let sequence = &self.sequences[id];
            let drafted = expected_length(&sequence.expected_of_draft(&self.table, &self.newcomers));
            let is_near =
                sequence.remote.is_open() && sequence.remote.n_unread(sequence.tokens().len()) <= FEW_UNREAD;
            is_near && sequence.lost_ms() <= most_ms && drafted > expected_length(own) + BEYOND_OWN
        };
        view.ids.iter().zip(&view.own).filter(is_reader).map(|(id, _)| *id).collect()
    }

    fn turn_of(&self, members: &[SequenceId], view: &View<'_>, times: &StepTimes) -> Option<Found> {
        let expected = |id: &SequenceId| self.sequences[id].expected_of_draft(&self.table, &self.newcomers);
        let drafted: Vec<_> = members.iter().map(expected).collect();
        let others = view.ids.iter().zip(&view.own).filter(|(id, _)| !members.contains(id));
        let others: Vec<_> = others.map(|(_, own)| own.clone()).collect();
        let turn = Turn {
            drafted: &drafted,
            others: &others,
            load: view.load,
            before_ms: self.goodput.gap_ms(),
            token_ms: self.turns.pass_ms(members.len(), times),
        };
        let (n_tokens, promise) = turn.best(&view.costs)?;
        Some(Found { members: members.to_vec(), n_tokens, promise })
    }

    /// The turn with further sequences, whose tokens the draft service has to read first, if their gain will pay for that: all
    /// that can be read in one wait, because what is not worth it for one may be for several, or the oldest alone. Seldom one is
    /// read although that seems not so: how long the draft takes is measured by nothing else.
    fn with_new_readers(
        &mut self,
        members: &[SequenceId],
        found: Option<Found>,
        (view, now): (&View<'_>, Instant),
        times: &StepTimes,
    ) -> Option<Found> {
        let is_pending = !self.to_read.is_empty();
        let ids = self.candidates(view, now);
        let fits = |n: &usize| {
            let read_ms = self.read_ms(&ids[..*n], members, times);
            let balance_ms = self.goodput.controller().drafting().balance_ms();
            read_ms <= balance_ms && least_patience(read_ms) <= self.config.max_wait
        };
        let n_most = (1..=ids.len()).take_while(fits).last().unwrap_or(0);
        for n in [n_most, 1].into_iter().filter(|n| *n <= n_most && *n > 0) {
            let all: Vec<SequenceId> = members.iter().chain(&ids[..n]).copied().collect();
            let Some(with) = self.turn_of(&all, view, times) else { continue };
            let pays =
                is_pending || self.pays_to_read(&ids[..n], members, (&with, found.as_ref()), (view, times));
            if pays {
                self.turns.readings.was_worth_it();
            } else if n == 1 && self.turns.readings.went_without() {
                self.turns.readings.try_it();
            } else {
                continue;
            }
            self.to_read = ids[..n].to_vec();
            return Some(with);
        }
        if !ids.is_empty() {
            self.newcomers.passed_over();
        }
        found
    }

    /// Milliseconds until the draft service has read these beside the members of a turn.
    fn read_ms(&self, ids: &[SequenceId], members: &[SequenceId], times: &StepTimes) -> f64 {
        let n_unread = |id: &SequenceId| {
            let sequence = &self.sequences[id];
            sequence.remote.n_unread(sequence.tokens().len())
        };
        self.turns.read_ms(ids.iter().map(n_unread).sum(), ids.len() + members.len(), times)
    }

    /// Whether the turn with these sequences will have won what reading them takes, beside the best turn without them.
    fn pays_to_read(
        &self,
        ids: &[SequenceId],
        members: &[SequenceId],
        (with, without): (&Found, Option<&Found>),
        (view, times): (&View<'_>, &StepTimes),
    ) -> bool {
        let before = without.map_or(view.base, |found| found.promise);
        let won_ms = (1.0 / before.rate() - 1.0 / with.promise.rate()) * view.load.n_tokens as f64;
        let n_left = |id: &SequenceId| {
            let sequence = &self.sequences[id];
            self.goodput.expected_left(sequence.n_generated(), sequence.n_left())
        };
        let n_left = ids.iter().map(n_left).sum::<f64>() / ids.len() as f64;
        let read_ms = self.read_ms(ids, members, times);
        let pays = self.is_better(with, view) && won_ms * n_left > READING_MARGIN * read_ms;
        tracing::debug!(
            n = ids.len(),
            n_members = members.len(),
            read_ms,
            pass_ms = self.turns.pass_ms(ids.len() + members.len(), times),
            plain_ms = view.costs.plain_ms(),
            newcomers = self.newcomers.acceptance(),
            n_tokens = with.n_tokens,
            won_ms,
            n_left,
            pays,
            "reading for the draft is considered"
        );
        pays
    }

    /// Sequences that were decided to be read; or, when it is time to ask for one of them, all that could be, oldest first.
    fn candidates(&mut self, view: &View<'_>, now: Instant) -> Vec<SequenceId> {
        let Some(Connection { about, .. }) = &self.connection else { return Vec::new() };
        let n_open = self.sequences.values().filter(|sequence| sequence.remote.is_open()).count();
        let mut n_room = about.max_sessions.saturating_sub(n_open);
        let n_most = about.context.saturating_sub(self.config.max_ahead as usize);
        let (most_ms, pending) = (MOST_LOST * view.costs.plain_ms(), std::mem::take(&mut self.to_read));
        let (mut found, mut is_due) = (Vec::new(), !pending.is_empty());
        for id in &view.ids {
            let sequence = self.sequences.get_mut(id).expect("invariant: it was found a moment ago");
            let n_tokens = sequence.tokens().len();
            let is_unread = match sequence.remote.is_open() {
                true => sequence.remote.n_unread(n_tokens) > FEW_UNREAD,
                false => n_room > 0 && sequence.remote.may_open(now),
            };
            let is_good = sequence.lost_ms() <= most_ms && sequence.n_left() >= WORTH_A_SESSION;
            let is_meant = pending.is_empty() || pending.contains(id);
            if is_unread && is_good && is_meant && n_tokens <= n_most && sequence.allows(Source::Draft) {
                n_room -= usize::from(!sequence.remote.is_open());
                is_due |= pending.is_empty() && sequence.is_considered();
                found.push(*id);
            }
        }
        if is_due { found } else { Vec::new() }
    }
}
