//! How requests end, and pause: done, abandoned, too late, or read too slowly. Steps are not its matter.

use std::time::Instant;

use paceline_domain::{FinishReason, RequestId, SequenceId};
use paceline_grammar::GrammarError;
use paceline_wire::{inference::generate_response::Event as Chunk, status::status};
use tonic::Status;

use super::{Active, Engine, Event, Said};
use crate::{
    client::Client,
    metrics::Broken,
    output::proposal_counts,
    reader::{Flow, Progress},
};

impl Engine {
    /// A choice has all it wanted; with the last one its request is done.
    pub(super) fn finish(&mut self, id: SequenceId, reason: &FinishReason, now: Instant) {
        let proposals = self.drafter.finish(id).map(proposal_counts).unwrap_or_default();
        let Some(Active { request, choice, mut output, .. }) = self.remove_choice(id) else { return };
        self.tell_finished(reason, &output, now);
        let Some(client) = self.clients.get_mut(&request) else { return };
        let event = Chunk::Finished(output.finished(reason, proposals, now));
        let usage = output.usage();
        let is_last = client.closes(id, usage.n_completion);
        if is_last {
            client.span().record("gen_ai.usage.input_tokens", i64::from(usage.n_prompt));
            client.span().record("gen_ai.usage.output_tokens", client.n_completion() as i64);
            self.deadlines.remove(request);
        }
        self.said.push(Said { request, choice, event, is_last });
    }

    /// Nobody hears of a request any more.
    pub(super) fn break_off(&mut self, request: RequestId, why: Broken) {
        if let Some(client) = self.remove(request) {
            self.metrics.broken(why, client.open().len());
        }
    }

    /// A request is over, wherever its choices were.
    pub(super) fn remove(&mut self, request: RequestId) -> Option<Client> {
        let client = self.clients.remove(&request)?;
        self.deadlines.remove(request);
        for id in client.open() {
            self.remove_choice(*id);
        }
        Some(client)
    }

    fn remove_choice(&mut self, id: SequenceId) -> Option<Active> {
        self.scheduler.finish(id);
        self.drafter.finish(id);
        self.choices.remove(&id)
    }

    /// Ends requests whose client is gone.
    pub(super) fn drop_abandoned(&mut self) {
        let gone = self.clients.iter().filter(|(_, client)| client.is_gone());
        for request in gone.map(|(request, _)| *request).collect::<Vec<_>>() {
            tracing::debug!(%request, "client gone");
            self.break_off(request, Broken::Gone);
        }
    }

    /// Ends requests that nobody waits for any more, after what they have generated.
    pub(super) fn end_expired(&mut self, now: Instant) {
        let expired = self.deadlines.expired(now);
        if !expired.is_empty() {
            self.deliver();
        }
        for request in expired {
            let Some(client) = self.clients.get_mut(&request) else { continue };
            let mut n_tokens = client.n_completion();
            for id in client.open().to_vec() {
                let Some(Active { choice, output, .. }) = self.choices.get_mut(&id) else { continue };
                if let Some(rest) = output.rest() {
                    client.push(*choice, Chunk::Delta(rest));
                }
                n_tokens += u64::from(output.usage().n_completion);
            }
            let message =
                format!("the client's deadline passed; {n_tokens} tokens were generated until then");
            if let Some(client) = self.remove(request) {
                self.metrics.broken(Broken::Late, client.open().len());
                client.fail(Status::deadline_exceeded(message), self.reader_limit);
            }
        }
    }

    /// Ends a request whose grammar allows nothing more, or too much work.
    pub(super) fn grammar_stuck(&mut self, id: SequenceId, error: &GrammarError) {
        let Some(request) = self.choices.get(&id).map(|choice| choice.request) else { return };
        if let Some(client) = self.remove(request) {
            self.metrics.broken(Broken::Grammar, client.open().len());
            client.fail(status(error.kind(), error.to_string()), self.reader_limit);
        }
    }

    /// Ends everything, because the process does.
    pub(super) fn cancel_all(&mut self, now: Instant) {
        for id in self.choices.keys().copied().collect::<Vec<_>>() {
            self.finish(id, &FinishReason::Cancelled, now);
        }
    }

    /// Nothing more is generated until the reader has read something.
    pub(super) fn await_reader(&mut self, request: RequestId) {
        let Some(client) = self.clients.get(&request) else { return };
        client.open().iter().for_each(|id| self.scheduler.hold(*id));
        let (progress, events) = (client.progress(self.reader_limit), self.events.clone());
        tokio::spawn(async move {
            let progress = progress.await;
            let _ = events.send(Event::Reader(request, progress)).await;
        });
    }

    pub(super) fn reader_event(&mut self, request: RequestId, progress: Progress) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        match (progress, client.flush()) {
            (_, Flow::Open) => client.open().iter().for_each(|id| self.scheduler.release(*id)),
            (Progress::Moves, Flow::Stalled) => self.await_reader(request),
            (Progress::Stuck, Flow::Stalled) => {
                tracing::info!(%request, "a client that reads nothing is given up");
                if let Some(client) = self.remove(request) {
                    self.metrics.broken(Broken::Stuck, client.open().len());
                    client.give_up(self.reader_limit);
                }
            }
            (_, Flow::Gone) => self.break_off(request, Broken::Gone),
        }
    }
}
