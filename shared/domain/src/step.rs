//! One step of a group: the plan every rank executes alike, and what rank 0 reports. Plain decode, verification
//! of proposals and prefill chunks are the same thing here: tokens from a start position, some rows sampled.

use crate::{
    BlockId, Epoch, SampledToken, SamplingParams, ScoredToken, SequenceId, StepNumber, TokenId, TokenMask,
};

/// Tells the ranks of a sequence they will see chunks of.
#[derive(Clone, PartialEq, Debug)]
pub struct SequenceOpen {
    /// The new sequence.
    pub sequence: SequenceId,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens of the prompt; presence and frequency penalties count only what follows.
    pub n_prompt: u32,
    /// Tokens before the first chunk: a prefix-cache hit, or what was computed for another sequence; penalties need them.
    pub cached_tokens: Vec<TokenId>,
    /// KV blocks that hold the first of `cached_tokens`, all full.
    pub cached_blocks: Vec<BlockId>,
    /// Where the rest of `cached_tokens`, less than a block, comes from.
    pub copied: Option<BlockCopy>,
    /// What cannot be chosen yet.
    pub held_back: Option<HeldBack>,
    /// Each of its sampled rows waits for what it may choose: [`StepMasks`] follow the plan.
    pub is_constrained: bool,
}

/// Tokens that cannot be chosen for the first positions of a sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldBack {
    /// The first position for which they can.
    pub until: u32,
    /// Which.
    pub tokens: Vec<TokenId>,
}

/// One KV block becomes a copy of another before the pass of a step, after the copies of earlier opens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockCopy {
    /// It is read.
    pub from: BlockId,
    /// It is written, and the sequence's own.
    pub to: BlockId,
}

/// Tokens of one sequence to run through the model in this step.
#[derive(Clone, PartialEq, Debug)]
pub struct SequenceChunk {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Position of the first token. Whatever the shard holds from here on is forgotten.
    pub start_pos: u32,
    /// Token ids at `start_pos ..`; at least one.
    pub tokens: Vec<TokenId>,
    /// Blocks appended to the sequence's block table before the pass.
    pub new_blocks: Vec<BlockId>,
    /// Block-table length to truncate to before `new_blocks` are appended.
    pub n_kept_blocks: u32,
    /// How many of the last tokens are followed by a sampled token: 0 inside a prompt, 1 for decode,
    /// 1 + proposals for verification.
    pub n_sampled: u32,
    /// The chunk's only token is the one that the step before samples for this sequence; the plan was made before it
    /// was known, and `tokens` has [`UNKNOWN_TOKEN`] in its place.
    pub runs_ahead: bool,
    /// Prompt tokens whose log probabilities are wanted.
    pub scoring: Scoring,
    /// Other guesses at places of its proposals; none for a constrained sequence.
    pub branches: Vec<Branch>,
}

/// Another guess at the place of a proposal: a row of its own, which sees what comes before that place and itself. Where the
/// target samples it, the token that follows it is known too; its key and value are computed again with the next chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Branch {
    /// Proposals of the chunk before it: fewer than there are.
    pub after: u32,
    /// The guess.
    pub token: TokenId,
    /// For this step only: it becomes a copy of the block that the proposal in the guess's place is in, but for that place.
    pub block: BlockId,
}

impl SequenceChunk {
    /// Token rows of the chunk, branches included.
    pub fn n_rows(&self) -> usize {
        self.tokens.len() + self.branches.len()
    }

    /// Position of a branch's token.
    pub fn position_of(&self, branch: &Branch) -> u32 {
        self.start_pos + self.tokens.len() as u32 - self.n_sampled + 1 + branch.after
    }

    /// Rows of its tokens whose logits are wanted, the last ones: first those that are scored, then those that sample.
    /// Those of branches, which all sample, come after the rows of all chunks.
    pub fn n_output_rows(&self) -> usize {
        self.scoring.tokens.len() + self.n_sampled as usize
    }
}

/// Log probabilities of prompt tokens, read off the rows before them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Scoring {
    /// The tokens that follow the chunk's rows: the last of them is the one after the last row that does not sample, the
    /// others come just before it.
    pub tokens: Vec<TokenId>,
    /// Alternatives to report for each.
    pub n_top: u32,
}

/// Stands for a token that only the ranks know.
pub const UNKNOWN_TOKEN: TokenId = TokenId(0);

/// Everything a group does in one step.
#[derive(Clone, PartialEq, Debug)]
pub struct StepPlan {
    /// Life of the group.
    pub epoch: Epoch,
    /// Place of the step in it.
    pub step: StepNumber,
    /// Sequences that end before this step.
    pub closes: Vec<SequenceId>,
    /// Sequences that begin in this step, after its closes; one that was closed may begin again.
    pub opens: Vec<SequenceOpen>,
    /// The work, in row order.
    pub chunks: Vec<SequenceChunk>,
}

impl StepPlan {
    /// Token rows in the pass.
    pub fn n_rows(&self) -> usize {
        self.chunks.iter().map(SequenceChunk::n_rows).sum()
    }
}

/// What rows of constrained sequences may choose. They follow the plan of their step, in any number of parts.
#[derive(Clone, PartialEq, Debug)]
pub struct StepMasks {
    /// Life of the group.
    pub epoch: Epoch,
    /// The step.
    pub step: StepNumber,
    /// One entry for each sequence of this part.
    pub sequences: Vec<SequenceMasks>,
}

/// What the sampled rows of one sequence may choose.
#[derive(Clone, PartialEq, Debug)]
pub struct SequenceMasks {
    /// Whose.
    pub sequence: SequenceId,
    /// One for each sampled row of its chunk, in order.
    pub rows: Vec<TokenMask>,
}

/// What rank 0 sampled for one chunk: its `n_sampled` tokens in position order. Tokens after the first that
/// differs from the proposal are meaningless and left out; if it is a branch's, the one sampled after that follows.
#[derive(Clone, PartialEq, Debug)]
pub struct SequenceSamples {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// At least one.
    pub tokens: Vec<SampledToken>,
}

/// What rank 0 has read off for one chunk.
#[derive(Clone, PartialEq, Debug)]
pub struct SequenceScores {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// One for each token of the chunk's [`Scoring`], in order.
    pub tokens: Vec<ScoredToken>,
}

/// Where the time of a step went on one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepTimings {
    /// Microseconds from the end of the step before, or the plan's arrival if that is later, to the end of sampling.
    pub total_us: u64,
    /// Microseconds of it spent waiting for peers in collectives.
    pub collective_wait_us: u64,
    /// Bytes this rank sent in collectives.
    pub collective_bytes: u64,
}

/// One rank's answer to a plan. Only rank 0 has samples and scores.
#[derive(Clone, PartialEq, Debug)]
pub struct StepResult {
    /// Echo.
    pub epoch: Epoch,
    /// Echo.
    pub step: StepNumber,
    /// In plan order, one for each chunk with `n_sampled > 0`; empty on other ranks.
    pub samples: Vec<SequenceSamples>,
    /// In plan order, one for each chunk that scores tokens; empty on other ranks.
    pub scores: Vec<SequenceScores>,
    /// This rank's time.
    pub timings: StepTimings,
}
