//! Tests of quantization: twins against the definition, places of rows, special values.

use super::*;
use crate::{Isa, Pinning};
use proptest::prelude::*;

fn quantized(isa: Isa, x: &[f32], n_cols: usize, bits: CodeBits) -> QuantizedRows {
    let mut rows = QuantizedRows::new();
    let pool = ThreadPool::new(1, Pinning::None);
    quantize_rows(Kernels::for_isa(isa), &pool, x, (n_cols, bits), &mut rows);
    rows
}

/// Everything of all groups.
fn contents(rows: &QuantizedRows) -> (&[Quads], &[u32]) {
    (&rows.codes, &rows.scales)
}

/// Floats of all magnitudes, zero, infinite and NaN ones included, and plain ones.
fn element() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -8.0f32..8.0, 2 => any::<u32>().prop_map(f32::from_bits), 1 => Just(0.0)]
}

proptest! {
    /// `quantize_block_avx2` and `quantize_block_avx512` against `quantize_block_scalar`.
    #[test]
    fn twins_give_the_bits_of_the_definition(
        x in prop::collection::vec(element(), 1..2000),
        n_rows in 1usize..40,
    ) {
        let n_cols = x.len().div_ceil(n_rows);
        let x = &x[..x.len() / n_cols * n_cols];
        for bits in CodeBits::ALL {
            let expected = quantized(Isa::Scalar, x, n_cols, bits);
            for isa in Isa::available() {
                let found = quantized(isa, x, n_cols, bits);
                prop_assert_eq!(found.n_rows(), x.len() / n_cols);
                prop_assert_eq!(contents(&found), contents(&expected), "{}", isa);
            }
        }
    }

    /// Codes are within half a unit, and where a row lies among others changes nothing.
    #[test]
    fn codes_are_within_half_a_unit(x in prop::collection::vec(-100.0f32..100.0, 50..2000)) {
        for bits in CodeBits::ALL {
            let x = &x[..x.len() / 50 * 50];
            let together = quantized(Isa::detect(), x, 50, bits);
            for (idx, row) in x.chunks_exact(50).enumerate() {
                let alone = quantized(Isa::Scalar, row, 50, bits);
                prop_assert_eq!(alone.row(0), together.row(idx));
                for ((x, value), group) in row.iter().zip(alone.row(0)).zip((0..).map(|i| i / GROUP_LEN)) {
                    prop_assert!((x - value).abs() <= 0.51 * alone.group_scale(0, group).scale);
                }
            }
        }
    }
}

#[test]
fn special_groups() {
    for (isa, bits) in Isa::available().into_iter().flat_map(|isa| CodeBits::ALL.map(|bits| (isa, bits))) {
        let mut x = [[0.0f32; 32]; 4];
        x[1][5] = f32::MIN_POSITIVE / 4.0;
        x[2][7] = f32::INFINITY;
        x[3][9] = f32::NAN;
        let rows = quantized(isa, x.as_flattened(), 128, bits);
        let scales = [0, 1, 2, 3].map(|group| rows.group_scale(0, group).scale);
        assert_eq!(scales[..3], [0.0, 0.0, f32::INFINITY]);
        assert!(scales[3].is_nan());
        assert_eq!(rows.group_values(0, 1), [0.0; 32]);
    }
}

#[test]
fn the_largest_codes_fit_their_planes() {
    for (isa, bits) in Isa::available().into_iter().flat_map(|isa| CodeBits::ALL.map(|bits| (isa, bits))) {
        let x: Vec<f32> = (0..32).map(|i| if i % 2 == 0 { 3.0 } else { -3.0 }).collect();
        let rows = quantized(isa, &x, 32, bits);
        let codes = group_codes(rows.group_planes(0, 0));
        let expected: [i32; 32] = std::array::from_fn(|i| bits.limit() * if i % 2 == 0 { 1 } else { -1 });
        assert_eq!(codes, expected, "{isa} {bits:?}");
    }
}

#[test]
fn rows_can_shrink_and_grow() {
    let pool = ThreadPool::new(2, Pinning::None);
    let kernels = Kernels::detect();
    let mut rows = QuantizedRows::with_capacity(2, 40, CodeBits::Sixteen);
    for (n_rows, bits) in [(5, CodeBits::Sixteen), (1, CodeBits::Eight), (37, CodeBits::Sixteen)] {
        let x: Vec<f32> = (0..n_rows * 40).map(|i| i as f32).collect();
        quantize_rows(kernels, &pool, &x, (40, bits), &mut rows);
        assert_eq!((rows.n_rows(), rows.n_groups(), rows.bits()), (n_rows, 2, bits));
        assert_eq!(rows.row(n_rows - 1)[39], (n_rows * 40 - 1) as f32);
    }
}
