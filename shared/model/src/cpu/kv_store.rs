//! The paged KV memory of all layers of one rank. Which sequence owns which block is decided by the coordinator.

use paceline_domain::{BlockId, KvType};
use paceline_kernels::kv::{KvLayer, KvShape};

use crate::estimate::Capacity;
use crate::{ModelConfig, Share};

/// One [`KvLayer`] for each decoder layer; none when the rank has no head.
pub(crate) struct KvStore {
    layers: Vec<KvLayer>,
}

/// The KV memory of one layer of a rank.
pub(crate) fn layer_shape(config: &ModelConfig, share: &Share, kv_type: KvType, n_blocks: usize) -> KvShape {
    KvShape { n_blocks, n_kv_heads: share.kv_heads.len(), head_dim: config.head_dim, kv_type }
}

impl KvStore {
    /// Memory for `capacity.n_kv_blocks` blocks in every layer.
    pub(crate) fn new(config: &ModelConfig, share: &Share, capacity: &Capacity) -> Self {
        let shape = layer_shape(config, share, capacity.kv_type, capacity.n_kv_blocks);
        let n_layers = if share.kv_heads.is_empty() { 0 } else { config.n_layers };
        Self { layers: (0..n_layers).map(|_| KvLayer::new(shape)).collect() }
    }

    /// Bytes of the whole store.
    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.shape().n_blocks * layer.shape().block_bytes()).sum()
    }

    /// In every layer.
    pub(crate) fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.layers.iter_mut().for_each(|layer| layer.copy_block(from, to));
    }

    pub(crate) fn layer(&self, layer: usize) -> &KvLayer {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut KvLayer {
        &mut self.layers[layer]
    }
}
