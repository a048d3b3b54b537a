//! How a group of shards is described: digests, numerics fingerprint, KV geometry.

use std::fmt;

use crate::Quantization;

/// Positions in one KV block.
pub const BLOCK_POSITIONS: usize = 16;
/// Version of the messages between coordinator, shards and draft, and of what they mean.
pub const PROTOCOL_VERSION: u32 = 3;

/// Storage type of the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvType {
    /// IEEE half precision.
    #[default]
    F16,
    /// IEEE single precision.
    F32,
}

impl KvType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name used on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// The type with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F16, Self::F32].into_iter().find(|kv_type| kv_type.name() == name)
    }
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
