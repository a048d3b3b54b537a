//! Token ids equal those of llama.cpp.

use paceline_domain::TokenId;
use paceline_text::{ControlText, SpecialTokens, Tokenizer};
use serde_json::Value;

use crate::fixture::{self, Gguf};

/// Compares every case, both ways of reading control tokens, and that decoding gives the text back.
pub fn check(tokenizer: &Tokenizer, texts: &[String], cases: &Value) {
    let cases = cases.as_array().unwrap();
    assert!(texts.len() >= 100, "only {} texts", texts.len());
    assert_eq!(texts.len(), cases.len());
    for (text, case) in texts.iter().zip(cases) {
        let literal = case.get("literal").unwrap_or(&case["parse"]);
        for (special, expected) in [(SpecialTokens::Parse, &case["parse"]), (SpecialTokens::Literal, literal)]
        {
            let tokens = tokenizer.encode(text, special).unwrap();
            assert_eq!(tokens, fixture::ids(expected), "{special:?} {text:?}");
        }
        let literal = tokenizer.encode(text, SpecialTokens::Literal).unwrap();
        assert!(!literal.iter().any(|token| tokenizer.is_special(*token)), "{text:?} became a control token");
    }
}

fn check_text_comes_back(tokenizer: &Tokenizer, texts: &[String]) {
    for text in texts {
        for special in [SpecialTokens::Parse, SpecialTokens::Literal] {
            let tokens = tokenizer.encode(text, special).unwrap();
            assert_eq!(tokenizer.decode(&tokens, ControlText::Show), *text, "{special:?}");
        }
    }
}

#[test]
fn smollm2_equals_llama_cpp() {
    let tokenizer = Tokenizer::from_checkpoint(&fixture::model(fixture::SMOLLM2)).unwrap();
    let texts = fixture::strings(&fixture::golden("texts.json"));
    check(&tokenizer, &texts, &fixture::golden("smollm2-135m-instruct.json")["cases"]);
    assert_eq!(tokenizer.n_vocab(), 49152);
    assert_eq!(tokenizer.eos_tokens(), [TokenId(0), TokenId(2)]);
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (Some(TokenId(1)), false));
    assert_eq!(tokenizer.find_control("a <|im_end|> b"), Some(TokenId(2)));
}

#[test]
fn qwen_equals_llama_cpp() {
    if !fixture::all_models("qwen_equals_llama_cpp") {
        return;
    }
    let texts = fixture::strings(&fixture::golden("texts.json"));
    let tokenizers = fixture::QWENS.map(|name| Tokenizer::from_checkpoint(&fixture::model(name)).unwrap());
    for tokenizer in &tokenizers {
        check(tokenizer, &texts, &fixture::golden("qwen2.5-coder.json")["cases"]);
        check_text_comes_back(tokenizer, &texts);
        assert_eq!(tokenizer.n_vocab(), 151665, "the 271 tokens of padding are not usable");
        assert_eq!(tokenizer.eos_tokens(), [TokenId(151643), TokenId(151645)]);
        // Text in Qwen's vocabulary that other families use as a control token stays text; llama.cpp goes by the name
        // and takes it for one, which is why the corpus does not have it.
        assert_eq!(tokenizer.encode(" </s>", SpecialTokens::Parse).unwrap(), [690, 82, 29].map(TokenId));
        assert!(tokenizer.check_tokens(&[TokenId(151664)]).is_ok());
        assert!(tokenizer.check_tokens(&[TokenId(0), TokenId(151665)]).is_err());
    }
    assert_eq!(tokenizers[0].digest(), tokenizers[1].digest(), "target and draft have one tokenizer");
}

#[test]
fn each_splitting_rule_equals_llama_cpp() {
    let smollm2 = fixture::model(fixture::SMOLLM2);
    let texts = fixture::strings(&fixture::golden("texts.json"));
    for pre in ["qwen2", "llama-bpe", "gpt-2", "default"] {
        let tokenizer = Gguf::with_pre(&smollm2, pre).tokenizer().unwrap();
        check(&tokenizer, &texts, &fixture::golden(&format!("smollm2-pre-{pre}.json"))["cases"]);
    }
}

#[test]
fn sentence_piece_equals_llama_cpp() {
    let golden = fixture::golden("sentencepiece.json");
    let texts = fixture::strings(&golden["texts"]);
    for (prefix, cases) in [(true, "cases"), (false, "cases_without_prefix")] {
        let gguf = Gguf::sentence_piece().with("tokenizer.ggml.add_space_prefix", prefix);
        check(&gguf.tokenizer().unwrap(), &texts, &golden[cases]);
    }
}

#[test]
fn sentence_piece_gives_the_text_back() {
    let golden = fixture::golden("sentencepiece.json");
    let tokenizer = Gguf::sentence_piece().tokenizer().unwrap();
    for text in fixture::strings(&golden["texts"]) {
        let tokens = tokenizer.encode(&text, SpecialTokens::Literal).unwrap();
        let has_user_token = tokens.iter().any(|token| tokenizer.token_bytes(*token) == b"<|user|>");
        // U+2581 is the tokenizer's own letter for a space, and each text after a whole token gets a space before.
        if !has_user_token {
            assert_eq!(tokenizer.decode(&tokens, ControlText::Show), text.replace('\u{2581}', " "));
        }
    }
    let bos = TokenId(1);
    assert_eq!(
        (tokenizer.bos(), tokenizer.adds_bos(), tokenizer.eos_tokens()),
        (Some(bos), true, [TokenId(2)].as_slice())
    );
    let prompt = tokenizer.encode_prompt("Hello", SpecialTokens::Parse).unwrap();
    assert_eq!(prompt[0], bos);
    assert_eq!(
        tokenizer.encode_prompt("<s>Hello", SpecialTokens::Parse).unwrap(),
        prompt,
        "bos is not doubled"
    );
    assert_eq!(tokenizer.decode(&prompt, ControlText::Skip), "Hello");
    assert_eq!(tokenizer.decode(&prompt, ControlText::Show), "<s> Hello");
}
