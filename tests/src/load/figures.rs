//! What a run has shown: counts, tokens a second, percentiles of waiting. Numbers only; which are good is for others.

use std::{fmt, time::Instant};

use serde::Serialize;

use super::{
    Options,
    target::{Answer, Outcome},
};

/// Different reasons of failures that are shown.
const N_REASONS: usize = 3;

/// The result of a run.
///
/// Time to first token is from sending to the first chunk with text, inter-token latency the time from one chunk to the
/// next. Tokens a second are all tokens that came, of broken-off requests too, by the time from the first request sent to
/// the last chunk.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Figures {
    /// Clients, or most requests at once where they come at a rate.
    pub clients: usize,
    /// Requests a second that were sent on average; null where each client waits for its answer.
    pub rate: Option<f64>,
    /// Requests sent.
    pub requests: usize,
    /// Those with their whole answer.
    pub finished: usize,
    /// Those that failed otherwise than by a refusal.
    pub failed: usize,
    /// Those for which the server had no place.
    pub refused: usize,
    /// Those that were broken off as planned.
    pub cancelled: usize,
    /// Tokens that came.
    pub tokens: u64,
    /// Prompt tokens that the server had in its cache; null where it does not say.
    pub cached_tokens: Option<u64>,
    /// Seconds from the first request sent to the last chunk.
    pub seconds: f64,
    /// Tokens by seconds.
    pub tokens_per_s: f64,
    /// Milliseconds to the first token, median.
    pub ttft_p50_ms: Option<f64>,
    /// The same that 99 of 100 requests keep to.
    pub ttft_p99_ms: Option<f64>,
    /// Milliseconds from chunk to chunk, median.
    pub itl_p50_ms: Option<f64>,
    /// The same that 99 of 100 chunks keep to.
    pub itl_p99_ms: Option<f64>,
    /// Tokens of requests with their whole answer, by seconds.
    pub goodput_tokens_per_s: f64,
    /// Milliseconds to a refusal, median.
    pub refused_p50_ms: Option<f64>,
    /// The same that 99 of 100 refusals keep to.
    pub refused_p99_ms: Option<f64>,
    /// Of each tenant, where there are some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<TenantFigures>,
    /// Why requests failed, and how many of them.
    pub failures: Vec<(String, usize)>,
}

/// What one tenant's requests met; as in [`Figures`].
#[derive(Clone, PartialEq, Debug, Serialize)]
#[allow(missing_docs)]
pub struct TenantFigures {
    pub name: String,
    pub requests: usize,
    pub finished: usize,
    pub refused: usize,
    pub tokens: u64,
    pub ttft_p50_ms: Option<f64>,
    pub ttft_p99_ms: Option<f64>,
    pub refused_p99_ms: Option<f64>,
}

impl TenantFigures {
    fn new(name: &str, answers: &[&Answer]) -> Self {
        let count = |outcome: &Outcome| answers.iter().filter(|answer| answer.outcome == *outcome).count();
        let (first, refused) = (first_ms(answers.iter().copied()), refused_ms(answers.iter().copied()));
        Self {
            name: name.into(),
            requests: answers.len(),
            finished: count(&Outcome::Finished),
            refused: count(&Outcome::Refused),
            tokens: answers.iter().map(|answer| answer.n_tokens).sum(),
            ttft_p50_ms: percentile(&first, 50.0).map(rounded),
            ttft_p99_ms: percentile(&first, 99.0).map(rounded),
            refused_p99_ms: percentile(&refused, 99.0).map(rounded),
        }
    }
}

impl Figures {
    /// Counts.
    pub fn new(options: &Options, answers: &[Answer]) -> Self {
        let count = |outcome: &Outcome| answers.iter().filter(|answer| answer.outcome == *outcome).count();
        let (finished, refused, cancelled) =
            (count(&Outcome::Finished), count(&Outcome::Refused), count(&Outcome::Cancelled));
        let (first, refusals) = (first_ms(answers), refused_ms(answers));
        let gaps = |answer: &Answer| -> Vec<f64> {
            answer.chunks.windows(2).map(|pair| milliseconds(pair[0], pair[1])).collect()
        };
        let between: Vec<f64> = answers.iter().flat_map(gaps).collect();
        let (tokens, seconds) = (answers.iter().map(|answer| answer.n_tokens).sum(), seconds(answers));
        let whole = answers.iter().filter(|answer| answer.outcome == Outcome::Finished);
        let n_whole: u64 = whole.map(|answer| answer.n_tokens).sum();
        let a_second = |n: u64| rounded(if seconds > 0.0 { n as f64 / seconds } else { 0.0 });
        let of_tenant =
            |i: usize| answers.iter().filter(|answer| answer.tenant == Some(i)).collect::<Vec<_>>();
        let tenants = options.tenants.iter().enumerate();
        let cached: Vec<u64> = answers.iter().filter_map(|answer| answer.n_cached).collect();
        Self {
            clients: if options.total_rate().is_some() { most_at_once(answers) } else { options.clients },
            rate: options.total_rate(),
            requests: answers.len(),
            finished,
            failed: answers.len() - finished - refused - cancelled,
            refused,
            cancelled,
            tokens,
            cached_tokens: (!cached.is_empty()).then(|| cached.iter().sum()),
            seconds: rounded(seconds),
            tokens_per_s: a_second(tokens),
            goodput_tokens_per_s: a_second(n_whole),
            refused_p50_ms: percentile(&refusals, 50.0).map(rounded),
            refused_p99_ms: percentile(&refusals, 99.0).map(rounded),
            tenants: tenants.map(|(i, tenant)| TenantFigures::new(&tenant.name, &of_tenant(i))).collect(),
            ttft_p50_ms: percentile(&first, 50.0).map(rounded),
            ttft_p99_ms: percentile(&first, 99.0).map(rounded),
            itl_p50_ms: percentile(&between, 50.0).map(rounded),
            itl_p99_ms: percentile(&between, 99.0).map(rounded),
            failures: failures(answers),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
        let Self { clients, requests, finished, refused, cancelled, failed, .. } = self;
        writeln!(formatter, "clients                {clients:>10}")?;
        writeln!(
            formatter,
            "requests               {requests:>10}   {finished} finished, {refused} refused, {cancelled} cancelled, {failed} failed"
        )?;
        writeln!(formatter, "tokens                 {:>10}   in {:.2} s", self.tokens, self.seconds)?;
        if let Some(n_cached) = self.cached_tokens {
            writeln!(formatter, "cached prompt tokens   {n_cached:>10}")?;
        }
        writeln!(formatter, "tokens per second      {:>10.1}", self.tokens_per_s)?;
        let rows = [
            ("first token, ms", self.ttft_p50_ms, self.ttft_p99_ms),
            ("between tokens, ms", self.itl_p50_ms, self.itl_p99_ms),
        ];
        for (name, p50, p99) in rows {
            writeln!(formatter, "{name:<22} {:>10}   p99 {}", milliseconds(p50), milliseconds(p99))?;
        }
        if *refused > 0 {
            let (p50, p99) = (milliseconds(self.refused_p50_ms), milliseconds(self.refused_p99_ms));
            writeln!(formatter, "refusal, ms            {p50:>10}   p99 {p99}")?;
        }
        for tenant in &self.tenants {
            let TenantFigures { name, requests, finished, refused, .. } = tenant;
            let (p50, p99) = (milliseconds(tenant.ttft_p50_ms), milliseconds(tenant.ttft_p99_ms));
            writeln!(
                formatter,
                "tenant {name:<15} {requests:>10}   {finished} finished, {refused} refused, first token {p50} ms, p99 {p99}"
            )?;
        }
        for (reason, n) in &self.failures {
            writeln!(formatter, "{n} failed: {reason}")?;
        }
        Ok(())
    }
}

/// The smallest value that `percent` of all values do not exceed (nearest rank); none of nothing.
pub fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

fn first_ms<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Vec<f64> {
    let first = |answer: &Answer| Some(milliseconds(answer.sent, *answer.chunks.first()?));
    answers.into_iter().filter_map(first).collect()
}

fn refused_ms<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Vec<f64> {
    let refused = answers.into_iter().filter(|answer| answer.outcome == Outcome::Refused);
    refused.map(|answer| milliseconds(answer.sent, answer.ended)).collect()
}

fn milliseconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn seconds(answers: &[Answer]) -> f64 {
    let first = answers.iter().map(|answer| answer.sent).min();
    let last = answers.iter().filter_map(|answer| answer.chunks.last()).max();
    first.zip(last).map_or(0.0, |(first, last)| last.saturating_duration_since(first).as_secs_f64())
}

/// Most answers that were being waited for at the same moment.
fn most_at_once(answers: &[Answer]) -> usize {
    let mut moments: Vec<(Instant, i64)> = Vec::new();
    for answer in answers {
        moments.push((answer.sent, 1));
        moments.push((answer.chunks.last().copied().unwrap_or(answer.sent), -1));
    }
    moments.sort();
    let (mut now, mut most) = (0, 0);
    for (_, change) in moments {
        now += change;
        most = most.max(now);
    }
    most as usize
}

fn failures(answers: &[Answer]) -> Vec<(String, usize)> {
    let mut reasons: Vec<(String, usize)> = Vec::new();
    for answer in answers {
        let Outcome::Failed(problem) = &answer.outcome else { continue };
        match reasons.iter_mut().find(|(reason, _)| reason == problem) {
            Some((_, n)) => *n += 1,
            None => reasons.push((problem.clone(), 1)),
        }
    }
    reasons.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    reasons.truncate(N_REASONS);
    reasons
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;

    #[test]
    fn percentiles_are_values_that_came() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            [50.0, 99.0, 100.0, 0.0].map(|percent| percentile(&hundred, percent)),
            [50.0, 99.0, 100.0, 1.0].map(Some)
        );
        assert_eq!(percentile(&[7.0, 3.0], 50.0), Some(3.0));
        assert_eq!(percentile(&[7.0, 3.0], 99.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    /// Sent at the first moment, chunks at the others; milliseconds.
    fn answer(start: Instant, moments: &[u64], outcome: Outcome) -> Answer {
        let at = |ms: &u64| start + Duration::from_millis(*ms);
        let chunks: Vec<Instant> = moments[1..].iter().map(at).collect();
        let ended = chunks.last().copied().unwrap_or_else(|| at(&moments[0]) + Duration::from_millis(7));
        Answer { n_tokens: chunks.len() as u64, chunks, outcome, ended, ..Answer::new(at(&moments[0])) }
    }

    #[test]
    fn each_request_counts_once_and_each_gap_too() {
        let start = Instant::now();
        let failed = || Outcome::Failed("it broke".into());
        let answers = [
            answer(start, &[0, 100, 110, 130], Outcome::Finished),
            answer(start, &[50, 250, 1000], Outcome::Cancelled),
            answer(start, &[60], Outcome::Refused),
            answer(start, &[60], failed()),
            answer(start, &[60], failed()),
        ];
        let figures = Figures::new(&Options::parse_from(["load", "--clients", "3"]), &answers);
        let Figures { clients, requests, finished, failed, refused, cancelled, .. } = figures;
        assert_eq!((clients, requests, finished, failed, refused, cancelled), (3, 5, 1, 2, 1, 1));
        assert_eq!((figures.tokens, figures.seconds, figures.tokens_per_s), (5, 1.0, 5.0));
        assert_eq!((figures.ttft_p50_ms, figures.ttft_p99_ms), (Some(100.0), Some(200.0)));
        assert_eq!((figures.itl_p50_ms, figures.itl_p99_ms), (Some(20.0), Some(750.0)));
        assert_eq!((figures.goodput_tokens_per_s, figures.refused_p99_ms), (3.0, Some(7.0)));
        assert_eq!((&figures.failures, figures.cached_tokens), (&vec![("it broke".into(), 2)], None));
        let at_a_rate = Figures::new(&Options::parse_from(["load", "--rate", "9"]), &answers);
        assert_eq!((at_a_rate.clients, at_a_rate.rate), (2, Some(9.0)));
    }

    #[test]
    fn tenants_are_counted_apart() {
        let start = Instant::now();
        let of = |tenant, moments: &[u64], outcome| Answer {
            tenant: Some(tenant),
            ..answer(start, moments, outcome)
        };
        let answers = [
            of(0, &[0, 20, 30], Outcome::Finished),
            of(1, &[0, 400], Outcome::Finished),
            of(1, &[0], Outcome::Refused),
        ];
        let options = Options::parse_from(["load", "--tenants", "light=1,flood=100"]);
        let figures = Figures::new(&options, &answers);
        let [light, flood] = figures.tenants.as_slice() else { panic!("two tenants") };
        assert_eq!((light.ttft_p99_ms, light.tokens, light.refused), (Some(20.0), 2, 0));
        assert_eq!((flood.ttft_p99_ms, flood.refused, flood.refused_p99_ms), (Some(400.0), 1, Some(7.0)));
        let text = figures.to_string();
        assert!(text.contains("tenant light") && text.contains("refusal, ms"), "{text}");
    }

    #[test]
    fn nothing_is_told_of_nothing() {
        let figures = Figures::new(&Options::parse_from(["load"]), &[]);
        assert_eq!((figures.tokens_per_s, figures.ttft_p99_ms), (0.0, None));
        assert!(figures.to_string().contains("first token, ms                 -"), "{figures}");
    }
}
