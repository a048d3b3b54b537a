//! Where in its earlier tokens a text is copying from, over small changes: who renames a variable, adds a column or
//! corrects a word goes on with the original a token or two later. It proposes nothing and looks only near the place.

use std::ops::Range;

use paceline_domain::TokenId;

/// Tokens that are remembered as copied or not.
const REMEMBERED: u32 = 16;
/// Where a pair of tokens is looked for after a change: so far before and after the place.
const NEAR: (usize, usize) = (16, 32);
/// Where a single token is looked for: no farther than this after it, because single tokens are everywhere.
const VERY_NEAR: usize = 4;

/// So many copied tokens of the last ones say more than one that occurred before.
const SURE: usize = 6;

/// A place that is copied from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Alignment {
    /// Index after the last token that was copied.
    place: usize,
    /// The last tokens of the text, the newest in the lowest bit: whether they were copied.
    copied: u32,
    /// Tokens since then that are none of the original's.
    n_astray: usize,
}

impl Alignment {
    /// The last `n_copied` tokens are those before this place.
    pub fn new(place: usize, n_copied: usize) -> Self {
        let n_copied = (n_copied as u32).min(REMEMBERED);
        Self { place, copied: (1 << n_copied) - 1, n_astray: 0 }
    }

    /// The text's last token is new: the place after it, if it is still known; at most `max_astray` tokens in a row may
    /// be none of the original's.
    pub fn follow(self, text: &[TokenId], max_astray: usize) -> Option<Self> {
        let (token, before) = text.split_last().expect("invariant: there is a new token");
        // The original is what was there before the token.
        let is_copied = |at: usize| before.get(at) == Some(token);
        let remember = |is_copied: bool| (self.copied << 1 | u32::from(is_copied)) & ((1 << REMEMBERED) - 1);
        if self.n_astray == 0 && is_copied(self.place) {
            return Some(Self { place: self.place + 1, copied: remember(true), n_astray: 0 });
        }
        let is_pair = |at: usize| is_copied(at) && at > 0 && before.last() == Some(&before[at - 1]);
        let expected = self.expected();
        let near = self.place.saturating_sub(NEAR.0)..self.place + NEAR.1;
        let found = nearest(near, expected, is_pair)
            .or_else(|| nearest(self.place..self.place + VERY_NEAR, expected, is_copied));
        let next = match found {
            Some(at) => Self { place: at + 1, copied: remember(true), n_astray: 0 },
            None => Self { copied: remember(false), n_astray: self.n_astray + 1, ..self },
        };
        // Who has hardly copied anything has no place to come back to.
        (next.n_astray <= max_astray.min(next.n_copied() as usize)).then_some(next)
    }

    /// Index of the token that is expected next. After a change tokens are thought to be replaced one by one.
    pub fn expected(&self) -> usize {
        self.place + self.n_astray
    }

    /// Of the last tokens, how many were copied.
    pub fn n_copied(&self) -> u32 {
        self.copied.count_ones()
    }

    /// Whether both expect the same token of the same place.
    pub fn is_at(&self, other: &Self) -> bool {
        self.expected() == other.expected()
    }

    /// Whether what follows in the original is likelier than what followed `n_matched` last tokens elsewhere: after a change
    /// those know better, unless it is one alone.
    pub fn is_surer_than(&self, n_matched: usize) -> bool {
        let n_copied = self.n_copied() as usize;
        n_matched == 0 || (n_matched == 1 && n_copied >= SURE) || (self.n_astray == 0 && n_copied > n_matched)
    }

    /// How sure it is that the token `n_ahead` after the expected one follows, when all before it do, 0 to 1: surer the longer
    /// the text has been copied without a change, and hardly right after one.
    pub fn confidence(&self, n_ahead: usize) -> f32 {
        let n_unchanged = self.copied.trailing_ones() as usize + n_ahead;
        let share = self.n_copied() as f32 / REMEMBERED as f32;
        let sureness = n_unchanged as f32 / (n_unchanged + 1) as f32;
        // A first token after a change is a guess; what follows a right guess is not.
        (0.5 + 0.5 * share) * if n_unchanged == 0 { 0.2 } else { sureness }
    }
}

/// The index in a range nearest to `expected` that fits; the earlier of two.
fn nearest(range: Range<usize>, expected: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    range.filter(|at| fits(*at)).min_by_key(|at| at.abs_diff(expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: &str = "the quick brown fox jumps over the lazy dog and runs home";

    /// Follows a copy word by word; the word that is expected after each, and none where the place is lost.
    fn expected(copy: &str) -> Vec<Option<&'static str>> {
        let original: Vec<&'static str> = ORIGINAL.split(' ').collect();
        let copy: Vec<&str> = copy.split(' ').collect();
        let mut names: Vec<&str> = Vec::new();
        let mut id = |word: &'_ str| match names.iter().position(|known| *known == word) {
            Some(at) => TokenId(at as u32),
            None => {
                names.push(Box::leak(word.to_owned().into_boxed_str()));
                TokenId(names.len() as u32 - 1)
            }
        };
        let mut text: Vec<TokenId> = original.iter().map(|word| id(word)).collect();
        text.extend(copy[..4].iter().map(|word| id(word)));
        assert_eq!(copy[..4], original[..4], "a copy begins with four words");
        let mut alignment = Some(Alignment::new(4, 4));
        let mut expected = Vec::new();
        for word in &copy[4..] {
            text.push(id(word));
            alignment = alignment.and_then(|alignment| alignment.follow(&text, 4));
            expected
                .push(alignment.map(|alignment| original.get(alignment.expected()).copied().unwrap_or("")));
        }
        expected
    }

    #[test]
    fn a_copy_is_followed_over_replaced_added_and_removed_words() {
        let replaced = expected("the quick brown fox leaps over the");
        assert_eq!(replaced, [Some("over"), Some("the"), Some("lazy")]);
        let added = expected("the quick brown fox always happily jumps over");
        assert_eq!(added, [Some("over"), Some("the"), Some("over"), Some("the")]);
        let removed = expected("the quick brown fox over the lazy");
        assert_eq!(removed, [Some("the"), Some("lazy"), Some("dog")]);
    }

    #[test]
    fn who_writes_something_else_has_no_place() {
        let lost = expected("the quick brown fox a b c d e f");
        assert_eq!((lost[3].is_some(), lost[4]), (true, None), "four words may be other ones");
        assert_eq!(lost[5], None, "and it does not come back by itself");
    }

    #[test]
    fn one_is_surer_the_longer_nothing_has_changed() {
        let long = Alignment::new(100, 16);
        assert!(long.confidence(0) > 0.9 && long.confidence(9) > long.confidence(0));
        let text: Vec<TokenId> = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 9].map(TokenId).into();
        let changed = Alignment::new(4, 4).follow(&text, 4).expect("one word");
        assert_eq!(changed.expected(), 5);
        assert!(changed.confidence(0) < 0.2 && changed.confidence(1) > 0.2, "{}", changed.confidence(1));
        assert!(Alignment::new(100, 4).confidence(0) < long.confidence(0));
    }
}
