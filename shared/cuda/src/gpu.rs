//! A GPU of this machine as a device of the decoder.

use std::path::{Path, PathBuf};

use paceline_kernels::{Pinning, ThreadPool};
use paceline_model::{Backend, Device, DeviceRoom, LoadSpec, ModelError};

use crate::backend::{GpuBackend, GraphMode, LinkMode, MemoryNeed, model_error};
use crate::{CudaError, Driver, Runtime};

/// A GPU that answered.
#[derive(Clone, Debug)]
pub struct Gpu {
    ordinal: usize,
    name: String,
    n_threads: usize,
    graphs: GraphMode,
    /// Share of the free memory that may be taken.
    memory_share: f64,
    nccl: Option<PathBuf>,
    links: LinkMode,
}

impl Gpu {
    /// Opens the GPU with this number. `n_threads` pack weights.
    ///
    /// # Errors
    /// When there is no such GPU, no driver, or it is too old.
    pub fn open(ordinal: usize, n_threads: usize) -> Result<Self, CudaError> {
        let name = Driver::open(ordinal)?.name();
        let (graphs, links) = (GraphMode::Auto, LinkMode::Auto);
        Ok(Self { ordinal, name, n_threads, graphs, memory_share: 1.0, nccl: None, links })
    }

    /// With or without captured passes.
    pub fn with_graphs(self, graphs: GraphMode) -> Self {
        Self { graphs, ..self }
    }

    /// With a share of the free memory for weights, buffers and KV cache; a group's pool is sized by it.
    pub fn with_memory_share(self, memory_share: f64) -> Self {
        Self { memory_share, ..self }
    }

    /// With NCCL from this file or folder instead of where the dynamic linker looks.
    pub fn with_nccl(self, place: Option<PathBuf>) -> Self {
        Self { nccl: place, ..self }
    }

    /// Linked with the GPUs of other ranks in these cases.
    pub fn with_links(self, links: LinkMode) -> Self {
        Self { links, ..self }
    }

    /// Where NCCL is looked for, unless by the dynamic linker.
    pub fn nccl(&self) -> Option<&Path> {
        self.nccl.as_deref()
    }

    /// The GPU for work of one's own.
    ///
    /// # Errors
    /// What the device reports.
    pub fn driver(&self) -> Result<Driver, CudaError> {
        Ok(Driver::open(self.ordinal)?.with_nccl(self.nccl.clone()))
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

    fn room(&self, spec: &LoadSpec<'_>) -> Result<Option<DeviceRoom>, ModelError> {
        let MemoryNeed { fixed_bytes, kv_block_bytes } = MemoryNeed::of(spec)?;
        let driver = Driver::open(self.ordinal).map_err(model_error)?;
        let (free, _) = driver.memory().map_err(model_error)?;
        let usable_bytes = (free as f64 * self.memory_share) as u64;
        let memory = driver.uuid().map_err(model_error)?;
        Ok(Some(DeviceRoom { memory, usable_bytes, fixed_bytes, kv_block_bytes }))
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        let driver = self.driver().map_err(model_error)?;
        let pool = ThreadPool::new(self.n_threads, Pinning::None);
        let backend = GpuBackend::load(Box::new(driver), spec, &pool, self.graphs)?;
        Ok(Box::new(backend.with_links(self.links)))
    }
}
