//! The output side of one choice of a request: committed tokens to pieces of text. Its state is a function of the tokens
//! pushed. It applies the stop rules and does not know about steps, shards or other choices.

use std::{collections::HashSet, sync::Arc, time::Instant};

use paceline_domain::{
    FinishReason, GenerateRequest, HeldBack, SampledToken, ScoredToken, StopRules, TokenId, TokenLogprob,
    Usage,
};
use paceline_speculation::{Source, SourceCounters};
use paceline_text::{Detokenizer, StopMatcher, Tokenizer};
use paceline_wire::inference as proto;

/// Moments of a request that timings are made of.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Arrival.
    pub arrived: Instant,
    /// Its first step was sent.
    pub scheduled: Option<Instant>,
    /// Its first token was committed.
    pub first_token: Option<Instant>,
    /// Its last token so far was committed.
    pub last_token: Option<Instant>,
}

/// What became of a choice so far.
pub struct Output {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop_matcher: StopMatcher,
    rules: StopRules,
    end_tokens: HashSet<TokenId>,
    n_prompt: u32,
    n_tokens: u32,
    n_cached: Option<u32>,
    /// Moments, set by the engine.
    pub clock: Clock,
}

/// What to send for one token, and the end if this was it.
pub struct Pushed {
    /// What to send now.
    pub delta: proto::Delta,
    /// Set when no token must follow.
    pub finish: Option<FinishReason>,
}

impl Output {
    /// Before the first token.
    pub fn new(request: &GenerateRequest, tokenizer: &Arc<Tokenizer>, arrived: Instant) -> Self {
        let mut end_tokens: HashSet<TokenId> = request.stop.stop_tokens.iter().copied().collect();
        if !request.stop.ignore_eos {
            end_tokens.extend(tokenizer.eos_tokens());
        }
        Self {
            tokenizer: tokenizer.clone(),
            detokenizer: Detokenizer::new(tokenizer.clone()),
            stop_matcher: StopMatcher::new(request.stop.stop_strings.clone()),
            rules: request.stop.clone(),
            end_tokens,
            n_prompt: request.prompt.tokens().len() as u32,
            n_tokens: 0,
            n_cached: None,
            clock: Clock { arrived, scheduled: None, first_token: None, last_token: None },
        }
    }

    /// The tokens that would end it too early.
    pub fn held_back(&self) -> Option<HeldBack> {
        let mut tokens: Vec<TokenId> = self.end_tokens.iter().copied().collect();
        tokens.sort_unstable();
        let until = self.n_prompt + self.rules.min_tokens;
        (self.rules.min_tokens > 0 && !tokens.is_empty()).then_some(HeldBack { until, tokens })
    }

    /// The first so many tokens were in the prefix cache when it began; what is found later, when it goes on after a
    /// pause, does not count.
    pub fn note_cached(&mut self, n_tokens: u32) {
        self.n_cached.get_or_insert(n_tokens.min(self.n_prompt));
    }

    /// Takes a committed token.
    pub fn push(&mut self, sampled: &SampledToken, now: Instant) -> Pushed {
        self.clock.first_token.get_or_insert(now);
        self.clock.last_token = Some(now);
        self.n_tokens += 1;
        let mut text = String::new();
        let mut finish = if self.end_tokens.contains(&sampled.token) {
            Some(FinishReason::StopToken(sampled.token))
        } else {
            let piece = self.detokenizer.push(sampled.token);
            self.match_stop(&piece, &mut text)
        };
        if finish.is_none() && self.n_tokens >= self.rules.max_tokens {
            finish = Some(FinishReason::Length);
        }
        if matches!(finish, Some(FinishReason::StopToken(_) | FinishReason::Length)) {
            let rest = self.detokenizer.finish();
            match self.match_stop(&rest, &mut text) {
                Some(stop_string) => finish = Some(stop_string),
                None => text.push_str(&self.stop_matcher.finish()),
            }
        }
        let delta = proto::Delta {
            text,
            token_ids: vec![sampled.token.0],
            logprobs: sampled
                .logprob
                .map(|logprob| self.logprobs(&sampled.top_logprobs, logprob))
                .into_iter()
                .collect(),
        };
        Pushed { delta, finish }
    }

    fn match_stop(&mut self, piece: &str, text: &mut String) -> Option<FinishReason> {
        let output = self.stop_matcher.push(piece);
        match text.is_empty() {
            true => *text = output.text,
            false => text.push_str(&output.text),
        }
        output.matched.map(FinishReason::StopString)
    }

    /// What the model thinks of tokens of the prompt, the first of them at this position.
    pub fn prompt_logprobs(&self, start_pos: u32, tokens: &[ScoredToken]) -> proto::PromptLogprobs {
        let logprobs = tokens.iter().map(|scored| self.logprobs(&scored.top_logprobs, scored.logprob));
        proto::PromptLogprobs { start_pos, logprobs: logprobs.collect() }
    }

    fn logprobs(&self, top: &[TokenLogprob], logprob: f32) -> proto::TokenLogprobs {
        let top = top.iter().map(|top| proto::TopLogprob {
            token_id: top.token.0,
            logprob: top.logprob,
            token: self.tokenizer.token_bytes(top.token).to_vec(),
        });
        proto::TokenLogprobs { logprob, top: top.collect() }
    }

    /// The last it says; `proposals` is what became of proposals.
    pub fn finished(
        &mut self,
        reason: &FinishReason,
        proposals: Vec<proto::ProposalCounts>,
        now: Instant,
    ) -> proto::Finished {
        let micros =
            |moment: Instant| moment.saturating_duration_since(self.clock.arrived).as_micros() as u64;
        let (kind, stop_string, stop_token_id) = match reason {
            FinishReason::StopToken(token) => (proto::FinishReason::Stop, None, Some(token.0)),
            FinishReason::StopString(i) => (proto::FinishReason::Stop, Some(*i as u32), None),
            FinishReason::Length => (proto::FinishReason::Length, None, None),
            FinishReason::Cancelled => (proto::FinishReason::Cancelled, None, None),
        };
        let usage = self.usage();
        proto::Finished {
            reason: kind.into(),
            stop_string,
            stop_token_id,
            usage: Some(proto::Usage {
                prompt_tokens: usage.n_prompt,
                completion_tokens: usage.n_completion,
                cached_tokens: usage.n_cached,
            }),
            timings: Some(proto::Timings {
                queue_us: self.clock.scheduled.map_or(0, micros),
                first_token_us: self.clock.first_token.map_or(0, micros),
                total_us: micros(now),
            }),
            proposals,
        }
    }

    /// What is still held back when no token will follow, because it might have become a character or a stop string.
    pub fn rest(&mut self) -> Option<proto::Delta> {
        let (mut text, rest) = (String::new(), self.detokenizer.finish());
        if self.match_stop(&rest, &mut text).is_none() {
            text.push_str(&self.stop_matcher.finish());
        }
        let delta = proto::Delta { text, ..proto::Delta::default() };
        (!delta.text.is_empty()).then_some(delta)
    }

    /// Tokens counted so far.
    pub fn usage(&self) -> Usage {
        Usage { n_prompt: self.n_prompt, n_completion: self.n_tokens, n_cached: self.n_cached.unwrap_or(0) }
    }
}

/// For the last chunk: the sources that proposed something.
pub fn proposal_counts(counters: [SourceCounters; Source::ALL.len()]) -> Vec<proto::ProposalCounts> {
    let sources = Source::ALL.into_iter().zip(counters).filter(|(_, counters)| counters.drafts > 0);
    let counts = sources.map(|(source, counters)| proto::ProposalCounts {
        source: source.name().into(),
        drafts: counters.drafts,
        draft_tokens: counters.draft_tokens,
        accepted_tokens: counters.accepted_tokens,
        accepted_tokens_per_pos: counters.accepted_per_position.to_vec(),
        draft_tokens_per_pos: counters.drafted_per_position.to_vec(),
        branches: counters.branches,
        accepted_branches: counters.accepted_branches,
    });
    counts.collect()
}
