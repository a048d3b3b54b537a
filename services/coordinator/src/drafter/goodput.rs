//! What steps take and what speculation may cost: the controller, fed with measured times. Drafting may slow the target's
//! own machine, so steps while nobody drafts and steps while somebody does are measured apart; now and then drafting rests
//! for a few steps, so that the former stay known. Pure.

use paceline_speculation::{Choice, Controller, ControllerConfig, StepCost as _, StepLoad, StepTimes};

/// Steps without drafting that show what plain steps take, and steps with it after which they are looked at again.
const CALIBRATION: (u32, u32) = (4, 256);

/// Whether the draft service is at work during a step, perhaps on the target's machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drafting {
    /// It is.
    Busy,
    /// Nobody drafts.
    Quiet,
}

/// A step that was done.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Done {
    /// Its rows.
    pub n_rows: usize,
    /// Proposals among them.
    pub n_verified: usize,
    /// Tokens it would have given without proposals.
    pub n_plain_tokens: usize,
    /// Tokens it gave.
    pub n_tokens: usize,
    /// How long it took.
    pub ms: f64,
    /// How long proposals were waited for before.
    pub waited_ms: f64,
    /// What the draft service did meanwhile.
    pub drafting: Drafting,
}

/// The controller and its measurements.
#[derive(Debug)]
pub struct Goodput {
    controller: Controller,
    quiet: StepTimes,
    busy: StepTimes,
    /// Quiet steps still to be seen, and busy ones since.
    n_to_calibrate: u32,
    n_busy: u32,
}

impl Default for Goodput {
    fn default() -> Self {
        Self {
            controller: Controller::new(ControllerConfig::default()),
            quiet: StepTimes::new(),
            busy: StepTimes::new(),
            n_to_calibrate: CALIBRATION.0,
            n_busy: 0,
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

    /// Whether the draft service may be at work.
    pub fn may_draft(&self) -> bool {
        self.controller.allows_drafting() && self.n_to_calibrate == 0
    }

    /// What steps take.
    pub fn times(&self, drafting: Drafting) -> &StepTimes {
        if drafting == Drafting::Busy && self.busy.is_measured() { &self.busy } else { &self.quiet }
    }

    /// As [`Controller::choose`].
    pub fn choose(
        &mut self,
        acceptance: &[Vec<f64>],
        load: StepLoad,
        wait_ms: f64,
        drafting: Drafting,
    ) -> Choice {
        let is_busy = drafting == Drafting::Busy && self.busy.is_measured();
        let times = if is_busy { &self.busy } else { &self.quiet };
        self.controller.choose(acceptance, load, wait_ms, times)
    }

    /// What a step has cost or saved, beside what a plain one takes while nobody drafts.
    pub fn account(&mut self, choice: &Choice, done: &Done) {
        let n_plain_rows = done.n_rows - done.n_verified;
        let times = self.times(done.drafting);
        let plain_times = if self.quiet.is_measured() { &self.quiet } else { times };
        let settled = Choice {
            plain_ms: plain_times.step_ms(n_plain_rows),
            predicted_ms: times.step_ms(done.n_rows),
            ..choice.clone()
        };
        // Steps with prompts are predicted less well than speculation changes them, and a plain step that is held up while
        // nobody drafts is not held up by drafting.
        let has_prompt = n_plain_rows > done.n_plain_tokens;
        let is_plain = done.n_verified == 0 && done.drafting == Drafting::Quiet;
        let ms = if has_prompt || is_plain { settled.predicted_ms } else { done.ms };
        self.controller.settle(&settled, done.n_plain_tokens, done.n_tokens, ms + done.waited_ms);
    }

    /// Takes in how long a step took.
    pub fn measure(&mut self, done: &Done) {
        let is_decode = u32::from(done.n_rows == done.n_plain_tokens + done.n_verified);
        match done.drafting {
            Drafting::Quiet => {
                self.quiet.observe(done.n_rows, done.ms);
                self.n_to_calibrate = self.n_to_calibrate.saturating_sub(is_decode);
            }
            Drafting::Busy => {
                self.busy.observe(done.n_rows, done.ms);
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

    const LOAD: StepLoad = StepLoad { n_rows: 1, n_tokens: 1, n_spare_rows: 8 };

    fn done(n_verified: usize, n_tokens: usize, ms: f64, drafting: Drafting) -> Done {
        Done { n_rows: 1 + n_verified, n_verified, n_plain_tokens: 1, n_tokens, ms, waited_ms: 0.0, drafting }
    }

    fn step(goodput: &mut Goodput, done: &Done, acceptance: f64) -> usize {
        let choice = goodput.choose(&[vec![acceptance; 4]], LOAD, 0.0, done.drafting);
        goodput.account(&choice, done);
        goodput.measure(done);
        choice.n_rows()
    }

    fn quiet(goodput: &mut Goodput, n: usize) {
        for _ in 0..n {
            step(goodput, &done(0, 1, 10.0, Drafting::Quiet), 0.0);
        }
    }

    #[test]
    fn drafting_rests_until_plain_steps_are_known_and_again_later() {
        let mut goodput = Goodput::default();
        for _ in 0..4 {
            assert!(!goodput.may_draft());
            step(&mut goodput, &done(0, 1, 10.0, Drafting::Quiet), 0.0);
        }
        let mut n_busy = 0;
        while goodput.may_draft() {
            step(&mut goodput, &done(2, 3, 12.0, Drafting::Busy), 0.9);
            n_busy += 1;
        }
        assert_eq!(n_busy, CALIBRATION.1);
        assert!(goodput.controller().allows_drafting());
    }

    #[test]
    fn drafting_that_slows_the_target_by_more_than_it_gives_is_paused() {
        let mut goodput = Goodput::default();
        quiet(&mut goodput, 4);
        // Three tokens in two plain steps' time, but four steps' worth of it while drafting.
        let mut n_steps = 0;
        while goodput.may_draft() {
            step(&mut goodput, &done(2, 3, 40.0, Drafting::Busy), 0.9);
            n_steps += 1;
        }
        assert!((1..=3).contains(&n_steps), "{n_steps}");
        assert!(!goodput.controller().allows_drafting());
    }

    #[test]
    fn a_plain_step_that_is_held_up_and_a_prompt_say_nothing_of_drafting() {
        let mut goodput = Goodput::default();
        quiet(&mut goodput, 8);
        step(&mut goodput, &done(0, 1, 900.0, Drafting::Quiet), 0.0);
        step(&mut goodput, &Done { n_rows: 200, ..done(0, 1, 9_000.0, Drafting::Busy) }, 0.0);
        assert!(goodput.may_draft());
    }
}
