//! What clients hear of a step: new tokens, and log probabilities of their prompts. It plans nothing.
//!
//! They hear of it after the next plan was sent: a device that waits costs everybody time.

use std::time::Instant;

use paceline_domain::RequestId;
use paceline_wire::inference::generate_response::Event as Chunk;
use tokio::sync::mpsc;

use super::{Active, Engine, Event};
use crate::{
    metrics::Broken,
    reader::Flow,
    scheduler::{Commit, Scores},
};

/// Steps that clients may hear of together.
const MOST_STEPS_TOGETHER: usize = 2;

/// What a choice says.
pub(super) struct Said {
    pub(super) request: RequestId,
    pub(super) choice: u32,
    pub(super) event: Chunk,
    /// Nothing follows; no choice of the request is open any more.
    pub(super) is_last: bool,
}

impl Engine {
    /// Tokens of a step that follow the end of their request find no request any more.
    pub(super) fn commit(&mut self, commit: Commit, now: Instant) {
        let Some(active) = self.choices.get_mut(&commit.sequence) else { return };
        let Active { request, choice, output, constraint } = active;
        if let Some(constraint) = constraint {
            constraint.commit(commit.sampled.token);
        }
        match output.clock.last_token {
            None => self.metrics.first_token(now.saturating_duration_since(output.clock.arrived)),
            Some(last) => self.metrics.next_token(now.saturating_duration_since(last)),
        }
        let pushed = output.push(&commit.sampled, now);
        let (request, choice, event) = (*request, *choice, Chunk::Delta(pushed.delta));
        self.said.push(Said { request, choice, event, is_last: false });
        if let Some(reason) = pushed.finish {
            self.finish(commit.sequence, &reason, now);
        }
    }

    /// Log probabilities of a request that has ended find nobody any more.
    pub(super) fn tell_scores(&mut self, scores: &Scores) {
        let Some(Active { request, choice, output, .. }) = self.choices.get(&scores.sequence) else { return };
        let event = Chunk::PromptLogprobs(output.prompt_logprobs(scores.start_pos, &scores.tokens));
        self.said.push(Said { request: *request, choice: *choice, event, is_last: false });
    }

    /// Lets plans go out before clients hear of the step before them. Where the next step is done before they have heard
    /// of it, they hear of both at once: to tell them takes longer than a step then, and so it takes half.
    pub(super) async fn deliver_after_plans(&mut self, inbox: &mpsc::Receiver<Event>) {
        if self.said.is_empty() {
            return;
        }
        tokio::task::yield_now().await;
        if inbox.is_empty() || self.n_steps_said >= MOST_STEPS_TOGETHER {
            self.deliver();
        }
    }

    /// Clients hear what there is to say; who is gone does not.
    pub(super) fn deliver(&mut self) {
        let mut all = std::mem::take(&mut self.said);
        for Said { request, choice, event, is_last } in all.drain(..) {
            if is_last {
                if let Some(client) = self.remove(request) {
                    client.end(choice, event, self.reader_limit);
                }
            } else if let Some(client) = self.clients.get_mut(&request) {
                match client.push(choice, event) {
                    Flow::Open => {}
                    Flow::Stalled => self.await_reader(request),
                    Flow::Gone => self.break_off(request, Broken::Gone),
                }
            }
        }
        self.said = all;
        self.n_steps_said = 0;
    }
}
