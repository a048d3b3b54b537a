//! RMSNorm (Zhang and Sennrich 2019). The sum of squares has a fixed pattern of 16 lanes; nothing else reduces.

use crate::pool::SharedSlice;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd, fold_lanes};
use crate::{Kernels, ThreadPool};

/// Elements one task works on: enough to pay for handing it out.
const TASK_ELEMENTS: usize = 8 * 1024;

/// What a norm needs to know beside its input.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// One factor per column.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// One row: `(x, norm, out)`, all of the same length.
pub(crate) type RowKernel = unsafe fn(&[f32], &RmsNorm<'_>, &mut [f32]);

/// Normalizes each row: `out = x / sqrt(mean(x^2) + eps) * weight`, `[n_rows, weight.len()]`.
///
/// # Panics
/// When `x` and `out` differ in length or are not whole rows.
pub fn rms_norm(kernels: &Kernels, pool: &ThreadPool, norm: &RmsNorm<'_>, x: &[f32], out: &mut [f32]) {
    let n_cols = norm.weight.len();
    assert_eq!(x.len(), out.len(), "input and output have the same shape");
    assert!(n_cols > 0 && x.len().is_multiple_of(n_cols), "{} values in rows of {n_cols}", x.len());
    let n_rows = x.len() / n_cols;
    let rows_per_task = (TASK_ELEMENTS / n_cols).max(1);
    let out = SharedSlice::new(out);
    pool.run(n_rows.div_ceil(rows_per_task), &|task| {
        for row in task * rows_per_task..n_rows.min((task + 1) * rows_per_task) {
            let range = row * n_cols..(row + 1) * n_cols;
            // SAFETY: rows are disjoint, and each is in one task.
            let out = unsafe { out.range_mut(range.clone()) };
            // SAFETY: a table is only handed out when the CPU has its features.
            unsafe { (kernels.rms_norm_row)(&x[range], norm, out) };
        }
    });
}

/// Scalar definition.
pub(crate) fn rms_norm_row_scalar(x: &[f32], norm: &RmsNorm<'_>, out: &mut [f32]) {
    let mut squares = [0.0_f32; LANES];
    for (i, x) in x.iter().enumerate() {
        squares[i % LANES] = x.mul_add(*x, squares[i % LANES]);
    }
    let inverse = inverse_rms(squares, x.len(), norm.eps);
    for i in 0..x.len() {
        out[i] = (x[i] * inverse) * norm.weight[i];
    }
}

fn inverse_rms(squares: [f32; LANES], n: usize, eps: f32) -> f32 {
    1.0 / (fold_lanes(squares) / n as f32 + eps).sqrt()
}

#[inline(always)]
fn rms_norm_row<S: Simd>(s: S, x: &[f32], norm: &RmsNorm<'_>, out: &mut [f32]) {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut squares = s.splat(0.0);
    for block in blocks {
        let x = s.load(block);
        squares = s.fma(x, x, squares);
    }
    // Absent lanes add 0 * 0 to a sum that is never -0: no bit changes.
    let last = s.load_part(tail);
    squares = s.fma(last, last, squares);
    let inverse = s.splat(inverse_rms(s.to_array(squares), x.len(), norm.eps));
    let (weights, weight_tail) = norm.weight.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for ((x, weight), out) in blocks.iter().zip(weights).zip(outs) {
        s.store(s.mul(s.mul(s.load(x), inverse), s.load(weight)), out);
    }
    if !tail.is_empty() {
        s.store_part(s.mul(s.mul(last, inverse), s.load_part(weight_tail)), out_tail);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn rms_norm_row_avx2(x: &[f32], norm: &RmsNorm<'_>, out: &mut [f32]) {
    rms_norm_row(Avx2::token(), x, norm, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn rms_norm_row_avx512(x: &[f32], norm: &RmsNorm<'_>, out: &mut [f32]) {
    rms_norm_row(Avx512::token(), x, norm, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Numbers, assert_same_bits, twins};
    use crate::{Isa, Pinning};

    #[test]
    fn twins_give_the_same_bits() {
        let mut numbers = Numbers::new(5);
        for n in (1..100).chain([576, 896, 1_536, 1_537]) {
            for wild in [false, true] {
                let x = if wild { numbers.wild_values(n) } else { numbers.values(n) };
                let weight = numbers.values(n);
                let norm = RmsNorm { weight: &weight, eps: 1.0e-5 };
                let mut expected = vec![0.0; n];
                rms_norm_row_scalar(&x, &norm, &mut expected);
                for (name, twin) in twins!(rms_norm_row_avx2, rms_norm_row_avx512; RowKernel) {
                    let mut got = vec![0.0; n];
                    // SAFETY: `twins` leaves out what the CPU lacks.
                    unsafe { twin(&x, &norm, &mut got) };
                    assert_same_bits(&got, &expected, name);
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_among_others() {
        let mut numbers = Numbers::new(6);
        let (n_rows, n_cols) = (37, 577);
        let (x, weight) = (numbers.values(n_rows * n_cols), numbers.values(n_cols));
        let norm = RmsNorm { weight: &weight, eps: 1.0e-6 };
        let mut expected = vec![0.0; x.len()];
        for (x, out) in x.chunks_exact(n_cols).zip(expected.chunks_exact_mut(n_cols)) {
            rms_norm_row_scalar(x, &norm, out);
        }
        for n_threads in [1, 2, 3] {
            let pool = ThreadPool::new(n_threads, Pinning::None);
            for isa in Isa::available() {
                let mut got = vec![0.0; x.len()];
                rms_norm(Kernels::for_isa(isa), &pool, &norm, &x, &mut got);
                assert_same_bits(&got, &expected, isa.name());
            }
        }
    }

    #[test]
    fn close_to_the_formula_in_f64() {
        let mut numbers = Numbers::new(7);
        let (x, weight) = (numbers.values(896), numbers.values(896));
        let norm = RmsNorm { weight: &weight, eps: 1.0e-6 };
        let mut got = vec![0.0; 896];
        rms_norm_row_scalar(&x, &norm, &mut got);
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 896.0;
        for i in 0..896 {
            let expected = f64::from(x[i]) / (mean + 1.0e-6).sqrt() * f64::from(weight[i]);
            assert!((f64::from(got[i]) - expected).abs() < 1.0e-6 * expected.abs().max(1.0e-3));
        }
    }
}
