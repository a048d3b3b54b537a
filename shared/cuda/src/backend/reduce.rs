//! Sums over ranks. Alone a rank has its sum already; several bring their partial sums together from device to device, or
//! through the host where that is not possible. Both add in the order of the plan's tree, so their bits are the same.

use paceline_collectives::{Collective, CollectiveError};
use paceline_model::ModelError;
use paceline_model::backend::Half;
use paceline_model::link::{Group, LinkId, Route};

use super::graphs::Graphs;
use super::weights::model_error;
use super::{GpuBackend, GraphMode};
use crate::kernels::reduce::{SumTreeArgs, TreeSteps, sum_tree};
use crate::runtime::Membership;
use crate::{CudaError, DevicePtr, Runtime};

/// When devices are linked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkMode {
    /// When there are several ranks and all of them can.
    #[default]
    Auto,
    /// Also when a rank is alone: what a single device can show of it.
    Always,
}

/// What sums over ranks need.
pub(super) enum Sums {
    /// There is one rank.
    Alone,
    /// Partial sums and their total on the host.
    ThroughHost { partials: Vec<f32>, total: Vec<f32> },
    /// The parts of all ranks on this device, `[n_ranks][n_parts][n_rows][n_embd]` f32.
    Direct { gathered: DevicePtr, attention: Tree, ffn: Tree },
}

/// A tree on the device.
pub(super) struct Tree {
    steps: DevicePtr,
    shape: TreeSteps,
}

impl Sums {
    pub(super) fn of(n_ranks: usize) -> Self {
        if n_ranks == 1 {
            return Self::Alone;
        }
        Self::ThroughHost { partials: Vec::new(), total: Vec::new() }
    }
}

impl Tree {
    fn upload(runtime: &mut dyn Runtime, shape: TreeSteps) -> Result<Self, CudaError> {
        let steps: &[u8] = bytemuck::cast_slice(&shape.steps);
        let to = runtime.alloc(steps.len())?;
        runtime.upload(to, steps)?;
        Ok(Self { steps: to, shape })
    }
}

impl GpuBackend {
    /// Finds out with all ranks how sums will be made.
    pub(super) fn try_join(&mut self, group: &mut Group<'_>) -> Result<Route, ModelError> {
        if self.plan.n_ranks() == 1 && self.links == LinkMode::Auto {
            return Ok(Route::Alone);
        }
        let own = self.runtime.offer().map_err(|error| error.to_string());
        let library = own.as_ref().map_or_else(|_| String::new(), |offer| offer.library.clone());
        let runtime = self.runtime.as_mut();
        let make_id = &mut || runtime.link_id().map_err(|error| error.to_string());
        let id = match group.agree(own, make_id)? {
            Ok(id) => id,
            Err(reason) => return Ok(Route::ThroughHost(reason)),
        };
        let joined = self.link(id, group);
        if group.abort.is_set() {
            // Nobody is left to agree with.
            self.runtime.part();
            return Err(CollectiveError::Aborted { rank: self.rank, during: "linking devices" }.into());
        }
        let joined = joined.map(|sums| self.sums = sums).map_err(|error| error.to_string());
        if let Err(reason) = group.confirm(joined)? {
            self.runtime.part();
            self.sums = Sums::of(self.plan.n_ranks());
            return Ok(Route::ThroughHost(reason));
        }
        // What goes from device to device is captured like everything else.
        self.graphs = (self.graph_mode == GraphMode::Auto).then(Graphs::default);
        Ok(Route::Direct(library))
    }

    /// Device memory for the partial sums of all ranks.
    pub(super) fn gathered_bytes(&self) -> usize {
        4 * self.plan.n_ranks() * self.widths.n_partials * self.n_rows_padded * self.widths.n_embd
    }

    fn link(&mut self, id: LinkId, group: &Group<'_>) -> Result<Sums, CudaError> {
        let attention = TreeSteps::new(&self.plan.attention().tree);
        let ffn = TreeSteps::new(&self.plan.ffn().tree);
        let n_bytes = self.gathered_bytes();
        let runtime = self.runtime.as_mut();
        let gathered = runtime.alloc(n_bytes)?;
        let (attention, ffn) = (Tree::upload(runtime, attention)?, Tree::upload(runtime, ffn)?);
        let abort = group.abort.clone();
        runtime.join(Membership {
            id,
            rank: self.rank,
            n_ranks: self.plan.n_ranks(),
            connect_deadline: group.connect_deadline,
            deadline: group.deadline,
            is_aborted: Box::new(move || abort.is_set()),
        })?;
        Ok(Sums::Direct { gathered, attention, ffn })
    }

    /// Leaves the total where the next addition finds it.
    pub(super) fn sum_over_ranks(
        &mut self,
        half: Half,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        match &self.sums {
            Sums::Alone => Ok(()),
            Sums::ThroughHost { .. } => self.sum_through_host(half, collective),
            Sums::Direct { .. } => self.sum_directly(half).map_err(model_error),
        }
    }

    fn sum_directly(&mut self, half: Half) -> Result<(), CudaError> {
        let Sums::Direct { gathered, attention, ffn } = &self.sums else { return Ok(()) };
        let tree = match half {
            Half::Attention => attention,
            Half::Ffn => ffn,
        };
        let part_elements = self.shape.n_rows * self.widths.n_embd;
        let runtime = self.runtime.as_mut();
        runtime.all_gather(self.buffers.delta, *gathered, tree.shape.n_parts * part_elements)?;
        let args = SumTreeArgs {
            parts: *gathered,
            steps: tree.steps,
            out: self.buffers.delta,
            header: self.addresses.header,
            part_elements: part_elements as u64,
            n_embd: self.widths.n_embd as u32,
            n_steps: tree.shape.steps.len() as u32,
        };
        sum_tree(runtime, self.shape.n_rows, tree.shape.n_held, &args)
    }

    fn sum_through_host(&mut self, half: Half, collective: &mut dyn Collective) -> Result<(), ModelError> {
        let Sums::ThroughHost { partials, total } = &mut self.sums else { return Ok(()) };
        let tree = match half {
            Half::Attention => &self.plan.attention().tree,
            Half::Ffn => &self.plan.ffn().tree,
        };
        let n = self.shape.n_rows * self.widths.n_embd;
        partials.resize(tree.subtrees(self.rank).len() * n, 0.0);
        total.resize(n, 0.0);
        if !partials.is_empty() {
            self.runtime
                .download(self.buffers.delta, bytemuck::cast_slice_mut(partials))
                .map_err(model_error)?;
        }
        collective.all_reduce_tree(tree, partials, total)?;
        self.runtime.upload(self.buffers.delta, bytemuck::cast_slice(total)).map_err(model_error)
    }
}
