//! K-quants in the order of the kernels: a record for each superblock of the 16 rows of a tile, the twin of
//! kernels/superblock.cuh. Bits of codes and scales are moved, never changed.

use super::{Place, TILE_ROWS};
use paceline_kernels::formats::{CodeLayout, Group, ScaleLayout};

/// Units of a superblock, lanes of a warp, bytes of a word.
const UNITS: usize = 4;
const LANES: usize = 32;
const WORD: usize = 4;

/// What a record holds, and where. A lane has as many words in a unit as a code has bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    bits: usize,
    scales: ScaleLayout,
}

impl Record {
    /// None for types without superblocks.
    pub(super) fn new(layout: &CodeLayout) -> Option<Self> {
        layout.scales.has_super().then_some(Self { bits: layout.bits, scales: layout.scales })
    }

    /// Words of a lane that lie in the first plane of codes; the others follow in a second.
    const fn first_words(self) -> usize {
        if self.bits >= 4 { 4 } else { 2 }
    }

    const fn scales_at(self) -> usize {
        UNITS * LANES * WORD * self.bits
    }

    const fn minimums_at(self) -> usize {
        self.scales_at() + if self.has_minimums() { 8 * TILE_ROWS } else { 16 * TILE_ROWS }
    }

    const fn supers_at(self) -> usize {
        self.minimums_at() + if self.has_minimums() { 8 * TILE_ROWS } else { 0 }
    }

    /// Bytes of a record.
    pub const fn n_bytes(self) -> usize {
        self.supers_at() + TILE_ROWS * if self.has_minimums() { 4 } else { 2 }
    }

    /// Whether weights have minimums, which are multiplied with sums of activations.
    pub const fn has_minimums(self) -> bool {
        self.scales.has_min()
    }

    /// Whether these sums are over half groups.
    pub const fn per_half(self) -> bool {
        self.scales.per_half()
    }

    /// Bytes of the sums of 8 rows of activations over the groups of a superblock.
    pub const fn sums_bytes(self) -> usize {
        match (self.has_minimums(), self.per_half()) {
            (false, _) => 0,
            (true, false) => 2 * super::CORE_BYTES,
            (true, true) => 4 * super::CORE_BYTES,
        }
    }

    /// Puts group `in_super` of row `row` into a record that was zeros.
    pub(super) fn put(self, record: &mut [u8], row: usize, in_super: usize, group: &Group) {
        let (unit, in_unit) = (in_super / 2, in_super % 2);
        for (column, code) in group.codes.iter().enumerate() {
            let place = Place::new(row, column);
            let register = (in_unit * 2 + column / 16) * 4 + place.pair;
            self.put_code(record, unit, &place, (register, u32::from(*code)));
        }
        self.put_small(record, row, in_super, group.scales.sub);
        let (g, half) = (row % 8, row / 8);
        if self.has_minimums() {
            let at = self.supers_at() + g * 8 + half * 4;
            record[at..at + 2].copy_from_slice(&group.scales.d.to_le_bytes());
            record[at + 2..at + 4].copy_from_slice(&group.scales.m.to_le_bytes());
        } else {
            let at = self.supers_at() + g * 4 + half * 2;
            record[at..at + 2].copy_from_slice(&group.scales.d.to_le_bytes());
        }
    }

    /// Halves of words hold as many codes as fit; what is left over of all words holds the rest, see `codes_of`.
    fn put_code(self, record: &mut [u8], unit: usize, place: &Place, (register, code): (usize, u32)) {
        let fields = 16 / self.bits;
        let mut put = |word: usize, bit: usize, code: u32| {
            let at = self.word_at(unit, place.lane, word);
            let bytes: &mut [u8; WORD] =
                (&mut record[at..at + WORD]).try_into().expect("invariant: a word has four bytes");
            *bytes = (u32::from_le_bytes(*bytes) | code << (bit + 16 * place.upper)).to_le_bytes();
        };
        match (register.checked_sub(fields * self.bits), self.bits) {
            (None, bits) => put(register / fields, register % fields * bits, code),
            (Some(i), 6) => {
                put(i, 12, code & 15);
                put(4 + i / 2, 12 + i % 2 * 2, code >> 4);
            }
            (Some(_), bits) => (0..bits).for_each(|bit| put(bit, 15, code >> bit & 1)),
        }
    }

    /// Where a word of a lane lies.
    fn word_at(self, unit: usize, lane: usize, word: usize) -> usize {
        let first = self.first_words();
        let others = self.bits - first;
        if word < first {
            ((unit * LANES + lane) * first + word) * WORD
        } else {
            (UNITS * LANES * first + (unit * LANES + lane) * others + word - first) * WORD
        }
    }

    fn put_small(self, record: &mut [u8], row: usize, in_super: usize, sub: [u8; 2]) {
        let (g, half, unit, in_unit) = (row % 8, row / 8, in_super / 2, in_super % 2);
        let (scales, minimums) = (self.scales_at(), self.minimums_at());
        match self.scales {
            ScaleLayout::Super32Min => {
                record[scales + g * 16 + unit * 4 + in_unit * 2 + half] = sub[0];
                record[minimums + (g * 4 + in_super / 2) * 4 + half * 2 + in_super % 2] = sub[1];
            }
            ScaleLayout::Super16Min => {
                for (i, both) in sub.into_iter().enumerate() {
                    let (step, of_super) = (in_unit * 2 + i, in_super * 2 + i);
                    let nibble = |at: usize| (at / 2, at % 2 * 4);
                    let (byte, shift) = nibble(half * 4 + step);
                    record[scales + g * 16 + unit * 4 + byte] |= (both & 15) << shift;
                    let (byte, shift) = nibble(half * 4 + of_super / 8 * 2 + of_super % 2);
                    record[minimums + (g * 4 + of_super % 8 / 2) * 4 + byte] |= (both >> 4) << shift;
                }
            }
            _ => {
                let at = scales + g * 32 + unit * 8 + half * 4 + in_unit * 2;
                record[at..at + 2].copy_from_slice(&sub);
            }
        }
    }
}
