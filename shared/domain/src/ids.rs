//! Newtypes for identifiers. They do not check ranges: whoever owns the range does.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}

id! {
    /// Index of a token in the vocabulary.
    TokenId(u32)
}
id! {
    /// One sequence of tokens inside a group, unique for the life of an epoch.
    SequenceId(u64)
}
id! {
    /// One KV block of [`crate::group::BLOCK_POSITIONS`] positions in a shard's pool.
    BlockId(u32)
}
id! {
    /// Place of a shard in its group, from 0.
    Rank(u32)
}
id! {
    /// Life number of a group. Whatever carries a lower one is refused.
    Epoch(u64)
}
id! {
    /// Number of a step in its epoch: 1, 2, 3, without gaps.
    StepNumber(u64)
}

impl TokenId {
    /// The id as an index.
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

impl BlockId {
    /// The id as an index.
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

impl Rank {
    /// The rank as an index.
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

/// Name of a request, made by the coordinator: 128 random bits, written as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "RequestId({self})")
    }
}
