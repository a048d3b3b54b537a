//! What can go wrong with a device.

use paceline_domain::ErrorKind;
use std::time::Duration;

/// An error of this crate.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum CudaError {
    /// There is no device, driver or library; the text says what was looked for, and where.
    #[error("no GPU can be used: {0}")]
    Unavailable(String),
    /// The device has not enough memory.
    #[error("the GPU has {free} bytes of memory free, {wanted} are needed")]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        free: u64,
    },
    /// The device reported an error.
    #[error("GPU: {call}: {problem}")]
    Device {
        /// What was asked of it.
        call: &'static str,
        /// Its answer.
        problem: String,
    },
    /// NCCL is not there or too old; the text says where it was looked for.
    #[error("NCCL cannot be used: {0}")]
    Nccl(String),
    /// Another rank did not do its part in time.
    #[error("GPU: {call} was not done within {deadline:?}")]
    Late {
        /// What was waited for.
        call: &'static str,
        /// How long.
        deadline: Duration,
    },
    /// Waiting was ended from outside.
    #[error("GPU: {call} was aborted")]
    Aborted {
        /// What was waited for.
        call: &'static str,
    },
    /// The model has a shape no kernel exists for.
    #[error("the GPU kernels cannot run this model: {0}")]
    Unfit(String),
}

impl CudaError {
    /// What whoever caused or met the error can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable(_) | Self::Memory { .. } | Self::Nccl(_) | Self::Unfit(_) => ErrorKind::Unfit,
            Self::Device { .. } | Self::Late { .. } | Self::Aborted { .. } => ErrorKind::Unavailable,
        }
    }
}
