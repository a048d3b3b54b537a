//! Which tokens a draft's output head is for. Pure. A head for the whole vocabulary is a large part of what a small model
//! reads for each token, while most tokens of most texts are among the first: ids follow the order in which pairs of tokens
//! were merged, which is that of how frequent they are. Tokens that end a text are at the other end of many vocabularies;
//! they are kept.

use paceline_domain::TokenId;
use paceline_model::HeadTokens;

/// Tokens of the head where nobody says, if the vocabulary is much larger. `shared/speculation/README.md` has what was
/// measured.
const DEFAULT_TOKENS: usize = 65_536;
/// A vocabulary with so many tokens is much larger.
const MUCH_LARGER: usize = 98_304;

/// Tokens below the number asked for, of a vocabulary with `n_usable`, and those that end a text. 0 asks for all of them.
///
/// # Errors
/// More tokens than there are.
pub fn head_tokens(asked: Option<usize>, n_usable: usize, ends: &[TokenId]) -> Result<HeadTokens, String> {
    match asked {
        Some(0) => Ok(HeadTokens::first(n_usable)),
        Some(n_tokens) if n_tokens <= n_usable => Ok(HeadTokens::with(n_tokens, ends)),
        Some(n_tokens) => Err(format!(
            "--vocabulary is {n_tokens}; the draft model has {n_usable} tokens (0 is for all of them)"
        )),
        None if n_usable >= MUCH_LARGER => Ok(HeadTokens::with(DEFAULT_TOKENS, ends)),
        None => Ok(HeadTokens::first(n_usable)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tokens_unless_there_are_many_or_fewer_are_asked_for() {
        let ends = [TokenId(151_643), TokenId(151_645)];
        let of = |asked, n_usable| head_tokens(asked, n_usable, &ends);
        assert_eq!(of(None, 49_152), Ok(HeadTokens::first(49_152)));
        assert_eq!(of(None, 98_303), Ok(HeadTokens::first(98_303)));
        assert_eq!(of(None, 151_665), Ok(HeadTokens::with(DEFAULT_TOKENS, &ends)));
        assert_eq!(of(Some(0), 151_665), Ok(HeadTokens::first(151_665)));
        assert_eq!(of(Some(100), 151_665).map(|head| head.len()), Ok(102));
        let error = head_tokens(Some(300), 257, &[]).expect_err("too many");
        assert!(error.contains("--vocabulary is 300") && error.contains("257 tokens"), "{error}");
    }
}
