//! The numbers of a coordinator, for Prometheus. Names and buckets are those of OpenTelemetry's GenAI conventions where
//! these have one (`gen_ai_server_*`); all others begin with `paceline_`. No prompt, output, tenant or request is in them.

mod speculation;

use std::time::Duration;

use paceline_domain::FinishReason;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    core::Collector,
};
use tonic::Code;

use self::speculation::Speculation;
use crate::drafter::DrafterStats;

/// What a response with [`Metrics::text`] says it is.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

const FIRST_TOKEN_SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const PER_TOKEN_SECONDS: [f64; 13] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const REQUEST_SECONDS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const STEP_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096];
/// Gaps between tokens are as short as steps, and as long as pauses.
const BETWEEN_TOKENS_SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];

/// Why a request ended without all it wanted, beside its own reasons.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// Its client went away.
    Gone,
    /// Its deadline passed.
    Late,
    /// Its client read nothing for too long.
    Stuck,
    /// Its grammar allowed nothing more, or too much work.
    Grammar,
}

impl Broken {
    fn name(self) -> &'static str {
        match self {
            Self::Gone => "client_gone",
            Self::Late => "deadline",
            Self::Stuck => "reader_stuck",
            Self::Grammar => "grammar",
        }
    }
}

/// What there is at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Levels {
    /// Sequences without a place.
    pub n_waiting: usize,
    /// Sequences with a place.
    pub n_running: usize,
    /// Blocks of the KV pool that sequences hold.
    pub n_used_blocks: usize,
    /// Blocks that nobody holds, cached ones included.
    pub n_free_blocks: usize,
}

/// What was counted since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Tokens of sequences that got a place.
    pub n_opened_tokens: u64,
    /// Those of them found in the prefix cache.
    pub n_cached_tokens: u64,
    /// Places lost to older sequences.
    pub n_preemptions: u64,
}

/// All numbers, each of which may be told at any time from any thread.
pub struct Metrics {
    registry: Registry,
    rejected: IntCounterVec,
}

/// The numbers of one group, with its number as their label `group`.
pub struct GroupMetrics {
    waiting: IntGauge,
    running: IntGauge,
    used_blocks: IntGauge,
    free_blocks: IntGauge,
    opened_tokens: IntCounter,
    cached_tokens: IntCounter,
    hit_ratio: prometheus::Gauge,
    preemptions: IntCounter,
    groups: IntCounter,
    moved: IntCounter,
    input_tokens: IntCounter,
    output_tokens: IntCounter,
    requests: IntCounterVec,
    step_rows: IntCounter,
    speculation: Speculation,
    times: Times,
}

/// How long things take, in seconds.
struct Times {
    first_token: Histogram,
    between_tokens: Histogram,
    per_token: Histogram,
    request: Histogram,
    step: Histogram,
}

/// Makes numbers of a group and remembers them for the text.
struct Maker {
    registry: Registry,
    group: String,
}

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_label("group", self.group.clone())
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::with_opts(self.opts(name, help))?)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::with_opts(self.opts(name, help))?)
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(self.opts(name, help), &[label])?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(opts)?)
    }
}

impl Times {
    fn new(new: &Maker) -> Result<Self, prometheus::Error> {
        Ok(Self {
            first_token: new.histogram(
                "gen_ai_server_time_to_first_token_seconds",
                "From arrival to the first token of a choice",
                &FIRST_TOKEN_SECONDS,
            )?,
            between_tokens: new.histogram(
                "paceline_inter_token_latency_seconds",
                "From one token of a choice to the next; 0 for tokens of one step",
                &BETWEEN_TOKENS_SECONDS,
            )?,
            per_token: new.histogram(
                "gen_ai_server_time_per_output_token_seconds",
                "Mean time of the tokens of a choice after the first",
                &PER_TOKEN_SECONDS,
            )?,
            request: new.histogram(
                "gen_ai_server_request_duration_seconds",
                "From arrival to the end of a choice",
                &REQUEST_SECONDS,
            )?,
            step: new.histogram(
                "paceline_step_seconds",
                "From sending a plan to the answers of all ranks",
                &STEP_SECONDS,
            )?,
        })
    }
}

impl Metrics {
    /// All zero, and no group.
    ///
    /// # Errors
    /// When a name is malformed or there twice.
    pub fn new() -> Result<Self, prometheus::Error> {
        let opts = Opts::new("paceline_rejected_total", "Requests not accepted, by reason");
        let (registry, rejected) = (Registry::new(), IntCounterVec::new(opts, &["reason"])?);
        registry.register(Box::new(rejected.clone()))?;
        Ok(Self { registry, rejected })
    }

    /// The numbers of one more group, all zero.
    ///
    /// # Errors
    /// When a name is malformed, or the group is there already.
    pub fn group(&self, group: usize) -> Result<GroupMetrics, prometheus::Error> {
        GroupMetrics::new(&Maker { registry: self.registry.clone(), group: group.to_string() })
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// A request was refused with this code.
    pub fn rejected(&self, code: Code) {
        let reason = match code {
            Code::InvalidArgument => "invalid",
            Code::NotFound => "unknown_model",
            Code::FailedPrecondition => "never_fits",
            Code::ResourceExhausted => "busy",
            Code::Unavailable => "no_group",
            _ => "other",
        };
        self.rejected.with_label_values(&[reason]).inc();
    }
}

impl GroupMetrics {
    fn new(new: &Maker) -> Result<Self, prometheus::Error> {
        Ok(Self {
            waiting: new.gauge("paceline_queue_length", "Sequences that wait for a place")?,
            running: new.gauge("paceline_running_sequences", "Sequences that have a place")?,
            used_blocks: new.gauge("paceline_kv_blocks_used", "KV blocks that sequences hold")?,
            free_blocks: new
                .gauge("paceline_kv_blocks_free", "KV blocks that nobody holds, cached ones included")?,
            opened_tokens: new.counter(
                "paceline_prefix_cache_queried_tokens_total",
                "Tokens of sequences when they got a place",
            )?,
            cached_tokens: new.counter(
                "paceline_prefix_cache_hit_tokens_total",
                "Those of them whose keys and values were there already",
            )?,
            hit_ratio: new.add(prometheus::Gauge::with_opts(
                new.opts("paceline_prefix_cache_hit_ratio", "Hit tokens by queried tokens since the start"),
            )?)?,
            preemptions: new
                .counter("paceline_preemptions_total", "Places that were lost to older sequences")?,
            groups: new.counter("paceline_groups_formed_total", "Shard groups formed, the first included")?,
            moved: new.counter("paceline_requests_moved_total", "Requests that went on in another group")?,
            input_tokens: new.counter("paceline_input_tokens_total", "Prompt tokens of accepted requests")?,
            output_tokens: new.counter("paceline_output_tokens_total", "Tokens generated")?,
            requests: new.counters(
                "paceline_choices_total",
                "Choices (completions) that ended, by reason",
                "reason",
            )?,
            step_rows: new.counter("paceline_step_rows_total", "Token rows of all steps")?,
            speculation: Speculation::new(new)?,
            times: Times::new(new)?,
        })
    }

    /// How things are now.
    pub fn levels(&self, levels: &Levels) {
        self.waiting.set(levels.n_waiting as i64);
        self.running.set(levels.n_running as i64);
        self.used_blocks.set(levels.n_used_blocks as i64);
        self.free_blocks.set(levels.n_free_blocks as i64);
    }

    /// What was counted elsewhere.
    pub fn totals(&self, totals: &Totals) {
        raise(&self.opened_tokens, totals.n_opened_tokens);
        raise(&self.cached_tokens, totals.n_cached_tokens);
        raise(&self.preemptions, totals.n_preemptions);
        if totals.n_opened_tokens > 0 {
            self.hit_ratio.set(totals.n_cached_tokens as f64 / totals.n_opened_tokens as f64);
        }
    }

    /// What speculation came to, and how the draft service is now.
    pub fn drafter(&self, stats: &DrafterStats) {
        self.speculation.tell(stats);
    }

    /// A request was accepted.
    pub fn accepted(&self, n_prompt_tokens: usize) {
        self.input_tokens.inc_by(n_prompt_tokens as u64);
    }

    /// A shard group was formed.
    pub fn group_formed(&self) {
        self.groups.inc();
    }

    /// So many requests go on in another group.
    pub fn moved(&self, n_requests: usize) {
        self.moved.inc_by(n_requests as u64);
    }

    /// A step of so many rows is done.
    pub fn step(&self, n_rows: usize, elapsed: Duration) {
        self.times.step.observe(elapsed.as_secs_f64());
        self.step_rows.inc_by(n_rows as u64);
    }

    /// The first token of a choice, so long after its request arrived.
    pub fn first_token(&self, since_arrival: Duration) {
        self.output_tokens.inc();
        self.times.first_token.observe(since_arrival.as_secs_f64());
    }

    /// A later token.
    pub fn next_token(&self, since_last: Duration) {
        self.output_tokens.inc();
        self.times.between_tokens.observe(since_last.as_secs_f64());
    }

    /// A choice has ended, so long after its request arrived; `per_token` is the mean time of its tokens after the first.
    pub fn finished(&self, reason: &FinishReason, since_arrival: Duration, per_token: Option<Duration>) {
        let reason = match reason {
            FinishReason::StopToken(_) | FinishReason::StopString(_) => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "shutdown",
        };
        self.requests.with_label_values(&[reason]).inc();
        self.times.request.observe(since_arrival.as_secs_f64());
        if let Some(per_token) = per_token {
            self.times.per_token.observe(per_token.as_secs_f64());
        }
    }

    /// Choices of a request were broken off.
    pub fn broken(&self, why: Broken, n_choices: usize) {
        self.requests.with_label_values(&[why.name()]).inc_by(n_choices as u64);
    }
}

/// Counters only rise; the value is one that was counted elsewhere.
fn raise(counter: &IntCounter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use paceline_speculation::Source;

    use super::*;

    #[test]
    fn what_is_told_is_in_the_text() {
        let all = Metrics::new().expect("names are right and differ");
        let metrics = all.group(0).expect("names are right and differ");
        let other = all.group(1).expect("the label differs");
        assert!(all.group(1).is_err(), "a group is there once");
        metrics.levels(&Levels { n_waiting: 1, n_running: 2, n_used_blocks: 3, n_free_blocks: 4 });
        let totals = Totals { n_opened_tokens: 8, n_cached_tokens: 2, ..Totals::default() };
        metrics.totals(&totals);
        metrics.totals(&totals);
        let mut stats = DrafterStats { n_breaker_opened: 2, is_in_use: true, ..DrafterStats::default() };
        (stats.waited_ms, stats.forecast.expected_tokens) = (250.0, 9.5);
        (stats.n_proposed, stats.computed_ms) = (12, 500.0);
        let ngram = &mut stats.sources[Source::Ngram.idx()];
        (ngram.accepted_tokens, ngram.accepted_per_position[1]) = (5, 3);
        metrics.drafter(&stats);
        metrics.drafter(&stats);
        all.rejected(Code::ResourceExhausted);
        metrics.first_token(Duration::from_millis(30));
        metrics.next_token(Duration::from_millis(3));
        metrics.finished(&FinishReason::Length, Duration::from_secs(1), None);
        metrics.broken(Broken::Late, 2);
        other.group_formed();
        let text = all.text().expect("a text");
        for line in [
            "paceline_queue_length{group=\"0\"} 1",
            "paceline_kv_blocks_free{group=\"0\"} 4",
            "paceline_prefix_cache_hit_tokens_total{group=\"0\"} 2",
            "paceline_prefix_cache_hit_ratio{group=\"0\"} 0.25",
            "paceline_speculation_accepted_tokens_total{group=\"0\",source=\"ngram\"} 5",
            "paceline_speculation_accepted_tokens_per_pos_total{group=\"0\",position=\"1\",source=\"ngram\"} 3",
            "paceline_speculation_expected_tokens_total{group=\"0\"} 9.5",
            "paceline_draft_wait_seconds_total{group=\"0\"} 0.25",
            "paceline_draft_proposed_tokens_total{group=\"0\"} 12",
            "paceline_draft_compute_seconds_total{group=\"0\"} 0.5",
            "paceline_draft_breaker_opened_total{group=\"0\"} 2",
            "paceline_draft_in_use{group=\"0\"} 1",
            "paceline_rejected_total{reason=\"busy\"} 1",
            "gen_ai_server_time_to_first_token_seconds_bucket{group=\"0\",le=\"0.02\"} 0",
            "gen_ai_server_time_to_first_token_seconds_bucket{group=\"0\",le=\"0.04\"} 1",
            "paceline_output_tokens_total{group=\"0\"} 2",
            "paceline_choices_total{group=\"0\",reason=\"deadline\"} 2",
            "paceline_groups_formed_total{group=\"0\"} 0",
            "paceline_groups_formed_total{group=\"1\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in\n{text}");
        }
    }
}
