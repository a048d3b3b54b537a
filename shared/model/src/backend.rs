//! What the forward pass asks of a device. Buffers, packed weights and KV memory belong to the backend; the order of the
//! operations belongs to the decoder. No operation is carried out here.

use paceline_collectives::Collective;
use paceline_domain::{BlockId, ErrorKind};

use crate::batch::Batch;
use crate::estimate::DeviceRoom;
use crate::link::{Group, Route};
use crate::logits::LogitRows;
use crate::{LoadSpec, ModelError};

/// One of the two halves of a layer. Each ends with an all-reduce.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Half {
    /// Attention.
    Attention,
    /// The gated feed-forward network.
    Ffn,
}

/// What is left to do after [`Backend::begin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// Everything: the layers are to be run one by one.
    Run,
    /// The layers have been run already, by a recording of an earlier pass of this shape.
    Done,
}

/// One rank's device, with its slice of the weights, its KV memory and the buffers of a pass.
///
/// A pass is `begin`; for each layer `normalize(Attention)`, `project`, `attend`, `output`, `reduce(Attention)`,
/// `normalize(Ffn)`, `gate_up`, `down`, `reduce(Ffn)`; `finish`; `logits`. `project` to `output` are left out where the
/// rank has no head, `gate_up` and `down` where it has no column of the feed-forward network, `logits` where it has no
/// token or no row is asked for. An operation may return before the device has done it; then its error comes with a
/// later one, at the latest with the logits.
///
/// Each returns what the device reports, as [`ModelError::Device`], or an error of the collective. After an error the
/// next `begin` starts afresh; what the KV memory holds of the failed batch is written again.
#[allow(clippy::missing_errors_doc)]
pub trait Backend: LogitRows {
    /// What computes, for logs and the handshake: `avx512vnni`, or a GPU's name.
    fn name(&self) -> String;

    /// What the bits depend on beside the model and the canonical orders: 0 where nothing else does, as on CPUs; otherwise
    /// a number that differs where another device or other kernels may round otherwise.
    fn device_numerics(&self) -> u32;

    /// Bytes of packed weights and of the KV memory.
    fn memory_bytes(&self) -> (usize, usize);

    /// Enters a group before its first pass; all ranks do at the same time. A backend without links of its own says so.
    fn join(&mut self, group: &mut Group<'_>) -> Result<Route, ModelError> {
        if group.collective.n_ranks() == 1 {
            return Ok(Route::Alone);
        }
        let own = Err(format!("{} has no links", self.name()));
        let answer = group.agree(own, &mut || Err("no links".into()))?;
        Ok(Route::ThroughHost(answer.err().unwrap_or_default()))
    }

    /// Whether [`Backend::copy_block`] works.
    fn copies_blocks(&self) -> bool {
        false
    }

    /// Makes one block of the KV memory a copy of another, in every layer, before the next pass.
    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), ModelError> {
        let problem = format!("{} does not copy blocks ({from} to {to})", self.name());
        Err(ModelError::Device { kind: ErrorKind::Bug, problem })
    }

    /// Takes over a checked batch: positions, block tables, output rows; the embeddings of its tokens become the residual
    /// stream. Nothing is left of the batch before.
    fn begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError>;

    /// Adds to the residual stream what the last `reduce` left (nothing before the first layer's attention), and
    /// normalizes it into the input of the matrices that follow.
    fn normalize(&mut self, layer: usize, half: Half) -> Result<(), ModelError>;

    /// Queries, keys and values with their biases; queries and keys rotated, keys and values written to the KV memory.
    fn project(&mut self, layer: usize) -> Result<(), ModelError>;

    /// Attention of each row over the positions of its sequence up to its own, or the last of them where the layer has a
    /// window.
    fn attend(&mut self, layer: usize) -> Result<(), ModelError>;

    /// The output projection of attention: one partial sum for each subtree of the plan's tree that the rank owns.
    fn output(&mut self, layer: usize) -> Result<(), ModelError>;

    /// SiLU of the gate, times up.
    fn gate_up(&mut self, layer: usize) -> Result<(), ModelError>;

    /// The down projection: one partial sum for each subtree of the plan's tree that the rank owns.
    fn down(&mut self, layer: usize) -> Result<(), ModelError>;

    /// Finishes the sums over all ranks, in the order of the half's tree, into what will be added next. A rank with an
    /// empty share takes part with no partial sum. A backend that has links of its own may leave `collective` alone.
    fn reduce(&mut self, half: Half, collective: &mut dyn Collective) -> Result<(), ModelError>;

    /// The last addition to the residual stream; the end of what [`Pass::Done`] repeats.
    fn finish(&mut self) -> Result<(), ModelError>;

    /// Final norm and head of the batch's output rows; the result is asked for through [`LogitRows`].
    fn logits(&mut self) -> Result<(), ModelError>;
}

/// Makes backends: a device that was chosen once, for any number of groups.
pub trait Device: Send + Sync {
    /// What computes, for logs.
    fn name(&self) -> String;

    /// Whether the host's cores compute.
    fn is_cpu(&self) -> bool {
        false
    }

    /// What there is of the device's own memory, and what a rank would take of it; the capacity's number of KV blocks does
    /// not matter. `None` where memory is the host's.
    ///
    /// # Errors
    /// As [`Device::load`], but for memory.
    fn room(&self, _spec: &LoadSpec<'_>) -> Result<Option<DeviceRoom>, ModelError> {
        Ok(None)
    }

    /// Loads a rank's slices and allocates everything a pass needs.
    ///
    /// # Errors
    /// A tensor that is missing, left over, misshapen or cannot be packed; a rank outside the plan; a capacity of
    /// nothing, or more than the device has room for.
    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError>;
}
