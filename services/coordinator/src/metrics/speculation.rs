//! The numbers of speculation: what became of proposals by source and position, what the controller predicted and what
//! came, and how the draft service is. Names of the first are shaped like those of other engines.

use paceline_speculation::{Source, SourceCounters, proposal::MAX_POSITIONS};
use prometheus::{Counter, Gauge, IntCounter, IntCounterVec, IntGauge};

use super::{Maker, raise};
use crate::drafter::DrafterStats;

const ACCEPTED_PER_POSITION: (&str, &str) = (
    "paceline_speculation_accepted_tokens_per_pos_total",
    "Accepted tokens by position in their proposal, from 0; positions from 15 on are one",
);
const DRAFTED_PER_POSITION: (&str, &str) =
    ("paceline_speculation_draft_tokens_per_pos_total", "Tokens of verified proposals by position");

/// See the module.
pub(super) struct Speculation {
    sources: [Proposals; Source::ALL.len()],
    forecast: Forecast,
    service: Service,
}

/// What became of the proposals of one source.
struct Proposals {
    drafts: IntCounter,
    draft_tokens: IntCounter,
    accepted_tokens: IntCounter,
    draft_tokens_per_pos: Vec<IntCounter>,
    accepted_tokens_per_pos: Vec<IntCounter>,
    branches: IntCounter,
    accepted_branches: IntCounter,
}

/// What was predicted of steps and what came.
struct Forecast {
    steps: IntCounter,
    speculative_steps: IntCounter,
    expected_tokens: Counter,
    tokens: Counter,
    predicted_seconds: Counter,
    seconds: Counter,
    plain_seconds: Counter,
}

/// The draft service, seen from here.
struct Service {
    is_in_use: IntGauge,
    connections: IntCounter,
    breaker_opened: IntCounter,
    waits: IntCounter,
    late: IntCounter,
    wait_seconds: Counter,
    proposed_tokens: IntCounter,
    compute_seconds: Counter,
    latency_seconds: Gauge,
}

impl Speculation {
    pub(super) fn new(new: &Maker) -> Result<Self, prometheus::Error> {
        let by_source = |name: &str, help: &str| new.counters(name, help, "source");
        let drafts = by_source("paceline_speculation_drafts_total", "Proposals that were verified")?;
        let draft_tokens =
            by_source("paceline_speculation_draft_tokens_total", "Tokens of verified proposals")?;
        let accepted_tokens = by_source(
            "paceline_speculation_accepted_tokens_total",
            "Tokens of proposals that were accepted, without the free one after them",
        )?;
        let branches = by_source(
            "paceline_speculation_branches_total",
            "Second guesses that were verified beside tokens of proposals",
        )?;
        let accepted_branches =
            by_source("paceline_speculation_accepted_branches_total", "Second guesses that were right")?;
        let by_position = |(name, help): (&str, &str)| {
            new.add(IntCounterVec::new(new.opts(name, help), &["source", "position"])?)
        };
        let (drafted, accepted) = (by_position(DRAFTED_PER_POSITION)?, by_position(ACCEPTED_PER_POSITION)?);
        let sources = Source::ALL.map(|source| {
            let of = |counters: &IntCounterVec| counters.with_label_values(&[source.name()]);
            let positions = |counters: &IntCounterVec| {
                let of = |position: usize| {
                    counters.with_label_values(&[source.name(), position.to_string().as_str()])
                };
                (0..MAX_POSITIONS).map(of).collect()
            };
            Proposals {
                drafts: of(&drafts),
                draft_tokens: of(&draft_tokens),
                accepted_tokens: of(&accepted_tokens),
                draft_tokens_per_pos: positions(&drafted),
                accepted_tokens_per_pos: positions(&accepted),
                branches: of(&branches),
                accepted_branches: of(&accepted_branches),
            }
        });
        Ok(Self { sources, forecast: Forecast::new(new)?, service: Service::new(new)? })
    }

    /// What was counted elsewhere, and how things are now.
    pub(super) fn tell(&self, stats: &DrafterStats) {
        self.sources.iter().zip(&stats.sources).for_each(|(source, counters)| source.tell(counters));
        self.forecast.tell(stats);
        self.service.tell(stats);
    }
}

impl Proposals {
    fn tell(&self, counters: &SourceCounters) {
        raise(&self.drafts, counters.drafts);
        raise(&self.draft_tokens, counters.draft_tokens);
        raise(&self.accepted_tokens, counters.accepted_tokens);
        raise(&self.branches, counters.branches);
        raise(&self.accepted_branches, counters.accepted_branches);
        let all = |positions: &[IntCounter], to: &[u64]| {
            positions.iter().zip(to).for_each(|(counter, to)| raise(counter, *to));
        };
        all(&self.draft_tokens_per_pos, &counters.drafted_per_position);
        all(&self.accepted_tokens_per_pos, &counters.accepted_per_position);
    }
}

impl Forecast {
    fn new(new: &Maker) -> Result<Self, prometheus::Error> {
        let sum = |name: &str, help: &str| new.add(Counter::with_opts(new.opts(name, help))?);
        Ok(Self {
            steps: new.counter("paceline_speculation_steps_total", "Steps that were predicted")?,
            speculative_steps: new
                .counter("paceline_speculation_speculative_steps_total", "Steps with proposals")?,
            expected_tokens: sum(
                "paceline_speculation_expected_tokens_total",
                "Tokens that the controller expected of steps",
            )?,
            tokens: sum("paceline_speculation_step_tokens_total", "Tokens that came of them")?,
            predicted_seconds: sum(
                "paceline_speculation_predicted_seconds_total",
                "Time that steps were predicted to take",
            )?,
            seconds: sum("paceline_speculation_step_seconds_total", "Time that they took, waits included")?,
            plain_seconds: sum(
                "paceline_speculation_plain_seconds_total",
                "Time that plain decoding was predicted to take for the same tokens",
            )?,
        })
    }

    fn tell(&self, stats: &DrafterStats) {
        let forecast = &stats.forecast;
        raise(&self.steps, forecast.n_steps);
        raise(&self.speculative_steps, forecast.n_speculative);
        raise_sum(&self.expected_tokens, forecast.expected_tokens);
        raise_sum(&self.tokens, forecast.tokens);
        raise_sum(&self.predicted_seconds, forecast.predicted_ms / 1e3);
        raise_sum(&self.seconds, forecast.ms / 1e3);
        raise_sum(&self.plain_seconds, forecast.plain_ms / 1e3);
    }
}

impl Service {
    fn new(new: &Maker) -> Result<Self, prometheus::Error> {
        Ok(Self {
            is_in_use: new.gauge(
                "paceline_draft_in_use",
                "1 when a draft service is connected and its breaker is closed, else 0",
            )?,
            connections: new.counter("paceline_draft_connections_total", "Connections to draft services")?,
            breaker_opened: new.counter(
                "paceline_draft_breaker_opened_total",
                "How often the draft service was left out for a while",
            )?,
            waits: new.counter("paceline_draft_waits_total", "Steps that waited for the draft service")?,
            late: new.counter("paceline_draft_late_total", "Those that waited in vain")?,
            wait_seconds: new.add(Counter::with_opts(
                new.opts("paceline_draft_wait_seconds_total", "Time that steps waited"),
            )?)?,
            proposed_tokens: new.counter(
                "paceline_draft_proposed_tokens_total",
                "Tokens that the draft service proposed, verified or not",
            )?,
            compute_seconds: new.add(Counter::with_opts(new.opts(
                "paceline_draft_compute_seconds_total",
                "Time that the draft service computed for what it proposed, as it says",
            ))?)?,
            latency_seconds: new.add(Gauge::with_opts(new.opts(
                "paceline_draft_latency_seconds",
                "From a question to the first token drafted after it, lately",
            ))?)?,
        })
    }

    fn tell(&self, stats: &DrafterStats) {
        self.is_in_use.set(i64::from(stats.is_in_use));
        raise(&self.connections, stats.n_connected);
        raise(&self.breaker_opened, stats.n_breaker_opened);
        raise(&self.waits, stats.n_waits);
        raise(&self.late, stats.n_late);
        raise_sum(&self.wait_seconds, stats.waited_ms / 1e3);
        raise(&self.proposed_tokens, stats.n_proposed);
        raise_sum(&self.compute_seconds, stats.computed_ms / 1e3);
        self.latency_seconds.set(stats.latency_ms / 1e3);
    }
}

/// Counters only rise; what comes of rounding, or is no number, is left out.
fn raise_sum(counter: &Counter, to: f64) {
    let more = to - counter.get();
    if more > 0.0 {
        counter.inc_by(more);
    }
}
