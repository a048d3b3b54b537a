//! Arrays on the emulated device, random numbers, and the places of elements as kernels/layout.cuh has them.

use paceline_cuda::{DevicePtr, Runtime};

use super::{compiled::Sources, emulated::Emulated};

/// The product's kernels of these files only, which compile sooner.
pub fn only(files: &[&str]) -> Sources {
    let all = include_str!("../../kernels/all.cu");
    let names = all.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    let others = names.filter(|name| *name != "ptx.cuh" && !files.contains(name));
    others.fold(Sources::product(), |sources, name| {
        sources.mutated("all.cu", &format!("#include \"{name}\"\n"), "")
    })
}

pub fn put<T: bytemuck::Pod>(device: &mut Emulated, values: &[T]) -> DevicePtr {
    let to = device.alloc(size_of_val(values)).expect("memory");
    device.upload(to, bytemuck::cast_slice(values)).expect("uploads");
    to
}

pub fn get<T: bytemuck::Pod>(device: &mut Emulated, from: DevicePtr, n: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); n];
    device.download(from, bytemuck::cast_slice_mut(&mut values)).expect("downloads");
    values
}

/// Numbers without a pattern (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// In `0 .. end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.word() % end as u64) as usize
    }

    /// In -1 .. 1.
    pub fn number(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

pub fn operand_b_index(row: usize, k: usize, k_padded: usize) -> usize {
    (row / 8 * (k_padded / 8) + k / 8) * 64 + row % 8 * 8 + k % 8
}

pub fn key_index(slot: usize, dim: usize, head_dim: usize) -> usize {
    let in_k = dim % 32;
    let tile = slot / 8 * (head_dim / 32) + dim / 32;
    tile * 256 + (slot % 8 * 4 + in_k % 8 / 2) * 8 + in_k / 16 * 4 + in_k % 16 / 8 * 2 + in_k % 2
}

pub fn value_index(slot: usize, dim: usize) -> usize {
    let (in_pair, t) = (dim % 16, slot % 8 / 2);
    dim / 16 * 256 + (in_pair % 8 * 4 + t) * 8 + in_pair / 8 * 4 + slot / 8 * 2 + slot % 2
}
