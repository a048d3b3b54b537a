//! A rank's weights on the device: what belongs together is one matrix, so that it is one launch. Nothing is launched here.

use std::borrow::Cow;
use std::ops::Range;

use paceline_domain::reduce_tree::maximal_subtrees;
use paceline_kernels::{PackSpec, ThreadPool};
use paceline_model::names::Part;
use paceline_model::weights::{AttentionRows, FfnRows, MatrixRows, Packer, ProjectionRows};
use paceline_model::{ModelError, loader::Loader};

use crate::kernels::linear::Matrix;
use crate::pack::{Arrangement, Kind, Packed, Rows, TILE_ROWS, outline, pack};
use crate::{CudaError, DevicePtr, Runtime};

/// A matrix on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GpuMatrix {
    pub kind: Kind,
    pub matrix: Matrix,
    /// Output rows; for gate and up together, features.
    pub n_outputs: usize,
}

/// Some neighbouring columns of the queries, keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Projection {
    pub matrix: GpuMatrix,
    /// Its place in a row of queries, keys and values.
    pub first_output: usize,
    /// `[n_outputs]` f32, or 0.
    pub bias: DevicePtr,
}

/// The columns of a row-parallel matrix that make one subtree of the sum over ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subtree {
    pub matrix: GpuMatrix,
    /// Its first column, of the rank's.
    pub first_column: usize,
}

/// The projections around attention.
pub(crate) struct GpuAttention {
    pub inputs: Vec<Projection>,
    pub output: Vec<Subtree>,
}

/// Gate and up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum GateUp {
    /// Interleaved in one matrix.
    Fused(GpuMatrix),
    /// Of two types, so two matrices.
    Apart([GpuMatrix; 2]),
}

/// The feed-forward network.
pub(crate) struct GpuFfn {
    pub gate_up: GateUp,
    pub down: Vec<Subtree>,
}

/// Who packs.
#[derive(Clone, Copy)]
pub(crate) enum Packing<'a> {
    /// These threads.
    Threads(&'a ThreadPool),
    /// Nobody: memory is taken, and no weight is read.
    OutlineOnly,
}

/// Packs on the host and copies to the device.
pub(crate) struct GpuPacker<'a> {
    pub runtime: &'a mut dyn Runtime,
    pub packing: Packing<'a>,
    /// Bytes of matrices on the device so far.
    pub n_bytes: usize,
    /// The whole table of embeddings; a tied head that is whole too is the same matrix.
    pub embedding: Option<GpuMatrix>,
}

pub(crate) fn model_error(error: CudaError) -> ModelError {
    ModelError::Device { kind: error.kind(), problem: error.to_string() }
}

impl<'a> GpuPacker<'a> {
    /// Puts the table of embeddings on the device.
    pub(crate) fn load_embedding(&mut self, loader: &Loader<'_>) -> Result<GpuMatrix, ModelError> {
        let rows = loader.embedding()?;
        let embedding = self.stacked(&[&rows])?;
        self.embedding = Some(embedding);
        Ok(embedding)
    }

    /// Copies f32 values to the device.
    pub(crate) fn vector(&mut self, values: &[f32]) -> Result<DevicePtr, ModelError> {
        self.bytes(bytemuck::cast_slice(values)).map_err(model_error)
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<DevicePtr, CudaError> {
        let to = self.runtime.alloc(bytes.len())?;
        self.runtime.upload(to, bytes)?;
        Ok(to)
    }

    fn matrix(
        &mut self,
        arrangement: &Arrangement<'_>,
        columns: Range<usize>,
        n_outputs: usize,
    ) -> Result<GpuMatrix, ModelError> {
        let packed = match self.packing {
            Packing::Threads(pool) => pack(arrangement, columns, pool),
            Packing::OutlineOnly => outline(arrangement, columns),
        };
        self.upload(&packed, n_outputs).map_err(model_error)
    }

    fn upload(&mut self, packed: &Packed, n_outputs: usize) -> Result<GpuMatrix, CudaError> {
        let tiles = self.runtime.alloc(packed.n_bytes())?;
        self.runtime.upload(tiles, &packed.bytes)?;
        self.n_bytes += packed.n_bytes();
        let matrix = Matrix {
            tiles,
            tile_bytes: packed.tile_bytes as i64,
            n_tiles: packed.n_tiles as i32,
            n_units: packed.n_units as i32,
            n_supers: packed.n_supers as i32,
            first_group: packed.first_group as i32,
        };
        Ok(GpuMatrix { kind: packed.kind, matrix, n_outputs })
    }

    /// Whole rows of one or several matrices, one below the other.
    fn stacked(&mut self, parts: &[&MatrixRows<'_>]) -> Result<GpuMatrix, ModelError> {
        let n_outputs = parts.iter().map(|rows| rows.spec().n_rows).sum();
        let columns = parts[0].spec().k_range.clone();
        let sources: Vec<_> = parts.iter().map(|rows| |row: usize| rows.row(row)).collect();
        let rows: Vec<Rows<'_>> =
            parts.iter().zip(&sources).map(|(rows, source)| rows_of(rows.spec(), source)).collect();
        self.matrix(&Arrangement::Stacked(&rows), columns, n_outputs)
    }

    /// One matrix for each of the rank's subtrees of the sum over columns.
    fn subtrees(&mut self, rows: &MatrixRows<'_>) -> Result<Vec<Subtree>, ModelError> {
        let spec = rows.spec();
        let leaves = spec.first_leaf..spec.first_leaf + spec.n_leaves();
        let source = |row: usize| rows.row(row);
        let parts = [rows_of(spec, &source)];
        let subtree = |leaves: Range<usize>| {
            let edge = |leaf: usize| spec.leaf_edges[leaf - spec.first_leaf];
            let columns = edge(leaves.start)..edge(leaves.end);
            let first_column = columns.start - spec.k_range.start;
            let matrix = self.matrix(&Arrangement::Stacked(&parts), columns, spec.n_rows)?;
            Ok(Subtree { matrix, first_column })
        };
        maximal_subtrees(spec.n_total_leaves, leaves).into_iter().map(subtree).collect()
    }

    fn gate_up(&mut self, gate: &MatrixRows<'_>, up: &MatrixRows<'_>) -> Result<GateUp, ModelError> {
        if Kind::of(gate.spec().weight_type) != Kind::of(up.spec().weight_type) {
            return Ok(GateUp::Apart([self.stacked(&[gate])?, self.stacked(&[up])?]));
        }
        let (gate_row, up_row) = (|row: usize| gate.row(row), |row: usize| up.row(row));
        let pair = [rows_of(gate.spec(), &gate_row), rows_of(up.spec(), &up_row)];
        let (columns, n_features) = (gate.spec().k_range.clone(), gate.spec().n_rows);
        Ok(GateUp::Fused(self.matrix(&Arrangement::Gated(pair), columns, n_features)?))
    }
}

fn rows_of<'a>(spec: &PackSpec, row: &'a (dyn Fn(usize) -> Cow<'a, [u8]> + Sync)) -> Rows<'a> {
    Rows { weight_type: spec.weight_type, n_rows: spec.n_rows, row }
}

impl Packer for GpuPacker<'_> {
    type Attention = GpuAttention;
    type Ffn = GpuFfn;
    type Head = GpuMatrix;

    fn attention(&mut self, rows: &AttentionRows<'_>) -> Result<GpuAttention, ModelError> {
        let parts = [&rows.query, &rows.key, &rows.value];
        let (mut inputs, mut first_output, mut rest) = (Vec::new(), 0, &parts[..]);
        while let Some(first) = rest.first() {
            // Tiles of a matrix hold whole multiples of 16 rows, or neighbours would share one: they may.
            let kind = Kind::of(first.matrix.spec().weight_type);
            let n_alike = rest.iter().take_while(|it| Kind::of(it.matrix.spec().weight_type) == kind).count();
            let (alike, others) = rest.split_at(n_alike);
            let matrices: Vec<&MatrixRows<'_>> = alike.iter().map(|it| &it.matrix).collect();
            let matrix = self.stacked(&matrices)?;
            let bias = self.bias(alike)?;
            inputs.push(Projection { matrix, first_output, bias });
            first_output += matrix.n_outputs;
            rest = others;
        }
        Ok(GpuAttention { inputs, output: self.subtrees(&rows.output)? })
    }

    fn ffn(&mut self, rows: &FfnRows<'_>) -> Result<GpuFfn, ModelError> {
        Ok(GpuFfn { gate_up: self.gate_up(&rows.gate, &rows.up)?, down: self.subtrees(&rows.down)? })
    }

    fn head(&mut self, rows: &MatrixRows<'_>) -> Result<GpuMatrix, ModelError> {
        match self.embedding {
            Some(embedding)
                if rows.part() == Part::Embedding
                    && !rows.is_requantized()
                    && rows.spec().n_rows == embedding.n_outputs =>
            {
                Ok(embedding)
            }
            _ => self.stacked(&[rows]),
        }
    }
}

impl GpuPacker<'_> {
    /// The biases of neighbouring projections, one after the other; 0 when there are none.
    fn bias(&mut self, projections: &[&ProjectionRows<'_>]) -> Result<DevicePtr, ModelError> {
        if projections.iter().all(|projection| projection.bias.is_none()) {
            return Ok(0);
        }
        let of = |projection: &&ProjectionRows<'_>| {
            projection.bias.clone().unwrap_or_else(|| vec![0.0; projection.matrix.spec().n_rows])
        };
        let biases: Vec<f32> = projections.iter().flat_map(of).collect();
        self.vector(&biases)
    }
}

/// Columns of a row of activations that kernels read: whole units.
pub(crate) fn padded(n_columns: usize) -> usize {
    n_columns.next_multiple_of(crate::pack::UNIT_COLUMNS)
}

const _: () = assert!(TILE_ROWS == 16, "a tile is the M of mma.m16n8k16");
