//! exp and ln in f32 with fixed operations, accurate to a few units in the last place. Not for general use: only the
//! arguments that sampling has.

/// ln 2 in two parts; products of the first with small whole numbers are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Bits of the square root of one half: mantissas are reduced to [sqrt(1/2), sqrt(2)).
const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
/// Adding and subtracting it rounds to a whole number, ties to even.
const ROUNDER: f32 = 12_582_912.0;
/// Below this exp is taken as 0.
const EXP_MIN: f32 = -87.0;

/// `(f, e)` with `x = (1 + f) * 2^e` and f around 0. `x` is positive and normal.
#[inline(always)]
pub(crate) fn split(x: f32) -> (f32, f32) {
    let bits = x.to_bits();
    let exponent = (bits.wrapping_sub(SQRT_HALF_BITS) as i32) >> 23;
    let mantissa = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32));
    (mantissa - 1.0, exponent as f32)
}

/// `ln((1 + f) * 2^e)`, with full relative accuracy for tiny f when e is 0.
///
/// ln(1 + f) = 2 artanh(s) with s = f / (2 + f), |s| < 0.1716: the terms left out are below 3e-9 of the sum.
#[inline(always)]
pub(crate) fn ln_of_split(f: f32, e: f32) -> f32 {
    let s = f / (2.0 + f);
    let z = s * s;
    let tail = z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    let twice = s + s;
    e * LN_2_HIGH + (twice + (twice * tail + e * LN_2_LOW))
}

/// Natural logarithm of a positive finite number.
pub(crate) fn ln(x: f32) -> f32 {
    // Subnormal numbers are lifted by 2^24 first.
    let (x, lifted) = if x < f32::MIN_POSITIVE { (x * 16_777_216.0, 24.0) } else { (x, 0.0) };
    let (f, e) = split(x);
    ln_of_split(f, e - lifted)
}

/// e to the power of `x <= 0`; 0 for NaN.
///
/// x = n ln 2 + r with |r| < 0.347, then the Taylor sum up to r^7 / 7!.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = if x > EXP_MIN { x } else { EXP_MIN };
    let n = (clamped * std::f32::consts::LOG2_E + ROUNDER) - ROUNDER;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let tail = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0)));
    let sum = 1.0 + (r + r * r * (0.5 + r * (1.0 / 6.0 + r * tail)));
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x > EXP_MIN { sum * power } else { 0.0 }
}

/// Sum of a row: lane j of 16 takes elements j, j + 16, ... in order, then lanes are combined pairwise.
pub(crate) fn sum_lanes(n: usize, value: impl Fn(usize) -> f32) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0f64; LANES];
    for start in (0..n).step_by(LANES) {
        for (lane, idx) in (start..n.min(start + LANES)).enumerate() {
            lanes[lane] += f64::from(value(idx));
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ln_is_close_over_its_whole_range() {
        for bits in (1..0x7f80_0000u32).step_by(9_973) {
            let x = f32::from_bits(bits);
            let exact = f64::from(x).ln();
            let error = (f64::from(ln(x)) - exact).abs();
            assert!(error <= 3e-7 * exact.abs().max(1e-3), "ln({x:e}) = {} not {exact}", ln(x));
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn exp_is_close_and_falls() {
        let mut last = 1.0;
        for i in 0..870_000 {
            let x = i as f32 * -1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(error <= 3e-7 * exact, "exp({x}) = {:e} not {exact:e}", exp(x));
            assert!(exp(x) <= last * 1.000_001);
            last = exp(x);
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::NAN), 0.0);
    }

    #[test]
    fn lanes_sum_every_element_once() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum_lanes(n, |idx| idx as f32), (0..n).sum::<usize>() as f64);
        }
    }
}
