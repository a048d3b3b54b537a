//! From the logits of all ranks to tokens on rank 0: each rank prepares its slice of each sampled row, one gather
//! brings them together, rank 0 chooses. A row that needs no filter travels as one candidate of eight bytes, any
//! other as its logits.

use std::ops::Range;

use paceline_collectives::{Collective, CollectiveError};
use paceline_domain::{SampledToken, SequenceChunk, SequenceSamples, StepPlan};
use paceline_sampling::{Candidate, local_best, merge, needs_full_row, sample_row};

use crate::sequences::{Sequence, Sequences};

/// Bytes of a candidate.
const CANDIDATE_BYTES: usize = 8;

/// Chooses tokens for the rows of a step. Holds only buffers.
#[derive(Debug, Default)]
pub struct Sampler {
    own: Vec<u8>,
    parts: Vec<Vec<u8>>,
    row: Vec<f32>,
}

/// This rank's logits of the sampled rows, in plan order.
#[derive(Debug)]
pub struct LogitSlices<'a> {
    /// `[n_sampled_rows, n_local_vocab]`
    pub values: &'a [f32],
    /// Token ids of the columns.
    pub vocab: Range<usize>,
    /// Ids from here on are padding and never sampled.
    pub n_usable: usize,
}

impl<'a> LogitSlices<'a> {
    fn row(&self, row_idx: usize) -> &'a [f32] {
        let width = self.vocab.len();
        let n_columns = self.vocab.end.min(self.n_usable).saturating_sub(self.vocab.start);
        &self.values[row_idx * width..][..n_columns]
    }
}

impl Sampler {
    /// Samples every row the plan asks for and adds the plan's tokens to the histories. Rank 0 gets one entry for
    /// each chunk with sampled rows, every other rank none.
    ///
    /// # Errors
    /// When the gather fails.
    pub fn sample(
        &mut self,
        plan: &StepPlan,
        sequences: &mut Sequences,
        logits: &LogitSlices<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<SequenceSamples>, CollectiveError> {
        self.own.clear();
        let mut row_idx = 0;
        for chunk in &plan.chunks {
            let sequence = sequences.get_mut(chunk.sequence);
            for (i, token) in chunk.tokens.iter().enumerate() {
                sequence.history.push(*token);
                if i >= first_sampled(chunk) {
                    self.prepare_row(sequence, logits.row(row_idx), logits.vocab.start as u32);
                    row_idx += 1;
                }
            }
        }
        collective.gather(&self.own, &mut self.parts)?;
        if collective.rank() != 0 {
            return Ok(Vec::new());
        }
        Ok(self.choose(plan, sequences))
    }

    /// Appends this rank's share of a row to what will be gathered. The history ends with the row's own token.
    fn prepare_row(&mut self, sequence: &Sequence, logits: &[f32], vocab_start: u32) {
        if needs_full_row(&sequence.sampling) {
            logits.iter().for_each(|logit| self.own.extend_from_slice(&logit.to_le_bytes()));
            return;
        }
        // Penalties and bias change the row; the decoder's logits stay as they are.
        self.row.clear();
        self.row.extend_from_slice(logits);
        let position = sequence.history.len() as u32;
        let best = local_best(&sequence.sampling, &sequence.history, position, vocab_start, &mut self.row);
        self.own.extend_from_slice(&best.to_bytes());
    }

    fn choose(&mut self, plan: &StepPlan, sequences: &mut Sequences) -> Vec<SequenceSamples> {
        let widths = self.full_row_bytes(plan, sequences);
        let mut cursors = vec![0; self.parts.len()];
        let mut samples = Vec::new();
        for chunk in plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0) {
            let sequence = sequences.get_mut(chunk.sequence);
            let is_full = needs_full_row(&sequence.sampling);
            let row_bytes = |rank: usize| if is_full { widths[rank] } else { CANDIDATE_BYTES };
            let mut tokens: Vec<SampledToken> = Vec::with_capacity(chunk.n_sampled as usize);
            for i in first_sampled(chunk)..chunk.tokens.len() {
                // A row counts only while every proposal before it was the target's own choice.
                let all_matched = tokens
                    .iter()
                    .zip(&chunk.tokens[first_sampled(chunk) + 1..])
                    .all(|(own, other)| own.token == *other);
                if all_matched {
                    sequence.history.truncate(chunk.start_pos as usize);
                    sequence.history.extend(&chunk.tokens[..=i]);
                    tokens.push(self.choose_row(sequence, &cursors, row_bytes));
                }
                cursors.iter_mut().enumerate().for_each(|(rank, cursor)| *cursor += row_bytes(rank));
            }
            sequence.history.truncate(chunk.start_pos as usize);
            sequence.history.extend(&chunk.tokens);
            samples.push(SequenceSamples { sequence: chunk.sequence, tokens });
        }
        samples
    }

    fn choose_row(
        &mut self,
        sequence: &Sequence,
        cursors: &[usize],
        row_bytes: impl Fn(usize) -> usize,
    ) -> SampledToken {
        let slices =
            self.parts.iter().enumerate().map(|(rank, part)| &part[cursors[rank]..][..row_bytes(rank)]);
        if needs_full_row(&sequence.sampling) {
            self.row.clear();
            slices.for_each(|slice| {
                self.row.extend(slice.as_chunks().0.iter().copied().map(f32::from_le_bytes))
            });
            let position = sequence.history.len() as u32;
            return sample_row(&sequence.sampling, &sequence.history, position, &mut self.row);
        }
        let candidates: Vec<Candidate> =
            slices.map(|slice| Candidate::from_bytes(slice.as_chunks().0[0])).collect();
        SampledToken { token: merge(&candidates), logprob: None, top_logprobs: Vec::new() }
    }

    /// Bytes of one full row in each rank's part, found from the parts' sizes.
    fn full_row_bytes(&self, plan: &StepPlan, sequences: &Sequences) -> Vec<usize> {
        let (mut n_full, mut n_candidates) = (0, 0);
        for chunk in &plan.chunks {
            let is_full = needs_full_row(&sequences.get(chunk.sequence).sampling);
            *(if is_full { &mut n_full } else { &mut n_candidates }) += chunk.n_sampled as usize;
        }
        let bytes =
            |part: &Vec<u8>| (part.len() - n_candidates * CANDIDATE_BYTES).checked_div(n_full).unwrap_or(0);
        self.parts.iter().map(bytes).collect()
    }
}

fn first_sampled(chunk: &SequenceChunk) -> usize {
    chunk.tokens.len() - chunk.n_sampled as usize
}
