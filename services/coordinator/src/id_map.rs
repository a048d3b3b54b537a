//! Maps by ids that this process has chosen itself, hashed in a nanosecond. Not for keys that others choose: those need a
//! hash with a secret seed.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// The golden ratio, as a fraction of 2^64; odd.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A map by [`SequenceId`](paceline_domain::SequenceId) or [`RequestId`](paceline_domain::RequestId).
pub type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Hashes numbers by one long multiplication each.
#[derive(Clone, Copy, Default, Debug)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value) * u128::from(MULTIPLIER);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write_u128(&mut self, value: u128) {
        self.write_u64(value as u64);
        self.write_u64((value >> 64) as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        hash::{BuildHasher, Hash},
    };

    use paceline_domain::{RequestId, SequenceId};

    use super::*;

    /// Of hashes a map looks at seven upper bits and some lower ones.
    fn n_different(ids: impl Iterator<Item = impl Hash>) -> usize {
        let hasher = BuildHasherDefault::<IdHasher>::default();
        let seen = |id| {
            let hash = hasher.hash_one(id);
            (hash >> 57, hash & 1023)
        };
        ids.map(seen).collect::<HashSet<_>>().len()
    }

    #[test]
    fn ids_that_follow_each_other_are_spread() {
        for group in 0..4u64 {
            let ids = (1..=1000).map(|n| SequenceId((group << 48) + n));
            assert!(n_different(ids) > 980);
        }
        assert!(n_different((0..1000).map(|n| RequestId(n << 64))) > 980);
        assert!(n_different((0..1000).map(RequestId)) > 980);
    }
}
