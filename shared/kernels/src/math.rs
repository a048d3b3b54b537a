//! exp, ln, sin and cos by fixed operations of ours, so that no result depends on a system's libm.
//!
//! # Layout
//! * [`mod@exp`] – exp of f32 with its SIMD twins: softmax, SiLU, sampling
//! * this file – exp, ln, sin and cos of f64, scalar only: tables and noise

pub mod exp;

pub use exp::{exp_f32, exp_in_place};

/// ln 2 as a sum: the high part has 11 zero bits at its end, so small multiples of it are exact.
const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fefa_3800);
const LN_2_LOW: f64 = f64::from_bits(0x3d2e_f357_93c7_6730);
/// pi / 2 as a sum of two f64.
const HALF_PI_HIGH: f64 = f64::from_bits(0x3ff9_21fb_5444_2d18);
const HALF_PI_LOW: f64 = f64::from_bits(0x3c91_a626_3314_5c07);
/// 1.5 * 2^52: adding it rounds to an integer, ties to even.
const SHIFT: f64 = 6_755_399_441_055_744.0;

/// Natural logarithm, to about one unit in the last place.
///
/// 0 gives -inf, negative numbers and NaN give NaN, +inf gives +inf.
pub fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let (x, below) = if x < f64::MIN_POSITIVE { (x * 2_f64.powi(54), 54) } else { (x, 0) };
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let exponent = f64::from(exponent - below);
    // ln m = 2 atanh(t) = 2 (t + t^3 / 3 + ..), |t| < 0.172. The terms after t are added to exact parts last.
    let f = mantissa - 1.0;
    let t = f / (2.0 + f);
    let t2 = t * t;
    let series = ATANH.iter().rev().fold(0.0, |series, coefficient| (series + coefficient) * t2);
    // 2 t = f - f t, with f exact.
    let rest = t * (series - f);
    exponent * LN_2_HIGH + (f + (rest + exponent * LN_2_LOW))
}

/// e to the power x, to about one unit in the last place; 0 below -745.2, +inf above 709.8.
pub fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return f64::NAN;
    }
    let x = x.clamp(-746.0, 710.0);
    let n = (x * std::f64::consts::LOG2_E + SHIFT) - SHIFT;
    let high = x - n * LN_2_HIGH;
    let low = n * LN_2_LOW;
    let r = high - low;
    // Taylor to the 13th power: below 1e-17 of the result for |r| <= 0.347. What r lost to rounding goes to the end.
    let lost = (high - r) - low;
    let series = (2..=13).rev().fold(0.0, |series, k| (series + INVERSE_FACTORIAL[k]) * r);
    let value = 1.0 + (r + (r * series + lost));
    let half = n as i32 >> 1;
    value * power_of_two(half) * power_of_two(n as i32 - half)
}

fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1023) as u64) << 52)
}

/// Sine and cosine of an angle in radians, |x| < 2^30, each to about one unit in the last place of 1.
///
/// # Panics
/// When the angle is larger or not a number: no position times a rotary frequency is.
pub fn sin_cos(x: f64) -> (f64, f64) {
    assert!(x.abs() < 1_073_741_824.0, "the angle {x} is out of range");
    let n = (x * std::f64::consts::FRAC_2_PI + SHIFT) - SHIFT;
    // Exact: x and n * HALF_PI_HIGH are multiples of 2^-53 and nearly cancel.
    let high = (-n).mul_add(HALF_PI_HIGH, x);
    let r = (-n).mul_add(HALF_PI_LOW, high);
    let (sin, cos) = (sin_series(r), cos_series(r));
    match n as i64 & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// Taylor series for |x| <= 0.79 to x^17.
fn sin_series(x: f64) -> f64 {
    let x2 = x * x;
    let series =
        (1..=8).rev().fold(0.0, |series, k| (series + odd_sign(k) * INVERSE_FACTORIAL[2 * k + 1]) * x2);
    x + x * series
}

/// Taylor series for |x| <= 0.79 to x^18.
fn cos_series(x: f64) -> f64 {
    let x2 = x * x;
    1.0 + (1..=9).rev().fold(0.0, |series, k| (series + odd_sign(k) * INVERSE_FACTORIAL[2 * k]) * x2)
}

fn odd_sign(k: usize) -> f64 {
    if k.is_multiple_of(2) { 1.0 } else { -1.0 }
}

/// 2 / (2 k + 1) for k = 1, 2, ..
const ATANH: [f64; 11] = {
    let mut table = [0.0; 11];
    let mut k = 0;
    while k < 11 {
        table[k] = 2.0 / (2 * k + 3) as f64;
        k += 1;
    }
    table
};

/// 1 / k!
const INVERSE_FACTORIAL: [f64; 19] = {
    let mut table = [1.0; 19];
    let (mut factorial, mut k) = (1_u64, 1);
    while k < 19 {
        factorial *= k as u64;
        table[k] = 1.0 / factorial as f64;
        k += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of every size between `low` and `high`.
    fn geometric(low: f64, high: f64, n: u32) -> impl Iterator<Item = f64> {
        let step = (high / low).powf(1.0 / f64::from(n));
        (0..n).map(move |i| low * step.powi(i as i32))
    }

    fn relative(got: f64, expected: f64) -> f64 {
        if got == expected { 0.0 } else { ((got - expected) / expected).abs() }
    }

    #[test]
    fn ln_is_that_of_the_standard_library() {
        let mut worst = 0.0_f64;
        for x in geometric(5.0e-324, 1.0e308, 400_000).chain(geometric(0.5, 2.0, 400_000)) {
            worst = worst.max(relative(ln(x), x.ln()));
        }
        println!("ln: worst relative difference {worst:e}");
        assert!(worst < 1.0e-15, "{worst:e}");
        assert_eq!(ln(1.0).to_bits(), 0.0_f64.to_bits());
        assert_eq!(ln(0.0), f64::NEG_INFINITY);
        assert_eq!(ln(f64::INFINITY), f64::INFINITY);
        assert!(ln(-1.0).is_nan() && ln(f64::NAN).is_nan());
    }

    #[test]
    fn exp_is_that_of_the_standard_library() {
        let mut worst = 0.0_f64;
        for x in (0..800_000).map(|i| f64::from(i) * 0.001_77 - 707.0) {
            worst = worst.max(relative(exp(x), x.exp()));
        }
        println!("exp: worst relative difference {worst:e}");
        assert!(worst < 1.0e-15, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f64::NEG_INFINITY), exp(f64::INFINITY)), (0.0, f64::INFINITY));
        assert!(exp(-744.0) > 0.0 && exp(-746.0) == 0.0 && exp(f64::NAN).is_nan());
    }

    #[test]
    fn sin_and_cos_are_those_of_the_standard_library() {
        let (mut worst, mut worst_relative) = (0.0_f64, 0.0_f64);
        let wide = geometric(1.0e-12, 1.0e9, 400_000);
        let whole = (0..400_000).map(f64::from);
        for x in wide.chain(whole) {
            for x in [x, -x] {
                let (sin, cos) = sin_cos(x);
                worst = worst.max((sin - x.sin()).abs()).max((cos - x.cos()).abs());
                worst_relative = worst_relative.max(relative(sin, x.sin())).max(relative(cos, x.cos()));
            }
        }
        println!("sin_cos: worst difference {worst:e}, relative {worst_relative:e}");
        assert!(worst < 4.0e-16, "{worst:e}");
        assert!(worst_relative < 1.0e-14, "{worst_relative:e}");
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn an_angle_that_is_not_a_number_is_refused() {
        sin_cos(f64::NAN);
    }
}
