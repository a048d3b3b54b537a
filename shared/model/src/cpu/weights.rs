//! A rank's matrices as the CPU kernels want them. Nothing is multiplied here.

use paceline_kernels::linear::announce;
use paceline_kernels::{GateUp, PackedMatrix, ThreadPool};

use crate::ModelError;
use crate::weights::{AttentionRows, FfnRows, LayerWeights, MatrixRows, Packer, ProjectionRows, Weights};

/// All weights of one rank.
pub(super) type CpuWeights = Weights<AttentionWeights, FfnWeights, PackedMatrix>;

/// Projections around attention.
pub(super) struct AttentionWeights {
    pub query: Projection,
    pub key: Projection,
    pub value: Projection,
    pub output: PackedMatrix,
}

/// A matrix with an optional bias.
pub(super) struct Projection {
    pub matrix: PackedMatrix,
    pub bias: Option<Vec<f32>>,
}

/// The gated feed-forward network.
pub(super) struct FfnWeights {
    pub gate_up: GateUp,
    pub down: PackedMatrix,
}

/// Packs with the threads that will multiply.
pub(super) struct CpuPacker<'a> {
    pub pool: &'a ThreadPool,
}

impl CpuPacker<'_> {
    fn matrix(&self, rows: &MatrixRows<'_>) -> Result<PackedMatrix, ModelError> {
        Ok(PackedMatrix::pack(rows.spec(), &|row| rows.row(row), self.pool)?)
    }

    fn projection(&self, rows: &ProjectionRows<'_>) -> Result<Projection, ModelError> {
        Ok(Projection { matrix: self.matrix(&rows.matrix)?, bias: rows.bias.clone() })
    }
}

impl Packer for CpuPacker<'_> {
    type Attention = AttentionWeights;
    type Ffn = FfnWeights;
    type Head = PackedMatrix;

    fn attention(&mut self, rows: &AttentionRows<'_>) -> Result<AttentionWeights, ModelError> {
        Ok(AttentionWeights {
            query: self.projection(&rows.query)?,
            key: self.projection(&rows.key)?,
            value: self.projection(&rows.value)?,
            output: self.matrix(&rows.output)?,
        })
    }

    fn ffn(&mut self, rows: &FfnRows<'_>) -> Result<FfnWeights, ModelError> {
        Ok(FfnWeights {
            gate_up: GateUp::pack(
                [rows.gate.spec(), rows.up.spec()],
                [&|row| rows.gate.row(row), &|row| rows.up.row(row)],
                self.pool,
            )?,
            down: self.matrix(&rows.down)?,
        })
    }

    fn head(&mut self, rows: &MatrixRows<'_>) -> Result<PackedMatrix, ModelError> {
        self.matrix(rows)
    }
}

impl AttentionWeights {
    /// The matrices that multiply the input of attention.
    pub(super) fn inputs(&self) -> [&PackedMatrix; 3] {
        [&self.query.matrix, &self.key.matrix, &self.value.matrix]
    }
}

impl CpuWeights {
    /// Bytes of all packed matrices; norms and biases are not counted.
    pub(super) fn bytes(&self) -> usize {
        self.matrices().map(PackedMatrix::bytes).sum()
    }

    /// Tells the pool what is multiplied after a layer.
    pub(super) fn announce_after(&self, layer: usize, pool: &ThreadPool) {
        match (self.layers.get(layer + 1), &self.head) {
            (Some(LayerWeights { attention: Some(attention), .. }), _) => announce(pool, &attention.inputs()),
            (None, Some(head)) => announce(pool, &[head]),
            _ => {}
        }
    }

    fn matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        let attention =
            self.layers.iter().filter_map(|layer| layer.attention.as_ref()).flat_map(|attention| {
                let AttentionWeights { query, key, value, output } = attention;
                [&query.matrix, &key.matrix, &value.matrix, output]
            });
        let ffn = self.layers.iter().filter_map(|layer| layer.ffn.as_ref());
        attention
            .chain(ffn.flat_map(|ffn| ffn.gate_up.matrices().iter().chain([&ffn.down])))
            .chain(&self.head)
    }
}
