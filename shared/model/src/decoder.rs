//! The one forward pass of all architectures: norm, attention, norm, gated feed-forward network, with one
//! all-reduce after each half of a layer. It samples nothing and knows no sequences beyond their block tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Collective;
use paceline_domain::Fingerprint;
use paceline_kernels::attention::{AttentionArgs, AttentionScratch, attention};
use paceline_kernels::elementwise::add_into;
use paceline_kernels::kv::{KvRow, NewKv};
use paceline_kernels::linear::{announce, announce_gated};
use paceline_kernels::residual::{Residual, add_norm_quantize};
use paceline_kernels::rms_norm::RmsNorm;
use paceline_kernels::rope::Rope;
use paceline_kernels::{
    CodeBits, GatedOutput, Input, InputKind, Kernels, PackedMatrix, Product, ThreadPool, dequantize_row,
    gated_matmul, matmul, quantize_rows,
};

use crate::activation_bits::ActivationBits;
use crate::batch::{Batch, BatchLimits, Logits};
use crate::estimate::Capacity;
use crate::fingerprint::fingerprint;
use crate::kv_store::KvStore;
use crate::names::{self, Part};
use crate::scratch::{Scratch, ScratchShape};
use crate::weights::{AttentionWeights, FfnWeights, LoadProgress, Loader, Weights};
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
    bits: ActivationBits,
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
            bits: ActivationBits::new(config),
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
        let n = rows.len() * self.engine.config.n_embd;
        let Scratch { hidden, normed, .. } = &mut self.scratch;
        add_into(self.engine.kernels, &self.engine.pool, &mut hidden[..n], &normed[..n]);
        Ok(self.output(batch.output_rows))
    }

    /// The first half of a layer: attention. It adds what the layer before left, and leaves its own sums to be added.
    fn attend(
        &mut self,
        layer: usize,
        rows: &[KvRow<'_>],
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let (engine, scratch, weights) = (&self.engine, &mut self.scratch, &self.weights.layers[layer]);
        let matrices = weights.attention.as_ref().map(AttentionWeights::inputs);
        let bits = engine.bits.attention_input;
        let matrices = matrices.as_slice().as_flattened();
        engine.normalize(&weights.attention_norm, layer > 0, matrices, bits, scratch, rows.len());
        let partials = match &weights.attention {
            None => 0,
            Some(attention_weights) => {
                announce(&engine.pool, &[&attention_weights.output]);
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
                let attended = &mut scratch.attended[..n_query];
                attention(engine.kernels, &engine.pool, &args, &mut self.attention_scratch, attended);
                let output = &attention_weights.output;
                if output.input_kind() == InputKind::Quantized {
                    let shape = (engine.query_width(), engine.bits.attention_output);
                    quantize_rows(engine.kernels, &engine.pool, attended, shape, &mut scratch.quantized);
                }
                if let Some(FfnWeights { gate, up, .. }) = &weights.ffn {
                    announce_gated(&engine.pool, [gate, up]);
                }
                let quantized = Some(&scratch.quantized);
                let input = Input { n_rows: rows.len(), quantized, float: attended };
                engine.reduce_columns(output, input, &mut scratch.partials)
            }
        };
        engine.reduce(&engine.plan.attention().tree, partials, rows.len(), scratch, collective)
    }

    /// The second half of a layer: the feed-forward network. It adds what attention left, and leaves its own sums.
    fn feed_forward(
        &mut self,
        layer: usize,
        n_rows: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let (engine, scratch, weights) = (&self.engine, &mut self.scratch, &self.weights.layers[layer]);
        let matrices = weights.ffn.as_ref().map(|ffn| [&ffn.gate, &ffn.up]);
        let bits = engine.bits.ffn_input;
        engine.normalize(&weights.ffn_norm, true, matrices.as_slice().as_flattened(), bits, scratch, n_rows);
        let partials = match &weights.ffn {
            None => 0,
            Some(FfnWeights { gate, up, down }) => {
                let float = &scratch.normed[..n_rows * engine.config.n_embd];
                let input = Input { n_rows, quantized: Some(&scratch.quantized), float };
                let n_hidden = n_rows * down.n_cols();
                let out = match down.input_kind() {
                    InputKind::Quantized => {
                        GatedOutput::Quantized(&mut scratch.ffn_hidden_quantized, engine.bits.ffn_hidden)
                    }
                    InputKind::Float => GatedOutput::Float(&mut scratch.ffn_hidden[..n_hidden]),
                };
                announce(&engine.pool, &[down]);
                gated_matmul(engine.kernels, &engine.pool, input, [gate, up], out);
                self.weights.announce_after(layer, &engine.pool);
                let quantized = Some(&scratch.ffn_hidden_quantized);
                let input = Input { n_rows, quantized, float: &scratch.ffn_hidden[..n_hidden] };
                engine.reduce_columns(down, input, &mut scratch.partials)
            }
        };
        engine.reduce(&engine.plan.ffn().tree, partials, n_rows, scratch, collective)
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
            let quantized = (head.input_kind() == InputKind::Quantized)
                .then_some((&mut scratch.quantized, engine.bits.head));
            let rows = Residual { hidden: chosen, normed: &mut *normed, add: false, quantized };
            add_norm_quantize(engine.kernels, &engine.pool, &norm, rows);
            let quantized = Some(&scratch.quantized);
            let input = Input { n_rows: output_rows.len(), quantized, float: normed };
            let out = &mut scratch.logits[..n_logits];
            let product = Product { matrix: head, bias: None, out };
            matmul(engine.kernels, &engine.pool, input, [product]);
        }
        Logits { values: &scratch.logits[..n_logits], vocab_range }
    }
}

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

    /// Adds what the half layer before left, normalizes, and quantizes if one of the matrices that follow wants that.
    fn normalize(
        &self,
        weight: &[f32],
        add: bool,
        matrices: &[&PackedMatrix],
        bits: CodeBits,
        scratch: &mut Scratch,
        n_rows: usize,
    ) {
        let n = n_rows * self.config.n_embd;
        let norm = RmsNorm { weight, eps: self.config.rms_eps };
        let is_wanted = matrices.iter().any(|matrix| matrix.input_kind() == InputKind::Quantized);
        let rows = Residual {
            hidden: &mut scratch.hidden[..n],
            normed: &mut scratch.normed[..n],
            add,
            quantized: is_wanted.then_some((&mut scratch.quantized, bits)),
        };
        add_norm_quantize(self.kernels, &self.pool, &norm, rows);
    }

    /// Queries, keys and values with biases, rotated.
    fn project_attention(&self, weights: &AttentionWeights, n_rows: usize, scratch: &mut Scratch) {
        let (n_query, n_kv) = (n_rows * self.query_width(), n_rows * self.kv_width());
        let Scratch { normed, quantized, query, key, value, angles, .. } = scratch;
        let float = &normed[..n_rows * self.config.n_embd];
        let input = Input { n_rows, quantized: Some(quantized), float };
        let AttentionWeights { query: w_query, key: w_key, value: w_value, .. } = weights;
        let outs =
            [(w_query, &mut query[..n_query]), (w_key, &mut key[..n_kv]), (w_value, &mut value[..n_kv])];
        let products = outs.map(|(w, out)| Product { matrix: &w.matrix, bias: w.bias.as_deref(), out });
        matmul(self.kernels, &self.pool, input, products);
        for heads in [&mut query[..n_query], &mut key[..n_kv]] {
            self.rope.rotate(self.kernels, &self.pool, angles, heads, self.config.head_dim);
        }
    }

    /// Multiplies with a matrix whose columns are cut; returns how many values of `partials` are filled.
    fn reduce_columns(&self, matrix: &PackedMatrix, input: Input<'_>, partials: &mut [f32]) -> usize {
        let n_partials = matrix.n_subtrees() * input.n_rows * matrix.n_rows();
        let product = Product { matrix, bias: None, out: &mut partials[..n_partials] };
        matmul(self.kernels, &self.pool, input, [product]);
        n_partials
    }

    /// Finishes the sum over all ranks and leaves it where it will be added to the residual stream.
    fn reduce(
        &self,
        tree: &paceline_domain::ReduceTree,
        n_partials: usize,
        n_rows: usize,
        scratch: &mut Scratch,
        collective: &mut dyn Collective,
    ) -> Result<(), ModelError> {
        let n = n_rows * self.config.n_embd;
        collective.all_reduce_tree(tree, &scratch.partials[..n_partials], &mut scratch.normed[..n])?;
        Ok(())
    }
}
