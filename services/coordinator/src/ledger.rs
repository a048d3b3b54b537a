//! Who holds which KV blocks, and which of them hold a known prefix. Pure bookkeeping with reference counts; it decides
//! nothing but which cached block goes first when a block is needed.

use std::collections::{BTreeMap, HashMap};

use paceline_domain::BlockId;

use crate::prefix::PrefixKey;

/// All blocks of a pool.
#[derive(Debug)]
pub struct BlockLedger {
    blocks: Vec<Block>,
    /// Blocks without holder and key.
    free: Vec<BlockId>,
    cached: HashMap<PrefixKey, BlockId>,
    /// Blocks with a key and without holder, by the moment they lost the last one.
    idle: BTreeMap<u64, BlockId>,
    n_moments: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    n_holders: u32,
    key: Option<PrefixKey>,
    /// Its place in `idle`.
    idle_since: u64,
}

/// The part of a prefix that is cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CachedRun {
    /// Blocks from the first on.
    pub n_blocks: usize,
    /// Those of them nobody holds: holding them leaves fewer free ones.
    pub n_idle: usize,
}

impl BlockLedger {
    /// A pool of free blocks.
    pub fn new(n_blocks: u32) -> Self {
        Self {
            blocks: vec![Block::default(); n_blocks as usize],
            free: (0..n_blocks).rev().map(BlockId).collect(),
            cached: HashMap::new(),
            idle: BTreeMap::new(),
            n_moments: 0,
        }
    }

    /// Blocks of the pool.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks nobody holds; those that are cached can be taken, too.
    pub fn n_free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that hold a known prefix.
    pub fn n_cached(&self) -> usize {
        self.cached.len()
    }

    /// `n` blocks with one holder each, or none at all when fewer are free. Where only cached ones are left, those go
    /// first that were held longest ago.
    pub fn take(&mut self, n: usize) -> Option<Vec<BlockId>> {
        if n > self.n_free() {
            return None;
        }
        let taken: Vec<BlockId> = (0..n).map(|_| self.free.pop().unwrap_or_else(|| self.evict())).collect();
        for block in &taken {
            self.blocks[block.idx()].n_holders = 1;
        }
        Some(taken)
    }

    fn evict(&mut self) -> BlockId {
        let (_, block) = self.idle.pop_first().expect("invariant: take() has counted");
        let key = self.blocks[block.idx()].key.take().expect("invariant: idle blocks have a key");
        self.cached.remove(&key);
        block
    }

    /// How much of the prefix with these keys is cached.
    pub fn cached_run(&self, keys: &[PrefixKey]) -> CachedRun {
        let blocks = keys.iter().map_while(|key| self.cached.get(key));
        blocks.fold(CachedRun::default(), |run, block| CachedRun {
            n_blocks: run.n_blocks + 1,
            n_idle: run.n_idle + usize::from(self.blocks[block.idx()].n_holders == 0),
        })
    }

    /// The cached blocks of the prefix with these keys, from the first on; each has one more holder.
    pub fn hold_cached(&mut self, keys: &[PrefixKey]) -> Vec<BlockId> {
        let found: Vec<BlockId> = keys.iter().map_while(|key| self.cached.get(key).copied()).collect();
        for block in &found {
            let block = &mut self.blocks[block.idx()];
            if block.n_holders == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.n_holders += 1;
        }
        found
    }

    /// From now on the block holds the prefix of this key, unless another one does: whoever holds a block may say so
    /// once it is full and computed.
    ///
    /// # Panics
    /// When the block is free or has another key.
    pub fn publish(&mut self, block: BlockId, key: PrefixKey) {
        let entry = &mut self.blocks[block.idx()];
        assert!(entry.n_holders > 0, "invariant: block {block} is held");
        assert!(entry.key.is_none_or(|known| known == key), "invariant: block {block} keeps its content");
        if let std::collections::hash_map::Entry::Vacant(place) = self.cached.entry(key) {
            place.insert(block);
            entry.key = Some(key);
        }
    }

    /// One holder fewer for each of these blocks. Those without a holder can be taken again, the later ones of a
    /// prefix before the earlier ones.
    ///
    /// # Panics
    /// When one of them is free: returning a block twice is a bug.
    pub fn give_back(&mut self, blocks: &[BlockId]) {
        for block in blocks.iter().rev() {
            let entry = &mut self.blocks[block.idx()];
            assert!(entry.n_holders > 0, "invariant: block {block} is held");
            entry.n_holders -= 1;
            if entry.n_holders > 0 {
                continue;
            }
            if entry.key.is_some() {
                self.n_moments += 1;
                entry.idle_since = self.n_moments;
                self.idle.insert(self.n_moments, *block);
            } else {
                self.free.push(*block);
            }
        }
    }

    /// Holders of each block.
    #[cfg(test)]
    pub fn n_holders(&self) -> impl Iterator<Item = u32> {
        self.blocks.iter().map(|block| block.n_holders)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use paceline_domain::{Digest, TokenId, group::BLOCK_POSITIONS};
    use proptest::prelude::*;

    use super::*;
    use crate::prefix::extend_keys;

    /// Keys of a chain of blocks with these contents.
    fn keys(contents: &[u32]) -> Vec<PrefixKey> {
        let tokens: Vec<TokenId> =
            contents.iter().flat_map(|content| [TokenId(*content); BLOCK_POSITIONS]).collect();
        let mut keys = Vec::new();
        extend_keys(&mut keys, PrefixKey::root("", &Digest([0; 32])), &tokens, contents.len());
        keys
    }

    fn publish(ledger: &mut BlockLedger, contents: &[u32]) -> Vec<BlockId> {
        let blocks = ledger.take(contents.len()).expect("enough blocks");
        for (block, key) in blocks.iter().zip(keys(contents)) {
            ledger.publish(*block, key);
        }
        blocks
    }

    #[test]
    fn taking_more_than_there_is_takes_nothing() {
        let mut ledger = BlockLedger::new(3);
        assert_eq!(ledger.take(4), None);
        assert_eq!(ledger.n_free(), 3);
        assert_eq!(ledger.take(3).map(|blocks| blocks.len()), Some(3));
    }

    #[test]
    #[should_panic(expected = "is held")]
    fn a_block_cannot_come_back_twice() {
        let mut ledger = BlockLedger::new(1);
        let blocks = ledger.take(1).unwrap();
        ledger.give_back(&blocks);
        ledger.give_back(&blocks);
    }

    #[test]
    fn cached_blocks_are_found_while_nobody_needs_their_place() {
        let mut ledger = BlockLedger::new(4);
        let first = publish(&mut ledger, &[1, 2, 3]);
        assert_eq!(ledger.cached_run(&keys(&[1, 2, 9])), CachedRun { n_blocks: 2, n_idle: 0 });
        ledger.give_back(&first);
        assert_eq!(ledger.n_free(), 4);
        assert_eq!(ledger.cached_run(&keys(&[1, 2, 3])), CachedRun { n_blocks: 3, n_idle: 3 });
        // One block was never used; the next ones are those of the prefix, its end first.
        let others = ledger.take(2).unwrap();
        assert_eq!(others[1], first[2]);
        let held = ledger.hold_cached(&keys(&[1, 2, 3]));
        assert_eq!(held, first[..2]);
        assert_eq!(ledger.take(1), None, "everything is held");
    }

    #[test]
    fn the_prefix_that_was_used_last_stays_longest() {
        let mut ledger = BlockLedger::new(2);
        let (old, new) = (publish(&mut ledger, &[1]), publish(&mut ledger, &[2]));
        ledger.give_back(&old);
        ledger.give_back(&new);
        let again = ledger.hold_cached(&keys(&[1]));
        ledger.give_back(&again);
        ledger.take(1).unwrap();
        let n_found = |ledger: &BlockLedger, content| ledger.cached_run(&keys(&[content])).n_blocks;
        assert_eq!((n_found(&ledger, 1), n_found(&ledger, 2)), (1, 0));
    }

    #[test]
    fn a_prefix_that_two_have_computed_is_cached_once() {
        let mut ledger = BlockLedger::new(2);
        let (first, second) = (publish(&mut ledger, &[1]), publish(&mut ledger, &[1]));
        assert_eq!(ledger.n_cached(), 1);
        ledger.give_back(&second);
        assert_eq!(ledger.take(1), Some(second), "without a key it is free at once");
        assert_eq!(ledger.hold_cached(&keys(&[1])), first);
    }

    proptest! {
        /// Model: a multiset of holders, and what was last written into each block.
        #[test]
        fn no_block_is_lost_or_held_by_chance(operations in prop::collection::vec((0u8..3, 0usize..9, 0u32..4), 0..200)) {
            let mut ledger = BlockLedger::new(16);
            let mut holdings: Vec<Vec<BlockId>> = Vec::new();
            let mut contents: HashMap<BlockId, PrefixKey> = HashMap::new();
            for (operation, n, content) in operations {
                let chain = keys(&vec![content; n]);
                match operation {
                    0 => {
                        let held = ledger.hold_cached(&chain);
                        prop_assert!(held.iter().zip(&chain).all(|(block, key)| contents.get(block) == Some(key)));
                        holdings.push(held);
                    }
                    1 => if let Some(blocks) = ledger.take(n) {
                        for (block, key) in blocks.iter().zip(&chain) {
                            contents.insert(*block, *key);
                            ledger.publish(*block, *key);
                        }
                        holdings.push(blocks);
                    },
                    _ if !holdings.is_empty() => {
                        let back = holdings.swap_remove(n % holdings.len());
                        ledger.give_back(&back);
                    }
                    _ => {}
                }
                let mut n_holders: HashMap<BlockId, u32> = HashMap::new();
                holdings.iter().flatten().for_each(|block| *n_holders.entry(*block).or_default() += 1);
                prop_assert_eq!(ledger.n_free() + n_holders.len(), 16);
                for (block, n) in ledger.n_holders().enumerate() {
                    prop_assert_eq!(n, n_holders.get(&BlockId(block as u32)).copied().unwrap_or(0));
                }
            }
        }
    }
}
