//! The wire: generated protobuf types, their conversions to and from the domain, and the one place where error
//! kinds become gRPC codes. No logic beyond that.
//!
//! # Layout
//! * [`inference`], [`shard`], [`draft`] – generated from `proto/`
//! * [`step`] – step plans and results
//! * [`masks`] – what constrained rows may choose
//! * [`draft_frames`] – frames between coordinator and draft service
//! * [`status`] – errors to gRPC status with details
#![forbid(unsafe_code)]

pub mod draft_frames;
pub mod masks;
pub mod status;
pub mod step;

/// The generated code, nested as its packages are, because they refer to each other by path.
#[allow(missing_docs, clippy::all)]
mod paceline {
    pub mod v1 {
        tonic::include_proto!("paceline.v1");
    }
    pub mod shard {
        pub mod v1 {
            tonic::include_proto!("paceline.shard.v1");
        }
    }
    pub mod draft {
        pub mod v1 {
            tonic::include_proto!("paceline.draft.v1");
        }
    }
}

/// What coordinators and the draft service speak: `paceline.draft.v1`.
pub use paceline::draft::v1 as draft;
/// What coordinator and shards speak: `paceline.shard.v1`.
pub use paceline::shard::v1 as shard;
/// What clients speak: `paceline.v1`.
pub use paceline::v1 as inference;

/// The compiled descriptors of all three, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest message between coordinator and shards in bytes: a plan with a full context of prompt tokens.
pub const MAX_INTERNAL_MESSAGE_BYTES: usize = 16 << 20;

/// A message that breaks the protocol: a field that must be set is not, or has an impossible value.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
#[error("protocol error: {0}")]
pub struct ProtocolError(pub String);
