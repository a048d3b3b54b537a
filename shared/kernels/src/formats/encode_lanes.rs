//! Sixteen groups of 32 weights at once, a lane each: how they are rounded to codes of four bits, what that errs, and which
//! scale and minimum err least. Lanes never meet, so the coding of a group does not depend on its neighbours.

use half::f16;

use super::GROUP_LEN;
use crate::Kernels;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, SHIFT, Simd, greater};

/// Largest code of four bits.
pub(super) const MAX_CODE: f32 = 15.0;
/// Codes that the range of a group is cut into, one after the other.
const STEPS: [f32; 12] = [13.9, 14.2, 14.4, 14.6, 14.7, 14.8, 14.9, 15.0, 15.1, 15.3, 15.6, 15.9];

/// One number of each group.
pub(super) type Lanes = [f32; LANES];

/// Weights column by column.
pub(crate) type Columns = [Lanes; GROUP_LEN];

/// Sixteen groups that lie one after the other.
pub(super) struct Groups<'k> {
    kernels: &'k Kernels,
    pub columns: Columns,
    /// Of the weights of each group.
    pub sums: Lanes,
}

/// Weights as `scale * code + min`.
#[derive(Clone, Copy)]
pub(crate) struct Coding {
    pub scale: Lanes,
    pub min: Lanes,
    /// 1 / scale, 0 of 0.
    inverse: Lanes,
}

/// Sums over the columns of each group, when every weight is rounded to the nearest code.
#[derive(Clone, Copy)]
pub(crate) struct CodingSums {
    pub codes: Lanes,
    /// Code by code.
    pub squares: Lanes,
    /// Code by weight.
    pub mixed: Lanes,
    /// Squares of what the coding errs by.
    pub errors: Lanes,
}

/// What a coding makes of sixteen groups.
pub(crate) type CodingKernel = unsafe fn(&Columns, &Coding) -> CodingSums;

/// 1 / x; 0 of 0.
pub(super) fn inverse_of(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The nearest half; the largest one of its sign where there is none near.
pub(super) fn half_of(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// One number, made for each lane.
pub(super) fn lanes(of: impl FnMut(usize) -> f32) -> Lanes {
    std::array::from_fn(of)
}

/// The other numbers in the lanes in which they are better.
pub(super) fn take_better<const N: usize>(
    best: [&mut Lanes; N],
    other: [&Lanes; N],
    is_better: [bool; LANES],
) {
    for (best, other) in best.into_iter().zip(other) {
        *best = lanes(|l| if is_better[l] { other[l] } else { best[l] });
    }
}

impl Coding {
    pub(super) fn new(scale: Lanes, min: Lanes) -> Self {
        Self { scale, min, inverse: scale.map(inverse_of) }
    }

    /// `(weight - min) / scale`, rounded to the nearest code; ties to even.
    pub(super) fn code(&self, lane: usize, weight: f32) -> f32 {
        let scaled = greater((weight - self.min[lane]) * self.inverse[lane], 0.0);
        let bounded = if scaled < MAX_CODE { scaled } else { MAX_CODE };
        (bounded + SHIFT) - SHIFT
    }
}

impl<'k> Groups<'k> {
    pub(super) fn new(kernels: &'k Kernels, weights: &[f32; LANES * GROUP_LEN]) -> Self {
        let columns: Columns = std::array::from_fn(|column| lanes(|l| weights[l * GROUP_LEN + column]));
        let sums = columns.iter().fold([0.0; LANES], |sums, column| lanes(|l| sums[l] + column[l]));
        Self { kernels, columns, sums }
    }

    /// Whether every weight of the group is a finite number.
    pub(super) fn is_finite(&self, lane: usize) -> bool {
        self.columns.iter().all(|column| column[lane].is_finite())
    }

    /// The smallest and the largest of each group, or these where they are smaller and larger.
    pub(super) fn range(&self, lowest: f32, highest: f32) -> (Lanes, Lanes) {
        let (mut low, mut high) = ([lowest; LANES], [highest; LANES]);
        for column in &self.columns {
            low = lanes(|l| if column[l] < low[l] { column[l] } else { low[l] });
            high = lanes(|l| if column[l] > high[l] { column[l] } else { high[l] });
        }
        (low, high)
    }

    pub(super) fn sums(&self, coding: &Coding) -> CodingSums {
        // SAFETY: a table is only handed out when the CPU has its features.
        unsafe { (self.kernels.coding_sums)(&self.columns, coding) }
    }

    /// The scale and the minimum, at most zero, of about the least squared error: codes by several steps around the
    /// range / 15, scale and minimum for these codes in closed form.
    pub(super) fn search(&self) -> Coding {
        let (lowest, highest) = self.range(0.0, 0.0);
        let range = lanes(|l| highest[l] - lowest[l]);
        let (mut scale, mut min) = (range.map(|range| range / MAX_CODE), lowest);
        let mut least = [f32::INFINITY; LANES];
        for n_steps in STEPS {
            let sums = self.sums(&Coding::new(range.map(|range| range / n_steps), lowest));
            let fits: [Fit; LANES] = std::array::from_fn(|l| self.least_squares(&sums, l));
            let other = [fits.map(|fit| fit.scale), fits.map(|fit| fit.min), fits.map(|fit| fit.error)];
            let is_better = std::array::from_fn(|l| fits[l].error < least[l]);
            take_better([&mut scale, &mut min, &mut least], other.each_ref(), is_better);
        }
        Coding::new(scale, min)
    }

    /// The best scale and minimum for the codes of a lane.
    fn least_squares(&self, sums: &CodingSums, l: usize) -> Fit {
        const N: f32 = GROUP_LEN as f32;
        let (codes, squares, mixed, weights) = (sums.codes[l], sums.squares[l], sums.mixed[l], self.sums[l]);
        let determinant = N * squares - codes * codes;
        let free = (N * mixed - codes * weights) / determinant;
        let free_min = (weights - free * codes) / N;
        // A minimum above zero cannot be stored.
        let is_free = determinant > 0.0 && free > 0.0 && free_min < 0.0;
        let (scale, min) = if is_free { (free, free_min) } else { (mixed / squares, 0.0) };
        let error =
            scale * (scale * squares - 2.0 * mixed) + min * (N * min - 2.0 * weights + 2.0 * scale * codes);
        // Codes that are all zero, or that only a negative scale would fit, are no candidates.
        let error = if scale > 0.0 { error } else { f32::INFINITY };
        Fit { scale, min, error }
    }
}

/// One group.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    min: f32,
    /// Sum of squares, less that of the weights themselves.
    error: f32,
}

/// Scalar definition.
pub(crate) fn coding_sums_scalar(columns: &Columns, coding: &Coding) -> CodingSums {
    let zeros = [0.0; LANES];
    let mut sums = CodingSums { codes: zeros, squares: zeros, mixed: zeros, errors: zeros };
    for column in columns {
        for (l, weight) in column.iter().enumerate() {
            let code = coding.code(l, *weight);
            sums.codes[l] += code;
            sums.squares[l] += code * code;
            sums.mixed[l] += code * weight;
            let error = coding.scale[l] * code + coding.min[l] - weight;
            sums.errors[l] += error * error;
        }
    }
    sums
}

#[inline(always)]
fn coding_sums<S: Simd>(s: S, columns: &Columns, coding: &Coding) -> CodingSums {
    let (scale, min, inverse) = (s.load(&coding.scale), s.load(&coding.min), s.load(&coding.inverse));
    let (zero, largest, shift) = (s.splat(0.0), s.splat(MAX_CODE), s.splat(SHIFT));
    let (mut codes, mut squares, mut mixed, mut errors) = (zero, zero, zero, zero);
    for column in columns {
        let weight = s.load(column);
        let scaled = s.greater(s.mul(s.sub(weight, min), inverse), zero);
        let code = s.sub(s.add(s.less(scaled, largest), shift), shift);
        codes = s.add(codes, code);
        squares = s.add(squares, s.mul(code, code));
        mixed = s.add(mixed, s.mul(code, weight));
        let error = s.sub(s.add(s.mul(scale, code), min), weight);
        errors = s.add(errors, s.mul(error, error));
    }
    CodingSums {
        codes: s.to_array(codes),
        squares: s.to_array(squares),
        mixed: s.to_array(mixed),
        errors: s.to_array(errors),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn coding_sums_avx2(columns: &Columns, coding: &Coding) -> CodingSums {
    coding_sums(Avx2::token(), columns, coding)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn coding_sums_avx512(columns: &Columns, coding: &Coding) -> CodingSums {
    coding_sums(Avx512::token(), columns, coding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Numbers, assert_same_bits, twins};

    #[test]
    fn twins_sum_as_the_definition_does() {
        let mut numbers = Numbers::new(11);
        for round in 0..200 {
            let mut some = || {
                let some = if round % 3 == 0 { numbers.wild_values(LANES) } else { numbers.values(LANES) };
                lanes(|l| some[l])
            };
            let columns: Columns = std::array::from_fn(|_| some());
            let mut coding = Coding::new(some().map(|scale| scale / 4.0), some());
            coding.scale[round % LANES] = 0.0;
            let coding = Coding::new(coding.scale, coding.min);
            let expected = coding_sums_scalar(&columns, &coding);
            for (name, twin) in twins!(coding_sums_avx2, coding_sums_avx512; CodingKernel) {
                // SAFETY: `twins` leaves out what the CPU lacks.
                let got = unsafe { twin(&columns, &coding) };
                assert_same_bits(&got.codes, &expected.codes, name);
                assert_same_bits(&got.squares, &expected.squares, name);
                assert_same_bits(&got.mixed, &expected.mixed, name);
                assert_same_bits(&got.errors, &expected.errors, name);
            }
        }
    }

    #[test]
    fn a_group_is_coded_as_it_would_be_alone() {
        let mut numbers = Numbers::new(12);
        let kernels = Kernels::detect();
        let weights: [f32; LANES * GROUP_LEN] = std::array::from_fn(|_| numbers.value());
        let together = Groups::new(kernels, &weights).search();
        for l in 0..LANES {
            let mut alone = [0.0; LANES * GROUP_LEN];
            alone[..GROUP_LEN].copy_from_slice(&weights[l * GROUP_LEN..][..GROUP_LEN]);
            let alone = Groups::new(kernels, &alone).search();
            assert_eq!((alone.scale[0], alone.min[0]), (together.scale[l], together.min[l]));
        }
    }
}
