//! Sample and match: which proposals the target would have sampled itself. It never lets a proposal influence a
//! value.

use paceline_domain::{SampledToken, TokenId};

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
    let mut sampled = Vec::with_capacity(proposals.len() + 1);
    for row in 0..=proposals.len() {
        let token = sample(row)?;
        let is_match = proposals.get(row) == Some(&token.token);
        sampled.push(token);
        if !is_match {
            break;
        }
    }
    Ok(sampled)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let sampled = verify::<()>(&proposals, |row| {
                rows.push(row);
                Ok(SampledToken { token: TokenId(target[row]), logprob: None, top_logprobs: Vec::new() })
            });
            let tokens: Vec<u32> = sampled.unwrap().iter().map(|sampled| sampled.token.0).collect();
            assert_eq!(tokens, expected);
            assert_eq!(rows, (0..expected.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_it() {
        assert_eq!(verify(&[TokenId(1)], |_| Err("gone")), Err("gone"));
    }
}
