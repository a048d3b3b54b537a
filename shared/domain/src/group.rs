//! How a group of shards is described: digests, numerics fingerprint, KV geometry.

use std::fmt;
use std::str::FromStr;

use crate::Quantization;

/// Positions in one KV block.
pub const BLOCK_POSITIONS: usize = 16;
/// Proposals that all sequences together can have verified in one step.
const MAX_PROPOSALS: usize = 64;
/// Version of the messages between coordinator, shards and draft, and of what they mean.
pub const PROTOCOL_VERSION: u32 = 6;

/// Storage type of the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvType {
    /// IEEE half precision.
    #[default]
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit codes with an IEEE half as scale for each [`KV_GROUP`] elements of a head, the last group of a head shorter.
    Q8,
}

/// Elements of a head that share a scale in [`KvType::Q8`].
pub const KV_GROUP: usize = 32;

impl KvType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F16, Self::F32, Self::Q8];

    /// Bytes of the keys or values of one head at one position, scales included.
    pub fn row_bytes(self, n_elements: usize) -> usize {
        match self {
            Self::F16 => 2 * n_elements,
            Self::F32 => 4 * n_elements,
            Self::Q8 => n_elements + 2 * n_elements.div_ceil(KV_GROUP),
        }
    }

    /// The name used on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Q8 => "q8",
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kv_type| kv_type.name() == name);
        found.ok_or_else(|| format!("the KV cache is f16, f32 or q8, not `{name}`"))
    }
}

/// Most rows of a step that are followed by a sampled token: one for each sequence, and proposals to verify.
pub fn max_sampled_rows(max_rows: usize, max_sequences: usize) -> usize {
    max_sequences.saturating_add(MAX_PROPOSALS).min(max_rows)
}

/// A 256-bit digest (BLAKE3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Digest({self})")
    }
}

/// What must be equal for two processes to compute the same bits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fingerprint {
    /// Digest of the checkpoint: header, directory and samples of every tensor.
    pub model: Digest,
    /// What its float matrices became at load.
    pub quantize: Option<Quantization>,
    /// Storage type of the KV cache.
    pub kv_type: KvType,
    /// Version of the canonical summation orders.
    pub numerics: u32,
    /// What the bits depend on beside them; 0 on CPUs, where they depend on nothing else.
    pub device_numerics: u32,
    /// [`PROTOCOL_VERSION`] of the process.
    pub protocol: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_types_have_names_and_sizes() {
        for kv_type in KvType::ALL {
            assert_eq!(kv_type.to_string().parse(), Ok(kv_type));
        }
        assert!("int8".parse::<KvType>().is_err_and(|error| error.contains("`int8`")));
        assert_eq!(KvType::ALL.map(|kv_type| kv_type.row_bytes(80)), [160, 320, 86]);
    }
}
