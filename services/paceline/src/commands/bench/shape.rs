//! Shapes of work to measure, as they are typed (`pp512`, `tg128`, `tg64x8`, `tg32d8000`), and what each asks of the machine.

use std::{fmt, str::FromStr};

/// Tokens that each sequence has before decoding is measured, if no depth is given.
const PROMPT_TOKENS: usize = 16;
/// Most tokens of a sequence, and most sequences.
const MAX_COUNT: usize = 1 << 20;

/// One kind of work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// A prompt of this many tokens.
    Prefill {
        /// Its length.
        n_tokens: usize,
        /// Positions cached before the clock starts.
        depth: usize,
    },
    /// Sequences that decode together, one token each a pass.
    Decode {
        /// Tokens of each sequence.
        n_tokens: usize,
        /// How many there are.
        n_sequences: usize,
        /// Positions of each that are cached before the clock starts.
        depth: usize,
    },
}

/// What a shape makes an engine do, what is cached before aside.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Work {
    /// Passes over the weights.
    pub n_passes: u64,
    /// Token rows of all passes.
    pub n_rows: u64,
    /// Rows whose logits are computed.
    pub n_output_rows: u64,
    /// Cached positions read: each sequence's once a pass.
    pub n_kv_positions: u64,
}

impl Shape {
    /// Tokens that count for tokens a second.
    pub fn n_tokens(self) -> usize {
        match self {
            Self::Prefill { n_tokens, .. } => n_tokens,
            Self::Decode { n_tokens, n_sequences, .. } => n_tokens * n_sequences,
        }
    }

    /// Sequences that run together.
    pub fn n_sequences(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { n_sequences, .. } => n_sequences,
        }
    }

    /// Positions that each sequence has in the end.
    pub fn n_positions(self) -> usize {
        let (Self::Prefill { n_tokens, depth } | Self::Decode { n_tokens, depth, .. }) = self;
        depth + n_tokens
    }

    /// Positions that each sequence has when the clock starts.
    pub fn depth(self) -> usize {
        let (Self::Prefill { depth, .. } | Self::Decode { depth, .. }) = self;
        depth
    }

    /// Most rows of a pass, when `pass_rows` of a prompt run at a time.
    pub fn max_rows(self, pass_rows: usize) -> usize {
        match self {
            Self::Prefill { n_tokens, depth } => n_tokens.max(depth).min(pass_rows),
            Self::Decode { n_sequences, depth, .. } => n_sequences.max(depth.min(pass_rows)),
        }
    }

    /// Ends of the passes over the positions `from .. to` of a prompt.
    pub fn pass_ends(from: usize, to: usize, pass_rows: usize) -> impl Iterator<Item = usize> {
        (from..to).step_by(pass_rows).map(move |start| to.min(start + pass_rows))
    }

    /// What is measured.
    pub fn work(self, pass_rows: usize) -> Work {
        match self {
            Self::Prefill { n_tokens, depth } => Work {
                n_passes: n_tokens.div_ceil(pass_rows) as u64,
                n_rows: n_tokens as u64,
                n_output_rows: 1,
                n_kv_positions: Self::pass_ends(depth, depth + n_tokens, pass_rows)
                    .map(|end| end as u64)
                    .sum(),
            },
            Self::Decode { n_tokens, n_sequences, depth } => {
                let of_one: usize = (1..=n_tokens).map(|n| depth + n).sum();
                let n_rows = (n_tokens * n_sequences) as u64;
                Work {
                    n_passes: n_tokens as u64,
                    n_rows,
                    n_output_rows: n_rows,
                    n_kv_positions: (of_one * n_sequences) as u64,
                }
            }
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || {
            let known =
                "ppN, tgN and tgNxB, each with dN after it or not, such as pp512, tg128, tg64x8, tg32d8000";
            format!("`{text}` is no shape; shapes are {known}")
        };
        let count = |digits: &str| -> Result<usize, String> {
            let count: usize = digits.parse().map_err(|_| problem())?;
            if (1..=MAX_COUNT).contains(&count) { Ok(count) } else { Err(problem()) }
        };
        let (shape, depth) = match text.split_once('d') {
            Some((shape, depth)) => (shape, Some(count(depth)?)),
            None => (text, None),
        };
        if let Some(digits) = shape.strip_prefix("pp") {
            return Ok(Self::Prefill { n_tokens: count(digits)?, depth: depth.unwrap_or(0) });
        }
        let counts = shape.strip_prefix("tg").ok_or_else(problem)?;
        let (n_tokens, n_sequences) = counts.split_once('x').unwrap_or((counts, "1"));
        let (n_tokens, n_sequences) = (count(n_tokens)?, count(n_sequences)?);
        Ok(Self::Decode { n_tokens, n_sequences, depth: depth.unwrap_or(PROMPT_TOKENS) })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual_depth = match *self {
            Self::Prefill { n_tokens, .. } => {
                write!(formatter, "pp{n_tokens}")?;
                0
            }
            Self::Decode { n_tokens, n_sequences, .. } => {
                write!(formatter, "tg{n_tokens}")?;
                if n_sequences > 1 {
                    write!(formatter, "x{n_sequences}")?;
                }
                PROMPT_TOKENS
            }
        };
        if self.depth() == usual_depth { Ok(()) } else { write!(formatter, "d{}", self.depth()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_and_written() {
        let cases = [
            ("pp512", Shape::Prefill { n_tokens: 512, depth: 0 }),
            ("pp512d2000", Shape::Prefill { n_tokens: 512, depth: 2000 }),
            ("tg128", Shape::Decode { n_tokens: 128, n_sequences: 1, depth: 16 }),
            ("tg64x32", Shape::Decode { n_tokens: 64, n_sequences: 32, depth: 16 }),
            ("tg64x2d100", Shape::Decode { n_tokens: 64, n_sequences: 2, depth: 100 }),
        ];
        for (text, shape) in cases {
            assert_eq!(text.parse(), Ok(shape));
            assert_eq!(shape.to_string(), text);
        }
        for text in
            ["", "pp", "tg", "pp0", "tg8x0", "tg8x", "pp8x2", "512", "pp-1", "tg1048577", "tg8d", "d8"]
        {
            let problem = text.parse::<Shape>().expect_err("no shape");
            assert!(problem.contains(&format!("`{text}`")), "{problem}");
        }
    }

    #[test]
    fn work_is_counted_by_pass() {
        let work = |text: &str| text.parse::<Shape>().expect("a shape").work(512);
        let expected = Work { n_passes: 2, n_rows: 600, n_output_rows: 1, n_kv_positions: 512 + 600 };
        assert_eq!(work("pp600"), expected);
        let expected = Work { n_passes: 2, n_rows: 600, n_output_rows: 1, n_kv_positions: 612 + 700 };
        assert_eq!(work("pp600d100"), expected);
        let expected = Work { n_passes: 3, n_rows: 6, n_output_rows: 6, n_kv_positions: 2 * (17 + 18 + 19) };
        assert_eq!(work("tg3x2"), expected);
    }
}
