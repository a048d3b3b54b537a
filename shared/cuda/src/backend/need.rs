//! How much device memory a rank takes: the backend is assembled as ever, on a runtime that only counts. No device is
//! asked and no weight is read.

use paceline_domain::group::BLOCK_POSITIONS;
use paceline_model::{Capacity, LoadSpec, ModelError};

use super::batch::TABLE_BYTES_PER_BLOCK;
use super::weights::{Packing, model_error};
use super::{GpuBackend, GraphMode};
use crate::runtime::{TileMap, Tiles};
use crate::{CudaError, DevicePtr, GraphId, Launch, Runtime};

/// Devices give out memory in pieces of this size; small allocations share one.
const PIECE_BYTES: u64 = 2 << 20;
/// From this size on an allocation has pieces of its own.
const OWN_PIECES_FROM: u64 = PIECE_BYTES / 2;
/// Alignment of allocations that share a piece.
const ALIGNMENT: u64 = 512;

/// Device memory of a rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryNeed {
    /// Bytes of weights and buffers.
    pub fixed_bytes: u64,
    /// Bytes of one block of the KV cache in all layers, and of what is held for it elsewhere.
    pub kv_block_bytes: u64,
}

impl MemoryNeed {
    /// What a backend of this specification takes; the capacity's number of KV blocks does not matter.
    ///
    /// # Errors
    /// As [`GpuBackend::load`], but for memory.
    pub fn of(spec: &LoadSpec<'_>) -> Result<Self, ModelError> {
        let capacity = Capacity { n_kv_blocks: 1, ..spec.capacity };
        let one_block = LoadSpec { capacity, progress: &|_| (), ..*spec };
        let counter = Box::<Counter>::default();
        let mut backend = GpuBackend::assemble(counter, &one_block, Packing::OutlineOnly, GraphMode::Auto)?;
        if spec.plan.n_ranks() > 1 {
            // Ranks may come to be linked.
            let n_bytes = backend.gathered_bytes();
            backend.runtime.alloc(n_bytes).map_err(model_error)?;
        }
        let (free, all) = backend.runtime.memory().map_err(model_error)?;
        let kv_block_bytes = (backend.bytes.kv + TABLE_BYTES_PER_BLOCK) as u64;
        // Angles are held of every position that the pool has room for.
        let more_angles =
            spec.config.context_length.saturating_sub(BLOCK_POSITIONS) * spec.config.head_dim * 4;
        let kv_pieces = 2 * spec.config.n_layers as u64 + 1;
        let fixed_bytes = all - free - kv_block_bytes + more_angles as u64 + kv_pieces * PIECE_BYTES;
        Ok(Self { fixed_bytes, kv_block_bytes })
    }
}

/// A device without end that does nothing but count what is allocated.
#[derive(Default)]
struct Counter {
    n_bytes: u64,
}

impl Runtime for Counter {
    fn alloc(&mut self, n_bytes: usize) -> Result<DevicePtr, CudaError> {
        let n_bytes = n_bytes as u64;
        let of = if n_bytes < OWN_PIECES_FROM { ALIGNMENT } else { PIECE_BYTES };
        let at = self.n_bytes;
        self.n_bytes += n_bytes.next_multiple_of(of);
        Ok(at)
    }

    fn upload(&mut self, _to: DevicePtr, _from: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }

    fn download(&mut self, _from: DevicePtr, _to: &mut [u8]) -> Result<(), CudaError> {
        Ok(())
    }

    fn launch(&mut self, _kernel: &'static str, _launch: Launch, _args: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }

    fn begin_capture(&mut self) -> Result<(), CudaError> {
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, CudaError> {
        Ok(GraphId(0))
    }

    fn replay(&mut self, _graph: GraphId) -> Result<(), CudaError> {
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), CudaError> {
        Ok(())
    }

    fn memory(&self) -> Result<(u64, u64), CudaError> {
        Ok((u64::MAX - self.n_bytes, u64::MAX))
    }

    fn max_shared_bytes(&self) -> u32 {
        u32::MAX
    }

    fn n_multiprocessors(&self) -> u32 {
        1
    }

    fn is_hopper(&self) -> bool {
        false
    }

    fn tile_map(&self, _tiles: &Tiles) -> Result<TileMap, CudaError> {
        Ok(TileMap([0; 16]))
    }

    fn name(&self) -> String {
        "a counter of bytes".into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use paceline_checkpoint::Checkpoint;
    use paceline_domain::{KvType, WeightType};
    use paceline_model::synthetic::{Synthetic, tiny_config};
    use paceline_model::{ModelConfig, SplitPlan};

    use super::*;

    const CAPACITY: Capacity =
        Capacity { kv_type: KvType::F16, n_kv_blocks: 1, max_rows: 64, max_output_rows: 8 };

    fn with_spec<T>(n_ranks: usize, capacity: Capacity, body: impl Fn(&LoadSpec<'_>) -> T) -> Vec<T> {
        let config = ModelConfig {
            n_layers: 3,
            n_embd: 256,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            n_ff: 512,
            n_vocab: 1_000,
            context_length: 4_096,
            ..tiny_config()
        };
        let synthetic = Synthetic { config, seed: 3, weight_type: |_, _| WeightType::Q4_K };
        let bytes = synthetic.to_gguf().expect("bytes");
        let checkpoint = Arc::new(Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint"));
        let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
        let plan = SplitPlan::new(&config, n_ranks).expect("a plan");
        let spec = |rank| LoadSpec {
            checkpoint: &checkpoint,
            config: &config,
            plan: &plan,
            rank,
            quantize: None,
            capacity,
            progress: &|_| (),
        };
        (0..n_ranks).map(|rank| body(&spec(rank))).collect()
    }

    /// What a backend with this many blocks allocates.
    fn allocated(spec: &LoadSpec<'_>) -> u64 {
        let counter = Box::<Counter>::default();
        let backend = GpuBackend::assemble(counter, spec, Packing::OutlineOnly, GraphMode::Auto);
        let (free, all) = backend.expect("assembles").runtime.memory().expect("counts");
        all - free
    }

    #[test]
    fn the_need_is_what_is_allocated_and_a_few_pieces() {
        for (n_ranks, n_kv_blocks) in [(1, 1), (1, 300), (2, 77), (1, 20_000)] {
            let capacity = Capacity { n_kv_blocks, ..CAPACITY };
            let spares = with_spec(n_ranks, capacity, |spec| {
                let need = MemoryNeed::of(spec).expect("a need");
                let needed = need.fixed_bytes + n_kv_blocks as u64 * need.kv_block_bytes;
                needed.checked_sub(allocated(spec)).expect("never more than was said")
            });
            let angles = 4_096 * 64 * 4;
            assert!(spares.iter().all(|spare| *spare <= 8 * PIECE_BYTES + angles), "{spares:?}");
        }
    }

    #[test]
    fn blocks_of_ranks_are_their_share_and_the_number_of_blocks_does_not_matter() {
        let needs =
            |n_ranks, capacity| with_spec(n_ranks, capacity, |spec| MemoryNeed::of(spec).expect("a need"));
        let [one] = needs(1, CAPACITY)[..] else { panic!("one rank") };
        assert_eq!(one.kv_block_bytes, 3 * 2 * 2 * 64 * 2 * 16 + 32);
        let two = needs(2, CAPACITY);
        assert!(two.iter().all(|rank| rank.kv_block_bytes - 32 == (one.kv_block_bytes - 32) / 2));
        assert_eq!(needs(1, Capacity { n_kv_blocks: 999, ..CAPACITY }), [one]);
    }

    #[test]
    fn what_no_kernel_can_run_is_an_error_before_anything_is_loaded() {
        for kv_type in [KvType::F32, KvType::Q8] {
            let capacity = Capacity { kv_type, ..CAPACITY };
            let errors =
                with_spec(1, capacity, |spec| MemoryNeed::of(spec).expect_err("must be refused").to_string());
            assert!(
                errors[0].contains(kv_type.name()) && errors[0].contains("use --kv-type f16"),
                "{errors:?}"
            );
        }
    }
}
