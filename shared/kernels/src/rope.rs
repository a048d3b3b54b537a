//! Rotary position embedding (Su et al. 2021): frequencies, one table of angles per batch, the rotation of heads.
//! Angles are computed in f64 by our own sine and cosine; the rotation works in f32.

use crate::math::{exp, ln, sin_cos};
use crate::pool::SharedSlice;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd};
use crate::{Kernels, ThreadPool};

/// Elements one task works on: enough to pay for handing it out.
const TASK_ELEMENTS: usize = 8 * 1024;

/// Which elements of a head make a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeStyle {
    /// 2 i and 2 i + 1: `llama` in GGUF files.
    Interleaved,
    /// i and i + rotary_dim / 2: `qwen2`, and every model of Hugging Face.
    Half,
}

/// How frequencies are stretched for contexts longer than those the model was first trained on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor.
    Linear {
        /// Frequencies are divided by it.
        factor: f64,
    },
    /// By wavelength: Llama 3.1.
    Llama3 {
        /// Low frequencies are divided by it.
        factor: f64,
        /// Wavelengths above `original_context` over this are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_context` over this are left alone; between the two it is a mixture.
        high_freq_factor: f64,
        /// Context of the first training, in positions.
        original_context: f64,
    },
}

/// Everything that determines the rotation of a position.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeConfig {
    /// Which elements make a pair.
    pub style: RopeStyle,
    /// Elements at the start of each head that are rotated; even.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// One divisor per pair (`rope_freqs.weight` of GGUF files).
    pub freq_factors: Option<Vec<f32>>,
    /// Stretching.
    pub scaling: RopeScaling,
}

/// Frequencies of a model, in radians per position.
#[derive(Clone, Debug)]
pub struct Rope {
    style: RopeStyle,
    inv_freq: Vec<f64>,
}

/// Sines and cosines of the rows of one batch.
#[derive(Clone, Debug, Default)]
pub struct RopeTable {
    /// [n_rows, rotary_dim / 2]
    cos: Vec<f32>,
    /// [n_rows, rotary_dim / 2]
    sin: Vec<f32>,
}

impl RopeTable {
    /// Cosines, `[n_rows, rotary_dim / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, `[n_rows, rotary_dim / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Rotates one head: its first `2 * cos.len()` elements.
pub(crate) type RotateKernel = unsafe fn(head: &mut [f32], cos: &[f32], sin: &[f32]);

impl RopeConfig {
    /// The frequencies, computed once per model.
    ///
    /// # Panics
    /// When `rotary_dim` is odd or `freq_factors` has another number of pairs; checkpoints were checked for both.
    pub fn build(&self) -> Rope {
        assert!(self.rotary_dim.is_multiple_of(2), "rotary_dim is {}, it must be even", self.rotary_dim);
        let n_pairs = self.rotary_dim / 2;
        if let Some(factors) = &self.freq_factors {
            assert_eq!(factors.len(), n_pairs, "one frequency factor per pair");
        }
        let inv_freq = (0..n_pairs)
            .map(|pair| {
                let freq = self.scaling.stretch(inv_freq(self.theta, pair, self.rotary_dim));
                self.freq_factors.as_ref().map_or(freq, |factors| freq / f64::from(factors[pair]))
            })
            .collect();
        Rope { style: self.style, inv_freq }
    }
}

/// theta to the power -2 pair / dim.
fn inv_freq(theta: f64, pair: usize, dim: usize) -> f64 {
    exp(-ln(theta) * (2 * pair) as f64 / dim as f64)
}

impl RopeScaling {
    fn stretch(self, freq: f64) -> f64 {
        match self {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = std::f64::consts::TAU / freq;
                let turns = original_context / wavelength;
                if turns > high_freq_factor {
                    freq
                } else if turns < low_freq_factor {
                    freq / factor
                } else {
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * freq / factor + kept * freq
                }
            }
        }
    }
}

impl Rope {
    /// Elements of each head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Fills `table` with one row per position.
    pub fn angles(&self, positions: impl IntoIterator<Item = u32>, table: &mut RopeTable) {
        table.cos.clear();
        table.sin.clear();
        for position in positions {
            for inv_freq in &self.inv_freq {
                let (sin, cos) = sin_cos(f64::from(position) * inv_freq);
                table.cos.push(cos as f32);
                table.sin.push(sin as f32);
            }
        }
    }

    /// Rotates the heads of `x`, `[n_rows, n_heads, head_dim]`, row r by row r of the table.
    ///
    /// # Panics
    /// When `x` does not have as many rows as the table, or heads are shorter than `rotary_dim`.
    pub fn rotate(
        &self,
        kernels: &Kernels,
        pool: &ThreadPool,
        table: &RopeTable,
        x: &mut [f32],
        head_dim: usize,
    ) {
        let n_pairs = self.inv_freq.len();
        if x.is_empty() || n_pairs == 0 {
            return;
        }
        let n_rows = table.cos.len() / n_pairs;
        assert!(n_rows > 0 && x.len().is_multiple_of(n_rows * head_dim), "{} values, {n_rows} rows", x.len());
        assert!(2 * n_pairs <= head_dim, "heads of {head_dim} cannot have {} rotated", 2 * n_pairs);
        let row_len = x.len() / n_rows;
        let rows_per_task = (TASK_ELEMENTS / row_len).max(1);
        let kernel = match self.style {
            RopeStyle::Interleaved => kernels.rotate_interleaved,
            RopeStyle::Half => kernels.rotate_half,
        };
        let x = SharedSlice::new(x);
        pool.run(n_rows.div_ceil(rows_per_task), &|task| {
            for row in task * rows_per_task..n_rows.min((task + 1) * rows_per_task) {
                // SAFETY: rows are disjoint, and each is in one task.
                let heads = unsafe { x.range_mut(row * row_len..(row + 1) * row_len) };
                let pairs = row * n_pairs..(row + 1) * n_pairs;
                for head in heads.chunks_exact_mut(head_dim) {
                    // SAFETY: a table of kernels is only handed out when the CPU has its features.
                    unsafe { kernel(head, &table.cos[pairs.clone()], &table.sin[pairs.clone()]) };
                }
            }
        });
    }
}

/// Scalar definition: (a, b) turned by the angle.
fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
}

pub(crate) fn rotate_interleaved_scalar(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    for i in 0..cos.len() {
        (head[2 * i], head[2 * i + 1]) = turn(head[2 * i], head[2 * i + 1], cos[i], sin[i]);
    }
}

pub(crate) fn rotate_half_scalar(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    for i in 0..n {
        (head[i], head[i + n]) = turn(head[i], head[i + n], cos[i], sin[i]);
    }
}

/// [`turn`] of sixteen pairs.
#[inline(always)]
fn turn_lanes<S: Simd>(s: S, [a, b]: [S::F32; 2], [cos, sin]: [S::F32; 2]) -> [S::F32; 2] {
    let negated = s.mul(s.mul(b, sin), s.splat(-1.0));
    [s.fma(a, cos, negated), s.fma(a, sin, s.mul(b, cos))]
}

#[inline(always)]
fn rotate_half<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head[..2 * cos.len()].split_at_mut(cos.len());
    let pairs = first.chunks_mut(LANES).zip(second.chunks_mut(LANES));
    for ((a, b), (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
        let angle = [s.load_part(cos), s.load_part(sin)];
        let turned = turn_lanes(s, [s.load_part(a), s.load_part(b)], angle);
        s.store_part(turned[0], a);
        s.store_part(turned[1], b);
    }
}

#[inline(always)]
fn rotate_interleaved<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let pairs = head[..2 * cos.len()].chunks_mut(2 * LANES);
    for (pairs, (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
        let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
        for (i, pair) in pairs.as_chunks::<2>().0.iter().enumerate() {
            (a[i], b[i]) = (pair[0], pair[1]);
        }
        let angle = [s.load_part(cos), s.load_part(sin)];
        let turned = turn_lanes(s, [s.load(&a), s.load(&b)], angle);
        (a, b) = (s.to_array(turned[0]), s.to_array(turned[1]));
        for (i, pair) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *pair = [a[i], b[i]];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn rotate_half_avx2(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    rotate_half(Avx2::token(), head, cos, sin);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn rotate_half_avx512(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    rotate_half(Avx512::token(), head, cos, sin);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn rotate_interleaved_avx2(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    rotate_interleaved(Avx2::token(), head, cos, sin);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn rotate_interleaved_avx512(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    rotate_interleaved(Avx512::token(), head, cos, sin);
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
