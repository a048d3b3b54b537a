//! Cuts text into the words that byte-pair merges stay inside, by the rule of each model family. It does not merge.
//!
//! The published rules are regular expressions that end in `\s+(?!\S)|\s+`: of a run of spaces before a word the last
//! one belongs to the word. Here the expressions have no look-ahead, which keeps the search linear; the last
//! character of such a run is given back instead.

use std::ops::Range;

use regex::Regex;
use serde_json::Value;

use crate::error::TextError;

/// The values of `tokenizer.ggml.pre` that are known.
pub(crate) const SUPPORTED: &str = "smollm, qwen2, llama-bpe (llama3), gpt-2, default";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

/// Expressions as tokenizer.json files write them, what they become without look-ahead, and what is given back. In
/// `(?i:'s)` the long s counts as s, which the rules of GGUF files leave out.
const PUBLISHED: [(&str, &str, GivesBack); 3] = [
    (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        GPT2,
        GivesBack::LastSpace,
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        GivesBack::LastSpaceButNoBreak,
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        GivesBack::LastSpaceButNoBreak,
    ),
];

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
        let family = FamilyDefaults { ignores_merges: is_llama3, adds_bos: is_llama3 };
        Ok((Self { stages: stages.iter().map(Stage::new).collect() }, family))
    }

    /// The rule of a `pre_tokenizer` of tokenizer.json that cuts by published expressions and ends in byte letters.
    /// `None` for anything else.
    pub(crate) fn from_json(rule: &Value) -> Option<Self> {
        let steps = rule["pretokenizers"].as_array().map_or(std::slice::from_ref(rule), Vec::as_slice);
        let (last, cuts) = steps.split_last()?;
        let is_plain = last["type"] == "ByteLevel" && last["add_prefix_space"] == false;
        let mut stages: Vec<Stage> = cuts.iter().map(Stage::from_json).collect::<Option<_>>()?;
        if last["use_regex"] != false {
            stages.push(Stage::new(&(GPT2, GivesBack::LastSpace)));
        }
        is_plain.then_some(Self { stages })
    }

    /// The words of a text in order; together they are the text.
    pub(crate) fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'t> {
        self.ranges(text).map(|range| &text[range])
    }

    /// Where the words of a text lie.
    pub(crate) fn ranges(&self, text: &str) -> impl Iterator<Item = Range<usize>> + use<> {
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
        ends.into_iter().map(move |end| std::mem::replace(&mut start, end)..end)
    }
}

impl Stage {
    fn new((pattern, gives_back): &(&str, GivesBack)) -> Self {
        let pattern = Regex::new(pattern).expect("invariant: the patterns above are valid");
        Self { pattern, gives_back: *gives_back }
    }

    fn from_json(step: &Value) -> Option<Self> {
        if step["type"] == "Digits" {
            let pattern = if step["individual_digits"] == true { r"\p{N}" } else { r"\p{N}+" };
            return Some(Self::new(&(pattern, GivesBack::Nothing)));
        }
        let is_cut = step["type"] == "Split" && step["behavior"] == "Isolated" && step["invert"] == false;
        let published = |(name, ..): &&(&str, &str, GivesBack)| is_cut && step["pattern"]["Regex"] == *name;
        let (_, pattern, gives_back) = PUBLISHED.iter().find(published)?;
        Some(Self::new(&(pattern, *gives_back)))
    }

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
