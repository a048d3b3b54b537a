//! Sampling parameters and sampled tokens. Checked at construction, plain afterwards; the mathematics live in
//! the `sampling` crate.

use crate::TokenId;

/// Most entries a logit bias may have.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most alternatives that log probabilities can be asked for.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// How the next token is chosen from a row of logits.
///
/// The order of operations is fixed: repetition, presence and frequency penalties, bias, temperature,
/// top-k, top-p, min-p, then noise.
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingParams {
    /// 0 chooses the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that is in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token for each time it is in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of the named tokens; sorted by token, without duplicates.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the noise. The same seed gives the same tokens.
    pub seed: u64,
    /// `Some(n)`: report the log probability of each sampled token and of the n likeliest ones.
    pub n_logprobs: Option<u32>,
}

/// The seed of a choice: the request's own for the first, for the others a number without pattern, so that seeds that
/// follow each other have no choices in common (the mix of Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    if choice == 0 {
        return seed;
    }
    let state = seed.wrapping_add(u64::from(choice).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            n_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Parameters that always choose the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Those of one of several completions of a prompt, from 0: the same but for the seed.
    pub fn of_choice(&self, choice: u32) -> Self {
        Self { seed: choice_seed(self.seed, choice), ..self.clone() }
    }

    /// Every limit that is violated, in words that say what is allowed; empty when all is well.
    pub fn problems(&self, n_vocab: u32) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |name: &str, value: f32, low: f32, high: f32| {
            if !(value >= low && value <= high) {
                problems.push(format!("{name} is {value}; it must be from {low} to {high}"));
            }
        };
        check("temperature", self.temperature, 0.0, 100.0);
        check("top_p", self.top_p, f32::MIN_POSITIVE, 1.0);
        check("min_p", self.min_p, 0.0, 1.0);
        check("repetition_penalty", self.repetition_penalty, 0.01, 100.0);
        check("presence_penalty", self.presence_penalty, -100.0, 100.0);
        check("frequency_penalty", self.frequency_penalty, -100.0, 100.0);
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            problems.push(format!(
                "logit_bias has {} entries; at most {MAX_LOGIT_BIAS} are allowed",
                self.logit_bias.len()
            ));
        }
        for (token, bias) in self.logit_bias.iter().take(MAX_LOGIT_BIAS) {
            if token.0 >= n_vocab {
                problems.push(format!("logit_bias names token {token}; the vocabulary has {n_vocab} tokens"));
            }
            if !(-100.0..=100.0).contains(bias) {
                problems.push(format!("logit_bias of token {token} is {bias}; it must be from -100 to 100"));
            }
        }
        if let Some(n) = self.n_logprobs.filter(|n| *n > MAX_TOP_LOGPROBS) {
            problems
                .push(format!("logprobs asks for {n} alternatives; at most {MAX_TOP_LOGPROBS} are given"));
        }
        problems
    }
}

/// A token with its log probability under the model, before temperature and filters, after penalties and bias.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What the model thinks of a token that is there already: before penalties, bias, temperature and filters.
#[derive(Clone, PartialEq, Debug)]
pub struct ScoredToken {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens in its place, likeliest first, as many as asked for.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// What one sampled row gives.
#[derive(Clone, PartialEq, Debug)]
pub struct SampledToken {
    /// The token the target chose.
    pub token: TokenId,
    /// Its log probability, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, likeliest first, as many as asked for.
    pub top_logprobs: Vec<TokenLogprob>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_value_is_named_with_its_limit() {
        let params = SamplingParams {
            temperature: -1.0,
            top_p: f32::NAN,
            logit_bias: vec![(TokenId(9), 500.0)],
            n_logprobs: Some(99),
            ..SamplingParams::default()
        };
        let problems = params.problems(8);
        assert_eq!(problems.len(), 5, "{problems:?}");
        assert!(problems[0].contains("temperature is -1"));
        assert!(problems[1].contains("top_p is NaN"));
    }

    #[test]
    fn choices_have_seeds_of_their_own_that_never_change() {
        let mut seeds: Vec<u64> =
            (0..100).flat_map(|seed| (0..16).map(move |choice| choice_seed(seed, choice))).collect();
        assert_eq!(seeds[..3], [0, 16_294_208_416_658_607_535, 7_960_286_522_194_355_700]);
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 1600);
        assert_eq!(SamplingParams { seed: 7, ..SamplingParams::greedy() }.of_choice(0).seed, 7);
    }

    #[test]
    fn defaults_and_greedy_are_valid() {
        assert!(SamplingParams::default().problems(1).is_empty());
        assert!(SamplingParams::greedy().problems(1).is_empty());
    }
}
