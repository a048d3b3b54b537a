//! Tests of the sampler: each row beside the definition of sampling, over several ranks.

use paceline_collectives::Solo;
use paceline_domain::{
    BlockId, Branch, Epoch, HeldBack, SamplingParams, Scoring, SequenceId, SequenceOpen, StepNumber, TokenId,
    TokenMask,
};
use paceline_model::logits::LogitRows;
use paceline_sampling::{TokenHistory, allow_only, forbid, verify};

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
        branches: Vec::new(),
    }
}

fn open(chunk: &SequenceChunk, sampling: &SamplingParams) -> SequenceOpen {
    SequenceOpen {
        sequence: chunk.sequence,
        sampling: sampling.clone(),
        n_prompt: 1,
        cached_tokens: Vec::new(),
        cached_blocks: Vec::new(),
        copied: None,
        held_back: None,
        is_constrained: false,
    }
}

/// Samples of three sequences whose rows prefer these tokens: a verification, a prompt, another verification.
fn sampled(n_logprobs: Option<u32>) -> Vec<Vec<TokenId>> {
    let mut chunks = vec![chunk(1, &[1, 5, 6], 3), chunk(2, &[1, 2, 3], 1), chunk(3, &[4, 2], 2)];
    // Its first rows are scored; they are not sampled.
    chunks[1].scoring = Scoring { tokens: tokens(&[2, 3]), n_top: 0 };
    let opens = chunks.iter().map(|chunk| {
        // The last sequence always takes the other way through the gather.
        let n_logprobs = n_logprobs.or((chunk.sequence.0 == 3).then_some(0));
        open(chunk, &SamplingParams { n_logprobs, ..SamplingParams::greedy() })
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
    samples.into_iter().map(|samples| samples.tokens.iter().map(|sampled| sampled.token).collect()).collect()
}

#[test]
fn proposals_count_up_to_the_first_that_differs() {
    // Proposed 5 and 6, chosen 5 and 7; then a prompt's token; then proposed 2, chosen 2, and one for free.
    let expected = [tokens(&[5, 7]), tokens(&[4]), tokens(&[2, 6])];
    assert_eq!(sampled(None), expected);
    assert_eq!(sampled(Some(2)), expected);
}

/// Tokens of one row for each of these ways to sample; row i is `row(i)`.
fn sampled_with(n_usable: usize, params: &[SamplingParams], row: impl Fn(usize) -> Vec<f32>) -> Vec<TokenId> {
    let ids = 0..params.len() as u64;
    let chunks: Vec<SequenceChunk> = ids.map(|id| chunk(id, &[1, 2], 1)).collect();
    let opens = params.iter().zip(&chunks).map(|(sampling, chunk)| open(chunk, sampling));
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
    restrictions: (Option<HeldBack>, Option<Vec<TokenMask>>),
    logits: &[Vec<f32>],
    n_ranks: usize,
) -> Vec<SampledToken> {
    chosen(chunk(1, &[1, 5, 5, 6, 5], 4), (sampling, restrictions), logits, n_ranks)
}

/// What so many ranks choose for one chunk.
fn chosen(
    chunk: SequenceChunk,
    (sampling, (held_back, masks)): (&SamplingParams, (Option<HeldBack>, Option<Vec<TokenMask>>)),
    logits: &[Vec<f32>],
    n_ranks: usize,
) -> Vec<SampledToken> {
    let chunks = vec![chunk];
    let is_constrained = masks.is_some();
    let open = SequenceOpen { n_prompt: 2, held_back, is_constrained, ..open(&chunks[0], sampling) };
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

#[test]
fn a_branch_sees_the_tokens_before_it_and_its_own() {
    let noisy = SamplingParams { temperature: 0.8, seed: 3, ..SamplingParams::default() };
    let repeating = SamplingParams { frequency_penalty: -0.4, repetition_penalty: 1.2, ..noisy.clone() };
    let kinds = [
        SamplingParams { n_logprobs: Some(2), ..repeating.clone() },
        SamplingParams { top_k: 4, ..noisy },
        SamplingParams { presence_penalty: 0.9, ..SamplingParams::greedy() },
        repeating,
    ];
    let ids = tokens(&[1, 5, 5, 6, 5]);
    let (mut n_taken, mut n_misled) = (0, 0);
    for trial in 0..200u64 {
        let noise = |row: usize| paceline_sampling::noise::gumbel_group(trial, row as u32, 0);
        let logits: Vec<Vec<f32>> = (0..6).map(|row| noise(row)[..N_VOCAB].to_vec()).collect();
        let guesses = [(0, TokenId(trial as u32 % 5)), (1, TokenId(trial as u32 % 6))];
        let branch = |(after, token)| Branch { after, token, block: BlockId(0) };
        let chunk = SequenceChunk { branches: guesses.map(branch).to_vec(), ..chunk(1, &[1, 5, 5, 6, 5], 4) };
        let held_back = (trial % 2 == 0).then(|| HeldBack { until: 4, tokens: tokens(&[2, 7]) });
        for sampling in &kinds {
            let sample = |row: usize, before: &[TokenId]| {
                let mut history = TokenHistory::new(2);
                history.extend(before);
                let mut logits = logits[row].clone();
                if let Some(held) = held_back.as_ref().filter(|held| history.len() < held.until as usize) {
                    forbid(&held.tokens, 0, &mut logits);
                }
                sample_row(sampling, &history, history.len() as u32, &mut logits)
            };
            let guesses = guesses.map(|(after, token)| (after as usize, token));
            let expected = verify_branches(&ids[2..], &guesses, |row| {
                let Row::Branch(branch) = row else {
                    let Row::After(n) = row else { unreachable!("it is no branch") };
                    return Ok::<_, Infallible>(sample(n, &ids[..2 + n]));
                };
                let (after, token) = guesses[branch];
                let found = sample(4 + branch, &[&ids[..2 + after], &[token]].concat());
                n_misled += u32::from(found != sample(4 + branch, &ids[..3 + after]));
                n_taken += 1;
                Ok(found)
            });
            let Ok(expected) = expected;
            for n_ranks in [1, 2, 3] {
                let restrictions = (held_back.clone(), None);
                let found = chosen(chunk.clone(), (sampling, restrictions), &logits, n_ranks);
                assert_eq!(found, expected, "{n_ranks} ranks {sampling:?}");
            }
        }
    }
    assert!(n_taken > 100 && n_misled > 20, "taken, misled: {:?}", (n_taken, n_misled));
}
