//! From the logits of all ranks to tokens on rank 0: each rank prepares its slice of each sampled row, one gather
//! brings them together, rank 0 chooses. A row travels as one candidate of eight bytes, found where the logits are with
//! all of the step in one call; where it must be whole and is not, or is asked for log probabilities, as its logits.
//! Rows that must not choose some tokens are brought to the host for it.

use std::convert::Infallible;
use std::ops::Range;

use paceline_collectives::Collective;
use paceline_domain::{SampledToken, SamplingParams, SequenceChunk, SequenceSamples, StepPlan};
use paceline_model::{Logits, ModelError, logits::Choice};
use paceline_sampling::{
    Candidate, local_best, merge, needs_full_row, sample_row,
    verify::{Row, verify_branches},
};

use crate::{
    sampled_rows::{SampledRow, n_sampled_rows, proposals, sampled_row},
    sequences::Sequences,
};

/// Bytes of a candidate.
const CANDIDATE_BYTES: usize = 8;

/// Chooses tokens for the rows of a step. Beside one number it holds only buffers.
#[derive(Debug)]
pub struct Sampler {
    /// Ids from here on are padding and never sampled.
    n_usable: usize,
    own: Vec<u8>,
    parts: Vec<Vec<u8>>,
    row: Vec<f32>,
    /// Where candidates go in `own`, and the candidates.
    places: Vec<usize>,
    best: Vec<Candidate>,
}

impl Sampler {
    /// For a vocabulary whose ids from `n_usable` on are padding.
    pub fn new(n_usable: usize) -> Self {
        Self {
            n_usable,
            own: Vec::new(),
            parts: Vec::new(),
            row: Vec::new(),
            places: Vec::new(),
            best: Vec::new(),
        }
    }

    /// Samples every row the plan asks for and adds the plan's tokens to the histories. Rank 0 gets one entry for
    /// each chunk with sampled rows, every other rank none. `logits` has the plan's output rows in order.
    ///
    /// # Errors
    /// When the gather or the device fails.
    pub fn sample(
        &mut self,
        plan: &StepPlan,
        sequences: &mut Sequences,
        logits: &mut Logits<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<SequenceSamples>, ModelError> {
        for chunk in &plan.chunks {
            sequences.get_mut(chunk.sequence).history.extend(&chunk.tokens);
        }
        self.prepare(plan, sequences, logits, collective.n_ranks())?;
        collective.gather(&self.own, &mut self.parts)?;
        if collective.rank() != 0 {
            return Ok(Vec::new());
        }
        Ok(self.choose(plan, sequences))
    }

    /// Lays out this rank's share of all rows, as it will be gathered. Histories have all tokens of the plan; each row
    /// looks at those before its position only.
    fn prepare(
        &mut self,
        plan: &StepPlan,
        sequences: &Sequences,
        logits: &mut Logits<'_>,
        n_ranks: usize,
    ) -> Result<(), ModelError> {
        let columns = logits.columns(self.n_usable);
        self.own.clear();
        self.places.clear();
        let rows = rows_with_logits(plan, sequences);
        let mut choices = Vec::with_capacity(rows.len());
        for (row, SampledRow { sequence, position, history, restriction }) in &rows {
            let (sampling, position) = (&sequence.sampling, *position);
            let is_whole = travels_whole(sampling, n_ranks);
            if is_whole || !restriction.is_nothing() {
                self.row.clear();
                self.row.extend_from_slice(&logits.row(*row)?[..columns.n_usable]);
                restriction.apply(columns, &mut self.row);
                if is_whole {
                    self.add_logits();
                } else {
                    let first_token = columns.first_token.0;
                    let best = local_best(sampling, history, position, first_token, &mut self.row);
                    self.own.extend_from_slice(&best.to_bytes());
                }
            } else {
                choices.push(Choice { row: *row, position, sampling, history });
                self.places.push(self.own.len());
                self.own.extend_from_slice(&[0; CANDIDATE_BYTES]);
            }
        }
        logits.best(self.n_usable, &choices, &mut self.best)?;
        for (place, best) in self.places.iter().zip(&self.best) {
            self.own[*place..][..CANDIDATE_BYTES].copy_from_slice(&best.to_bytes());
        }
        Ok(())
    }

    /// Lays out the row at hand.
    fn add_logits(&mut self) {
        self.row.iter().for_each(|logit| self.own.extend_from_slice(&logit.to_le_bytes()));
    }

    fn choose(&mut self, plan: &StepPlan, sequences: &Sequences) -> Vec<SequenceSamples> {
        let n_ranks = self.parts.len();
        let widths = self.full_row_bytes(plan, sequences);
        let mut cursors = vec![0; n_ranks];
        let mut samples = Vec::new();
        for chunk in plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0) {
            let sequence = sequences.get(chunk.sequence);
            let is_whole = travels_whole(&sequence.sampling, n_ranks);
            let row_bytes = |rank: usize| if is_whole { widths[rank] } else { CANDIDATE_BYTES };
            let branches: Vec<_> =
                chunk.branches.iter().map(|branch| (branch.after as usize, branch.token)).collect();
            let verified = verify_branches(proposals(chunk), &branches, |row| {
                let row = match row {
                    Row::After(n) => n,
                    Row::Branch(branch) => chunk.n_sampled as usize + branch,
                };
                let start = |rank: usize| cursors[rank] + row * row_bytes(rank);
                let slices = (0..n_ranks).map(|rank| start(rank)..start(rank) + row_bytes(rank));
                let token = if is_whole {
                    self.sample_whole(&sampled_row(chunk, sequence, row), slices)
                } else {
                    self.best_candidate(slices)
                };
                Ok::<_, Infallible>(token)
            });
            let Ok(tokens) = verified;
            for (rank, cursor) in cursors.iter_mut().enumerate() {
                *cursor += n_sampled_rows(chunk) * row_bytes(rank);
            }
            samples.push(SequenceSamples { sequence: chunk.sequence, tokens });
        }
        samples
    }

    /// The token of a row whose slices are at these places of the ranks' parts.
    fn sample_whole(
        &mut self,
        row: &SampledRow<'_>,
        slices: impl Iterator<Item = Range<usize>>,
    ) -> SampledToken {
        self.row.clear();
        for (part, slice) in self.parts.iter().zip(slices) {
            self.row.extend(part[slice].as_chunks().0.iter().copied().map(f32::from_le_bytes));
        }
        sample_row(&row.sequence.sampling, &row.history, row.position, &mut self.row)
    }

    /// The token of a row whose candidates are at these places of the ranks' parts.
    fn best_candidate(&self, slices: impl Iterator<Item = Range<usize>>) -> SampledToken {
        let of_rank =
            |(part, slice): (&Vec<u8>, Range<usize>)| Candidate::from_bytes(part[slice].as_chunks().0[0]);
        let candidates: Vec<Candidate> = self.parts.iter().zip(slices).map(of_rank).collect();
        SampledToken { token: merge(&candidates), logprob: None, top_logprobs: Vec::new() }
    }

    /// Bytes of one whole row in each rank's part, found from the parts' sizes.
    fn full_row_bytes(&self, plan: &StepPlan, sequences: &Sequences) -> Vec<usize> {
        let (mut n_whole, mut n_candidates) = (0, 0);
        for chunk in &plan.chunks {
            let is_whole = travels_whole(&sequences.get(chunk.sequence).sampling, self.parts.len());
            *(if is_whole { &mut n_whole } else { &mut n_candidates }) += n_sampled_rows(chunk);
        }
        let bytes =
            |part: &Vec<u8>| (part.len() - n_candidates * CANDIDATE_BYTES).checked_div(n_whole).unwrap_or(0);
        self.parts.iter().map(bytes).collect()
    }
}

/// All rows that sample with their places among the rows with logits, in the order in which they are gathered: those of a
/// chunk together. The logits of branches come after those of all chunks.
fn rows_with_logits<'a>(plan: &StepPlan, sequences: &'a Sequences) -> Vec<(usize, SampledRow<'a>)> {
    let (mut next, mut rows) = (0, Vec::new());
    let mut next_of_branch: usize = plan.chunks.iter().map(SequenceChunk::n_output_rows).sum();
    for chunk in &plan.chunks {
        let (sequence, n_sampled) = (sequences.get(chunk.sequence), chunk.n_sampled as usize);
        next += chunk.scoring.tokens.len();
        let places = (next..next + n_sampled).chain(next_of_branch..);
        let of_chunk = (0..n_sampled_rows(chunk)).map(|i| sampled_row(chunk, sequence, i));
        rows.extend(places.zip(of_chunk));
        (next, next_of_branch) = (next + n_sampled, next_of_branch + chunk.branches.len());
    }
    rows
}

/// Whether rank 0 needs the logits of a row; the ranks agree on it. One rank alone filters where the logits are.
fn travels_whole(sampling: &SamplingParams, n_ranks: usize) -> bool {
    sampling.n_logprobs.is_some() || (n_ranks > 1 && needs_full_row(sampling))
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
