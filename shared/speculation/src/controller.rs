//! How many proposals of which sequences enter the next step: as many as raise expected tokens per predicted time, and
//! none when that is best. It proposes nothing and measures nothing.
//!
//! Two things keep wrong expectations cheap. Speculation must promise some gain before it is chosen ([`Margins`]).
//! And it has an account, in milliseconds of plain decoding: it earns what it saves, loses what it wastes, gets a small
//! allowance with every step, and may only risk what it has. So whatever is accepted or rejected, a busy period takes at
//! most `start` and `allowance` longer than plain decoding would, as far as step times are predicted right.

use crate::step_times::StepCost;

/// Limits of what speculation may cost.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ControllerConfig {
    /// What the account has at the start of a busy period, in plain steps; also the most that allowances add up to.
    pub start: f64,
    /// What a step adds to it, in plain steps.
    pub allowance: f64,
    /// The most it can hold, in plain steps.
    pub most: f64,
    /// Gain that speculation must promise.
    pub margins: Margins,
    /// Steps without a proposal after which one is tried although it seems not worth it; doubled when the trial fails.
    pub first_probe: u64,
    /// The most steps between trials.
    pub longest_probe: u64,
}

/// Promised gains, as a share of the plain rate.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Margins {
    /// To begin.
    pub enter: f64,
    /// To go on.
    pub stay: f64,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            start: 0.5,
            allowance: 0.01,
            most: 4.0,
            margins: Margins { enter: 0.03, stay: 0.01 },
            first_probe: 16,
            longest_probe: 512,
        }
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
        self.n_proposed.iter().sum()
    }
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
    config: ControllerConfig,
    /// In milliseconds; `None` before the first step of a busy period.
    balance_ms: Option<f64>,
    is_speculating: bool,
    n_steps_without: u64,
    probe_interval: u64,
    /// Which sequence is tried next.
    probe_turn: usize,
    /// Drafting has used up the account: it waits until there is something again.
    is_drafting_paused: bool,
    forecast: Forecast,
}

impl Controller {
    /// Knows nothing yet.
    pub fn new(config: ControllerConfig) -> Self {
        Self {
            config,
            balance_ms: None,
            is_speculating: true,
            n_steps_without: 0,
            probe_interval: config.first_probe,
            probe_turn: 0,
            is_drafting_paused: false,
            forecast: Forecast::default(),
        }
    }

    /// What was predicted and what came.
    pub fn forecast(&self) -> Forecast {
        self.forecast
    }

    /// Nothing is left to do: what was earned is not for later requests to lose.
    pub fn idle(&mut self) {
        self.balance_ms = None;
    }

    /// Whether drafting, which may slow the target's machine, can be paid for.
    pub fn allows_drafting(&self) -> bool {
        !self.is_drafting_paused
    }

    /// Chooses. `acceptance` has for each sequence with proposals the probability of each, given that all before it are
    /// accepted; `wait_ms` has been waited for them.
    pub fn choose(
        &mut self,
        acceptance: &[Vec<f64>],
        load: StepLoad,
        wait_ms: f64,
        cost: &dyn StepCost,
    ) -> Choice {
        let plain_ms = cost.step_ms(load.n_rows);
        let balance_ms = *self.balance_ms.get_or_insert(self.config.start * plain_ms);
        let ranked = ranked(acceptance, load.n_spare_rows);
        let margins = self.config.margins;
        let margin = if self.is_speculating { margins.stay } else { margins.enter };
        let plain_rate = load.n_tokens as f64 / plain_ms;
        let mut best = (0, load.n_tokens as f64, plain_ms, plain_rate * (1.0 + margin));
        let mut tokens = load.n_tokens as f64;
        // Step times have cliffs, so all counts are looked at, not only those up to the first that is worse.
        for (i, (probability, _)) in ranked.iter().enumerate() {
            tokens += probability;
            let step_ms = cost.step_ms(load.n_rows + i + 1);
            let is_affordable = step_ms + wait_ms - plain_ms <= balance_ms;
            let rate = tokens / (step_ms + wait_ms);
            if is_affordable && rate > best.3 {
                best = (i + 1, tokens, step_ms, rate);
            }
        }
        self.is_speculating = best.0 > 0;
        let mut n_proposed = vec![0; acceptance.len()];
        ranked[..best.0].iter().for_each(|(_, sequence)| n_proposed[*sequence] += 1);
        let mut choice = Choice { n_proposed, expected_tokens: best.1, predicted_ms: best.2, plain_ms };
        if best.0 == 0 && !ranked.is_empty() {
            self.maybe_probe(&mut choice, acceptance, load, cost);
        }
        choice
    }

    /// Now and then one proposal is tried although it seems not worth it: what is never tried is never known better.
    fn maybe_probe(
        &mut self,
        choice: &mut Choice,
        acceptance: &[Vec<f64>],
        load: StepLoad,
        cost: &dyn StepCost,
    ) {
        self.n_steps_without += 1;
        let step_ms = cost.step_ms(load.n_rows + 1);
        let is_affordable = step_ms - choice.plain_ms <= self.balance_ms.unwrap_or(0.0);
        if self.n_steps_without < self.probe_interval || !is_affordable {
            return;
        }
        self.n_steps_without = 0;
        self.probe_interval = (self.probe_interval * 2).min(self.config.longest_probe);
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

    /// Takes in what became of a choice: the tokens of the step, and how long it took, waiting for proposals included.
    /// `n_plain_tokens` are those it would have given without proposals.
    pub fn settle(&mut self, choice: &Choice, n_plain_tokens: usize, n_tokens: usize, step_ms: f64) {
        let n_steps = if n_plain_tokens == 0 { 1.0 } else { n_tokens as f64 / n_plain_tokens as f64 };
        let plain_ms = choice.plain_ms * n_steps;
        let is_speculative = choice.n_rows() > 0;
        let forecast = &mut self.forecast;
        forecast.n_steps += 1;
        forecast.n_speculative += u64::from(is_speculative);
        forecast.expected_tokens += choice.expected_tokens;
        forecast.tokens += n_tokens as f64;
        forecast.predicted_ms += choice.predicted_ms;
        forecast.ms += step_ms;
        forecast.plain_ms += plain_ms;
        if is_speculative {
            self.n_steps_without = 0;
            if n_tokens > n_plain_tokens {
                self.probe_interval = self.config.first_probe;
            }
        }
        let Some(balance_ms) = self.balance_ms.as_mut() else { return };
        // Allowances add up to a little only; what was saved may add up to more.
        let unearned = self.config.start * choice.plain_ms;
        let allowance = (unearned - *balance_ms).clamp(0.0, self.config.allowance * choice.plain_ms);
        // A step that was held up for a reason of its own must not end speculation for long.
        let gained = (plain_ms - step_ms).max(-choice.plain_ms);
        let most = self.config.most * choice.plain_ms;
        *balance_ms = (*balance_ms + allowance + gained).min(most);
        let resume_at = 0.5 * unearned;
        self.is_drafting_paused = *balance_ms <= 0.0 || (self.is_drafting_paused && *balance_ms < resume_at);
    }
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
