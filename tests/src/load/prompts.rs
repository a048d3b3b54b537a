//! A file of prompts: one JSON object a line. A line is a pattern; each request fills it with its own number and words,
//! so that lengths are as wished and only what is meant to be shared is shared.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::random::Random;

/// Most words a line may ask for.
const MAX_WORDS: usize = 100_000;
/// What generated text is made of.
const WORDS: [&str; 32] = [
    "river", "stone", "the", "of", "walks", "under", "bright", "engine", "and", "letter", "seven", "paper",
    "quiet", "turns", "garden", "with", "a", "northern", "bridge", "before", "carries", "small", "window",
    "every", "evening", "to", "market", "follows", "old", "signal", "in", "harbour",
];

/// A line of the file.
#[derive(Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Pattern {
    /// For `--only` and messages.
    pub name: String,
    /// A conversation; or `prompt`.
    #[serde(default)]
    pub messages: Vec<Message>,
    /// Raw text.
    #[serde(default)]
    pub prompt: Option<String>,
    /// Words that stand for `{words}`; each request has others.
    #[serde(default)]
    pub n_words: usize,
    /// Words that stand for `{shared}`; the same ones for all requests of this name.
    #[serde(default)]
    pub n_shared: usize,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// How often it is taken, against the others.
    #[serde(default = "one")]
    pub weight: u32,
}

/// One turn.
#[derive(Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// Text with `{n}`, `{words}` and `{shared}` in it.
    pub content: String,
}

fn one() -> u32 {
    1
}

/// What is sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Text {
    /// A conversation.
    Chat(Vec<Message>),
    /// Raw text.
    Raw(String),
}

/// The patterns of a file.
#[derive(Clone, Debug)]
pub struct Prompts(Vec<Pattern>);

impl Prompts {
    /// The file of this source.
    pub fn default_path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("load/prompts.jsonl")
    }

    /// Reads a file; `only` keeps the lines whose name begins so.
    ///
    /// # Errors
    /// A file that cannot be read, or the number of a line that is wrong.
    pub fn read(path: &Path, only: Option<&str>) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, only).with_context(|| format!("{}", path.display()))
    }

    fn parse(text: &str, only: Option<&str>) -> anyhow::Result<Self> {
        let mut patterns = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let pattern: Pattern = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
            pattern.check().with_context(|| format!("line {}", i + 1))?;
            patterns.push(pattern);
        }
        patterns.retain(|pattern| only.is_none_or(|only| pattern.name.starts_with(only)));
        match (patterns.is_empty(), only) {
            (false, _) => Ok(Self(patterns)),
            (true, Some(only)) => bail!("no prompt has a name that begins with {only:?}"),
            (true, None) => bail!("there is no prompt"),
        }
    }

    /// A pattern, each as often as its weight says.
    pub fn pick(&self, random: &mut Random) -> &Pattern {
        let n = self.0.iter().map(|pattern| pattern.weight as usize).sum();
        let mut place = random.within(0..n);
        for pattern in &self.0 {
            match place.checked_sub(pattern.weight as usize) {
                Some(rest) => place = rest,
                None => return pattern,
            }
        }
        unreachable!("invariant: the place is below the sum of weights")
    }
}

impl Pattern {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.messages.is_empty() == self.prompt.is_some(), "give either `messages` or `prompt`");
        ensure!(self.max_tokens > 0, "max_tokens is 0; it must be at least 1");
        ensure!((1..=1000).contains(&self.weight), "weight is {}; it must be from 1 to 1000", self.weight);
        let n_words = self.n_words.max(self.n_shared);
        ensure!(n_words <= MAX_WORDS, "{n_words} words; at most {MAX_WORDS} are made");
        Ok(())
    }

    /// The text of request number `n`.
    pub fn fill(&self, n: usize, random: &mut Random) -> Text {
        let own = words(random, self.n_words);
        let name = self.name.bytes().fold(0, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte));
        let shared = words(&mut Random::new(name), self.n_shared);
        let fill = |text: &str| {
            text.replace("{n}", &n.to_string()).replace("{words}", &own).replace("{shared}", &shared)
        };
        match &self.prompt {
            Some(prompt) => Text::Raw(fill(prompt)),
            None => {
                let message =
                    |message: &Message| Message { content: fill(&message.content), ..message.clone() };
                Text::Chat(self.messages.iter().map(message).collect())
            }
        }
    }
}

fn words(random: &mut Random, n: usize) -> String {
    (0..n).map(|_| *random.pick(&WORDS)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"
        {"name": "chat-short", "messages": [{"role": "system", "content": "{shared}"},
         {"role": "user", "content": "{n}: {words}"}], "n_words": 3, "n_shared": 5, "max_tokens": 4, "weight": 3}
        {"name": "raw", "prompt": "Say {n}", "max_tokens": 7}"#;

    fn lines() -> String {
        LINES.replace(",\n         ", ", ")
    }

    #[test]
    fn requests_share_what_is_meant_to_be_shared() {
        let prompts = Prompts::parse(&lines(), Some("chat")).expect("prompts");
        let mut random = Random::new(5);
        let [first, second] = [8, 9].map(|n| match prompts.pick(&mut random).fill(n, &mut random) {
            Text::Chat(messages) => messages,
            other => panic!("{other:?}"),
        });
        assert_eq!(first[0], second[0]);
        assert_eq!(first[0].content.split(' ').count(), 5);
        assert!(first[1].content.starts_with("8: ") && second[1].content.starts_with("9: "));
        assert_ne!(first[1].content[3..], second[1].content[3..]);
    }

    #[test]
    fn patterns_come_as_often_as_their_weight_says() {
        let prompts = Prompts::parse(&lines(), None).expect("prompts");
        let mut random = Random::new(1);
        let n_chat = (0..4000).filter(|_| prompts.pick(&mut random).name == "chat-short").count();
        assert!((2900..3100).contains(&n_chat), "{n_chat} of 4000");
    }

    #[test]
    fn a_wrong_line_is_named() {
        let good = r#"{"name": "a", "prompt": "x", "max_tokens": 1}"#;
        let cases = [
            (r#"{"name": "a", "max_tokens": 1}"#, "either `messages` or `prompt`"),
            (r#"{"name": "a", "prompt": "x", "max_tokens": 0}"#, "max_tokens is 0"),
            (r#"{"name": "a", "prompt": "x", "max_tokens": 1, "weight": 0}"#, "weight is 0"),
            (r#"{"name": "a", "prompt": "x", "max_tokens": 1, "n_words": 100001}"#, "100001 words"),
            (r#"{"name": "a", "prompt": "x", "max_tokens": 1, "colour": 1}"#, "colour"),
        ];
        for (line, problem) in cases {
            let error = Prompts::parse(&format!("{good}\n{line}"), None).expect_err(problem);
            let error = format!("{error:#}");
            assert!(error.contains("line 2") && error.contains(problem), "{error}");
        }
        assert!(Prompts::parse(good, Some("b")).is_err() && Prompts::parse("\n", None).is_err());
    }

    #[test]
    fn the_file_of_this_source_is_good() {
        let prompts = Prompts::read(&Prompts::default_path(), None).expect("prompts");
        for kind in ["chat", "long", "shared"] {
            assert!(prompts.0.iter().any(|pattern| pattern.name.starts_with(kind)), "{kind}");
        }
    }
}
