//! What can go wrong between ranks, with the rank that was waited for or talked to. It does not decide what then.

use paceline_domain::{Epoch, ErrorKind};
use std::io;
use std::time::Duration;

/// Why a group could not be formed or an operation did not finish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// A peer did not do its part in time.
    #[error("rank {rank} did not answer within {} ms during {during}", deadline.as_millis())]
    Timeout {
        /// Who is late.
        rank: usize,
        /// How long it had.
        deadline: Duration,
        /// What was going on.
        during: &'static str,
    },
    /// The abort flag was set while waiting.
    #[error("aborted while waiting for rank {rank} during {during}")]
    Aborted {
        /// Who was waited for.
        rank: usize,
        /// What was going on.
        during: &'static str,
    },
    /// A peer's process ended, or the peer left the group after an error of its own.
    #[error("rank {rank} left the group during {during}")]
    PeerLeft {
        /// Who left.
        rank: usize,
        /// What was going on.
        during: &'static str,
    },
    /// An earlier operation failed; the group cannot be used any more.
    #[error("the group cannot be used after an earlier failure: form a new one")]
    Poisoned,
    /// A peer belongs to another life of the group.
    #[error("rank {rank} is in epoch {theirs}, this rank is in epoch {ours}")]
    Epoch {
        /// Who.
        rank: usize,
        /// Its epoch.
        theirs: Epoch,
        /// The epoch of this rank.
        ours: Epoch,
    },
    /// A peer does not know the group's secret.
    #[error("rank {rank} did not prove that it knows the group's secret")]
    Secret {
        /// Who it said it was.
        rank: usize,
    },
    /// A peer does something else than this rank.
    #[error("rank {rank} disagrees: {what}")]
    Mismatch {
        /// Who.
        rank: usize,
        /// The difference, with numbers.
        what: String,
    },
    /// A message was changed on its way.
    #[error("a frame of {n_bytes} bytes from rank {rank} does not match its checksum")]
    Corrupt {
        /// Who sent it.
        rank: usize,
        /// Its payload.
        n_bytes: usize,
    },
    /// Not the text of an address.
    #[error("{text:?} is not a peer address: {reason}")]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A description of a group that cannot be.
    #[error("the group cannot be formed: {0}")]
    Group(String),
    /// The operating system refused something.
    #[error("{during}: {source}")]
    Io {
        /// What was attempted.
        during: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl CollectiveError {
    /// What whoever met it can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Timeout { .. } | Self::Aborted { .. } | Self::PeerLeft { .. } | Self::Poisoned => {
                ErrorKind::Unavailable
            }
            Self::Io { .. } | Self::Corrupt { .. } => ErrorKind::Unavailable,
            Self::Epoch { .. } | Self::Secret { .. } => ErrorKind::Unfit,
            Self::Address { .. } | Self::Group(_) => ErrorKind::Invalid,
            Self::Mismatch { .. } => ErrorKind::Bug,
        }
    }

    /// The peer it is about, if there is one.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Timeout { rank, .. }
            | Self::Aborted { rank, .. }
            | Self::PeerLeft { rank, .. }
            | Self::Epoch { rank, .. }
            | Self::Secret { rank }
            | Self::Mismatch { rank, .. }
            | Self::Corrupt { rank, .. } => Some(*rank),
            Self::Poisoned | Self::Address { .. } | Self::Group(_) | Self::Io { .. } => None,
        }
    }

    pub(crate) fn io(during: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { during, source }
    }

    pub(crate) fn os(during: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Io { during, source: errno.into() }
    }
}
