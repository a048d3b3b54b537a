//! A group for tests whose next token is a hash of the KV memory of all positions before it, read through the block
//! table: a stale, foreign or missing entry gives another token. It holds the plans it is sent to what shards hold
//! them to.

use std::collections::HashMap;

use paceline_domain::{
    BlockId, SampledToken, ScoredToken, SequenceChunk, SequenceId, SequenceSamples, SequenceScores, StepPlan,
    StepResult, StepTimings, TokenId, group::BLOCK_POSITIONS,
};

/// Few tokens, so that guesses are often right.
pub(super) const N_VOCAB: u32 = 5;

#[derive(Debug)]
pub(super) struct ToyGroup {
    /// `[block, position in block]`
    memory: Vec<u64>,
    sequences: HashMap<SequenceId, ToySequence>,
    /// Last token sampled in the last step, and its position.
    last: HashMap<SequenceId, (u32, TokenId)>,
}

#[derive(Debug)]
struct ToySequence {
    blocks: Vec<BlockId>,
    n_tokens: usize,
    seed: u64,
}

fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// What a correct memory holds at a position.
fn entry(token: TokenId, position: usize) -> u64 {
    mix(mix(1, u64::from(token.0)), position as u64)
}

fn next(seed: u64, entries: impl Iterator<Item = u64>) -> TokenId {
    TokenId((entries.fold(seed, mix) % u64::from(N_VOCAB)) as u32)
}

fn score(token: TokenId, entries: impl Iterator<Item = u64>) -> ScoredToken {
    let hash = entries.fold(mix(2, u64::from(token.0)), mix);
    ScoredToken { logprob: (hash >> 44) as f32, top_logprobs: Vec::new() }
}

/// What the last of these is scored with when those before are all there is.
pub(super) fn score_alone(tokens: &[TokenId]) -> ScoredToken {
    let (token, before) = tokens.split_last().expect("a token to score");
    score(*token, before.iter().enumerate().map(|(position, token)| entry(*token, position)))
}

/// The token that follows these when they are all there is.
pub(super) fn next_alone(seed: u64, tokens: &[TokenId]) -> TokenId {
    next(seed, tokens.iter().enumerate().map(|(position, token)| entry(*token, position)))
}

impl ToyGroup {
    pub(super) fn new(n_blocks: u32) -> Self {
        let memory = vec![u64::MAX; n_blocks as usize * BLOCK_POSITIONS];
        Self { memory, sequences: HashMap::new(), last: HashMap::new() }
    }

    /// Executes a plan; every step takes as long as it has rows.
    pub(super) fn step(&mut self, plan: &StepPlan) -> StepResult {
        for id in &plan.closes {
            assert!(self.sequences.remove(id).is_some(), "{id} is not open");
        }
        for open in &plan.opens {
            let n_copied = open.cached_tokens.len() - open.cached_blocks.len() * BLOCK_POSITIONS;
            assert_eq!(n_copied > 0, open.copied.is_some());
            assert!(n_copied < BLOCK_POSITIONS);
            let mut blocks = open.cached_blocks.clone();
            if let Some(copy) = open.copied {
                let from = copy.from.idx() * BLOCK_POSITIONS;
                self.memory.copy_within(from..from + BLOCK_POSITIONS, copy.to.idx() * BLOCK_POSITIONS);
                blocks.push(copy.to);
            }
            let sequence =
                ToySequence { blocks, n_tokens: open.cached_tokens.len(), seed: open.sampling.seed };
            assert!(self.sequences.insert(open.sequence, sequence).is_none(), "{} is open", open.sequence);
        }
        let chunks: Vec<SequenceChunk> = plan.chunks.iter().map(|chunk| self.resolved(chunk)).collect();
        self.last.clear();
        let (mut samples, mut scores) = (Vec::new(), Vec::new());
        for chunk in &chunks {
            let (sampled, scored) = self.run(chunk);
            samples.extend(sampled);
            scores.extend(scored);
        }
        let timings = StepTimings { total_us: 1_000 * plan.n_rows() as u64, ..StepTimings::default() };
        StepResult { epoch: plan.epoch, step: plan.step, samples, scores, timings }
    }

    fn resolved(&self, chunk: &SequenceChunk) -> SequenceChunk {
        let mut chunk = chunk.clone();
        if chunk.runs_ahead {
            let (position, token) = self.last[&chunk.sequence];
            assert_eq!((position, chunk.tokens.len()), (chunk.start_pos, 1));
            chunk.tokens = vec![token];
        }
        chunk
    }

    fn run(&mut self, chunk: &SequenceChunk) -> (Option<SequenceSamples>, Option<SequenceScores>) {
        let id = chunk.sequence;
        let sequence = self.sequences.get_mut(&chunk.sequence).expect("an open sequence");
        let start = chunk.start_pos as usize;
        assert!(start <= sequence.n_tokens, "starts at {start} of {}", sequence.n_tokens);
        assert!(chunk.n_kept_blocks as usize <= sequence.blocks.len());
        sequence.blocks.truncate(chunk.n_kept_blocks as usize);
        sequence.blocks.extend_from_slice(&chunk.new_blocks);
        sequence.n_tokens = start + chunk.tokens.len();
        let slot = |position: usize| {
            sequence.blocks[position / BLOCK_POSITIONS].idx() * BLOCK_POSITIONS + position % BLOCK_POSITIONS
        };
        // As in a real pass, all rows are written before any is read.
        for (i, token) in chunk.tokens.iter().enumerate() {
            self.memory[slot(start + i)] = entry(*token, start + i);
        }
        let first = chunk.tokens.len() - chunk.n_sampled as usize;
        // A branch's entry is in a block of its own, beside copies of those before it; the others never see it.
        let mut after_branch = HashMap::new();
        for branch in &chunk.branches {
            let position = chunk.position_of(branch) as usize;
            let place = position / BLOCK_POSITIONS * BLOCK_POSITIONS;
            let (from, to) = (slot(place), branch.block.idx() * BLOCK_POSITIONS);
            self.memory.copy_within(from..from + BLOCK_POSITIONS, to);
            self.memory[to + position - place] = entry(branch.token, position);
            let before = (0..place).map(slot).chain(to..=to + position - place);
            after_branch.insert(branch.after, next(sequence.seed, before.map(|slot| self.memory[slot])));
        }
        let scored = chunk.scoring.tokens.iter().zip(first - chunk.scoring.tokens.len()..);
        let scored = scored
            .map(|(token, row)| score(*token, (0..=start + row).map(|position| self.memory[slot(position)])));
        let scored: Vec<ScoredToken> = scored.collect();
        let mut tokens = Vec::new();
        let mut sampled = |token| {
            tokens.push(SampledToken { token, logprob: None, top_logprobs: Vec::new() });
            self.last.insert(id, ((start + first + tokens.len()) as u32, token));
        };
        for row in first..chunk.tokens.len() {
            let token = next(sequence.seed, (0..=start + row).map(|position| self.memory[slot(position)]));
            sampled(token);
            if chunk.tokens.get(row + 1) != Some(&token) {
                let guess = ((row - first) as u32, token);
                let branch = chunk.branches.iter().find(|branch| (branch.after, branch.token) == guess);
                branch.into_iter().for_each(|branch| sampled(after_branch[&branch.after]));
                break;
            }
        }
        (
            (!tokens.is_empty()).then_some(SequenceSamples { sequence: id, tokens }),
            (!scored.is_empty()).then_some(SequenceScores { sequence: id, tokens: scored }),
        )
    }
}
