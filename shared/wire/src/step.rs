//! Step plans and results between protobuf and the domain. Shape is checked here; meaning is the shard's matter.

use paceline_domain::{
    BlockCopy, BlockId, Branch, Epoch, HeldBack, SampledToken, SamplingParams, ScoredToken, Scoring,
    SequenceChunk, SequenceId, SequenceOpen, SequenceSamples, SequenceScores, StepNumber, StepPlan,
    StepResult, StepTimings, TokenId, TokenLogprob,
};

use crate::{ProtocolError, shard};

fn tokens(ids: &[TokenId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

fn token_ids(ids: Vec<u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

fn blocks(ids: &[BlockId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

fn block_ids(ids: Vec<u32>) -> Vec<BlockId> {
    ids.into_iter().map(BlockId).collect()
}

impl From<&SamplingParams> for shard::Sampling {
    fn from(params: &SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params
                .logit_bias
                .iter()
                .map(|(token, bias)| shard::LogitBias { token: token.0, bias: *bias })
                .collect(),
            seed: params.seed,
            n_logprobs: params.n_logprobs,
        }
    }
}

impl From<shard::Sampling> for SamplingParams {
    fn from(sampling: shard::Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(|entry| (TokenId(entry.token), entry.bias)).collect(),
            seed: sampling.seed,
            n_logprobs: sampling.n_logprobs,
        }
    }
}

impl From<&SequenceOpen> for shard::SequenceOpen {
    fn from(open: &SequenceOpen) -> Self {
        Self {
            sequence: open.sequence.0,
            sampling: Some((&open.sampling).into()),
            n_prompt: open.n_prompt,
            cached_tokens: tokens(&open.cached_tokens),
            cached_blocks: blocks(&open.cached_blocks),
            copied: open.copied.map(|copy| shard::BlockCopy { from: copy.from.0, to: copy.to.0 }),
            held_back: open
                .held_back
                .as_ref()
                .map(|held| shard::HeldBack { until: held.until, tokens: tokens(&held.tokens) }),
            is_constrained: open.is_constrained,
        }
    }
}

impl TryFrom<shard::SequenceOpen> for SequenceOpen {
    type Error = ProtocolError;

    fn try_from(open: shard::SequenceOpen) -> Result<Self, ProtocolError> {
        let sampling = open
            .sampling
            .ok_or_else(|| ProtocolError(format!("sequence {} has no sampling", open.sequence)))?;
        Ok(Self {
            sequence: SequenceId(open.sequence),
            sampling: sampling.into(),
            n_prompt: open.n_prompt,
            cached_tokens: token_ids(open.cached_tokens),
            cached_blocks: block_ids(open.cached_blocks),
            copied: open.copied.map(|copy| BlockCopy { from: BlockId(copy.from), to: BlockId(copy.to) }),
            held_back: open
                .held_back
                .map(|held| HeldBack { until: held.until, tokens: token_ids(held.tokens) }),
            is_constrained: open.is_constrained,
        })
    }
}

impl From<&SequenceChunk> for shard::SequenceChunk {
    fn from(chunk: &SequenceChunk) -> Self {
        Self {
            sequence: chunk.sequence.0,
            start_pos: chunk.start_pos,
            tokens: tokens(&chunk.tokens),
            n_kept_blocks: chunk.n_kept_blocks,
            new_blocks: blocks(&chunk.new_blocks),
            n_sampled: chunk.n_sampled,
            runs_ahead: chunk.runs_ahead,
            scoring: scoring(&chunk.scoring),
            branches: chunk.branches.iter().map(branch).collect(),
        }
    }
}

fn branch(branch: &Branch) -> shard::Branch {
    let Branch { after, token, block } = *branch;
    shard::Branch { after, token: token.0, block: block.0 }
}

fn scoring(scoring: &Scoring) -> Option<shard::Scoring> {
    let is_asked = !scoring.tokens.is_empty();
    is_asked.then(|| shard::Scoring { tokens: tokens(&scoring.tokens), n_top: scoring.n_top })
}

impl TryFrom<shard::SequenceChunk> for SequenceChunk {
    type Error = ProtocolError;

    fn try_from(chunk: shard::SequenceChunk) -> Result<Self, ProtocolError> {
        let (n_tokens, n_sampled) = (chunk.tokens.len(), chunk.n_sampled as usize);
        if n_tokens == 0 || n_sampled > n_tokens {
            return Err(ProtocolError(format!(
                "sequence {}: a chunk of {n_tokens} tokens cannot sample {n_sampled}",
                chunk.sequence
            )));
        }
        if chunk.runs_ahead && n_tokens != 1 {
            return Err(ProtocolError(format!(
                "sequence {}: {n_tokens} tokens in place of the one sampled before",
                chunk.sequence
            )));
        }
        let scoring = chunk.scoring.unwrap_or_default();
        let scoring = Scoring { tokens: token_ids(scoring.tokens), n_top: scoring.n_top };
        if scoring.tokens.len() > n_tokens - n_sampled {
            return Err(ProtocolError(format!(
                "sequence {}: {} tokens cannot be scored by {} rows",
                chunk.sequence,
                scoring.tokens.len(),
                n_tokens - n_sampled
            )));
        }
        if let Some(branch) =
            chunk.branches.iter().find(|branch| branch.after >= chunk.n_sampled.saturating_sub(1))
        {
            return Err(ProtocolError(format!(
                "sequence {}: a branch after {} proposals of {}",
                chunk.sequence,
                branch.after,
                n_sampled.saturating_sub(1)
            )));
        }
        let branch = |branch: shard::Branch| Branch {
            after: branch.after,
            token: TokenId(branch.token),
            block: BlockId(branch.block),
        };
        Ok(Self {
            sequence: SequenceId(chunk.sequence),
            start_pos: chunk.start_pos,
            tokens: token_ids(chunk.tokens),
            n_kept_blocks: chunk.n_kept_blocks,
            new_blocks: block_ids(chunk.new_blocks),
            n_sampled: chunk.n_sampled,
            runs_ahead: chunk.runs_ahead,
            scoring,
            branches: chunk.branches.into_iter().map(branch).collect(),
        })
    }
}

impl From<&StepPlan> for shard::Plan {
    /// The trace context is left empty: the sender's span fills it in.
    fn from(plan: &StepPlan) -> Self {
        Self {
            epoch: plan.epoch.0,
            step: plan.step.0,
            closes: plan.closes.iter().map(|sequence| sequence.0).collect(),
            opens: plan.opens.iter().map(Into::into).collect(),
            chunks: plan.chunks.iter().map(Into::into).collect(),
            traceparent: String::new(),
            tracestate: String::new(),
        }
    }
}

impl TryFrom<shard::Plan> for StepPlan {
    type Error = ProtocolError;

    fn try_from(plan: shard::Plan) -> Result<Self, ProtocolError> {
        Ok(Self {
            epoch: Epoch(plan.epoch),
            step: StepNumber(plan.step),
            closes: plan.closes.into_iter().map(SequenceId).collect(),
            opens: plan.opens.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            chunks: plan.chunks.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<&SampledToken> for shard::SampledToken {
    fn from(sampled: &SampledToken) -> Self {
        Self {
            token: sampled.token.0,
            logprob: sampled.logprob,
            top_tokens: sampled.top_logprobs.iter().map(|top| top.token.0).collect(),
            top_logprobs: sampled.top_logprobs.iter().map(|top| top.logprob).collect(),
        }
    }
}

impl TryFrom<shard::SampledToken> for SampledToken {
    type Error = ProtocolError;

    fn try_from(sampled: shard::SampledToken) -> Result<Self, ProtocolError> {
        Ok(Self {
            token: TokenId(sampled.token),
            logprob: sampled.logprob,
            top_logprobs: top_logprobs(sampled.top_tokens, sampled.top_logprobs)?,
        })
    }
}

fn top_logprobs(tokens: Vec<u32>, logprobs: Vec<f32>) -> Result<Vec<TokenLogprob>, ProtocolError> {
    let (n_tokens, n_logprobs) = (tokens.len(), logprobs.len());
    if n_tokens != n_logprobs {
        return Err(ProtocolError(format!("{n_tokens} top tokens with {n_logprobs} log probabilities")));
    }
    let top = tokens.into_iter().zip(logprobs);
    Ok(top.map(|(token, logprob)| TokenLogprob { token: TokenId(token), logprob }).collect())
}

impl From<&SequenceScores> for shard::Scores {
    fn from(scores: &SequenceScores) -> Self {
        let token = |scored: &ScoredToken| shard::ScoredToken {
            logprob: scored.logprob,
            top_tokens: scored.top_logprobs.iter().map(|top| top.token.0).collect(),
            top_logprobs: scored.top_logprobs.iter().map(|top| top.logprob).collect(),
        };
        Self { sequence: scores.sequence.0, tokens: scores.tokens.iter().map(token).collect() }
    }
}

impl TryFrom<shard::Scores> for SequenceScores {
    type Error = ProtocolError;

    fn try_from(scores: shard::Scores) -> Result<Self, ProtocolError> {
        let token = |scored: shard::ScoredToken| {
            let top_logprobs = top_logprobs(scored.top_tokens, scored.top_logprobs)?;
            Ok(ScoredToken { logprob: scored.logprob, top_logprobs })
        };
        let tokens = scores.tokens.into_iter().map(token).collect::<Result<_, _>>()?;
        Ok(Self { sequence: SequenceId(scores.sequence), tokens })
    }
}

impl From<&StepResult> for shard::Result {
    fn from(result: &StepResult) -> Self {
        let samples = result.samples.iter().map(|samples| shard::Samples {
            sequence: samples.sequence.0,
            tokens: samples.tokens.iter().map(Into::into).collect(),
        });
        Self {
            epoch: result.epoch.0,
            step: result.step.0,
            samples: samples.collect(),
            total_us: result.timings.total_us,
            collective_wait_us: result.timings.collective_wait_us,
            collective_bytes: result.timings.collective_bytes,
            scores: result.scores.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<shard::Result> for StepResult {
    type Error = ProtocolError;

    fn try_from(result: shard::Result) -> Result<Self, ProtocolError> {
        let samples = result.samples.into_iter().map(|samples| {
            if samples.tokens.is_empty() {
                return Err(ProtocolError(format!("sequence {}: samples without a token", samples.sequence)));
            }
            Ok(SequenceSamples {
                sequence: SequenceId(samples.sequence),
                tokens: samples.tokens.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            })
        });
        Ok(Self {
            epoch: Epoch(result.epoch),
            step: StepNumber(result.step),
            samples: samples.collect::<Result<_, _>>()?,
            scores: result.scores.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            timings: StepTimings {
                total_us: result.total_us,
                collective_wait_us: result.collective_wait_us,
                collective_bytes: result.collective_bytes,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use paceline_domain::UNKNOWN_TOKEN;

    use super::*;

    fn plan() -> StepPlan {
        let sampling = SamplingParams {
            logit_bias: vec![(TokenId(3), -1.5)],
            seed: u64::MAX,
            n_logprobs: Some(0),
            ..SamplingParams::greedy()
        };
        StepPlan {
            epoch: Epoch(7),
            step: StepNumber(9),
            closes: vec![SequenceId(1)],
            opens: vec![SequenceOpen {
                sequence: SequenceId(2),
                sampling,
                n_prompt: 3,
                cached_tokens: vec![TokenId(4); 17],
                cached_blocks: vec![BlockId(5)],
                copied: Some(BlockCopy { from: BlockId(3), to: BlockId(9) }),
                held_back: Some(HeldBack { until: 20, tokens: vec![TokenId(2)] }),
                is_constrained: true,
            }],
            chunks: vec![SequenceChunk {
                sequence: SequenceId(2),
                start_pos: 16,
                tokens: vec![TokenId(6), TokenId(7)],
                n_kept_blocks: 1,
                new_blocks: vec![BlockId(8)],
                n_sampled: 1,
                runs_ahead: false,
                scoring: Scoring { tokens: vec![TokenId(7)], n_top: 2 },
                branches: Vec::new(),
            }],
        }
    }

    #[test]
    fn a_plan_survives_the_wire() {
        assert_eq!(StepPlan::try_from(shard::Plan::from(&plan())), Ok(plan()));
        let mut ahead = plan();
        (ahead.chunks[0].tokens, ahead.chunks[0].runs_ahead) = (vec![UNKNOWN_TOKEN], true);
        ahead.chunks[0].scoring = Scoring::default();
        assert_eq!(StepPlan::try_from(shard::Plan::from(&ahead)), Ok(ahead));
        let mut verifying = plan();
        let branch = |after| Branch { after, token: TokenId(3), block: BlockId(11) };
        let chunk = &mut verifying.chunks[0];
        (chunk.n_sampled, chunk.scoring, chunk.branches) = (2, Scoring::default(), vec![branch(0)]);
        assert_eq!(StepPlan::try_from(shard::Plan::from(&verifying)), Ok(verifying.clone()));
        verifying.chunks[0].branches.push(branch(1));
        let error = StepPlan::try_from(shard::Plan::from(&verifying)).expect_err("there is one proposal");
        assert!(error.0.contains("a branch after 1 proposals of 1"), "{error}");
    }

    #[test]
    fn a_result_survives_the_wire() {
        let token = SampledToken {
            token: TokenId(1),
            logprob: Some(-0.5),
            top_logprobs: vec![TokenLogprob { token: TokenId(1), logprob: -0.5 }],
        };
        let result = StepResult {
            epoch: Epoch(7),
            step: StepNumber(9),
            scores: vec![SequenceScores {
                sequence: SequenceId(3),
                tokens: vec![ScoredToken { logprob: -1.5, top_logprobs: token.top_logprobs.clone() }],
            }],
            samples: vec![SequenceSamples { sequence: SequenceId(2), tokens: vec![token] }],
            timings: StepTimings { total_us: 1, collective_wait_us: 2, collective_bytes: 3 },
        };
        assert_eq!(StepResult::try_from(shard::Result::from(&result)), Ok(result));
    }

    #[test]
    fn impossible_chunks_are_refused() {
        let mut wire = shard::Plan::from(&plan());
        wire.chunks[0].n_sampled = 3;
        let error = StepPlan::try_from(wire).expect_err("3 of 2");
        assert!(error.0.contains("cannot sample 3"), "{error}");
        let mut wire = shard::Plan::from(&plan());
        wire.chunks[0].runs_ahead = true;
        let error = StepPlan::try_from(wire).expect_err("2 tokens ahead");
        assert!(error.0.contains("2 tokens in place"), "{error}");
        let mut wire = shard::Plan::from(&plan());
        wire.chunks[0].n_sampled = 2;
        let error = StepPlan::try_from(wire).expect_err("both rows sample");
        assert!(error.0.contains("1 tokens cannot be scored by 0 rows"), "{error}");
    }

    #[test]
    fn a_sequence_without_sampling_is_refused() {
        let mut wire = shard::Plan::from(&plan());
        wire.opens[0].sampling = None;
        assert!(StepPlan::try_from(wire).is_err());
    }
}
