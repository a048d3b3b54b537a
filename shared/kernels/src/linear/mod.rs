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
//! Activation codes have 8 or 16 bits; see [`crate::quantize`].
//!
//! For plain numbers `acc = fma(weight, x, acc)` in K order. Each leaf starts from +0; leaves are added as the
//! canonical tree says.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod gated;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod matmul;
mod scalar;
mod tile;
mod upcoming;
mod write;

pub use gated::{GateUp, GatedOutput, gated_matmul};
pub use matmul::{Input, Product, matmul};
pub use upcoming::{announce, announce_gated};

use crate::formats::GROUP_LEN;
use crate::isa::Isa;
use crate::packed::{TILE_ROWS, TilePart};
use crate::quantize::{CodeBits, Quads, QuantizeBlock};
use paceline_domain::WeightType;
use write::WriteRows;

/// Where the weights that lie so many bytes behind are fetched to while a leaf is summed.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    /// They are in the caches.
    Nowhere,
    /// The first-level cache, and no other one: where it is large enough, a tenth faster with one token.
    Nearest(usize),
    /// The second-level cache.
    Second(usize),
}

/// Sums of the 16 rows of a tile for one token.
pub(crate) type RowSums = [f32; TILE_ROWS];

/// One leaf of one tile of quantized weights, and the rows of activations it meets.
pub(crate) struct QuantizedLeaf<'a> {
    /// The leaf's groups.
    pub weights: TilePart<'a>,
    /// How many there are.
    pub n_groups: usize,
    /// Planes of activation codes, from the leaf's first group of the first token on; tokens lie side by side.
    pub codes: &'a [Quads],
    /// Words of their scales, from the same on.
    pub scales: &'a [u32],
    /// Tokens from one group to the next, those of other leaves included.
    pub step: usize,
    /// Where later weights are fetched to meanwhile.
    pub fetch: Fetch,
    /// Whether the leaf is added to what was summed before, its left neighbour.
    pub adds: bool,
}

impl QuantizedLeaf<'_> {
    /// The same leaf for the tokens from `first` on. A leaf without groups may have no room for them.
    #[inline(always)]
    fn starting_at<const P: usize>(&self, first: usize) -> Self {
        let codes = self.codes.get(first * P..).unwrap_or_default();
        Self { codes, scales: self.scales.get(first..).unwrap_or_default(), ..*self }
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
    /// Where later weights are fetched to meanwhile.
    pub fetch: Fetch,
    /// Whether the leaf is added to what was summed before, its left neighbour.
    pub adds: bool,
}

impl<'a> FloatLeaf<'a> {
    /// Activations of a token.
    #[inline(always)]
    fn token(&self, token: usize) -> &'a [f32] {
        &self.tokens[token * self.stride..][..self.n_cols]
    }

    /// The same leaf for the tokens from `first` on.
    #[inline(always)]
    fn starting_at(&self, first: usize) -> Self {
        Self { tokens: self.tokens.get(first * self.stride..).unwrap_or_default(), ..*self }
    }
}

/// Sums a leaf for `sums.len()` tokens, 1 to [`MAX_TOKENS`], and writes or adds it to `sums` as the leaf says.
pub(crate) type SumQuantizedLeaf = unsafe fn(leaf: &QuantizedLeaf<'_>, sums: &mut [RowSums]);
/// Likewise.
pub(crate) type SumFloatLeaf = unsafe fn(leaf: &FloatLeaf<'_>, sums: &mut [RowSums]);

/// Most tokens that share one pass over a tile.
pub(crate) const MAX_TOKENS: usize = crate::quantize::BLOCK_ROWS;

/// The part of the dispatch table for matrix products.
#[derive(Clone, Copy)]
pub struct LinearKernels {
    /// By planes of codes, less one; so is the next.
    pub(crate) quantize_block: [QuantizeBlock; 2],
    quantized: [[SumQuantizedLeaf; 10]; 2],
    float: [SumFloatLeaf; 3],
    write_rows: WriteRows,
}

/// The functions of every type, generic ones named by their module and the type.
macro_rules! table {
    ($quantize_block:ident, $module:ident :: $quantized:ident, $float:ident, $write_rows:ident) => {{
        use crate::formats::*;
        LinearKernels {
            quantize_block: [crate::quantize::$quantize_block::<1>, crate::quantize::$quantize_block::<2>],
            quantized: [table!(1, $module::$quantized), table!(2, $module::$quantized)],
            float: [$module::$float::<F32>, $module::$float::<F16>, $module::$float::<BF16>],
            write_rows: write::$write_rows,
        }
    }};
    ($planes:literal, $module:ident :: $quantized:ident) => {
        [
            $module::$quantized::<Q4_0, $planes>,
            $module::$quantized::<Q4_1, $planes>,
            $module::$quantized::<Q5_0, $planes>,
            $module::$quantized::<Q5_1, $planes>,
            $module::$quantized::<Q8_0, $planes>,
            $module::$quantized::<Q2_K, $planes>,
            $module::$quantized::<Q3_K, $planes>,
            $module::$quantized::<Q4_K, $planes>,
            $module::$quantized::<Q5_K, $planes>,
            $module::$quantized::<Q6_K, $planes>,
        ]
    };
}

impl LinearKernels {
    /// The table of an instruction set. It may be used only where the CPU has that.
    pub(crate) const fn for_isa(isa: Isa) -> Self {
        match isa {
            Isa::Scalar => {
                table!(
                    quantize_block_scalar,
                    scalar::sum_quantized_scalar,
                    sum_float_scalar,
                    write_rows_scalar
                )
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                table!(quantize_block_avx2, avx2::sum_quantized_avx2, sum_float_avx2, write_rows_avx2)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                table!(
                    quantize_block_avx512,
                    avx512::sum_quantized_avx512,
                    sum_float_avx512,
                    write_rows_avx512
                )
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                table!(quantize_block_avx512, avx512::sum_quantized_vnni, sum_float_avx512, write_rows_avx512)
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => panic!("invariant: only the scalar table exists here"),
        }
    }

    fn quantized(&self, weight_type: WeightType, bits: CodeBits) -> SumQuantizedLeaf {
        self.quantized[bits.n_planes() - 1][weight_type as usize - WeightType::Q4_0 as usize]
    }

    fn float(&self, weight_type: WeightType) -> SumFloatLeaf {
        self.float[weight_type as usize]
    }
}

const _: () = assert!(GROUP_LEN == 32 && TILE_ROWS == 16);

#[cfg(test)]
mod tests;
