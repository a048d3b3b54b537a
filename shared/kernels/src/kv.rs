//! Memory of the paged KV cache of one layer, for the KV heads one rank owns. Which sequence owns which block is
//! the coordinator's business; here a block is an index.
//!
//! The blocks of a head lie side by side, then come those of the next head: a sequence's blocks are neighbours more often
//! than not, and then a thread that reads one head's keys reads a stream, which the CPU's prefetchers see.
//!
//! Per head and block, keys are `[head_dim][16 positions]`, so that the lanes of a score are positions, and values
//! are `[16 positions][head_dim rounded up to 16]`, so that the lanes of an output are its elements. 8-bit codes lie
//! in the same way; their scales, of keys and of values, are `[groups of 32 elements][16 positions]`.

use std::ops::Range;

use paceline_domain::BlockId;
use paceline_domain::KvType;
use paceline_domain::group::{BLOCK_POSITIONS, KV_GROUP};

use crate::aligned::AlignedVec;
use crate::formats::encode_group;
use crate::pool::SharedSlice;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{LANES, Simd};
use crate::{Kernels, ThreadPool};

const _: () = assert!(BLOCK_POSITIONS == LANES, "a block of positions is one register of scores");

/// Size and type of one layer's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    /// Blocks of 16 positions.
    pub n_blocks: usize,
    /// KV heads of this rank.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How elements are stored.
    pub kv_type: KvType,
}

/// One layer's memory; zero at first, pages untouched until they are written.
#[derive(Debug)]
pub struct KvLayer {
    shape: KvShape,
    elements: Elements,
}

#[derive(Debug)]
enum Elements {
    F16 { keys: AlignedVec<u16>, values: AlignedVec<u16> },
    F32 { keys: AlignedVec<f32>, values: AlignedVec<f32> },
    Q8 { keys: AlignedVec<i8>, values: AlignedVec<i8>, scales: Scales },
}

/// Scales of codes, IEEE halves.
#[derive(Debug)]
struct Scales {
    keys: AlignedVec<u16>,
    values: AlignedVec<u16>,
}

/// Where a token row stands: its position, and the blocks of its sequence.
#[derive(Clone, Copy, Debug)]
pub struct KvRow<'a> {
    /// Absolute position of the token.
    pub position: u32,
    /// Block i holds positions `16 i .. 16 i + 16` of the sequence.
    pub block_table: &'a [BlockId],
}

/// Keys and values of token rows on their way into the cache.
#[derive(Clone, Copy, Debug)]
pub struct NewKv<'a> {
    /// One per token.
    pub rows: &'a [KvRow<'a>],
    /// `[n_rows, n_kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// `[n_rows, n_kv_heads, head_dim]`
    pub values: &'a [f32],
}

/// The blocks of one element type, for the attention kernels.
#[derive(Clone, Copy)]
pub(crate) struct KvBlocks<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    /// Of keys and of values; none where elements are plain numbers.
    scales: [&'a [u16]; 2],
    shape: KvShape,
}

/// [`KvBlocks`] of the type at hand.
pub(crate) enum AnyKvBlocks<'a> {
    F16(KvBlocks<'a, u16>),
    F32(KvBlocks<'a, f32>),
    Q8(KvBlocks<'a, i8>),
}

/// Narrows f32 to IEEE halves, to nearest even; both slices have the same length.
pub(crate) type NarrowKernel = unsafe fn(&[f32], &mut [u16]);

impl KvShape {
    /// Elements of a row of values: `head_dim` rounded up to whole registers.
    pub fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of one block: keys and values of all heads.
    pub fn block_bytes(&self) -> usize {
        let row_bytes = |n_elements| self.kv_type.row_bytes(n_elements);
        self.n_kv_heads * BLOCK_POSITIONS * (row_bytes(self.head_dim) + row_bytes(self.value_dim()))
    }

    fn key_len(&self) -> usize {
        BLOCK_POSITIONS * self.head_dim
    }

    fn value_len(&self) -> usize {
        BLOCK_POSITIONS * self.value_dim()
    }

    fn scales_len(&self) -> usize {
        BLOCK_POSITIONS * self.head_dim.div_ceil(KV_GROUP)
    }

    /// Block `block` of head `head`, counted over all heads.
    fn head_idx(&self, block: BlockId, head: usize) -> usize {
        assert!(block.idx() < self.n_blocks, "block {block} of a pool of {}", self.n_blocks);
        assert!(head < self.n_kv_heads, "KV head {head} of {}", self.n_kv_heads);
        head * self.n_blocks + block.idx()
    }
}

impl KvLayer {
    /// Memory of this shape.
    pub fn new(shape: KvShape) -> Self {
        let n_heads = shape.n_blocks * shape.n_kv_heads;
        let (n_keys, n_values) = (n_heads * shape.key_len(), n_heads * shape.value_len());
        let elements = match shape.kv_type {
            KvType::F16 => {
                Elements::F16 { keys: AlignedVec::zeroed(n_keys), values: AlignedVec::zeroed(n_values) }
            }
            KvType::F32 => {
                Elements::F32 { keys: AlignedVec::zeroed(n_keys), values: AlignedVec::zeroed(n_values) }
            }
            KvType::Q8 => {
                let scales = || AlignedVec::zeroed(n_heads * shape.scales_len());
                let (keys, values) = (AlignedVec::zeroed(n_keys), AlignedVec::zeroed(n_values));
                Elements::Q8 { keys, values, scales: Scales { keys: scales(), values: scales() } }
            }
        };
        Self { shape, elements }
    }

    /// Its size and type.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Writes the keys and values of token rows to their positions. Halves are rounded to nearest even; codes are those of
    /// `formats::encode_group`.
    ///
    /// # Panics
    /// When the arrays do not have the shape, a position is beyond its block table, or a block beyond the pool.
    pub fn store(&mut self, kernels: &Kernels, pool: &ThreadPool, new: &NewKv<'_>) {
        let shape = self.shape;
        let n_values = new.rows.len() * shape.n_kv_heads * shape.head_dim;
        assert_eq!(new.keys.len(), n_values, "keys are [n_rows, n_kv_heads, head_dim]");
        assert_eq!(new.values.len(), n_values, "values are [n_rows, n_kv_heads, head_dim]");
        match &mut self.elements {
            Elements::F16 { keys, values } => {
                let narrow = |from: &[f32], to: &mut [u16]| {
                    // SAFETY: a table is only handed out when the CPU has its features.
                    unsafe { (kernels.narrow)(from, to) };
                };
                store(pool, new, KvMemory { keys, values, shape }, &narrow);
            }
            Elements::F32 { keys, values } => {
                let copy = |from: &[f32], to: &mut [f32]| to.copy_from_slice(from);
                store(pool, new, KvMemory { keys, values, shape }, &copy);
            }
            Elements::Q8 { keys, values, scales } => {
                store_codes(pool, new, KvMemory { keys, values, shape }, scales);
            }
        }
    }

    /// Makes one block a copy of another.
    ///
    /// # Panics
    /// When one of them is beyond the pool.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let shape = self.shape;
        let (n_keys, n_values) = (shape.key_len(), shape.value_len());
        match &mut self.elements {
            Elements::F16 { keys, values } => {
                copy_within(shape, keys, n_keys, from, to);
                copy_within(shape, values, n_values, from, to);
            }
            Elements::F32 { keys, values } => {
                copy_within(shape, keys, n_keys, from, to);
                copy_within(shape, values, n_values, from, to);
            }
            Elements::Q8 { keys, values, scales } => {
                copy_within(shape, keys, n_keys, from, to);
                copy_within(shape, values, n_values, from, to);
                copy_within(shape, &mut scales.keys, shape.scales_len(), from, to);
                copy_within(shape, &mut scales.values, shape.scales_len(), from, to);
            }
        }
    }

    pub(crate) fn blocks(&self) -> AnyKvBlocks<'_> {
        let shape = self.shape;
        match &self.elements {
            Elements::F16 { keys, values } => {
                AnyKvBlocks::F16(KvBlocks { keys, values, scales: [&[]; 2], shape })
            }
            Elements::F32 { keys, values } => {
                AnyKvBlocks::F32(KvBlocks { keys, values, scales: [&[]; 2], shape })
            }
            Elements::Q8 { keys, values, scales } => {
                AnyKvBlocks::Q8(KvBlocks { keys, values, scales: [&scales.keys, &scales.values], shape })
            }
        }
    }
}

/// Copies what all heads have of a block, `n` elements each.
fn copy_within<E: Copy>(shape: KvShape, elements: &mut [E], n: usize, from: BlockId, to: BlockId) {
    for head in 0..shape.n_kv_heads {
        let (from, to) = (shape.head_idx(from, head), shape.head_idx(to, head));
        elements.copy_within(from * n..(from + 1) * n, to * n);
    }
}

impl<'a, E> KvBlocks<'a, E> {
    /// Keys of one head in one block: `[head_dim][16 positions]`.
    #[inline(always)]
    pub(crate) fn keys(&self, block: BlockId, head: usize) -> &'a [[E; LANES]] {
        let start = self.shape.head_idx(block, head) * self.shape.key_len();
        self.keys[start..start + self.shape.key_len()].as_chunks().0
    }

    /// Values of one head in one block: `[16 positions][value_dim / 16]` registers.
    #[inline(always)]
    pub(crate) fn values(&self, block: BlockId, head: usize) -> &'a [[E; LANES]] {
        let start = self.shape.head_idx(block, head) * self.shape.value_len();
        self.values[start..start + self.shape.value_len()].as_chunks().0
    }

    /// Scales of the keys of one head in one block: `[groups][16 positions]`.
    #[inline(always)]
    pub(crate) fn key_scales(&self, block: BlockId, head: usize) -> &'a [[u16; LANES]] {
        self.scales(0, block, head)
    }

    /// Scales of the values of one head in one block: `[groups][16 positions]`.
    #[inline(always)]
    pub(crate) fn value_scales(&self, block: BlockId, head: usize) -> &'a [[u16; LANES]] {
        self.scales(1, block, head)
    }

    #[inline(always)]
    fn scales(&self, which: usize, block: BlockId, head: usize) -> &'a [[u16; LANES]] {
        let start = self.shape.head_idx(block, head) * self.shape.scales_len();
        self.scales[which].get(start..start + self.shape.scales_len()).unwrap_or_default().as_chunks().0
    }
}

struct KvMemory<'a, E> {
    keys: &'a mut [E],
    values: &'a mut [E],
    shape: KvShape,
}

/// Where a row of one head goes.
struct Place {
    /// Row and head among the new ones.
    from: Range<usize>,
    /// Block of a head, counted over all heads.
    head_idx: usize,
    /// Position in the block.
    slot: usize,
}

/// One task per KV head: heads of a block are disjoint, whatever rows come twice. `put` is called for one `head_idx` by one
/// task only.
fn for_each_row(pool: &ThreadPool, rows: &[KvRow<'_>], shape: KvShape, put: &(dyn Fn(Place) + Sync)) {
    pool.run(shape.n_kv_heads, &|head| {
        for (row_idx, row) in rows.iter().enumerate() {
            let block = row.block_table[row.position as usize / BLOCK_POSITIONS];
            let slot = row.position as usize % BLOCK_POSITIONS;
            let from = (row_idx * shape.n_kv_heads + head) * shape.head_dim;
            put(Place { from: from..from + shape.head_dim, head_idx: shape.head_idx(block, head), slot });
        }
    });
}

fn store<E: Copy + Default + Send>(
    pool: &ThreadPool,
    new: &NewKv<'_>,
    memory: KvMemory<'_, E>,
    convert: &(dyn Fn(&[f32], &mut [E]) + Sync),
) {
    let KvMemory { keys, values, shape } = memory;
    let (keys, values) = (SharedSlice::new(keys), SharedSlice::new(values));
    for_each_row(pool, new.rows, shape, &|Place { from, head_idx, slot }| {
        let key_start = head_idx * shape.key_len();
        // SAFETY: the keys of this head, which no other task touches.
        let to = unsafe { keys.range_mut(key_start..key_start + shape.key_len()) };
        let columns = to.as_chunks_mut::<LANES>().0.chunks_mut(LANES);
        for (from, columns) in new.keys[from.clone()].chunks(LANES).zip(columns) {
            let mut narrowed = [E::default(); LANES];
            convert(from, &mut narrowed[..from.len()]);
            columns.iter_mut().zip(narrowed).for_each(|(positions, element)| positions[slot] = element);
        }
        let value_start = head_idx * shape.value_len() + slot * shape.value_dim();
        // SAFETY: the values of this head, which no other task touches.
        let to = unsafe { values.range_mut(value_start..value_start + shape.head_dim) };
        convert(&new.values[from], to);
    });
}

fn store_codes(pool: &ThreadPool, new: &NewKv<'_>, memory: KvMemory<'_, i8>, scales: &mut Scales) {
    let KvMemory { keys, values, shape } = memory;
    let (keys, values) = (SharedSlice::new(keys), SharedSlice::new(values));
    let scales = [&mut scales.keys, &mut scales.values].map(|scales| SharedSlice::new(scales));
    for_each_row(pool, new.rows, shape, &|Place { from, head_idx, slot }| {
        let scales_at = head_idx * shape.scales_len();
        let scales_at = scales_at..scales_at + shape.scales_len();
        // SAFETY: the scales of this head, which no other task touches.
        let key_scales = unsafe { scales[0].range_mut(scales_at.clone()) };
        let key_start = head_idx * shape.key_len();
        // SAFETY: the keys of this head, which no other task touches.
        let to = unsafe { keys.range_mut(key_start..key_start + shape.key_len()) };
        let groups = new.keys[from.clone()].chunks(KV_GROUP).zip(to.chunks_mut(KV_GROUP * LANES));
        for ((from, columns), scales) in groups.zip(key_scales.as_chunks_mut::<LANES>().0) {
            let mut codes = [0; KV_GROUP];
            scales[slot] = encode_group(from, &mut codes).to_bits();
            let columns = columns.as_chunks_mut::<LANES>().0;
            columns.iter_mut().zip(codes).for_each(|(positions, code)| positions[slot] = code);
        }
        // SAFETY: the scales of this head, which no other task touches.
        let value_scales = unsafe { scales[1].range_mut(scales_at) };
        let value_start = head_idx * shape.value_len() + slot * shape.value_dim();
        // SAFETY: the values of this head, which no other task touches.
        let to = unsafe { values.range_mut(value_start..value_start + shape.head_dim) };
        let groups = new.values[from].chunks(KV_GROUP).zip(to.chunks_mut(KV_GROUP));
        for ((from, codes), scales) in groups.zip(value_scales.as_chunks_mut::<LANES>().0) {
            scales[slot] = encode_group(from, codes).to_bits();
        }
    });
}

/// Scalar definition.
pub(crate) fn narrow_scalar(from: &[f32], to: &mut [u16]) {
    from.iter().zip(to).for_each(|(from, to)| *to = half::f16::from_f32(*from).to_bits());
}

#[inline(always)]
fn narrow<S: Simd>(s: S, from: &[f32], to: &mut [u16]) {
    let (blocks, tail) = from.as_chunks::<LANES>();
    let (to_blocks, to_tail) = to.as_chunks_mut::<LANES>();
    for (from, to) in blocks.iter().zip(to_blocks) {
        s.store_f16(s.load(from), to);
    }
    let mut last = [0; LANES];
    s.store_f16(s.load_part(tail), &mut last);
    to_tail.copy_from_slice(&last[..tail.len()]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn narrow_avx2(from: &[f32], to: &mut [u16]) {
    narrow(Avx2::token(), from, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn narrow_avx512(from: &[f32], to: &mut [u16]) {
    narrow(Avx512::token(), from, to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Numbers, twins};
    use crate::{Isa, Pinning};

    #[test]
    fn twins_round_as_the_definition_does() {
        let inputs: Vec<f32> = (0..=u32::MAX).step_by(9_973).map(f32::from_bits).collect();
        let mut expected = vec![0; inputs.len()];
        narrow_scalar(&inputs, &mut expected);
        for (name, twin) in twins!(narrow_avx2, narrow_avx512; NarrowKernel) {
            let mut got = vec![0; inputs.len()];
            // SAFETY: `twins` leaves out what the CPU lacks.
            unsafe { twin(&inputs, &mut got) };
            assert!(got == expected, "{name}");
            for n in 0..40 {
                let mut got = vec![7; n];
                // SAFETY: as above.
                unsafe { twin(&inputs[..n], &mut got) };
                assert_eq!(got, expected[..n], "{name}");
            }
        }
    }

    /// Where `store` must have put an element, by the layout in this file's first lines.
    fn stored(layer: &KvLayer, (block, head, slot, element): (BlockId, usize, usize, usize)) -> (f32, f32) {
        let value_at = slot * layer.shape.value_dim() + element;
        match layer.blocks() {
            AnyKvBlocks::F32(blocks) => {
                (blocks.keys(block, head)[element][slot], blocks.values(block, head).as_flattened()[value_at])
            }
            AnyKvBlocks::F16(blocks) => {
                let wide = |bits| half::f16::from_bits(bits).to_f32();
                (
                    wide(blocks.keys(block, head)[element][slot]),
                    wide(blocks.values(block, head).as_flattened()[value_at]),
                )
            }
            AnyKvBlocks::Q8(blocks) => {
                let scale =
                    |scales: &[[u16; LANES]]| half::f16::from_bits(scales[element / 32][slot]).to_f32();
                let (key, value) = (
                    blocks.keys(block, head)[element][slot],
                    blocks.values(block, head).as_flattened()[value_at],
                );
                (
                    f32::from(key) * scale(blocks.key_scales(block, head)),
                    f32::from(value) * scale(blocks.value_scales(block, head)),
                )
            }
        }
    }

    #[test]
    fn rows_land_in_their_blocks() {
        let mut numbers = Numbers::new(12);
        let tables: [Vec<BlockId>; 2] = [[4, 0, 2].map(BlockId).to_vec(), [3, 1].map(BlockId).to_vec()];
        let f16s = [64, 1].map(|head_dim| (KvType::F16, head_dim));
        let f32s = [20, 33].map(|head_dim| (KvType::F32, head_dim));
        let codes = [64, 1, 33, 80].map(|head_dim| (KvType::Q8, head_dim));
        for (kv_type, head_dim) in f16s.into_iter().chain(f32s).chain(codes) {
            let shape = KvShape { n_blocks: 5, n_kv_heads: 3, head_dim, kv_type };
            let places = [(0, 0_u32), (0, 17), (1, 31), (0, 47), (1, 5)];
            let rows = places.map(|(table, position)| KvRow { position, block_table: &tables[table] });
            let n = rows.len() * 3 * head_dim;
            let (keys, values) = (numbers.values(n), numbers.values(n));
            for isa in Isa::available() {
                let pool = ThreadPool::new(2, Pinning::None);
                let mut layer = KvLayer::new(shape);
                let new = NewKv { rows: &rows, keys: &keys, values: &values };
                layer.store(Kernels::for_isa(isa), &pool, &new);
                let round = |numbers: &[f32], i: usize| match kv_type {
                    KvType::F16 => half::f16::from_f32(numbers[i]).to_f32(),
                    KvType::F32 => numbers[i],
                    KvType::Q8 => {
                        let head = &numbers[i / head_dim * head_dim..][..head_dim];
                        let group = head.chunks(32).nth(i % head_dim / 32).expect("a group");
                        let mut codes = [0; 32];
                        let scale = encode_group(group, &mut codes).to_f32();
                        assert!((f32::from(codes[i % head_dim % 32]) * scale - numbers[i]).abs() < 0.004);
                        f32::from(codes[i % head_dim % 32]) * scale
                    }
                };
                for i in 0..n {
                    let (row, head, element) = (i / head_dim / 3, i / head_dim % 3, i % head_dim);
                    let (table, position) = places[row];
                    let block = tables[table][position as usize / 16];
                    let got = stored(&layer, (block, head, position as usize % 16, element));
                    assert_eq!(got, (round(&keys, i), round(&values, i)), "{isa}");
                }
                let (untouched, _) = stored(&layer, (BlockId(2), 0, 14, 0));
                assert_eq!(untouched, 0.0);
                layer.copy_block(BlockId(4), BlockId(1));
                for i in 0..3 * head_dim {
                    let place = |block| (BlockId(block), i / head_dim, 0, i % head_dim);
                    assert_eq!(stored(&layer, place(1)), stored(&layer, place(4)), "{isa}");
                }
            }
        }
    }

    #[test]
    fn a_block_has_the_bytes_it_says() {
        let shape = KvShape { n_blocks: 7, n_kv_heads: 2, head_dim: 64, kv_type: KvType::F16 };
        assert_eq!(shape.block_bytes(), 2 * 16 * 128 * 2);
        let layer = KvLayer::new(shape);
        let AnyKvBlocks::F16(blocks) = layer.blocks() else { panic!("halves were asked for") };
        assert_eq!((blocks.keys.len() + blocks.values.len()) * 2, 7 * shape.block_bytes());
        let shape = KvShape { kv_type: KvType::Q8, head_dim: 80, ..shape };
        let layer = KvLayer::new(shape);
        let AnyKvBlocks::Q8(blocks) = layer.blocks() else { panic!("codes were asked for") };
        let scales = blocks.scales[0].len() + blocks.scales[1].len();
        assert_eq!(blocks.keys.len() + blocks.values.len() + 2 * scales, 7 * shape.block_bytes());
    }
}
