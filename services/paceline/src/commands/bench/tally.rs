//! What a class of prompts came to in one mode of speculation, summed up over its groups of requests. Pure.

use serde_json::{Value, json};

use super::{proposals::Proposals, spread::Spread};
use crate::answer::Answer;

/// Tokens and seconds of some requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    n_requests: usize,
    n_tokens: u64,
    decoding: Decoding,
    /// With the prompts.
    total_s: f64,
    proposals: Proposals,
    n_different: usize,
    /// Speed of each group beside that of the same group without speculation.
    speedups: Vec<f64>,
}

/// Tokens after each request's first, and the seconds they took together.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Decoding {
    n_tokens: u64,
    seconds: f64,
}

impl Decoding {
    /// Of requests that were sent together.
    fn of(answers: &[Answer]) -> Self {
        let first_us = answers.iter().map(|answer| answer.timings.first_token_us).min().unwrap_or(0);
        let n_tokens = answers.iter().map(|answer| answer.tokens.len().saturating_sub(1) as u64).sum();
        Self { n_tokens, seconds: last_us(answers).saturating_sub(first_us) as f64 / 1e6 }
    }

    /// Tokens a second.
    fn rate(&self) -> f64 {
        self.n_tokens as f64 / self.seconds.max(1e-9)
    }
}

fn last_us(answers: &[Answer]) -> u64 {
    answers.iter().map(|answer| answer.timings.total_us).max().unwrap_or(0)
}

impl Tally {
    /// Adds requests that were sent together, perhaps several times: the round of median time counts. `off` are the same
    /// rounds without speculation.
    ///
    /// # Panics
    /// When there is no round.
    pub fn add(&mut self, rounds: &[Vec<Answer>], off: &[Vec<Answer>]) {
        let mut by_time: Vec<&Vec<Answer>> = rounds.iter().collect();
        by_time.sort_by(|one, other| Decoding::of(one).seconds.total_cmp(&Decoding::of(other).seconds));
        let answers = by_time[(by_time.len() - 1) / 2];
        let decoding = Decoding::of(answers);
        self.decoding.n_tokens += decoding.n_tokens;
        self.decoding.seconds += decoding.seconds;
        self.total_s += last_us(answers) as f64 / 1e6;
        self.n_requests += answers.len();
        for answer in answers {
            self.n_tokens += answer.tokens.len() as u64;
            answer.speculation.iter().for_each(|source| self.proposals.add(source));
        }
        let pairs = rounds.iter().zip(off);
        let differing = pairs.clone().flat_map(|(answers, off)| answers.iter().zip(off));
        self.n_different += differing.filter(|(answer, off)| answer.tokens != off.tokens).count();
        let rates = pairs.map(|(answers, off)| (Decoding::of(answers), Decoding::of(off)));
        let rates = rates.filter(|(decoding, off)| decoding.n_tokens > 0 && off.n_tokens > 0);
        let ratios: Vec<f64> = rates.map(|(decoding, off)| decoding.rate() / off.rate()).collect();
        // Answers of one token have no speed.
        if !ratios.is_empty() {
            self.speedups.push(Spread::of(&ratios).median);
        }
    }

    /// Adds what another one has.
    pub fn merge(&mut self, other: &Self) {
        self.n_requests += other.n_requests;
        self.n_tokens += other.n_tokens;
        self.decoding.n_tokens += other.decoding.n_tokens;
        self.decoding.seconds += other.decoding.seconds;
        self.total_s += other.total_s;
        self.proposals.merge(&other.proposals);
        self.n_different += other.n_different;
        self.speedups.extend_from_slice(&other.speedups);
    }

    /// Whether every request had the expected tokens.
    pub fn is_identical(&self) -> bool {
        self.n_different == 0
    }

    /// Decoded tokens a second, of all requests together.
    pub fn tokens_per_s(&self) -> f64 {
        self.decoding.rate()
    }

    /// Speeds of the groups beside those without speculation: the middle one and the extremes; none when nothing has a speed.
    pub fn speedups(&self) -> Option<Spread> {
        (!self.speedups.is_empty()).then(|| Spread::of(&self.speedups))
    }

    /// Tokens a second, with the time of the prompts.
    pub fn total_tokens_per_s(&self) -> f64 {
        self.n_tokens as f64 / self.total_s.max(1e-9)
    }

    /// Share of proposed tokens that were accepted; none when nothing was proposed.
    pub fn acceptance(&self) -> Option<f64> {
        let (n_accepted, n_drafted) = (self.proposals.n_accepted(), self.proposals.n_drafted());
        (n_drafted > 0).then(|| n_accepted as f64 / n_drafted as f64)
    }

    /// Tokens that a sequence got from a pass, on average.
    pub fn tokens_per_pass(&self) -> f64 {
        let n_accepted = self.proposals.n_accepted() + self.proposals.n_accepted_branches();
        self.n_tokens as f64 / self.n_tokens.saturating_sub(n_accepted).max(1) as f64
    }

    /// What became of proposals, by source and position.
    pub fn proposals(&self) -> &Proposals {
        &self.proposals
    }

    /// One object of `--json`; `off` is what the same requests came to without speculation.
    pub fn json(&self, (class, batch, mode): (&str, usize, &str), off: &Self) -> Value {
        let speedup = |of: fn(Spread) -> f64| self.speedups().map(|speedups| rounded(of(speedups), 3));
        json!({
            "class": class,
            "batch": batch,
            "mode": mode,
            "tokens_per_s": rounded(self.tokens_per_s(), 2),
            "speedup_vs_off": rounded(self.tokens_per_s() / off.tokens_per_s(), 3),
            "speedup_min": speedup(|speedups| speedups.min),
            "speedup_median": speedup(|speedups| speedups.median),
            "speedup_max": speedup(|speedups| speedups.max),
            "total_speedup_vs_off": rounded(self.total_tokens_per_s() / off.total_tokens_per_s(), 3),
            "acceptance": self.acceptance().map(|share| rounded(share, 3)),
            "tokens_per_pass": rounded(self.tokens_per_pass(), 3),
            "identical": self.is_identical(),
            "requests": self.n_requests,
            "tokens": self.n_tokens,
            "draft_tokens": self.proposals.n_drafted(),
            "proposals": self.proposals.json(),
        })
    }

    /// One line of the table.
    pub fn row(&self, (class, batch, mode): (&str, usize, &str), off: &Self) -> String {
        let acceptance = self.acceptance().map_or("-".into(), |share: f64| format!("{:.0} %", 100.0 * share));
        let least = self.speedups().map_or("-".into(), |speedups| format!("{:.2}", speedups.min));
        format!(
            "{class:<13}{batch:>5}  {mode:<6}{:>9.1}{:>9.2}{least:>7}{:>9.2}{acceptance:>11}{:>12.2}  {}\n",
            self.tokens_per_s(),
            self.tokens_per_s() / off.tokens_per_s(),
            self.total_tokens_per_s() / off.total_tokens_per_s(),
            self.tokens_per_pass(),
            if self.is_identical() { "yes" } else { "NO" },
        )
    }
}

/// Above the rows.
pub const HEADING: &str =
    "class        batch  mode   tokens/s  speedup  least    total acceptance tokens/pass  identical\n";

fn rounded(value: f64, n_decimals: i32) -> f64 {
    let scale = 10_f64.powi(n_decimals);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{ProposalsJson, TimingsJson, UsageJson};

    fn answer(tokens: &[u32], first_token_us: u64, total_us: u64, accepted: &[u64]) -> Answer {
        let n_accepted: u64 = accepted.iter().sum();
        let proposals = ProposalsJson {
            source: "ngram".into(),
            drafts: 2,
            draft_tokens: 4,
            accepted_tokens: n_accepted,
            accepted_tokens_per_pos: accepted.to_vec(),
            draft_tokens_per_pos: vec![2, 2],
            branches: 3,
            accepted_branches: 1,
        };
        Answer {
            choice: None,
            text: String::new(),
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish_reason: "stop",
            usage: UsageJson { prompt_tokens: 1, completion_tokens: tokens.len() as u32, cached_tokens: 0 },
            timings: TimingsJson { queue_us: 0, first_token_us, total_us, decode_tokens_per_second: None },
            speculation: if accepted.is_empty() { Vec::new() } else { vec![proposals] },
            model: "m".into(),
            seed: 0,
        }
    }

    #[test]
    fn a_group_is_timed_from_its_first_token_to_its_last() {
        let off = [vec![
            answer(&[1, 2, 3, 4, 5], 1_000_000, 5_000_000, &[]),
            answer(&[7, 8], 2_000_000, 3_000_000, &[]),
        ]];
        let fast = [vec![
            answer(&[1, 2, 3, 4, 5], 1_000_000, 3_000_000, &[2, 1]),
            answer(&[7, 8], 1_000_000, 3_000_000, &[]),
        ]];
        let (mut plain, mut speculated) = (Tally::default(), Tally::default());
        plain.add(&off, &off);
        speculated.add(&fast, &off);
        assert_eq!((plain.tokens_per_s(), speculated.tokens_per_s()), (1.25, 2.5));
        let object = speculated.json(("code", 2, "ngram"), &plain);
        assert_eq!(object["speedup_vs_off"], 2.0);
        assert_eq!(object["total_speedup_vs_off"], 1.667);
        assert_eq!((&object["acceptance"], &object["identical"]), (&json!(0.75), &json!(true)));
        assert_eq!(object["tokens_per_pass"], 2.333, "seven tokens in three passes");
        assert_eq!(object["proposals"][0]["accepted_tokens_per_pos"], json!([2, 1]));
        assert_eq!(plain.json(("code", 2, "off"), &plain)["acceptance"], Value::Null);
    }

    #[test]
    fn one_other_token_is_told() {
        let (off, other) = ([vec![answer(&[1, 2], 1, 2, &[])]], [vec![answer(&[1, 3], 1, 2, &[1])]]);
        let mut tally = Tally::default();
        tally.add(&off, &off);
        assert!(tally.is_identical());
        tally.add(&other, &off);
        assert!(!tally.is_identical());
        assert!(tally.row(("code", 1, "draft"), &tally).ends_with("NO\n"));
        let mut all = Tally::default();
        all.merge(&tally);
        assert!(!all.is_identical());
    }

    /// Three tokens after the first, in so many seconds.
    fn round(seconds: u64) -> Vec<Answer> {
        vec![answer(&[1, 2, 3, 4], 1_000_000, 1_000_000 * (1 + seconds), &[])]
    }

    #[test]
    fn of_several_rounds_the_median_counts_and_ratios_are_of_one_round() {
        // The machine was slow in the second round and in the last one of mode off.
        let off = [round(2), round(8), round(9)];
        let fast = [round(1), round(4), round(1)];
        let (mut plain, mut speculated) = (Tally::default(), Tally::default());
        plain.add(&off, &off);
        speculated.add(&fast, &off);
        assert_eq!((plain.tokens_per_s(), speculated.tokens_per_s()), (3.0 / 8.0, 3.0));
        assert_eq!(speculated.json(("code", 1, "auto"), &plain)["speedup_min"], 2.0);
        speculated.add(&[round(8)], &[round(4)]);
        let Spread { min, median, max } = speculated.speedups().expect("two groups");
        assert_eq!((min, median, max), (0.5, 1.25, 2.0));
        speculated.add(&[vec![answer(&[1], 1, 1, &[])]], &[vec![answer(&[1], 1, 1, &[])]]);
        assert_eq!(speculated.speedups().expect("two groups").min, 0.5, "one token has no speed");
    }
}
