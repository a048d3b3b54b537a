//! Sequences that wait for a place. It decides who is next and nothing else.

use std::collections::VecDeque;

use paceline_domain::SequenceId;

/// First come, first served; who had a place already goes before all others.
#[derive(Debug, Default)]
pub(super) struct Waiting(VecDeque<SequenceId>);

impl Waiting {
    /// At the end.
    pub(super) fn push(&mut self, id: SequenceId) {
        self.0.push_back(id);
    }

    /// Before all others, because it had a place and lost it.
    pub(super) fn push_front(&mut self, id: SequenceId) {
        self.0.push_front(id);
    }

    /// Who is next.
    pub(super) fn front(&self) -> Option<SequenceId> {
        self.0.front().copied()
    }

    /// Takes out who is next.
    pub(super) fn pop(&mut self) -> Option<SequenceId> {
        self.0.pop_front()
    }

    /// Takes out one that waits no longer; it need not be there.
    pub(super) fn remove(&mut self, id: SequenceId) {
        self.0.retain(|waiting| *waiting != id);
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = SequenceId> {
        self.0.iter().copied()
    }
}
