//! Sixteen lanes of f32, with the same operations in each instruction set. It knows no kernel.
//!
//! A value of a type that implements [`Simd`] is a token: it can only be made where the compiler knows that the CPU
//! has the features, so its methods are safe. A kernel is written once, generic over the token and always inlined
//! into a thin `#[target_feature]` shell per instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

/// Lanes of every kernel that reduces in a fixed pattern.
pub(crate) const LANES: usize = 16;

/// 1.5 * 2^23: adding it to a number of small size rounds that to an integer in the low mantissa bits.
pub(crate) const SHIFT: f32 = 12_582_912.0;
pub(crate) const SHIFT_BITS: i32 = 0x4b40_0000;

/// Adds sixteen lanes pairwise: j + (j + 8), then + 4, + 2, + 1.
pub(crate) fn fold_lanes(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] += lanes[j + half];
        }
    }
    lanes[0]
}

/// The largest of sixteen lanes, compared in the pattern of [`fold_lanes`].
pub(crate) fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] = greater(lanes[j], lanes[j + half]);
        }
    }
    lanes[0]
}

/// `a > b ? a : b`: b when either is NaN. The scalar definition of [`Simd::greater`].
#[inline(always)]
pub(crate) fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Operations on sixteen lanes. Each rounds once, to nearest even.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F32: Copy;

    /// Asks for the cache line in which a place lies, if there is one; nothing is read.
    fn prefetch<T>(self, place: Option<&T>);
    fn splat(self, x: f32) -> Self::F32;
    fn load(self, x: &[f32; LANES]) -> Self::F32;
    fn store(self, x: Self::F32, out: &mut [f32; LANES]);
    /// Sixteen IEEE halves, widened.
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32;
    /// Sixteen integers, as numbers.
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32;
    /// Narrowed to IEEE halves.
    fn store_f16(self, x: Self::F32, out: &mut [u16; LANES]);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a > b ? a : b`.
    fn greater(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a < b ? a : b`.
    fn less(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The lanes of `y`, or the canonical NaN where `x` is NaN.
    fn nan_where_nan(self, x: Self::F32, y: Self::F32) -> Self::F32;
    /// 2 to the powers `h` and `n - h`, where n is the integer in the low mantissa bits of `1.5 * 2^23 + n` and h is
    /// n / 2 rounded down. See `math::exp`.
    fn two_powers(self, shifted: Self::F32) -> (Self::F32, Self::F32);

    /// Up to sixteen values; absent lanes are +0.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F32 {
        if let Ok(lanes) = x.try_into() {
            return self.load(lanes);
        }
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// The first `out.len()` lanes.
    #[inline(always)]
    fn store_part(self, x: Self::F32, out: &mut [f32]) {
        if let Ok(lanes) = out.try_into() {
            return self.store(x, lanes);
        }
        let lanes = self.to_array(x);
        out.copy_from_slice(&lanes[..out.len()]);
    }

    #[inline(always)]
    fn to_array(self, x: Self::F32) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        lanes
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use crate::isa::Isa;

    const VALUES: [f32; LANES] = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1.0e-45,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        65_520.0,
        65_519.9,
        2.98e-8,
        -6.1e-5,
        123.456,
    ];

    /// Rotated, so that each value meets several others.
    fn rotated(by: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| VALUES[(lane + by) % LANES])
    }

    fn same(got: [f32; LANES], expected: [f32; LANES], operation: &str) {
        for (got, expected) in got.into_iter().zip(expected) {
            let equal = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
            assert!(equal, "{operation}: {got:?} is not {expected:?}");
        }
    }

    #[inline(always)]
    fn check_operations<S: Simd>(s: S) {
        let each = |f: &dyn Fn(usize) -> f32| std::array::from_fn::<f32, LANES, _>(f);
        for by in 0..=LANES {
            let (a, b, c) = (VALUES, rotated(by), rotated(2 * by + 1));
            let (va, vb, vc) = (s.load(&a), s.load(&b), s.load(&c));
            same(s.to_array(s.add(va, vb)), each(&|j| a[j] + b[j]), "add");
            same(s.to_array(s.sub(va, vb)), each(&|j| a[j] - b[j]), "sub");
            same(s.to_array(s.mul(va, vb)), each(&|j| a[j] * b[j]), "mul");
            same(s.to_array(s.div(va, vb)), each(&|j| a[j] / b[j]), "div");
            same(s.to_array(s.fma(va, vb, vc)), each(&|j| a[j].mul_add(b[j], c[j])), "fma");
            same(s.to_array(s.greater(va, vb)), each(&|j| greater(a[j], b[j])), "greater");
            same(s.to_array(s.less(va, vb)), each(&|j| if a[j] < b[j] { a[j] } else { b[j] }), "less");
            let nan = each(&|j| if a[j].is_nan() { f32::NAN } else { b[j] });
            same(s.to_array(s.nan_where_nan(va, vb)), nan, "nan_where_nan");
            same(s.to_array(s.splat(c[0])), [c[0]; LANES], "splat");
            let mut part = [9.0; LANES];
            s.store_part(s.load_part(&a[..by]), &mut part[..by]);
            same(part, each(&|j| if j < by { a[j] } else { 9.0 }), "load_part, store_part");
        }
        let mut halves = [0_u16; LANES];
        s.store_f16(s.load(&VALUES), &mut halves);
        let expected = VALUES.map(half::f16::from_f32);
        same(s.to_array(s.load_f16(&halves)), expected.map(half::f16::to_f32), "f16");
        let bytes: [i8; LANES] = std::array::from_fn(|j| (17 * j) as i8);
        same(s.to_array(s.load_i8(&bytes)), bytes.map(f32::from), "i8");
        let shifted: [f32; LANES] = std::array::from_fn(|j| 12_582_912.0 + 19.0 * j as f32 - 150.0);
        let (low, high) = s.two_powers(s.load(&shifted));
        let n = |j: usize| 19 * j as i32 - 150;
        same(s.to_array(low), each(&|j| 2_f32.powi(n(j) >> 1)), "two_powers");
        same(s.to_array(high), each(&|j| 2_f32.powi(n(j) - (n(j) >> 1))), "two_powers");
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn check_avx2() {
        check_operations(Avx2::token());
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn check_avx512() {
        check_operations(Avx512::token());
    }

    #[test]
    fn operations_are_those_of_ieee() {
        if Isa::Avx2.is_available() {
            // SAFETY: the CPU has the features.
            unsafe { check_avx2() };
        } else {
            println!("skipped: no AVX2");
        }
        if Isa::Avx512.is_available() {
            // SAFETY: the CPU has the features.
            unsafe { check_avx512() };
        } else {
            println!("skipped: no AVX-512");
        }
    }

    #[test]
    fn lanes_fold_in_the_fixed_pattern() {
        let lanes: [f32; LANES] = std::array::from_fn(|j| 1.0 + j as f32);
        assert_eq!(fold_lanes(lanes), 136.0);
        let mut cancel = [0.0; LANES];
        (cancel[0], cancel[8], cancel[1]) = (1.0e8, -1.0e8, 1.0);
        assert_eq!(fold_lanes(cancel), 1.0, "lane 0 meets lane 8 first");
        assert_eq!(max_lanes(lanes), 16.0);
    }
}
