//! The one forward pass of all architectures and backends: norm, attention, norm, gated feed-forward network, with one
//! all-reduce after each half of a layer. It samples nothing and knows no sequences beyond their block tables.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use paceline_collectives::Collective;
use paceline_domain::{BlockId, Fingerprint};

use crate::backend::{Backend, Device, Half, Pass};
use crate::batch::{Batch, BatchLimits};
use crate::fingerprint::fingerprint;
use crate::link::{Group, Route};
use crate::loader::LoadSpec;
use crate::logits::Logits;
use crate::{ModelConfig, ModelError};

/// One rank's slice of a model, on a device.
pub struct Decoder {
    backend: Box<dyn Backend>,
    config: ModelConfig,
    place: Place,
    limits: BatchLimits,
    /// Last position seen of each sequence, while a batch is checked.
    last_position: Vec<Option<u32>>,
    fingerprint: Fingerprint,
    layers_done: Arc<AtomicU64>,
}

/// The rank's place in the group and which operations it takes part in.
struct Place {
    rank: usize,
    n_ranks: usize,
    has_heads: bool,
    has_ffn: bool,
    vocab: Range<usize>,
}

impl Decoder {
    /// Loads a rank's slices on a device.
    ///
    /// # Errors
    /// As [`Device::load`].
    pub fn load(spec: &LoadSpec<'_>, device: &dyn Device) -> Result<Self, ModelError> {
        Ok(Self::new(device.load(spec)?, spec))
    }

    /// A decoder over a backend that was loaded from this specification.
    pub fn new(backend: Box<dyn Backend>, spec: &LoadSpec<'_>) -> Self {
        let LoadSpec { checkpoint, config, plan, rank, quantize, capacity, .. } = *spec;
        let share = plan.share(rank);
        let place = Place {
            rank,
            n_ranks: plan.n_ranks(),
            has_heads: !share.heads.is_empty(),
            has_ffn: !share.ffn.is_empty(),
            vocab: share.vocab.clone(),
        };
        let limits = BatchLimits {
            max_rows: capacity.max_rows,
            max_output_rows: capacity.max_output_rows,
            n_vocab: config.n_vocab,
            context_length: config.context_length,
            n_kv_blocks: capacity.n_kv_blocks,
        };
        Self {
            config: config.clone(),
            place,
            limits,
            last_position: Vec::new(),
            fingerprint: fingerprint(checkpoint, quantize, capacity.kv_type, backend.device_numerics()),
            layers_done: Arc::new(AtomicU64::new(0)),
            backend,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What computes.
    pub fn device_name(&self) -> String {
        self.backend.name()
    }

    /// What must be equal on every rank.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Rises by one with each layer done: a sign of life for the progress deadline.
    pub fn layers_done(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.layers_done)
    }

    /// Bytes of packed weights and of the KV store.
    pub fn memory_bytes(&self) -> (usize, usize) {
        self.backend.memory_bytes()
    }

    /// Whether the device copies KV blocks.
    pub fn copies_blocks(&self) -> bool {
        self.backend.copies_blocks()
    }

    /// Makes one KV block a copy of another, before the next batch.
    ///
    /// # Errors
    /// A device that failed or does not copy blocks.
    ///
    /// # Panics
    /// When a block is beyond the pool.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), ModelError> {
        let n_blocks = self.limits.n_kv_blocks;
        assert!(from.idx() < n_blocks && to.idx() < n_blocks, "block {from} or {to} of a pool of {n_blocks}");
        self.backend.copy_block(from, to)
    }

    /// Enters the group, once, before the first batch: ranks find out whether their devices reach each other without the
    /// host. Without it all sums go through the host. All ranks call it, or none.
    ///
    /// # Errors
    /// A collective or a device that failed, or the abort flag.
    pub fn join(&mut self, group: &mut Group<'_>) -> Result<Route, ModelError> {
        self.backend.join(group)
    }

    /// Runs a batch. All ranks call it with the same batch; each gets the logits of its own tokens. After an error
    /// of the collective the KV cache holds the batch's rows in some layers only: run it again in a new group.
    ///
    /// # Errors
    /// A batch that breaks a rule ([`ModelError::Batch`], nothing was changed), a collective or a device that failed.
    ///
    /// # Panics
    /// When the collective is of another group size or rank than the decoder.
    pub fn forward(
        &mut self,
        batch: &Batch<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Logits<'_>, ModelError> {
        let place = (collective.rank(), collective.n_ranks());
        assert_eq!(place, (self.place.rank, self.place.n_ranks), "the collective is for this decoder");
        batch.check(&self.limits, &mut self.last_position)?;
        if !batch.copies.is_empty() && !self.backend.copies_blocks() {
            return Err(ModelError::Batch(format!("branches, on {}", self.backend.name())));
        }
        match self.backend.begin(batch)? {
            Pass::Done => {
                self.layers_done.fetch_add(self.config.n_layers as u64, Ordering::Relaxed);
            }
            Pass::Run => {
                (0..self.config.n_layers).try_for_each(|layer| self.layer(layer, collective))?;
                self.backend.finish()?;
            }
        }
        let n_output_rows = batch.output_rows.len();
        if n_output_rows > 0 && !self.place.vocab.is_empty() {
            self.backend.logits()?;
        }
        Ok(Logits::new(self.backend.as_mut(), n_output_rows, self.place.vocab.clone()))
    }

    /// Each half adds what the one before left, and leaves its own sums to be added.
    fn layer(&mut self, layer: usize, collective: &mut dyn Collective) -> Result<(), ModelError> {
        let backend = self.backend.as_mut();
        backend.normalize(layer, Half::Attention)?;
        if self.place.has_heads {
            backend.project(layer)?;
            backend.attend(layer)?;
            backend.output(layer)?;
        }
        backend.reduce(Half::Attention, collective)?;
        backend.normalize(layer, Half::Ffn)?;
        if self.place.has_ffn {
            backend.gate_up(layer)?;
            backend.down(layer)?;
        }
        backend.reduce(Half::Ffn, collective)?;
        self.layers_done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
