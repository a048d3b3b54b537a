//! Quantization of activations: each row, each 32 elements, symmetric 8-bit or 16-bit codes with an f32 scale. It
//! knows nothing of weights.
//!
//! For the 32 elements x of a group: `scale = max |x| / LIMIT`, `code = round_ties_even(x * (1 / scale))` clamped to
//! +-LIMIT, where LIMIT is 127 or 32,639. A group whose largest magnitude is below [`VANISHING`] is all zero. A NaN
//! or infinity makes the scale of its group NaN or infinite, so that it shows in every product.
//!
//! The multiply units take 8 bits, so a 16-bit code is `256 * high + low`, two planes of i8: a product is then two
//! exact int8 products, and weights are still read once.

use crate::Kernels;
use crate::aligned::AlignedVec;
use crate::formats::GROUP_LEN;
use crate::pool::{SharedSlice, ThreadPool};

/// Magnitude below which a group is taken for zero (2^-100): the reciprocal of its scale might not be finite.
pub const VANISHING: f32 = f32::from_bits((127 - 100) << 23);

/// Rows that lie side by side, so that a kernel finds their groups beside each other.
pub(crate) const BLOCK_ROWS: usize = 16;

/// The bytes of 32 codes as the multiply unit takes them: 4 consecutive i8 in each i32, the first in the lowest byte.
pub(crate) type Quads = [i32; GROUP_LEN / 4];

/// How fine the codes of activations are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CodeBits {
    /// One plane of i8, -127..=127.
    #[default]
    Eight,
    /// Two planes, -32,639..=32,639: a high byte of -127..=127 and a low one of -128..=127.
    Sixteen,
}

impl CodeBits {
    /// Both.
    pub const ALL: [CodeBits; 2] = [CodeBits::Eight, CodeBits::Sixteen];

    /// Planes of i8.
    pub const fn n_planes(self) -> usize {
        match self {
            Self::Eight => 1,
            Self::Sixteen => 2,
        }
    }

    /// Largest code. With two planes the high byte of `code + 128` is then at most 127.
    pub const fn limit(self) -> i32 {
        match self {
            Self::Eight => 127,
            Self::Sixteen => 32_639,
        }
    }
}

/// What belongs to the 32 codes of a group.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct GroupScale {
    /// What one unit of a code is worth.
    pub scale: f32,
    /// `scale * (sum of the codes as f32)`; multiplies the minimum of weights.
    pub scaled_sum: f32,
    /// The sum of the codes, negated.
    pub negated_sum: i32,
    /// The same of both half groups.
    pub negated_half_sums: [i32; 2],
}

/// The words of a [`GroupScale`] in memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum ScaleWord {
    Scale,
    ScaledSum,
    NegatedSum,
    NegatedFirstHalfSum,
    NegatedSecondHalfSum,
}

/// How many there are.
pub(crate) const SCALE_WORDS: usize = 5;

impl GroupScale {
    /// That of one of `n_rows` rows, from the words of their group: `[SCALE_WORDS, n_rows]`.
    pub(crate) fn read(words: &[u32], n_rows: usize, row: usize) -> Self {
        let word = |word: ScaleWord| words[word as usize * n_rows + row];
        Self {
            scale: f32::from_bits(word(ScaleWord::Scale)),
            scaled_sum: f32::from_bits(word(ScaleWord::ScaledSum)),
            negated_sum: word(ScaleWord::NegatedSum) as i32,
            negated_half_sums: [ScaleWord::NegatedFirstHalfSum, ScaleWord::NegatedSecondHalfSum]
                .map(|half| word(half) as i32),
        }
    }

    /// Puts it where [`Self::read`] finds it.
    #[inline(always)]
    fn write(&self, words: &mut [u32], n_rows: usize, row: usize) {
        let of_row = [
            self.scale.to_bits(),
            self.scaled_sum.to_bits(),
            self.negated_sum as u32,
            self.negated_half_sums[0] as u32,
            self.negated_half_sums[1] as u32,
        ];
        for (word, words) in of_row.into_iter().zip(words.chunks_exact_mut(n_rows)) {
            words[row] = word;
        }
    }
}

/// Rows of quantized activations. Kept between calls so that its memory is allocated once.
///
/// Rows lie in blocks of [`BLOCK_ROWS`] (the last may have fewer, B): a block is `[n_groups, B]` groups of
/// `[n_planes]` quads, and `[n_groups, SCALE_WORDS, B]` words of their scales: whole cache lines, which a block's task writes
/// at once.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    n_rows: usize,
    n_cols: usize,
    bits: CodeBits,
    codes: AlignedVec<Quads>,
    scales: AlignedVec<u32>,
}

/// Where a row lies.
pub(crate) struct Place {
    /// Rows of its block: groups of a row lie so many groups apart.
    pub step: usize,
    /// The first group of the block, of its first row.
    pub first_group: usize,
    /// The row in the block.
    pub row: usize,
}

/// Groups of the rows of a block in memory: those of all rows lie side by side.
pub(crate) struct GroupsMut<'a> {
    /// `[n_groups, n_rows, n_planes]`.
    pub codes: &'a mut [Quads],
    /// `[n_groups, SCALE_WORDS, n_rows]`.
    pub scales: &'a mut [u32],
    /// Rows of the block.
    pub n_rows: usize,
}

impl QuantizedRows {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No rows, with memory for so many.
    pub fn with_capacity(n_rows: usize, n_cols: usize, bits: CodeBits) -> Self {
        let mut rows = Self::default();
        rows.reshape(n_rows, n_cols, bits);
        rows.n_rows = 0;
        rows
    }

    /// Bytes of memory for so many rows.
    pub const fn bytes(n_rows: usize, n_cols: usize, bits: CodeBits) -> usize {
        let group = bits.n_planes() * size_of::<Quads>() + SCALE_WORDS * size_of::<u32>();
        n_rows * n_cols.div_ceil(GROUP_LEN) * group
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Elements of a row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of a row.
    pub fn n_groups(&self) -> usize {
        self.n_cols.div_ceil(GROUP_LEN)
    }

    /// How fine the codes are.
    pub fn bits(&self) -> CodeBits {
        self.bits
    }

    /// Gives it another shape; what it holds afterwards is anything.
    pub(crate) fn reshape(&mut self, n_rows: usize, n_cols: usize, bits: CodeBits) {
        (self.n_rows, self.n_cols, self.bits) = (n_rows, n_cols, bits);
        let n_groups = n_rows * self.n_groups();
        if self.scales.len() < n_groups * SCALE_WORDS {
            self.scales = AlignedVec::zeroed(n_groups * SCALE_WORDS);
        }
        if self.codes.len() < n_groups * bits.n_planes() {
            self.codes = AlignedVec::zeroed(n_groups * bits.n_planes());
        }
    }

    /// Where a row lies.
    pub(crate) fn place(&self, row: usize) -> Place {
        let first = row / BLOCK_ROWS * BLOCK_ROWS;
        Place {
            step: (self.n_rows - first).min(BLOCK_ROWS),
            first_group: first * self.n_groups(),
            row: row % BLOCK_ROWS,
        }
    }

    /// Codes of all groups, `[n_planes]` each.
    pub(crate) fn codes(&self) -> &[Quads] {
        &self.codes
    }

    /// Words of the scales of all groups.
    pub(crate) fn scales(&self) -> &[u32] {
        &self.scales
    }

    /// For tasks that write groups; each group is to be written by one task.
    pub(crate) fn shared(&mut self) -> SharedRows<'_> {
        SharedRows {
            n_rows: self.n_rows,
            n_groups: self.n_groups(),
            bits: self.bits,
            codes: SharedSlice::new(&mut self.codes),
            scales: SharedSlice::new(&mut self.scales),
        }
    }

    /// The row as numbers: code times scale.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut values: Vec<f32> =
            (0..self.n_groups()).flat_map(|group| self.group_values(row, group)).collect();
        values.truncate(self.n_cols);
        values
    }

    fn group_values(&self, row: usize, group: usize) -> [f32; GROUP_LEN] {
        let scale = self.group_scale(row, group).scale;
        group_codes(self.group_planes(row, group)).map(|code| code as f32 * scale)
    }

    fn group_planes(&self, row: usize, group: usize) -> &[Quads] {
        let (place, n_planes) = (self.place(row), self.bits.n_planes());
        &self.codes[(place.first_group + group * place.step + place.row) * n_planes..][..n_planes]
    }

    fn group_scale(&self, row: usize, group: usize) -> GroupScale {
        let place = self.place(row);
        let words = &self.scales[(place.first_group + group * place.step) * SCALE_WORDS..];
        GroupScale::read(words, place.step, place.row)
    }
}

/// The codes of one group in column order, from its planes.
pub(crate) fn group_codes(planes: &[Quads]) -> [i32; GROUP_LEN] {
    let byte = |quads: &Quads, column: usize| i32::from((quads[column / 4] >> (column % 4 * 8)) as i8);
    std::array::from_fn(|column| planes.iter().fold(0, |code, plane| 256 * code + byte(plane, column)))
}

/// [`QuantizedRows`] in the hands of many tasks.
pub(crate) struct SharedRows<'a> {
    n_rows: usize,
    n_groups: usize,
    bits: CodeBits,
    codes: SharedSlice<'a, Quads>,
    scales: SharedSlice<'a, u32>,
}

impl SharedRows<'_> {
    /// The groups `groups` of a whole block of rows, row by row in turn.
    ///
    /// # Safety
    /// No other task uses these groups of this block at the same time.
    unsafe fn block(&self, block: usize, groups: std::ops::Range<usize>) -> GroupsMut<'_> {
        let first_row = block * BLOCK_ROWS;
        let n_rows = (self.n_rows - first_row).min(BLOCK_ROWS);
        let start = first_row * self.n_groups + groups.start * n_rows;
        let end = first_row * self.n_groups + groups.end * n_rows;
        let n_planes = self.bits.n_planes();
        // SAFETY: blocks are disjoint, and so are their groups; the caller promises the rest.
        let codes = unsafe { self.codes.range_mut(start * n_planes..end * n_planes) };
        // SAFETY: as above.
        let scales = unsafe { self.scales.range_mut(start * SCALE_WORDS..end * SCALE_WORDS) };
        GroupsMut { codes, scales, n_rows }
    }

    /// Quantizes the columns of the groups `groups` of the rows of a block.
    ///
    /// # Safety
    /// No other task uses these groups of this block at the same time.
    pub(crate) unsafe fn quantize_block(
        &self,
        kernels: &Kernels,
        block: usize,
        groups: std::ops::Range<usize>,
        x: &BlockInput<'_>,
    ) {
        // SAFETY: the caller promises it.
        let out = unsafe { self.block(block, groups) };
        // SAFETY: a table of kernels exists only on a CPU that has its instruction set.
        unsafe { (kernels.linear.quantize_block[self.bits.n_planes() - 1])(x, out) };
    }
}

/// Columns of the rows of a block.
pub(crate) struct BlockInput<'a> {
    /// The rows, from the first one's first column on.
    pub x: &'a [f32],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Columns; those up to a whole number of groups count as zero.
    pub n_cols: usize,
}

impl<'a> BlockInput<'a> {
    /// A row.
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        &self.x[row * self.stride..][..self.n_cols]
    }
}

/// Quantizes the rows of a block: kernel type of the dispatch table, one for each number of planes.
pub(crate) type QuantizeBlock = unsafe fn(x: &BlockInput<'_>, out: GroupsMut<'_>);

/// Quantizes `x` of shape `[n_rows, n_cols]` into `rows`. A short last group is filled up with zeros.
///
/// # Panics
/// When `x` is not a whole number of rows.
pub fn quantize_rows(
    kernels: &'static Kernels,
    pool: &ThreadPool,
    x: &[f32],
    (n_cols, bits): (usize, CodeBits),
    rows: &mut QuantizedRows,
) {
    assert!(
        n_cols > 0 && x.len().is_multiple_of(n_cols),
        "invariant: {} elements are rows of {n_cols}",
        x.len()
    );
    rows.reshape(x.len() / n_cols, n_cols, bits);
    let n_groups = rows.n_groups();
    let shared = rows.shared();
    pool.run(shared.n_rows.div_ceil(BLOCK_ROWS), &|block| {
        let x = BlockInput { x: &x[block * BLOCK_ROWS * n_cols..], stride: n_cols, n_cols };
        // SAFETY: each block belongs to one task.
        unsafe { shared.quantize_block(kernels, block, 0..n_groups, &x) };
    });
}

/// `(scale, 1 / scale)` of a group from its largest magnitude; both 0 when that vanishes. NaN stays NaN.
#[inline]
fn scale_and_inverse(largest: f32, limit: f32) -> (f32, f32) {
    if largest < VANISHING {
        return (0.0, 0.0);
    }
    let scale = largest / limit;
    (scale, 1.0 / scale)
}

/// Largest code of so many planes.
const fn limit(n_planes: usize) -> f32 {
    if n_planes == 1 { CodeBits::Eight.limit() as f32 } else { CodeBits::Sixteen.limit() as f32 }
}

/// Calls `group` for each 32 elements of each row, the last filled up with zeros.
#[inline(always)]
fn for_each_group<const P: usize>(
    x: &BlockInput<'_>,
    out: GroupsMut<'_>,
    mut group: impl FnMut(&[f32; GROUP_LEN]) -> ([Quads; P], GroupScale),
) {
    let (planes, _) = out.codes.as_chunks_mut::<P>();
    let n_rows = out.n_rows;
    for row in 0..n_rows {
        let planes = planes[row..].iter_mut().step_by(n_rows);
        let mut slots = planes.zip(out.scales.chunks_exact_mut(SCALE_WORDS * n_rows));
        let (whole, rest) = x.row(row).as_chunks::<GROUP_LEN>();
        for (x, (planes, words)) in whole.iter().zip(&mut slots) {
            let (of_row, scale) = group(x);
            *planes = of_row;
            scale.write(words, n_rows, row);
        }
        if let Some((planes, words)) = slots.next() {
            let (of_row, scale) = group(&filled_up(rest));
            *planes = of_row;
            scale.write(words, n_rows, row);
        }
    }
}

/// A group's first elements, and zeros.
#[inline(always)]
fn filled_up(part: &[f32]) -> [f32; GROUP_LEN] {
    let mut group = [0.0; GROUP_LEN];
    group[..part.len()].copy_from_slice(part);
    group
}

/// Joins what belongs to the codes of a group, from the sums of its halves.
#[inline(always)]
fn group_scale(sums: [i32; 2], scale: f32) -> GroupScale {
    let sum = sums[0] + sums[1];
    GroupScale {
        scale,
        scaled_sum: scale * sum as f32,
        negated_sum: -sum,
        negated_half_sums: [-sums[0], -sums[1]],
    }
}

/// The definition.
pub(crate) fn quantize_block_scalar<const P: usize>(x: &BlockInput<'_>, out: GroupsMut<'_>) {
    for_each_group::<P>(x, out, |x| {
        // Magnitudes compare as integers do, NaN above all.
        let largest = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let (scale, inverse) = scale_and_inverse(f32::from_bits(largest), limit(P));
        let (mut planes, mut sums) = ([Quads::default(); P], [0; 2]);
        for (column, x) in x.iter().enumerate() {
            let scaled = x * inverse;
            // NaN becomes the smallest code, as it does in the twins.
            let scaled = if scaled > -limit(P) { scaled } else { -limit(P) };
            let scaled = if scaled < limit(P) { scaled } else { limit(P) };
            let code = scaled.round_ties_even() as i32;
            sums[column / 16] += code;
            // The last plane is the lowest byte; what it leaves over is a multiple of 256.
            let mut left = code;
            for plane in planes.iter_mut().rev() {
                let byte = left as i8;
                plane[column / 4] |= i32::from(byte as u8) << (column % 4 * 8);
                left = (left - i32::from(byte)) >> 8;
            }
        }
        (planes, group_scale(sums, scale))
    });
}

#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{quantize_block_avx2, quantize_block_avx512};

#[cfg(test)]
mod tests;
