//! Names of token prefixes. Equal keys mean equal tokens from the first one on, for the same tenant and model; no key
//! tells its tokens. It knows nothing of blocks in memory.

use paceline_domain::{Digest, TokenId, group::BLOCK_POSITIONS};

/// Keeps these keys apart from all other uses of the hash.
const CONTEXT: &str = "paceline 2026-11 prefix cache";

/// The name of a prefix of whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PrefixKey([u8; blake3::KEY_LEN]);

impl PrefixKey {
    /// The empty prefix of a tenant. Tenants never share blocks, so none learns what another has sent.
    pub fn root(tenant: &str, model: &Digest) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&model.0).update(tenant.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The prefix that is one block longer. The hash is keyed with the parent, so no block can be moved to another
    /// place or tenant.
    ///
    /// # Panics
    /// When `tokens` is not one block.
    pub fn child(&self, tokens: &[TokenId]) -> Self {
        assert_eq!(tokens.len(), BLOCK_POSITIONS, "invariant: keys name whole blocks");
        let mut bytes = [0; 4 * BLOCK_POSITIONS];
        for (bytes, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.0.to_le_bytes());
        }
        Self(*blake3::keyed_hash(&self.0, &bytes).as_bytes())
    }
}

/// Makes `keys`, those of the first blocks of `tokens`, those of its first `n_blocks`.
pub fn extend_keys(keys: &mut Vec<PrefixKey>, root: PrefixKey, tokens: &[TokenId], n_blocks: usize) {
    while keys.len() < n_blocks {
        let parent = keys.last().unwrap_or(&root);
        let child = parent.child(&tokens[keys.len() * BLOCK_POSITIONS..][..BLOCK_POSITIONS]);
        keys.push(child);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_key_is_its_tenant_model_and_all_tokens_so_far() {
        let block = |token: u32| vec![TokenId(token); BLOCK_POSITIONS];
        let mut seen = HashSet::new();
        for tenant in ["", "a", "b"] {
            for model in [Digest([1; 32]), Digest([2; 32])] {
                let root = PrefixKey::root(tenant, &model);
                for (first, second) in [(1, 1), (1, 2), (2, 1)] {
                    let mut keys = Vec::new();
                    extend_keys(&mut keys, root, &[block(first), block(second)].concat(), 2);
                    assert_eq!(keys[0], root.child(&block(first)));
                    seen.insert(keys[1]);
                }
                seen.insert(root);
            }
        }
        assert_eq!(seen.len(), 3 * 2 * 4);
    }
}
