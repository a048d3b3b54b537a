//! Which matrices are quantized while they are loaded, and to what. How a block is made is known by `kernels`.
//!
//! Only matrices of plain numbers are: what the file has quantized keeps its bits, and norms and biases stay as they
//! are. Rows of the embedding are looked up as the file has them. The output head, on which the choice of a token hangs
//! most, gets 8 bits whatever is asked, also where it is tied to the embedding. A matrix whose rows are no whole
//! superblocks of 256 gets 8 bits instead of 4; one whose rows are not even whole groups of 32 stays as it is.
//!
//! Of a draft model, whose tokens are verified, quantized matrices are quantized again where that makes them smaller, the
//! output head like all others. There rows that are no whole superblocks get Q4_0, which is as small as Q4_K.
//!
//! Whole rows are quantized before a rank takes its columns of them: so the bits are the same for any number of ranks.

use paceline_checkpoint::Checkpoint;
use paceline_domain::{Quantization, WeightType};

use crate::names::{self, Expected, Part};

/// The type in memory of a matrix that is multiplied with; [`Part::Embedding`] is the tied head.
pub fn loaded_type(
    quantize: Option<Quantization>,
    part: Part,
    in_file: WeightType,
    n_cols: usize,
) -> WeightType {
    let Some(quantization) = quantize else { return in_file };
    if in_file.is_quantized() && !quantization.is_of_all() {
        return in_file;
    }
    let is_head = matches!(part, Part::Head | Part::Embedding);
    let is_precious = is_head && !quantization.is_of_all();
    let wanted = if is_precious { WeightType::Q8_0 } else { quantization.weight_type() };
    let instead = if wanted == WeightType::Q4_K && quantization.is_of_all() {
        WeightType::Q4_0
    } else {
        WeightType::Q8_0
    };
    let fits = |candidate: &WeightType| candidate.row_bytes(n_cols).is_some();
    let found = [wanted, instead].into_iter().find(fits);
    found.filter(|found| is_smaller(*found, in_file)).unwrap_or(in_file)
}

/// Whether a weight of one type takes fewer bits than one of the other, scales included.
fn is_smaller(one: WeightType, other: WeightType) -> bool {
    one.block_bytes() * other.block_len() < other.block_bytes() * one.block_len()
}

/// The types of a model's tensors.
pub struct WeightTypes<'a> {
    /// In the file, as far as the tensor is there.
    pub in_file: &'a dyn Fn(&Expected) -> WeightType,
    /// What matrices become at load.
    pub quantize: Option<Quantization>,
}

impl WeightTypes<'_> {
    /// In memory, of a matrix as it is multiplied with; norms and biases are f32.
    pub fn loaded(&self, tensor: &Expected) -> WeightType {
        match tensor.shape.get(1) {
            None => WeightType::F32,
            Some(n_cols) => loaded_type(self.quantize, tensor.part, (self.in_file)(tensor), *n_cols),
        }
    }
}

/// The types in a checkpoint; F32 for tensors that it lacks.
pub fn types_in(checkpoint: &Checkpoint) -> impl Fn(&Expected) -> WeightType {
    |expected| {
        let name = names::name(expected.part, checkpoint.format(), expected.layer.unwrap_or_default());
        checkpoint.tensor(&name).map_or(WeightType::F32, |tensor| tensor.weight_type())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use WeightType::{BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0};

    #[test]
    fn each_matrix_gets_what_suits_it() {
        let four = Some(Quantization::Q4_K);
        for (quantize, part, in_file, n_cols, expected) in [
            (None, Part::Up, BF16, 256, BF16),
            (four, Part::Up, BF16, 512, Q4_K),
            (Some(Quantization::Q8_0), Part::Up, F32, 512, Q8_0),
            (four, Part::Up, F16, 576, Q8_0),
            (four, Part::Up, F16, 100, F16),
            (four, Part::Up, Q5_0, 512, Q5_0),
            (four, Part::Head, F32, 512, Q8_0),
            (four, Part::Embedding, F32, 512, Q8_0),
        ] {
            assert_eq!(loaded_type(quantize, part, in_file, n_cols), expected, "{part:?} {n_cols}");
        }
    }

    #[test]
    fn a_draft_loses_bits_that_its_file_has_but_never_gains_any() {
        for (name, part, in_file, n_cols, expected) in [
            ("q4_0", Part::Up, Q5_0, 896, Q4_0),
            ("q4_1", Part::Up, Q5_0, 896, Q4_1),
            ("q4_1", Part::Up, Q4_0, 896, Q4_0),
            ("q4_k", Part::Up, Q5_0, 896, Q4_0),
            ("q4_k", Part::Up, BF16, 896, Q4_0),
            ("q4_k", Part::Down, Q6_K, 4864, Q4_K),
            ("q4_0", Part::Down, Q4_K, 4864, Q4_K),
            ("q8_0", Part::Up, Q5_0, 896, Q5_0),
            ("q8_0", Part::Up, F16, 896, Q8_0),
            ("q4_0", Part::Head, F16, 896, Q4_0),
            ("q4_0", Part::Embedding, Q8_0, 896, Q4_0),
            ("q4_k", Part::Head, Q6_K, 256, Q4_K),
            ("q4_0", Part::Up, F16, 100, F16),
        ] {
            let quantize = Some(Quantization::of_draft(name).expect("a name"));
            assert_eq!(loaded_type(quantize, part, in_file, n_cols), expected, "{name} {part:?} {in_file:?}");
        }
    }
}
