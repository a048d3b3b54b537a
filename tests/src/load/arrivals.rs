//! What a run will send, decided before it begins: texts, lengths, the moments of sending, who goes away. A function of
//! options and prompts; no clock.

use std::time::Duration;

use super::{
    Options,
    options::TenantRate,
    prompts::{Prompts, Text},
};
use crate::random::Random;

/// A request that will be sent.
#[derive(Clone, PartialEq, Debug)]
pub struct Planned {
    /// What it asks.
    pub text: Text,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// The client goes away after so many chunks with text.
    pub cancelled_after: Option<u32>,
    /// Whose it is, as an index among the options' tenants; none where there are none.
    pub tenant: Option<usize>,
    /// When it is sent, from the start of the run; zero without a rate.
    pub sent_at: Duration,
}

/// Requests from number `first` on; the same seed gives the same ones.
pub fn plan(options: &Options, prompts: &Prompts, first: usize, n: usize) -> Vec<Planned> {
    let mut random = Random::new(options.seed.wrapping_mul(0x1_0000_0001).wrapping_add(first as u64));
    let mut sent_at = Duration::ZERO;
    let mut planned = |i: usize| {
        let pattern = prompts.pick(&mut random);
        let max_tokens = options.max_tokens.unwrap_or(pattern.max_tokens);
        let is_cancelled = random.happens(options.cancel_fraction);
        let place = random.within(0..max_tokens as usize) as u32;
        if let Some(rate) = options.total_rate() {
            sent_at += gap(rate, random.unit());
        }
        Planned {
            tenant: tenant(options, &mut random),
            text: pattern.fill(first + i, &mut random),
            max_tokens,
            cancelled_after: is_cancelled.then_some(place),
            sent_at,
        }
    };
    (0..n).map(&mut planned).collect()
}

/// Poisson processes laid over each other are one, of which each arrival belongs to one of them by chance.
fn tenant(options: &Options, random: &mut Random) -> Option<usize> {
    let last = options.tenants.len().checked_sub(1)?;
    let mut left = random.unit() * options.total_rate()?;
    let is_taken = |tenant: &TenantRate| {
        left -= tenant.rate;
        left < 0.0
    };
    Some(options.tenants.iter().position(is_taken).unwrap_or(last))
}

/// The time to the next arrival of a Poisson process, by inversion of the exponential distribution.
fn gap(rate: f64, unit: f64) -> Duration {
    Duration::from_secs_f64(-(1.0 - unit).ln() / rate)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn planned(arguments: &[&str], n: usize) -> Vec<Planned> {
        let options = Options::parse_from(["load"].iter().chain(arguments));
        plan(&options, &Prompts::read(&Prompts::default_path(), None).expect("prompts"), 0, n)
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let requests = planned(&["--rate", "50"], 5000);
        assert!(requests.is_sorted_by_key(|request| request.sent_at));
        let gaps: Vec<f64> =
            requests.windows(2).map(|pair| (pair[1].sent_at - pair[0].sent_at).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((0.019..0.021).contains(&mean), "mean {mean} s");
        // In an exponential distribution a share of 1/e lies above the mean.
        let above = gaps.iter().filter(|gap| **gap > 0.02).count() as f64 / gaps.len() as f64;
        assert!((0.34..0.40).contains(&above), "{above} above 20 ms");
        assert_eq!(gap(50.0, 0.0), Duration::ZERO);
        assert!(planned(&[], 9).iter().all(|request| request.sent_at == Duration::ZERO));
    }

    #[test]
    fn each_tenant_has_its_share_of_the_arrivals() {
        let requests = planned(&["--tenants", "light=1,flood=9"], 5000);
        let n_light = requests.iter().filter(|request| request.tenant == Some(0)).count();
        assert!((430..570).contains(&n_light), "{n_light} of 5000");
        let seconds = requests[4999].sent_at.as_secs_f64();
        assert!((450.0..550.0).contains(&seconds), "{seconds} s for 5000 requests at 10 a second");
        assert!(planned(&["--rate", "9"], 9).iter().all(|request| request.tenant.is_none()));
    }

    #[test]
    fn the_share_that_goes_away_is_as_asked_and_the_seed_decides() {
        let requests = planned(&["--cancel-fraction", "0.25"], 4000);
        let cancelled: Vec<_> = requests.iter().filter(|request| request.cancelled_after.is_some()).collect();
        assert!((920..1080).contains(&cancelled.len()), "{} of 4000", cancelled.len());
        assert!(
            cancelled.iter().all(|request| request.cancelled_after.is_some_and(|at| at < request.max_tokens))
        );
        assert_eq!(planned(&["--seed", "3"], 20), planned(&["--seed", "3"], 20));
        assert_ne!(planned(&["--seed", "3"], 20), planned(&["--seed", "4"], 20));
        assert!(planned(&["--max-tokens", "5"], 20).iter().all(|request| request.max_tokens == 5));
    }
}
