//! Where one sequence stands in its grammar. It is a function of the grammar and the committed tokens.

use llguidance::{TokenParser, toktrie::SimpleVob};
use paceline_domain::{TokenId, TokenMask};

use crate::compiler::GrammarError;

/// The state after some committed tokens.
pub struct Matcher {
    inner: llguidance::Matcher,
    n_vocab: usize,
}

impl Matcher {
    /// Before the first token; whether there can be one is found out here.
    pub(crate) fn begin(parser: TokenParser, n_vocab: usize) -> Result<Self, GrammarError> {
        let mut matcher = Self { inner: llguidance::Matcher::new(Ok(parser)), n_vocab };
        matcher.mask()?;
        Ok(matcher)
    }

    /// The same state, for another sequence.
    pub fn fork(&self) -> Self {
        Self { inner: self.inner.deep_clone(), n_vocab: self.n_vocab }
    }

    /// A token was committed. After the end of the text anything may be; nothing follows then.
    ///
    /// # Errors
    /// When the grammar does not allow it.
    pub fn commit(&mut self, token: TokenId) -> Result<(), GrammarError> {
        if self.inner.is_stopped() && !self.inner.is_error() {
            return Ok(());
        }
        self.inner.consume_token(token.0).map_err(|error| GrammarError::Stuck(format!("{error:#}")))
    }

    /// What is allowed for the next token, and after each of these proposals. A row after a proposal that is not allowed
    /// may choose anything: it never counts.
    ///
    /// # Errors
    /// When the grammar is beyond its limits, or nothing is allowed.
    pub fn masks(&mut self, proposals: &[TokenId]) -> Result<Vec<TokenMask>, GrammarError> {
        let mut masks = vec![self.mask()?];
        let mut n_consumed = 0;
        for proposal in proposals {
            let is_allowed = masks.last().is_some_and(|mask| mask.allows(*proposal));
            if !is_allowed || self.inner.is_stopped() {
                break;
            }
            self.commit(*proposal)?;
            n_consumed += 1;
            masks.push(self.mask()?);
        }
        if n_consumed > 0 {
            self.inner.rollback(n_consumed).map_err(|error| GrammarError::Stuck(format!("{error:#}")))?;
        }
        masks.resize(proposals.len() + 1, TokenMask::default());
        Ok(masks)
    }

    fn mask(&mut self) -> Result<TokenMask, GrammarError> {
        let allowed = self.inner.compute_mask_or_eos();
        let allowed = allowed.map_err(|error| GrammarError::Stuck(format!("{error:#}")))?;
        let mask = words(&allowed, self.n_vocab);
        if mask.is_nothing() {
            return Err(GrammarError::Stuck("no token of this model can follow".into()));
        }
        Ok(mask)
    }
}

fn words(allowed: &SimpleVob, n_vocab: usize) -> TokenMask {
    let mut words: Vec<u32> = allowed.as_slice().iter().copied().take(n_vocab.div_ceil(32)).collect();
    if let Some(last) = words.last_mut().filter(|_| !n_vocab.is_multiple_of(32)) {
        *last &= (1 << (n_vocab % 32)) - 1;
    }
    TokenMask::of_words(words)
}
