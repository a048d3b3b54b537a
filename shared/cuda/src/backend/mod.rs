//! The backend of NVIDIA GPUs: a rank's weights, KV memory and buffers on one device, and the operations of a pass as
//! launches of kernels. It decides which kernel and whether a captured graph is replayed; no such decision changes a bit.
//!
//! # Layout
//! * this file – what a backend holds, and loading it
//! * `pass` – the operations of a forward pass
//! * `reduce` – the sums over ranks
//! * `rows` – logits and the choice of tokens
//! * `batch` – a batch on its way to the device
//! * `graphs` – which passes are captured
//! * `buffers` – device memory of a pass
//! * `weights` – matrices on the device
//! * `need` – how much memory all this takes

mod batch;
mod buffers;
mod graphs;
mod need;
mod pass;
mod reduce;
mod rows;
mod weights;

use paceline_domain::KvType;
use paceline_kernels::ThreadPool;
use paceline_kernels::rope::RopeTable;
use paceline_model::loader::Loader;
use paceline_model::{LoadSpec, ModelConfig, ModelError, SplitPlan, rope};

use self::batch::{BatchAddresses, BatchLayout, Staged};
use self::buffers::{Buffers, Sizes, Widths, kv_elements};
use self::graphs::{Graphs, Shape};
pub use self::need::MemoryNeed;
pub use self::reduce::LinkMode;
use self::reduce::Sums;
pub(crate) use self::weights::model_error;
use self::weights::{GateUp, GpuAttention, GpuFfn, GpuMatrix, GpuPacker, Packing};
use crate::kernels::attention::HEAD_DIMS;
use crate::{CudaError, DevicePtr, Runtime};

/// Grows when a kernel, or the order in which they are used, comes to give other bits.
const KERNEL_SET: u32 = 2;

/// Query heads of a rank by the key head they share, on the device: u32 each.
#[derive(Clone, Copy, Debug)]
struct HeadTables {
    /// `[n_kv_heads]`
    first_head: DevicePtr,
    /// `[n_kv_heads]`
    n_heads_of: DevicePtr,
    n_heads: usize,
    n_kv_heads: usize,
    /// On the rank that has most.
    most_per_kv: usize,
}

/// One layer on the device.
struct GpuLayer {
    attention_norm: DevicePtr,
    attention: Option<GpuAttention>,
    ffn_norm: DevicePtr,
    ffn: Option<GpuFfn>,
    keys: DevicePtr,
    values: DevicePtr,
}

/// The model on the device.
struct GpuWeights {
    layers: Vec<GpuLayer>,
    output_norm: DevicePtr,
    head: Option<GpuMatrix>,
    embedding: GpuMatrix,
}

/// One rank's slice of a model on a GPU.
pub struct GpuBackend {
    runtime: Box<dyn Runtime>,
    config: ModelConfig,
    plan: SplitPlan,
    rank: usize,
    widths: Widths,
    weights: GpuWeights,
    heads: HeadTables,
    buffers: Buffers,
    addresses: BatchAddresses,
    layout: BatchLayout,
    staged: Staged,
    /// Sizes of the launches of the pass at hand.
    shape: Shape,
    /// The shape whose launches are being recorded.
    capturing: Option<Shape>,
    /// Logits come with the pass at hand, by its graph.
    has_logits: bool,
    graphs: Option<Graphs>,
    graph_mode: GraphMode,
    links: LinkMode,
    bytes: MemoryBytes,
    sums: Sums,
    n_rows_padded: usize,
    choices: rows::ChoiceBuffers,
    /// What was last asked for of the logits.
    host_rows: rows::HostRows,
}

#[derive(Clone, Copy, Debug)]
struct MemoryBytes {
    weights: usize,
    kv: usize,
}

/// Whether decode passes are captured and replayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GraphMode {
    /// Where it pays: few rows, sums over ranks that do not go through the host.
    #[default]
    Auto,
    /// Never.
    Off,
}

impl GpuBackend {
    /// Loads a rank's slices on the device of `runtime` and allocates everything a pass needs. `pool` packs.
    ///
    /// # Errors
    /// A tensor that is missing, left over, misshapen or cannot be packed; a model no kernel exists for; not enough memory.
    pub fn load(
        runtime: Box<dyn Runtime>,
        spec: &LoadSpec<'_>,
        pool: &ThreadPool,
        graphs: GraphMode,
    ) -> Result<Self, ModelError> {
        Self::assemble(runtime, spec, Packing::Threads(pool), graphs)
    }

    fn assemble(
        mut runtime: Box<dyn Runtime>,
        spec: &LoadSpec<'_>,
        packing: Packing<'_>,
        graphs: GraphMode,
    ) -> Result<Self, ModelError> {
        let LoadSpec { config, plan, rank, capacity, .. } = *spec;
        check(config, capacity.kv_type).map_err(model_error)?;
        let widths = Widths::new(config, plan, rank);
        let loader = Loader::new(spec)?;
        let mut packer = GpuPacker { runtime: runtime.as_mut(), packing, n_bytes: 0, embedding: None };
        let embedding = packer.load_embedding(&loader)?;
        let loaded = loader.load(&mut packer)?;
        let kv_bytes_of_layer = 2 * kv_elements(&capacity, &widths);
        let mut layers = Vec::new();
        for layer in loaded.layers {
            layers.push(GpuLayer {
                attention_norm: packer.vector(&layer.attention_norm)?,
                attention: layer.attention,
                ffn_norm: packer.vector(&layer.ffn_norm)?,
                ffn: layer.ffn,
                keys: packer.runtime.alloc(kv_bytes_of_layer.max(1)).map_err(model_error)?,
                values: packer.runtime.alloc(kv_bytes_of_layer.max(1)).map_err(model_error)?,
            });
        }
        let heads = head_tables(&mut packer, plan, rank, config.n_heads_per_kv())?;
        let output_norm = packer.vector(&loaded.output_norm)?;
        let bytes = MemoryBytes { weights: packer.n_bytes, kv: 2 * kv_bytes_of_layer * layers.len() };
        let layout = BatchLayout::new(&capacity);
        let is_apart =
            |layer: &GpuLayer| layer.ffn.as_ref().is_some_and(|ffn| matches!(ffn.gate_up, GateUp::Apart(_)));
        let sizes = Sizes {
            widths,
            capacity,
            batch_bytes: layout.n_bytes(),
            gate_apart: layers.iter().any(is_apart),
            n_kv_heads: heads.n_kv_heads,
            most_per_kv: heads.most_per_kv,
        };
        let angles = angles(config, &capacity);
        let buffers = sizes.allocate(runtime.as_mut(), &angles).map_err(model_error)?;
        let choices = rows::ChoiceBuffers::allocate(runtime.as_mut(), capacity.max_output_rows, widths.vocab)
            .map_err(model_error)?;
        Ok(Self {
            runtime,
            config: config.clone(),
            plan: plan.clone(),
            rank,
            widths,
            weights: GpuWeights { layers, output_norm, head: loaded.head, embedding },
            heads,
            buffers,
            addresses: layout.addresses(buffers.batch),
            layout,
            staged: Staged::default(),
            shape: Shape { n_rows: 0, n_splits: 0, n_output_rows: 0 },
            capturing: None,
            has_logits: false,
            // A sum that goes through the host cannot be captured.
            graphs: (graphs == GraphMode::Auto && plan.n_ranks() == 1).then(Graphs::default),
            graph_mode: graphs,
            links: LinkMode::Auto,
            bytes,
            sums: Sums::of(plan.n_ranks()),
            n_rows_padded: sizes.n_rows_padded(),
            choices,
            host_rows: rows::HostRows::default(),
        })
    }

    /// When its device is linked with those of other ranks.
    pub fn with_links(self, links: LinkMode) -> Self {
        Self { links, ..self }
    }

    fn window_of_layer(&self, layer: usize) -> u32 {
        self.config.window_of_layer(layer).map_or(0, |window| window as u32)
    }
}

/// Whether kernels exist for this model.
fn check(config: &ModelConfig, kv_type: KvType) -> Result<(), CudaError> {
    if kv_type != buffers::KV_TYPE {
        let (asked, held) = (kv_type.name(), buffers::KV_TYPE.name());
        return Err(CudaError::Unfit(format!(
            "the KV cache of a GPU is {held}, not {asked}: use --kv-type {held}"
        )));
    }
    if !HEAD_DIMS.contains(&config.head_dim) {
        let head_dim = config.head_dim;
        return Err(CudaError::Unfit(format!(
            "heads of {head_dim} elements; there are kernels for {HEAD_DIMS:?}"
        )));
    }
    if !config.n_embd.is_multiple_of(4) {
        return Err(CudaError::Unfit(format!("a width of {}; it must be a multiple of 4", config.n_embd)));
    }
    Ok(())
}

/// The query heads of each key head: neighbours, by the way heads are split.
fn head_tables(
    packer: &mut GpuPacker<'_>,
    plan: &SplitPlan,
    rank: usize,
    n_heads_per_kv: usize,
) -> Result<HeadTables, ModelError> {
    let kv_of_head = plan.kv_of_head(rank, n_heads_per_kv);
    let n_kv_heads = kv_of_head.iter().max().map_or(0, |last| last + 1);
    let of = |kv: usize| kv_of_head.iter().filter(move |it| **it == kv).count();
    let counts: Vec<u32> = (0..n_kv_heads).map(|kv| of(kv) as u32).collect();
    let first = |kv: usize| kv_of_head.iter().position(|it| *it == kv).unwrap_or(0) as u32;
    let firsts: Vec<u32> = (0..n_kv_heads).map(first).collect();
    let mut put = |values: &[u32]| packer.bytes(bytemuck::cast_slice(values)).map_err(model_error);
    Ok(HeadTables {
        first_head: put(&firsts)?,
        n_heads_of: put(&counts)?,
        n_heads: kv_of_head.len(),
        n_kv_heads,
        most_per_kv: most_per_kv(plan, n_heads_per_kv),
    })
}

/// Most query heads that share a key head on any rank: ranks cut a batch in the same way, whatever each of them holds, so
/// that they also agree which passes are captured.
fn most_per_kv(plan: &SplitPlan, n_heads_per_kv: usize) -> usize {
    let of_rank = |rank: usize| {
        let kv_of_head = plan.kv_of_head(rank, n_heads_per_kv);
        kv_of_head.iter().map(|kv| kv_of_head.iter().filter(|it| *it == kv).count()).max()
    };
    (0..plan.n_ranks()).filter_map(of_rank).max().unwrap_or(1)
}

/// Cosine and sine of every position a sequence can reach, `[n_positions][head_dim / 2][2]`.
fn angles(config: &ModelConfig, capacity: &paceline_model::Capacity) -> Vec<f32> {
    let in_pool = capacity.n_kv_blocks * paceline_domain::group::BLOCK_POSITIONS;
    let n_positions = config.context_length.min(in_pool);
    let mut table = RopeTable::default();
    rope::build(&config.rope, config.head_dim).angles(0..n_positions as u32, &mut table);
    table.cos().iter().zip(table.sin()).flat_map(|(cos, sin)| [*cos, *sin]).collect()
}
