//! What clients hear of a step: new tokens, and log probabilities of their prompts. It plans nothing.

use std::time::Instant;

use paceline_domain::RequestId;
use paceline_wire::inference::generate_response::Event as Chunk;

use super::{Active, Engine};
use crate::{
    metrics::Broken,
    reader::Flow,
    scheduler::{Commit, Scores},
};

impl Engine {
    /// Tokens of a step that follow the end of their request find no request any more.
    pub(super) fn commit(&mut self, commit: Commit, now: Instant) {
        let Some(active) = self.choices.get_mut(&commit.sequence) else { return };
        let Active { request, choice, output, constraint } = active;
        if let Some(constraint) = constraint {
            constraint.commit(commit.sampled.token);
        }
        let Some(client) = self.clients.get_mut(request) else { return };
        let request = *request;
        match output.clock.last_token {
            None => self.metrics.first_token(now.saturating_duration_since(output.clock.arrived)),
            Some(last) => self.metrics.next_token(now.saturating_duration_since(last)),
        }
        let pushed = output.push(&commit.sampled, now);
        let flow = client.push(*choice, Chunk::Delta(pushed.delta));
        self.after_push(request, flow);
        if let Some(reason) = pushed.finish {
            self.finish(commit.sequence, &reason, now);
        }
    }

    /// Log probabilities of a request that has ended find nobody any more.
    pub(super) fn tell_scores(&mut self, scores: &Scores) {
        let Some(Active { request, choice, output, .. }) = self.choices.get(&scores.sequence) else { return };
        let Some(client) = self.clients.get_mut(request) else { return };
        let request = *request;
        let part = output.prompt_logprobs(scores.start_pos, &scores.tokens);
        let flow = client.push(*choice, Chunk::PromptLogprobs(part));
        self.after_push(request, flow);
    }

    fn after_push(&mut self, request: RequestId, flow: Flow) {
        match flow {
            Flow::Open => {}
            Flow::Stalled => self.await_reader(request),
            Flow::Gone => self.break_off(request, Broken::Gone),
        }
    }
}
