//! The backend of CPUs: the kernels of `paceline-kernels` over buffers of this process. It decides nothing about the order
//! of operations but which weights are fetched ahead.
//!
//! # Layout
//! * this file – what a CPU backend holds, and loading it
//! * `pass` – the operations of a forward pass
//! * `weights` – packed matrices
//! * `kv_store` – the paged KV memory of all layers
//! * `scratch` – the buffers of a pass, allocated once
//! * `activation_bits` – how fine activations are quantized

mod activation_bits;
pub(crate) mod kv_store;
mod pass;
pub(crate) mod scratch;
mod weights;

use std::ops::Range;
use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_domain::{BlockCopy, BlockId};
use paceline_kernels::attention::AttentionScratch;
use paceline_kernels::kv::KvRow;
use paceline_kernels::rope::Rope;
use paceline_kernels::{Kernels, Pinning, ThreadPool};

use self::activation_bits::ActivationBits;
use self::kv_store::KvStore;
use self::scratch::{Scratch, ScratchShape};
use self::weights::{CpuPacker, CpuWeights};
use crate::backend::{Backend, Device};
use crate::batch::Batch;
use crate::loader::{LoadSpec, Loader};
use crate::{ModelConfig, ModelError, SplitPlan, rope};

/// The cores of this machine.
#[derive(Clone, Copy)]
pub struct Cpu {
    /// Instruction set.
    pub kernels: &'static Kernels,
    /// Threads of packing and of the forward pass.
    pub n_threads: usize,
}

impl Device for Cpu {
    fn name(&self) -> String {
        self.kernels.isa().name().into()
    }

    fn is_cpu(&self) -> bool {
        true
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        Ok(Box::new(CpuBackend::load(spec, self)?))
    }
}

/// One rank's slice of a model, with its KV cache and buffers.
pub struct CpuBackend {
    engine: Engine,
    weights: CpuWeights,
    kv: KvStore,
    scratch: Scratch,
    attention_scratch: AttentionScratch,
    rows: Rows,
}

/// What does not change during a pass and holds no buffers.
struct Engine {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    plan: SplitPlan,
    rank: usize,
    rope: Rope,
    kv_of_head: Vec<usize>,
    bits: ActivationBits,
    kernels: &'static Kernels,
    pool: ThreadPool,
}

/// Where the rows of the batch stand.
#[derive(Default)]
struct Rows {
    positions: Vec<u32>,
    sequence_of_row: Vec<u32>,
    /// Blocks of all sequences, one after the other.
    blocks: Vec<BlockId>,
    /// Range of each sequence in `blocks`.
    tables: Vec<Range<usize>>,
    output_rows: Vec<usize>,
    /// Of the last rows, which are branches.
    copies: Vec<BlockCopy>,
}

impl CpuBackend {
    /// Loads a rank's slices and allocates everything a pass needs.
    ///
    /// # Errors
    /// A tensor that is missing, left over, misshapen or cannot be packed; a rank outside the plan; a capacity of
    /// nothing.
    pub fn load(spec: &LoadSpec<'_>, cpu: &Cpu) -> Result<Self, ModelError> {
        let LoadSpec { checkpoint, config, plan, rank, capacity, .. } = *spec;
        let loader = Loader::new(spec)?;
        let pool = ThreadPool::new(cpu.n_threads, Pinning::None);
        let weights = loader.load(&mut CpuPacker { pool: &pool })?;
        let engine = Engine {
            checkpoint: Arc::clone(checkpoint),
            config: config.clone(),
            plan: plan.clone(),
            rank,
            rope: rope::build(&config.rope, config.head_dim),
            kv_of_head: plan.kv_of_head(rank, config.n_heads_per_kv()),
            bits: ActivationBits::new(config),
            kernels: cpu.kernels,
            pool,
        };
        Ok(Self {
            engine,
            weights,
            kv: KvStore::new(config, plan.share(rank), &capacity),
            scratch: ScratchShape::new(config, plan, rank).allocate(&capacity),
            attention_scratch: AttentionScratch::default(),
            rows: Rows::default(),
        })
    }
}

impl Rows {
    fn len(&self) -> usize {
        self.positions.len()
    }

    fn take(&mut self, batch: &Batch<'_>) {
        fn copy<T: Copy>(to: &mut Vec<T>, from: &[T]) {
            to.clear();
            to.extend_from_slice(from);
        }
        copy(&mut self.positions, batch.positions);
        copy(&mut self.sequence_of_row, batch.sequence_of_row);
        copy(&mut self.output_rows, batch.output_rows);
        copy(&mut self.copies, batch.copies);
        self.blocks.clear();
        self.tables.clear();
        for table in batch.block_tables {
            let start = self.blocks.len();
            self.blocks.extend_from_slice(table);
            self.tables.push(start..self.blocks.len());
        }
    }

    /// For the kernels.
    fn for_kernels(&self) -> Vec<KvRow<'_>> {
        let row = |(position, sequence): (&u32, &u32)| KvRow {
            position: *position,
            block_table: &self.blocks[self.tables[*sequence as usize].clone()],
        };
        self.positions.iter().zip(&self.sequence_of_row).map(row).collect()
    }
}
