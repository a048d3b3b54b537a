//! Gumbel noise as a function of (seed, position, token): the counter-based generator Philox4x32-10 of Salmon,
//! Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). No state.

use crate::math;

/// Tokens whose noise is made together: ids `GROUP * g .. GROUP * (g + 1)`.
pub const GROUP: usize = 16;
/// No noise value is larger: the largest is -ln(2^-32), about 22.18.
pub const MAX_NOISE: f32 = 22.2;

const N_ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for a counter of four words and a key of two.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..N_ROUNDS {
        let p0 = u64::from(a) * u64::from(MULTIPLIERS[0]);
        let p1 = u64::from(c) * u64::from(MULTIPLIERS[1]);
        [a, b, c, d] = [(p1 >> 32) as u32 ^ b ^ k0, p1 as u32, (p0 >> 32) as u32 ^ d ^ k1, p0 as u32];
        k0 = k0.wrapping_add(KEY_STEPS[0]);
        k1 = k1.wrapping_add(KEY_STEPS[1]);
    }
    [a, b, c, d]
}

/// Noise of the 16 tokens of `group` at `position`. Each token has one word of a block of four: block `token / 4`
/// of the position, word `token % 4`.
pub fn gumbel_group(seed: u64, position: u32, group: u32) -> [f32; GROUP] {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut noise = [0.0; GROUP];
    for block in 0..4 {
        let words = philox4x32([group * 4 + block, position, 0, 0], key);
        for word in 0..4 {
            noise[4 * block as usize + word] = gumbel_of(words[word]);
        }
    }
    noise
}

/// Noise of one token.
pub fn gumbel(seed: u64, position: u32, token: u32) -> f32 {
    gumbel_group(seed, position, token / GROUP as u32)[token as usize % GROUP]
}

/// -ln(-ln(u)) for u = 1 - w with w = (j + 1/2) / 2^31 and j the upper 31 bits of the word.
///
/// Rare winners live at u near 1, where f32 is coarse; there ln(u) is taken as ln(1 - w), which is not. Both u and
/// w are strictly between 0 and 1 in exact arithmetic, and neither logarithm ever sees 0.
#[inline(always)]
fn gumbel_of(word: u32) -> f32 {
    const SCALE: f32 = 1.0 / 2_147_483_648.0;
    let j = (word >> 1) as i32;
    let w = (j as f32 + 0.5) * SCALE;
    let u = ((i32::MAX - j) as f32 + 0.5) * SCALE;
    let (f, e) = math::split(u);
    let (f, e) = if w < 0.29 { (-w, 0.0) } else { (f, e) };
    let exponential = -math::ln_of_split(f, e);
    let (f, e) = math::split(exponential);
    -math::ln_of_split(f, e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // The known-answer file of the Random123 distribution, philox4x32 with 10 rounds.
        let all = u32::MAX;
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([all; 4], [all; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn noise_is_the_double_logarithm_for_every_kind_of_word() {
        let edges = [0, 1, 2, 3, u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1, 0x4a3d_70a3, 0x4a3d_70a4];
        for word in edges.into_iter().chain((0..u32::MAX - 5_003).step_by(5_003)) {
            let w = (f64::from(word >> 1) + 0.5) / 2f64.powi(31);
            let exact = -(-(-w).ln_1p()).ln();
            let noise = gumbel_of(word);
            assert!(
                (f64::from(noise) - exact).abs() <= 1e-6 + 3e-7 * exact.abs(),
                "{word}: {noise} not {exact}"
            );
            assert!(noise <= MAX_NOISE);
        }
    }

    #[test]
    fn these_values_never_change() {
        let bits = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (u64::MAX, 131_071, 151_935)]
            .map(|(seed, position, token)| gumbel(seed, position, token).to_bits());
        assert_eq!(bits, [1_059_897_943, 3_209_361_075, 1_058_914_082, 3_208_702_744, 1_067_013_228]);
    }

    #[test]
    fn seed_position_and_token_all_matter() {
        let base = gumbel(7, 100, 1000);
        for other in [gumbel(8, 100, 1000), gumbel(7 + (1 << 32), 100, 1000), gumbel(7, 101, 1000)] {
            assert_ne!(base, other);
        }
        let mut row: Vec<u32> = (0..4096).map(|token| gumbel(7, 100, token).to_bits()).collect();
        row.sort_unstable();
        row.dedup();
        assert!(row.len() > 4090, "{} different values of 4096", row.len());
    }
}
