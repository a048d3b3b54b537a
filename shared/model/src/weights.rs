//! A rank's slices of all tensors, packed straight from the memory map. No full tensor is ever built; nothing is
//! multiplied here.

use paceline_checkpoint::{Checkpoint, TensorView};
use paceline_domain::WeightType;
use paceline_kernels::linear::announce;
use paceline_kernels::{PackSpec, PackedMatrix, ThreadPool, dequantize_row};

use crate::config::PairLayout;
use crate::names::{self, Cut, Part};
use crate::split::RowParallel;
use crate::{ModelConfig, ModelError, SplitPlan};

/// How far loading is, in bytes of the rank's slices in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadProgress {
    /// Bytes packed.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// One decoder layer of one rank. Matrices are absent where the rank's share is empty.
pub(crate) struct LayerWeights {
    pub attention_norm: Vec<f32>,
    /// Absent when the rank has no head.
    pub attention: Option<AttentionWeights>,
    pub ffn_norm: Vec<f32>,
    /// Absent when the rank has no column of the feed-forward network.
    pub ffn: Option<FfnWeights>,
}

/// Projections around attention.
pub(crate) struct AttentionWeights {
    pub query: Projection,
    pub key: Projection,
    pub value: Projection,
    pub output: PackedMatrix,
}

impl AttentionWeights {
    /// The matrices that multiply the input of attention.
    pub(crate) fn inputs(&self) -> [&PackedMatrix; 3] {
        [&self.query.matrix, &self.key.matrix, &self.value.matrix]
    }
}

/// A matrix with an optional bias.
pub(crate) struct Projection {
    pub matrix: PackedMatrix,
    pub bias: Option<Vec<f32>>,
}

/// The gated feed-forward network.
pub(crate) struct FfnWeights {
    pub gate: PackedMatrix,
    pub up: PackedMatrix,
    pub down: PackedMatrix,
}

/// All weights of one rank.
pub(crate) struct Weights {
    pub layers: Vec<LayerWeights>,
    pub output_norm: Vec<f32>,
    /// Absent when the rank has no token.
    pub head: Option<PackedMatrix>,
}

impl Weights {
    /// Bytes of all packed matrices; norms and biases are not counted.
    pub(crate) fn bytes(&self) -> usize {
        self.matrices().map(PackedMatrix::bytes).sum()
    }

    /// Tells the pool what is multiplied after a layer.
    pub(crate) fn announce_after(&self, layer: usize, pool: &ThreadPool) {
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
        attention.chain(ffn.flat_map(|ffn| [&ffn.gate, &ffn.up, &ffn.down])).chain(&self.head)
    }
}

/// What weights are loaded from, and for whom.
pub(crate) struct Loader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub config: &'a ModelConfig,
    pub plan: &'a SplitPlan,
    pub rank: usize,
    pub pool: &'a ThreadPool,
    pub progress: &'a dyn Fn(LoadProgress),
}

/// Counts bytes while they are packed.
struct Meter<'a> {
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl Meter<'_> {
    fn add(&mut self, bytes: usize) {
        self.state.done_bytes += bytes as u64;
        (self.progress)(self.state);
    }
}

impl Loader<'_> {
    /// Loads the rank's slices of every tensor.
    pub(crate) fn load(&self) -> Result<Weights, ModelError> {
        names::check_tensors(self.config, self.checkpoint)?;
        let state = LoadProgress { done_bytes: 0, total_bytes: self.total_bytes()? };
        let mut meter = Meter { progress: self.progress, state };
        meter.add(0);
        let layers = (0..self.config.n_layers)
            .map(|layer| self.layer(layer, &mut meter))
            .collect::<Result<Vec<_>, _>>()?;
        let output_norm = self.vector(Part::OutputNorm, 0, &mut meter)?;
        let head = self.optional_matrix(self.head_part(), Cut::VocabRows, 0, &mut meter)?;
        Ok(Weights { layers, output_norm, head })
    }

    /// The tensor that is the output head.
    fn head_part(&self) -> Part {
        if self.config.tied_embeddings { Part::Embedding } else { Part::Head }
    }

    fn layer(&self, layer: usize, meter: &mut Meter<'_>) -> Result<LayerWeights, ModelError> {
        let share = self.plan.share(self.rank);
        let attention_norm = self.vector(Part::AttentionNorm, layer, meter)?;
        let attention = match share.heads.is_empty() {
            true => None,
            false => Some(AttentionWeights {
                query: self.projection(Part::Query, Part::QueryBias, layer, meter)?,
                key: self.projection(Part::Key, Part::KeyBias, layer, meter)?,
                value: self.projection(Part::Value, Part::ValueBias, layer, meter)?,
                output: self.matrix(Part::AttentionOutput, layer, meter)?,
            }),
        };
        let ffn_norm = self.vector(Part::FfnNorm, layer, meter)?;
        let ffn = match share.ffn.is_empty() {
            true => None,
            false => Some(FfnWeights {
                gate: self.matrix(Part::Gate, layer, meter)?,
                up: self.matrix(Part::Up, layer, meter)?,
                down: self.matrix(Part::Down, layer, meter)?,
            }),
        };
        Ok(LayerWeights { attention_norm, attention, ffn_norm, ffn })
    }

    fn projection(
        &self,
        part: Part,
        bias: Part,
        layer: usize,
        meter: &mut Meter<'_>,
    ) -> Result<Projection, ModelError> {
        let matrix = self.matrix(part, layer, meter)?;
        let bias = if self.config.qkv_bias { Some(self.vector(bias, layer, meter)?) } else { None };
        Ok(Projection { matrix, bias })
    }

    fn matrix(&self, part: Part, layer: usize, meter: &mut Meter<'_>) -> Result<PackedMatrix, ModelError> {
        let matrix = self.optional_matrix(part, names::cut(part), layer, meter)?;
        Ok(matrix.expect("invariant: only ranks with a share of the layer ask for its matrices"))
    }

    /// The rank's slice of a matrix under this cut; `None` when it is empty.
    fn optional_matrix(
        &self,
        part: Part,
        cut: Cut,
        layer: usize,
        meter: &mut Meter<'_>,
    ) -> Result<Option<PackedMatrix>, ModelError> {
        let view = self.view(part, layer)?;
        let slice = self.plan.slice(self.rank, cut, view.shape());
        if slice.is_empty() {
            return Ok(None);
        }
        let spec = match row_parallel(self.plan, cut) {
            Some(columns) => {
                let leaves = columns.tree.leaves(self.rank);
                PackSpec::cut_rows(view.weight_type(), slice.rows.len(), &columns.leaf_edges, leaves)
            }
            None => PackSpec::whole_rows(view.weight_type(), slice.rows.len(), view.n_cols()),
        };
        let (pair_layout, head_dim) = (self.config.rope.pair_layout, self.config.head_dim);
        let row = |row: usize| view.row(file_row(part, pair_layout, head_dim, slice.rows.start + row));
        let packed = PackedMatrix::pack(&spec, &row, self.pool)?;
        self.checkpoint.release(view.name());
        meter.add(slice_bytes(&view, slice.len()));
        Ok(Some(packed))
    }

    /// The rank's slice of a vector as f32.
    fn vector(&self, part: Part, layer: usize, meter: &mut Meter<'_>) -> Result<Vec<f32>, ModelError> {
        let view = self.view(part, layer)?;
        if view.weight_type().is_quantized() {
            let problem = format!("is {}; norms and biases are plain numbers", view.weight_type().name());
            return Err(ModelError::tensor(view.name(), problem));
        }
        let slice = self.plan.slice(self.rank, names::cut(part), view.shape());
        let mut all = vec![0.0; view.shape()[0]];
        dequantize_row(view.weight_type(), view.data(), &mut all);
        meter.add(slice_bytes(&view, slice.len()));
        let (pair_layout, head_dim) = (self.config.rope.pair_layout, self.config.head_dim);
        Ok(slice.rows.map(|row| all[file_row(part, pair_layout, head_dim, row)]).collect())
    }

    fn view(&self, part: Part, layer: usize) -> Result<TensorView<'_>, ModelError> {
        let name = names::name(part, self.checkpoint.format(), layer);
        self.checkpoint
            .tensor(&name)
            .ok_or_else(|| ModelError::tensor(name, "is missing from the checkpoint"))
    }

    fn total_bytes(&self) -> Result<u64, ModelError> {
        let mut total = 0;
        for tensor in names::expected_tensors(self.config, self.checkpoint.format()) {
            let view = self.view(tensor.part, tensor.layer.unwrap_or(0))?;
            let mut cuts: Vec<Cut> = vec![tensor.cut];
            if tensor.part == self.head_part() && tensor.cut != Cut::VocabRows {
                cuts.push(Cut::VocabRows);
            }
            for cut in cuts {
                total += slice_bytes(&view, self.plan.slice(self.rank, cut, view.shape()).len()) as u64;
            }
        }
        Ok(total)
    }
}

/// Where in the file a row is that belongs at `row` when the pairs of every head are in [`PairLayout::Half`] order.
pub(crate) fn file_row(part: Part, pair_layout: PairLayout, head_dim: usize, row: usize) -> usize {
    let is_rotated = matches!(part, Part::Query | Part::Key | Part::QueryBias | Part::KeyBias);
    if pair_layout == PairLayout::Half || !is_rotated {
        return row;
    }
    let (head, element) = (row / head_dim, row % head_dim);
    let (second, pair) = (element / (head_dim / 2), element % (head_dim / 2));
    head * head_dim + 2 * pair + second
}

fn row_parallel(plan: &SplitPlan, cut: Cut) -> Option<&RowParallel> {
    match cut {
        Cut::AttentionColumns => Some(plan.attention()),
        Cut::FfnColumns => Some(plan.ffn()),
        _ => None,
    }
}

/// Bytes of `n` weights of a tensor, to the nearest whole block.
fn slice_bytes(view: &TensorView<'_>, n: usize) -> usize {
    let kind: WeightType = view.weight_type();
    n / kind.block_len() * kind.block_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_pairs_are_gathered_into_halves() {
        let rows = |part: Part| -> Vec<usize> {
            (0..8).map(|row| file_row(part, PairLayout::Interleaved, 4, row)).collect()
        };
        assert_eq!(rows(Part::Query), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(rows(Part::Value), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(file_row(Part::Query, PairLayout::Half, 4, 1), 1);
    }
}
