//! How requests end, and pause: done, abandoned, too late, or read too slowly. Steps are not its matter.

use std::time::Instant;

use paceline_domain::{FinishReason, SequenceId};
use tonic::Status;

use super::{Active, Engine, Event};
use crate::{
    output::proposal_counts,
    reader::{Flow, Progress},
};

impl Engine {
    /// A request has all it wanted.
    pub(super) fn finish(&mut self, id: SequenceId, reason: &FinishReason, now: Instant) {
        let proposals = self.drafter.finish(id).map(proposal_counts).unwrap_or_default();
        let Some(mut request) = self.remove(id) else { return };
        let usage = request.output.usage();
        request.span.record("gen_ai.usage.input_tokens", i64::from(usage.n_prompt));
        request.span.record("gen_ai.usage.output_tokens", i64::from(usage.n_completion));
        let chunk = request.output.finished(reason, proposals, now);
        request.reader.end(Ok(chunk), self.reader_limit);
    }

    /// A request is over, wherever it was.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Active> {
        self.scheduler.finish(id);
        self.drafter.finish(id);
        self.deadlines.remove(id);
        self.requests.remove(&id)
    }

    /// Ends requests whose client is gone.
    pub(super) fn drop_abandoned(&mut self) {
        let gone = self.requests.iter().filter(|(_, request)| request.reader.is_gone());
        for id in gone.map(|(id, _)| *id).collect::<Vec<_>>() {
            tracing::debug!(sequence = %id, "client gone");
            self.remove(id);
        }
    }

    /// Ends requests that nobody waits for any more, after what they have generated.
    pub(super) fn end_expired(&mut self, now: Instant) {
        for id in self.deadlines.expired(now) {
            let Some(Active { mut output, mut reader, .. }) = self.remove(id) else { continue };
            if let Some(chunk) = output.rest() {
                reader.push(chunk);
            }
            let n_tokens = output.usage().n_completion;
            let message =
                format!("the client's deadline passed; {n_tokens} tokens were generated until then");
            reader.end(Err(Status::deadline_exceeded(message)), self.reader_limit);
        }
    }

    /// Nothing more is generated until the reader has read something.
    pub(super) fn await_reader(&mut self, id: SequenceId) {
        let Some(request) = self.requests.get(&id) else { return };
        self.scheduler.hold(id);
        let (progress, events) = (request.reader.progress(self.reader_limit), self.events.clone());
        tokio::spawn(async move {
            let progress = progress.await;
            let _ = events.send(Event::Reader(id, progress)).await;
        });
    }

    pub(super) fn reader_event(&mut self, id: SequenceId, progress: Progress) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        match (progress, request.reader.flush()) {
            (_, Flow::Open) => self.scheduler.release(id),
            (Progress::Moves, Flow::Stalled) => self.await_reader(id),
            (Progress::Stuck, Flow::Stalled) => {
                tracing::info!(sequence = %id, "a client that reads nothing is given up");
                if let Some(request) = self.remove(id) {
                    request.reader.give_up(self.reader_limit);
                }
            }
            (_, Flow::Gone) => drop(self.remove(id)),
        }
    }
}
