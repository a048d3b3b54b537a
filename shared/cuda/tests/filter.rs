//! Filters on the emulated device: the same cuts as the crate `paceline-sampling`, to the last bit.

mod support;

use paceline_cuda::kernels::batch::BatchHeader;
use paceline_cuda::kernels::filter::{CutArgs, FilterRow, LastKept, MAX_RANKED, find_cuts};
use paceline_domain::SamplingParams;
use paceline_sampling::{Cut, cut};
use support::{
    arrays::{Random, get, only, put},
    emulated::Emulated,
};

/// A row of logits and the filters for it.
struct Request {
    logits: Vec<f32>,
    params: SamplingParams,
}

/// The cut of each row, `None` where it is left to the host.
fn device_cuts(device: &mut Emulated, requests: &[Request]) -> Result<Vec<Option<LastKept>>, String> {
    let (n_rows, n_tokens) = (requests.len(), requests[0].logits.len());
    let mut logits = Vec::new();
    for request in requests {
        logits.extend_from_slice(&request.logits);
        logits.extend([f32::INFINITY; 3]);
    }
    let filters: Vec<FilterRow> = requests.iter().map(|request| FilterRow::new(&request.params)).collect();
    let header = BatchHeader { n_output_rows: n_rows as u32, ..BatchHeader::default() };
    let cuts = put(device, &vec![LastKept { logit: 3.0, token: 77 }; n_rows + 1]);
    let is_undecided = put(device, &vec![7u32; n_rows + 1]);
    let args = CutArgs {
        logits: put(device, &logits),
        rows: put(device, &filters),
        header: put(device, &[header]),
        cuts,
        is_undecided,
        row_stride: n_tokens as u32 + 3,
        n_tokens: n_tokens as u32,
    };
    find_cuts(device, n_rows + 1, &args).map_err(|error| error.to_string())?;
    let cuts: Vec<LastKept> = get(device, cuts, n_rows + 1);
    let is_undecided: Vec<u32> = get(device, is_undecided, n_rows + 1);
    assert_eq!((cuts[n_rows].token, is_undecided[n_rows]), (77, 7), "a row beyond the batch");
    let found = cuts.into_iter().zip(is_undecided).take(n_rows);
    Ok(found.map(|(cut, is_undecided)| (is_undecided == 0).then_some(cut)).collect())
}

/// Every cut that is found is the crate's; how many are not found.
fn check(device: &mut Emulated, requests: &[Request]) -> Result<usize, String> {
    let mut n_undecided = 0;
    for (request, found) in requests.iter().zip(device_cuts(device, requests)?) {
        let logits: Vec<f32> =
            request.logits.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x }).collect();
        let Cut { logit, token } = cut(&request.params, &logits);
        match found {
            Some(found) if found.logit != logit || found.token != token => {
                return Err(format!("{:?}: {found:?}, not {logit} {token}", request.params));
            }
            Some(_) => {}
            None => n_undecided += 1,
        }
    }
    Ok(n_undecided)
}

/// As filters come: alone, together, tight and wide.
fn filters() -> Vec<SamplingParams> {
    let open = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    let mut all = vec![open.clone(), SamplingParams { top_k: 5, top_p: 0.5, ..SamplingParams::greedy() }];
    for top_k in [1, 2, 40, 1_000] {
        all.push(SamplingParams { top_k, ..open.clone() });
        all.push(SamplingParams { top_k, top_p: 0.9, ..open.clone() });
    }
    for top_p in [0.01, 0.5, 0.95, 0.999] {
        all.push(SamplingParams { top_p, ..open.clone() });
        all.push(SamplingParams { top_p, min_p: 0.02, temperature: 1.3, ..open.clone() });
    }
    all.push(SamplingParams { min_p: 0.1, ..open.clone() });
    all.push(SamplingParams { min_p: 1e-42, ..open.clone() });
    all.push(SamplingParams { top_k: 30, min_p: 0.05, top_p: 0.8, ..open });
    all
}

/// A row of a kind: peaked, with many equal logits, with infinite ones, flat.
fn row(kind: usize, n_tokens: usize, random: &mut Random) -> Vec<f32> {
    let mut logit = |token: usize| match (kind, random.below(50)) {
        (0, _) => 9.0 * random.number() * random.number() * random.number().abs() - 0.01 * (token % 7) as f32,
        (1, _) => random.below(40) as f32 * 0.25 - 2.0 * random.below(2) as f32,
        (2, 0) => f32::NAN,
        (2, 1) => f32::NEG_INFINITY,
        (2, _) => [0.0, -0.0, 1.5][random.below(3)] + 5.0 * random.number().powi(9),
        (3, _) if token == 20 || token == 17 => f32::INFINITY,
        _ => random.number(),
    };
    (0..n_tokens).map(&mut logit).collect()
}

fn requests(n_tokens: usize, kinds: &[usize], seed: u64) -> Vec<Request> {
    let mut random = Random(seed);
    let of_kind = |kind: &usize| {
        let logits = row(*kind, n_tokens, &mut random);
        filters().into_iter().map(|params| Request { logits: logits.clone(), params }).collect::<Vec<_>>()
    };
    kinds.iter().flat_map(of_kind).collect()
}

#[test]
fn cuts_are_those_of_the_crate() {
    for n_tokens in [1, 21, 700, 1_024, 5_003] {
        let requests = requests(n_tokens, &[0, 1, 2, 3, 4], n_tokens as u64);
        let n_undecided = check(&mut Emulated::new(), &requests).expect("the crate's cuts");
        // A row of 1,024 tokens can always be ranked; few of a larger one keep more.
        let most = if n_tokens <= MAX_RANKED { 0 } else { requests.len() / 5 };
        assert!(n_undecided <= most, "{n_undecided} of {} with {n_tokens} tokens", requests.len());
    }
}

#[test]
fn what_cannot_be_ranked_is_left_to_the_host() {
    let flat = vec![0.0; 20_000];
    let request = |params: SamplingParams| Request { logits: flat.clone(), params };
    let requests = [
        request(SamplingParams { top_p: 0.9, ..SamplingParams::default() }),
        request(SamplingParams { top_k: 2_000, ..SamplingParams::default() }),
        // Every token is as good as the last one.
        request(SamplingParams { top_k: 3, ..SamplingParams::default() }),
        request(SamplingParams { min_p: 0.5, ..SamplingParams::default() }),
    ];
    let found = device_cuts(&mut Emulated::new(), &requests).expect("runs");
    assert_eq!(found.iter().map(Option::is_none).collect::<Vec<_>>(), [true, true, true, false]);
}

#[test]
fn mistakes_are_found() {
    let requests = requests(3_000, &[0, 1, 2], 5);
    assert!(check(&mut Emulated::of(&only(&["filter.cu"])), &requests).is_ok());
    for (from, to) in [
        ("is_falling ? a < b : b < a", "is_falling ? a < b : a < b"),
        ("if (mass >= target) return i + 1;", "if (mass > target + 1e-3) return i + 1;"),
        ("0xffffffffu - token)", "token)"),
        ("lanes[lane] += lanes[lane + width]", "lanes[lane] += lanes[width]"),
        ("logit < floor", "logit <= floor"),
        ("is_subnormal ? 24.0f", "is_subnormal ? 23.0f"),
    ] {
        let mut device = Emulated::of(&only(&["filter.cu"]).mutated("filter.cu", from, to));
        assert!(check(&mut device, &requests).is_err(), "{to}");
    }
}
