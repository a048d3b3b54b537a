//! exp of f32: the one behind softmax, SiLU and sampling. Within 1 unit in the last place of the true value.
//!
//! x = n ln 2 + r with |r| <= 0.35; e^r by a polynomial of degree 6; the scaling by 2^n is done in two exact-until-
//! the-last steps, so that subnormal results are rounded once.

use crate::Kernels;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, SHIFT, SHIFT_BITS, Simd, greater};

/// Below this e^x is 0, above the other it is +inf.
const LOWEST: f32 = -104.0;
const HIGHEST: f32 = 89.0;
/// The high part has 9 zero bits at its end, so that n times it is exact.
const LN_2_HIGH: f32 = f32::from_bits(0x3f31_7200);
const LN_2_LOW: f32 = f32::from_bits(0x35bf_be8e);
/// (e^r - 1 - r) / r^2 in powers of r, fitted for the least largest error relative to e^r.
const POLYNOMIAL: [f32; 5] = [
    f32::from_bits(0x3eff_fffe),
    f32::from_bits(0x3e2a_aa48),
    f32::from_bits(0x3d2a_ac7b),
    f32::from_bits(0x3c09_1d47),
    f32::from_bits(0x3ab5_118a),
];

/// e to the power x: 0 for -inf, +inf for large x, NaN for NaN.
pub fn exp_f32(x: f32) -> f32 {
    if x.is_nan() {
        return f32::NAN;
    }
    let clamped = greater(LOWEST, if HIGHEST < x { HIGHEST } else { x });
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, clamped));
    let [c0, c1, c2, c3, c4] = POLYNOMIAL;
    let q = c4.mul_add(r, c3).mul_add(r, c2).mul_add(r, c1).mul_add(r, c0);
    let value = (r * r).mul_add(q, r) + 1.0;
    let n = shifted.to_bits() as i32 - SHIFT_BITS;
    let half = n >> 1;
    value * power_of_two(half) * power_of_two(n - half)
}

fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// Replaces each value by its exponential, with the bits of [`exp_f32`].
pub fn exp_in_place(kernels: &Kernels, values: &mut [f32]) {
    // SAFETY: a table is only handed out when the CPU has its features.
    unsafe { (kernels.exp)(values) }
}

pub(crate) fn exp_slice_scalar(values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = exp_f32(*x));
}

/// [`exp_f32`] of sixteen lanes.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let clamped = s.greater(s.splat(LOWEST), s.less(s.splat(HIGHEST), x));
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), s.splat(SHIFT));
    let n = s.sub(shifted, s.splat(SHIFT));
    let r = s.fma(n, s.splat(-LN_2_HIGH), clamped);
    let r = s.fma(n, s.splat(-LN_2_LOW), r);
    let [c0, c1, c2, c3, c4] = POLYNOMIAL;
    let q = s.fma(s.splat(c4), r, s.splat(c3));
    let q = s.fma(q, r, s.splat(c2));
    let q = s.fma(q, r, s.splat(c1));
    let q = s.fma(q, r, s.splat(c0));
    let value = s.add(s.fma(s.mul(r, r), q, r), s.splat(1.0));
    let (low, high) = s.two_powers(shifted);
    s.nan_where_nan(x, s.mul(s.mul(value, low), high))
}

#[inline(always)]
fn exp_slice<S: Simd>(s: S, values: &mut [f32]) {
    let (blocks, tail) = values.as_chunks_mut::<LANES>();
    for block in blocks {
        s.store(exp_lanes(s, s.load(block)), block);
    }
    if !tail.is_empty() {
        s.store_part(exp_lanes(s, s.load_part(tail)), tail);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn exp_slice_avx2(values: &mut [f32]) {
    exp_slice(Avx2::token(), values);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn exp_slice_avx512(values: &mut [f32]) {
    exp_slice(Avx512::token(), values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_same_bits, twins};

    /// Distance of `got` from the true value, in units in the last place of an f32 near it.
    fn ulps(got: f32, x: f32) -> f64 {
        let exact = f64::from(x).exp();
        let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        ((f64::from(got) - exact) / unit).abs()
    }

    #[test]
    fn accurate_wherever_the_result_is_finite() {
        let mut worst = 0.0_f64;
        let mut x = -104.0_f32;
        while x < 88.72 {
            worst = worst.max(ulps(exp_f32(x), x));
            x += 0.000_13;
        }
        println!("exp_f32: worst error {worst:.3} ulp");
        assert!(worst < 1.0, "{worst}");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp_f32(-200.0).to_bits(), 0);
        assert_eq!(exp_f32(88.73), f32::INFINITY);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan() && exp_f32(-f32::NAN).is_nan());
    }

    #[test]
    fn twins_give_the_same_bits_for_every_1009th_float() {
        let inputs: Vec<f32> = (0..=u32::MAX).step_by(1009).map(f32::from_bits).collect();
        let mut expected = inputs.clone();
        exp_slice_scalar(&mut expected);
        for (name, twin) in twins!(exp_slice_avx2, exp_slice_avx512; unsafe fn(&mut [f32])) {
            let mut got = inputs.clone();
            // SAFETY: `twins` leaves out what the CPU lacks.
            unsafe { twin(&mut got) };
            assert_same_bits(&got, &expected, name);
        }
    }

    #[test]
    fn ragged_lengths() {
        for n in 0..70 {
            let inputs: Vec<f32> = (0..n).map(|i| i as f32 * 0.37 - 9.0).collect();
            let expected: Vec<f32> = inputs.iter().map(|x| exp_f32(*x)).collect();
            for isa in crate::Isa::available() {
                let mut got = inputs.clone();
                exp_in_place(Kernels::for_isa(isa), &mut got);
                assert_same_bits(&got, &expected, isa.name());
            }
        }
    }
}
