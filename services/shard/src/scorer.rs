//! Log probabilities of prompt tokens on rank 0: rows of logits are brought together a few at a time, so that memory stays
//! small however long a prompt is. Every number is that of a whole row, so the number of ranks changes none. It chooses
//! nothing.

use paceline_collectives::Collective;
use paceline_domain::{ScoredToken, SequenceScores, StepPlan, TokenId};
use paceline_model::{Logits, ModelError};
use paceline_sampling::score_row;

/// Rows that are gathered at once.
const ROWS_A_GATHER: usize = 8;

/// Reads log probabilities off the rows of a step. Beside one number it holds only buffers.
#[derive(Debug)]
pub struct Scorer {
    /// Ids from here on are padding and have no probability.
    n_usable: usize,
    own: Vec<u8>,
    parts: Vec<Vec<u8>>,
    row: Vec<f32>,
}

/// A row, and whose log probabilities it tells.
#[derive(Clone, Copy, Debug)]
struct ScoredRow {
    /// Index among the output rows.
    row: usize,
    token: TokenId,
    n_top: u32,
}

impl Scorer {
    /// For a vocabulary whose ids from `n_usable` on are padding.
    pub fn new(n_usable: usize) -> Self {
        Self { n_usable, own: Vec::new(), parts: Vec::new(), row: Vec::new() }
    }

    /// Scores every prompt token the plan asks for. Rank 0 gets one entry for each chunk that scores, every other rank
    /// none. `logits` has the plan's output rows in order.
    ///
    /// # Errors
    /// When a gather or the device fails.
    pub fn score(
        &mut self,
        plan: &StepPlan,
        logits: &mut Logits<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<SequenceScores>, ModelError> {
        let mut scored = Vec::new();
        for rows in scored_rows(plan).chunks(ROWS_A_GATHER) {
            if collective.n_ranks() == 1 {
                self.score_here(rows, logits, &mut scored)?;
            } else {
                self.score_together(rows, logits, collective, &mut scored)?;
            }
        }
        if collective.rank() != 0 {
            return Ok(Vec::new());
        }
        let mut scored = scored.into_iter();
        let chunks = plan.chunks.iter().filter(|chunk| !chunk.scoring.tokens.is_empty());
        let scores = chunks.map(|chunk| SequenceScores {
            sequence: chunk.sequence,
            tokens: scored.by_ref().take(chunk.scoring.tokens.len()).collect(),
        });
        Ok(scores.collect())
    }

    fn score_here(
        &self,
        rows: &[ScoredRow],
        logits: &mut Logits<'_>,
        scored: &mut Vec<ScoredToken>,
    ) -> Result<(), ModelError> {
        let n_usable = logits.columns(self.n_usable).n_usable;
        for ScoredRow { row, token, n_top } in rows {
            scored.push(score_row(&logits.row(*row)?[..n_usable], *token, *n_top));
        }
        Ok(())
    }

    fn score_together(
        &mut self,
        rows: &[ScoredRow],
        logits: &mut Logits<'_>,
        collective: &mut dyn Collective,
        scored: &mut Vec<ScoredToken>,
    ) -> Result<(), ModelError> {
        let n_usable = logits.columns(self.n_usable).n_usable;
        self.own.clear();
        for ScoredRow { row, .. } in rows {
            let slice = &logits.row(*row)?[..n_usable];
            slice.iter().for_each(|logit| self.own.extend_from_slice(&logit.to_le_bytes()));
        }
        collective.gather(&self.own, &mut self.parts)?;
        if collective.rank() == 0 {
            for (i, ScoredRow { token, n_top, .. }) in rows.iter().enumerate() {
                self.join(i, rows.len());
                scored.push(score_row(&self.row, *token, *n_top));
            }
        }
        Ok(())
    }

    /// Puts the i-th of the gathered rows together.
    fn join(&mut self, i: usize, n_rows: usize) {
        self.row.clear();
        for part in &self.parts {
            let n_bytes = part.len() / n_rows;
            let slice = &part[i * n_bytes..][..n_bytes];
            self.row.extend(slice.as_chunks().0.iter().copied().map(f32::from_le_bytes));
        }
    }
}

fn scored_rows(plan: &StepPlan) -> Vec<ScoredRow> {
    let (mut rows, mut first) = (Vec::new(), 0);
    for chunk in &plan.chunks {
        let tokens = chunk.scoring.tokens.iter().enumerate();
        rows.extend(tokens.map(|(i, token)| ScoredRow {
            row: first + i,
            token: *token,
            n_top: chunk.scoring.n_top,
        }));
        first += chunk.n_output_rows();
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use paceline_collectives::{CollectiveError, CollectiveStats};
    use paceline_domain::{Epoch, ReduceTree, Scoring, SequenceChunk, SequenceId, StepNumber};
    use paceline_model::logits::LogitRows;

    use super::*;

    const N_VOCAB: usize = 12;
    const N_USABLE: usize = 11;

    /// Rows of logits in memory.
    struct Rows(Vec<Vec<f32>>);

    impl LogitRows for Rows {
        fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
            Ok(&self.0[row])
        }
    }

    fn chunk(id: u64, n_sampled: u32, scored: &[u32], n_top: u32) -> SequenceChunk {
        let n_tokens = n_sampled as usize + scored.len() + 2;
        SequenceChunk {
            sequence: SequenceId(id),
            start_pos: 0,
            tokens: vec![TokenId(0); n_tokens],
            new_blocks: Vec::new(),
            n_kept_blocks: 0,
            n_sampled,
            runs_ahead: false,
            scoring: Scoring { tokens: scored.iter().copied().map(TokenId).collect(), n_top },
            branches: Vec::new(),
        }
    }

    /// More scored rows than one gather takes, between rows that are sampled.
    fn plan() -> StepPlan {
        let many: Vec<u32> = (0..2 * ROWS_A_GATHER as u32 + 3).map(|i| i % 11).collect();
        let chunks =
            vec![chunk(1, 2, &[], 0), chunk(2, 1, &many, 3), chunk(3, 1, &[], 0), chunk(4, 0, &[7, 9], 0)];
        StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens: Vec::new(), chunks }
    }

    fn row(i: usize) -> Vec<f32> {
        (0..N_VOCAB).map(|token| ((token * 7 + i * 5) % 13) as f32 * 0.4).collect()
    }

    /// One of several ranks: it keeps what it sends, and on rank 0 gets what the others have sent.
    struct Rank {
        rank: usize,
        n_ranks: usize,
        sent: Vec<Vec<u8>>,
        others: Vec<Vec<Vec<u8>>>,
    }

    impl Collective for Rank {
        fn rank(&self) -> usize {
            self.rank
        }

        fn n_ranks(&self) -> usize {
            self.n_ranks
        }

        fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
            let others = self.others.iter().map(|sent| sent[self.sent.len()].clone());
            *parts = std::iter::once(own.to_vec()).chain(others).collect();
            self.sent.push(own.to_vec());
            Ok(())
        }

        fn all_reduce_tree(
            &mut self,
            _: &ReduceTree,
            _: &[f32],
            _: &mut [f32],
        ) -> Result<(), CollectiveError> {
            unreachable!("nothing is summed")
        }

        fn barrier(&mut self) -> Result<(), CollectiveError> {
            unreachable!("nobody is waited for")
        }

        fn set_deadline(&mut self, _: Duration) {}

        fn take_stats(&mut self) -> CollectiveStats {
            CollectiveStats::default()
        }
    }

    /// The scores of a plan whose rows are split over ranks.
    fn scores(n_ranks: usize) -> Vec<SequenceScores> {
        let n_rows = plan().chunks.iter().map(SequenceChunk::n_output_rows).sum();
        let (mut others, mut scores) = (Vec::new(), Vec::new());
        for rank in (0..n_ranks).rev() {
            let vocab = N_VOCAB * rank / n_ranks..N_VOCAB * (rank + 1) / n_ranks;
            let mut rows = Rows((0..n_rows).map(|i| row(i)[vocab.clone()].to_vec()).collect());
            let mut logits = Logits::new(&mut rows, n_rows, vocab);
            let mut collective = Rank { rank, n_ranks, sent: Vec::new(), others: Vec::new() };
            if rank == 0 {
                collective.others = others.split_off(0);
            }
            scores = Scorer::new(N_USABLE).score(&plan(), &mut logits, &mut collective).expect("scores");
            others.insert(0, collective.sent);
        }
        scores
    }

    #[test]
    fn each_row_is_scored_with_its_own_token() {
        let scores = scores(1);
        let shape: Vec<_> = scores.iter().map(|scores| (scores.sequence.0, scores.tokens.len())).collect();
        assert_eq!(shape, [(2, 2 * ROWS_A_GATHER + 3), (4, 2)]);
        for (i, scored) in scores[0].tokens.iter().enumerate() {
            let token = TokenId(i as u32 % 11);
            assert_eq!(*scored, score_row(&row(2 + i)[..N_USABLE], token, 3), "row {i}");
        }
        let first = 2 + 2 * ROWS_A_GATHER + 3 + 1 + 1;
        assert_eq!(scores[1].tokens[1], score_row(&row(first + 1)[..N_USABLE], TokenId(9), 0));
    }

    #[test]
    fn ranks_change_no_bit() {
        for n_ranks in [2, 3, 5] {
            assert_eq!(scores(n_ranks), scores(1), "{n_ranks} ranks");
        }
    }
}
