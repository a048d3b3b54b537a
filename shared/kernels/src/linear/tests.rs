//! Tests of matrix products: twins against the definition, the definition against plain f64, and independence of
//! batch, threads and ranks.

use super::*;
use crate::formats::dequantize_row;
use crate::packed::{PackSpec, PackedMatrix};
use crate::quantize::{CodeBits, QuantizedRows, quantize_rows};
use crate::{Kernels, Pinning, ThreadPool};
use paceline_domain::ReduceTree;
use paceline_domain::reduce_tree::even_edges;
use proptest::prelude::*;
use std::ops::Range;

/// Numbers that look random and are the same everywhere (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A matrix in file form.
#[derive(Clone)]
struct FileMatrix {
    weight_type: WeightType,
    n_rows: usize,
    n_cols: usize,
    bytes: Vec<u8>,
}

/// Places of the f16 scales in a block.
fn half_places(weight_type: WeightType) -> &'static [usize] {
    match weight_type {
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => &[0, 2],
        WeightType::Q2_K => &[80, 82],
        WeightType::Q3_K => &[108],
        WeightType::Q6_K => &[208],
        _ => &[0],
    }
}

impl FileMatrix {
    /// Random codes; scales of about `magnitude`.
    fn random(weight_type: WeightType, n_rows: usize, n_cols: usize, magnitude: f32, seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let n_blocks = n_rows * n_cols / weight_type.block_len();
        let mut bytes = Vec::new();
        for _ in 0..n_blocks {
            let mut block: Vec<u8> = (0..weight_type.block_bytes()).map(|_| numbers.next() as u8).collect();
            match weight_type {
                WeightType::F32 => block.copy_from_slice(&(numbers.unit() * magnitude).to_le_bytes()),
                WeightType::BF16 => {
                    block.copy_from_slice(&half::bf16::from_f32(numbers.unit() * magnitude).to_le_bytes());
                }
                _ => {
                    for place in half_places(weight_type) {
                        let scale = half::f16::from_f32(numbers.unit() * magnitude);
                        block[*place..place + 2].copy_from_slice(&scale.to_le_bytes());
                    }
                }
            }
            bytes.extend(block);
        }
        Self { weight_type, n_rows, n_cols, bytes }
    }

    fn row(&self, row: usize) -> &[u8] {
        let row_bytes = self.bytes.len() / self.n_rows;
        &self.bytes[row * row_bytes..][..row_bytes]
    }

    fn pack(&self, edges: &[usize], leaves: Range<usize>) -> PackedMatrix {
        let spec = PackSpec::cut_rows(self.weight_type, self.n_rows, edges, leaves);
        PackedMatrix::pack(&spec, &|row| self.row(row).into(), &pool(2)).unwrap()
    }

    /// Column edges of `n_leaves` leaves that the type allows.
    fn edges(&self, n_leaves: usize) -> Vec<usize> {
        let step = if self.weight_type.is_quantized() { 32 } else { 1 };
        even_edges(self.n_cols / step, n_leaves).into_iter().map(|edge| edge * step).collect()
    }
}

fn pool(n_threads: usize) -> ThreadPool {
    ThreadPool::new(n_threads, Pinning::None)
}

fn activations(n_tokens: usize, n_cols: usize, seed: u64) -> Vec<f32> {
    let mut numbers = Numbers(seed);
    (0..n_tokens * n_cols).map(|_| numbers.unit() * 3.0).collect()
}

/// Columns `columns` of each row of `x`.
fn cut(x: &[f32], n_cols: usize, columns: Range<usize>) -> Vec<f32> {
    x.chunks_exact(n_cols).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

fn product(isa: Isa, pool: &ThreadPool, matrix: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    product_with(isa, pool, matrix, x, CodeBits::Sixteen)
}

fn product_with(isa: Isa, pool: &ThreadPool, matrix: &PackedMatrix, x: &[f32], bits: CodeBits) -> Vec<f32> {
    let n_cols = matrix.n_cols();
    let n_rows = x.len() / n_cols;
    let mut out = vec![f32::NAN; matrix.n_subtrees() * n_rows * matrix.n_rows()];
    let kernels = Kernels::for_isa(isa);
    let mut rows = QuantizedRows::new();
    quantize_rows(kernels, pool, x, (n_cols, bits), &mut rows);
    let input = Input { n_rows, quantized: Some(&rows), float: x };
    matmul(kernels, pool, input, [Product { matrix, bias: None, out: &mut out }]);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// 0 for plain numbers of any length, else a whole number of blocks.
fn columns_for(weight_type: WeightType, wanted: usize) -> usize {
    wanted.next_multiple_of(weight_type.block_len())
}

/// A shape: output rows, columns wanted, leaves, tokens, seed.
fn shapes() -> impl Strategy<Value = (usize, usize, usize, usize, u64)> {
    (1usize..50, 1usize..700, 1usize..10, 1usize..=33, any::<u64>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// `sum_quantized_avx2`, `sum_quantized_avx512`, `sum_quantized_vnni`, `sum_float_avx2` and `sum_float_avx512`
    /// against the definition, with the owned columns cut at any leaf, inside superblocks too.
    #[test]
    fn twins_give_the_bits_of_the_definition(
        (n_rows, wanted, n_leaves, n_tokens, seed) in shapes(),
        owned in (0usize..10, 0usize..10),
        magnitude in prop_oneof![Just(0.01f32), Just(60000.0), Just(1e-7)],
    ) {
        for weight_type in WeightType::ALL {
            let n_cols = columns_for(weight_type, wanted);
            let file = FileMatrix::random(weight_type, n_rows, n_cols, magnitude, seed);
            let edges = file.edges(n_leaves);
            let leaves = owned.0.min(owned.1).min(n_leaves - 1)..owned.0.max(owned.1).clamp(1, n_leaves);
            let matrix = file.pack(&edges, leaves);
            prop_assume!(matrix.n_cols() > 0);
            let x = activations(n_tokens, matrix.n_cols(), seed ^ 1);
            for code_bits in CodeBits::ALL {
                let expected = product_with(Isa::Scalar, &pool(1), &matrix, &x, code_bits);
                for isa in Isa::available() {
                    let found = product_with(isa, &pool(2), &matrix, &x, code_bits);
                    prop_assert_eq!(bits(&found), bits(&expected), "{} {}", weight_type.name(), isa);
                }
            }
        }
    }

    /// The sum of each row is near the plain sum, and exactly as near as rounding allows.
    #[test]
    fn products_are_near_those_in_f64((n_rows, wanted, n_leaves, n_tokens, seed) in shapes()) {
        for weight_type in WeightType::ALL {
            let n_cols = columns_for(weight_type, wanted);
            let file = FileMatrix::random(weight_type, n_rows, n_cols, 0.1, seed);
            let matrix = file.pack(&file.edges(n_leaves), 0..n_leaves);
            let mut x = activations(n_tokens, n_cols, seed ^ 1);
            let found = product(Isa::detect(), &pool(2), &matrix, &x);
            if weight_type.is_quantized() {
                let mut rows = QuantizedRows::new();
                quantize_rows(Kernels::detect(), &pool(1), &x, (n_cols, CodeBits::Sixteen), &mut rows);
                for (idx, x) in x.chunks_mut(n_cols).enumerate() {
                    x.copy_from_slice(&rows.row(idx));
                }
            }
            let mut weights = vec![0.0; n_cols];
            for row in 0..n_rows {
                dequantize_row(weight_type, file.row(row), &mut weights);
                for (token, x) in x.chunks_exact(n_cols).enumerate() {
                    let terms = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let error = (f64::from(found[token * n_rows + row]) - sum).abs();
                    // Codes times scale are larger than weights where minimums cancel them.
                    prop_assert!(error <= 1e-4 * size + 1e-3, "{} {error} of {sum}", weight_type.name());
                }
            }
        }
    }

    #[test]
    fn a_token_does_not_depend_on_its_batch_or_the_threads((n_rows, wanted, n_leaves, n_tokens, seed) in shapes()) {
        for weight_type in WeightType::ALL {
            let n_cols = columns_for(weight_type, wanted);
            let file = FileMatrix::random(weight_type, n_rows, n_cols, 0.1, seed);
            let matrix = file.pack(&file.edges(n_leaves), 0..n_leaves);
            let x = activations(n_tokens, n_cols, seed ^ 1);
            let together = product(Isa::detect(), &pool(3), &matrix, &x);
            for (x, together) in x.chunks_exact(n_cols).zip(together.chunks_exact(n_rows)) {
                let alone = product(Isa::detect(), &pool(1), &matrix, x);
                prop_assert_eq!(bits(&alone), bits(together), "{}", weight_type.name());
            }
        }
    }

    #[test]
    fn ranks_together_give_the_bits_of_one(
        (n_rows, wanted, n_leaves, n_tokens, seed) in shapes(),
        cuts in prop::collection::vec(0usize..10, 0..4),
    ) {
        for weight_type in WeightType::ALL {
            let n_cols = columns_for(weight_type, wanted);
            let file = FileMatrix::random(weight_type, n_rows, n_cols, 0.1, seed);
            let edges = file.edges(n_leaves);
            let x = activations(n_tokens, n_cols, seed ^ 1);
            let one = product(Isa::detect(), &pool(1), &file.pack(&edges, 0..n_leaves), &x);
            let mut rank_edges: Vec<usize> = cuts.iter().map(|cut| (*cut).min(n_leaves)).collect();
            rank_edges.extend([0, n_leaves]);
            rank_edges.sort_unstable();
            let tree = ReduceTree::new(rank_edges);
            let parts: Vec<Vec<f32>> = (0..tree.n_ranks())
                .map(|rank| rank_product(&file, &edges, tree.leaves(rank), &x))
                .collect();
            let n_out = n_tokens * n_rows;
            for (i, one) in one.iter().enumerate() {
                let sum = tree.finish(|rank, subtree| parts[rank][subtree * n_out + i], |left, right| left + right);
                prop_assert_eq!(sum.to_bits(), one.to_bits(), "{}", weight_type.name());
            }
        }
    }
}

#[test]
fn the_gated_product_gives_the_bits_of_its_steps() {
    use WeightType::{F16, Q4_1, Q4_K, Q8_0};
    for (gate_type, up_type, n_rows, n_tokens) in [
        (Q4_1, Q4_1, 96, 1),
        (Q4_1, Q4_1, 80, 20),
        (Q4_K, Q8_0, 64, 70),
        (F16, Q8_0, 50, 17),
        (F16, F16, 64, 3),
    ] {
        let file = |weight_type, seed| FileMatrix::random(weight_type, n_rows, 256, 0.1, seed);
        let files = [file(gate_type, 1), file(up_type, 2)];
        let [gate, up] = files.each_ref().map(|file| file.pack(&[0, 256], 0..1));
        let specs = [gate_type, up_type].map(|weight_type| PackSpec::whole_rows(weight_type, n_rows, 256));
        let [gate_file, up_file] = &files;
        let weights = GateUp::pack(
            specs.each_ref(),
            [&|row| gate_file.row(row).into(), &|row| up_file.row(row).into()],
            &pool(2),
        )
        .unwrap();
        let is_one = gate_type == up_type && n_rows % 32 == 0;
        assert_eq!(matches!(weights, GateUp::InTurns(_)), is_one);
        let x = activations(n_tokens, 256, 3);
        for (isa, code_bits) in
            Isa::available().into_iter().flat_map(|isa| CodeBits::ALL.map(|bits| (isa, bits)))
        {
            let (kernels, pool) = (Kernels::for_isa(isa), pool(2));
            let mut expected = product_with(isa, &pool, &gate, &x, code_bits);
            let ups = product_with(isa, &pool, &up, &x, code_bits);
            crate::elementwise::silu_mul(kernels, &pool, &mut expected, &ups);
            let mut expected_rows = QuantizedRows::new();
            quantize_rows(kernels, &pool, &expected, (n_rows, CodeBits::Eight), &mut expected_rows);

            let (mut rows, mut found, mut out) =
                (QuantizedRows::new(), vec![f32::NAN; expected.len()], QuantizedRows::new());
            quantize_rows(kernels, &pool, &x, (256, code_bits), &mut rows);
            let input = Input { n_rows: n_tokens, quantized: Some(&rows), float: &x };
            gated_matmul(kernels, &pool, input, &weights, GatedOutput::Float(&mut found));
            assert_eq!(bits(&found), bits(&expected), "{isa}");
            let quantized = GatedOutput::Quantized(&mut out, CodeBits::Eight);
            gated_matmul(kernels, &pool, input, &weights, quantized);
            for token in 0..n_tokens {
                assert_eq!(bits(&out.row(token)), bits(&expected_rows.row(token)), "{isa}");
            }
        }
    }
}

#[test]
fn products_of_one_call_are_those_of_many_and_biases_are_added() {
    let files = [(WeightType::Q4_K, 48), (WeightType::Q6_K, 20), (WeightType::F32, 7)]
        .map(|(weight_type, n_rows)| FileMatrix::random(weight_type, n_rows, 256, 0.1, n_rows as u64));
    let matrices = files.each_ref().map(|file| file.pack(&[0, 256], 0..1));
    let (kernels, pool) = (Kernels::detect(), pool(2));
    let x = activations(70, 256, 4);
    let mut rows = QuantizedRows::new();
    quantize_rows(kernels, &pool, &x, (256, CodeBits::Eight), &mut rows);
    let mut outs = matrices.each_ref().map(|matrix| vec![f32::NAN; 70 * matrix.n_rows()]);
    let bias: Vec<f32> = (0..20).map(|i| i as f32 / 3.0).collect();
    announce(&pool, &matrices.each_ref());
    let mut biases = [None, Some(bias.as_slice()), None].into_iter();
    let mut matrix = matrices.iter();
    let products = outs.each_mut().map(|out| {
        let (matrix, bias) = (matrix.next().expect("three"), biases.next().expect("three"));
        Product { matrix, bias, out }
    });
    matmul(kernels, &pool, Input { n_rows: 70, quantized: Some(&rows), float: &x }, products);
    for (matrix, out) in matrices.iter().zip(&outs) {
        let mut expected = product_with(Isa::detect(), &pool, matrix, &x, CodeBits::Eight);
        if matrix.n_rows() == 20 {
            crate::elementwise::add_bias(kernels, &pool, &mut expected, &bias);
        }
        assert_eq!(bits(out), bits(&expected));
    }
}

fn rank_product(file: &FileMatrix, edges: &[usize], leaves: Range<usize>, x: &[f32]) -> Vec<f32> {
    let matrix = file.pack(edges, leaves.clone());
    if matrix.n_cols() == 0 {
        // Leaves without columns sum to nothing.
        return vec![0.0; matrix.n_subtrees() * x.len() / file.n_cols * file.n_rows];
    }
    product(Isa::detect(), &pool(1), &matrix, &cut(x, file.n_cols, edges[leaves.start]..edges[leaves.end]))
}

#[test]
fn the_largest_codes_do_not_overflow() {
    for weight_type in WeightType::ALL.into_iter().filter(|weight_type| weight_type.is_quantized()) {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let mut file = FileMatrix::random(weight_type, 16, 512, 1.0, 1);
            for block in file.bytes.chunks_exact_mut(weight_type.block_bytes()) {
                block.fill(byte);
                for place in half_places(weight_type) {
                    block[*place..place + 2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
                }
            }
            let matrix = file.pack(&[0, 512], 0..1);
            for sign in [1.0, -1.0] {
                let x = vec![sign; 512];
                let mut weights = vec![0.0; 512];
                dequantize_row(weight_type, file.row(0), &mut weights);
                let exact: f64 = weights.iter().map(|weight| f64::from(*weight * sign)).sum();
                for isa in Isa::available() {
                    let found = f64::from(product(isa, &pool(1), &matrix, &x)[0]);
                    let size = exact.abs().max(1.0);
                    assert!(
                        (found - exact).abs() / size < 1e-5,
                        "{} {isa}: {found}, {exact}",
                        weight_type.name()
                    );
                }
            }
        }
    }
}

#[test]
fn nan_and_infinite_activations_show_and_stay_in_their_row() {
    for weight_type in WeightType::ALL {
        let file = FileMatrix::random(weight_type, 20, 256, 0.1, 7);
        let matrix = file.pack(&[0, 256], 0..1);
        let clean = activations(3, 256, 8);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[256 + 9] = bad;
            for isa in Isa::available() {
                let found = product(isa, &pool(2), &matrix, &x);
                let expected = product(isa, &pool(2), &matrix, &clean);
                assert_eq!(bits(&found[..20]), bits(&expected[..20]));
                assert!(found[20..40].iter().all(|sum| !sum.is_finite()), "{} {isa}", weight_type.name());
                assert_eq!(bits(&found[40..]), bits(&expected[40..]));
            }
        }
    }
}

#[test]
fn packed_weights_are_little_larger_than_the_file() {
    for weight_type in WeightType::ALL {
        let file = FileMatrix::random(weight_type, 64, 17 * 256, 0.1, 3);
        let edges = file.edges(8);
        for leaves in [0..8, 0..3, 3..8] {
            let file_bytes = file.bytes.len() / 8 * leaves.len();
            let packed = file.pack(&edges, leaves).bytes();
            assert!(packed >= file_bytes && packed * 20 <= file_bytes * 21, "{}", weight_type.name());
        }
    }
}

#[test]
fn a_rank_without_leaves_or_rows_has_nothing_to_do() {
    let file = FileMatrix::random(WeightType::Q4_0, 4, 64, 0.1, 3);
    let matrix = file.pack(&[0, 32, 64], 1..1);
    assert_eq!((matrix.n_subtrees(), matrix.n_cols()), (0, 0));
    let rows = QuantizedRows::new();
    let input = Input { n_rows: 0, quantized: Some(&rows), float: &[] };
    matmul(Kernels::detect(), &pool(1), input, [Product { matrix: &matrix, bias: None, out: &mut [] }]);
    let spec = PackSpec::whole_rows(WeightType::Q4_0, 0, 64);
    let matrix = PackedMatrix::pack(&spec, &|row| file.row(row).into(), &pool(1)).unwrap();
    assert!(product(Isa::detect(), &pool(1), &matrix, &[1.0; 128]).is_empty());
}

#[test]
fn what_cannot_be_packed_is_named() {
    let file = FileMatrix::random(WeightType::Q4_K, 4, 512, 0.1, 3);
    let good = PackSpec::cut_rows(WeightType::Q4_K, 4, &[0, 96, 512], 0..1);
    let problem = |change: fn(&mut PackSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        PackedMatrix::pack(&spec, &|row| file.row(row).into(), &pool(1)).err().map(|error| error.to_string())
    };
    let check = |change, expected: &str| {
        let message = problem(change).unwrap();
        assert!(message.contains(expected), "{message}");
    };
    assert_eq!(problem(|_| ()), None);
    check(|spec| spec.n_cols = 100, "100 columns is not a whole number of q4_k blocks of 256");
    check(|spec| spec.n_cols = 1024, "row 0 has 288 bytes; 576 are expected");
    check(|spec| spec.k_range = 0..1024, "0..1024 are not inside a row of 512");
    check(|spec| spec.leaf_edges = vec![0, 64], "do not rise from column 0 to column 96");
    check(|spec| spec.leaf_edges = vec![0, 40, 96], "column 40 is inside a group");
    check(|spec| spec.first_leaf = 2, "leaves 2..2+1 of 2");
    check(|spec| (spec.n_rows, spec.n_cols) = (usize::MAX, 512), "does not fit the memory");
}
