//! From the configured rotary embedding to the kernels' frequencies. Angles and rotation are the kernels' part.

use std::f64::consts::TAU;

use paceline_kernels::math::{exp, ln};
use paceline_kernels::rope::{Rope, RopeConfig as KernelConfig, RopeScaling as KernelScaling, RopeStyle};

use crate::config::{Llama3Scaling, RopeConfig, RopeScaling};

/// Frequencies for heads whose pairs are in [`crate::config::PairLayout::Half`] order, as all are after loading.
pub fn build(rope: &RopeConfig, head_dim: usize) -> Rope {
    let (scaling, freq_factors) = match &rope.scaling {
        RopeScaling::None => (KernelScaling::None, None),
        RopeScaling::Linear(factor) => (KernelScaling::Linear { factor: *factor }, None),
        // As factors, so that a GGUF file, which carries them rounded to f32, gives the same bits.
        RopeScaling::Llama3(scaling) => {
            (KernelScaling::None, Some(llama3_factors(scaling, rope.theta, head_dim)))
        }
        RopeScaling::Factors(factors) => (KernelScaling::None, Some(factors.clone())),
    };
    KernelConfig { style: RopeStyle::Half, rotary_dim: head_dim, theta: rope.theta, freq_factors, scaling }
        .build()
}

/// What each frequency is divided by under Llama 3.1's scaling, in f32 as GGUF files carry it: 1 for short
/// wavelengths, the factor for long ones, between them a blend that is linear in frequency.
pub fn llama3_factors(scaling: &Llama3Scaling, theta: f64, head_dim: usize) -> Vec<f32> {
    let log_theta = ln(theta);
    let factor_of = |pair: usize| {
        let frequency = exp(-log_theta * (2 * pair) as f64 / head_dim as f64);
        let n_turns = scaling.original_context * frequency / TAU;
        let span = scaling.high_freq_factor - scaling.low_freq_factor;
        let kept = ((n_turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0);
        (1.0 / ((1.0 - kept) / scaling.factor + kept)) as f32
    };
    (0..head_dim / 2).map(factor_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_3_1: Llama3Scaling =
        Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_blends_between() {
        let factors = llama3_factors(&LLAMA_3_1, 500_000.0, 128);
        assert_eq!((factors[0], factors[63]), (1.0, 8.0));
        assert!(factors.is_sorted());
        let between = factors.iter().filter(|factor| (1.01..7.99).contains(*factor)).count();
        assert!((3..10).contains(&between), "{between} factors between");
        let kept = (8192.0 * 500_000f64.powf(-62.0 / 128.0) / TAU - 1.0) / 3.0;
        let expected = 1.0 / ((1.0 - kept) / 8.0 + kept);
        assert!((f64::from(factors[31]) - expected).abs() < 1e-6);
    }
}
