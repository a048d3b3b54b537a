//! The operations of a forward pass on a CPU: which kernel works on which buffer.

use std::ops::Range;

use paceline_collectives::Collective;
use paceline_domain::{BlockId, TokenId};
use paceline_kernels::argmax::argmax;
use paceline_kernels::attention::{AttentionArgs, attention};
use paceline_kernels::elementwise::add_into;
use paceline_kernels::kv::{KvLayer, NewKv};
use paceline_kernels::linear::{announce, announce_gated};
use paceline_kernels::residual::{Residual, add_norm_quantize};
use paceline_kernels::rms_norm::RmsNorm;
use paceline_kernels::{
    GatedOutput, Input, InputKind, PackedMatrix, Product, dequantize_row, gated_matmul, matmul, quantize_rows,
};
use paceline_sampling::Candidate;

use super::scratch::Scratch;
use super::weights::{AttentionWeights, CpuWeights, FfnWeights};
use super::{CpuBackend, Engine};
use crate::ModelError;
use crate::backend::{Backend, Half, Pass};
use crate::batch::Batch;
use crate::logits::{Choice, Columns, LogitRows};
use crate::names::{self, Part};

impl Backend for CpuBackend {
    fn name(&self) -> String {
        self.engine.kernels.isa().name().into()
    }

    fn device_numerics(&self) -> u32 {
        0
    }

    fn memory_bytes(&self) -> (usize, usize) {
        (self.weights.bytes(), self.kv.bytes())
    }

    fn copies_blocks(&self) -> bool {
        true
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), ModelError> {
        self.kv.copy_block(from, to);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError> {
        self.rows.take(batch);
        self.engine.embed(batch.tokens, &mut self.scratch);
        self.engine.rope.angles(batch.positions.iter().copied(), &mut self.scratch.angles);
        Ok(Pass::Run)
    }

    fn normalize(&mut self, layer: usize, half: Half) -> Result<(), ModelError> {
        let (engine, weights) = (&self.engine, &self.weights.layers[layer]);
        let n = self.rows.len() * engine.config.n_embd;
        let Scratch { hidden, normed, quantized, .. } = &mut self.scratch;
        let (weight, is_wanted, bits) = match half {
            Half::Attention => {
                let inputs = weights.attention.iter().flat_map(AttentionWeights::inputs);
                (&weights.attention_norm, want_quantized(inputs), engine.bits.attention_input)
            }
            Half::Ffn => {
                let inputs = weights.ffn.iter().flat_map(|ffn| ffn.gate_up.matrices());
                (&weights.ffn_norm, want_quantized(inputs), engine.bits.ffn_input)
            }
        };
        let rows = Residual {
            hidden: &mut hidden[..n],
            normed: &mut normed[..n],
            add: layer > 0 || half == Half::Ffn,
            quantized: is_wanted.then_some((quantized, bits)),
        };
        engine.normalize(weight, rows);
        Ok(())
    }

    fn project(&mut self, layer: usize) -> Result<(), ModelError> {
        let (engine, weights) = (&self.engine, attention_of(&self.weights, layer));
        let rows = self.rows.for_kernels();
        announce(&engine.pool, &[&weights.output]);
        engine.project_attention(weights, rows.len(), &mut self.scratch);
        let Scratch { key, value, .. } = &self.scratch;
        let (kv, width) = (self.kv.layer_mut(layer), engine.kv_width());
        let store = |kv: &mut KvLayer, range: Range<usize>| {
            let elements = range.start * width..range.end * width;
            let (keys, values) = (&key[elements.clone()], &value[elements]);
            kv.store(engine.kernels, &engine.pool, &NewKv { rows: &rows[range], keys, values });
        };
        let n_before = rows.len() - self.rows.copies.len();
        store(kv, 0..n_before);
        if n_before < rows.len() {
            self.rows.copies.iter().for_each(|copy| kv.copy_block(copy.from, copy.to));
            store(kv, n_before..rows.len());
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<(), ModelError> {
        let engine = &self.engine;
        let rows = self.rows.for_kernels();
        let n_query = rows.len() * engine.query_width();
        let Scratch { query, attended, .. } = &mut self.scratch;
        let args = AttentionArgs {
            q: &query[..n_query],
            rows: &rows,
            kv: self.kv.layer(layer),
            kv_of_head: &engine.kv_of_head,
            scale: 1.0 / (engine.config.head_dim as f32).sqrt(),
            window: engine.config.window_of_layer(layer).map(|window| window as u32),
        };
        let attended = &mut attended[..n_query];
        attention(engine.kernels, &engine.pool, &args, &mut self.attention_scratch, attended);
        Ok(())
    }

    fn output(&mut self, layer: usize) -> Result<(), ModelError> {
        let (engine, n_rows) = (&self.engine, self.rows.len());
        let matrix = &attention_of(&self.weights, layer).output;
        let Scratch { attended, quantized, partials, .. } = &mut self.scratch;
        let attended = &attended[..n_rows * engine.query_width()];
        if matrix.input_kind() == InputKind::Quantized {
            let shape = (engine.query_width(), engine.bits.attention_output);
            quantize_rows(engine.kernels, &engine.pool, attended, shape, quantized);
        }
        if let Some(FfnWeights { gate_up, .. }) = &self.weights.layers[layer].ffn {
            announce_gated(&engine.pool, gate_up);
        }
        engine.sum_columns(matrix, Input { n_rows, quantized: Some(quantized), float: attended }, partials);
        Ok(())
    }

    fn gate_up(&mut self, layer: usize) -> Result<(), ModelError> {
        let (engine, n_rows) = (&self.engine, self.rows.len());
        let FfnWeights { gate_up, down } = ffn_of(&self.weights, layer);
        let Scratch { normed, quantized, ffn_hidden, ffn_hidden_quantized, .. } = &mut self.scratch;
        let float = &normed[..n_rows * engine.config.n_embd];
        let input = Input { n_rows, quantized: Some(quantized), float };
        let out = match down.input_kind() {
            InputKind::Quantized => GatedOutput::Quantized(ffn_hidden_quantized, engine.bits.ffn_hidden),
            InputKind::Float => GatedOutput::Float(&mut ffn_hidden[..n_rows * down.n_cols()]),
        };
        announce(&engine.pool, &[down]);
        gated_matmul(engine.kernels, &engine.pool, input, gate_up, out);
        Ok(())
    }

    fn down(&mut self, layer: usize) -> Result<(), ModelError> {
        let (engine, n_rows) = (&self.engine, self.rows.len());
        let down = &ffn_of(&self.weights, layer).down;
        let Scratch { ffn_hidden, ffn_hidden_quantized, partials, .. } = &mut self.scratch;
        self.weights.announce_after(layer, &engine.pool);
        let float = &ffn_hidden[..n_rows * down.n_cols()];
        engine.sum_columns(down, Input { n_rows, quantized: Some(ffn_hidden_quantized), float }, partials);
        Ok(())
    }

    fn reduce(&mut self, half: Half, collective: &mut dyn Collective) -> Result<(), ModelError> {
        let (engine, Scratch { partials, normed, .. }) = (&self.engine, &mut self.scratch);
        if collective.n_ranks() == 1 {
            // The one subtree is the whole tree.
            std::mem::swap(partials, normed);
            return Ok(());
        }
        let tree = match half {
            Half::Attention => &engine.plan.attention().tree,
            Half::Ffn => &engine.plan.ffn().tree,
        };
        let n = self.rows.len() * engine.config.n_embd;
        let n_partials = tree.subtrees(engine.rank).len() * n;
        collective.all_reduce_tree(tree, &partials[..n_partials], &mut normed[..n])?;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        let n = self.rows.len() * self.engine.config.n_embd;
        let Scratch { hidden, normed, .. } = &mut self.scratch;
        add_into(self.engine.kernels, &self.engine.pool, &mut hidden[..n], &normed[..n]);
        Ok(())
    }

    fn logits(&mut self) -> Result<(), ModelError> {
        let (engine, output_rows) = (&self.engine, &self.rows.output_rows);
        let Some(head) = &self.weights.head else { return Ok(()) };
        let n_embd = engine.config.n_embd;
        let n = output_rows.len() * n_embd;
        let Scratch { hidden, chosen, chosen_normed, quantized, logits, .. } = &mut self.scratch;
        for (row, chosen) in output_rows.iter().zip(chosen.chunks_exact_mut(n_embd)) {
            chosen.copy_from_slice(&hidden[row * n_embd..][..n_embd]);
        }
        let is_wanted = want_quantized([head]);
        let rows = Residual {
            hidden: &mut chosen[..n],
            normed: &mut chosen_normed[..n],
            add: false,
            quantized: is_wanted.then_some((&mut *quantized, engine.bits.head)),
        };
        engine.normalize(&self.weights.output_norm, rows);
        let float = &chosen_normed[..n];
        let input = Input { n_rows: output_rows.len(), quantized: Some(quantized), float };
        let out = &mut logits[..output_rows.len() * head.n_rows()];
        matmul(engine.kernels, &engine.pool, input, [Product { matrix: head, bias: None, out }]);
        Ok(())
    }
}

impl LogitRows for CpuBackend {
    fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
        Ok(self.logits_of(row))
    }

    fn best(
        &mut self,
        columns: Columns,
        choices: &[Choice<'_>],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        best.clear();
        best.resize(choices.len(), Candidate { value: f32::NEG_INFINITY, token: TokenId(0) });
        let one_choice = 1;
        self.engine.pool.run_pieces(best, one_choice, &|i, best| {
            best[0] = self.best_of(columns, &choices[i]);
        });
        Ok(())
    }
}

impl CpuBackend {
    fn logits_of(&self, row: usize) -> &[f32] {
        let n_vocab = self.engine.plan.share(self.engine.rank).vocab.len();
        &self.scratch.logits[row * n_vocab..][..n_vocab]
    }

    /// What [`Choice::best_of`] finds; faster where nothing is added to the logits.
    fn best_of(&self, columns: Columns, choice: &Choice<'_>) -> Candidate {
        let row = self.logits_of(choice.row);
        if choice.sampling.temperature != 0.0 || !choice.is_plain() {
            return choice.best_of(columns, row);
        }
        let largest = argmax(self.engine.kernels, &row[..columns.n_usable]);
        match largest.filter(|column| row[*column] > f32::NEG_INFINITY) {
            Some(column) => {
                Candidate { value: row[column], token: TokenId(columns.first_token.0 + column as u32) }
            }
            None => Candidate { value: f32::NEG_INFINITY, token: columns.first_token },
        }
    }
}

fn attention_of(weights: &CpuWeights, layer: usize) -> &AttentionWeights {
    weights.layers[layer].attention.as_ref().expect("invariant: a rank without heads runs no attention")
}

fn ffn_of(weights: &CpuWeights, layer: usize) -> &FfnWeights {
    weights.layers[layer]
        .ffn
        .as_ref()
        .expect("invariant: a rank without columns runs no feed-forward network")
}

/// Whether one of the matrices that follow multiplies quantized rows.
fn want_quantized<'a>(matrices: impl IntoIterator<Item = &'a PackedMatrix>) -> bool {
    matrices.into_iter().any(|matrix| matrix.input_kind() == InputKind::Quantized)
}

impl Engine {
    fn query_width(&self) -> usize {
        self.kv_of_head.len() * self.config.head_dim
    }

    fn kv_width(&self) -> usize {
        self.plan.share(self.rank).kv_heads.len() * self.config.head_dim
    }

    /// Looks the tokens' rows up in the file.
    fn embed(&self, tokens: &[TokenId], scratch: &mut Scratch) {
        let name = names::name(Part::Embedding, self.checkpoint.format(), 0);
        let view =
            self.checkpoint.tensor(&name).expect("invariant: the embedding was there when it was loaded");
        let n_embd = self.config.n_embd;
        let hidden = &mut scratch.hidden[..tokens.len() * n_embd];
        for (token, row) in tokens.iter().zip(hidden.chunks_exact_mut(n_embd)) {
            dequantize_row(view.weight_type(), view.row(token.idx()), row);
        }
    }

    /// Adds what the half layer before left, normalizes, quantizes, as `rows` says.
    fn normalize(&self, weight: &[f32], rows: Residual<'_>) {
        let norm = RmsNorm { weight, eps: self.config.rms_eps };
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

    /// Multiplies with a matrix whose columns are cut: one sum for each subtree.
    fn sum_columns(&self, matrix: &PackedMatrix, input: Input<'_>, partials: &mut [f32]) {
        let n_partials = matrix.n_subtrees() * input.n_rows * matrix.n_rows();
        let product = Product { matrix, bias: None, out: &mut partials[..n_partials] };
        matmul(self.kernels, &self.pool, input, [product]);
    }
}
