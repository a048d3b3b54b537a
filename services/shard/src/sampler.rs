//! From the logits of all ranks to tokens on rank 0: each rank prepares its slice of each sampled row, one gather
//! brings them together, rank 0 chooses. A row travels as one candidate of eight bytes, found where the logits are with
//! all of the step in one call; where it must be whole and is not, or is asked for log probabilities, as its logits.
//! Rows that must not choose some tokens are brought to the host for it.

use std::convert::Infallible;
use std::ops::Range;

use paceline_collectives::Collective;
use paceline_domain::{
    HeldBack, SampledToken, SamplingParams, SequenceChunk, SequenceSamples, StepPlan, TokenMask,
};
use paceline_model::{
    Logits, ModelError,
    logits::{Choice, Columns},
};
use paceline_sampling::{
    Candidate, allow_only, forbid, local_best, merge, needs_full_row, sample_row, verify,
};

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
        let mut choices = Vec::with_capacity(logits.n_rows());
        let mut row = 0;
        for chunk in &plan.chunks {
            let sequence = sequences.get(chunk.sequence);
            let Sequence { sampling, history, .. } = sequence;
            let is_whole = travels_whole(sampling, n_ranks);
            row += chunk.scoring.tokens.len();
            for i in 0..chunk.n_sampled as usize {
                let position = position(chunk, i);
                let restriction = Restriction::of(sequence, position, i);
                if is_whole || !restriction.is_nothing() {
                    self.row.clear();
                    self.row.extend_from_slice(&logits.row(row)?[..columns.n_usable]);
                    restriction.apply(columns, &mut self.row);
                    if is_whole { self.add_logits() } else { self.add_best(sequence, position, columns) }
                } else {
                    choices.push(Choice { row, position, sampling, history });
                    self.places.push(self.own.len());
                    self.own.extend_from_slice(&[0; CANDIDATE_BYTES]);
                }
                row += 1;
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

    /// Lays out the best token of the row at hand.
    fn add_best(&mut self, sequence: &Sequence, position: u32, columns: Columns) {
        let Sequence { sampling, history, .. } = sequence;
        let best = local_best(sampling, history, position, columns.first_token.0, &mut self.row);
        self.own.extend_from_slice(&best.to_bytes());
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
            let proposed = &chunk.tokens[first_sampled(chunk) + 1..];
            let verified = verify(proposed, |row| {
                let start = |rank: usize| cursors[rank] + row * row_bytes(rank);
                let slices = (0..n_ranks).map(|rank| start(rank)..start(rank) + row_bytes(rank));
                let token = if is_whole {
                    self.sample_whole(sequence, position(chunk, row), slices)
                } else {
                    self.best_candidate(slices)
                };
                Ok::<_, Infallible>(token)
            });
            let Ok(tokens) = verified;
            for (rank, cursor) in cursors.iter_mut().enumerate() {
                *cursor += chunk.n_sampled as usize * row_bytes(rank);
            }
            samples.push(SequenceSamples { sequence: chunk.sequence, tokens });
        }
        samples
    }

    /// The token of a row whose slices are at these places of the ranks' parts.
    fn sample_whole(
        &mut self,
        sequence: &Sequence,
        position: u32,
        slices: impl Iterator<Item = Range<usize>>,
    ) -> SampledToken {
        self.row.clear();
        for (part, slice) in self.parts.iter().zip(slices) {
            self.row.extend(part[slice].as_chunks().0.iter().copied().map(f32::from_le_bytes));
        }
        sample_row(&sequence.sampling, &sequence.history, position, &mut self.row)
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
            *(if is_whole { &mut n_whole } else { &mut n_candidates }) += chunk.n_sampled as usize;
        }
        let bytes =
            |part: &Vec<u8>| (part.len() - n_candidates * CANDIDATE_BYTES).checked_div(n_whole).unwrap_or(0);
        self.parts.iter().map(bytes).collect()
    }
}

/// What a row must not choose.
struct Restriction<'a> {
    held_back: Option<&'a HeldBack>,
    mask: Option<&'a TokenMask>,
}

impl<'a> Restriction<'a> {
    /// Of the token at a position, that the i-th sampled row of its chunk chooses.
    fn of(sequence: &'a Sequence, position: u32, i: usize) -> Self {
        Self {
            held_back: sequence.held_back.as_ref().filter(|held| position < held.until),
            mask: sequence.masks.get(i).filter(|mask| !mask.is_open()),
        }
    }

    fn is_nothing(&self) -> bool {
        self.held_back.is_none() && self.mask.is_none()
    }

    fn apply(&self, columns: Columns, logits: &mut [f32]) {
        if let Some(held) = self.held_back {
            forbid(&held.tokens, columns.first_token.0, logits);
        }
        if let Some(mask) = self.mask {
            allow_only(mask, columns.first_token.0, logits);
        }
    }
}

/// Whether rank 0 needs the logits of a row; the ranks agree on it. One rank alone filters where the logits are.
fn travels_whole(sampling: &SamplingParams, n_ranks: usize) -> bool {
    sampling.n_logprobs.is_some() || (n_ranks > 1 && needs_full_row(sampling))
}

/// Position of the token that the chunk's i-th sampled row chooses: the number of tokens up to the row's own.
fn position(chunk: &SequenceChunk, i: usize) -> u32 {
    chunk.start_pos + (first_sampled(chunk) + i + 1) as u32
}

fn first_sampled(chunk: &SequenceChunk) -> usize {
    chunk.tokens.len() - chunk.n_sampled as usize
}

#[cfg(test)]
mod tests {
    use paceline_collectives::Solo;
    use paceline_domain::{
        BlockId, Epoch, SamplingParams, Scoring, SequenceId, SequenceOpen, StepNumber, TokenId,
    };
    use paceline_model::logits::LogitRows;
    use paceline_sampling::TokenHistory;

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
            runs_ahead: false,
            scoring: Scoring::default(),
        }
    }

    /// Samples of three sequences whose rows prefer these tokens: a verification, a prompt, another verification.
    fn sampled(n_logprobs: Option<u32>) -> Vec<Vec<TokenId>> {
        let mut chunks = vec![chunk(1, &[1, 5, 6], 3), chunk(2, &[1, 2, 3], 1), chunk(3, &[4, 2], 2)];
        // Its first rows are scored; they are not sampled.
        chunks[1].scoring = Scoring { tokens: tokens(&[2, 3]), n_top: 0 };
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
            copied: None,
            held_back: None,
            is_constrained: false,
        });
        let opens = opens.collect();
        let plan = StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens, chunks };
        let mut rows = Rows(vec![vec![0.0; N_VOCAB]; 8]);
        for (row, best) in [5, 7, 3, 1, 1, 4, 2, 6].into_iter().enumerate() {
            rows.0[row][best] = 1.0;
        }
        let mut logits = Logits::new(&mut rows, 8, 0..N_VOCAB);
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
            copied: None,
            held_back: None,
            is_constrained: false,
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

    /// Rows 1 .. of a verification of three proposals, chosen by this many ranks.
    fn verified(
        sampling: &SamplingParams,
        (held_back, masks): (Option<HeldBack>, Option<Vec<TokenMask>>),
        logits: &[Vec<f32>],
        n_ranks: usize,
    ) -> Vec<SampledToken> {
        let chunks = vec![chunk(1, &[1, 5, 5, 6, 5], 4)];
        let open = SequenceOpen {
            sequence: SequenceId(1),
            sampling: sampling.clone(),
            n_prompt: 2,
            cached_tokens: Vec::new(),
            cached_blocks: Vec::new(),
            copied: None,
            held_back,
            is_constrained: masks.is_some(),
        };
        let plan =
            StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens: vec![open], chunks };
        let mut sequences = Sequences::new(8);
        sequences.begin(&plan).expect("a plan");
        sequences.get_mut(SequenceId(1)).history.extend(&plan.chunks[0].tokens);
        sequences.get_mut(SequenceId(1)).masks = masks.unwrap_or_default();
        let mut sampler = Sampler::new(N_VOCAB);
        let mut part = |rank: usize| {
            let vocab = N_VOCAB * rank / n_ranks..N_VOCAB * (rank + 1) / n_ranks;
            let mut rows = Rows(logits.iter().map(|row| row[vocab.clone()].to_vec()).collect());
            let mut logits = Logits::new(&mut rows, logits.len(), vocab);
            sampler.prepare(&plan, &sequences, &mut logits, n_ranks).expect("rows");
            sampler.own.clone()
        };
        sampler.parts = (0..n_ranks).map(&mut part).collect();
        sampler.choose(&plan, &sequences).remove(0).tokens
    }

    #[test]
    fn each_verified_row_sees_the_tokens_before_it_and_no_later_one() {
        let noisy = SamplingParams { temperature: 0.8, seed: 3, ..SamplingParams::default() };
        let repeating = SamplingParams { frequency_penalty: -0.4, repetition_penalty: 1.2, ..noisy };
        let kinds = [
            SamplingParams { temperature: 0.0, n_logprobs: Some(2), ..repeating.clone() },
            SamplingParams { top_k: 4, logit_bias: vec![(TokenId(5), 0.3)], ..repeating.clone() },
            SamplingParams { presence_penalty: 0.9, min_p: 0.1, ..SamplingParams::greedy() },
            repeating,
        ];
        let (mut n_accepted, mut n_misled, mut n_held) = (0, 0, 0);
        for trial in 0..200u64 {
            let noise = |row: usize| paceline_sampling::noise::gumbel_group(trial, row as u32, 0);
            let logits: Vec<Vec<f32>> = (0..4).map(|row| noise(row)[..N_VOCAB].to_vec()).collect();
            let held_back = (trial % 2 == 0).then(|| HeldBack { until: 4, tokens: tokens(&[2, 7]) });
            let mask = |row: u32| TokenMask::of_words(vec![0b0110_0110 ^ (1 << ((trial as u32 + row) % 8))]);
            let masks = (trial % 3 == 0).then(|| (0..4).map(mask).collect::<Vec<_>>());
            for sampling in &kinds {
                let ids = tokens(&[1, 5, 5, 6, 5]);
                let mut history = TokenHistory::new(2);
                history.extend(&ids[..2]);
                let expected = verify(&ids[2..], |row| {
                    if row > 0 {
                        history.push(ids[row + 1]);
                    }
                    let free = |history: &TokenHistory, position| {
                        sample_row(sampling, history, position, &mut logits[row].clone())
                    };
                    let sample = |history: &TokenHistory, position| {
                        let mut logits = logits[row].clone();
                        if let Some(held) = held_back.as_ref().filter(|held| position < held.until) {
                            forbid(&held.tokens, 0, &mut logits);
                        }
                        if let Some(masks) = &masks {
                            allow_only(&masks[row], 0, &mut logits);
                        }
                        sample_row(sampling, history, position, &mut logits)
                    };
                    let mut all = TokenHistory::new(2);
                    all.extend(&ids);
                    let found = sample(&history, history.len() as u32);
                    n_misled += u32::from(free(&all, u32::MAX).token != found.token);
                    n_held += u32::from(free(&history, history.len() as u32).token != found.token);
                    Ok::<_, Infallible>(found)
                });
                let Ok(expected) = expected;
                n_accepted += expected.len() - 1;
                for n_ranks in [1, 2, 3] {
                    assert_eq!(
                        verified(sampling, (held_back.clone(), masks.clone()), &logits, n_ranks),
                        expected,
                        "{n_ranks} ranks {sampling:?}"
                    );
                }
            }
        }
        let counts = (n_accepted, n_misled, n_held);
        assert!(n_accepted > 100 && n_misled > 100 && n_held > 50, "accepted, misled, held: {counts:?}");
    }
}
