//! The one forward pass of all architectures: norm, attention, norm, gated feed-forward network, with one
//! all-reduce after each half of a layer. It samples nothing and knows no sequences beyond their block tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Collective;
use paceline_domain::Fingerprint;
use paceline_kernels::attention::{AttentionArgs, AttentionScratch, attention};
use paceline_kernels::elementwise::{add_bias, add_into, silu_mul};
use paceline_kernels::kv::{KvRow, NewKv};
use paceline_kernels::rms_norm::{RmsNorm, rms_norm};
use paceline_kernels::rope::Rope;
use paceline_kernels::{
    Input, InputKind, Kernels, PackedMatrix, QuantizedRows, ThreadPool, dequantize_row, matmul, quantize_rows,
};

use crate::batch::{Batch, BatchLimits, Logits};
use crate::estimate::Capacity;
use crate::fingerprint::fingerprint;
use crate::kv_store::KvStore;
use crate::names::{self, Part};
use crate::scratch::{Scratch, ScratchShape};
use crate::weights::{AttentionWeights, FfnWeights, LoadProgress, Loader, Projection, Weights};
use crate::{ModelConfig, ModelError, SplitPlan, rope};

/// What a decoder is made from.
pub struct LoadSpec<'a> {
    /// Where the weights are; kept, because embedding rows are read from the memory map.
    pub checkpoint: &'a Arc<Checkpoint>,
    /// Its configuration.
    pub config: &'a ModelConfig,
    /// How it is split.
    pub plan: &'a SplitPlan,
    /// Whose slice to load.
    pub rank: usize,
    /// What to allocate.
    pub capacity: Capacity,
    /// Instruction set.
    pub kernels: &'static Kernels,
    /// Threads of packing and of the forward pass.
    pub pool: Arc<ThreadPool>,
    /// Called as weights are packed.
    pub progress: &'a dyn Fn(LoadProgress),
}

/// One rank's slice of a model, with its KV cache and buffers.
pub struct Decoder {
    engine: Engine,
    weights: Weights,
    kv: KvStore,
    scratch: Scratch,
    attention_scratch: AttentionScratch,
    limits: BatchLimits,
    fingerprint: Fingerprint,
    layers_done: Arc<AtomicU64>,
}

/// What does not change during a pass and holds no buffers.
struct Engine {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    plan: SplitPlan,
    rank: usize,
    rope: Rope,
    kv_of_head: Vec<usize>,
    kernels: &'static Kernels,
    pool: Arc<ThreadPool>,
}

impl Decoder {
    /// Loads a rank's slices and allocates everything a pass needs.
    ///
    /// # Errors
    /// A tensor that is missing, left over, misshapen or cannot be packed; a rank outside the plan; a capacity of
    /// nothing.
    pub fn load(spec: &LoadSpec<'_>) -> Result<Self, ModelError> {
        let LoadSpec { checkpoint, config, plan, rank, capacity, kernels, .. } = *spec;
        if rank >= plan.n_ranks() {
            return Err(ModelError::Load(format!("rank {rank} of {}", plan.n_ranks())));
        }
        if capacity.max_rows == 0 || capacity.n_kv_blocks == 0 {
            let (rows, blocks) = (capacity.max_rows, capacity.n_kv_blocks);
            return Err(ModelError::Load(format!("room for {rows} rows and {blocks} KV blocks is none")));
        }
        let loader = Loader { checkpoint, config, plan, rank, pool: &spec.pool, progress: spec.progress };
        let weights = loader.load()?;
        let engine = Engine {
            checkpoint: Arc::clone(checkpoint),
            config: config.clone(),
            plan: plan.clone(),
            rank,
            rope: rope::build(&config.rope, config.head_dim),
            kv_of_head: plan.kv_of_head(rank, config.n_heads_per_kv()),
            kernels,
            pool: Arc::clone(&spec.pool),
        };
        let limits = BatchLimits {
            max_rows: capacity.max_rows,
            max_output_rows: capacity.max_output_rows,
            n_vocab: config.n_vocab,
            context_length: config.context_length,
            n_kv_blocks: capacity.n_kv_blocks,
        };
        Ok(Self {
            engine,
            weights,
            kv: KvStore::new(config, plan.share(rank), &capacity),
            scratch: ScratchShape::new(config, plan, rank).allocate(&capacity),
            attention_scratch: AttentionScratch::default(),
            limits,
            fingerprint: fingerprint(checkpoint, capacity.kv_type),
            layers_done: Arc::new(AtomicU64::new(0)),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.engine.config
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
        (self.weights.bytes(), self.kv.bytes())
    }

    /// Runs a batch. All ranks call it with the same batch; each gets the logits of its own tokens. After an error
    /// of the collective the KV cache holds the batch's rows in some layers only: run it again in a new group.
    ///
    /// # Errors
    /// A batch that breaks a rule ([`ModelError::Batch`], nothing was changed), or a collective that failed.
    ///
    /// # Panics
    /// When the collective is of another group size or rank than the decoder.
    pub fn forward(
        &mut self,
        batch: &Batch<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Logits<'_>, ModelError> {
        let engine = &self.engine;
        let place = (collective.rank(), collective.n_ranks());
        assert_eq!(place, (engine.rank, engine.plan.n_ranks()), "the collective is for this decoder");
        batch.check(&self.limits, &mut self.scratch.last_position)?;
        let rows: Vec<KvRow<'_>> = batch
            .positions
            .iter()
            .zip(batch.sequence_of_row)
            .map(|(position, sequence)| KvRow {
                position: *position,
                block_table: batch.block_tables[*sequence as usize],
            })
            .collect();
        engine.embed(batch, &mut self.scratch)?;
        engine.rope.angles(batch.positions.iter().copied(), &mut self.scratch.angles);
        for layer in 0..engine.config.n_layers {
            self.attend(layer, &rows, collective)?;
            self.feed_forward(layer, rows.len(), collective)?;
            self.layers_done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(self.output(batch.output_rows))
    }

    /// The first half of a layer: attention, added to the residual stream.
    fn attend(
        &mut self,
        layer: usize,
        rows: &[KvRow<'_>],
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let (engine, scratch, weights) = (&self.engine, &mut self.scratch, &self.weights.layers[layer]);
        let partials = match &weights.attention {
            None => 0,
            Some(attention_weights) => {
                engine.normalize(&weights.attention_norm, rows.len(), scratch);
                engine.project_attention(attention_weights, rows.len(), scratch);
                let n_kv = rows.len() * engine.kv_width();
                let new = NewKv { rows, keys: &scratch.key[..n_kv], values: &scratch.value[..n_kv] };
                let kv = self.kv.layer_mut(layer);
                kv.store(engine.kernels, &engine.pool, &new);
                let n_query = rows.len() * engine.query_width();
                let args = AttentionArgs {
                    q: &scratch.query[..n_query],
                    rows,
                    kv,
                    kv_of_head: &engine.kv_of_head,
                    scale: 1.0 / (engine.config.head_dim as f32).sqrt(),
                    window: engine.config.window_of_layer(layer).map(|window| window as u32),
                };
                let out = &mut scratch.attended[..n_query];
                attention(engine.kernels, &engine.pool, &args, &mut self.attention_scratch, out);
                let input = (&scratch.attended[..n_query], engine.query_width());
                engine.reduce_columns(
                    &attention_weights.output,
                    input,
                    &mut scratch.quantized,
                    &mut scratch.partials,
                )
            }
        };
        engine.add_reduced(&engine.plan.attention().tree, partials, rows.len(), scratch, collective)
    }

    /// The second half of a layer: the feed-forward network, added to the residual stream.
    fn feed_forward(
        &mut self,
        layer: usize,
        n_rows: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let (engine, scratch, weights) = (&self.engine, &mut self.scratch, &self.weights.layers[layer]);
        let partials = match &weights.ffn {
            None => 0,
            Some(FfnWeights { gate, up, down }) => {
                engine.normalize(&weights.ffn_norm, n_rows, scratch);
                let n_hidden = n_rows * engine.plan.share(engine.rank).ffn.len();
                let normed = (&scratch.normed[..n_rows * engine.config.n_embd], engine.config.n_embd);
                let quantized = &mut scratch.quantized;
                engine.quantize_if_needed(&[gate, up], normed, quantized);
                engine.multiply(gate, normed.0, quantized, &mut scratch.gate[..n_hidden]);
                engine.multiply(up, normed.0, quantized, &mut scratch.up[..n_hidden]);
                silu_mul(
                    engine.kernels,
                    &engine.pool,
                    &mut scratch.gate[..n_hidden],
                    &scratch.up[..n_hidden],
                );
                let input = (&scratch.gate[..n_hidden], down.n_cols());
                engine.reduce_columns(down, input, quantized, &mut scratch.partials)
            }
        };
        engine.add_reduced(&engine.plan.ffn().tree, partials, n_rows, scratch, collective)
    }

    /// Final norm and output head of the asked rows.
    fn output(&mut self, output_rows: &[usize]) -> Logits<'_> {
        let (engine, scratch) = (&self.engine, &mut self.scratch);
        let vocab_range = engine.plan.share(engine.rank).vocab.clone();
        let n_embd = engine.config.n_embd;
        let n_logits = output_rows.len() * vocab_range.len();
        if let (Some(head), true) = (&self.weights.head, n_logits > 0) {
            let chosen = &mut scratch.chosen[..output_rows.len() * n_embd];
            for (row, chosen) in output_rows.iter().zip(chosen.chunks_exact_mut(n_embd)) {
                chosen.copy_from_slice(&scratch.hidden[row * n_embd..][..n_embd]);
            }
            let normed = &mut scratch.chosen_normed[..output_rows.len() * n_embd];
            let norm = RmsNorm { weight: &self.weights.output_norm, eps: engine.config.rms_eps };
            rms_norm(engine.kernels, &engine.pool, &norm, chosen, normed);
            engine.quantize_if_needed(&[head], (normed, n_embd), &mut scratch.quantized);
            engine.multiply(head, normed, &scratch.quantized, &mut scratch.logits[..n_logits]);
        }
        Logits { values: &scratch.logits[..n_logits], vocab_range }
    }
}

/// An input of a matrix product and the length of its rows.
type Rows<'a> = (&'a [f32], usize);

impl Engine {
    fn query_width(&self) -> usize {
        self.kv_of_head.len() * self.config.head_dim
    }

    fn kv_width(&self) -> usize {
        self.plan.share(self.rank).kv_heads.len() * self.config.head_dim
    }

    /// Looks the tokens' rows up in the file.
    fn embed(&self, batch: &Batch<'_>, scratch: &mut Scratch) -> Result<(), ModelError> {
        let name = names::name(Part::Embedding, self.checkpoint.format(), 0);
        let view =
            self.checkpoint.tensor(&name).expect("invariant: the embedding was there when it was loaded");
        let n_embd = self.config.n_embd;
        let hidden = &mut scratch.hidden[..batch.n_rows() * n_embd];
        for (token, row) in batch.tokens.iter().zip(hidden.chunks_exact_mut(n_embd)) {
            dequantize_row(view.weight_type(), view.row(token.idx()), row);
        }
        Ok(())
    }

    fn normalize(&self, weight: &[f32], n_rows: usize, scratch: &mut Scratch) {
        let n = n_rows * self.config.n_embd;
        let norm = RmsNorm { weight, eps: self.config.rms_eps };
        rms_norm(self.kernels, &self.pool, &norm, &scratch.hidden[..n], &mut scratch.normed[..n]);
    }

    /// Queries, keys and values with biases, rotated.
    fn project_attention(&self, weights: &AttentionWeights, n_rows: usize, scratch: &mut Scratch) {
        let (n_query, n_kv) = (n_rows * self.query_width(), n_rows * self.kv_width());
        let Scratch { normed, quantized, query, key, value, angles, .. } = scratch;
        let normed = &normed[..n_rows * self.config.n_embd];
        let matrices = [&weights.query.matrix, &weights.key.matrix, &weights.value.matrix];
        self.quantize_if_needed(&matrices, (normed, self.config.n_embd), quantized);
        self.project(&weights.query, normed, quantized, &mut query[..n_query]);
        self.project(&weights.key, normed, quantized, &mut key[..n_kv]);
        self.project(&weights.value, normed, quantized, &mut value[..n_kv]);
        for heads in [&mut query[..n_query], &mut key[..n_kv]] {
            self.rope.rotate(self.kernels, &self.pool, angles, heads, self.config.head_dim);
        }
    }

    fn project(&self, projection: &Projection, normed: &[f32], quantized: &QuantizedRows, out: &mut [f32]) {
        self.multiply(&projection.matrix, normed, quantized, out);
        if let Some(bias) = &projection.bias {
            add_bias(self.kernels, &self.pool, out, bias);
        }
    }

    /// Multiplies with a matrix whose columns are cut; returns how many values of `partials` are filled.
    fn reduce_columns(
        &self,
        matrix: &PackedMatrix,
        (x, n_cols): Rows<'_>,
        quantized: &mut QuantizedRows,
        partials: &mut [f32],
    ) -> usize {
        self.quantize_if_needed(&[matrix], (x, n_cols), quantized);
        let n_partials = matrix.n_subtrees() * (x.len() / n_cols) * matrix.n_rows();
        self.multiply(matrix, x, quantized, &mut partials[..n_partials]);
        n_partials
    }

    /// Finishes the sum over all ranks and adds it to the residual stream.
    fn add_reduced(
        &self,
        tree: &paceline_domain::ReduceTree,
        n_partials: usize,
        n_rows: usize,
        scratch: &mut Scratch,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let n = n_rows * self.config.n_embd;
        collective.all_reduce_tree(tree, &scratch.partials[..n_partials], &mut scratch.normed[..n])?;
        add_into(self.kernels, &self.pool, &mut scratch.hidden[..n], &scratch.normed[..n]);
        Ok(())
    }

    fn quantize_if_needed(
        &self,
        matrices: &[&PackedMatrix],
        (x, n_cols): Rows<'_>,
        rows: &mut QuantizedRows,
    ) {
        if matrices.iter().any(|matrix| matrix.input_kind() == InputKind::Quantized) {
            quantize_rows(self.kernels, &self.pool, x, n_cols, rows);
        }
    }

    /// `x` for matrices of plain numbers, `quantized` for the others.
    fn multiply(&self, matrix: &PackedMatrix, x: &[f32], quantized: &QuantizedRows, out: &mut [f32]) {
        let input = match matrix.input_kind() {
            InputKind::Quantized => Input::Quantized(quantized),
            InputKind::Float => Input::Float { x, n_rows: x.len() / matrix.n_cols() },
        };
        matmul(self.kernels, &self.pool, matrix, input, out);
    }
}
