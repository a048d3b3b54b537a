//! Requests of a group that is lost and does not come back at once go on in other groups, from their tokens: the same text,
//! the same chunks. What no group that is up can hold waits.

use std::time::Instant;

use paceline_domain::{RequestId, SequenceId};

use super::{Active, Engine, Event};
use crate::{
    client::Client, drafter::sequence::Sequence as Proposer, metrics::Broken, reader::Flow,
    scheduler::Departed,
};

/// A request between two loops.
pub struct Moved {
    request: RequestId,
    client: Client,
    deadline: Option<Instant>,
    choices: Vec<MovedChoice>,
}

struct MovedChoice {
    id: SequenceId,
    active: Active,
    sequence: Departed,
    proposer: Option<Proposer>,
}

impl Engine {
    /// Sends requests to groups that can hold them, the oldest first.
    pub(super) fn move_away(&mut self) {
        let age = |(request, client): (&RequestId, &Client)| Some((*client.open().first()?, *request));
        let mut requests: Vec<_> = self.clients.iter().filter_map(age).collect();
        requests.sort_unstable();
        let mut moved = Vec::new();
        for (_, request) in requests {
            let Some(group) = self.clients.get_mut(&request).and_then(Client::reroute) else { continue };
            moved.extend(self.take(request).map(|one| (group, Event::Adopt(Box::new(one)))));
        }
        if !moved.is_empty() {
            tracing::info!(
                group = self.member.group(),
                n_requests = moved.len(),
                "requests go on in other groups"
            );
            self.metrics.moved(moved.len());
            self.member.tell_others(moved);
        }
    }

    fn take(&mut self, request: RequestId) -> Option<Moved> {
        let client = self.clients.remove(&request)?;
        let deadline = self.deadlines.remove(request);
        let take_choice = |id: &SequenceId| {
            let (active, sequence) = (self.choices.remove(id)?, self.scheduler.take(*id)?);
            Some(MovedChoice { id: *id, active, sequence, proposer: self.drafter.take(*id) })
        };
        let choices = client.open().iter().filter_map(take_choice).collect();
        Some(Moved { request, client, deadline, choices })
    }

    /// A request of another group goes on here.
    pub(super) fn adopt(&mut self, moved: Moved) {
        let Moved { request, mut client, deadline, choices } = moved;
        tracing::info!(parent: client.span(), group = self.member.group(), "goes on in another group");
        let mut sequences = Vec::new();
        for MovedChoice { id, active, sequence, proposer } in choices {
            self.choices.insert(id, active);
            sequences.push(sequence);
            if let Some(proposer) = proposer {
                self.drafter.adopt(id, proposer);
            }
        }
        self.scheduler.adopt(sequences);
        client.open().iter().for_each(|id| self.set_pace(*id));
        if let Some(deadline) = deadline {
            self.deadlines.set(request, deadline);
        }
        let flow = client.flush();
        if flow == Flow::Open {
            client.open().iter().for_each(|id| self.scheduler.release(*id));
        }
        self.clients.insert(request, client);
        match flow {
            Flow::Open => {}
            // Whoever waits for the reader tells the loop before.
            Flow::Stalled => self.await_reader(request),
            Flow::Gone => self.break_off(request, Broken::Gone),
        }
    }
}
