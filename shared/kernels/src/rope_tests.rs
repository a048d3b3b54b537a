//! Tests of the rotary embedding: bits of the twins, known frequencies, geometry.

use super::*;
use crate::testing::{Numbers, assert_same_bits, twins};
use crate::{Isa, Pinning};

fn config(style: RopeStyle, rotary_dim: usize) -> RopeConfig {
    RopeConfig { style, rotary_dim, theta: 10_000.0, freq_factors: None, scaling: RopeScaling::None }
}

fn check_twins(definition: fn(&mut [f32], &[f32], &[f32]), twins: Vec<(&str, RotateKernel)>) {
    let mut numbers = Numbers::new(8);
    for n_pairs in 0..70 {
        for wild in [false, true] {
            let head_dim = 2 * n_pairs + n_pairs % 3;
            let head = if wild { numbers.wild_values(head_dim) } else { numbers.values(head_dim) };
            let (cos, sin) = (numbers.values(n_pairs), numbers.values(n_pairs));
            let mut expected = head.clone();
            definition(&mut expected, &cos, &sin);
            for (name, twin) in &twins {
                let mut got = head.clone();
                // SAFETY: `twins` leaves out what the CPU lacks.
                unsafe { twin(&mut got, &cos, &sin) };
                assert_same_bits(&got, &expected, name);
            }
        }
    }
}

#[test]
fn twins_give_the_same_bits() {
    check_twins(rotate_half_scalar, twins!(rotate_half_avx2, rotate_half_avx512; RotateKernel));
    check_twins(
        rotate_interleaved_scalar,
        twins!(rotate_interleaved_avx2, rotate_interleaved_avx512; RotateKernel),
    );
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let mut numbers = Numbers::new(9);
    let (n_rows, n_heads, head_dim) = (45, 5, 72);
    let positions: Vec<u32> = (0..n_rows).map(|_| numbers.below(5_000) as u32).collect();
    let x = numbers.values(n_rows * n_heads * head_dim);
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        let rope = config(style, 64).build();
        let mut table = RopeTable::default();
        let scalar = Kernels::for_isa(Isa::Scalar);
        let alone = ThreadPool::new(1, Pinning::None);
        let mut expected = x.clone();
        for (row, position) in expected.chunks_exact_mut(n_heads * head_dim).zip(&positions) {
            rope.angles([*position], &mut table);
            rope.rotate(scalar, &alone, &table, row, head_dim);
        }
        rope.angles(positions.iter().copied(), &mut table);
        for isa in Isa::available() {
            for n_threads in [1, 2, 3] {
                let pool = ThreadPool::new(n_threads, Pinning::None);
                let mut got = x.clone();
                rope.rotate(Kernels::for_isa(isa), &pool, &table, &mut got, head_dim);
                assert_same_bits(&got, &expected, isa.name());
            }
        }
    }
}

#[test]
fn frequencies_are_powers_of_theta() {
    for (theta, dim) in [(10_000.0_f64, 64), (1.0e6, 128), (500_000.0, 96)] {
        for pair in 0..dim / 2 {
            let expected = theta.powf(-2.0 * pair as f64 / dim as f64);
            let got = inv_freq(theta, pair, dim);
            assert!(((got - expected) / expected).abs() < 1.0e-14, "{got} is not {expected}");
        }
    }
}

#[test]
fn rotation_keeps_lengths_and_depends_on_the_distance_only() {
    let mut numbers = Numbers::new(10);
    let (kernels, pool) = (Kernels::detect(), ThreadPool::new(1, Pinning::None));
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        let rope = config(style, 64).build();
        let mut table = RopeTable::default();
        let mut rotated = |x: &[f32], position: u32| {
            let mut x = x.to_vec();
            rope.angles([position], &mut table);
            rope.rotate(kernels, &pool, &table, &mut x, 64);
            x
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let (q, k) = (numbers.values(64), numbers.values(64));
        assert_eq!(rotated(&q, 0), q);
        assert_ne!(rotated(&q, 1), q);
        assert!((dot(&rotated(&q, 77), &rotated(&q, 77)) - dot(&q, &q)).abs() < 1.0e-5);
        let near = dot(&rotated(&q, 9), &rotated(&k, 4));
        let far = dot(&rotated(&q, 3_009), &rotated(&k, 3_004));
        assert!((near - far).abs() < 1.0e-4, "{near} {far}");
    }
}

#[test]
fn both_styles_are_one_rotation_of_permuted_heads() {
    let mut numbers = Numbers::new(11);
    let (cos, sin) = (numbers.values(32), numbers.values(32));
    let interleaved = numbers.values(64);
    let permute = |x: &[f32]| -> Vec<f32> {
        (0..64).map(|i| if i < 32 { x[2 * i] } else { x[2 * (i - 32) + 1] }).collect()
    };
    let mut half = permute(&interleaved);
    let mut turned = interleaved.clone();
    rotate_interleaved_scalar(&mut turned, &cos, &sin);
    rotate_half_scalar(&mut half, &cos, &sin);
    assert_same_bits(&half, &permute(&turned), "half");
}

#[test]
fn scaling_stretches_what_it_should() {
    let plain = config(RopeStyle::Half, 128).build();
    let linear = RopeConfig { scaling: RopeScaling::Linear { factor: 4.0 }, ..config(RopeStyle::Half, 128) };
    for (scaled, freq) in linear.build().inv_freq.iter().zip(&plain.inv_freq) {
        assert_eq!(*scaled, freq / 4.0);
    }
    let llama3 = RopeConfig {
        theta: 500_000.0,
        scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8_192.0,
        },
        ..config(RopeStyle::Half, 128)
    };
    let base = RopeConfig { theta: 500_000.0, ..config(RopeStyle::Half, 128) }.build();
    let ratios: Vec<f64> =
        llama3.build().inv_freq.iter().zip(&base.inv_freq).map(|(scaled, freq)| freq / scaled).collect();
    // Wavelengths: pair 0 has 6 positions, the last pair millions.
    assert_eq!(ratios[0], 1.0);
    assert_eq!(ratios[63], 8.0);
    assert!(ratios.is_sorted(), "{ratios:?}");
    assert!(ratios.iter().any(|ratio| *ratio > 1.0 && *ratio < 8.0), "there is a mixture between");
    let factors = RopeConfig { freq_factors: Some(vec![2.0; 64]), ..config(RopeStyle::Half, 128) };
    assert_eq!(factors.build().inv_freq[5], plain.inv_freq[5] / 2.0);
}
