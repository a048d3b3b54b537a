//! Tokens that a plan leaves open, because the step before it samples them: rank 0 knows them and tells the others.
//! It samples nothing and does not know how plans are made.

use std::collections::HashMap;

use paceline_collectives::{Collective, CollectiveError};
use paceline_domain::{SequenceId, SequenceSamples, StepPlan, TokenId};

use crate::{executor::ExecutorError, sequences::PlanError};

const TOKEN_BYTES: usize = size_of::<u32>();

/// What rank 0 sampled in the last step: for each sequence the last token and its position. Empty on other ranks.
#[derive(Debug, Default)]
pub struct LastSamples(HashMap<SequenceId, (u32, TokenId)>);

impl LastSamples {
    /// Forgets the step before and keeps this one's; `samples` has one entry for each chunk that samples, in order.
    pub fn replace(&mut self, plan: &StepPlan, samples: &[SequenceSamples]) {
        self.0.clear();
        let chunks = plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0);
        self.0.extend(chunks.zip(samples).filter_map(|(chunk, samples)| {
            let first = chunk.start_pos as usize + chunk.tokens.len() - chunk.n_sampled as usize;
            let position = (first + samples.tokens.len()) as u32;
            samples.tokens.last().map(|last| (chunk.sequence, (position, last.token)))
        }));
    }

    /// Puts the tokens of chunks that run ahead where the plan has none. Every rank gets the same ones.
    ///
    /// # Errors
    /// When the step before sampled no token for that place, or a peer is late or gone.
    pub fn fill(&self, plan: &mut StepPlan, collective: &mut dyn Collective) -> Result<(), ExecutorError> {
        let ahead: Vec<_> = plan.chunks.iter_mut().filter(|chunk| chunk.runs_ahead).collect();
        if ahead.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; ahead.len() * TOKEN_BYTES];
        if collective.rank() == 0 {
            for (chunk, bytes) in ahead.iter().zip(bytes.as_chunks_mut::<TOKEN_BYTES>().0) {
                *bytes = self.token(chunk.sequence, chunk.start_pos)?.0.to_le_bytes();
            }
        }
        broadcast(collective, &mut bytes)?;
        for (chunk, bytes) in ahead.into_iter().zip(bytes.as_chunks::<TOKEN_BYTES>().0) {
            chunk.tokens = vec![TokenId(u32::from_le_bytes(*bytes))];
        }
        Ok(())
    }

    fn token(&self, sequence: SequenceId, position: u32) -> Result<TokenId, PlanError> {
        let fail = |problem: String| PlanError { sequence, problem };
        match self.0.get(&sequence) {
            Some((sampled_at, token)) if *sampled_at == position => Ok(*token),
            Some((sampled_at, _)) => {
                Err(fail(format!("goes on at {position} with a token that was sampled for {sampled_at}")))
            }
            None => Err(fail("goes on with a token of the step before, which sampled none".into())),
        }
    }
}

fn broadcast(collective: &mut dyn Collective, bytes: &mut [u8]) -> Result<(), CollectiveError> {
    if collective.n_ranks() > 1 { collective.broadcast_from_first(bytes) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use paceline_collectives::Solo;
    use paceline_domain::{Epoch, SampledToken, Scoring, SequenceChunk, StepNumber, UNKNOWN_TOKEN};

    use super::*;

    fn chunk(id: u64, start_pos: u32, tokens: &[u32], n_sampled: u32) -> SequenceChunk {
        SequenceChunk {
            sequence: SequenceId(id),
            start_pos,
            tokens: tokens.iter().copied().map(TokenId).collect(),
            new_blocks: Vec::new(),
            n_kept_blocks: 1,
            n_sampled,
            runs_ahead: false,
            scoring: Scoring::default(),
            branches: Vec::new(),
        }
    }

    fn ahead(id: u64, start_pos: u32) -> SequenceChunk {
        SequenceChunk { runs_ahead: true, ..chunk(id, start_pos, &[UNKNOWN_TOKEN.0], 1) }
    }

    fn plan(chunks: Vec<SequenceChunk>) -> StepPlan {
        StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens: Vec::new(), chunks }
    }

    fn samples(id: u64, tokens: &[u32]) -> SequenceSamples {
        let sampled =
            |id: &u32| SampledToken { token: TokenId(*id), logprob: None, top_logprobs: Vec::new() };
        SequenceSamples { sequence: SequenceId(id), tokens: tokens.iter().map(sampled).collect() }
    }

    #[test]
    fn open_tokens_are_those_of_the_step_before() {
        let mut last = LastSamples::default();
        let before = plan(vec![
            chunk(1, 4, &[9], 1),
            chunk(2, 0, &[1, 2, 3], 0),
            chunk(3, 0, &[1, 2, 3], 1),
            chunk(4, 7, &[5, 6, 7], 3),
        ]);
        last.replace(&before, &[samples(1, &[11]), samples(3, &[33]), samples(4, &[6, 44])]);
        let mut next = plan(vec![ahead(1, 5), chunk(2, 3, &[4], 1), ahead(3, 3), ahead(4, 9)]);
        last.fill(&mut next, &mut Solo::new()).expect("all are known");
        let tokens: Vec<u32> = next.chunks.iter().map(|chunk| chunk.tokens[0].0).collect();
        assert_eq!(tokens, [11, 4, 33, 44]);
        for (wrong, problem) in [
            (ahead(2, 3), "which sampled none"),
            (ahead(1, 6), "goes on at 6 with a token that was sampled for 5"),
        ] {
            let error = last.fill(&mut plan(vec![wrong]), &mut Solo::new()).expect_err("contradicts");
            assert!(error.to_string().contains(problem), "{error}");
        }
        last.replace(&next, &[]);
        assert!(
            last.fill(&mut plan(vec![ahead(1, 5)]), &mut Solo::new()).is_err(),
            "older steps are forgotten"
        );
    }
}
