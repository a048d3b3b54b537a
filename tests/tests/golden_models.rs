//! Real models against llama.cpp in float32: greedy continuations of 19 prompts, and logits, likeliest tokens and
//! perplexity on a text of 2,000 tokens. The goldens and how they were made are in `golden/`.

mod support;

use std::path::{Path, PathBuf};

use paceline_collectives::Solo;
use paceline_domain::{BlockId, KvType, TokenId};
use paceline_tests::models::{large_model, small_model};
use serde_json::Value;
use support::golden_decoder::GoldenDecoder;

/// How near to the reference a model must be.
struct Bounds {
    /// A choice may differ from the reference where its two best logits are closer than this.
    close: f64,
    top1_agreement: f64,
    cosine_mean: f64,
    cosine_min: f64,
    perplexity_change: f64,
    /// Of all tokens of continuations.
    n_equal_share: f64,
    /// Of all tokens of continuations, where three logits are close.
    n_beyond_second: usize,
}

/// The narrowest models: only the head's input has 16 bits. llama.cpp's own quantized path agrees with float32 at 96.55 % of
/// the positions, with cosines of 0.99944 and 0.9853.
const NARROW: Bounds = Bounds {
    close: 0.37,
    top1_agreement: 0.97,
    cosine_mean: 0.99945,
    cosine_min: 0.9854,
    perplexity_change: 0.0015,
    n_equal_share: 0.97,
    n_beyond_second: 2,
};

/// Most activations have 8 bits. llama.cpp's own quantized path agrees with float32 at 98.3 % (0.5B) and 97.4 %
/// (1.5B) of the positions.
const WIDE: Bounds = Bounds {
    close: 0.3,
    top1_agreement: 0.985,
    cosine_mean: 0.9999,
    cosine_min: 0.9995,
    perplexity_change: 0.001,
    n_equal_share: 0.985,
    n_beyond_second: 2,
};

/// What was measured on the text.
#[derive(Debug)]
#[expect(dead_code, reason = "perplexity is for the reader of the test's output")]
struct TextFigures {
    top1_agreement: f64,
    widest_margin_of_a_difference: f64,
    cosine_mean: f64,
    cosine_min: f64,
    perplexity: f64,
    perplexity_change: f64,
}

/// What was measured on the continuations.
#[derive(Debug)]
struct ContinuationFigures {
    n_prompts: usize,
    /// Prompts whose greedy continuation is the reference's to the last token.
    n_identical: usize,
    n_tokens: usize,
    n_equal: usize,
    /// Tokens that are not even the reference's second choice.
    n_beyond_second: usize,
    widest_margin_of_a_difference: f64,
}

#[test]
fn smollm2_text() {
    check_text("smollm2-135m-instruct", &small_model(), &NARROW);
}

#[test]
fn smollm2_continuations() {
    check_continuations("smollm2-135m-instruct", &small_model(), &NARROW);
}

#[test]
fn qwen_half_billion() {
    check_large("qwen2.5-coder-0.5b-instruct");
}

#[test]
fn qwen_one_and_a_half_billion() {
    check_large("qwen2.5-coder-1.5b-instruct");
}

fn check_large(name: &str) {
    if let Some(path) = large_model(name) {
        check_text(name, &path, &WIDE);
        check_continuations(name, &path, &WIDE);
    }
}

fn check_text(name: &str, path: &Path, bounds: &Bounds) {
    let figures = text_figures(name, path);
    println!("{name}: {figures:?}");
    assert!(figures.cosine_mean >= bounds.cosine_mean, "{figures:?}");
    assert!(figures.cosine_min >= bounds.cosine_min, "{figures:?}");
    assert!(figures.top1_agreement >= bounds.top1_agreement, "{figures:?}");
    assert!(figures.perplexity_change.abs() <= bounds.perplexity_change, "{figures:?}");
    assert!(figures.widest_margin_of_a_difference < bounds.close, "{figures:?}");
}

fn check_continuations(name: &str, path: &Path, bounds: &Bounds) {
    let figures = continuation_figures(name, path);
    println!("{name}: {figures:?}");
    assert!(figures.n_prompts >= 12 && figures.n_beyond_second <= bounds.n_beyond_second, "{figures:?}");
    assert!(figures.n_equal as f64 >= bounds.n_equal_share * figures.n_tokens as f64, "{figures:?}");
    assert!(figures.widest_margin_of_a_difference < bounds.close, "{figures:?}");
}

fn text_figures(name: &str, path: &Path) -> TextFigures {
    let golden = golden(name, "text.json");
    let ids = tokens(&golden["ids"]);
    let top1 = tokens(&golden["top1"]);
    let margins = numbers(&golden["margin"]);
    let sampled = Sampled::read(name);
    let mut decoder = GoldenDecoder::load(path, KvType::F16, 1, ids.len());
    let (mut n_equal, mut widest, mut cosines) = (0, 0.0f64, Vec::new());
    let mut log_likelihood = 0.0;
    let table = decoder.blocks(0);
    decoder.prefill(&table, &ids, &mut Solo::new(), &mut |position, row| {
        if argmax(row) == top1[position].idx() {
            n_equal += 1;
        } else {
            widest = widest.max(margins[position]);
        }
        if let Some(next) = ids.get(position + 1) {
            log_likelihood += logprob(row, next.idx());
        }
        if position % sampled.position_step == 0 {
            cosines.push(sampled.cosine(position, row));
        }
    });
    let perplexity = (-log_likelihood / (ids.len() - 1) as f64).exp();
    TextFigures {
        top1_agreement: f64::from(n_equal) / ids.len() as f64,
        widest_margin_of_a_difference: widest,
        cosine_mean: cosines.iter().sum::<f64>() / cosines.len() as f64,
        cosine_min: cosines.iter().copied().fold(1.0, f64::min),
        perplexity,
        perplexity_change: perplexity / golden["perplexity"].as_f64().expect("a number") - 1.0,
    }
}

/// Greedy decoding of all prompts side by side. After a token that differs, the reference's is fed, so that what
/// follows is compared too; up to there this is the greedy continuation itself.
fn continuation_figures(name: &str, path: &Path) -> ContinuationFigures {
    let golden = golden(name, "continuations.json");
    let prompts = golden["prompts"].as_array().expect("prompts");
    let longest = prompts.iter().map(|prompt| list(&prompt["prompt_ids"]).len() + list(&prompt["ids"]).len());
    let mut decoder = GoldenDecoder::load(path, KvType::F16, prompts.len(), longest.max().unwrap_or(0));
    let mut figures = ContinuationFigures {
        n_prompts: prompts.len(),
        n_identical: 0,
        n_tokens: 0,
        n_equal: 0,
        n_beyond_second: 0,
        widest_margin_of_a_difference: 0.0,
    };
    let tables: Vec<Vec<BlockId>> = (0..prompts.len()).map(|prompt| decoder.blocks(prompt)).collect();
    let mut differs = vec![false; prompts.len()];
    let mut count = |prompt: usize, step: usize, row: &[f32]| {
        let expected = tokens(&prompts[prompt]["ids"])[step];
        let second = tokens(&prompts[prompt]["second"])[step];
        let margin = numbers(&prompts[prompt]["margin"])[step];
        figures.n_tokens += 1;
        if argmax(row) == expected.idx() {
            figures.n_equal += 1;
        } else {
            differs[prompt] = true;
            figures.widest_margin_of_a_difference = figures.widest_margin_of_a_difference.max(margin);
            figures.n_beyond_second += usize::from(argmax(row) != second.idx());
        }
    };
    for (prompt, table) in tables.iter().enumerate() {
        let prompt_ids = tokens(&prompts[prompt]["prompt_ids"]);
        let last = prompt_ids.len() - 1;
        decoder.prefill(table, &prompt_ids, &mut Solo::new(), &mut |position, row| {
            if position == last {
                count(prompt, 0, row);
            }
        });
    }
    let n_steps = list(&prompts[0]["ids"]).len();
    for step in 1..n_steps {
        let fed: Vec<TokenId> = prompts.iter().map(|prompt| tokens(&prompt["ids"])[step - 1]).collect();
        let positions: Vec<u32> =
            prompts.iter().map(|prompt| (list(&prompt["prompt_ids"]).len() + step - 1) as u32).collect();
        decoder.decode(&tables, &fed, &positions, &mut |prompt, row| count(prompt, step, row));
    }
    figures.n_identical = differs.iter().filter(|differs| !**differs).count();
    figures
}

/// Logits of the reference at some positions and tokens.
struct Sampled {
    position_step: usize,
    token_step: usize,
    n_tokens: usize,
    /// `[n_positions, n_tokens]`
    logits: Vec<f32>,
}

impl Sampled {
    fn read(name: &str) -> Self {
        let about = golden(name, "logits.json");
        let size = |value: &Value| value.as_u64().expect("a size") as usize;
        let bytes = std::fs::read(golden_path(name, "logits.f16")).expect("golden logits");
        let logits: Vec<f32> =
            bytes.as_chunks().0.iter().map(|pair| half(u16::from_le_bytes(*pair))).collect();
        assert_eq!(logits.len(), size(&about["shape"][0]) * size(&about["shape"][1]));
        Self {
            position_step: size(&about["position_step"]),
            token_step: size(&about["token_step"]),
            n_tokens: size(&about["shape"][1]),
            logits,
        }
    }

    fn cosine(&self, position: usize, row: &[f32]) -> f64 {
        let expected = &self.logits[position / self.position_step * self.n_tokens..][..self.n_tokens];
        let found = (0..self.n_tokens).map(|i| f64::from(row[i * self.token_step]));
        let (mut dot, mut found_square, mut expected_square) = (0.0, 0.0, 0.0);
        for (found, expected) in found.zip(expected) {
            let expected = f64::from(*expected);
            dot += found * expected;
            found_square += found * found;
            expected_square += expected * expected;
        }
        dot / f64::sqrt(found_square * expected_square)
    }
}

fn golden_path(name: &str, rest: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/models").join(format!("{name}.{rest}"))
}

fn golden(name: &str, rest: &str) -> Value {
    let path = golden_path(name, rest);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn tokens(value: &Value) -> Vec<TokenId> {
    list(value).iter().map(|id| TokenId(id.as_u64().expect("a token") as u32)).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    list(value).iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in row.iter().enumerate() {
        if *logit > row[best] {
            best = token;
        }
    }
    best
}

fn logprob(row: &[f32], token: usize) -> f64 {
    let largest = f64::from(row[argmax(row)]);
    let sum: f64 = row.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    f64::from(row[token]) - largest - sum.ln()
}

/// A finite IEEE half as f32.
fn half(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 31, f32::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(-24),
        exponent => (1024.0 + fraction) * 2f32.powi(i32::from(exponent) - 25),
    };
    if sign == 1 { -magnitude } else { magnitude }
}
