//! A GPU of this machine as a device of the decoder.

use paceline_kernels::{Pinning, ThreadPool};
use paceline_model::{Backend, Device, LoadSpec, ModelError};

use crate::backend::{GpuBackend, GraphMode, model_error};
use crate::{CudaError, Driver, Runtime};

/// A GPU that answered.
#[derive(Clone, Debug)]
pub struct Gpu {
    ordinal: usize,
    name: String,
    n_threads: usize,
    graphs: GraphMode,
}

impl Gpu {
    /// Opens the GPU with this number. `n_threads` pack weights.
    ///
    /// # Errors
    /// When there is no such GPU, no driver, or it is too old.
    pub fn open(ordinal: usize, n_threads: usize) -> Result<Self, CudaError> {
        let name = Driver::open(ordinal)?.name();
        Ok(Self { ordinal, name, n_threads, graphs: GraphMode::Auto })
    }

    /// With or without captured passes.
    pub fn with_graphs(self, graphs: GraphMode) -> Self {
        Self { graphs, ..self }
    }

    /// Bytes of memory free and in all.
    ///
    /// # Errors
    /// What the device reports.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        Driver::open(self.ordinal)?.memory()
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        let driver = Driver::open(self.ordinal).map_err(model_error)?;
        let pool = ThreadPool::new(self.n_threads, Pinning::None);
        Ok(Box::new(GpuBackend::load(Box::new(driver), spec, &pool, self.graphs)?))
    }
}
