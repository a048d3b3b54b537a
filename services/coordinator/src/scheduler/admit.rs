//! A place for waiting sequences, and their first blocks, as far as possible those of a cached prefix. Prompts get
//! their blocks with their place; what they generate takes more as it grows.

use paceline_domain::{BlockId, SequenceId};

use super::{Scheduler, blocks_for};

/// The first blocks of a sequence; some hold a cached prefix.
struct FirstBlocks {
    blocks: Vec<BlockId>,
    n_cached: usize,
}

impl Scheduler {
    /// Gives waiting sequences their place, in order, while there are places and blocks.
    pub(super) fn admit(&mut self) {
        while self.running.len() < self.limits.max_sequences && !self.waiting.is_empty() {
            self.waiting.pass_over(self.crowding());
            let Some(id) = self.waiting.front() else { break };
            let Some(FirstBlocks { blocks, n_cached }) = self.first_blocks(id) else { break };
            self.waiting.pop();
            let next_age = self.next_age;
            let sequence = self.sequence(id);
            sequence.start(blocks, n_cached);
            // What it reads again after it lost its place is not its tenant's fault.
            let n_read = if sequence.age.is_none() { sequence.tokens.len() - sequence.n_computed } else { 0 };
            let age = *sequence.age.get_or_insert(next_age);
            let tenant = sequence.tenant.clone();
            self.waiting.charge(&tenant, n_read, 0);
            self.waiting.placed(tenant);
            self.next_age = next_age.max(age + 1);
            let place = self.running.partition_point(|other| self.sequences[other].age < Some(age));
            self.running.insert(place, id);
        }
    }

    fn first_blocks(&mut self, id: SequenceId) -> Option<FirstBlocks> {
        if !self.leaves_room_for_the_oldest(id) {
            return None;
        }
        let n_running = self.running.len();
        let Self { sequences, ledger, .. } = self;
        let sequence = sequences.get_mut(&id).expect("invariant: waiting sequences exist");
        // A step in flight may still sample a token from its last place.
        if sequence.n_unknown > 0 {
            return None;
        }
        // One block of growth is left to everybody who has a place, or they would soon take this one's.
        let (n_wanted, n_spare) = if sequence.is_protected() {
            (sequence.n_most_blocks(), 0)
        } else {
            (blocks_for(sequence.tokens.len() + 1), n_running)
        };
        let keys = sequence.cacheable_keys();
        let run = ledger.cached_run(keys);
        let n_new = n_wanted - run.n_blocks;
        if ledger.n_free() < run.n_idle + n_new + n_spare {
            return None;
        }
        let mut blocks = ledger.hold_cached(keys);
        blocks.extend(ledger.take(n_new).expect("invariant: there are enough"));
        Some(FirstBlocks { blocks, n_cached: run.n_blocks })
    }

    /// Whether the pool has room for all that protected sequences can ever need and, beside them, for the largest of
    /// the others: then the oldest of those gets every block it needs, from younger ones if it must.
    fn leaves_room_for_the_oldest(&self, id: SequenceId) -> bool {
        let (mut n_protected, mut n_largest) = (0, 0);
        for sequence in self.running.iter().chain([&id]).map(|id| &self.sequences[id]) {
            let n_blocks = sequence.n_most_blocks();
            if sequence.is_protected() {
                n_protected += n_blocks;
            } else {
                n_largest = n_blocks.max(n_largest);
            }
        }
        n_protected + n_largest <= self.ledger.n_blocks()
    }

    /// Whether an older sequence is about to compute the next block of this one's prefix. Then it is quicker to wait.
    pub(super) fn awaits_prefix(&mut self, id: SequenceId) -> bool {
        let keys = self.sequences.get_mut(&id).expect("invariant: it runs").cacheable_keys();
        let block_idx = self.ledger.cached_run(keys).n_blocks;
        let Some(missing) = keys.get(block_idx).copied() else { return false };
        let older = self.running.iter().take_while(|other| **other != id);
        older.map(|other| &self.sequences[other]).any(|other| {
            !other.is_held && other.n_published <= block_idx && other.keys.get(block_idx) == Some(&missing)
        })
    }

    /// Gives a sequence that the shards do not know yet what was cached since it has its place.
    pub(super) fn use_cached(&mut self, id: SequenceId) {
        let Self { sequences, ledger, .. } = self;
        let sequence = sequences.get_mut(&id).expect("invariant: it runs");
        let keys = sequence.cacheable_keys();
        if ledger.cached_run(keys).n_blocks > sequence.n_cached_blocks {
            let keys = sequence.cacheable_keys();
            let mut blocks = ledger.hold_cached(keys);
            let n_cached = blocks.len();
            ledger.give_back(&sequence.blocks[..n_cached]);
            blocks.extend_from_slice(&sequence.blocks[n_cached..]);
            sequence.start(blocks, n_cached);
        }
    }
}
