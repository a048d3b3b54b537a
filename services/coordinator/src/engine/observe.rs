//! What the loop tells of its work: metrics, spans of steps, log lines about preemption. It changes nothing.

use std::time::Instant;

use paceline_domain::{FinishReason, RequestId, SequenceId, StepPlan};
use paceline_telemetry::context;
use tracing::{Span, info_span};

use super::{Active, Engine};
use crate::{
    client::Client,
    drafter,
    id_map::IdMap,
    metrics::{Levels, Totals},
    output::{Clock, Output},
};

impl Engine {
    /// After each turn of the loop.
    pub(super) fn tell_levels(&self) {
        let (n_running, n_waiting) = self.scheduler.n_sequences();
        let (n_blocks, n_free_blocks) = (self.scheduler.n_blocks(), self.scheduler.n_free_blocks());
        let n_used_blocks = n_blocks - n_free_blocks;
        self.metrics.levels(&Levels { n_waiting, n_running, n_used_blocks, n_free_blocks });
        self.metrics.drafter(&self.drafter.stats());
    }

    /// After each step.
    pub(super) fn tell_totals(&self) {
        let counters = self.scheduler.counters();
        self.metrics.totals(&Totals {
            n_opened_tokens: counters.n_opened_tokens,
            n_cached_tokens: counters.n_cached_tokens,
            n_preemptions: counters.n_preemptions,
        });
    }

    /// A choice has ended.
    pub(super) fn tell_finished(&self, reason: &FinishReason, output: &Output, now: Instant) {
        let Clock { arrived, first_token, last_token, .. } = output.clock;
        let n_later = output.usage().n_completion.saturating_sub(1);
        let generating =
            first_token.zip(last_token).map(|(first, last)| last.saturating_duration_since(first));
        let per_token = generating.filter(|_| n_later > 0).map(|generating| generating / n_later);
        self.metrics.finished(reason, now.saturating_duration_since(arrived), per_token);
    }

    /// The step's span: child of its first request's, linked to the others'. Numbers are signed because OTLP has no
    /// unsigned ones.
    pub(super) fn step_span(&self, plan: &StepPlan) -> Span {
        let sequences = plan.chunks.iter().map(|chunk| chunk.sequence);
        let mut clients = clients_of(&self.choices, &self.clients, sequences).into_iter();
        let Some(first) = clients.next() else { return Span::none() };
        let span = info_span!(
            parent: first.span(),
            "step",
            group = self.member.group() as i64,
            epoch = plan.epoch.0 as i64,
            step = plan.step.0 as i64,
            n_rows = plan.n_rows() as i64,
            n_sequences = plan.chunks.len() as i64,
        );
        clients.for_each(|client| context::link(&span, client.span()));
        span
    }

    pub(super) fn note_preemptions(&mut self) {
        let n_preemptions = self.scheduler.counters().n_preemptions;
        if n_preemptions > self.n_preemptions {
            tracing::info!(n_preemptions, "a sequence gave up its blocks to an older one");
            self.n_preemptions = n_preemptions;
        }
    }
}

/// A wait for proposals: child of its first request's span, linked to the others'.
pub(super) fn draft_span(
    choices: &IdMap<SequenceId, Active>,
    clients: &IdMap<RequestId, Client>,
    open: &[drafter::Open],
) -> Span {
    let mut asking = clients_of(choices, clients, open.iter().map(|(id, _)| *id)).into_iter();
    let Some(first) = asking.next() else { return Span::none() };
    let span = info_span!(parent: first.span(), "draft", n_sequences = open.len() as i64);
    asking.for_each(|client| context::link(&span, client.span()));
    span
}

/// The clients of these sequences whose traces somebody will see, each once.
fn clients_of<'a>(
    choices: &IdMap<SequenceId, Active>,
    clients: &'a IdMap<RequestId, Client>,
    sequences: impl Iterator<Item = SequenceId>,
) -> Vec<&'a Client> {
    if !clients.values().any(Client::is_traced) {
        return Vec::new();
    }
    let mut requests: Vec<RequestId> = Vec::new();
    for choice in sequences.filter_map(|sequence| choices.get(&sequence)) {
        if !requests.contains(&choice.request) {
            requests.push(choice.request);
        }
    }
    let clients = requests.iter().filter_map(|request| clients.get(request));
    clients.filter(|client| client.is_traced()).collect()
}
