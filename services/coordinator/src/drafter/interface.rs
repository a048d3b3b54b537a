//! What the drafter is told at first, and what it tells of its work.

use std::time::Duration;

use clap::ValueEnum;
use paceline_speculation::{Drafting, Source, SourceCounters, controller::Forecast};
use tonic::transport::Uri;

use super::link::Target;

/// Where the draft service computes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// On a machine or device of its own: it drafts ahead while the target computes
    Apart,
    /// On the target's: both at once are slower than one after the other, so they take turns
    Together,
}

/// How to propose.
#[derive(Clone, Debug)]
pub struct DrafterConfig {
    /// Where the draft service is, if there is one.
    pub service: Option<Uri>,
    /// What it must fit.
    pub target: Target,
    /// Most tokens it may draft ahead.
    pub max_ahead: u32,
    /// The longest that a step waits for a proposal.
    pub max_wait: Duration,
    /// Where it computes.
    pub placement: Placement,
}

/// A step that was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StepEnd {
    /// Tokens it gave.
    pub n_tokens: usize,
    /// Time since the step before was done, or since it was sent when there was none before.
    pub elapsed: Duration,
    /// Time that the group computed.
    pub compute: Duration,
    /// Whether it was sent before the step before was done.
    pub ran_ahead: bool,
    /// What the draft service did meanwhile.
    pub drafting: Drafting,
}

/// Plain counters, for metrics: all grow only, but for the two that say so.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct DrafterStats {
    /// What became of proposals, by source.
    pub sources: [SourceCounters; Source::ALL.len()],
    /// What was predicted of steps and what came.
    pub forecast: Forecast,
    /// Steps that waited for the draft service, and those that waited in vain.
    pub n_waits: u64,
    /// See `n_waits`.
    pub n_late: u64,
    /// Milliseconds that steps waited.
    pub waited_ms: f64,
    /// Tokens that the draft service proposed, used or not, and milliseconds that it computed for them.
    pub n_proposed: u64,
    /// See `n_proposed`.
    pub computed_ms: f64,
    /// How often the draft service was left out.
    pub n_breaker_opened: u64,
    /// How often a draft service was connected.
    pub n_connected: u64,
    /// Whether one is connected and in use now; goes up and down.
    pub is_in_use: bool,
    /// Milliseconds from a question to the first token drafted after it, lately; goes up and down.
    pub latency_ms: f64,
}
