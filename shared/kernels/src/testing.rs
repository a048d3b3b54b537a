//! What the tests of several kernels share: the list of twins to test, comparison of bits, numbers to feed them.
//! It is compiled for tests only.

/// The named twins that this CPU can run, as (name, pointer); says which it skips.
macro_rules! twins {
    ($avx2:path, $avx512:path; $pointer:ty) => {{
        #[allow(unused_mut)]
        let mut twins: Vec<(&'static str, $pointer)> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        for (isa, name, twin) in [
            (crate::Isa::Avx2, stringify!($avx2), $avx2 as $pointer),
            (crate::Isa::Avx512, stringify!($avx512), $avx512 as $pointer),
        ] {
            if isa.is_available() {
                twins.push((name, twin));
            } else {
                println!("skipped: {name}, this CPU has no {isa}");
            }
        }
        twins
    }};
}
pub(crate) use twins;

/// Equal bits; one NaN is as good as another.
#[track_caller]
pub(crate) fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
        assert!(same, "{what}: value {i} is {got:?} ({:08x}), not {expected:?}", got.to_bits());
    }
}

/// Numbers from a seed, with nothing but integer arithmetic behind them.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// From -1 to 1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Values of all sizes, some of them extreme: infinities, NaN, subnormals, zeros of both signs.
    pub(crate) fn wild_values(&mut self, n: usize) -> Vec<f32> {
        const EXTREME: [f32; 9] =
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0e-45, -1.0e-40, 0.0, -0.0, f32::MAX, f32::MIN];
        (0..n)
            .map(|_| match self.below(4) {
                0 => EXTREME[self.below(EXTREME.len())],
                1 => f32::from_bits(self.bits() as u32),
                _ => self.value() * 30.0,
            })
            .collect()
    }
}
