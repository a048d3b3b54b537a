//! What can go wrong between a checkpoint and its logits. Errors carry the numbers; they are logged elsewhere.

use paceline_checkpoint::CheckpointError;
use paceline_collectives::CollectiveError;
use paceline_domain::ErrorKind;
use paceline_kernels::KernelError;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A configuration value is missing, of the wrong type or out of range.
    #[error("model configuration: {key}: {problem}")]
    Config {
        /// The key in the metadata or config.json.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// The model is well formed but of a kind that cannot be run.
    #[error("this model cannot be run: {0}")]
    Unfit(String),
    /// A tensor is missing, left over or of the wrong shape.
    #[error("tensor {name}: {problem}")]
    Tensor {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A split over this many ranks does not exist.
    #[error("a model is split over 1 to {max} ranks, not {n_ranks}")]
    Ranks {
        /// Ranks asked for.
        n_ranks: usize,
        /// Most ranks.
        max: usize,
    },
    /// The decoder cannot be set up as asked.
    #[error("loading the model: {0}")]
    Load(String),
    /// A batch breaks a rule of the decoder.
    #[error("batch: {0}")]
    Batch(String),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A kernel refused its input.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device that computes failed.
    #[error("device: {problem}")]
    Device {
        /// What can be done about it.
        kind: ErrorKind,
        /// What it reported.
        problem: String,
    },
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl ModelError {
    /// What whoever caused or met the error can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } | Self::Tensor { .. } | Self::Ranks { .. } | Self::Batch(_) => {
                ErrorKind::Invalid
            }
            Self::Unfit(_) | Self::Load(_) => ErrorKind::Unfit,
            Self::Checkpoint(error) => error.kind(),
            Self::Kernel(error) => error.kind(),
            Self::Device { kind, .. } => *kind,
            Self::Collective(error) => error.kind(),
        }
    }

    pub(crate) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }

    /// A tensor with something wrong with it.
    pub fn tensor(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), problem: problem.into() }
    }
}
