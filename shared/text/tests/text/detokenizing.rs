//! The incremental detokenizer gives, piece by piece, what decoding at once gives.

use std::sync::{Arc, LazyLock};

use paceline_domain::TokenId;
use paceline_text::{ControlText, Detokenizer, SpecialTokens, Tokenizer};
use proptest::prelude::*;

use crate::fixture::{self, Gguf};

static BYTE_LEVEL: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Gguf::byte_level().tokenizer().unwrap()));
static SENTENCE_PIECE: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Gguf::sentence_piece().tokenizer().unwrap()));

fn pieces(mut detokenizer: Detokenizer, tokens: &[TokenId]) -> Vec<String> {
    let mut pieces: Vec<String> = tokens.iter().map(|token| detokenizer.push(*token)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

/// Tokens of real text with random ones between: cut characters, control tokens, padding, ids beyond the vocabulary.
fn tokens(tokenizer: Arc<Tokenizer>) -> impl Strategy<Value = Vec<TokenId>> {
    let n = tokenizer.n_vocab() as u32 + 4;
    let text = "[a-z é你😀\u{301}▁]{0,6}"
        .prop_map(move |text| tokenizer.encode(&text, SpecialTokens::Parse).unwrap());
    let noise = prop::collection::vec((0..n).prop_map(TokenId), 0..4);
    prop::collection::vec(prop_oneof![text, noise], 0..6).prop_map(|parts| parts.concat())
}

fn check(tokenizer: &Arc<Tokenizer>, tokens: &[TokenId]) -> Result<(), TestCaseError> {
    for control in [ControlText::Skip, ControlText::Show] {
        let incremental = pieces(Detokenizer::from_start(tokenizer.clone(), control), tokens);
        let replayed = pieces(Detokenizer::from_start(tokenizer.clone(), control), tokens);
        prop_assert_eq!(&incremental, &replayed);
        prop_assert_eq!(incremental.concat(), tokenizer.decode(tokens, control));
    }
    let bytes: Vec<u8> = tokens
        .iter()
        .filter(|token| !tokenizer.is_special(**token))
        .flat_map(|token| tokenizer.token_bytes(*token))
        .copied()
        .collect();
    let continuation = pieces(Detokenizer::new(tokenizer.clone()), tokens).concat();
    prop_assert_eq!(continuation, String::from_utf8_lossy(&bytes));
    Ok(())
}

proptest! {
    #[test]
    fn byte_level_pieces_are_the_whole(tokens in tokens(BYTE_LEVEL.clone())) {
        check(&BYTE_LEVEL, &tokens)?;
    }

    #[test]
    fn sentence_piece_pieces_are_the_whole(tokens in tokens(SENTENCE_PIECE.clone())) {
        check(&SENTENCE_PIECE, &tokens)?;
    }
}

#[test]
fn a_continuation_keeps_its_leading_space_and_a_text_does_not() {
    let tokenizer = SENTENCE_PIECE.clone();
    let tokens = tokenizer.encode("Hello", SpecialTokens::Parse).unwrap();
    assert_eq!(pieces(Detokenizer::new(tokenizer.clone()), &tokens).concat(), " Hello");
    assert_eq!(pieces(Detokenizer::from_start(tokenizer, ControlText::Skip), &tokens).concat(), "Hello");
}

#[test]
fn characters_of_several_tokens_come_whole() {
    let tokenizer = BYTE_LEVEL.clone();
    let tokens = tokenizer.encode("😀é", SpecialTokens::Parse).unwrap();
    assert_eq!(pieces(Detokenizer::new(tokenizer), &tokens), ["", "", "", "😀", "", "é", ""]);
}

#[test]
fn smollm2_texts_come_back_piece_by_piece() {
    let tokenizer = Arc::new(Tokenizer::from_checkpoint(&fixture::model(fixture::SMOLLM2)).unwrap());
    for text in fixture::strings(&fixture::golden("texts.json")) {
        let tokens = tokenizer.encode(&text, SpecialTokens::Literal).unwrap();
        check(&tokenizer, &tokens).unwrap();
    }
}
