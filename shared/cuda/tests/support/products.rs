//! Matrices as files have them, activations as kernels take them, and what their products are.

use half::bf16;
use paceline_cuda::kernels::linear::{LinearArgs, Matrix, Size, Workspace, linear};
use paceline_cuda::kernels::linear_super::WorkspaceNeed;
use paceline_cuda::pack::{Arrangement, Kind, Packed, Rows, UNIT_COLUMNS, pack};
use paceline_cuda::{CudaError, DevicePtr, Runtime};
use paceline_domain::WeightType;
use paceline_kernels::formats::{GROUP_LEN, GROUPS_PER_SUPER, ScaleLayout, code_layout, group_of_row};
use paceline_kernels::{Pinning, ThreadPool, dequantize_row};
use std::ops::Range;

use super::emulated::Emulated;

/// Counter-based numbers, so that every element can be made on its own.
pub fn random(seed: u64, at: usize) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 32)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^ (x >> 29)
}

/// In -1..1.
pub fn number(seed: u64, at: usize) -> f32 {
    (random(seed, at) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A matrix in the bytes of its file: any codes, scales of ordinary size.
pub struct FileMatrix {
    pub weight_type: WeightType,
    pub n_rows: usize,
    pub n_cols: usize,
    pub bytes: Vec<u8>,
}

impl FileMatrix {
    pub fn new(weight_type: WeightType, n_rows: usize, n_cols: usize, seed: u64) -> Self {
        let row_bytes = weight_type.row_bytes(n_cols).expect("whole blocks");
        let mut bytes: Vec<u8> = (0..n_rows * row_bytes).map(|at| random(seed, at) as u8).collect();
        let halves: &[usize] = match weight_type {
            WeightType::Q4_0 | WeightType::Q5_0 | WeightType::Q8_0 => &[0],
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => &[0, 2],
            WeightType::Q2_K => &[80, 82],
            WeightType::Q3_K => &[108],
            WeightType::Q6_K => &[208],
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => &[],
        };
        for (idx, block) in bytes.chunks_exact_mut(weight_type.block_bytes()).enumerate() {
            let value = number(seed + 1, idx);
            match weight_type {
                WeightType::F32 => block.copy_from_slice(&value.to_le_bytes()),
                WeightType::F16 => block.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                WeightType::BF16 => block.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                _ => {
                    for (i, at) in halves.iter().enumerate() {
                        let scale = half::f16::from_f32(number(seed + 2 + i as u64, idx));
                        block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
        }
        Self { weight_type, n_rows, n_cols, bytes }
    }

    pub fn row(&self, row: usize) -> &[u8] {
        let row_bytes = self.bytes.len() / self.n_rows;
        &self.bytes[row * row_bytes..][..row_bytes]
    }

    /// What the device holds: the weights of the file, plain numbers as bfloat16.
    pub fn weights(&self, row: usize) -> Vec<f32> {
        let mut weights = vec![0.0; self.n_cols];
        dequantize_row(self.weight_type, self.row(row), &mut weights);
        if !self.weight_type.is_quantized() {
            weights.iter_mut().for_each(|weight| *weight = bf16::from_f32(*weight).to_f32());
        }
        weights
    }
}

pub fn pool() -> ThreadPool {
    ThreadPool::new(2, Pinning::None)
}

/// A device with one matrix on it.
pub struct Bench {
    pub device: Emulated,
    pub kind: Kind,
    pub matrix: Matrix,
}

impl Bench {
    pub fn new(mut device: Emulated, packed: &Packed) -> Self {
        let tiles = put(&mut device, &packed.bytes);
        let matrix = Matrix {
            tiles,
            tile_bytes: packed.tile_bytes as i64,
            n_tiles: packed.n_tiles as i32,
            n_units: packed.n_units as i32,
            n_supers: packed.n_supers as i32,
            first_group: packed.first_group as i32,
        };
        Self { device, kind: packed.kind, matrix }
    }

    pub fn multiply(
        &mut self,
        size: Size,
        x: &Activations,
        n_outputs: usize,
        bias: Option<&[f32]>,
    ) -> Vec<f32> {
        self.try_multiply(size, x, n_outputs, bias).expect("multiplies")
    }

    pub fn try_multiply(
        &mut self,
        size: Size,
        x: &Activations,
        n_outputs: usize,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>, CudaError> {
        let bias = bias.map_or(0, |bias| put(&mut self.device, bytemuck::cast_slice(bias)));
        let args = LinearArgs { bias, ..self.args(x, n_outputs) };
        self.multiply_with(size, &args)
    }

    /// The arguments of a product without a bias.
    pub fn args(&mut self, x: &Activations, n_outputs: usize) -> LinearArgs {
        let out = self.device.alloc(x.n_rows * n_outputs * 4).expect("memory");
        LinearArgs {
            matrix: self.matrix,
            x: put(&mut self.device, bytemuck::cast_slice(&x.packed)),
            bias: 0,
            out,
            gated: 0,
            workspace: workspace(&mut self.device, x.n_rows, x.n_columns_padded, n_outputs),
            x_tile_bytes: (x.n_columns_padded * 16) as i64,
            n_rows: x.n_rows as i32,
            n_outputs: n_outputs as i32,
            out_stride: n_outputs as i32,
            gated_k_padded: 0,
        }
    }

    pub fn multiply_with(&mut self, size: Size, args: &LinearArgs) -> Result<Vec<f32>, CudaError> {
        linear(&mut self.device, self.kind, size, args)?;
        Ok(floats(&mut self.device, args.out, (args.n_rows * args.n_outputs) as usize))
    }
}

pub fn put(device: &mut Emulated, bytes: &[u8]) -> DevicePtr {
    let to = device.alloc(bytes.len()).expect("memory");
    device.upload(to, bytes).expect("uploads");
    to
}

/// What a product of this size may need; counters are zeros.
pub fn workspace(device: &mut Emulated, n_rows: usize, n_columns: usize, n_outputs: usize) -> Workspace {
    let need = WorkspaceNeed { n_rows, n_columns, n_outputs };
    Workspace {
        sums_of_x: device.alloc(need.sums_bytes()).expect("memory"),
        stretches: device.alloc(need.stretches_bytes()).expect("memory"),
        arrivals: put(device, &vec![0; need.arrivals_bytes()]),
    }
}

pub fn floats(device: &mut Emulated, from: DevicePtr, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    device.download(from, bytemuck::cast_slice_mut(&mut values)).expect("downloads");
    values
}

/// As kernels/layout.cuh has it.
pub fn operand_b_index(row: usize, k: usize, k_padded: usize) -> usize {
    (row / 8 * (k_padded / 8) + k / 8) * 64 + row % 8 * 8 + k % 8
}

/// Rows of bfloat16 activations; rows that are not in the batch hold something else.
pub struct Activations {
    pub n_rows: usize,
    pub n_columns_padded: usize,
    pub values: Vec<Vec<f32>>,
    pub packed: Vec<u16>,
}

impl Activations {
    /// Row `i` of the batch is the activation row `first + i` of a fixed set.
    pub fn new(first: usize, n_rows: usize, n_columns: usize) -> Self {
        let n_columns_padded = n_columns.next_multiple_of(UNIT_COLUMNS);
        let n_rows_padded = n_rows.next_multiple_of(256);
        let value = |row: usize, k: usize| bf16::from_f32(number(77 + row as u64, k));
        let mut packed = vec![bf16::from_f32(3.5).to_bits(); n_rows_padded * n_columns_padded];
        for row in 0..n_rows {
            for k in 0..n_columns_padded {
                let bits = if k < n_columns { value(first + row, k).to_bits() } else { 0 };
                packed[operand_b_index(row, k, n_columns_padded)] = bits;
            }
        }
        let values = |row: usize| (0..n_columns).map(|k| value(first + row, k).to_f32()).collect();
        Self { n_rows, n_columns_padded, values: (0..n_rows).map(values).collect(), packed }
    }
}

pub fn packed_of(file: &FileMatrix, columns: std::ops::Range<usize>) -> Packed {
    let row = |row: usize| file.row(row).into();
    let rows = [Rows { weight_type: file.weight_type, n_rows: file.n_rows, row: &row }];
    pack(&Arrangement::Stacked(&rows), columns, &pool())
}

/// Most that a product may differ from exact arithmetic, relative to the sum of the absolute products.
pub const TOLERANCE: f64 = 3e-6;

/// The exact product, and the sum of the absolute products.
pub fn exact(weights: &[f32], x: &[f32]) -> (f64, f64) {
    let products = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
    products.fold((0.0, 0.0), |(sum, magnitude), product| (sum + product, magnitude + product.abs()))
}

/// The same for K-quants, whose codes times small scales are rounded to bfloat16, as are sums of activations and what that
/// leaves over of them.
pub fn exact_in_supers(file: &FileMatrix, output: usize, columns: &Range<usize>, x: &[f32]) -> (f64, f64) {
    let layout = code_layout(file.weight_type).expect("a K-quant");
    let (mut sum, mut magnitude) = (0.0, 0.0);
    for (idx, x) in x.chunks(GROUP_LEN).enumerate() {
        let group = group_of_row(file.weight_type, file.row(output), columns.start / GROUP_LEN + idx);
        let [d, m] =
            [group.scales.d, group.scales.m].map(|bits| f64::from(half::f16::from_bits(bits).to_f32()));
        for (half, x) in x.chunks(GROUP_LEN / 2).enumerate() {
            let sub = group.scales.sub;
            let (small, minimum) = match layout.scales {
                ScaleLayout::Super32Min => (i32::from(sub[0]), sub[1]),
                ScaleLayout::Super16Min => (i32::from(sub[half] & 15), sub[half] >> 4),
                _ => (i32::from(sub[half] as i8), 0),
            };
            for (x, code) in x.iter().zip(&group.codes[half * GROUP_LEN / 2..]) {
                let rounded = bf16::from_f32(((i32::from(*code) - layout.offset) * small) as f32);
                let product = d * f64::from(rounded.to_f32()) * f64::from(*x);
                sum += product;
                magnitude += product.abs();
            }
            if layout.scales == ScaleLayout::Super16Min {
                let product = m * f64::from(minimum) * rounded_sum(x);
                sum -= product;
                magnitude += product.abs();
            }
        }
        if layout.scales == ScaleLayout::Super32Min {
            let product = m * f64::from(group.scales.sub[1]) * rounded_sum(x);
            sum -= product;
            magnitude += product.abs();
        }
    }
    (sum, magnitude)
}

/// A sum of activations as two bfloat16 numbers.
pub fn rounded_sum(x: &[f32]) -> f64 {
    let sum: f64 = x.iter().map(|x| f64::from(*x)).sum();
    let high = f64::from(bf16::from_f64(sum).to_f32());
    high + f64::from(bf16::from_f64(sum - high).to_f32())
}

pub fn check_product(
    device: Emulated,
    file: &FileMatrix,
    columns: std::ops::Range<usize>,
    n_rows: usize,
    size: Size,
) -> f64 {
    let mut bench = Bench::new(device, &packed_of(file, columns.clone()));
    let x = Activations::new(0, n_rows, columns.len());
    let bias: Vec<f32> = (0..file.n_rows).map(|output| number(5, output)).collect();
    let out = bench.multiply(size, &x, file.n_rows, Some(&bias));
    let mut worst = 0f64;
    for output in 0..file.n_rows {
        let weights = &file.weights(output)[columns.clone()];
        for row in 0..n_rows {
            let (sum, magnitude) = if file.weight_type.block_len() == GROUP_LEN * GROUPS_PER_SUPER {
                exact_in_supers(file, output, &columns, &x.values[row])
            } else {
                exact(weights, &x.values[row])
            };
            let got = f64::from(out[row * file.n_rows + output]);
            // Minimums are multiplied with sums: their part of the magnitude is another.
            let scale = magnitude + 64.0;
            let difference = (got - sum - f64::from(bias[output])).abs() / scale;
            worst = if difference.is_nan() { f64::INFINITY } else { worst.max(difference) };
        }
    }
    worst
}
