//! What happens between two halves of a layer, row by row in one pass: add to the residual stream, RMSNorm, quantize.
//! Each step is the kernel of that name; nothing is computed here.

use crate::Kernels;
use crate::pool::{SharedSlice, ThreadPool};
use crate::quantize::{BLOCK_ROWS, BlockInput, CodeBits, QuantizedRows};
use crate::rms_norm::RmsNorm;

/// The rows and what is to be done with them; both slices are `[n_rows, n_cols]`.
pub struct Residual<'a> {
    /// The residual stream.
    pub hidden: &'a mut [f32],
    /// First what is added to it, if `add`; afterwards the normalized rows.
    pub normed: &'a mut [f32],
    /// Whether there is something to add.
    pub add: bool,
    /// Also receives the normalized rows, as codes of so many bits.
    pub quantized: Option<(&'a mut QuantizedRows, CodeBits)>,
}

/// `hidden += normed` (if so wished), `normed = rms_norm(hidden)`, `quantized = quantize(normed)`.
///
/// # Panics
/// When shapes do not fit.
pub fn add_norm_quantize(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    norm: &RmsNorm<'_>,
    rows: Residual<'_>,
) {
    let Residual { hidden, normed, add, quantized } = rows;
    let n_cols = norm.weight.len();
    assert_eq!(hidden.len(), normed.len(), "both have the same shape");
    assert!(n_cols > 0 && hidden.len().is_multiple_of(n_cols), "{} values in rows of {n_cols}", hidden.len());
    let n_rows = hidden.len() / n_cols;
    let quantized = quantized.map(|(quantized, bits)| {
        quantized.reshape(n_rows, n_cols, bits);
        (quantized.n_groups(), quantized.shared())
    });
    let (hidden, normed) = (SharedSlice::new(hidden), SharedSlice::new(normed));
    pool.run(n_rows.div_ceil(BLOCK_ROWS), &|block| {
        let rows = block * BLOCK_ROWS..n_rows.min((block + 1) * BLOCK_ROWS);
        let all = rows.start * n_cols..rows.end * n_cols;
        // SAFETY: blocks are disjoint, and each is in one task.
        let hidden = unsafe { hidden.range_mut(all.clone()) };
        // SAFETY: as above.
        let normed = unsafe { normed.range_mut(all) };
        for (hidden, normed) in hidden.chunks_exact_mut(n_cols).zip(normed.chunks_exact_mut(n_cols)) {
            if add {
                // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
                unsafe { (kernels.add_into)(hidden, normed) };
            }
            // SAFETY: as above.
            unsafe { (kernels.rms_norm_row)(hidden, norm, normed) };
        }
        if let Some((n_groups, quantized)) = &quantized {
            let x = BlockInput { x: normed, stride: n_cols, n_cols };
            // SAFETY: each block belongs to one task.
            unsafe { quantized.quantize_block(kernels, block, 0..*n_groups, &x) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::add_into;
    use crate::quantize::quantize_rows;
    use crate::rms_norm::rms_norm;
    use crate::{Isa, Pinning};

    #[test]
    fn one_pass_gives_the_bits_of_its_steps() {
        let pool = ThreadPool::new(3, Pinning::None);
        let (n_rows, n_cols) = (37, 70);
        let values = |seed: usize| -> Vec<f32> {
            (0..n_rows * n_cols).map(|i| ((i * 7919 + seed) % 1013) as f32 / 100.0 - 5.0).collect()
        };
        let weight: Vec<f32> = (0..n_cols).map(|i| 0.5 + i as f32 / 64.0).collect();
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        for (isa, add) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
            let kernels = Kernels::for_isa(isa);
            let (mut hidden, mut normed) = (values(1), values(2));
            let mut quantized = QuantizedRows::new();
            let rows = Residual {
                hidden: &mut hidden,
                normed: &mut normed,
                add,
                quantized: Some((&mut quantized, CodeBits::Eight)),
            };
            add_norm_quantize(kernels, &pool, &norm, rows);

            let (mut expected, mut expected_normed) = (values(1), vec![0.0; n_rows * n_cols]);
            if add {
                add_into(kernels, &pool, &mut expected, &values(2));
            }
            rms_norm(kernels, &pool, &norm, &expected, &mut expected_normed);
            let mut expected_rows = QuantizedRows::new();
            quantize_rows(kernels, &pool, &expected_normed, (n_cols, CodeBits::Eight), &mut expected_rows);
            assert_eq!(hidden, expected);
            assert_eq!(normed, expected_normed);
            for row in 0..n_rows {
                assert_eq!(quantized.row(row), expected_rows.row(row));
            }
        }
    }
}
