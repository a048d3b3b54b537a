//! From the logits of all ranks to tokens on rank 0: each rank prepares its slice of each sampled row, one gather
//! brings them together, rank 0 chooses. A row that needs no filter travels as one candidate of eight bytes, any
//! other as its logits.

use std::{convert::Infallible, ops::Range};

use paceline_collectives::{Collective, CollectiveError};
use paceline_domain::{SampledToken, SequenceChunk, SequenceSamples, StepPlan};
use paceline_sampling::{Candidate, local_best, merge, needs_full_row, sample_row, verify};

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
            let first = first_sampled(chunk);
            let verified = verify(&chunk.tokens[first + 1..], |row| {
                sequence.history.truncate(chunk.start_pos as usize);
                sequence.history.extend(&chunk.tokens[..=first + row]);
                let row_starts: Vec<usize> =
                    cursors.iter().enumerate().map(|(rank, cursor)| cursor + row * row_bytes(rank)).collect();
                Ok::<_, Infallible>(self.choose_row(sequence, &row_starts, row_bytes))
            });
            let Ok(tokens) = verified;
            for (rank, cursor) in cursors.iter_mut().enumerate() {
                *cursor += chunk.n_sampled as usize * row_bytes(rank);
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
        row_starts: &[usize],
        row_bytes: impl Fn(usize) -> usize,
    ) -> SampledToken {
        let slices =
            self.parts.iter().enumerate().map(|(rank, part)| &part[row_starts[rank]..][..row_bytes(rank)]);
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

#[cfg(test)]
mod tests {
    use paceline_collectives::Solo;
    use paceline_domain::{BlockId, Epoch, SamplingParams, SequenceId, SequenceOpen, StepNumber, TokenId};

    use super::*;

    const N_VOCAB: usize = 8;

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    fn chunk(id: u64, ids: &[u32], n_sampled: u32) -> SequenceChunk {
        SequenceChunk {
            sequence: SequenceId(id),
            start_pos: 0,
            tokens: tokens(ids),
            new_blocks: vec![BlockId(id as u32)],
            n_kept_blocks: 0,
            n_sampled,
        }
    }

    /// Samples of three sequences whose rows prefer these tokens: a verification, a prompt, another verification.
    fn sampled(n_logprobs: Option<u32>) -> Vec<Vec<TokenId>> {
        let chunks = vec![chunk(1, &[1, 5, 6], 3), chunk(2, &[1, 2, 3], 1), chunk(3, &[4, 2], 2)];
        let opens = chunks.iter().map(|chunk| SequenceOpen {
            sequence: chunk.sequence,
            // The last sequence always takes the other way through the gather.
            sampling: SamplingParams {
                n_logprobs: n_logprobs.or((chunk.sequence.0 == 3).then_some(0)),
                ..SamplingParams::greedy()
            },
            n_prompt: 1,
            cached_tokens: Vec::new(),
            cached_blocks: Vec::new(),
        });
        let opens = opens.collect();
        let plan = StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens, chunks };
        let mut values = vec![0.0; 6 * N_VOCAB];
        for (row, best) in [5, 7, 3, 4, 2, 6].into_iter().enumerate() {
            values[row * N_VOCAB + best] = 1.0;
        }
        let logits = LogitSlices { values: &values, vocab: 0..N_VOCAB, n_usable: N_VOCAB };
        let mut sequences = Sequences::new(8);
        sequences.begin(&plan).unwrap();
        let samples = Sampler::default().sample(&plan, &mut sequences, &logits, &mut Solo::new()).unwrap();
        for chunk in &plan.chunks {
            assert_eq!(sequences.get(chunk.sequence).history.tokens(), chunk.tokens);
        }
        samples
            .into_iter()
            .map(|samples| samples.tokens.iter().map(|sampled| sampled.token).collect())
            .collect()
    }

    #[test]
    fn proposals_count_up_to_the_first_that_differs() {
        // Proposed 5 and 6, chosen 5 and 7; then a prompt's token; then proposed 2, chosen 2, and one for free.
        let expected = [tokens(&[5, 7]), tokens(&[4]), tokens(&[2, 6])];
        assert_eq!(sampled(None), expected);
        assert_eq!(sampled(Some(2)), expected);
    }

    #[test]
    fn padding_of_the_vocabulary_is_never_sampled() {
        let logits = LogitSlices { values: &[0.0; 16], vocab: 8..16, n_usable: 10 };
        assert_eq!(logits.row(1).len(), 2);
        let padding_only = LogitSlices { values: &[0.0; 8], vocab: 16..24, n_usable: 10 };
        assert_eq!(padding_only.row(0).len(), 0);
    }
}
