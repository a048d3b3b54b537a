//! Storage types of weights: names, block sizes, GGUF codes. How blocks are laid out inside is known by `kernels`.

/// A storage type of weights. The quantized ones are those of GGUF
/// (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(non_camel_case_types, missing_docs)]
pub enum WeightType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

use WeightType::*;

impl WeightType {
    /// Every type.
    pub const ALL: [WeightType; 13] =
        [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K];

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Bytes of a row of `n_cols` weights; `None` when it is not a whole number of blocks or overflows.
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether activations are quantized to int8 before they meet weights of this type.
    pub const fn is_quantized(self) -> bool {
        !matches!(self, F32 | F16 | BF16)
    }

    /// The number GGUF gives the type.
    pub const fn gguf_code(self) -> u32 {
        match self {
            F32 => 0,
            F16 => 1,
            Q4_0 => 2,
            Q4_1 => 3,
            Q5_0 => 6,
            Q5_1 => 7,
            Q8_0 => 8,
            Q2_K => 10,
            Q3_K => 11,
            Q4_K => 12,
            Q5_K => 13,
            Q6_K => 14,
            BF16 => 30,
        }
    }

    /// The type with this GGUF number, if Paceline knows it.
    pub fn from_gguf_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|weight_type| weight_type.gguf_code() == code)
    }

    /// The name, lower case, as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            F32 => "f32",
            F16 => "f16",
            BF16 => "bf16",
            Q4_0 => "q4_0",
            Q4_1 => "q4_1",
            Q5_0 => "q5_0",
            Q5_1 => "q5_1",
            Q8_0 => "q8_0",
            Q2_K => "q2_k",
            Q3_K => "q3_k",
            Q4_K => "q4_k",
            Q5_K => "q5_k",
            Q6_K => "q6_k",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_found_again() {
        for weight_type in WeightType::ALL {
            assert_eq!(WeightType::from_gguf_code(weight_type.gguf_code()), Some(weight_type));
        }
        assert_eq!(WeightType::from_gguf_code(4), None);
    }

    #[test]
    fn a_row_is_whole_blocks_or_nothing() {
        assert_eq!(Q4_K.row_bytes(512), Some(288));
        assert_eq!(Q4_K.row_bytes(511), None);
        assert_eq!(F32.row_bytes(usize::MAX), None);
    }
}
