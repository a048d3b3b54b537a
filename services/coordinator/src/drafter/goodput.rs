//! What speculation costs and brings, in milliseconds: the controller, fed with step times and with what is around steps.
//! Pure.

use paceline_speculation::{
    Beside, BranchOffer, Choice, Controller, ControllerConfig, Drafting, Load, Promise, StepCost, StepLoad,
    StepTimes, add_branches,
    controller::{Settlement, promise},
};

/// Steps without drafting that show what plain steps take, and steps with it after which they are looked at again.
const CALIBRATION: (u32, u32) = (4, 256);
/// How fast the time around steps is learnt.
const GAP_RATE: f64 = 0.05;
/// A gap counts as at most this part of a step: what is longer has another cause.
const LONGEST_GAP: f64 = 0.5;
/// Tokens that a request is thought to generate before any ended, and how fast that is corrected.
const LENGTH: (f64, f64) = (128.0, 0.1);

/// A step that was done.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Done {
    /// What it had to do.
    pub load: Load,
    /// Proposals among its rows.
    pub n_verified: usize,
    /// Tokens it would have given without proposals.
    pub n_plain_tokens: usize,
    /// Tokens it gave.
    pub n_tokens: usize,
    /// How long it took since the one before, without waiting for proposals.
    pub elapsed_ms: f64,
    /// How long the group computed.
    pub compute_ms: f64,
    /// How long proposals were waited for before.
    pub waited_ms: f64,
    /// Whether it was sent before the step before was done.
    pub ran_ahead: bool,
    /// What the draft service did meanwhile.
    pub drafting: Drafting,
    /// Whether some of its proposals were drafted.
    pub has_drafted: bool,
}

/// A step that may be planned: what it takes with some rows more.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    beside: Beside<'a>,
    factor: f64,
    /// What a further row takes at least.
    row_ms: f64,
}

impl<'a> Costs<'a> {
    /// Of one row for each of these sequences, given with their lengths; `None` before a step of so many was measured.
    pub fn of(
        times: &'a StepTimes,
        lengths: impl Iterator<Item = usize>,
        drafting: Drafting,
    ) -> Option<Self> {
        let rows = lengths.map(|n_tokens| Load::rows(n_tokens.saturating_sub(1), 1));
        let load = rows.fold(Load::default(), Load::and);
        let beside = times.beside(load).filter(|_| load.n_rows > 0 && times.knows(load.n_rows))?;
        Some(Self { beside, factor: times.slowness(drafting), row_ms: 0.0 })
    }

    /// The same where prompts are read, too: no row is free there, each takes what one of theirs does.
    pub fn beside_prompts(self, times: &StepTimes) -> Self {
        Self { row_ms: times.row_of_many_ms().unwrap_or(0.0), ..self }
    }

    /// Milliseconds without further rows.
    pub fn plain_ms(&self) -> f64 {
        self.step_ms(self.n_rows())
    }

    /// Rows without further ones.
    pub fn n_rows(&self) -> usize {
        self.beside.load().n_rows
    }
}

impl StepCost for Costs<'_> {
    fn step_ms(&self, n_rows: usize) -> f64 {
        let n_more = n_rows.saturating_sub(self.n_rows());
        self.factor * self.beside.ms(n_more).max(self.beside.ms(0) + self.row_ms * n_more as f64)
    }
}

/// The controller and what it needs to know beside step times.
#[derive(Debug)]
pub struct Goodput {
    controller: Controller,
    /// Milliseconds around a step: when it was sent before the one before was done, and when not.
    gap_ahead_ms: Option<f64>,
    gap_ms: Option<f64>,
    /// Quiet steps still to be seen, and busy ones since.
    n_to_calibrate: u32,
    n_busy: u32,
    /// Tokens that requests generate.
    length: f64,
}

impl Default for Goodput {
    fn default() -> Self {
        Self {
            controller: Controller::new(ControllerConfig::default()),
            gap_ahead_ms: None,
            gap_ms: None,
            n_to_calibrate: CALIBRATION.0,
            n_busy: 0,
            length: LENGTH.0,
        }
    }
}

impl Goodput {
    /// The controller.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// No sequence is left.
    pub fn idle(&mut self) {
        self.controller.idle();
    }

    /// A request ended after so many tokens.
    pub fn ended(&mut self, n_generated: usize) {
        self.length += LENGTH.1 * (n_generated as f64 - self.length);
    }

    /// Tokens that a request will still generate, as far as can be told.
    pub fn expected_left(&self, n_generated: usize, n_limit: usize) -> f64 {
        let left = (self.length - n_generated as f64).max(self.length / 4.0);
        left.min(n_limit as f64)
    }

    /// What was lost to a service that was not well is given back.
    pub fn forgive(&mut self, ms: f64) {
        self.controller.forgive_drafting(ms);
    }

    /// Whether what drafting costs can be paid for.
    pub fn can_pay(&self) -> bool {
        !self.controller.drafting().is_exhausted()
    }

    /// Whether a draft service on a machine of its own may be at work: if it is not of its own after all, steps without it
    /// show that.
    pub fn may_draft_ahead(&self) -> bool {
        self.can_pay() && self.n_to_calibrate == 0
    }

    /// Milliseconds that a step takes longer when it cannot be sent before the one before is done.
    pub fn gap_ms(&self) -> f64 {
        match (self.gap_ahead_ms, self.gap_ms) {
            (Some(ahead), Some(gap)) => (gap - ahead).max(0.0),
            _ => 0.0,
        }
    }

    /// What plain decoding gives.
    pub fn plain(&mut self, costs: &Costs<'_>) -> Promise {
        self.controller.open(costs.plain_ms());
        Promise { n_rows: 0, tokens: costs.n_rows() as f64, ms: costs.plain_ms() }
    }

    /// What these proposals promise, when the step must wait for the one before.
    pub fn promised(&self, offers: &[Vec<f64>], load: StepLoad, costs: &Costs<'_>) -> Option<Promise> {
        promise(offers, load, (self.gap_ms(), f64::INFINITY), costs)
    }

    /// The same within what rows may still cost, the wait included: a step that has waited for proposals that cannot be paid
    /// for has waited in vain.
    pub fn promised_within_means(
        &self,
        offers: &[Vec<f64>],
        load: StepLoad,
        costs: &Costs<'_>,
    ) -> Option<Promise> {
        let gap_ms = self.gap_ms();
        promise(offers, load, (gap_ms, self.controller.rows().balance_ms() - gap_ms), costs)
    }

    /// As [`Controller::is_worth_it`].
    pub fn is_worth_it(&self, found: &Promise, beside: &Promise) -> bool {
        self.controller.is_worth_it(found, beside)
    }

    /// As [`Controller::went_without`].
    pub fn went_without(&mut self) -> bool {
        self.controller.went_without()
    }

    /// As [`Controller::choose`].
    pub fn choose(&mut self, acceptance: &[Vec<f64>], load: StepLoad, costs: &Costs<'_>) -> Choice {
        self.controller.choose(acceptance, load, costs)
    }

    /// As [`add_branches`], within what rows may cost; so long was waited for the proposals.
    pub fn add_branches(
        &self,
        choice: &mut Choice,
        offers: Vec<BranchOffer>,
        load: StepLoad,
        (waited_ms, costs): (f64, &Costs<'_>),
    ) -> Vec<BranchOffer> {
        let most_ms = self.controller.rows().balance_ms();
        add_branches(choice, offers, load, (waited_ms, most_ms), costs)
    }

    /// Takes in what a step has cost or saved.
    pub fn step_done(&mut self, choice: Option<&Choice>, done: &Done, times: &StepTimes) {
        self.measure(done);
        let Some(all_ms) = times.predict(done.load) else { return };
        let plain = Choice {
            n_proposed: Vec::new(),
            n_branches: 0,
            expected_tokens: done.n_plain_tokens as f64,
            predicted_ms: all_ms,
            plain_ms: all_ms,
        };
        let n_rows = done.load.n_rows;
        let predict = |n: usize| times.predict(done.load.with_rows(n)).unwrap_or(all_ms);
        let gap_ms = if done.ran_ahead { 0.0 } else { self.gap_ms() };
        // At most what this step has taken longer: who is told to draft may hang, which slows nobody.
        let slower_ms = (times.slowness(done.drafting) - 1.0) * all_ms;
        let slower_ms = slower_ms.min((done.compute_ms - all_ms).max(0.0));
        let is_drafting = done.has_drafted || done.waited_ms > 0.0;
        let settlement = Settlement {
            n_plain_tokens: done.n_plain_tokens,
            n_tokens: done.n_tokens,
            plain_ms: predict(done.n_plain_tokens.max(1)),
            rows_ms: all_ms - predict(n_rows - done.n_verified) + if is_drafting { 0.0 } else { gap_ms },
            drafting_ms: done.waited_ms + slower_ms + if is_drafting { gap_ms } else { 0.0 },
            has_drafted: done.has_drafted,
            ms: done.elapsed_ms + done.waited_ms,
        };
        self.controller.settle(choice.unwrap_or(&plain), &settlement);
    }

    fn measure(&mut self, done: &Done) {
        let gap_ms = (done.elapsed_ms - done.compute_ms).clamp(0.0, LONGEST_GAP * done.compute_ms);
        let gap = if done.ran_ahead { &mut self.gap_ahead_ms } else { &mut self.gap_ms };
        *gap = Some(gap.map_or(gap_ms, |usual| usual + GAP_RATE * (gap_ms - usual)));
        let is_decode = u32::from(done.load.n_rows == done.n_plain_tokens + done.n_verified);
        match done.drafting {
            Drafting::Quiet => self.n_to_calibrate = self.n_to_calibrate.saturating_sub(is_decode),
            Drafting::Busy => {
                self.n_busy += is_decode;
                if self.n_busy >= CALIBRATION.1 {
                    (self.n_busy, self.n_to_calibrate) = (0, CALIBRATION.0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times() -> StepTimes {
        let mut times = StepTimes::default();
        for n_rows in [1, 2, 4, 8] {
            let load = Load::plain(n_rows);
            (0..4).for_each(|_| times.observe(load, 10.0 + 0.1 * n_rows as f64, Drafting::Quiet));
        }
        times
    }

    fn done(n_verified: usize, n_tokens: usize) -> Done {
        Done {
            load: Load::plain(1 + n_verified),
            n_verified,
            n_plain_tokens: 1,
            n_tokens,
            elapsed_ms: 11.0,
            compute_ms: 10.0,
            waited_ms: 0.0,
            ran_ahead: false,
            drafting: Drafting::Quiet,
            has_drafted: false,
        }
    }

    fn step(goodput: &mut Goodput, times: &StepTimes, done: &Done) {
        let costs = Costs::of(times, [1].into_iter(), done.drafting).expect("measured");
        let load = StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 8 };
        let choice = goodput.choose(&[vec![0.9; done.n_verified]], load, &costs);
        goodput.step_done(Some(&choice), done, times);
    }

    #[test]
    fn drafting_rests_until_plain_steps_are_known_and_again_later() {
        let (mut goodput, times) = (Goodput::default(), times());
        for _ in 0..4 {
            assert!(!goodput.may_draft_ahead());
            step(&mut goodput, &times, &done(0, 1));
        }
        let mut n_busy = 0;
        while goodput.may_draft_ahead() {
            step(&mut goodput, &times, &Done { drafting: Drafting::Busy, has_drafted: true, ..done(2, 3) });
            n_busy += 1;
        }
        assert_eq!(n_busy, CALIBRATION.1);
        assert!(goodput.can_pay());
    }

    #[test]
    fn drafting_that_slows_the_target_by_more_than_it_gives_is_paused() {
        let (mut goodput, mut times) = (Goodput::default(), times());
        (0..4).for_each(|_| step(&mut goodput, &times, &done(0, 1)));
        // Twice as slow while drafting, and nothing is accepted.
        let mut n_steps = 0;
        while goodput.can_pay() {
            let (drafting, ms) = (Drafting::Busy, 20.4);
            let busy = Done { drafting, has_drafted: true, elapsed_ms: ms, compute_ms: ms, ..done(1, 1) };
            times.observe(busy.load, 20.4, Drafting::Busy);
            step(&mut goodput, &times, &busy);
            n_steps += 1;
        }
        assert!((3..30).contains(&n_steps), "{n_steps}");
    }

    #[test]
    fn waits_are_paid_for_and_what_others_do_to_a_step_is_not() {
        let (mut goodput, times) = (Goodput::default(), times());
        step(&mut goodput, &times, &Done { elapsed_ms: 900.0, ..done(0, 1) });
        assert!(goodput.can_pay());
        step(&mut goodput, &times, &Done { waited_ms: 120.0, ..done(0, 1) });
        assert!(!goodput.can_pay());
    }

    #[test]
    fn no_step_waits_for_proposals_that_cannot_be_paid_for() {
        let (mut goodput, times) = (Goodput::default(), times());
        // Each step waits 0.8 ms longer than one that is sent ahead, and nothing is accepted.
        (0..99).for_each(|_| {
            step(&mut goodput, &times, &Done { ran_ahead: true, elapsed_ms: 10.2, ..done(0, 1) })
        });
        let costs = Costs::of(&times, [1].into_iter(), Drafting::Quiet).expect("measured");
        let load = StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 8 };
        let mut n_waited = 0;
        while goodput.promised_within_means(&[vec![0.9]], load, &costs).is_some() {
            step(&mut goodput, &times, &done(1, 1));
            n_waited += 1;
        }
        // The account opens with half a step, 5 ms; each wait takes 0.8 ms of it, and a row 0.1.
        assert!((3..10).contains(&n_waited), "{n_waited}");
        assert!(goodput.promised(&[vec![0.9]], load, &costs).is_some());
    }

    #[test]
    fn what_is_lost_by_not_sending_ahead_is_known_when_both_were_seen() {
        let (mut goodput, times) = (Goodput::default(), times());
        step(&mut goodput, &times, &done(0, 1));
        assert_eq!(goodput.gap_ms(), 0.0);
        step(&mut goodput, &times, &Done { ran_ahead: true, elapsed_ms: 10.2, ..done(0, 1) });
        assert!((goodput.gap_ms() - 0.8).abs() < 1e-9, "{}", goodput.gap_ms());
        let costs = Costs::of(&times, [1].into_iter(), Drafting::Quiet).expect("measured");
        let (plain, load) = (goodput.plain(&costs), StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 8 });
        let worth = |acceptance: f64| {
            let found = goodput.promised(&[vec![acceptance]], load, &costs).expect("an offer");
            goodput.is_worth_it(&found, &plain)
        };
        assert!(!worth(0.08) && worth(0.2));
    }

    #[test]
    fn beside_prompts_no_row_is_free() {
        let mut times = times();
        let row_ms = |times: &StepTimes, n_rows: usize| {
            let costs = Costs::of(times, [1].into_iter(), Drafting::Quiet).expect("measured");
            [costs, costs.beside_prompts(times)].map(|costs| costs.step_ms(1 + n_rows) - costs.plain_ms())
        };
        let [alone, beside] = row_ms(&times, 3);
        assert!((alone - 0.3).abs() < 1e-9 && beside == alone, "{alone} {beside}");
        for n_rows in [64, 128] {
            times.observe(Load::plain(n_rows), 2.0 * n_rows as f64, Drafting::Quiet);
        }
        let [alone, beside] = row_ms(&times, 3);
        assert!(alone < 0.4 && (beside - 6.0).abs() < 1e-9, "{alone} {beside}");
    }

    #[test]
    fn requests_are_expected_to_be_as_long_as_others_were() {
        let mut goodput = Goodput::default();
        assert_eq!(goodput.expected_left(0, 40), 40.0);
        (0..99).for_each(|_| goodput.ended(20));
        let left = goodput.expected_left(0, 500);
        assert!((20.0..21.0).contains(&left), "{left}");
        assert!((5.0..6.0).contains(&goodput.expected_left(90, 500)), "it may go on");
    }
}
