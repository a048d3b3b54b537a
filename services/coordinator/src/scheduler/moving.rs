//! Sequences leave a group and go on in another one: from their tokens, as after a failure. Who moves is not decided here.

use paceline_domain::SequenceId;

use super::{Scheduler, sequence::Sequence};

/// A sequence between two groups.
#[derive(Debug)]
pub struct Departed {
    id: SequenceId,
    sequence: Box<Sequence>,
}

impl Scheduler {
    /// Gives a sequence away; what steps in flight bring for it is dropped. All sequences of one prompt must go.
    pub fn take(&mut self, id: SequenceId) -> Option<Departed> {
        let mut sequence = self.sequences.remove(&id)?;
        if sequence.close() {
            self.closes.push(id);
        }
        self.ledger.give_back(&sequence.blocks);
        sequence.forget_epoch();
        self.waiting.remove(id);
        self.running.retain(|running| *running != id);
        Some(Departed { id, sequence: Box::new(sequence) })
    }

    /// Takes in all sequences of a prompt that go on. Those that had a place get the next ones; the others queue.
    ///
    /// # Panics
    /// When one could never fit, or has the id of another one: both was checked before.
    pub fn adopt(&mut self, departed: Vec<Departed>) {
        let beside: Vec<SequenceId> =
            departed.iter().flat_map(|one| one.sequence.siblings.iter().copied()).collect();
        for Departed { id, mut sequence } in departed {
            assert!(
                sequence.n_most_blocks() <= self.ledger.n_blocks(),
                "invariant: it was sent where it fits"
            );
            if sequence.age.is_some() {
                sequence.age = Some(self.next_age);
                self.next_age += 1;
                self.waiting.push_next(id);
            } else if !beside.contains(&id) {
                self.waiting.push(id, &sequence.tenant, sequence.priority);
            }
            let before = self.sequences.insert(id, *sequence);
            assert!(before.is_none(), "invariant: ids of groups differ");
        }
    }
}
