//! The operations of a forward pass on a GPU: which kernel works on which buffer.

use paceline_collectives::Collective;
use paceline_model::backend::{Backend, Half, Pass};
use paceline_model::link::{Group, Route};
use paceline_model::{Batch, ModelError};

use super::KERNEL_SET;
use super::buffers::partials_fit;
use super::graphs::{Course, Shape};
use super::weights::{GateUp, GpuMatrix, Subtree, model_error, padded};
use super::{GpuBackend, GpuLayer};
use crate::kernels::attention::{self, AttendArgs, AttendGrid, SPLIT_ROWS, TILE_ROWS, parts, score_factor};
use crate::kernels::linear::{self, EmbedArgs, LinearArgs, SiluArgs, Size};
use crate::kernels::norm::{self, AddNormArgs};
use crate::kernels::rope::{self, RotateStoreArgs};
use crate::kernels::tiles::tokens_of_tile;
use crate::{CudaError, DevicePtr};

/// Bytes of 8 rows of an operand of this many columns.
fn tile_bytes(n_columns: usize) -> i64 {
    (padded(n_columns) * 16) as i64
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        self.runtime.name()
    }

    /// The kernels and the device they run on: another device may round otherwise.
    fn device_numerics(&self) -> u32 {
        let hash = blake3::hash(format!("{KERNEL_SET} {}", self.runtime.name()).as_bytes());
        let [a, b, c, d, ..] = *hash.as_bytes();
        // CPUs have small numbers.
        u32::from_le_bytes([a, b, c, d]) | 1 << 31
    }

    fn memory_bytes(&self) -> (usize, usize) {
        (self.bytes.weights, self.bytes.kv)
    }

    fn join(&mut self, group: &mut Group<'_>) -> Result<Route, ModelError> {
        self.try_join(group)
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError> {
        self.try_begin(batch)
    }

    fn normalize(&mut self, layer: usize, half: Half) -> Result<(), ModelError> {
        let weights = &self.weights.layers[layer];
        let (weight, add) = match half {
            Half::Attention => (weights.attention_norm, layer > 0),
            Half::Ffn => (weights.ffn_norm, true),
        };
        let delta = if add { self.buffers.delta } else { 0 };
        self.add_norm(weight, delta, 0, self.shape.n_rows).map_err(model_error)
    }

    fn project(&mut self, layer: usize) -> Result<(), ModelError> {
        self.try_project(layer).map_err(model_error)
    }

    fn attend(&mut self, layer: usize) -> Result<(), ModelError> {
        self.try_attend(layer).map_err(model_error)
    }

    fn output(&mut self, layer: usize) -> Result<(), ModelError> {
        let (x, width) = (self.buffers.attended, self.widths.query);
        self.partial_sums(|layer| &attention_of(layer).output, layer, x, width).map_err(model_error)
    }

    fn gate_up(&mut self, layer: usize) -> Result<(), ModelError> {
        let gate_up = ffn_of(&self.weights.layers[layer]).gate_up;
        self.try_gate_up(gate_up).map_err(model_error)
    }

    fn down(&mut self, layer: usize) -> Result<(), ModelError> {
        let (x, width) = (self.buffers.gated, self.widths.ffn);
        self.partial_sums(|layer| &ffn_of(layer).down, layer, x, width).map_err(model_error)
    }

    fn reduce(&mut self, half: Half, collective: &mut dyn Collective) -> Result<(), ModelError> {
        self.sum_over_ranks(half, collective)
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        let Some(shape) = self.capturing else { return Ok(()) };
        if shape.n_output_rows > 0 {
            self.try_logits().map_err(model_error)?;
        }
        self.capturing = None;
        self.end_capture(shape).map_err(model_error)?;
        self.has_logits = shape.n_output_rows > 0;
        Ok(())
    }

    fn logits(&mut self) -> Result<(), ModelError> {
        if self.has_logits {
            return Ok(());
        }
        self.try_logits().map_err(model_error)
    }
}

fn attention_of(layer: &GpuLayer) -> &super::GpuAttention {
    layer.attention.as_ref().expect("invariant: only ranks with a head are asked for attention")
}

fn ffn_of(layer: &GpuLayer) -> &super::GpuFfn {
    layer.ffn.as_ref().expect("invariant: only ranks with a share of the network are asked for it")
}

impl GpuBackend {
    fn try_begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError> {
        if self.capturing.take().is_some() {
            // The pass before failed while it was recorded: the recording is of no use.
            let _ = self.runtime.end_capture();
        }
        let (width, most) = (self.widths.widest_query, self.heads.most_per_kv);
        let fits = |n_rows: usize, n_splits: usize| partials_fit(n_rows, n_splits, width);
        let bytes = self.staged.stage(&self.layout, batch, most, fits).map_err(ModelError::Batch)?;
        self.runtime.upload(self.buffers.batch, bytes).map_err(model_error)?;
        self.host_rows.forget();
        self.shape = Shape::exact(&self.staged);
        self.has_logits = false;
        let bucket = Shape::bucket(&self.staged, fits);
        let course = match (self.graphs.as_mut(), bucket) {
            (Some(graphs), Some(bucket)) => graphs.course(bucket),
            _ => Course::Eager,
        };
        match (course, bucket) {
            (Course::Replay(graph), Some(bucket)) => {
                self.runtime.replay(graph).map_err(model_error)?;
                self.has_logits = bucket.n_output_rows > 0;
                return Ok(Pass::Done);
            }
            (Course::Capture, Some(bucket)) => {
                self.runtime.begin_capture().map_err(model_error)?;
                self.shape = bucket;
                self.capturing = Some(bucket);
            }
            _ => {}
        }
        self.embed().map_err(model_error)?;
        Ok(Pass::Run)
    }

    fn end_capture(&mut self, shape: Shape) -> Result<(), CudaError> {
        let graph = self.runtime.end_capture()?;
        if let Some(graphs) = self.graphs.as_mut() {
            graphs.keep(shape, graph);
        }
        tracing::debug!(?shape, "captured a pass");
        self.runtime.replay(graph)
    }

    fn embed(&mut self) -> Result<(), CudaError> {
        let GpuMatrix { kind, matrix, .. } = self.weights.embedding;
        let args = EmbedArgs {
            matrix,
            header: self.addresses.header,
            tokens: self.addresses.tokens,
            hidden: self.buffers.hidden,
            kind: kind.number(),
            n_embd: self.widths.n_embd as i32,
        };
        linear::embed(self.runtime.as_mut(), self.shape.n_rows, &args)
    }

    /// Adds, normalizes; `output_rows` is 0 or the list of rows that are wanted.
    fn add_norm(
        &mut self,
        weight: DevicePtr,
        delta: DevicePtr,
        output_rows: DevicePtr,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let args = AddNormArgs {
            hidden: self.buffers.hidden,
            delta,
            weight,
            normed: self.buffers.normed,
            header: self.addresses.header,
            output_rows,
            n_embd: self.widths.n_embd as u32,
            k_padded: padded(self.widths.n_embd) as u32,
            epsilon: self.config.rms_eps,
            unused: 0,
        };
        norm::add_norm(self.runtime.as_mut(), n_rows, &args)
    }

    /// A product of all columns of an operand.
    fn multiply(&mut self, matrix: &GpuMatrix, args: LinearArgs) -> Result<(), CudaError> {
        let size = Size::of(matrix.kind, args.n_rows as usize, self.runtime.as_ref());
        linear::linear(self.runtime.as_mut(), matrix.kind, size, &args)
    }

    fn try_project(&mut self, layer: usize) -> Result<(), CudaError> {
        let n_inputs = attention_of(&self.weights.layers[layer]).inputs.len();
        for i in 0..n_inputs {
            let projection = attention_of(&self.weights.layers[layer]).inputs[i];
            let args = LinearArgs {
                matrix: projection.matrix.matrix,
                x: self.buffers.normed,
                bias: projection.bias,
                out: self.buffers.qkv + 4 * projection.first_output as u64,
                gated: 0,
                workspace: self.buffers.workspace,
                x_tile_bytes: tile_bytes(self.widths.n_embd),
                n_rows: self.shape.n_rows as i32,
                n_outputs: projection.matrix.n_outputs as i32,
                out_stride: self.widths.qkv() as i32,
                gated_k_padded: 0,
            };
            self.multiply(&projection.matrix, args)?;
        }
        // Rows of split tiles are turned where they are used.
        if self.staged.n_row_tiles > 0 || self.staged.is_scattered { self.rotate(layer) } else { Ok(()) }
    }

    fn rotate(&mut self, layer: usize) -> Result<(), CudaError> {
        let layer = &self.weights.layers[layer];
        let args = RotateStoreArgs {
            qkv: self.buffers.qkv,
            q: self.buffers.query,
            keys: layer.keys,
            values: layer.values,
            rotations: self.buffers.angles,
            header: self.addresses.header,
            positions: self.addresses.positions,
            table_of_row: self.addresses.table_of_row,
            tables: self.addresses.tables,
            n_heads: self.heads.n_heads as u32,
            n_kv_heads: self.heads.n_kv_heads as u32,
            head_dim: self.config.head_dim as u32,
            unused: 0,
        };
        rope::rotate_store(self.runtime.as_mut(), self.shape.n_rows, &args)
    }

    fn try_attend(&mut self, layer: usize) -> Result<(), CudaError> {
        let window = self.window_of_layer(layer);
        let head_dim = self.config.head_dim;
        let layer = &self.weights.layers[layer];
        let args = AttendArgs {
            q: self.buffers.query,
            keys: layer.keys,
            values: layer.values,
            qkv: self.buffers.qkv,
            rotations: self.buffers.angles,
            tiles: self.addresses.split_tiles,
            n_tiles: self.addresses.n_split_tiles,
            tables: self.addresses.tables,
            first_head: self.heads.first_head,
            n_heads_of: self.heads.n_heads_of,
            partial: self.buffers.partial_outputs,
            partial_sums: self.buffers.partial_sums,
            n_done: self.buffers.n_done,
            out: self.buffers.attended,
            n_heads: self.heads.n_heads as u32,
            n_kv_heads: self.heads.n_kv_heads as u32,
            n_splits: self.shape.n_splits as u32,
            parts: 1,
            window,
            k_padded: padded(self.widths.query) as u32,
            factor: score_factor(1.0 / (head_dim as f32).sqrt()),
            unused: 0,
        };
        let group = self.heads.most_per_kv;
        let runtime = self.runtime.as_mut();
        if self.staged.n_split_tiles > 0 {
            let n_tokens = tokens_of_tile(SPLIT_ROWS, group);
            // A graph serves every batch of its shape: then each row may be a tile.
            let n_tiles =
                if self.capturing.is_some() { self.shape.n_rows } else { self.staged.n_split_tiles };
            let grid = AttendGrid { head_dim, n_tiles, n_tokens, n_splits: self.shape.n_splits };
            let args = AttendArgs { parts: parts(n_tokens, group, SPLIT_ROWS), ..args };
            attention::attend_split(runtime, grid, &args)?;
        }
        if self.staged.n_row_tiles > 0 {
            let n_tokens = tokens_of_tile(TILE_ROWS, group);
            let grid = AttendGrid { head_dim, n_tiles: self.staged.n_row_tiles, n_tokens, n_splits: 0 };
            let args = AttendArgs {
                tiles: self.addresses.row_tiles,
                n_tiles: self.addresses.n_row_tiles,
                parts: parts(n_tokens, group, TILE_ROWS),
                ..args
            };
            attention::attend_tiles(runtime, grid, &args)?;
        }
        Ok(())
    }

    /// Multiplies an operand of this width with each subtree of a matrix whose columns are cut.
    fn partial_sums(
        &mut self,
        subtrees: fn(&GpuLayer) -> &[Subtree],
        layer: usize,
        x: DevicePtr,
        width: usize,
    ) -> Result<(), CudaError> {
        let n_subtrees = subtrees(&self.weights.layers[layer]).len();
        (0..n_subtrees).try_for_each(|i| {
            let subtree = subtrees(&self.weights.layers[layer])[i];
            self.partial_sum(i, &subtree, x, width)
        })
    }

    /// Multiplies the columns of a subtree into the `i`-th partial sum.
    fn partial_sum(
        &mut self,
        i: usize,
        subtree: &Subtree,
        x: DevicePtr,
        width: usize,
    ) -> Result<(), CudaError> {
        let n_embd = self.widths.n_embd;
        let args = LinearArgs {
            matrix: subtree.matrix.matrix,
            // A tile of 32 columns has 512 bytes.
            x: x + (subtree.first_column * 16) as u64,
            bias: 0,
            out: self.buffers.delta + (4 * i * self.shape.n_rows * n_embd) as u64,
            gated: 0,
            workspace: self.buffers.workspace,
            x_tile_bytes: tile_bytes(width),
            n_rows: self.shape.n_rows as i32,
            n_outputs: n_embd as i32,
            out_stride: n_embd as i32,
            gated_k_padded: 0,
        };
        self.multiply(&subtree.matrix, args)
    }

    fn try_gate_up(&mut self, gate_up: GateUp) -> Result<(), CudaError> {
        let (ffn, n_rows) = (self.widths.ffn, self.shape.n_rows);
        let of = |matrix: &GpuMatrix, out: DevicePtr, gated: DevicePtr| LinearArgs {
            matrix: matrix.matrix,
            x: self.buffers.normed,
            bias: 0,
            out,
            gated,
            workspace: self.buffers.workspace,
            x_tile_bytes: tile_bytes(self.widths.n_embd),
            n_rows: n_rows as i32,
            n_outputs: ffn as i32,
            out_stride: ffn as i32,
            gated_k_padded: padded(ffn) as i32,
        };
        match gate_up {
            GateUp::Fused(matrix) => {
                let args = of(&matrix, 0, self.buffers.gated);
                self.multiply(&matrix, args)
            }
            GateUp::Apart([gate, up]) => {
                let outs = [self.buffers.gate_up, self.buffers.gate_up + (4 * n_rows * ffn) as u64];
                let [gate_args, up_args] = [of(&gate, outs[0], 0), of(&up, outs[1], 0)];
                self.multiply(&gate, gate_args)?;
                self.multiply(&up, up_args)?;
                let args = SiluArgs {
                    gate: outs[0],
                    up: outs[1],
                    gated: self.buffers.gated,
                    n_rows: n_rows as i32,
                    n_features: ffn as i32,
                    gated_k_padded: padded(ffn) as i32,
                    unused: 0,
                };
                linear::silu_times_up(self.runtime.as_mut(), &args)
            }
        }
    }

    /// The last addition, final norm and head of the rows that are wanted.
    fn try_logits(&mut self) -> Result<(), CudaError> {
        let n_rows = self.shape.n_output_rows;
        let Some(head) = self.weights.head else { return Ok(()) };
        self.add_norm(self.weights.output_norm, self.buffers.delta, self.addresses.output_rows, n_rows)?;
        let args = LinearArgs {
            matrix: head.matrix,
            x: self.buffers.normed,
            bias: 0,
            out: self.buffers.logits,
            gated: 0,
            workspace: self.buffers.workspace,
            x_tile_bytes: tile_bytes(self.widths.n_embd),
            n_rows: n_rows as i32,
            n_outputs: self.widths.vocab as i32,
            out_stride: self.widths.vocab as i32,
            gated_k_padded: 0,
        };
        self.multiply(&head, args)
    }
}
