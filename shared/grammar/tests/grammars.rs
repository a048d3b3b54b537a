//! Texts that random choices among the allowed tokens make, masks before and after proposals, and what is refused. On a
//! vocabulary of bytes.

use std::collections::HashSet;

use paceline_checkpoint::Checkpoint;
use paceline_domain::{ErrorKind, Grammar, TokenId, TokenMask, WeightType};
use paceline_grammar::{Compiler, Matcher};
use paceline_model::{
    ModelConfig,
    synthetic::{Synthetic, tiny_config, uniform},
};
use paceline_text::Tokenizer;

/// Bytes, the end token, and padding.
const N_VOCAB: usize = 300;
const END: TokenId = TokenId(256);
const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "sizes": {"type": "array", "items": {"enum": [1, 20]}}},
    "required": ["name", "sizes"],
    "additionalProperties": false
}"#;

fn compiler() -> Compiler {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bytes.gguf");
    let config = ModelConfig { n_vocab: N_VOCAB, ..tiny_config() };
    let file = Synthetic { config, seed: 1, weight_type: uniform(WeightType::F32) }.to_gguf();
    std::fs::write(&path, file.expect("a model")).expect("written");
    let checkpoint = Checkpoint::open(&path).expect("opens");
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("a tokenizer");
    Compiler::new(&tokenizer, tokenizer.n_vocab()).expect("a compiler")
}

/// A number without pattern.
fn scramble(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

fn allowed(mask: &TokenMask) -> Vec<TokenId> {
    (0..N_VOCAB as u32).map(TokenId).filter(|token| mask.allows(*token)).collect()
}

/// A text of random choices up to its end; `prefer` may choose instead.
fn walk(mut matcher: Matcher, seed: u64, prefer: impl Fn(&[u8], &[TokenId]) -> Option<TokenId>) -> Vec<u8> {
    let (mut text, mut state) = (Vec::new(), seed);
    loop {
        let choices = allowed(&matcher.masks(&[]).expect("something is allowed")[0]);
        let token = prefer(&text, &choices).unwrap_or_else(|| choices[scramble(&mut state) % choices.len()]);
        matcher.commit(token).expect("an allowed token");
        if token == END {
            return text;
        }
        text.push(u8::try_from(token.0).expect("a byte"));
        assert!(text.len() < 5_000, "no end of {}", String::from_utf8_lossy(&text));
    }
}

/// The end as soon as there can be one, and no white space.
fn soon(_: &[u8], choices: &[TokenId]) -> Option<TokenId> {
    let is_text = |token: &&TokenId| (33..127).contains(&token.0);
    choices.contains(&END).then_some(END).or_else(|| {
        let text: Vec<TokenId> = choices.iter().filter(is_text).copied().collect();
        text.iter().find(|token| [b'"', b'}', b']'].contains(&(token.0 as u8))).or(text.first()).copied()
    })
}

#[test]
fn texts_are_what_the_grammar_says() {
    let compiler = compiler();
    let number = compiler.compile(&Grammar::Regex("[0-9]{3}(-[ab]{1,2})*".into())).expect("compiles");
    let lark = "start: \"<\" word (\",\" word)* \">\"\nword: /[xyz]{2}/";
    let list = compiler.compile(&Grammar::Lark(lark.into())).expect("compiles");
    let mut texts = HashSet::new();
    for seed in 0..40 {
        let text = String::from_utf8(walk(number.fork(), seed, |_, _| None)).expect("is ASCII");
        let (head, tail) = text.split_at(3);
        assert!(head.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
        let is_part = |part: &str| {
            (1..=2).contains(&part.len()) && part.bytes().all(|byte| byte == b'a' || byte == b'b')
        };
        assert!(
            tail.is_empty() || tail.strip_prefix('-').is_some_and(|tail| tail.split('-').all(is_part)),
            "{text}"
        );
        texts.insert(text);
        let text = String::from_utf8(walk(list.fork(), seed, |_, _| None)).expect("is ASCII");
        let words = text.strip_prefix('<').and_then(|text| text.strip_suffix('>')).expect("brackets");
        assert!(
            words
                .split(',')
                .all(|word| word.len() == 2 && word.bytes().all(|byte| (b'x'..=b'z').contains(&byte)))
        );
    }
    assert!(texts.len() > 20, "{texts:?}");
}

#[test]
fn json_is_json_and_fits_its_schema() {
    let compiler = compiler();
    let schema = compiler.compile(&Grammar::JsonSchema(SCHEMA.into())).expect("compiles");
    // Names of random letters, then the shortest way to the end.
    for seed in 0..10 {
        let letters = |text: &[u8], choices: &[TokenId]| {
            let is_in_name = text.ends_with(b":\"") || (text.len() as u64 + seed).is_multiple_of(3);
            let letter = TokenId(u32::from(b'a') + (text.len() as u32 + seed as u32) % 26);
            (is_in_name && choices.contains(&letter)).then_some(letter).or_else(|| soon(text, choices))
        };
        let text = walk(schema.fork(), seed, letters);
        let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let object = value.as_object().expect("an object");
        assert_eq!(object.keys().collect::<Vec<_>>(), ["name", "sizes"], "{value}");
        assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 8), "{value}");
        assert!(
            value["sizes"].as_array().is_some_and(|sizes| sizes.iter().all(|size| *size == 1 || *size == 20))
        );
    }
    let object = compiler.compile(&Grammar::JsonObject).expect("compiles");
    let text = walk(object, 1, soon);
    assert!(serde_json::from_slice::<serde_json::Value>(&text).expect("JSON").is_object());
}

#[test]
fn masks_after_proposals_are_those_of_committed_tokens() {
    let compiler = compiler();
    let mut matcher = compiler.compile(&Grammar::Regex("(ab|a[0-9]{2}c?)+".into())).expect("compiles");
    let (mut state, mut n_whole, mut n_wrong, mut n_ends) = (5, 0, 0, 0);
    for _ in 0..60 {
        // Proposals that are mostly allowed.
        let (mut ahead, mut proposals, mut expected) = (matcher.fork(), Vec::new(), Vec::new());
        let mut goes_on = true;
        for _ in 0..scramble(&mut state) % 6 {
            let mask =
                if goes_on { ahead.masks(&[]).expect("a mask").remove(0) } else { TokenMask::default() };
            let choices = allowed(&mask);
            let is_wrong = scramble(&mut state).is_multiple_of(8);
            let token =
                if is_wrong { TokenId(b'!'.into()) } else { choices[scramble(&mut state) % choices.len()] };
            goes_on &= mask.allows(token) && token != END;
            if goes_on {
                ahead.commit(token).expect("is allowed");
            }
            n_wrong += u32::from(!mask.is_open() && !mask.allows(token));
            n_ends += u32::from(!mask.is_open() && token == END);
            expected.push(mask);
            proposals.push(token);
        }
        expected.push(if goes_on {
            ahead.masks(&[]).expect("a mask").remove(0)
        } else {
            TokenMask::default()
        });
        n_whole += u32::from(goes_on && !proposals.is_empty());
        let masks = matcher.masks(&proposals).expect("masks");
        let n_counting = expected.iter().position(TokenMask::is_open).unwrap_or(expected.len());
        assert_eq!(
            (masks.len(), &masks[..n_counting]),
            (expected.len(), &expected[..n_counting]),
            "{proposals:?}"
        );
        let choices: Vec<TokenId> = allowed(&masks[0]).into_iter().filter(|token| *token != END).collect();
        matcher.commit(choices[scramble(&mut state) % choices.len()]).expect("is allowed");
    }
    assert!(n_whole > 10 && n_wrong > 5 && n_ends > 5, "{n_whole} whole, {n_wrong} wrong, {n_ends} ends");
}

#[test]
fn what_cannot_be_used_is_refused_with_the_reason() {
    let compiler = compiler();
    for (grammar, problem) in [
        (Grammar::JsonSchema("{".into()), "JSON schema cannot be used: it is not JSON"),
        (Grammar::JsonSchema("3".into()), "neither a JSON object"),
        (Grammar::JsonSchema(r#"{"type": "thing"}"#.into()), "thing"),
        (Grammar::JsonSchema(r#"{"type": "string", "minLength": 3, "maxLength": 1}"#.into()), "JSON schema"),
        (Grammar::Regex("a(".into()), "regular expression cannot be used"),
        (Grammar::Regex("a(?=b)".into()), "regular expression cannot be used"),
        (Grammar::Lark("start: nothing_here".into()), "nothing_here"),
        (Grammar::Lark("start: /é/ |".repeat(9_000)), "at most 65536"),
    ] {
        let error = compiler.compile(&grammar).err().unwrap_or_else(|| panic!("{problem}: it was taken"));
        assert!(error.to_string().contains(problem), "{error}");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
}

/// However mean a grammar is, each mask is made or refused: the limits are of work. What is refused says so.
#[test]
fn mean_grammars_end_in_masks_or_errors() {
    let compiler = compiler();
    let mut n_stuck = 0;
    for grammar in [
        Grammar::Regex("((a|b|[0-9]){1,900}){1,900}x".into()),
        Grammar::Regex("(.*a){25}.*".into()),
        Grammar::Lark("start: s\ns: s s s | \"a\" | ".into()),
        Grammar::Lark("start: (\"a\" | \"aa\" | \"aaa\" | start start)*".into()),
    ] {
        let Ok(mut matcher) = compiler.compile(&grammar) else { continue };
        for _ in 0..200 {
            let stepped = matcher.masks(&[TokenId(b'a'.into()); 4]).and_then(|masks| {
                let token = TokenId(b'a'.into());
                if masks[0].allows(token) { matcher.commit(token) } else { Ok(()) }
            });
            if let Err(error) = stepped {
                assert_eq!(error.kind(), ErrorKind::Unfit);
                assert!(!error.to_string().contains("aaa"), "nothing of the text is told: {error}");
                n_stuck += 1;
                break;
            }
        }
    }
    assert!(n_stuck > 0, "no limit was met");
}
