//! All-reduce, gather and barrier between the ranks of a group. It moves and adds numbers; what they mean, who is
//! in a group and what happens after a failure is decided elsewhere.
//!
//! Every sum is finished in the order of a [`ReduceTree`](paceline_domain::ReduceTree), so the bits do not depend
//! on the number of ranks or on the transport. Every wait has a deadline and watches an [`AbortFlag`]; after the
//! first error an object answers [`CollectiveError::Poisoned`], because ranks may then disagree about what was
//! done: form a new group with a higher epoch.
//!
//! # Layout
//! * [`collective`] – the trait all transports share, its statistics, the abort flag
//! * [`error`] – what can go wrong, with the rank that was waited for
//! * [`endpoint`] – a rank's address before its group exists
//! * [`group`] – joining a group: choice of transport, `connect`
//! * [`finish`] – the order of additions that finishes a tree, compiled once
//! * [`solo`] – a group of one
//! * `hello` – how two ranks prove the group's secret to each other
//! * [`shared_memory`] – ranks of one host: slots in one region and the protocol that makes access sound
//! * `handover` – how they come to share it
//! * `region` – layout of and raw access to that memory
//! * [`tcp`] – ranks on several hosts: full mesh of streams
//! * `frame` – frames on such a stream
//! * `wait` – deadline, abort flag and spinning, for all transports

pub mod collective;
pub mod endpoint;
pub mod error;
pub mod finish;
mod frame;
pub mod group;
mod handover;
mod hello;
mod region;
pub mod shared_memory;
pub mod solo;
pub mod tcp;
mod wait;

pub use collective::{AbortFlag, Collective, CollectiveStats};
pub use endpoint::{BindSpec, Endpoint, PeerAddress};
pub use error::CollectiveError;
pub use group::{GroupSpec, Transport, connect};
pub use shared_memory::SharedMemory;
pub use solo::Solo;
pub use tcp::Tcp;
