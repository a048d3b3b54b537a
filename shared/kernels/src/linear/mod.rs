//! Matrix products of packed weights with activations: `out[t][r] = sum over k of weight[r][k] * x[t][k]`.
//!
//! The order of operations is fixed for each (row, token), whatever the batch, the threads and the instruction
//! set; [`scalar`] is the definition. For quantized weights each group of 32 columns (or each half group of 16
//! where the type has scales for those), in K order:
//!
//! ```text
//! isum = sum of (code - OFFSET) * activation code                      exact, i32
//! acc  = fma(isum as f32, weight scale * activation scale, acc)
//! acc  = fma(weight minimum, activation scale * (sum of activation codes as f32), acc)     if it has one
//! ```
//!
//! For plain numbers `acc = fma(weight, x, acc)` in K order. Each leaf starts from +0; leaves are added as the
//! canonical tree says.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod matmul;
mod scalar;

pub use matmul::{Input, matmul};

use crate::formats::{GROUP_LEN, GROUPS_PER_SUPER};
use crate::isa::Isa;
use crate::packed::{TILE_ROWS, TilePart};
use crate::quantize::{QuantizeRow, QuantizedGroup};
use paceline_domain::WeightType;

/// Sums of the 16 rows of a tile for one token.
pub(crate) type RowSums = [f32; TILE_ROWS];

/// One leaf of one tile of quantized weights, and the rows of activations it meets.
pub(crate) struct QuantizedLeaf<'a> {
    /// The leaf's groups.
    pub weights: TilePart<'a>,
    /// How many there are.
    pub n_groups: usize,
    /// Activations, from the leaf's first group of the first token on.
    pub tokens: &'a [QuantizedGroup],
    /// Groups from one token to the next.
    pub stride: usize,
}

impl<'a> QuantizedLeaf<'a> {
    /// Activations of a token.
    #[inline(always)]
    fn token(&self, token: usize) -> &'a [QuantizedGroup] {
        &self.tokens[token * self.stride..][..self.n_groups]
    }

    /// Index of the superblock of a group, counted from that of the first group.
    #[inline(always)]
    fn super_idx(&self, group: usize) -> usize {
        (self.weights.first_group + group) / GROUPS_PER_SUPER
    }
}

/// One leaf of one tile of plain numbers, and the rows of activations it meets.
pub(crate) struct FloatLeaf<'a> {
    /// 16 weights a column.
    pub weights: &'a [u8],
    /// Columns of the leaf.
    pub n_cols: usize,
    /// Activations, from the leaf's first column of the first token on.
    pub tokens: &'a [f32],
    /// Elements from one token to the next.
    pub stride: usize,
}

impl<'a> FloatLeaf<'a> {
    /// Activations of a token.
    #[inline(always)]
    fn token(&self, token: usize) -> &'a [f32] {
        &self.tokens[token * self.stride..][..self.n_cols]
    }
}

/// Sums a leaf for `sums.len()` tokens, 1 to [`MAX_TOKENS`].
pub(crate) type SumQuantizedLeaf = unsafe fn(leaf: &QuantizedLeaf<'_>, sums: &mut [RowSums]);
/// Sums a leaf for `sums.len()` tokens, 1 to [`MAX_TOKENS`].
pub(crate) type SumFloatLeaf = unsafe fn(leaf: &FloatLeaf<'_>, sums: &mut [RowSums]);

/// Most tokens that share one pass over a tile.
pub(crate) const MAX_TOKENS: usize = 8;

/// The part of the dispatch table for matrix products.
#[derive(Clone, Copy)]
pub struct LinearKernels {
    pub(crate) quantize_row: QuantizeRow,
    quantized: [SumQuantizedLeaf; 10],
    float: [SumFloatLeaf; 3],
}

/// The functions of every type, generic ones named by their module and the type.
macro_rules! table {
    ($quantize_row:path, $module:ident :: $quantized:ident, $float:ident) => {{
        use crate::formats::*;
        LinearKernels {
            quantize_row: $quantize_row,
            quantized: [
                $module::$quantized::<Q4_0>,
                $module::$quantized::<Q4_1>,
                $module::$quantized::<Q5_0>,
                $module::$quantized::<Q5_1>,
                $module::$quantized::<Q8_0>,
                $module::$quantized::<Q2_K>,
                $module::$quantized::<Q3_K>,
                $module::$quantized::<Q4_K>,
                $module::$quantized::<Q5_K>,
                $module::$quantized::<Q6_K>,
            ],
            float: [$module::$float::<F32>, $module::$float::<F16>, $module::$float::<BF16>],
        }
    }};
}

impl LinearKernels {
    /// The table of an instruction set. It may be used only where the CPU has that.
    pub(crate) const fn for_isa(isa: Isa) -> Self {
        match isa {
            Isa::Scalar => {
                table!(crate::quantize::quantize_row_scalar, scalar::sum_quantized_scalar, sum_float_scalar)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => table!(crate::quantize::quantize_row_avx2, avx2::sum_quantized_avx2, sum_float_avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                table!(crate::quantize::quantize_row_avx512, avx512::sum_quantized_avx512, sum_float_avx512)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                table!(crate::quantize::quantize_row_avx512, avx512::sum_quantized_vnni, sum_float_avx512)
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => panic!("invariant: only the scalar table exists here"),
        }
    }

    fn quantized(&self, weight_type: WeightType) -> SumQuantizedLeaf {
        self.quantized[weight_type as usize - WeightType::Q4_0 as usize]
    }

    fn float(&self, weight_type: WeightType) -> SumFloatLeaf {
        self.float[weight_type as usize]
    }
}

const _: () = assert!(GROUP_LEN == 32 && TILE_ROWS == 16);

#[cfg(test)]
mod tests;
