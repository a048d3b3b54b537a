//! What a shard knows of each sequence: tokens so far, block table, sampling parameters. All of it comes from
//! plans; nothing here computes or decides.

use std::collections::HashMap;

use paceline_domain::{
    BlockId, HeldBack, SamplingParams, SequenceChunk, SequenceId, SequenceOpen, StepPlan, TokenMask,
    group::BLOCK_POSITIONS,
};
use paceline_sampling::TokenHistory;

/// A plan that contradicts what this shard holds: coordinator and shard disagree, the group must be re-formed.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
#[error("sequence {sequence}: {problem}")]
pub struct PlanError {
    /// Whose plan.
    pub sequence: SequenceId,
    /// What does not fit, with the numbers.
    pub problem: String,
}

/// One sequence.
#[derive(Debug)]
pub struct Sequence {
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// What cannot be chosen yet.
    pub held_back: Option<HeldBack>,
    /// Whether its sampled rows wait for masks.
    pub is_constrained: bool,
    /// Those of the chunk at hand, one for each sampled row, once they are there.
    pub masks: Vec<TokenMask>,
    /// Tokens in the KV memory and in the current chunk.
    pub history: TokenHistory,
    /// Where their keys and values are.
    pub blocks: Vec<BlockId>,
}

/// All sequences of the group.
#[derive(Debug)]
pub struct Sequences {
    n_kv_blocks: u32,
    by_id: HashMap<SequenceId, Sequence>,
}

impl Sequences {
    /// No sequence yet; blocks must be below `n_kv_blocks`.
    pub fn new(n_kv_blocks: u32) -> Self {
        Self { n_kv_blocks, by_id: HashMap::new() }
    }

    /// A sequence that a checked plan names.
    ///
    /// # Panics
    /// When it is not there: [`Self::begin`] has checked it.
    pub fn get_mut(&mut self, sequence: SequenceId) -> &mut Sequence {
        self.by_id.get_mut(&sequence).expect("invariant: begin() checked the plan's sequences")
    }

    /// As [`Self::get_mut`].
    pub fn get(&self, sequence: SequenceId) -> &Sequence {
        self.by_id.get(&sequence).expect("invariant: begin() checked the plan's sequences")
    }

    /// Sequences open now.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Takes over a plan's closes, opens and block tables, and truncates each history to its chunk's start.
    /// The chunk's own tokens are not yet in the history: sampling adds them row by row.
    ///
    /// # Errors
    /// When the plan contradicts what is here. The group is then beyond use.
    pub fn begin(&mut self, plan: &StepPlan) -> Result<(), PlanError> {
        for sequence in &plan.closes {
            self.by_id.remove(sequence).ok_or_else(|| unknown(*sequence))?;
        }
        for open in &plan.opens {
            self.open(open)?;
        }
        plan.chunks.iter().try_for_each(|chunk| self.extend(chunk))
    }

    fn open(&mut self, open: &SequenceOpen) -> Result<(), PlanError> {
        let fail = |problem: String| PlanError { sequence: open.sequence, problem };
        if self.by_id.contains_key(&open.sequence) {
            return Err(fail("is opened twice".into()));
        }
        let n_positions = open.cached_blocks.len() * BLOCK_POSITIONS;
        let n_copied = open.cached_tokens.len().checked_sub(n_positions);
        let is_right = match open.copied {
            Some(_) => n_copied.is_some_and(|n| (1..BLOCK_POSITIONS).contains(&n)),
            None => n_copied == Some(0),
        };
        if !is_right {
            let (n_cached, n_copies) = (open.cached_tokens.len(), usize::from(open.copied.is_some()));
            return Err(fail(format!(
                "{n_cached} cached tokens in blocks for {n_positions} and {n_copies} copies"
            )));
        }
        let copied = open.copied.map(|copy| [copy.from, copy.to]);
        self.check_blocks(open.sequence, &open.cached_blocks)?;
        self.check_blocks(open.sequence, copied.as_ref().map_or(&[], |blocks| blocks))?;
        let mut history = TokenHistory::new(open.n_prompt as usize);
        open.cached_tokens.iter().for_each(|token| history.push(*token));
        let (sampling, held_back) = (open.sampling.clone(), open.held_back.clone());
        let mut blocks = open.cached_blocks.clone();
        blocks.extend(open.copied.map(|copy| copy.to));
        let is_constrained = open.is_constrained;
        let sequence = Sequence { sampling, held_back, is_constrained, masks: Vec::new(), history, blocks };
        self.by_id.insert(open.sequence, sequence);
        Ok(())
    }

    fn extend(&mut self, chunk: &SequenceChunk) -> Result<(), PlanError> {
        self.check_blocks(chunk.sequence, &chunk.new_blocks)?;
        let of_branches: Vec<BlockId> = chunk.branches.iter().map(|branch| branch.block).collect();
        self.check_blocks(chunk.sequence, &of_branches)?;
        let fail = |problem: String| PlanError { sequence: chunk.sequence, problem };
        let sequence = self.by_id.get_mut(&chunk.sequence).ok_or_else(|| unknown(chunk.sequence))?;
        let (start, n_held) = (chunk.start_pos as usize, sequence.history.len());
        if start > n_held {
            return Err(fail(format!("starts at {start} with {n_held} tokens held")));
        }
        if sequence.is_constrained && !of_branches.is_empty() {
            return Err(fail(format!("{} branches of a constrained sequence", of_branches.len())));
        }
        let (n_kept, n_blocks) = (chunk.n_kept_blocks as usize, sequence.blocks.len());
        if n_kept > n_blocks {
            return Err(fail(format!("keeps {n_kept} of {n_blocks} blocks")));
        }
        let (end, n_slots) =
            (start + chunk.tokens.len(), (n_kept + chunk.new_blocks.len()) * BLOCK_POSITIONS);
        if end > n_slots {
            return Err(fail(format!("reaches {end} tokens in blocks for {n_slots}")));
        }
        sequence.masks.clear();
        sequence.history.truncate(start);
        sequence.blocks.truncate(n_kept);
        sequence.blocks.extend_from_slice(&chunk.new_blocks);
        Ok(())
    }

    fn check_blocks(&self, sequence: SequenceId, blocks: &[BlockId]) -> Result<(), PlanError> {
        match blocks.iter().find(|block| block.0 >= self.n_kv_blocks) {
            Some(block) => {
                let problem = format!("block {block} of a pool of {}", self.n_kv_blocks);
                Err(PlanError { sequence, problem })
            }
            None => Ok(()),
        }
    }
}

fn unknown(sequence: SequenceId) -> PlanError {
    PlanError { sequence, problem: "is not open".into() }
}

#[cfg(test)]
mod tests {
    use paceline_domain::{BlockCopy, Epoch, Scoring, StepNumber, TokenId};

    use super::*;

    fn plan(opens: Vec<SequenceOpen>, chunks: Vec<SequenceChunk>, closes: Vec<SequenceId>) -> StepPlan {
        StepPlan { epoch: Epoch(1), step: StepNumber(1), closes, opens, chunks }
    }

    fn open(id: u64) -> SequenceOpen {
        SequenceOpen {
            sequence: SequenceId(id),
            sampling: SamplingParams::greedy(),
            n_prompt: 2,
            cached_tokens: Vec::new(),
            cached_blocks: Vec::new(),
            copied: None,
            held_back: None,
            is_constrained: false,
        }
    }

    /// Its first tokens are in a copy of block 0.
    fn copied(id: u64, n_tokens: usize, to: u32) -> SequenceOpen {
        let copied = Some(BlockCopy { from: BlockId(0), to: BlockId(to) });
        SequenceOpen { cached_tokens: vec![TokenId(0); n_tokens], copied, ..open(id) }
    }

    #[test]
    fn a_copied_block_is_the_sequences_own() {
        let mut sequences = Sequences::new(4);
        sequences.begin(&plan(vec![copied(1, 15, 3)], vec![chunk(1, 15, 2, 1, &[2])], vec![])).unwrap();
        let sequence = sequences.get(SequenceId(1));
        assert_eq!((sequence.history.len(), sequence.blocks.as_slice()), (15, &[BlockId(3), BlockId(2)][..]));
    }

    fn chunk(
        id: u64,
        start_pos: u32,
        n_tokens: usize,
        n_kept_blocks: u32,
        new_blocks: &[u32],
    ) -> SequenceChunk {
        SequenceChunk {
            sequence: SequenceId(id),
            start_pos,
            tokens: vec![TokenId(0); n_tokens],
            new_blocks: new_blocks.iter().copied().map(BlockId).collect(),
            n_kept_blocks,
            n_sampled: 1,
            runs_ahead: false,
            scoring: Scoring::default(),
            branches: Vec::new(),
        }
    }

    #[test]
    fn plans_that_contradict_the_state_are_refused_with_numbers() {
        let cases = [
            (plan(vec![], vec![chunk(7, 0, 1, 0, &[0])], vec![]), "is not open"),
            (plan(vec![], vec![], vec![SequenceId(7)]), "is not open"),
            (plan(vec![open(1)], vec![], vec![]), "is opened twice"),
            (plan(vec![copied(2, 0, 1)], vec![], vec![]), "0 cached tokens in blocks for 0 and 1 copies"),
            (plan(vec![copied(2, 16, 1)], vec![], vec![]), "16 cached tokens in blocks for 0 and 1 copies"),
            (plan(vec![copied(2, 3, 4)], vec![], vec![]), "block 4 of a pool of 4"),
            (plan(vec![], vec![chunk(1, 3, 1, 1, &[])], vec![]), "starts at 3 with 2 tokens held"),
            (plan(vec![], vec![chunk(1, 2, 1, 2, &[])], vec![]), "keeps 2 of 1 blocks"),
            (plan(vec![], vec![chunk(1, 2, 15, 1, &[])], vec![]), "reaches 17 tokens in blocks for 16"),
            (plan(vec![], vec![chunk(1, 2, 15, 1, &[4])], vec![]), "block 4 of a pool of 4"),
        ];
        for (plan, problem) in cases {
            let mut sequences = Sequences::new(4);
            sequences
                .begin(&super::tests::plan(vec![open(1)], vec![chunk(1, 0, 2, 0, &[0])], vec![]))
                .unwrap();
            let history = &mut sequences.get_mut(SequenceId(1)).history;
            history.push(TokenId(0));
            history.push(TokenId(0));
            assert_eq!(sequences.begin(&plan).unwrap_err().problem, problem);
        }
    }

    #[test]
    fn a_chunk_that_starts_earlier_forgets_what_follows() {
        let mut sequences = Sequences::new(4);
        sequences.begin(&plan(vec![open(1)], vec![chunk(1, 0, 20, 0, &[0, 1])], vec![])).unwrap();
        (0..20).for_each(|i| sequences.get_mut(SequenceId(1)).history.push(TokenId(i)));
        sequences.begin(&plan(vec![], vec![chunk(1, 10, 1, 1, &[])], vec![])).unwrap();
        assert_eq!(sequences.get(SequenceId(1)).history.len(), 10);
        assert_eq!(sequences.get(SequenceId(1)).blocks, [BlockId(0)]);
        sequences.begin(&plan(vec![], vec![], vec![SequenceId(1)])).unwrap();
        assert!(sequences.is_empty());
    }
}
