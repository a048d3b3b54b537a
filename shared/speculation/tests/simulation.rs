//! Statistics and controller together, in a model of costs: whatever is accepted, speculation never costs more than two
//! per cent, and where it pays it comes near the best fixed number of proposals.

use paceline_domain::TokenId;
use paceline_speculation::{
    AcceptanceTable, Controller, ControllerConfig, Drafting, Load, ProposedToken, SequenceAcceptance, Source,
    StepLoad, StepTimes, controller::Settlement,
};

/// Proposals there are of each sequence in each step.
const N_OFFERED: usize = 8;

/// Pseudo-random numbers in 0 .. 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What a run of steps came to, beside plain decoding of the same tokens.
#[derive(Clone, Copy)]
struct Run {
    ms: f64,
    plain_ms: f64,
}

/// Milliseconds of a step: the first row is 10, each further one a share of it.
fn true_ms(n_rows: usize, share: f64) -> f64 {
    10.0 * (1.0 + share * (n_rows - 1) as f64)
}

/// `accepted(step, sequence, n)` tells how many of n proposals are accepted; `confidence(step)` what the source says.
fn run(
    n_sequences: usize,
    n_steps: usize,
    share: f64,
    mut accepted: impl FnMut(usize, usize, usize) -> usize,
    confidence: impl Fn(usize) -> f32,
) -> Run {
    let (mut table, mut controller) = (AcceptanceTable::new(), Controller::new(ControllerConfig::default()));
    let mut sequences = vec![SequenceAcceptance::default(); n_sequences];
    // Before anything is decoded a prompt was read.
    let mut times = StepTimes::default();
    let observe = |times: &mut StepTimes, n_rows| {
        times.observe(Load::plain(n_rows), true_ms(n_rows, share), Drafting::Quiet);
    };
    observe(&mut times, 64);
    observe(&mut times, n_sequences);
    let plain = Load::plain(n_sequences);
    let load = StepLoad { n_rows: n_sequences, n_tokens: n_sequences, n_spare_rows: 256 };
    let mut total = Run { ms: 0.0, plain_ms: 0.0 };
    for step in 0..n_steps {
        let token = ProposedToken {
            token: TokenId(0),
            source: Source::Draft,
            confidence: confidence(step),
            second: None,
        };
        let proposal = [token; N_OFFERED];
        let estimates: Vec<_> =
            sequences.iter().map(|sequence| sequence.estimates(&table, &proposal)).collect();
        let beside = times.beside(plain).expect("it was measured");
        let cost = |n_rows: usize| beside.ms(n_rows - n_sequences);
        controller.went_without();
        let choice = controller.choose(&estimates, load, &cost);
        let mut n_tokens = 0;
        for (i, n) in choice.n_proposed.iter().enumerate() {
            let n_accepted = accepted(step, i, *n).min(*n);
            n_tokens += 1 + n_accepted;
            sequences[i].observe(&table, &proposal[..*n], n_accepted);
            table.observe(&proposal[..*n], n_accepted, None);
        }
        let n_rows = n_sequences + choice.n_rows();
        let ms = true_ms(n_rows, share);
        observe(&mut times, n_rows);
        let plain_ms = true_ms(n_sequences, share);
        controller.settle(
            &choice,
            &Settlement {
                n_plain_tokens: n_sequences,
                n_tokens,
                plain_ms,
                rows_ms: ms - plain_ms,
                drafting_ms: 0.0,
                has_drafted: false,
                ms,
            },
        );
        total.ms += ms;
        total.plain_ms += plain_ms * n_tokens as f64 / n_sequences as f64;
    }
    total
}

impl Run {
    /// Speed beside plain decoding.
    fn speedup(self) -> f64 {
        self.plain_ms / self.ms
    }
}

const LOADS: [(usize, f64); 6] = [(1, 0.05), (1, 0.1), (1, 0.4), (4, 0.1), (16, 0.1), (16, 1.0)];

#[test]
fn whatever_is_accepted_it_costs_at_most_two_per_cent() {
    for (n_sequences, share) in LOADS {
        for n_steps in [80, 300, 2_000] {
            let never = run(n_sequences, n_steps, share, |_, _, _| 0, |_| 0.99);
            // Good until speculation is trusted, then nothing, again and again.
            let phases = run(n_sequences, n_steps, share, |step, _, n| n * ((step / 37 + 1) % 2), |_| 0.9);
            let greedy = run(n_sequences, n_steps, share, |_, _, n| if n < 3 { n } else { 0 }, |_| 0.97);
            let liar = run(
                n_sequences,
                n_steps,
                share,
                |step, _, n| if step.is_multiple_of(2) { 0 } else { n.min(1) },
                |step| if step.is_multiple_of(2) { 0.99 } else { 0.05 },
            );
            let mut random = Random(7);
            let edge =
                run(n_sequences, n_steps, share, |_, _, _| usize::from(random.next() < share), |_| 0.8);
            for (name, run) in
                [("never", never), ("phases", phases), ("greedy", greedy), ("liar", liar), ("edge", edge)]
            {
                let speedup = run.speedup();
                assert!(speedup >= 0.98, "{name}, {n_sequences} x {share}, {n_steps} steps: {speedup:.3}");
            }
        }
    }
}

/// Speed of always proposing k tokens.
fn fixed(k: usize, n_sequences: usize, share: f64, alpha: f64) -> f64 {
    let tokens: f64 = (0..=k).map(|i| alpha.powi(i as i32)).sum();
    tokens * true_ms(n_sequences, share) / true_ms(n_sequences * (k + 1), share)
}

#[test]
fn where_it_pays_it_comes_near_the_best_fixed_number() {
    for (n_sequences, share) in LOADS {
        for alpha in [0.5, 0.7, 0.8, 0.9] {
            let mut random = Random(11);
            let accept = |_: usize, _: usize, n: usize| (0..n).take_while(|_| random.next() < alpha).count();
            let speedup = run(n_sequences, 2_000, share, accept, |_| 0.7).speedup();
            let best = (0..=N_OFFERED).map(|k| fixed(k, n_sequences, share, alpha)).fold(0.0, f64::max);
            assert!(
                speedup >= 0.94 * best,
                "{n_sequences} x {share}, acceptance {alpha}: {speedup:.3} of {best:.3}"
            );
        }
    }
}

#[test]
fn confidence_tells_when_to_propose() {
    // Every other step is hopeless and its source knows it; no fixed number can tell.
    let (share, alpha) = (0.25, 0.9);
    let mut random = Random(3);
    let accept = |step: usize, _: usize, n: usize| {
        if step.is_multiple_of(2) { (0..n).take_while(|_| random.next() < alpha).count() } else { 0 }
    };
    let speedup =
        run(1, 3_000, share, accept, |step| if step.is_multiple_of(2) { 0.92 } else { 0.2 }).speedup();
    let one = |k: usize| {
        let tokens: f64 = 1.0 + (1..=k).map(|i| alpha.powi(i as i32)).sum::<f64>() / 2.0;
        tokens * true_ms(1, share) / true_ms(1 + k, share)
    };
    let best = (0..=N_OFFERED).map(one).fold(0.0, f64::max);
    assert!(speedup > 1.1 * best, "{speedup:.3} of {best:.3}");
}
