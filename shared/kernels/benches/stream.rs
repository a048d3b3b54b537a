//! How fast kernels read weights that no cache holds, beside a bare reader in the same second: bytes of packed weights in a
//! second for one token, medians of rounds in turns. Prints a table, asserts nothing. Arguments: threads (2), tokens (1).

use std::hint::black_box;
use std::time::Instant;

use paceline_domain::WeightType;
use paceline_kernels::machine::sum_words;
use paceline_kernels::{
    AlignedVec, CodeBits, Input, Kernels, PackSpec, PackedMatrix, Pinning, Product, QuantizedRows,
    ThreadPool, matmul, quantize_rows,
};

/// Type, output rows, columns, matrices: about 1 GB of each.
const CASES: [(WeightType, usize, usize, usize); 4] = [
    (WeightType::Q6_K, 151_936, 1_536, 5),
    (WeightType::Q4_K, 8_960, 1_536, 120),
    (WeightType::Q4_K, 1_536, 8_960, 120),
    (WeightType::Q4_0, 4_864, 896, 400),
];
const READ_BYTES: usize = 1 << 30;
const PIECE_WORDS: usize = 1 << 17;
const N_ROUNDS: usize = 9;

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let (n_threads, n_tokens) = (numbers.next().unwrap_or(2), numbers.next().unwrap_or(1));
    let (kernels, pool) = (Kernels::detect(), ThreadPool::new(n_threads, Pinning::None));
    let mut words = AlignedVec::<u64>::zeroed(READ_BYTES / size_of::<u64>());
    // Memory nobody wrote to is one page of zeros, and that is in the cache.
    pool.run_pieces(&mut words, PIECE_WORDS, &|piece_idx, piece| piece.fill(piece_idx as u64));
    let sets = CASES.map(|case| pack(case, &pool));
    let mut rates = vec![Vec::new(); 1 + sets.len()];
    for _ in 0..N_ROUNDS {
        rates[0].push(read(kernels, &pool, &words));
        for (set, rates) in sets.iter().zip(&mut rates[1..]) {
            rates.push(multiply(kernels, &pool, set, n_tokens));
        }
    }
    let medians = rates.iter_mut().map(|rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    let medians: Vec<f64> = medians.collect();
    println!("{n_threads} threads, {n_tokens} tokens; bare reader {:.1} GB/s", medians[0]);
    for ((weight_type, n_rows, n_cols, _), rate) in CASES.iter().zip(&medians[1..]) {
        let share = rate / medians[0];
        println!("{:<5} {n_rows:>6} x {n_cols:<5} {rate:>6.1} GB/s {share:>6.2}", weight_type.name());
    }
}

fn pack(
    (weight_type, n_rows, n_cols, n): (WeightType, usize, usize, usize),
    pool: &ThreadPool,
) -> Vec<PackedMatrix> {
    let row_bytes = weight_type.row_bytes(n_cols).expect("whole blocks");
    // Bytes without the bit pattern of infinite or NaN numbers.
    let row: Vec<u8> = (0..row_bytes).map(|i| ((i * 7919) >> 3) as u8 & 0x3b).collect();
    let spec = PackSpec::whole_rows(weight_type, n_rows, n_cols);
    (0..n).map(|_| PackedMatrix::pack(&spec, &|_| row.as_slice().into(), pool).expect("a matrix")).collect()
}

/// Bytes in a nanosecond.
fn read(kernels: &'static Kernels, pool: &ThreadPool, words: &[u64]) -> f64 {
    let pieces: Vec<&[u64]> = words.chunks(PIECE_WORDS).collect();
    let start = Instant::now();
    pool.run(pieces.len(), &|piece| {
        black_box(sum_words(kernels, pieces[piece]));
    });
    READ_BYTES as f64 / start.elapsed().as_nanos() as f64
}

/// Bytes of weights in a nanosecond.
fn multiply(kernels: &'static Kernels, pool: &ThreadPool, set: &[PackedMatrix], n_tokens: usize) -> f64 {
    let (n_rows, n_cols) = (set[0].n_rows(), set[0].n_cols());
    let x: Vec<f32> = (0..n_tokens * n_cols).map(|i| (i % 251) as f32 - 125.0).collect();
    let mut rows = QuantizedRows::new();
    quantize_rows(kernels, pool, &x, (n_cols, CodeBits::Eight), &mut rows);
    let mut out = vec![0.0; n_tokens * n_rows];
    let start = Instant::now();
    for matrix in set {
        let input = Input { n_rows: n_tokens, quantized: Some(&rows), float: &x };
        matmul(kernels, pool, input, [Product { matrix, bias: None, out: &mut out }]);
    }
    set.iter().map(PackedMatrix::bytes).sum::<usize>() as f64 / start.elapsed().as_nanos() as f64
}
