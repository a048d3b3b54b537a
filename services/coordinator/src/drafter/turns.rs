//! Taking turns with a draft service on the target's machine: what a turn takes, who takes part in it, and how long a
//! step waits for that. Pure.

use std::time::{Duration, Instant};

use paceline_domain::SequenceId;
use paceline_speculation::{
    Drafting, Load, StepTimes,
    controller::{ProbeConfig, Probes},
};

/// What a pass of the draft model takes beside the target's before it was measured.
const ASSUMED_SHARE: f64 = 0.35;
/// A step waits for this many times what a turn usually takes, and this long more.
const PATIENCE: (f64, Duration) = (2.0, Duration::from_millis(20));
/// Nothing is read that may take this many times as long as a step may wait.
const LEAST_PATIENCE: f64 = 1.25;
/// Rows of a sequence that a first pass has anyway: a token that was sampled after the drafted ones, and the last of those.
const FEW_ROWS: usize = 2;
/// From so many tokens on reading them is bound by arithmetic, so that each token takes as long as the others.
const MANY_TOKENS: usize = 16;
/// How fast it is learnt that reading takes longer, or less long: the first time a model reads it touches new memory, and
/// what else delays it is over the next time.
const READING_RATES: (f64, f64) = (0.2, 0.8);
/// Steps without a turn before one is tried that seems not worth it: while the draft has little to catch up with.
const PROBES: ProbeConfig = ProbeConfig { first: 6, longest: 512 };
/// Times that reading was not worth it before it is tried all the same; a request asks once for some tokens.
const READINGS: ProbeConfig = ProbeConfig { first: 64, longest: 1_024 };

/// A turn that was asked for.
#[derive(Clone, Debug)]
struct Asked {
    at: Instant,
    n_passes: usize,
    n_rows: usize,
    n_unread: usize,
}

/// Turns of all sequences of a group.
#[derive(Debug)]
pub struct TurnTaking {
    /// Tokens to draft in the next turn.
    pub n_tokens: usize,
    /// When drafting is tried that seems not worth it, and whether the next turn is such a trial.
    pub probes: Probes,
    /// See `probes`.
    pub is_trial: bool,
    /// When a text is read although that seems not worth it.
    pub readings: Probes,
    /// Sequences of the present turn, with the tokens that they wait for.
    pub members: Vec<(SequenceId, usize)>,
    asked: Option<Asked>,
    /// What passes of the draft model take, seen from here, in plain steps of the target: memory, which binds both, has its
    /// fast and slow minutes.
    passes: StepTimes,
    /// Milliseconds in which it reads a token of a long text.
    reading_ms: Option<f64>,
}

impl Default for TurnTaking {
    fn default() -> Self {
        Self {
            n_tokens: 0,
            probes: Probes::new(PROBES),
            is_trial: false,
            readings: Probes::new(READINGS),
            members: Vec::new(),
            asked: None,
            passes: StepTimes::default(),
            reading_ms: None,
        }
    }
}

impl TurnTaking {
    /// A turn of these members was asked for: so many passes, after `n_unread` of their committed tokens were read.
    pub fn ask(&mut self, members: Vec<(SequenceId, usize)>, n_passes: usize, n_unread: usize, at: Instant) {
        self.asked = Some(Asked { at, n_passes, n_rows: members.len(), n_unread });
        self.members = members;
    }

    /// Whether a turn that was asked for has not ended.
    pub fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// The turn has ended, perhaps after it was waited for in vain.
    pub fn answered(&mut self, now: Instant, target: &StepTimes) {
        let Some(Asked { at, n_passes, n_rows, n_unread }) = self.asked.take() else { return };
        let ms = now.saturating_duration_since(at).as_secs_f64() * 1e3;
        tracing::debug!(n_passes, n_rows, n_unread, ms, "a turn of the draft service");
        if n_unread > FEW_ROWS * n_rows {
            self.has_read(n_unread, ms - self.pass_ms(n_rows, target) * n_passes.saturating_sub(1) as f64);
        } else if let Some(step_ms) = plain_ms(target) {
            let load = Load::plain(n_rows);
            let mut pass_ms = ms / n_passes.max(1) as f64;
            // What one disturbed turn took would be the end of drafting: nothing would be asked for that tells better.
            if !self.passes.is_settled(n_rows) {
                pass_ms = pass_ms.min(assumed_ms(n_rows, target));
            }
            self.passes.observe(load, pass_ms / step_ms, Drafting::Quiet);
        }
    }

    /// What reading took, the first token after it included.
    fn has_read(&mut self, n_unread: usize, ms: f64) {
        // Fewer are read as fast as one.
        if n_unread > MANY_TOKENS {
            let ms = ms.max(0.0) / n_unread as f64;
            let usual = self.reading_ms.unwrap_or(ms);
            let rate = if ms > usual { READING_RATES.0 } else { READING_RATES.1 };
            self.reading_ms = Some(usual + rate * (ms - usual));
        }
    }

    /// It will never be answered.
    pub fn forget(&mut self) {
        self.asked = None;
    }

    /// Milliseconds of a pass with so many rows.
    pub fn pass_ms(&self, n_rows: usize, target: &StepTimes) -> f64 {
        let load = Load::plain(n_rows.max(1));
        let assumed = assumed_ms(n_rows, target);
        let measured =
            self.passes.predict(load).zip(plain_ms(target)).map(|(share, step_ms)| share * step_ms);
        match measured {
            Some(ms) if self.passes.knows(n_rows) => ms,
            Some(ms) => ms.min(assumed),
            None => assumed,
        }
    }

    /// Milliseconds until `n_rows` sequences have their first token beyond that of a usual pass.
    pub fn read_ms(&self, n_unread: usize, n_rows: usize, target: &StepTimes) -> f64 {
        if n_unread <= FEW_ROWS * n_rows {
            return 0.0;
        }
        let assumed = || assumed_ms(n_unread, target);
        let ms = self.reading_ms.map_or_else(assumed, |reading_ms| reading_ms * n_unread as f64);
        (ms - self.pass_ms(n_rows, target)).max(0.0)
    }

    /// How long a step waits for the present turn.
    pub fn patience(&self, target: &StepTimes) -> Duration {
        let Some(Asked { n_passes, n_rows, n_unread, .. }) = self.asked else { return Duration::ZERO };
        let passes_ms = self.pass_ms(n_rows, target) * n_passes as f64;
        patience(passes_ms + self.read_ms(n_unread, n_rows, target))
    }
}

/// How long is waited for what should take so many milliseconds.
fn patience(ms: f64) -> Duration {
    Duration::from_secs_f64(PATIENCE.0 * ms.max(0.0) / 1e3) + PATIENCE.1
}

/// The least that must be waited for what should take so many milliseconds.
pub fn least_patience(ms: f64) -> Duration {
    Duration::from_secs_f64(LEAST_PATIENCE * ms.max(0.0) / 1e3) + PATIENCE.1
}

/// What a pass of the draft model takes before it was measured.
fn assumed_ms(n_rows: usize, target: &StepTimes) -> f64 {
    target.predict(Load::plain(n_rows.max(1))).unwrap_or(0.0) * ASSUMED_SHARE
}

/// What a step of one row takes.
fn plain_ms(target: &StepTimes) -> Option<f64> {
    target.predict(Load::plain(1)).filter(|ms| *ms > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> StepTimes {
        let mut times = StepTimes::default();
        for (n_rows, ms) in [(1, 30.0), (40, 300.0)] {
            times.observe(Load::plain(n_rows), ms, Drafting::Quiet);
        }
        times
    }

    #[test]
    fn what_turns_take_is_assumed_then_measured() {
        let (mut turns, target, start) = (TurnTaking::default(), target(), Instant::now());
        assert_eq!(turns.pass_ms(1, &target), 10.5);
        assert_eq!((turns.read_ms(2, 1, &target), turns.read_ms(40, 1, &target)), (0.0, 94.5));
        turns.ask(vec![(SequenceId(1), 3)], 3, 40, start);
        assert_eq!(turns.patience(&target), Duration::from_millis(2 * 126 + 20));
        turns.answered(start + Duration::from_millis(161), &target);
        assert_eq!(turns.read_ms(40, 1, &target), 140.0 - 10.5);
        turns.ask(vec![(SequenceId(1), 3)], 3, 1, start);
        turns.answered(start + Duration::from_millis(24), &target);
        assert_eq!((turns.pass_ms(1, &target), turns.read_ms(40, 1, &target)), (8.0, 132.0));
        assert_eq!(turns.read_ms(20, 1, &target), 62.0, "half as many take half as long");
        let mut faster = StepTimes::default();
        faster.observe(Load::plain(1), 15.0, Drafting::Quiet);
        assert_eq!(turns.pass_ms(1, &faster), 4.0, "what is bound by memory is as fast as that");
        assert!(!turns.is_asked());
        turns.answered(start + Duration::from_secs(9), &target);
        assert_eq!(turns.pass_ms(1, &target), 8.0, "nothing was asked");
    }

    #[test]
    fn a_disturbed_turn_does_not_end_drafting_and_a_slow_service_does() {
        let (mut turns, target, start) = (TurnTaking::default(), target(), Instant::now());
        let mut turn = |ms: u64| {
            turns.ask(vec![(SequenceId(1), 4)], 4, 1, start);
            turns.answered(start + Duration::from_millis(ms), &target);
            turns.pass_ms(1, &target)
        };
        assert_eq!(turn(400), 10.5, "no longer than was assumed");
        assert!(turn(4) < 6.0, "the next one is believed");
        let slow: Vec<f64> = (0..40).map(|_| turn(400)).collect();
        assert!(slow.is_sorted() && slow[39] > 30.0, "{slow:?}");
    }
}
