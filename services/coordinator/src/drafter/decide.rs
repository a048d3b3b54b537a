//! What may be proposed for the next steps, decided once a step: whose next step must wait for its last token, for whom
//! the draft service drafts, and how much. It neither asks nor waits.

use std::time::Instant;

use paceline_domain::SequenceId;
use paceline_speculation::{Drafting, Promise, Source, StepLoad, StepTimes, Turn};

use super::{
    Drafter, Placement, WORTH_A_SESSION,
    goodput::Costs,
    sequence::{Sequence, expected_length},
    turns::patience,
};

/// Steps that drafting ahead is tried for when it seems not worth it.
const TRIED_FOR: u32 = 8;
/// Rows that a step is thought to have room for.
const SPARE_ROWS: usize = 256;
/// A session must promise this many times what reading its prompt takes.
const SESSION_MARGIN: f64 = 1.25;
/// And the account must hold this many times that: what is drafted after it costs as well.
const SESSION_SHARE: f64 = 1.5;
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
        let (table, mut ids, mut own, mut lengths) = (&self.table, Vec::new(), Vec::new(), Vec::new());
        for (id, sequence) in self.sequences.iter_mut().filter(|(_, sequence)| sequence.n_generated() > 0) {
            ids.push(*id);
            own.push(sequence.expected_of_own(table));
            lengths.push(sequence.tokens().len());
        }
        let costs = Costs::of(times, lengths.into_iter(), self.drafting())?;
        let n = ids.len();
        let load = StepLoad { n_rows: n, n_tokens: n, n_spare_rows: SPARE_ROWS };
        let plain = self.goodput.plain(&costs);
        let found = self.goodput.promised(&own, load, &costs);
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
        self.connection.is_some() && self.breaker.is_closed() && self.owes_since.is_none()
    }

    /// A draft on a machine of its own costs no time, but steps must wait for the tokens it has to know, and rows cost.
    fn decide_ahead(&mut self, view: &View<'_>) {
        // Nobody would draft; what is drafted for whom is decided anew when somebody can.
        if self.connection.is_none() {
            return;
        }
        let expected = |(id, own): (&SequenceId, &Vec<f64>)| {
            let mut drafted = self.sequences[id].expected_of_draft(&self.table);
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
        self.turns.n_tokens = 0;
        if !self.can_ask() || !self.goodput.can_pay() {
            return;
        }
        let members = self.readers(view);
        let found = self.turn_of(&members, view, times).filter(|found| self.is_better(found, view));
        let found = self.with_a_new_session(&members, found, (view, now), times);
        let found = match found {
            Some(found) => {
                self.turns.probes.was_worth_it();
                found
            }
            None if !members.is_empty() && self.turns.probes.went_without() => {
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
        let is_reader = |(id, own): &(&SequenceId, &Vec<f64>)| {
            let sequence = &self.sequences[id];
            let drafted = expected_length(&sequence.expected_of_draft(&self.table));
            let is_hopeless = sequence.lost_ms() > MOST_LOST * view.costs.plain_ms();
            sequence.remote.is_open() && !is_hopeless && drafted > expected_length(own) + BEYOND_OWN
        };
        view.ids.iter().zip(&view.own).filter(is_reader).map(|(id, _)| *id).collect()
    }

    fn turn_of(&self, members: &[SequenceId], view: &View<'_>, times: &StepTimes) -> Option<Found> {
        let expected = |id: &SequenceId| self.sequences[id].expected_of_draft(&self.table);
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

    /// The turn with one more sequence, whose tokens the draft service has to read first, if its gain will pay for that.
    /// Now and then one is read although that seems not so.
    fn with_a_new_session(
        &mut self,
        members: &[SequenceId],
        found: Option<Found>,
        (view, now): (&View<'_>, Instant),
        times: &StepTimes,
    ) -> Option<Found> {
        let is_pending = self.opening.is_some();
        let Some(id) = self.candidate(view, now) else { return found };
        let n_unread = self.sequences[&id].tokens().len();
        let all: Vec<SequenceId> = members.iter().copied().chain([id]).collect();
        let read_ms = self.turns.read_ms(n_unread, all.len(), times);
        let affordable_ms = self.goodput.controller().drafting().balance_ms();
        tracing::debug!(n_unread, read_ms, affordable_ms, is_pending, "a draft session is considered");
        if SESSION_SHARE * read_ms > affordable_ms || patience(read_ms) > self.config.max_wait {
            return found;
        }
        let Some(with) = self.turn_of(&all, view, times) else { return found };
        if is_pending {
            self.opening = Some(id);
            return Some(with);
        }
        let before = found.as_ref().map_or(view.base, |found| found.promise);
        let won_ms = (1.0 / before.rate() - 1.0 / with.promise.rate()) * view.load.n_tokens as f64;
        let sequence = &self.sequences[&id];
        let n_left = self.goodput.expected_left(sequence.n_generated(), sequence.n_left());
        if self.is_better(&with, view) && won_ms * n_left > SESSION_MARGIN * read_ms {
            self.turns.openings.was_worth_it();
            self.opening = Some(id);
            return Some(with);
        }
        if self.turns.openings.went_without() {
            self.turns.openings.try_it();
            self.opening = Some(id);
            return Some(with);
        }
        found
    }

    /// The sequence that was decided to get a session, or the oldest one that could.
    fn candidate(&mut self, view: &View<'_>, now: Instant) -> Option<SequenceId> {
        let about = &self.connection.as_ref()?.about;
        let n_open = self.sequences.values().filter(|sequence| sequence.remote.is_open()).count();
        if n_open >= about.max_sessions {
            return None;
        }
        let context = about.context;
        let could = |sequence: &mut Sequence| {
            let fits = sequence.tokens().len() + self.config.max_ahead as usize <= context;
            let is_free = !sequence.remote.is_open() && sequence.remote.may_open(now);
            is_free && fits && sequence.n_left() >= WORTH_A_SESSION && sequence.allows(Source::Draft)
        };
        let (sequences, pending) = (&mut self.sequences, self.opening.take());
        let is_next = |id: SequenceId, sequence: &mut Sequence| match pending {
            Some(pending) => pending == id,
            None => sequence.is_considered(),
        };
        let mut found = view.ids.iter().filter_map(|id| {
            let sequence = sequences.get_mut(id)?;
            (could(sequence) && is_next(*id, sequence)).then_some(*id)
        });
        found.next()
    }
}
