//! Sums over ranks. Alone a rank has its sum already; several bring their partial sums together through the host, in the
//! order of the plan's tree.

use paceline_collectives::Collective;
use paceline_model::ModelError;
use paceline_model::backend::Half;

use super::GpuBackend;
use super::weights::model_error;

/// Partial sums and their total on the host.
#[derive(Default, Debug)]
pub(super) struct HostSums {
    partials: Vec<f32>,
    total: Vec<f32>,
}

impl GpuBackend {
    /// Leaves the total where the next addition finds it.
    pub(super) fn sum_over_ranks(
        &mut self,
        half: Half,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        if self.plan.n_ranks() == 1 {
            return Ok(());
        }
        let tree = match half {
            Half::Attention => &self.plan.attention().tree,
            Half::Ffn => &self.plan.ffn().tree,
        };
        let n = self.shape.n_rows * self.widths.n_embd;
        let HostSums { partials, total } = &mut self.host_sums;
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
