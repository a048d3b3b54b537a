//! top-k, top-p and min-p as one cut in the order of tokens (logit falling, id rising). It chooses no token.
//!
//! Each filter keeps a prefix of that order, so all of them together keep a prefix, and the last kept token says it
//! all. As in the Transformers library and vLLM filters act one after the other: top-p is measured on the mass that
//! top-k left, renormalised; min-p relates to the likeliest token, which no filter removes.

use crate::math;
use paceline_domain::SamplingParams;
use std::cmp::Ordering;

/// A token in the order: logit, id.
pub(crate) type Ranked = (f32, u32);

/// First guess for how many tokens top-p keeps, and the factor for further guesses.
const FIRST_GUESS: usize = 64;
const GUESS_FACTOR: usize = 16;

/// The last kept token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cut {
    /// Its logit.
    pub logit: f32,
    /// Its id.
    pub token: u32,
}

impl Cut {
    /// Keeps every token.
    pub const ALL: Self = Self { logit: f32::NEG_INFINITY, token: u32::MAX };

    /// Whether a token with this logit is kept.
    pub fn keeps(&self, logit: f32, token: u32) -> bool {
        logit > self.logit || (logit == self.logit && token <= self.token)
    }

    /// What both keep.
    fn and(self, other: Self) -> Self {
        if self.keeps(other.logit, other.token) { other } else { self }
    }
}

/// The cut for a whole row without NaN.
pub fn cut(params: &SamplingParams, logits: &[f32]) -> Cut {
    let k = if params.top_k == 0 { logits.len() } else { logits.len().min(params.top_k as usize) };
    let has_top_k = k < logits.len();
    let is_open = !has_top_k && params.top_p >= 1.0 && params.min_p <= 0.0;
    // With temperature 0 the likeliest token wins, and every filter keeps it.
    if is_open || params.temperature == 0.0 || logits.is_empty() {
        return Cut::ALL;
    }
    let max = row_max(logits);
    let weight = |logit: f32| math::exp(below(logit, max) / params.temperature);
    let mut cut = Cut::ALL;
    if has_top_k {
        let mut kept = top(logits, k);
        if params.top_p < 1.0 {
            let mass: f64 = kept.iter().map(|(logit, _)| f64::from(weight(*logit))).sum();
            kept.truncate(prefix(&kept, weight, f64::from(params.top_p) * mass).unwrap_or(kept.len()));
        }
        cut = last_of(&kept);
    } else if params.top_p < 1.0 {
        let mass = math::sum_lanes(logits.len(), |i| weight(logits[i]));
        cut = top_p_cut(logits, weight, f64::from(params.top_p) * mass);
    }
    if params.min_p > 0.0 {
        let floor = max + params.temperature * math::ln(params.min_p);
        cut = cut.and(Cut { logit: floor, token: u32::MAX });
    }
    cut
}

/// The largest logit; -inf for an empty row.
pub(crate) fn row_max(logits: &[f32]) -> f32 {
    logits.iter().fold(f32::NEG_INFINITY, |max, logit| if *logit > max { *logit } else { max })
}

/// `logit - max`, 0 for the maximum itself even when it is infinite.
pub(crate) fn below(logit: f32, max: f32) -> f32 {
    if logit == max { 0.0 } else { logit - max }
}

/// Cuts after the first tokens that weigh `target` together.
fn top_p_cut(logits: &[f32], weight: impl Fn(f32) -> f32 + Copy, target: f64) -> Cut {
    let mut guess = FIRST_GUESS;
    loop {
        let kept = top(logits, guess);
        if let Some(n_kept) = prefix(&kept, weight, target) {
            return last_of(&kept[..n_kept]);
        }
        if kept.len() == logits.len() {
            return Cut::ALL;
        }
        guess *= GUESS_FACTOR;
    }
}

/// How many tokens of `ranked` reach `target` when their weights are added in order; `None` when all do not.
fn prefix(ranked: &[Ranked], weight: impl Fn(f32) -> f32, target: f64) -> Option<usize> {
    let mut mass = 0f64;
    for (i, (logit, _)) in ranked.iter().enumerate() {
        mass += f64::from(weight(*logit));
        if mass >= target {
            return Some(i + 1);
        }
    }
    None
}

fn last_of(kept: &[Ranked]) -> Cut {
    let (logit, token) = *kept.last().expect("invariant: no filter removes the first token");
    Cut { logit, token }
}

fn by_rank(left: &Ranked, right: &Ranked) -> Ordering {
    right.0.partial_cmp(&left.0).unwrap_or(Ordering::Equal).then(left.1.cmp(&right.1))
}

/// The first `k` tokens of a row in order. Only tokens at least as large as the k-th largest of k or more block
/// maxima can be among them; those are few, and only they are sorted.
pub(crate) fn top(logits: &[f32], k: usize) -> Vec<Ranked> {
    let ranked = |(token, logit): (usize, &f32)| (*logit, token as u32);
    let mut tokens: Vec<Ranked> = if k < logits.len() && k > 0 {
        let mut maxima: Vec<f32> = logits.chunks((logits.len() / k).min(64)).map(row_max).collect();
        let (_, floor, _) = maxima.select_nth_unstable_by(k - 1, |left, right| right.total_cmp(left));
        let floor = *floor;
        logits.iter().enumerate().filter(|(_, logit)| **logit >= floor).map(ranked).collect()
    } else {
        logits.iter().enumerate().map(ranked).collect()
    };
    if k < tokens.len() && k > 0 {
        tokens.select_nth_unstable_by(k - 1, by_rank);
    }
    tokens.truncate(k);
    tokens.sort_unstable_by(by_rank);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A row with many equal logits, some of them infinite.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![
            8 => (-20i32..20).prop_map(|step| step as f32 * 0.5),
            1 => Just(f32::NEG_INFINITY),
            1 => -1e30f32..1e30,
        ];
        prop::collection::vec(logit, 1..600)
    }

    fn kept(cut: Cut, logits: &[f32]) -> Vec<u32> {
        (0..logits.len() as u32).filter(|token| cut.keeps(logits[*token as usize], *token)).collect()
    }

    /// The plainest way: sort everything, one filter after the other, probabilities in f64.
    fn plain(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
        let max = row_max(logits);
        let mut order: Vec<Ranked> = logits.iter().enumerate().map(|(i, logit)| (*logit, i as u32)).collect();
        order.sort_by(by_rank);
        if params.top_k > 0 {
            order.truncate(params.top_k as usize);
        }
        let weight = |logit: f32| f64::from(below(logit, max) / params.temperature).exp();
        let mass: f64 = order.iter().map(|(logit, _)| weight(*logit)).sum();
        if params.top_p < 1.0 {
            let mut before = 0.0;
            order.retain(|(logit, _)| {
                let is_kept = before < f64::from(params.top_p) * mass;
                before += weight(*logit);
                is_kept
            });
        }
        order.retain(|(logit, _)| weight(*logit) >= f64::from(params.min_p));
        let mut ids: Vec<u32> = order.into_iter().map(|(_, token)| token).collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn top_is_the_start_of_the_sorted_row(logits in rows(), k in 0usize..700) {
            let mut sorted: Vec<Ranked> = logits.iter().enumerate().map(|(i, logit)| (*logit, i as u32)).collect();
            sorted.sort_by(by_rank);
            sorted.truncate(k);
            prop_assert_eq!(top(&logits, k), sorted);
        }

        #[test]
        fn a_cut_keeps_what_filters_one_by_one_keep(
            logits in rows(),
            temperature in prop_oneof![Just(1.0f32), 0.1f32..3.0],
            top_k in prop_oneof![Just(0u32), 1u32..700],
            // Sums that hit a limit to the last bit are a matter of rounding; these limits are not sums of rows.
            top_p in prop_oneof![Just(1.0f32), 0.013_7f32..0.97],
            min_p in prop_oneof![Just(0.0f32), 0.001_3f32..0.9],
        ) {
            prop_assume!(row_max(&logits) > f32::NEG_INFINITY);
            let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
            prop_assert_eq!(kept(cut(&params, &logits), &logits), plain(&params, &logits));
        }
    }

    #[test]
    fn ties_go_to_the_lowest_ids() {
        let logits = [1.0, 2.0, 2.0, 2.0, 0.0];
        let params = SamplingParams { top_k: 2, ..SamplingParams::default() };
        assert_eq!(kept(cut(&params, &logits), &logits), [1, 2]);
        let params = SamplingParams { top_p: 0.5, ..SamplingParams::default() };
        assert_eq!(kept(cut(&params, &logits), &logits), [1, 2]);
    }

    #[test]
    fn top_p_sees_the_mass_that_top_k_left() {
        // Probabilities 0.4, 0.3, 0.2, 0.1: of the first two alone, the first has 0.57.
        let logits = [0.4f32, 0.3, 0.2, 0.1].map(f32::ln);
        let params = SamplingParams { top_p: 0.5, ..SamplingParams::default() };
        assert_eq!(kept(cut(&params, &logits), &logits), [0, 1]);
        let params = SamplingParams { top_k: 2, ..params };
        assert_eq!(kept(cut(&params, &logits), &logits), [0]);
    }

    #[test]
    fn infinite_logits_keep_the_order() {
        let logits = [0.0, f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY];
        let params = SamplingParams { top_p: 0.9, min_p: 0.1, ..SamplingParams::default() };
        assert_eq!(kept(cut(&params, &logits), &logits), [1, 3]);
    }
}
