//! From a tile's sums to where a product goes: one row of 16 for each token.

use super::RowSums;
use crate::packed::TILE_ROWS;
use crate::pool::StridedMut;
use crate::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};

/// Writes the sums of each token, plus the bias, to its row of `out`, which has up to 16 elements.
pub(crate) type WriteRows = unsafe fn(sums: &[RowSums], bias: Option<&[f32]>, out: StridedMut<'_, f32>);

/// The definition.
pub(super) fn write_rows_scalar(sums: &[RowSums], bias: Option<&[f32]>, mut out: StridedMut<'_, f32>) {
    for (token, sums) in sums.iter().enumerate() {
        let out = out.row(token);
        out.copy_from_slice(&sums[..out.len()]);
        if let Some(bias) = bias {
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
    }
}

#[inline(always)]
fn write_rows<S: Simd>(s: S, sums: &[RowSums], bias: Option<&[f32]>, mut out: StridedMut<'_, f32>) {
    let bias = bias.map(|bias| s.load_part(bias));
    for (token, sums) in sums.iter().enumerate() {
        let (sums, out) = (s.load(sums), out.row(token));
        let sums = match bias {
            Some(bias) => s.add(sums, bias),
            None => sums,
        };
        s.store_part(sums, out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn write_rows_avx2(sums: &[RowSums], bias: Option<&[f32]>, out: StridedMut<'_, f32>) {
    write_rows(Avx2::token(), sums, bias, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn write_rows_avx512(sums: &[RowSums], bias: Option<&[f32]>, out: StridedMut<'_, f32>) {
    write_rows(Avx512::token(), sums, bias, out);
}

const _: () = assert!(TILE_ROWS == crate::simd::LANES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::SharedSlice;
    use crate::{Isa, Kernels};

    /// `write_rows_avx2` and `write_rows_avx512` against `write_rows_scalar`; nothing else is written.
    #[test]
    fn twins_write_what_the_definition_writes() {
        let sums: Vec<RowSums> =
            (0..7).map(|token| std::array::from_fn(|row| (token * 31 + row * 7) as f32 / 3.0)).collect();
        let bias: Vec<f32> = (0..TILE_ROWS).map(|row| row as f32 / 7.0 - 1.0).collect();
        for (isa, n_rows) in
            Isa::available().into_iter().flat_map(|isa| (1..=TILE_ROWS).map(move |n| (isa, n)))
        {
            for bias in [None, Some(&bias[..n_rows])] {
                let written = |write: WriteRows| {
                    let mut out = vec![9.0; 200];
                    let shared = SharedSlice::new(&mut out);
                    // SAFETY: nothing else uses the slice.
                    let rows = unsafe { shared.strided_mut(3..3 + n_rows, 25, sums.len()) };
                    // SAFETY: the pointer is from the table of an instruction set that is there.
                    unsafe { write(&sums, bias, rows) };
                    out
                };
                let found = written(Kernels::for_isa(isa).linear.write_rows);
                assert_eq!(found, written(write_rows_scalar), "{isa} {n_rows}");
                assert_eq!(found.iter().filter(|value| **value != 9.0).count(), 7 * n_rows);
            }
        }
    }
}
