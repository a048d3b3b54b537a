//! The nouns of Paceline: plain data and pure rules. No IO, no async, no clocks, no protobuf.
//!
//! # Layout
//! * [`ids`] – newtypes for every identifier and count that crosses a boundary
//! * [`error`] – the four kinds an error can have
//! * [`sampling`] – sampling parameters and what a sampled token carries
//! * [`request`] – a validated generation request and how it ends
//! * [`step`] – what the coordinator asks of a group in one step, and what comes back
//! * [`draft`] – what coordinator and draft service tell each other
//! * [`group`] – how a group of shards is described: model digest, fingerprint, KV geometry
//! * [`weight_type`] – storage types of weights and their block sizes
//! * [`quantization`] – what float weights may become at load
//! * [`reduce_tree`] – the canonical summation tree over K that keeps bits equal for any number of ranks
#![forbid(unsafe_code)]

pub mod draft;
pub mod error;
pub mod group;
pub mod ids;
pub mod mask;
pub mod quantization;
pub mod reduce_tree;
pub mod request;
pub mod sampling;
pub mod step;
pub mod weight_type;

pub use draft::{
    DraftAnswer, DraftClose, DraftCommit, DraftControl, DraftNack, DraftOpen, DraftProposal, SecondGuess,
};
pub use error::ErrorKind;
pub use group::{Digest, Fingerprint, KvType};
pub use ids::{BlockId, Epoch, Rank, RequestId, SequenceId, StepNumber, TokenId};
pub use mask::TokenMask;
pub use quantization::{DraftQuantization, Quantization};
pub use reduce_tree::ReduceTree;
pub use request::{
    FinishReason, GenerateRequest, Grammar, Prompt, Speculation, SpeculationOptions, StopRules, Usage,
};
pub use sampling::{SampledToken, SamplingParams, ScoredToken, TokenLogprob};
pub use step::{
    BlockCopy, Branch, HeldBack, Scoring, SequenceChunk, SequenceMasks, SequenceOpen, SequenceSamples,
    SequenceScores, StepMasks, StepPlan, StepResult, StepTimings, UNKNOWN_TOKEN,
};
pub use weight_type::WeightType;
