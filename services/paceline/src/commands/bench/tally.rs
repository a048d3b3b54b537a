//! What a class of prompts came to in one mode of speculation, summed up over its groups of requests. Pure.

use serde_json::{Value, json};

use super::proposals::Proposals;
use crate::answer::Answer;

/// Tokens and seconds of some requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    n_requests: usize,
    n_tokens: u64,
    /// Tokens after each request's first, and the seconds they took together.
    n_decoded: u64,
    decode_s: f64,
    /// With the prompts.
    total_s: f64,
    proposals: Proposals,
    n_different: usize,
}

impl Tally {
    /// Adds requests that were sent together. `expected` are the tokens of the same requests without speculation.
    pub fn add(&mut self, answers: &[Answer], expected: &[Answer]) {
        let micros = |of: fn(&Answer) -> u64| answers.iter().map(of);
        let first_us = micros(|answer| answer.timings.first_token_us).min().unwrap_or(0);
        let last_us = micros(|answer| answer.timings.total_us).max().unwrap_or(0);
        self.decode_s += last_us.saturating_sub(first_us) as f64 / 1e6;
        self.total_s += last_us as f64 / 1e6;
        self.n_requests += answers.len();
        for (answer, expected) in answers.iter().zip(expected) {
            self.n_tokens += answer.tokens.len() as u64;
            self.n_decoded += answer.tokens.len().saturating_sub(1) as u64;
            self.n_different += usize::from(answer.tokens != expected.tokens);
            answer.speculation.iter().for_each(|source| self.proposals.add(source));
        }
    }

    /// Adds what another one has.
    pub fn merge(&mut self, other: &Self) {
        self.n_requests += other.n_requests;
        self.n_tokens += other.n_tokens;
        self.n_decoded += other.n_decoded;
        self.decode_s += other.decode_s;
        self.total_s += other.total_s;
        self.proposals.merge(&other.proposals);
        self.n_different += other.n_different;
    }

    /// Whether every request had the expected tokens.
    pub fn is_identical(&self) -> bool {
        self.n_different == 0
    }

    /// Decoded tokens a second, of all requests together.
    pub fn tokens_per_s(&self) -> f64 {
        self.n_decoded as f64 / self.decode_s.max(1e-9)
    }

    /// The same, with the time of the prompts.
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
        let n_accepted = self.proposals.n_accepted();
        self.n_tokens as f64 / self.n_tokens.saturating_sub(n_accepted).max(1) as f64
    }

    /// What became of proposals, by source and position.
    pub fn proposals(&self) -> &Proposals {
        &self.proposals
    }

    /// One object of `--json`; `off` is what the same requests came to without speculation.
    pub fn json(&self, (class, batch, mode): (&str, usize, &str), off: &Self) -> Value {
        json!({
            "class": class,
            "batch": batch,
            "mode": mode,
            "tokens_per_s": rounded(self.tokens_per_s(), 2),
            "speedup_vs_off": rounded(self.tokens_per_s() / off.tokens_per_s(), 3),
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
        format!(
            "{class:<13}{batch:>5}  {mode:<6}{:>9.1}{:>9.2}{:>9.2}{acceptance:>11}{:>12.2}  {}\n",
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
    "class        batch  mode   tokens/s  speedup    total acceptance tokens/pass  identical\n";

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
        let off =
            [answer(&[1, 2, 3, 4, 5], 1_000_000, 5_000_000, &[]), answer(&[7, 8], 2_000_000, 3_000_000, &[])];
        let fast = [
            answer(&[1, 2, 3, 4, 5], 1_000_000, 3_000_000, &[2, 1]),
            answer(&[7, 8], 1_000_000, 3_000_000, &[]),
        ];
        let (mut plain, mut speculated) = (Tally::default(), Tally::default());
        plain.add(&off, &off);
        speculated.add(&fast, &off);
        assert_eq!((plain.tokens_per_s(), speculated.tokens_per_s()), (1.25, 2.5));
        let object = speculated.json(("code", 2, "ngram"), &plain);
        assert_eq!(object["speedup_vs_off"], 2.0);
        assert_eq!(object["total_speedup_vs_off"], 1.667);
        assert_eq!((&object["acceptance"], &object["identical"]), (&json!(0.75), &json!(true)));
        assert_eq!(object["tokens_per_pass"], 1.75, "seven tokens in four passes");
        assert_eq!(object["proposals"][0]["accepted_tokens_per_pos"], json!([2, 1]));
        assert_eq!(plain.json(("code", 2, "off"), &plain)["acceptance"], Value::Null);
    }

    #[test]
    fn one_other_token_is_told() {
        let (off, other) = ([answer(&[1, 2], 1, 2, &[])], [answer(&[1, 3], 1, 2, &[1])]);
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
}
