//! Metadata and texts made to do harm: typed errors, no panic, no quadratic time.

use paceline_checkpoint::MetadataValue;
use paceline_domain::{ErrorKind, TokenId};
use paceline_text::{SpecialTokens, TextError};
use proptest::prelude::*;

use crate::fixture::{self, Gguf};

fn problem(gguf: &Gguf) -> String {
    match gguf.tokenizer() {
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unfit));
            error.to_string()
        }
        Ok(_) => "no error".to_owned(),
    }
}

#[test]
fn contradictions_in_byte_level_metadata_are_named() {
    let gguf = Gguf::byte_level();
    assert_eq!(problem(&gguf), "no error");
    let cases = [
        (gguf.clone().without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens"),
        (gguf.clone().without("tokenizer.ggml.merges"), "tokenizer.ggml.merges"),
        (
            gguf.clone().with("tokenizer.ggml.model", "bert"),
            "\"bert\" is not supported; supported: gpt2, llama",
        ),
        (gguf.clone().with("tokenizer.ggml.pre", "tekken"), "\"tekken\" is not supported; supported: smollm"),
        (gguf.clone().with("tokenizer.ggml.token_type", vec![1i32; 3]), "266 tokens but 3 token types"),
        (gguf.clone().with_element("tokenizer.ggml.token_type", 7, 9i32), "token 7 has type 9"),
        (gguf.clone().with_element("tokenizer.ggml.token_type", 7, -1i32), "token 7 has type -1"),
        (gguf.clone().with_element("tokenizer.ggml.token_type", 7, 6i32), "byte token 7"),
        (gguf.clone().with_element("tokenizer.ggml.tokens", 9, "the"), "token 261 has the text \"the\""),
        (gguf.clone().with("tokenizer.ggml.tokens", Vec::<&str>::new()), "0 tokens but 266"),
        (gguf.clone().with("tokenizer.ggml.eos_token_id", 264u32), "token 264 is not among the 264 usable"),
        (gguf.clone().with("tokenizer.ggml.bos_token_id", u32::MAX), "token 4294967295"),
        (gguf.clone().with("tokenizer.ggml.bos_token_id", -1i32), "bos_token_id"),
        (gguf.clone().with("tokenizer.ggml.eot_token_id", 9999u32), "token 9999"),
        (gguf.clone().with("tokenizer.ggml.add_bos_token", 1u32), "add_bos_token"),
    ];
    for (gguf, expected) in cases {
        let message = problem(&gguf);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

#[test]
fn malformed_merges_are_named() {
    let merges = ["", " ", "t", "t ", " h", "t h e", "t  h", "t nope", "a b", "< |end|>", "[ PAD0]"];
    for merge in merges {
        let message = problem(&Gguf::byte_level().with_element("tokenizer.ggml.merges", 1, merge));
        assert!(message.contains("merge 1 "), "{merge:?}: {message}");
    }
    let to_control = Gguf::byte_level().with_element("tokenizer.ggml.tokens", 0, "ab").with_element(
        "tokenizer.ggml.merges",
        1,
        "a b",
    );
    assert!(problem(&to_control).contains("no text token"), "a merge must not reach a control token");
}

#[test]
fn contradictions_in_sentence_piece_metadata_are_named() {
    let gguf = Gguf::sentence_piece();
    assert_eq!(problem(&gguf), "no error");
    let cases = [
        (gguf.clone().without("tokenizer.ggml.scores"), "tokenizer.ggml.scores"),
        (gguf.clone().with("tokenizer.ggml.scores", vec![0f32; 5]), "5 scores for 2258 tokens"),
        (gguf.clone().with_element("tokenizer.ggml.scores", 300, f32::NAN), "the score of token 300 is NaN"),
        (gguf.clone().with_element("tokenizer.ggml.tokens", 10, "<0xZZ>"), "byte token 10"),
    ];
    for (gguf, expected) in cases {
        let message = problem(&gguf);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let no_bytes = gguf
        .clone()
        .with("tokenizer.ggml.token_type", vec![1i32; 2258])
        .without("tokenizer.ggml.unknown_token_id");
    assert!(problem(&no_bytes).contains("neither a token for every byte nor an unknown token"));
}

#[test]
fn a_byte_without_token_becomes_the_unknown_token() {
    let gguf = Gguf::sentence_piece().with_element("tokenizer.ggml.token_type", 3 + 0xf0, 5i32);
    let tokenizer = gguf.tokenizer().unwrap();
    let tokens = tokenizer.encode("\u{1F9CC}", SpecialTokens::Literal).unwrap();
    let byte = |byte: u32| TokenId(3 + byte);
    assert_eq!(tokens[tokens.len() - 4..], [TokenId(0), byte(0x9f), byte(0xa7), byte(0x8c)]);
}

#[test]
fn defaults_of_absent_keys() {
    let bare =
        Gguf::byte_level().without("tokenizer.ggml.bos_token_id").without("tokenizer.ggml.eos_token_id");
    let tokenizer = bare.tokenizer().unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (None, false));
    assert!(tokenizer.eos_tokens().is_empty());
    let wants_bos = bare.with("tokenizer.ggml.add_bos_token", true).tokenizer().unwrap();
    assert!(!wants_bos.adds_bos(), "there is none to add");
    let llama3 = Gguf::byte_level().with("tokenizer.ggml.pre", "llama-bpe").tokenizer().unwrap();
    assert!(llama3.adds_bos());
    let llama2 = Gguf::sentence_piece()
        .without("tokenizer.ggml.bos_token_id")
        .without("tokenizer.ggml.eos_token_id")
        .without("tokenizer.ggml.unknown_token_id");
    let llama2 = llama2.tokenizer().unwrap();
    assert_eq!((llama2.bos(), llama2.eos_tokens()), (Some(TokenId(1)), [TokenId(2)].as_slice()));
    let ends = Gguf::byte_level().with("tokenizer.ggml.eot_token_id", 1u32).tokenizer().unwrap();
    assert_eq!(ends.eos_tokens(), [TokenId(0), TokenId(1)]);
}

#[test]
fn the_digest_tells_vocabularies_apart() {
    let digest = |gguf: &Gguf| gguf.tokenizer().unwrap().digest();
    let gguf = Gguf::byte_level();
    assert_eq!(digest(&gguf), digest(&gguf.clone()));
    let padding = gguf.clone().with_element("tokenizer.ggml.tokens", 265, "[PAD9]");
    assert_eq!(digest(&gguf), digest(&padding), "padding has no meaning");
    for changed in [
        gguf.clone().with_element("tokenizer.ggml.tokens", 2, "[tool2]"),
        gguf.clone().with_element("tokenizer.ggml.token_type", 2, 3i32),
        gguf.clone().with("tokenizer.ggml.eos_token_id", 1u32),
        gguf.clone().with("tokenizer.ggml.add_bos_token", true),
        gguf.clone().without("tokenizer.ggml.bos_token_id"),
    ] {
        assert_ne!(digest(&gguf), digest(&changed));
    }
}

/// Long runs punish backtracking, restarts and merges that walk the whole word. The times are for people
/// (`--nocapture`); that the test ends is what it asserts: quadratic work on 1 MiB would take hours. The other rules
/// are parts of these.
#[test]
fn a_mebibyte_of_anything_is_tokenized() {
    let smollm2 = fixture::model(fixture::SMOLLM2);
    let units = ["a", " ", "\n", "😀", "1", "\u{301}", "<|im_end", " \n", "  x", "\0"];
    for name in ["smollm", "llama-bpe", "default", "sentencepiece"] {
        let gguf = match name {
            "sentencepiece" => Gguf::sentence_piece(),
            pre => Gguf::with_pre(&smollm2, pre),
        };
        let tokenizer = gguf.tokenizer().unwrap();
        for unit in units {
            let text = unit.repeat((1 << 20) / unit.len());
            let start = std::time::Instant::now();
            let tokens = tokenizer.encode(&text, SpecialTokens::Parse).unwrap();
            println!("{name} {unit:?}: {} tokens in {:?}", tokens.len(), start.elapsed());
            let n_bytes: usize = tokens.iter().map(|token| tokenizer.token_bytes(*token).len()).sum();
            assert!(n_bytes >= text.len() && n_bytes <= text.len() + 1, "{name} {unit:?}: {n_bytes}");
        }
    }
}

/// Any value a metadata key can have by mistake.
fn any_value() -> impl Strategy<Value = MetadataValue> {
    prop_oneof![
        any::<u32>().prop_map(MetadataValue::from),
        any::<i32>().prop_map(MetadataValue::from),
        any::<f32>().prop_map(MetadataValue::from),
        any::<bool>().prop_map(MetadataValue::from),
        "[a-zĠ <|>]{0,5}".prop_map(MetadataValue::from),
        prop::collection::vec("[a-cĠ <|>]{0,4}", 0..5).prop_map(MetadataValue::from),
        prop::collection::vec(-1i32..8, 0..300).prop_map(MetadataValue::from),
        prop::collection::vec(any::<f32>(), 0..5).prop_map(MetadataValue::from),
    ]
}

proptest! {
    /// Whatever replaces metadata, there is a tokenizer that works or an error, and never a panic.
    #[test]
    fn replaced_metadata_never_panics(
        is_sentence_piece in any::<bool>(),
        changes in prop::collection::vec((0usize..12, any_value()), 1..4),
        text in ".{0,20}",
    ) {
        const KEYS: [&str; 12] = [
            "model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id",
            "unknown_token_id", "add_bos_token", "add_space_prefix", "eot_token_id",
        ];
        let mut gguf = if is_sentence_piece { Gguf::sentence_piece() } else { Gguf::byte_level() };
        for (key, value) in changes {
            gguf = gguf.with(&format!("tokenizer.ggml.{}", KEYS[key]), value);
        }
        match gguf.tokenizer() {
            Ok(tokenizer) => {
                let tokens = tokenizer.encode(&text, SpecialTokens::Parse).unwrap();
                prop_assert!(tokenizer.check_tokens(&tokens).is_ok());
            }
            Err(error) => prop_assert!(!matches!(error, TextError::Encode { .. }), "{}", error),
        }
    }
}
