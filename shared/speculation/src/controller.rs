//! How many proposals of which sequences enter the next step: as many as raise expected tokens per predicted time, and
//! none when that is best. It proposes nothing and measures nothing.
//!
//! Two things keep wrong expectations cheap. Speculation must promise some gain before it is chosen ([`Margins`]).
//! And it has accounts: one for rows, one for what a draft model costs beside them. So whatever is accepted or rejected,
//! steps take at most what these hold at first and their allowances longer than plain decoding would, as far as step times
//! are predicted right.

use crate::account::{Account, AccountConfig};

/// Predicts the time of a step.
pub trait StepCost {
    /// Milliseconds of a step with this many rows.
    fn step_ms(&self, n_rows: usize) -> f64;
}

impl<F: Fn(usize) -> f64> StepCost for F {
    fn step_ms(&self, n_rows: usize) -> f64 {
        self(n_rows)
    }
}

/// Limits of what speculation may cost.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ControllerConfig {
    /// For rows that are verified.
    pub rows: AccountConfig,
    /// For what drafting costs beside them: waits, and steps that it slows down.
    pub drafting: AccountConfig,
    /// Gain that speculation must promise.
    pub margins: Margins,
    /// When something is tried although it seems not worth it.
    pub probes: ProbeConfig,
}

/// Promised gains, as a share of the plain rate.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Margins {
    /// To begin.
    pub enter: f64,
    /// To go on.
    pub stay: f64,
}

/// How often something is tried although it seems not worth it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProbeConfig {
    /// Steps without it before the first trial; doubled with each that does not change the mind.
    pub first: u64,
    /// The most steps between trials.
    pub longest: u64,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            rows: AccountConfig { start: 0.5, allowance: 0.01, most: 4.0, carried: (0.5, 1.0) },
            // A draft must read a prompt before it can show what it is good for; who has, gives others credit.
            drafting: AccountConfig { start: 10.0, allowance: 0.01, most: 48.0, carried: (f64::MIN, 16.0) },
            margins: Margins { enter: 0.03, stay: 0.01 },
            probes: ProbeConfig { first: 16, longest: 512 },
        }
    }
}

/// Trials of what seems not worth it, ever more seldom.
#[derive(Clone, Debug)]
pub struct Probes {
    config: ProbeConfig,
    n_without: u64,
    interval: u64,
}

impl Probes {
    /// The first comes after `config.first` steps.
    pub fn new(config: ProbeConfig) -> Self {
        Self { config, n_without: 0, interval: config.first }
    }

    /// A step goes without; whether it is time to try.
    pub fn went_without(&mut self) -> bool {
        self.n_without += 1;
        self.is_due()
    }

    /// Whether it is time to try.
    pub fn is_due(&self) -> bool {
        self.n_without >= self.interval
    }

    /// It is tried.
    pub fn try_it(&mut self) {
        self.n_without = 0;
        self.interval = (self.interval * 2).min(self.config.longest);
    }

    /// It was used.
    pub fn used(&mut self) {
        self.n_without = 0;
    }

    /// It was worth it: if it stops being so, it is tried again soon.
    pub fn was_worth_it(&mut self) {
        (self.n_without, self.interval) = (0, self.config.first);
    }
}

/// A step before proposals are added.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepLoad {
    /// Its rows: one for each decoding sequence, and the prompt tokens it fills up with.
    pub n_rows: usize,
    /// Tokens it gives: one for each sequence whose last token is in it.
    pub n_tokens: usize,
    /// Rows there is room for beside them.
    pub n_spare_rows: usize,
}

/// What was chosen for a step, and what is expected of it.
#[derive(Clone, PartialEq, Debug)]
pub struct Choice {
    /// Proposals of each sequence that enter, from the first on.
    pub n_proposed: Vec<usize>,
    /// Second guesses that enter beside them.
    pub n_branches: usize,
    /// Tokens expected, the plain ones included.
    pub expected_tokens: f64,
    /// Predicted time.
    pub predicted_ms: f64,
    /// Predicted time without proposals.
    pub plain_ms: f64,
}

impl Choice {
    /// Proposed rows in the step.
    pub fn n_rows(&self) -> usize {
        self.n_proposed.iter().sum::<usize>() + self.n_branches
    }
}

/// The most promising number of rows, and what it promises.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Promise {
    /// Proposed rows.
    pub n_rows: usize,
    /// Tokens expected, the plain ones included.
    pub tokens: f64,
    /// Predicted time, what was waited or prepared included.
    pub ms: f64,
}

impl Promise {
    /// Tokens a millisecond.
    pub fn rate(&self) -> f64 {
        self.tokens / self.ms
    }
}

/// What became of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Settlement {
    /// Tokens it would have given without proposals.
    pub n_plain_tokens: usize,
    /// Tokens it gave.
    pub n_tokens: usize,
    /// Milliseconds that a step without proposals takes to give its tokens.
    pub plain_ms: f64,
    /// Milliseconds that its proposals have added to it.
    pub rows_ms: f64,
    /// Milliseconds that drafting has added to it: waits, and slower steps.
    pub drafting_ms: f64,
    /// Whether some of its proposals were drafted.
    pub has_drafted: bool,
    /// Milliseconds it took, waits included.
    pub ms: f64,
}

/// Sums over all steps: what was predicted and what came.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Forecast {
    /// Steps.
    pub n_steps: u64,
    /// Steps with proposals.
    pub n_speculative: u64,
    /// Tokens expected.
    pub expected_tokens: f64,
    /// Tokens that came.
    pub tokens: f64,
    /// Milliseconds predicted.
    pub predicted_ms: f64,
    /// Milliseconds they took.
    pub ms: f64,
    /// Milliseconds that plain decoding would have taken for the same tokens, as predicted.
    pub plain_ms: f64,
}

/// Decides for one group.
#[derive(Clone, Debug)]
pub struct Controller {
    margins: Margins,
    rows: Account,
    drafting: Account,
    is_speculating: bool,
    probes: Probes,
    /// The next choice tries something.
    is_trying: bool,
    /// Which sequence is tried next.
    probe_turn: usize,
    forecast: Forecast,
}

impl Controller {
    /// Knows nothing yet.
    pub fn new(config: ControllerConfig) -> Self {
        Self {
            margins: config.margins,
            rows: Account::new(config.rows),
            drafting: Account::new(config.drafting),
            is_speculating: true,
            probes: Probes::new(config.probes),
            is_trying: false,
            probe_turn: 0,
            forecast: Forecast::default(),
        }
    }

    /// What was predicted and what came.
    pub fn forecast(&self) -> Forecast {
        self.forecast
    }

    /// Nothing is left to do.
    pub fn idle(&mut self) {
        self.rows.idle();
        self.drafting.idle();
    }

    /// What drafting may cost.
    pub fn drafting(&self) -> &Account {
        &self.drafting
    }

    /// What drafting has lost for no fault of its drafts is given back.
    pub fn forgive_drafting(&mut self, ms: f64) {
        self.drafting.forgive(ms);
    }

    /// What rows may still cost.
    pub fn rows(&self) -> &Account {
        &self.rows
    }

    /// Opens the accounts, when it is known what a plain step takes.
    pub fn open(&mut self, plain_ms: f64) {
        self.rows.open(plain_ms);
        self.drafting.open(plain_ms);
    }

    /// Whether a promise exceeds another one by the margin.
    pub fn is_worth_it(&self, promise: &Promise, plain: &Promise) -> bool {
        let margins = self.margins;
        let margin = if self.is_speculating { margins.stay } else { margins.enter };
        promise.n_rows > 0 && promise.rate() > plain.rate() * (1.0 + margin)
    }

    /// A step goes without proposals that there would be; whether it is time to try one all the same. The next choice does,
    /// if there is one then; that it was tried counts in any case, because a step has waited for it.
    pub fn went_without(&mut self) -> bool {
        if self.probes.went_without() {
            self.probes.try_it();
            self.is_trying = true;
        }
        self.is_trying
    }

    /// Chooses. `acceptance` has for each sequence with proposals the probability of each, given that all before it are
    /// accepted. What was done to have them is done: only the rows are asked about.
    pub fn choose(&mut self, acceptance: &[Vec<f64>], load: StepLoad, cost: &dyn StepCost) -> Choice {
        let plain_ms = cost.step_ms(load.n_rows);
        self.open(plain_ms);
        let plain = Promise { n_rows: 0, tokens: load.n_tokens as f64, ms: plain_ms };
        let found = promise(acceptance, load, (0.0, self.rows.balance_ms()), cost);
        let best = found.filter(|found| self.is_worth_it(found, &plain)).unwrap_or(plain);
        self.is_speculating = best.n_rows > 0;
        let mut n_proposed = vec![0; acceptance.len()];
        let ranked = ranked(acceptance, best.n_rows);
        ranked.iter().for_each(|(_, sequence)| n_proposed[*sequence] += 1);
        let mut choice = Choice {
            n_proposed,
            n_branches: 0,
            expected_tokens: best.tokens,
            predicted_ms: best.ms,
            plain_ms,
        };
        let has_offers = load.n_spare_rows > 0 && acceptance.iter().any(|offer| !offer.is_empty());
        // Where nobody can be asked yet, it is tried in the next step.
        let is_trying = !acceptance.is_empty() && std::mem::take(&mut self.is_trying);
        if is_trying && best.n_rows == 0 && has_offers {
            self.probe(&mut choice, acceptance, load, cost);
        }
        choice
    }

    /// One proposal is tried although it seems not worth it: what is never tried is never known better.
    fn probe(&mut self, choice: &mut Choice, acceptance: &[Vec<f64>], load: StepLoad, cost: &dyn StepCost) {
        let step_ms = cost.step_ms(load.n_rows + 1);
        if step_ms - choice.plain_ms > self.rows.balance_ms() {
            return;
        }
        let n = acceptance.len();
        let turns = (0..n).map(|i| (self.probe_turn + i) % n);
        let Some(sequence) = turns.into_iter().find(|sequence| !acceptance[*sequence].is_empty()) else {
            return;
        };
        self.probe_turn = sequence + 1;
        choice.n_proposed[sequence] = 1;
        choice.expected_tokens += acceptance[sequence][0];
        choice.predicted_ms = step_ms;
    }

    /// Takes in what became of a choice.
    pub fn settle(&mut self, choice: &Choice, settlement: &Settlement) {
        let Settlement { n_plain_tokens, n_tokens, plain_ms, rows_ms, drafting_ms, has_drafted, ms } =
            *settlement;
        let n_won = n_tokens.saturating_sub(n_plain_tokens) as f64;
        let saved_ms = plain_ms * n_won / n_plain_tokens.max(1) as f64;
        let is_speculative = choice.n_rows() > 0;
        let forecast = &mut self.forecast;
        forecast.n_steps += 1;
        forecast.n_speculative += u64::from(is_speculative);
        forecast.expected_tokens += choice.expected_tokens;
        forecast.tokens += n_tokens as f64;
        forecast.predicted_ms += choice.predicted_ms;
        forecast.ms += ms;
        forecast.plain_ms += choice.plain_ms + saved_ms;
        match is_speculative {
            true if n_won > 0.0 => self.probes.was_worth_it(),
            true => self.probes.used(),
            false => {}
        }
        let gained_ms = saved_ms - rows_ms;
        self.rows.settle(plain_ms, gained_ms);
        self.drafting.settle(plain_ms, if has_drafted { gained_ms } else { 0.0 } - drafting_ms);
    }
}

/// The number of rows that promises the highest rate, when `before_ms` is spent before the step and it may take at most
/// `most_ms` longer than without rows; none when nothing is offered or affordable.
pub fn promise(
    acceptance: &[Vec<f64>],
    load: StepLoad,
    (before_ms, most_ms): (f64, f64),
    cost: &dyn StepCost,
) -> Option<Promise> {
    let plain_ms = cost.step_ms(load.n_rows);
    let mut tokens = load.n_tokens as f64;
    let mut best: Option<Promise> = None;
    let ranked = ranked(acceptance, load.n_spare_rows);
    let all: f64 = tokens + ranked.iter().map(|(probability, _)| probability).sum::<f64>();
    // Step times have cliffs, so counts are looked at beyond the first that is worse.
    for (i, (probability, _)) in ranked.iter().enumerate() {
        tokens += probability;
        let step_ms = cost.step_ms(load.n_rows + i + 1);
        let ms = step_ms + before_ms;
        let found = Promise { n_rows: i + 1, tokens, ms };
        if step_ms - plain_ms <= most_ms && best.is_none_or(|best| found.rate() > best.rate()) {
            best = Some(found);
        }
        // More rows never take less time: were they all accepted, they would not do better.
        if best.is_some_and(|best| all / ms <= best.rate()) {
            break;
        }
    }
    best
}

/// Proposals by falling probability that they and all before them are accepted, with their sequences; as probabilities
/// fall along a proposal, the first n of them are beginnings of proposals.
fn ranked(acceptance: &[Vec<f64>], n_most: usize) -> Vec<(f64, usize)> {
    let mut ranked = Vec::new();
    for (sequence, acceptance) in acceptance.iter().enumerate() {
        let mut product = 1.0;
        for probability in acceptance {
            product *= probability.clamp(0.0, 1.0);
            ranked.push((product, sequence));
        }
    }
    // Stable, so that equal ones stay in order.
    ranked.sort_by(|one, other| other.0.total_cmp(&one.0));
    ranked.truncate(n_most);
    ranked
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
