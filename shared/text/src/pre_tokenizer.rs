//! Cuts text into the words that byte-pair merges stay inside, by the rule of each model family. It does not merge.
//!
//! The published rules are regular expressions that end in `\s+(?!\S)|\s+`: of a run of spaces before a word the last
//! one belongs to the word. Here the expressions have no look-ahead, which keeps the search linear; the last
//! character of such a run is given back instead.

use regex::Regex;

use crate::error::TextError;

/// The values of `tokenizer.ggml.pre` that are known.
pub(crate) const SUPPORTED: &str = "smollm, qwen2, llama-bpe (llama3), gpt-2, default";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

/// A family's rule: each stage cuts the pieces of the one before.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    stages: Vec<Stage>,
}

#[derive(Debug)]
struct Stage {
    pattern: Regex,
    gives_back: GivesBack,
}

/// When a run of white space leaves its last character to what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum GivesBack {
    /// Never.
    Nothing,
    /// Unless the piece ends with it.
    LastSpace,
    /// Like `LastSpace`, but a line break is never given back: there, runs up to a line break are words.
    LastSpaceButNoBreak,
}

/// What a family does besides cutting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FamilyDefaults {
    /// A word that is a token is taken as it is, whatever the merges say.
    pub(crate) ignores_merges: bool,
    /// Whether prompts start with the beginning-of-sequence token when the metadata does not say.
    pub(crate) adds_bos: bool,
}

impl PreTokenizer {
    /// The rule with this name in `tokenizer.ggml.pre`.
    pub(crate) fn from_name(name: &str) -> Result<(Self, FamilyDefaults), TextError> {
        use GivesBack::*;
        let stages: &[(&str, GivesBack)] = match name {
            "smollm" => &[(r"\p{N}", Nothing), (GPT2, LastSpace)],
            "qwen2" => &[(QWEN2, LastSpaceButNoBreak)],
            "llama-bpe" | "llama3" | "llama-v3" => &[(LLAMA3, LastSpaceButNoBreak)],
            "gpt-2" => &[(GPT2, LastSpace)],
            "default" => &[
                (r"[\p{P}$+<=>^~|]+", Nothing),
                (GPT2, LastSpace),
                (r"\p{N}+", Nothing),
                (r"[0-9][0-9][0-9]", Nothing),
            ],
            _ => {
                return Err(TextError::Unsupported {
                    what: "tokenizer.ggml.pre",
                    found: name.to_owned(),
                    supported: SUPPORTED,
                });
            }
        };
        let is_llama3 = name.starts_with("llama");
        let stages = stages.iter().map(|(pattern, gives_back)| Stage {
            pattern: Regex::new(pattern).expect("invariant: the patterns above are valid"),
            gives_back: *gives_back,
        });
        Ok((
            Self { stages: stages.collect() },
            FamilyDefaults { ignores_merges: is_llama3, adds_bos: is_llama3 },
        ))
    }

    /// The words of a text in order; together they are the text.
    pub(crate) fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'t> {
        let mut ends = if text.is_empty() { Vec::new() } else { vec![text.len()] };
        for stage in &self.stages {
            let mut start = 0;
            let mut finer = Vec::with_capacity(ends.len());
            for end in ends {
                stage.cut(&text[start..end], start, &mut finer);
                start = end;
            }
            ends = finer;
        }
        let mut start = 0;
        ends.into_iter().map(move |end| &text[std::mem::replace(&mut start, end)..end])
    }
}

impl Stage {
    /// Appends the ends of the pieces of `piece`, which starts at `offset` of the whole text. What lies between two
    /// matches is a piece too.
    fn cut(&self, piece: &str, offset: usize, ends: &mut Vec<usize>) {
        let mut start = 0;
        while let Some(found) = self.pattern.find_at(piece, start) {
            if found.start() > start {
                ends.push(offset + found.start());
            }
            start = found.end() - self.given_back(found.as_str(), &piece[found.end()..]);
            ends.push(offset + start);
            if start == piece.len() {
                return;
            }
        }
        ends.push(offset + piece.len());
    }

    /// Bytes at the end of a match that belong to the next one.
    fn given_back(&self, found: &str, rest: &str) -> usize {
        let Some(last) = found.chars().next_back().filter(|last| last.is_whitespace()) else { return 0 };
        let is_kept = match self.gives_back {
            GivesBack::Nothing => true,
            GivesBack::LastSpace => false,
            GivesBack::LastSpaceButNoBreak => matches!(last, '\r' | '\n'),
        };
        if is_kept || rest.is_empty() || found.len() == last.len_utf8() { 0 } else { last.len_utf8() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMES: [&str; 5] = ["smollm", "qwen2", "llama-bpe", "gpt-2", "default"];

    fn words(name: &str, text: &'static str) -> Vec<&'static str> {
        PreTokenizer::from_name(name).unwrap().0.words(text).collect()
    }

    #[test]
    fn the_last_space_belongs_to_the_word() {
        assert_eq!(words("gpt-2", "a   b \n\n c  "), ["a", "  ", " b", " \n\n", " c", "  "]);
        assert_eq!(words("qwen2", "a   b \n\n c  "), ["a", "  ", " b", " \n\n", " c", "  "]);
        assert_eq!(words("gpt-2", "x\n\ty"), ["x", "\n", "\t", "y"]);
        assert_eq!(words("qwen2", "x\n\ty"), ["x", "\n", "\ty"]);
    }

    #[test]
    fn digits_are_cut_as_the_family_does() {
        assert_eq!(words("smollm", "ab  12345"), ["ab", "  ", "1", "2", "3", "4", "5"]);
        assert_eq!(words("qwen2", "ab  123"), ["ab", " ", " ", "1", "2", "3"]);
        assert_eq!(words("llama-bpe", "1234567"), ["123", "456", "7"]);
        assert_eq!(words("gpt-2", " 12345"), [" 12345"]);
        assert_eq!(words("default", " 12345"), [" ", "123", "45"]);
    }

    #[test]
    fn an_unknown_family_is_refused_by_name() {
        let error = PreTokenizer::from_name("deepseek-llm").unwrap_err().to_string();
        assert!(error.contains("deepseek-llm") && error.contains("qwen2"), "{error}");
    }

    proptest! {
        #[test]
        fn words_are_not_empty_and_make_the_text(text in "[a-zA-Z0-9 \\t\\r\\n'.,<é你😀\u{301}\u{a0}\u{2028}]{0,60}") {
            for name in NAMES {
                let (rule, _) = PreTokenizer::from_name(name).unwrap();
                let words: Vec<&str> = rule.words(&text).collect();
                prop_assert!(words.iter().all(|word| !word.is_empty()));
                prop_assert_eq!(words.concat(), text.as_str());
            }
        }
    }
}
