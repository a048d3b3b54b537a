//! Sample and match: which proposals the target would have sampled itself. It never lets a proposal influence a
//! value.

use paceline_domain::{SampledToken, TokenId};

/// A row that samples.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Row {
    /// It follows so many proposals.
    After(usize),
    /// It follows a branch: its place among them.
    Branch(usize),
}

/// Another guess at the place of a proposal: after how many proposals, and the token.
pub type BranchGuess = (usize, TokenId);

/// Samples row after row until one differs from its proposal. `sample(i)` samples the row that follows the first i
/// proposals; row `proposals.len()` is the free token after a full match. Returns the accepted tokens and, last, the
/// correction or the free token: one token more than were accepted. Rows after the first mismatch are not sampled.
///
/// # Errors
/// The first error of `sample`.
pub fn verify<E>(
    proposals: &[TokenId],
    mut sample: impl FnMut(usize) -> Result<SampledToken, E>,
) -> Result<Vec<SampledToken>, E> {
    verify_branches(proposals, &[], |row| match row {
        Row::After(n) => sample(n),
        Row::Branch(i) => unreachable!("branch {i} of none"),
    })
}

/// [`verify`], where some proposals have other guesses beside them: a correction that is one of these is followed by the
/// token sampled after it. (Trees of proposals, of which this is the flattest: Miao et al. 2024, SpecInfer.)
///
/// # Errors
/// The first error of `sample`.
pub fn verify_branches<E>(
    proposals: &[TokenId],
    branches: &[BranchGuess],
    mut sample: impl FnMut(Row) -> Result<SampledToken, E>,
) -> Result<Vec<SampledToken>, E> {
    let mut sampled = Vec::with_capacity(proposals.len() + 2);
    for n in 0..=proposals.len() {
        let token = sample(Row::After(n))?;
        let is_match = proposals.get(n) == Some(&token.token);
        let guess = (n, token.token);
        sampled.push(token);
        if !is_match {
            let branch = branches.iter().position(|branch| *branch == guess);
            sampled.extend(branch.map(|branch| sample(Row::Branch(branch))).transpose()?);
            break;
        }
    }
    Ok(sampled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(token: u32) -> SampledToken {
        SampledToken { token: TokenId(token), logprob: None, top_logprobs: Vec::new() }
    }

    fn ids(sampled: Result<Vec<SampledToken>, ()>) -> Vec<u32> {
        sampled.unwrap().iter().map(|sampled| sampled.token.0).collect()
    }

    #[test]
    fn accepts_up_to_the_first_difference_and_stops_there() {
        let target = [5, 6, 7, 8];
        // proposals, then the sampled tokens; always one more row is sampled than accepted
        for (proposals, expected) in [
            (&[][..], &[5][..]),
            (&[5, 6, 7], &[5, 6, 7, 8]),
            (&[5, 9, 7], &[5, 6]),
            (&[9, 6, 7], &[5]),
            (&[5, 6, 9], &[5, 6, 7]),
        ] {
            let proposals: Vec<TokenId> = proposals.iter().map(|id| TokenId(*id)).collect();
            let mut rows = Vec::new();
            let found = verify::<()>(&proposals, |row| {
                rows.push(row);
                Ok(sampled(target[row]))
            });
            assert_eq!(ids(found), expected);
            assert_eq!(rows, (0..expected.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_correction_that_was_guessed_gives_the_token_after_it() {
        let target = [5, 6, 7, 8];
        let branches = [(0, 5), (1, 9), (1, 6), (2, 6)].map(|(after, token)| (after, TokenId(token)));
        for (proposals, expected) in [
            (&[4, 6, 7][..], &[5, 100][..]),
            (&[5, 4, 7], &[5, 6, 102]),
            (&[5, 6, 4], &[5, 6, 7]),
            (&[5, 6, 7], &[5, 6, 7, 8]),
            (&[], &[5, 100]),
        ] {
            let proposals: Vec<TokenId> = proposals.iter().map(|id| TokenId(*id)).collect();
            let found = verify_branches(&proposals, &branches, |row| match row {
                Row::After(n) => Ok(sampled(target[n])),
                Row::Branch(branch) => Ok(sampled(100 + branch as u32)),
            });
            assert_eq!(ids(found), expected);
        }
    }

    #[test]
    fn an_error_ends_it() {
        assert_eq!(verify(&[TokenId(1)], |_| Err("gone")), Err("gone"));
        let fails_there = |row| if row == Row::Branch(0) { Err("gone") } else { Ok(sampled(2)) };
        assert_eq!(verify_branches(&[TokenId(1)], &[(0, TokenId(2))], fails_there), Err("gone"));
    }
}
