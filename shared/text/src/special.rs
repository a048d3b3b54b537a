//! Finds tokens that are written out in a text as a whole: control tokens and user-defined ones. It does not decide
//! which of them a text may contain; the caller does, by [`SpecialTokens`].

use aho_corasick::{AhoCorasick, MatchKind};
use paceline_domain::TokenId;

use crate::error::TextError;
use crate::vocabulary::{TokenKind, Vocabulary};

/// What the text of a control token means inside a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpecialTokens {
    /// The token. For text made by a chat template.
    Parse,
    /// Ordinary text, so that whoever wrote it cannot give orders to the model.
    Literal,
}

/// A part of a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fragment<'t> {
    Text(&'t str),
    Token(TokenId),
}

/// Cuts texts at whole tokens: the leftmost, of those the longest.
pub(crate) struct SpecialSplitter {
    /// Control, unknown and user-defined tokens.
    all: Finder,
    /// User-defined tokens, which are text and so are always found.
    user_defined: Finder,
    /// Control and unknown tokens.
    control: Finder,
}

struct Finder {
    /// None when there is nothing to find.
    automaton: Option<AhoCorasick>,
    ids: Vec<TokenId>,
}

impl SpecialSplitter {
    pub(crate) fn new(vocabulary: &Vocabulary) -> Result<Self, TextError> {
        let user_defined = |kind| kind == TokenKind::UserDefined;
        Ok(Self {
            all: Finder::new(vocabulary, |kind| kind.is_special() || user_defined(kind))?,
            user_defined: Finder::new(vocabulary, user_defined)?,
            control: Finder::new(vocabulary, TokenKind::is_special)?,
        })
    }

    /// The fragments of a text; no text fragment is empty.
    pub(crate) fn fragments<'t>(&self, text: &'t str, special: SpecialTokens) -> Vec<Fragment<'t>> {
        match special {
            SpecialTokens::Parse => self.all.fragments(text),
            SpecialTokens::Literal => self.user_defined.fragments(text),
        }
    }

    /// The first control token written in a text.
    pub(crate) fn find_control(&self, text: &str) -> Option<TokenId> {
        self.control.automaton.as_ref()?.find(text).map(|found| self.control.ids[found.pattern().as_usize()])
    }
}

impl Finder {
    fn new(vocabulary: &Vocabulary, wanted: impl Fn(TokenKind) -> bool) -> Result<Self, TextError> {
        let tokens = (0u32..).zip(vocabulary.iter());
        let (ids, texts): (Vec<TokenId>, Vec<&str>) = tokens
            .filter(|(_, (text, kind))| wanted(*kind) && !text.is_empty())
            .map(|(id, (text, _))| (TokenId(id), text))
            .unzip();
        if ids.is_empty() {
            return Ok(Self { automaton: None, ids });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|error| TextError::malformed("the special tokens", error.to_string()))?;
        Ok(Self { automaton: Some(automaton), ids })
    }

    fn fragments<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        let mut start = 0;
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            if found.start() > start {
                fragments.push(Fragment::Text(&text[start..found.start()]));
            }
            fragments.push(Fragment::Token(self.ids[found.pattern().as_usize()]));
            start = found.end();
        }
        if start < text.len() {
            fragments.push(Fragment::Text(&text[start..]));
        }
        fragments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocabulary::Spelling;

    #[test]
    fn fragments_depend_on_what_may_be_parsed() {
        use TokenKind::*;
        let tokens =
            [("<a>", Control), ("<a><b>", Control), ("[t]", UserDefined), ("x", Normal), ("<u>", Unknown)];
        let (texts, kinds) = tokens.iter().map(|(text, kind)| (text.to_string(), *kind)).unzip();
        let vocabulary = Vocabulary::new(texts, kinds, Spelling::ByteLevel).unwrap();
        let splitter = SpecialSplitter::new(&vocabulary).unwrap();
        let token = |id| Fragment::Token(TokenId(id));
        assert_eq!(
            splitter.fragments("x<a><b>[t]<u> <a>", SpecialTokens::Parse),
            [Fragment::Text("x"), token(1), token(2), token(4), Fragment::Text(" "), token(0)]
        );
        assert_eq!(
            splitter.fragments("x<a>[t]<u>", SpecialTokens::Literal),
            [Fragment::Text("x<a>"), token(2), Fragment::Text("<u>")]
        );
        assert_eq!(splitter.find_control("[t] <a"), None);
        assert_eq!(splitter.find_control("[t] <a>"), Some(TokenId(0)));
        assert_eq!(splitter.fragments("", SpecialTokens::Parse), []);
    }
}
