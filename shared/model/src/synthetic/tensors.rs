//! The tensors of a random model: what each is in the file and how any part of it comes about. A part is a function
//! of the model's seed and its own place alone, so that parts can be made in any order and by any number of threads.

use std::ops::Range;

use paceline_checkpoint::Format;
use paceline_domain::WeightType;

use super::Synthetic;
use super::rows::{Random, fill_floats, fill_row};
use crate::config::{Architecture, PairLayout, RopeScaling};
use crate::names::{Expected, Part, ROPE_FACTORS, expected_tensors};
use crate::rope::llama3_factors;
use crate::weights::RowOrder;

/// A tensor as it will lie in a file: units, of which each is made in one go. A unit is a row of a matrix, or all of
/// a vector.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) weight_type: WeightType,
    pub(super) n_units: usize,
    pub(super) unit_bytes: usize,
    wanted_type: WeightType,
    source: Source,
}

enum Source {
    Matrix(Rows),
    Vector(Rows),
    Given(Vec<u8>),
}

/// Where random rows come from.
struct Rows {
    seed: u64,
    part: Part,
    layer: usize,
    pair_layout: PairLayout,
    head_dim: usize,
}

/// All tensors of a file of this format, in its order.
pub(super) fn tensors(model: &Synthetic, format: Format) -> Vec<Tensor> {
    let interleaved = format == Format::Gguf && model.config.architecture == Architecture::Llama;
    let pair_layout = if interleaved { PairLayout::Interleaved } else { PairLayout::Half };
    let expected = expected_tensors(&model.config, format).into_iter();
    let random = expected.map(|expected| Tensor::random(model, expected, pair_layout));
    let factors = if format == Format::Gguf { freq_factors(model) } else { None };
    random.chain(factors.map(Tensor::factors)).collect()
}

fn freq_factors(model: &Synthetic) -> Option<Vec<f32>> {
    let rope = &model.config.rope;
    match &rope.scaling {
        RopeScaling::Llama3(scaling) => Some(llama3_factors(scaling, rope.theta, model.config.head_dim)),
        RopeScaling::Factors(factors) => Some(factors.clone()),
        RopeScaling::None | RopeScaling::Linear(_) => None,
    }
}

impl Tensor {
    fn random(model: &Synthetic, expected: Expected, pair_layout: PairLayout) -> Self {
        let Expected { part, layer, name, shape, .. } = expected;
        let layer = layer.unwrap_or(0);
        let rows = Rows { seed: model.seed, part, layer, pair_layout, head_dim: model.config.head_dim };
        let (n_units, unit_bytes, wanted_type, weight_type, source) = match shape.get(1) {
            None => (1, 4 * shape[0], WeightType::F32, WeightType::F32, Source::Vector(rows)),
            Some(n_cols) => {
                let wanted_type = (model.weight_type)(part, layer);
                let (weight_type, row_bytes) = fitting(wanted_type, *n_cols);
                (shape[0], row_bytes, wanted_type, weight_type, Source::Matrix(rows))
            }
        };
        Self { name, shape, weight_type, n_units, unit_bytes, wanted_type, source }
    }

    fn factors(factors: Vec<f32>) -> Self {
        let bytes: Vec<u8> = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
        Self {
            name: ROPE_FACTORS.into(),
            shape: vec![factors.len()],
            weight_type: WeightType::F32,
            n_units: 1,
            unit_bytes: bytes.len(),
            wanted_type: WeightType::F32,
            source: Source::Given(bytes),
        }
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.n_units * self.unit_bytes
    }

    /// Its type, when it is not the one that was wanted.
    pub(super) fn replacement(&self) -> Option<WeightType> {
        (self.weight_type != self.wanted_type).then_some(self.weight_type)
    }

    /// All of it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.n_bytes()];
        self.fill(0..self.n_units, &mut bytes);
        bytes
    }

    /// Makes some of its units.
    ///
    /// # Panics
    /// When `out` is not exactly the room for them.
    pub(super) fn fill(&self, units: Range<usize>, out: &mut [u8]) {
        assert_eq!(out.len(), units.len() * self.unit_bytes, "room for the units");
        match &self.source {
            Source::Given(bytes) => out.copy_from_slice(bytes),
            Source::Vector(rows) => rows.fill_vector(out),
            Source::Matrix(rows) => {
                let deviation = 1.0 / (self.shape[1] as f32).sqrt();
                for (row, out) in units.zip(out.chunks_exact_mut(self.unit_bytes)) {
                    let mut random = rows.random(rows.logical_row(row));
                    fill_row(&mut random, self.weight_type, deviation, out);
                }
            }
        }
    }
}

impl Rows {
    /// The numbers of a row in [`PairLayout::Half`] order.
    fn random(&self, row: usize) -> Random {
        Random::new(&[self.seed, self.part as u64, self.layer as u64, row as u64])
    }

    fn fill_vector(&self, out: &mut [u8]) {
        let is_norm = matches!(self.part, Part::AttentionNorm | Part::FfnNorm | Part::OutputNorm);
        let (mean, deviation) = if is_norm { (1.0, 0.1) } else { (0.0, 0.2) };
        let mut logical = vec![0; out.len()];
        fill_floats(&mut self.random(0), mean, deviation, &mut logical);
        let (logical, _) = logical.as_chunks::<4>();
        for (row, out) in out.chunks_exact_mut(4).enumerate() {
            out.copy_from_slice(&logical[self.logical_row(row)]);
        }
    }

    /// The row, in [`PairLayout::Half`] order, that lies at this row of the file: the inverse of [`RowOrder::file_row`], which
    fn order(&self) -> RowOrder {
        RowOrder { pair_layout: self.pair_layout, head_dim: self.head_dim }
    }

    /// moves rows within a head only.
    fn logical_row(&self, row: usize) -> usize {
        let head = row - row % self.head_dim;
        let is_there = |logical: &usize| self.order().file_row(self.part, *logical) == row;
        // Mostly the row itself.
        [row].into_iter().chain(head..).find(is_there).expect("invariant: rows are permuted within a head")
    }
}

/// The type itself when rows of `n_cols` are whole blocks of it, else the nearest that fits; bytes of a row.
fn fitting(weight_type: WeightType, n_cols: usize) -> (WeightType, usize) {
    [weight_type, WeightType::Q8_0, WeightType::F16]
        .into_iter()
        .find_map(|candidate| Some((candidate, candidate.row_bytes(n_cols)?)))
        .expect("invariant: F16 fits any row")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_where_the_loader_looks_for_them() {
        for part in [Part::Query, Part::Value] {
            let (pair_layout, head_dim) = (PairLayout::Interleaved, 6);
            let rows = Rows { seed: 0, part, layer: 0, pair_layout, head_dim };
            for logical in 0..24 {
                assert_eq!(rows.logical_row(rows.order().file_row(part, logical)), logical);
            }
        }
    }
}
