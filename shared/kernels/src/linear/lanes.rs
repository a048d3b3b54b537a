//! The SIMD twins of matrix products, written once over a small set of operations on the 16 rows of a tile. Which
//! instructions those are is for the instruction set's own file.

use super::{Fetch, FloatLeaf, QuantizedLeaf, RowSums};
use crate::formats::{FloatFormat, QuantFormat, ScaleLayout};
use crate::packed::{Line, PackedGroup, QUADS, TILE_ROWS, planes};
use crate::quantize::{Quads, SCALE_WORDS, ScaleWord};
use crate::simd::Simd;
use paceline_domain::WeightType;

/// Operations on the bytes and integers of the 16 rows of a tile, lane = row, beside those of [`Simd`].
pub(super) trait Lanes: Copy {
    /// The same instruction set for floats.
    type Simd: Simd;
    /// 64 bytes: 4 for each row.
    type Bytes: Copy;
    /// An i32 for each row.
    type Ints: Copy;
    /// Whether registers hold the sums of as many tokens as are summed at once, beside the codes of a group.
    const HOLDS_SUMS: bool;
    /// Whether a dot waits several cycles for the one before it in its sum.
    const DOTS_WAIT: bool;

    fn simd(self) -> Self::Simd;

    /// Starts to fetch the cache line that lies so many bytes behind this one, and need not be there, into the first-level
    /// cache alone or into the second.
    fn prefetch<const NEAREST: bool, T>(self, first: &T, ahead: usize);
    fn load_bytes(self, line: &Line) -> Self::Bytes;
    /// `(bytes >> right) & mask` in each byte, `<<` for negative `right`; `mask` removes what crosses bytes.
    fn field(self, bytes: Self::Bytes, right: i32, mask: u8) -> Self::Bytes;
    fn or(self, left: Self::Bytes, right: Self::Bytes) -> Self::Bytes;
    fn no_bits(self) -> Self::Bytes;
    /// `acc + sum over the row's 4 bytes of code * activation code`, exact for codes of `BITS` bits.
    fn dot<const BITS: usize>(self, acc: Self::Ints, codes: Self::Bytes, quad: i32) -> Self::Ints;

    fn splat_int(self, value: i32) -> Self::Ints;
    /// `ints * factor`, a power of two.
    fn times(self, ints: Self::Ints, factor: i32) -> Self::Ints;
    fn plus(self, left: Self::Ints, right: Self::Ints) -> Self::Ints;
    /// `256 * high + low`.
    fn join(self, high: Self::Ints, low: Self::Ints) -> Self::Ints;
    fn to_floats(self, ints: Self::Ints) -> Floats<Self>;
    fn load_u8(self, bytes: &[u8; TILE_ROWS]) -> Self::Ints;
    fn load_i8(self, bytes: &[u8; TILE_ROWS]) -> Self::Ints;
    /// Low and high nibble of each byte.
    fn load_nibbles(self, bytes: &[u8; TILE_ROWS]) -> [Self::Ints; 2];
    fn load_f16(self, bytes: &[u8; 2 * TILE_ROWS]) -> Floats<Self>;
    fn load_bf16(self, bytes: &[u8; 2 * TILE_ROWS]) -> Floats<Self>;
    fn load_f32(self, bytes: &[u8; 4 * TILE_ROWS]) -> Floats<Self>;
}

/// An f32 for each row.
pub(super) type Floats<V> = <<V as Lanes>::Simd as Simd>::F32;

/// Calls `$body` for all of `$n` tokens, `$max` of at most 16 at a time and then for those that are left; `$first` is the first
/// of them. There is a body for each number, because each call unpacks the codes again, which takes about as long as the
/// products of one token.
macro_rules! for_tokens {
    ($n:expr, $max:expr, $count:ident, $first:ident => $body:expr) => {{
        let mut $first = 0;
        for_tokens!(@all $n, $max, $count, $first, $body, 16 15 14 13 12 11 10 9 8 7 6 5 4 3 2 1);
    }};
    (@all $n:expr, $max:expr, $count:ident, $first:ident, $body:expr, $($size:literal)*) => {
        $(if $size <= $max {
            const $count: usize = $size;
            while $first + $count <= $n {
                $body;
                $first += $count;
            }
        })*
    };
}
pub(super) use for_tokens;

/// Calls `$body` for each of `$n` tokens, at most 16, with its number as a constant, so that its sums stay in a register: a
/// loop of that many is left a loop by the compiler, and its sums in memory.
macro_rules! each_token {
    ($n:ident, $t:ident => $body:expr) => {
        each_token!(@each $n, $t, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@each $n:ident, $t:ident, $body:expr, $($token:literal)*) => {
        $(if $token < $n {
            let $t = $token;
            $body;
        })*
    };
}

/// So few tokens have each group's dots in two sums: until one is added to the next there is too little else to do. From
/// more tokens on the other tokens' dots are enough, and registers are not.
const FEW_TOKENS: usize = 8;

/// Sums a leaf of quantized weights for `T` tokens with codes of `P` planes.
#[inline(always)]
pub(super) fn sum_quantized<V: Lanes, F: QuantFormat, const P: usize, const T: usize>(
    v: V,
    leaf: &QuantizedLeaf<'_>,
    sums: &mut [RowSums],
) {
    let mut acc = [v.simd().splat(0.0); T];
    let codes = leaf.codes.as_chunks::<P>().0.chunks(leaf.step);
    let tokens = codes.zip(leaf.scales.chunks(SCALE_WORDS * leaf.step));
    for (group, (x_codes, x_words)) in tokens.take(leaf.n_groups).enumerate() {
        let PackedGroup { planes, own, shared } = leaf.weights.group::<F>(group);
        match leaf.fetch {
            Fetch::Nowhere => (),
            Fetch::Nearest(ahead) => prefetch_group::<V, F, true>(v, leaf.weights.group::<F>(group), ahead),
            Fetch::Second(ahead) => prefetch_group::<V, F, false>(v, leaf.weights.group::<F>(group), ahead),
        }
        let codes = unpack::<V, F>(v, planes);
        let scales = resolve::<V, F>(v, own, shared);
        let x_codes: &[[Quads; P]; T] = x_codes.first_chunk().expect("invariant: all tokens have the group");
        let [x_scales, x_first, x_second] = token_words::<F, T>(x_words, leaf.step);
        // A macro: a closure might be called, which takes forty times as long.
        macro_rules! add {
            ($t:expr) => {
                let x = (&x_codes[$t], f32::from_bits(x_scales[$t]), [x_first[$t], x_second[$t]]);
                acc[$t] = add_group_of::<V, F, P, T>(v, &codes, &scales, x, acc[$t]);
            };
        }
        if V::HOLDS_SUMS {
            each_token!(T, t => { add!(t); });
        } else {
            for t in 0..T {
                add!(t);
            }
        }
    }
    put(v.simd(), acc, leaf.adds, sums);
}

/// Of a group of activations, for each token: the scale, and twice what the type of weights needs beside it, for the halves
/// where these differ.
#[inline(always)]
fn token_words<F: QuantFormat, const T: usize>(words: &[u32], step: usize) -> [&[u32; T]; 3] {
    let [first, second] = match (F::SCALES.per_half(), F::SCALES.has_min()) {
        (true, _) => [ScaleWord::NegatedFirstHalfSum, ScaleWord::NegatedSecondHalfSum],
        (false, true) => [ScaleWord::ScaledSum; 2],
        (false, false) => [ScaleWord::NegatedSum; 2],
    };
    let of_tokens = |word: ScaleWord| -> &[u32; T] {
        words[word as usize * step..].first_chunk().expect("invariant: all tokens have the group")
    };
    [of_tokens(ScaleWord::Scale), of_tokens(first), of_tokens(second)]
}

/// Writes the sums of a leaf, or adds them to its left neighbour's.
#[inline(always)]
fn put<S: Simd, const T: usize>(s: S, acc: [S::F32; T], adds: bool, sums: &mut [RowSums]) {
    for (sums, acc) in sums.iter_mut().zip(acc) {
        let acc = if adds { s.add(s.load(sums), acc) } else { acc };
        s.store(acc, sums);
    }
}

/// Starts to fetch what lies behind a group: each line of the stream, because the CPU's own prefetchers stand
/// back where a program fetches, and would miss the ones left out.
#[inline(always)]
fn prefetch_group<V: Lanes, F: QuantFormat, const NEAREST: bool>(v: V, group: PackedGroup<'_>, ahead: usize) {
    for line in group.planes {
        v.prefetch::<NEAREST, _>(line, ahead);
    }
    v.prefetch::<NEAREST, _>(&group.own[0], ahead);
    if F::SCALES.has_super() {
        v.prefetch::<NEAREST, _>(&group.shared[0], ahead);
    }
}

/// The codes of a group as bytes, one vector for each quad.
#[inline(always)]
fn unpack<V: Lanes, F: QuantFormat>(v: V, lines: &[Line]) -> [V::Bytes; QUADS] {
    let [eight, four, two, one] = planes(F::BITS);
    let mut codes = [v.no_bits(); QUADS];
    // One call for each plane, not a loop, so that each is compiled for its own width.
    add_plane::<V>(v, &mut codes, lines, eight);
    add_plane::<V>(v, &mut codes, lines, four);
    add_plane::<V>(v, &mut codes, lines, two);
    add_plane::<V>(v, &mut codes, lines, one);
    codes
}

/// Adds the bits of one plane, given by its width, its first line and the lowest code bit it holds.
#[inline(always)]
fn add_plane<V: Lanes>(
    v: V,
    codes: &mut [V::Bytes; QUADS],
    lines: &[Line],
    (width, first_line, lowest): (usize, usize, usize),
) {
    if width == 0 {
        return;
    }
    let mask = ((0xff >> (8 - width)) << lowest) as u8;
    for quad in 0..QUADS {
        let line = v.load_bytes(&lines[first_line + quad % width]);
        let right = (quad / width * width) as i32 - lowest as i32;
        codes[quad] = v.or(codes[quad], v.field(line, right, mask));
    }
}

/// Scales of a group in all rows, for each half group.
struct LaneScales<V: Lanes> {
    scale: [Floats<V>; 2],
    min: [Floats<V>; 2],
}

#[inline(always)]
fn chunk<const N: usize>(bytes: &[u8], idx: usize) -> &[u8; N] {
    bytes[idx * N..].first_chunk().expect("invariant: the layout has room for all rows")
}

#[inline(always)]
fn resolve<V: Lanes, F: QuantFormat>(v: V, own: &[u8], shared: &[u8]) -> LaneScales<V> {
    let zero = v.simd().splat(0.0);
    let negated = |floats: Floats<V>| v.simd().mul(floats, v.simd().splat(-1.0));
    let scaled = |factor: Floats<V>, ints: V::Ints| v.simd().mul(factor, v.to_floats(ints));
    match F::SCALES {
        ScaleLayout::Group => LaneScales { scale: [v.load_f16(chunk(own, 0)); 2], min: [zero; 2] },
        ScaleLayout::GroupMin => {
            LaneScales { scale: [v.load_f16(chunk(own, 0)); 2], min: [v.load_f16(chunk(own, 1)); 2] }
        }
        ScaleLayout::Super32Min => {
            let (d, m) = (v.load_f16(chunk(shared, 0)), negated(v.load_f16(chunk(shared, 1))));
            LaneScales {
                scale: [scaled(d, v.load_u8(chunk(own, 0))); 2],
                min: [scaled(m, v.load_u8(chunk(own, 1))); 2],
            }
        }
        ScaleLayout::Super16Min => {
            let (d, m) = (v.load_f16(chunk(shared, 0)), negated(v.load_f16(chunk(shared, 1))));
            let [scale_0, min_0] = v.load_nibbles(chunk(own, 0));
            let [scale_1, min_1] = v.load_nibbles(chunk(own, 1));
            LaneScales {
                scale: [scaled(d, scale_0), scaled(d, scale_1)],
                min: [scaled(m, min_0), scaled(m, min_1)],
            }
        }
        ScaleLayout::Super16 => {
            let d = v.load_f16(chunk(shared, 0));
            let [scale_0, scale_1] = [v.load_i8(chunk(own, 0)), v.load_i8(chunk(own, 1))];
            LaneScales { scale: [scaled(d, scale_0), scaled(d, scale_1)], min: [zero; 2] }
        }
    }
}

/// `sum of (code - OFFSET) * activation code` over these quads; `negated_sum` is that of the activation codes. The dots take
/// turns in `CHAINS` sums, one or two.
#[inline(always)]
fn dot<V: Lanes, F: QuantFormat, const P: usize, const CHAINS: usize>(
    v: V,
    codes: &[V::Bytes],
    planes: &[Quads; P],
    first_quad: usize,
    negated_sum: i32,
) -> V::Ints {
    let mut isums = [[v.splat_int(0); 2]; P];
    if F::OFFSET != 0 {
        isums[P - 1][0] = v.times(v.splat_int(negated_sum), F::OFFSET);
    }
    for (quad, codes) in codes.iter().enumerate() {
        for (isums, plane) in isums.iter_mut().zip(planes) {
            let (x, isum) = (plane[first_quad + quad], &mut isums[quad % CHAINS]);
            *isum = if F::BITS == 8 { v.dot::<8>(*isum, *codes, x) } else { v.dot::<6>(*isum, *codes, x) };
        }
    }
    let mut totals = [v.splat_int(0); P];
    for (total, isums) in totals.iter_mut().zip(isums) {
        *total = if CHAINS == 2 { v.plus(isums[0], isums[1]) } else { isums[0] };
    }
    if P == 2 { v.join(totals[0], totals[1]) } else { totals[0] }
}

/// [`add_group`] for one of `T` tokens.
#[inline(always)]
fn add_group_of<V: Lanes, F: QuantFormat, const P: usize, const T: usize>(
    v: V,
    codes: &[V::Bytes; QUADS],
    scales: &LaneScales<V>,
    x: (&[Quads; P], f32, [u32; 2]),
    acc: Floats<V>,
) -> Floats<V> {
    if V::DOTS_WAIT && T <= FEW_TOKENS {
        add_group::<V, F, P, 2>(v, codes, scales, x, acc)
    } else {
        add_group::<V, F, P, 1>(v, codes, scales, x, acc)
    }
}

/// Adds the product of one group of all rows with one group of activations.
#[inline(always)]
fn add_group<V: Lanes, F: QuantFormat, const P: usize, const CHAINS: usize>(
    v: V,
    codes: &[V::Bytes; QUADS],
    scales: &LaneScales<V>,
    (planes, scale, sums): (&[Quads; P], f32, [u32; 2]),
    acc: Floats<V>,
) -> Floats<V> {
    let x_scale = v.simd().splat(scale);
    let mut acc = acc;
    if F::SCALES.per_half() {
        for half in 0..2 {
            let first = half * QUADS / 2;
            let codes = &codes[first..first + QUADS / 2];
            let isum = dot::<V, F, P, CHAINS>(v, codes, planes, first, sums[half] as i32);
            acc = v.simd().fma(v.to_floats(isum), v.simd().mul(scales.scale[half], x_scale), acc);
            if F::SCALES.has_min() {
                let sum = scale * -(sums[half] as i32) as f32;
                acc = v.simd().fma(scales.min[half], v.simd().splat(sum), acc);
            }
        }
    } else {
        let isum = dot::<V, F, P, CHAINS>(v, codes, planes, 0, sums[0] as i32);
        acc = v.simd().fma(v.to_floats(isum), v.simd().mul(scales.scale[0], x_scale), acc);
        if F::SCALES.has_min() {
            acc = v.simd().fma(scales.min[0], v.simd().splat(f32::from_bits(sums[0])), acc);
        }
    }
    acc
}

/// Sums a leaf of plain numbers for `T` tokens.
#[inline(always)]
pub(super) fn sum_float<V: Lanes, F: FloatFormat, const T: usize>(
    v: V,
    leaf: &FloatLeaf<'_>,
    sums: &mut [RowSums],
) {
    let mut tokens: [&[f32]; T] = [&[]; T];
    for (t, token) in tokens.iter_mut().enumerate() {
        *token = leaf.token(t);
    }
    let mut acc = [v.simd().splat(0.0); T];
    let columns = leaf.weights.chunks_exact(TILE_ROWS * F::BYTES).take(leaf.n_cols);
    for (column, weights) in columns.enumerate() {
        match leaf.fetch {
            Fetch::Nowhere => (),
            Fetch::Nearest(ahead) => v.prefetch::<true, _>(&weights[0], ahead),
            Fetch::Second(ahead) => v.prefetch::<false, _>(&weights[0], ahead),
        }
        let weights = match F::TYPE {
            WeightType::F32 => v.load_f32(chunk(weights, 0)),
            WeightType::F16 => v.load_f16(chunk(weights, 0)),
            _ => v.load_bf16(chunk(weights, 0)),
        };
        for t in 0..T {
            acc[t] = v.simd().fma(weights, v.simd().splat(tokens[t][column]), acc[t]);
        }
    }
    put(v.simd(), acc, leaf.adds, sums);
}
