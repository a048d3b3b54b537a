//! Who holds which KV blocks. Pure bookkeeping with reference counts; it decides nothing.

use paceline_domain::BlockId;

/// All blocks of a pool.
#[derive(Debug)]
pub struct BlockLedger {
    free: Vec<BlockId>,
    n_holders: Vec<u32>,
}

impl BlockLedger {
    /// A pool of free blocks.
    pub fn new(n_blocks: u32) -> Self {
        Self { free: (0..n_blocks).rev().map(BlockId).collect(), n_holders: vec![0; n_blocks as usize] }
    }

    /// Blocks of the pool.
    pub fn n_blocks(&self) -> usize {
        self.n_holders.len()
    }

    /// Blocks nobody holds.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// `n` blocks with one holder each, or none at all when fewer are free.
    pub fn take(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let rest = self.free.len().checked_sub(n)?;
        let taken: Vec<BlockId> = self.free.drain(rest..).rev().collect();
        for block in &taken {
            self.n_holders[block.idx()] = 1;
        }
        Some(taken)
    }

    /// One more holder for each of these blocks.
    ///
    /// # Panics
    /// When one of them is free: sharing what nobody holds is a bug.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            assert!(self.n_holders[block.idx()] > 0, "invariant: block {block} is held");
            self.n_holders[block.idx()] += 1;
        }
    }

    /// One holder fewer for each of these blocks; those without a holder become free.
    ///
    /// # Panics
    /// When one of them is free: returning a block twice is a bug.
    pub fn give_back(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            let n_holders = &mut self.n_holders[block.idx()];
            assert!(*n_holders > 0, "invariant: block {block} is held");
            *n_holders -= 1;
            if *n_holders == 0 {
                self.free.push(*block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        /// Model: a multiset of holders.
        #[test]
        fn no_block_is_lost_or_held_by_chance(operations in prop::collection::vec((0u8..3, 0usize..9), 0..200)) {
            let mut ledger = BlockLedger::new(16);
            let mut holdings: Vec<Vec<BlockId>> = Vec::new();
            for (operation, n) in operations {
                match operation {
                    0 => holdings.extend(ledger.take(n)),
                    1 if !holdings.is_empty() => {
                        let copy = holdings[n % holdings.len()].clone();
                        ledger.share(&copy);
                        holdings.push(copy);
                    }
                    _ if !holdings.is_empty() => {
                        let back = holdings.swap_remove(n % holdings.len());
                        ledger.give_back(&back);
                    }
                    _ => {}
                }
                let mut n_holders: HashMap<BlockId, u32> = HashMap::new();
                holdings.iter().flatten().for_each(|block| *n_holders.entry(*block).or_default() += 1);
                prop_assert_eq!(ledger.n_free() + n_holders.len(), 16);
                for (block, n) in n_holders {
                    prop_assert_eq!(ledger.n_holders[block.idx()], n);
                }
            }
        }
    }
}
