//! Kernels that treat every element on its own: add, add a bias row, SiLU times up.

use crate::math::exp::{exp_f32, exp_lanes};
use crate::pool::SharedSlice;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd};
use crate::{Kernels, ThreadPool};

/// Elements one task works on: enough to pay for handing it out.
const TASK_ELEMENTS: usize = 16 * 1024;

/// A kernel that changes `x` by the elements of `y` at the same places; both have the same length.
pub(crate) type PairKernel = unsafe fn(x: &mut [f32], y: &[f32]);

/// `x += y`.
///
/// # Panics
/// When the lengths differ.
pub fn add_into(kernels: &Kernels, pool: &ThreadPool, x: &mut [f32], y: &[f32]) {
    run_pairs(kernels.add_into, pool, x, y);
}

/// `gate = gate / (1 + exp(-gate)) * up`: SiLU of the gate, times up.
///
/// # Panics
/// When the lengths differ.
pub fn silu_mul(kernels: &Kernels, pool: &ThreadPool, gate: &mut [f32], up: &[f32]) {
    run_pairs(kernels.silu_mul, pool, gate, up);
}

/// Adds `bias` to each row of `x`, `[n_rows, bias.len()]`.
///
/// # Panics
/// When `x` is not whole rows.
pub fn add_bias(kernels: &Kernels, pool: &ThreadPool, x: &mut [f32], bias: &[f32]) {
    assert!(x.is_empty() || x.len().is_multiple_of(bias.len()), "{} values, bias of {}", x.len(), bias.len());
    if x.is_empty() {
        return;
    }
    let rows_per_task = (TASK_ELEMENTS / bias.len()).max(1);
    pool.run_pieces(x, rows_per_task * bias.len(), &|_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            // SAFETY: a table is only handed out when the CPU has its features.
            unsafe { (kernels.add_into)(row, bias) };
        }
    });
}

fn run_pairs(kernel: PairKernel, pool: &ThreadPool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "both operands have the same shape");
    let n = x.len();
    let x = SharedSlice::new(x);
    pool.run(n.div_ceil(TASK_ELEMENTS), &|task| {
        let range = task * TASK_ELEMENTS..n.min((task + 1) * TASK_ELEMENTS);
        // SAFETY: tasks have disjoint ranges.
        let part = unsafe { x.range_mut(range.clone()) };
        // SAFETY: the pointer is from a table, which is only handed out when the CPU has its features.
        unsafe { kernel(part, &y[range]) };
    });
}

/// Scalar definition of [`add_into`].
pub(crate) fn add_into_scalar(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Scalar definition of [`silu_mul`].
pub(crate) fn silu_mul_scalar(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp_f32(-*gate)) * up;
    }
}

#[inline(always)]
fn add_lanes<S: Simd>(s: S, x: S::F32, y: S::F32) -> S::F32 {
    s.add(x, y)
}

#[inline(always)]
fn silu_mul_lanes<S: Simd>(s: S, gate: S::F32, up: S::F32) -> S::F32 {
    // -gate flips the sign also of zeros, as `0 - gate` would not.
    let negated = s.mul(gate, s.splat(-1.0));
    s.mul(s.div(gate, s.add(s.splat(1.0), exp_lanes(s, negated))), up)
}

/// Applies an operation on lanes to all elements.
macro_rules! for_lanes {
    ($s:expr, $x:ident, $y:ident, $operation:ident) => {{
        let s = $s;
        let (x_blocks, x_tail) = $x.as_chunks_mut::<LANES>();
        let (y_blocks, y_tail) = $y.as_chunks::<LANES>();
        for (x, y) in x_blocks.iter_mut().zip(y_blocks) {
            s.store($operation(s, s.load(x), s.load(y)), x);
        }
        if !x_tail.is_empty() {
            s.store_part($operation(s, s.load_part(x_tail), s.load_part(y_tail)), x_tail);
        }
    }};
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn add_into_avx2(x: &mut [f32], y: &[f32]) {
    for_lanes!(Avx2::token(), x, y, add_lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn add_into_avx512(x: &mut [f32], y: &[f32]) {
    for_lanes!(Avx512::token(), x, y, add_lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn silu_mul_avx2(gate: &mut [f32], up: &[f32]) {
    for_lanes!(Avx2::token(), gate, up, silu_mul_lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn silu_mul_avx512(gate: &mut [f32], up: &[f32]) {
    for_lanes!(Avx512::token(), gate, up, silu_mul_lanes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Numbers, assert_same_bits, twins};
    use crate::{Isa, Pinning};

    fn check(definition: fn(&mut [f32], &[f32]), twins: Vec<(&str, PairKernel)>) {
        let mut numbers = Numbers::new(1);
        for n in (0..100).chain([4_096, 4_099]) {
            let (x, y) = (numbers.wild_values(n), numbers.wild_values(n));
            let mut expected = x.clone();
            definition(&mut expected, &y);
            for (name, twin) in &twins {
                let mut got = x.clone();
                // SAFETY: `twins` leaves out what the CPU lacks.
                unsafe { twin(&mut got, &y) };
                assert_same_bits(&got, &expected, name);
            }
        }
    }

    #[test]
    fn twins_give_the_same_bits() {
        check(add_into_scalar, twins!(add_into_avx2, add_into_avx512; PairKernel));
        check(silu_mul_scalar, twins!(silu_mul_avx2, silu_mul_avx512; PairKernel));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let mut numbers = Numbers::new(2);
        let (row, n_rows) = (1_111, 61);
        let (x, y) = (numbers.values(row * n_rows), numbers.values(row * n_rows));
        let mut expected = x.clone();
        silu_mul_scalar(&mut expected, &y);
        add_into_scalar(&mut expected, &x);
        expected.chunks_exact_mut(row).for_each(|values| add_into_scalar(values, &y[..row]));
        for n_threads in [1, 2, 3] {
            let pool = ThreadPool::new(n_threads, Pinning::None);
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa);
                let mut got = x.clone();
                silu_mul(kernels, &pool, &mut got, &y);
                add_into(kernels, &pool, &mut got, &x);
                add_bias(kernels, &pool, &mut got, &y[..row]);
                assert_same_bits(&got, &expected, isa.name());
            }
        }
    }

    #[test]
    fn silu_of_known_values() {
        let mut gate = [0.0, 1.0, -1.0, 40.0, -300.0];
        silu_mul_scalar(&mut gate, &[1.0, 2.0, 1.0, 1.0, 1.0]);
        let expected = [0.0, 2.0 * 0.731_058_6, -0.268_941_43, 40.0, -0.0];
        for (got, expected) in gate.iter().zip(expected) {
            assert!((got - expected).abs() < 1.0e-6, "{got} is not {expected}");
        }
    }
}
