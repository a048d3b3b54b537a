//! Sampling on the emulated device: the same tokens and values as the crate `paceline-sampling`, to the last bit.

mod support;

use paceline_cuda::kernels::batch::BatchHeader;
use paceline_cuda::kernels::sampling::{
    AdjustArgs, BestArgs, BestToken, SampleRow, adjust_logits, adjustments, best_tokens, n_parts,
    restore_logits,
};
use paceline_cuda::{CudaError, Runtime};
use paceline_domain::{SamplingParams, TokenId};
use paceline_model::logits::{Choice, Columns};
use paceline_sampling::{TokenHistory, local_best, plain_best};
use support::{
    arrays::{Random, get, only, put},
    emulated::Emulated,
};

/// A slice of the vocabulary.
#[derive(Clone, Copy)]
struct Slice {
    vocab_start: u32,
    n_tokens: usize,
    /// Logits behind the tokens, which never win.
    n_padding: usize,
    n_parts: u32,
}

impl Slice {
    fn new(vocab_start: u32, n_tokens: usize) -> Self {
        Self { vocab_start, n_tokens, n_padding: 3, n_parts: n_parts(n_tokens as u32) }
    }

    fn row_stride(&self) -> usize {
        self.n_tokens + self.n_padding
    }
}

type Cut = (f32, u32);

fn bits(best: &BestToken) -> (u32, u32) {
    (best.value.to_bits(), best.token)
}

/// The best tokens of rows of logits, each `[n_tokens]`.
fn device_best(
    device: &mut Emulated,
    slice: Slice,
    logits: &[Vec<f32>],
    samples: &[SampleRow],
    cuts: Option<&[Cut]>,
) -> Result<Vec<BestToken>, CudaError> {
    let n_rows = logits.len();
    let mut padded = Vec::new();
    for row in logits {
        padded.extend_from_slice(row);
        padded.extend(std::iter::repeat_n(f32::INFINITY, slice.n_padding));
    }
    let cuts: Option<Vec<u32>> =
        cuts.map(|cuts| cuts.iter().flat_map(|(logit, token)| [logit.to_bits(), *token]).collect());
    let header = BatchHeader { n_output_rows: n_rows as u32, ..BatchHeader::default() };
    let best = put(device, &vec![BestToken { value: f32::NAN, token: 77 }; n_rows + 2]);
    let args = BestArgs {
        logits: put(device, &padded),
        rows: put(device, samples),
        cuts: cuts.map_or(0, |cuts| put(device, &cuts)),
        header: put(device, &[header]),
        of_part: device.alloc((n_rows + 2) * slice.n_parts as usize * size_of::<BestToken>())?,
        best,
        row_stride: slice.row_stride() as u32,
        vocab_start: slice.vocab_start,
        n_tokens: slice.n_tokens as u32,
        n_parts: slice.n_parts,
    };
    best_tokens(device, n_rows + 2, &args)?;
    let found: Vec<BestToken> = get(device, best, n_rows + 2);
    assert!(found[n_rows..].iter().all(|row| row.token == 77), "rows beyond the batch");
    Ok(found[..n_rows].to_vec())
}

/// Rows with every kind of logit: ordinary, equal, infinite, not a number.
fn rows(n_rows: usize, n_tokens: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random(seed);
    let mut logit = |kind: usize| match (kind % 4, random.below(40)) {
        (1, 0) => f32::NAN,
        (1, 1) => f32::NEG_INFINITY,
        (2, 0) => f32::INFINITY,
        (2, _) => random.below(9) as f32 * 0.5,
        (3, _) => f32::NEG_INFINITY,
        _ => 12.0 * random.number(),
    };
    (0..n_rows).map(|row| (0..n_tokens).map(|_| logit(row)).collect()).collect()
}

fn samples(n_rows: usize, seed: u64) -> Vec<SampleRow> {
    let mut random = Random(seed);
    let temperatures = [0.0, 0.3, 1.0, 2.5];
    let sample = |row: usize| SampleRow {
        seed: random.word(),
        position: random.below(100_000) as u32,
        temperature: temperatures[(row / 4 + row) % 4],
    };
    (0..n_rows).map(sample).collect()
}

/// As the sampling crate does it; tokens behind the cut are as if their logits were -inf.
fn expected(slice: Slice, logits: &[f32], sample: &SampleRow, cut: Option<Cut>) -> BestToken {
    let mut logits = logits.to_vec();
    if let Some((last, token)) = cut {
        for (i, logit) in logits.iter_mut().enumerate() {
            let is_kept = *logit > last || (*logit == last && slice.vocab_start + i as u32 <= token);
            *logit = if is_kept { *logit } else { f32::NEG_INFINITY };
        }
    }
    let best = plain_best(sample.seed, sample.position, sample.temperature, slice.vocab_start, &logits);
    BestToken { value: best.value, token: best.token.0 }
}

fn check(mut device: Emulated, slice: Slice, with_cuts: bool) -> Result<(), String> {
    // Rows of one token show the noise of every row, not of winners only, when their logits are 0.
    let (n_rows, logits) = match slice.n_tokens {
        1 => (4_000, vec![vec![0.0]; 4_000]),
        n => (16, rows(16, n, u64::from(slice.vocab_start) + 1)),
    };
    let samples = samples(n_rows, slice.n_tokens as u64);
    // A logit of the row itself, so that equal ones are on both sides; of every third row the first of the largest.
    let cut = |(row, logits): (usize, &Vec<f32>)| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let largest = logits.iter().position(|logit| *logit == max).filter(|_| row % 3 == 0);
        let i = largest.unwrap_or((row * 31) % logits.len());
        let logit = if logits[i].is_nan() { 0.0 } else { logits[i] };
        (logit, slice.vocab_start + i as u32)
    };
    let cuts: Option<Vec<Cut>> = with_cuts.then(|| logits.iter().enumerate().map(cut).collect());
    let found = device_best(&mut device, slice, &logits, &samples, cuts.as_deref());
    for (row, found) in found.map_err(|error| error.to_string())?.iter().enumerate() {
        let cut = cuts.as_ref().map(|cuts| cuts[row]);
        let expected = expected(slice, &logits[row], &samples[row], cut);
        if bits(found) != bits(&expected) {
            return Err(format!("row {row}: {found:?}, not {expected:?}"));
        }
    }
    Ok(())
}

#[test]
fn tokens_and_values_are_those_of_the_crate() {
    // Slices that begin and end anywhere in the groups of the generator.
    for (vocab_start, n_tokens) in
        [(0, 1), (7, 1), (0, 1_000), (5, 2), (17, 3_001), (32_000, 4_096), (151_643, 293)]
    {
        for with_cuts in [false, true] {
            let outcome = check(Emulated::new(), Slice::new(vocab_start, n_tokens), with_cuts);
            assert_eq!(outcome, Ok(()), "{n_tokens} tokens from {vocab_start}, cuts: {with_cuts}");
        }
    }
}

#[test]
fn any_number_of_blocks_gives_the_same() {
    for n_parts in [1, 2, 7, 33] {
        let slice = Slice { n_parts, ..Slice::new(6, 5_000) };
        assert_eq!(check(Emulated::new().with_seed(9), slice, false), Ok(()), "{n_parts} blocks");
    }
}

#[test]
fn a_slice_is_a_part_of_the_row() {
    // The best of all slices is the best of the row.
    let logits = rows(8, 3_000, 3);
    let samples = samples(8, 4);
    let mut device = Emulated::new();
    let whole = device_best(&mut device, Slice::new(0, 3_000), &logits, &samples, None).expect("runs");
    let edges = [0, 700, 1_501, 3_000];
    let parts: Vec<Vec<BestToken>> = edges
        .windows(2)
        .map(|edge| {
            let logits: Vec<Vec<f32>> = logits.iter().map(|row| row[edge[0]..edge[1]].to_vec()).collect();
            let slice = Slice::new(edge[0] as u32, edge[1] - edge[0]);
            device_best(&mut device, slice, &logits, &samples, None).expect("runs")
        })
        .collect();
    for row in 0..8 {
        let of_slices = parts.iter().map(|part| part[row]);
        let best = of_slices.reduce(|best, next| if next.value > best.value { next } else { best });
        assert_eq!(bits(&best.expect("three slices")), bits(&whole[row]));
    }
}

/// Penalties and biases of some requests.
fn requests() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    let bias = vec![(TokenId(3), 2.5), (TokenId(40), -100.0), (TokenId(700), 0.1), (TokenId(999), 1e9)];
    vec![
        SamplingParams { repetition_penalty: 1.3, ..plain.clone() },
        SamplingParams { presence_penalty: 0.7, frequency_penalty: 0.31, ..plain.clone() },
        SamplingParams { logit_bias: bias.clone(), ..plain.clone() },
        SamplingParams {
            repetition_penalty: 0.9,
            frequency_penalty: -0.2,
            logit_bias: bias,
            ..plain.clone()
        },
        plain,
    ]
}

fn check_adjusted(device: &mut Emulated, vocab: std::ops::Range<u32>) -> Result<(), String> {
    let (requests, n_tokens) = (requests(), vocab.len());
    let mut history = TokenHistory::new(300);
    let mut random = Random(8);
    (0..900).for_each(|_| history.push(TokenId(random.below(500) as u32 * 2)));
    let logits = rows(requests.len(), n_tokens, 11);
    let columns = Columns { first_token: TokenId(vocab.start), n_usable: n_tokens };
    // Not all of the history counts.
    let position = 880;
    let mut changes = Vec::new();
    for (row, sampling) in requests.iter().enumerate() {
        adjustments(&Choice { row, position, sampling, history: &history }, columns, &mut changes);
    }
    let on_device = put(device, &logits.concat());
    let args = AdjustArgs {
        logits: on_device,
        adjustments: put(device, &changes),
        before: put(device, &vec![0f32; changes.len()]),
        row_stride: n_tokens as u32,
        n_adjustments: changes.len() as u32,
    };
    adjust_logits(device, &args).map_err(|error| error.to_string())?;
    let found: Vec<f32> = get(device, on_device, requests.len() * n_tokens);
    for (row, params) in requests.iter().enumerate() {
        let mut expected = logits[row].clone();
        local_best(params, &history, position, vocab.start, &mut expected);
        // The kernel leaves what is not a number, where nothing is changed, to the search.
        let bits = |logit: &f32| if logit.is_nan() { f32::NEG_INFINITY } else { *logit }.to_bits();
        let differs = |i: &usize| bits(&found[row * n_tokens + i]) != expected[*i].to_bits();
        if let Some(i) = (0..n_tokens).find(differs) {
            let found = found[row * n_tokens + i];
            return Err(format!("row {row} column {i}: {found}, not {}", expected[i]));
        }
    }
    restore_logits(device, &args).map_err(|error| error.to_string())?;
    let restored: Vec<f32> = get(device, on_device, requests.len() * n_tokens);
    let is_same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    let is_restored = restored.iter().zip(logits.iter().flatten()).all(is_same);
    if is_restored { Ok(()) } else { Err("the logits are not as before".into()) }
}

#[test]
fn penalties_and_biases_are_those_of_the_crate() {
    for vocab in [0..1_000, 20..720, 500..501] {
        assert_eq!(check_adjusted(&mut Emulated::new(), vocab.clone()), Ok(()), "{vocab:?}");
    }
    for (from, to) in [
        (
            "__fsub_rn(__fsub_rn(logit, presence), __fmul_rn(it.frequency, (float)it.n_output))",
            "fmaf(-it.frequency, (float)it.n_output, __fsub_rn(logit, presence))",
        ),
        ("logit < 0 ? ", "logit > 0 ? "),
        ("args.before[i] = logit;", "args.before[i] = logit + 1;"),
    ] {
        let sources = only(&["sampling.cu"]).mutated("sampling.cu", from, to);
        assert!(check_adjusted(&mut Emulated::of(&sources), 0..1_000).is_err(), "{to}");
    }
}

#[test]
fn mistakes_are_found() {
    let slice = Slice::new(5, 2_000);
    assert_eq!(check(Emulated::of(&only(&["sampling.cu"])), slice, true), Ok(()));
    for (file, from, to) in [
        // One rounding where the crate has two.
        (
            "sampling.cuh",
            "__fadd_rn(__fmul_rn(twice, tail), __fmul_rn(x.e, LN_2_LOW))",
            "fmaf(twice, tail, __fmul_rn(x.e, LN_2_LOW))",
        ),
        ("sampling.cu", "a.token < b.token", "a.token > b.token"),
        ("sampling.cuh", "token <= cut.token", "token < cut.token"),
        (
            "sampling.cu",
            "mask = 16; mask > 0; mask /= 2) {\n        Candidate",
            "mask = 8; mask > 0; mask /= 2) {\n        Candidate",
        ),
        ("sampling.cu", "part < args.n_parts; part += 32", "part + 1 < args.n_parts; part += 32"),
        ("sampling.cu", "most = fmaxf(most, logit[i]);", "most = logit[i];"),
    ] {
        let device = || Emulated::of(&only(&["sampling.cu"]).mutated(file, from, to));
        let wide = Slice { n_parts: 3, ..slice };
        let ways = [(wide, false), (wide, true), (Slice::new(5, 1), false)];
        let found = ways.map(|(slice, with_cuts)| check(device(), slice, with_cuts).is_err());
        assert!(found.contains(&true), "{to}");
    }
}
