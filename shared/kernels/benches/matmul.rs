//! Speed of matrix products: bytes of packed weights and multiply-adds in a second. Prints a table, asserts
//! nothing. Arguments: threads (2), and a part of a type's name to run only those.

use paceline_domain::WeightType;
use paceline_kernels::{
    CodeBits, Input, InputKind, Isa, Kernels, PackSpec, PackedMatrix, Pinning, Product, QuantizedRows,
    ThreadPool, matmul, quantize_rows,
};
use std::time::Instant;

/// Type, output rows, columns.
const CASES: [(WeightType, usize, usize); 11] = [
    (WeightType::Q4_1, 576, 1536),
    (WeightType::Q4_1, 1536, 576),
    (WeightType::Q4_K, 8960, 1536),
    (WeightType::Q4_K, 1536, 8960),
    (WeightType::Q6_K, 1536, 8960),
    (WeightType::Q5_0, 1536, 8960),
    (WeightType::Q2_K, 1536, 8960),
    (WeightType::Q3_K, 1536, 8960),
    (WeightType::Q8_0, 49152, 576),
    (WeightType::F16, 1536, 2048),
    (WeightType::F32, 1536, 1024),
];

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let n_threads = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(2);
    let wanted = arguments.iter().find(|argument| argument.parse::<usize>().is_err());
    let pool = ThreadPool::new(n_threads, Pinning::None);
    println!("{n_threads} threads");
    println!("type  rows x cols   isa    bits    tokens   us/call     GB/s   GMAC/s");
    for (weight_type, n_rows, n_cols) in CASES {
        if wanted.is_some_and(|wanted| !weight_type.name().contains(wanted.as_str())) {
            continue;
        }
        let start = Instant::now();
        let matrix = random_matrix(weight_type, n_rows, n_cols, &pool);
        let pack_ms = start.elapsed().as_secs_f64() * 1e3;
        println!(
            "{} {n_rows} x {n_cols}: {} bytes, made and packed in {pack_ms:.1} ms",
            weight_type.name(),
            matrix.bytes()
        );
        for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
            for n_tokens in [1, 2, 4, 8, 16, 32, 64, 512] {
                measure(&pool, &matrix, isa, n_tokens);
            }
        }
    }
}

fn random_matrix(weight_type: WeightType, n_rows: usize, n_cols: usize, pool: &ThreadPool) -> PackedMatrix {
    let row_bytes = weight_type.row_bytes(n_cols).expect("whole blocks");
    // Bytes without the bit pattern of infinite or NaN numbers.
    let bytes: Vec<u8> = (0..n_rows * row_bytes).map(|i| ((i * 7919) >> 3) as u8 & 0x3b).collect();
    let spec = PackSpec::whole_rows(weight_type, n_rows, n_cols);
    PackedMatrix::pack(&spec, &|row| bytes[row * row_bytes..][..row_bytes].into(), pool)
        .expect("a valid matrix")
}

fn measure(pool: &ThreadPool, matrix: &PackedMatrix, isa: Isa, n_tokens: usize) {
    let kernels = Kernels::for_isa(isa);
    let x: Vec<f32> = (0..n_tokens * matrix.n_cols()).map(|i| (i % 251) as f32 - 125.0).collect();
    for bits in CodeBits::ALL {
        let mut rows = QuantizedRows::new();
        quantize_rows(kernels, pool, &x, (matrix.n_cols(), bits), &mut rows);
        let input = Input { n_rows: n_tokens, quantized: Some(&rows), float: &x };
        let mut out = vec![0.0; n_tokens * matrix.n_rows()];
        let mut once = || {
            matmul(kernels, pool, input, [Product { matrix, bias: None, out: &mut out }]);
        };
        once();
        let mut best = f64::INFINITY;
        let begin = Instant::now();
        while begin.elapsed().as_millis() < 60 {
            let start = Instant::now();
            once();
            best = best.min(start.elapsed().as_secs_f64());
        }
        let n_macs = (n_tokens * matrix.n_rows() * matrix.n_cols()) as f64;
        println!(
            "                    {:<11} {bits:?} {n_tokens:>6} {:>9.1} {:>8.1} {:>8.1}",
            isa.name(),
            best * 1e6,
            matrix.bytes() as f64 / best * 1e-9,
            n_macs / best * 1e-9,
        );
        if matrix.input_kind() == InputKind::Float {
            break;
        }
    }
}
