//! From the logits of all ranks to tokens on rank 0: each rank prepares its slice of each sampled row, one gather
//! brings them together, rank 0 chooses. A row that needs no filter travels as one candidate of eight bytes, any
//! other as its logits. The candidates of plain rows are found where the logits are, all of a step in one call.

use std::convert::Infallible;

use paceline_collectives::Collective;
use paceline_domain::{SampledToken, SequenceChunk, SequenceSamples, StepPlan};
use paceline_model::{Logits, ModelError, logits::Choice};
use paceline_sampling::{Candidate, is_plain, local_best, merge, needs_full_row, sample_row, verify};

use crate::sequences::{Sequence, Sequences};

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
    /// Plain rows of the step, where their candidates go in `own`, and the candidates.
    plain: Vec<Choice>,
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
            plain: Vec::new(),
            places: Vec::new(),
            best: Vec::new(),
        }
    }

    /// Samples every row the plan asks for and adds the plan's tokens to the histories. Rank 0 gets one entry for
    /// each chunk with sampled rows, every other rank none. `logits` has the sampled rows in plan order.
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
        self.own.clear();
        self.plain.clear();
        self.places.clear();
        let mut row_idx = 0;
        for chunk in &plan.chunks {
            let sequence = sequences.get_mut(chunk.sequence);
            for (i, token) in chunk.tokens.iter().enumerate() {
                sequence.history.push(*token);
                if i >= first_sampled(chunk) {
                    self.prepare_row(sequence, row_idx, logits)?;
                    row_idx += 1;
                }
            }
        }
        logits.best(self.n_usable, &self.plain, &mut self.best)?;
        for (place, best) in self.places.iter().zip(&self.best) {
            self.own[*place..][..CANDIDATE_BYTES].copy_from_slice(&best.to_bytes());
        }
        collective.gather(&self.own, &mut self.parts)?;
        if collective.rank() != 0 {
            return Ok(Vec::new());
        }
        Ok(self.choose(plan, sequences))
    }

    /// Appends this rank's share of a row to what will be gathered. The history ends with the row's own token.
    fn prepare_row(
        &mut self,
        sequence: &Sequence,
        row: usize,
        logits: &mut Logits<'_>,
    ) -> Result<(), ModelError> {
        let Sequence { sampling, history, .. } = sequence;
        let position = history.len() as u32;
        if is_plain(sampling) {
            let (seed, temperature) = (sampling.seed, sampling.temperature);
            self.plain.push(Choice { row, position, seed, temperature });
            self.places.push(self.own.len());
            self.own.extend_from_slice(&[0; CANDIDATE_BYTES]);
            return Ok(());
        }
        let columns = logits.columns(self.n_usable);
        let logits = &logits.row(row)?[..columns.n_usable];
        if needs_full_row(sampling) {
            logits.iter().for_each(|logit| self.own.extend_from_slice(&logit.to_le_bytes()));
            return Ok(());
        }
        // Penalties and bias change the row; the decoder's logits stay as they are.
        self.row.clear();
        self.row.extend_from_slice(logits);
        let best = local_best(sampling, history, position, columns.first_token.0, &mut self.row);
        self.own.extend_from_slice(&best.to_bytes());
        Ok(())
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
    use paceline_model::logits::LogitRows;

    use super::*;

    const N_VOCAB: usize = 8;

    /// Rows of logits in memory.
    struct Rows(Vec<Vec<f32>>);

    impl LogitRows for Rows {
        fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
            Ok(&self.0[row])
        }
    }

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
        let mut rows = Rows(vec![vec![0.0; N_VOCAB]; 6]);
        for (row, best) in [5, 7, 3, 4, 2, 6].into_iter().enumerate() {
            rows.0[row][best] = 1.0;
        }
        let mut logits = Logits::new(&mut rows, 6, 0..N_VOCAB);
        let mut sequences = Sequences::new(8);
        sequences.begin(&plan).unwrap();
        let mut sampler = Sampler::new(N_VOCAB);
        let samples = sampler.sample(&plan, &mut sequences, &mut logits, &mut Solo::new()).unwrap();
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

    /// Tokens of one row for each of these ways to sample; row i is `row(i)`.
    fn sampled_with(
        n_usable: usize,
        params: &[SamplingParams],
        row: impl Fn(usize) -> Vec<f32>,
    ) -> Vec<TokenId> {
        let ids = 0..params.len() as u64;
        let chunks: Vec<SequenceChunk> = ids.map(|id| chunk(id, &[1, 2], 1)).collect();
        let opens = params.iter().zip(&chunks).map(|(sampling, chunk)| SequenceOpen {
            sequence: chunk.sequence,
            sampling: sampling.clone(),
            n_prompt: 1,
            cached_tokens: Vec::new(),
            cached_blocks: Vec::new(),
        });
        let opens = opens.collect();
        let plan = StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens, chunks };
        let mut rows = Rows((0..params.len()).map(row).collect());
        let mut logits = Logits::new(&mut rows, params.len(), 0..N_VOCAB);
        let mut sequences = Sequences::new(16);
        sequences.begin(&plan).unwrap();
        let mut sampler = Sampler::new(n_usable);
        let samples = sampler.sample(&plan, &mut sequences, &mut logits, &mut Solo::new()).unwrap();
        samples.iter().flat_map(|samples| &samples.tokens).map(|sampled| sampled.token).collect()
    }

    #[test]
    fn padding_of_the_vocabulary_is_never_sampled() {
        let plain = SamplingParams::greedy();
        let biased = SamplingParams { logit_bias: vec![(TokenId(2), 0.5)], ..plain.clone() };
        let whole = SamplingParams { n_logprobs: Some(0), ..plain.clone() };
        let row = vec![0.0, 0.0, 0.0, 0.0, 1.0, 9.0, 9.0, 9.0];
        assert_eq!(sampled_with(5, &[plain, biased, whole], |_| row.clone()), [TokenId(4); 3]);
    }

    #[test]
    fn rows_of_a_step_do_not_disturb_each_other() {
        let noisy = SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() };
        let of_kind = |i: usize| match i % 4 {
            0 => noisy.clone(),
            1 => SamplingParams { presence_penalty: 0.7, ..noisy.clone() },
            2 => SamplingParams { top_k: 3, ..noisy.clone() },
            _ => SamplingParams::greedy(),
        };
        let row = |i: usize| (0..N_VOCAB).map(|token| ((token * 7 + i * 5) % 11) as f32 * 0.3).collect();
        let params: Vec<SamplingParams> = (0..12).map(of_kind).collect();
        let alone = (0..12).flat_map(|i| sampled_with(N_VOCAB, &params[i..=i], |_| row(i)));
        assert_eq!(sampled_with(N_VOCAB, &params, row), alone.collect::<Vec<_>>());
    }
}
