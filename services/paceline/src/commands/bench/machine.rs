//! The limits of the machine: how fast it reads memory and multiplies bytes. Nothing of a model is involved.

use std::{fs, hint::black_box, time::Instant};

use paceline_kernels::{
    AlignedVec, Kernels, Pinning, ThreadPool,
    machine::{DotOperands, PRODUCTS_PER_ROUND, dot_rounds, sum_words},
};

use super::spread::Spread;

/// Least memory that is read: far more than any cache.
const MIN_BUFFER_BYTES: usize = 1 << 30;
/// Times the last cache that is read at least.
const CACHES_READ: usize = 4;
/// What a thread reads before it claims the next piece.
const PIECE_WORDS: usize = 1 << 17;
/// Times the buffer is read, and stretches of it that are timed one by one, so that a disturbance spoils few of
/// them. The fastest counts; before a stretch comes again, all others have passed through the caches.
const N_SWEEPS: usize = 12;
const STRETCHES: usize = 8;
/// Rounds of products in a task, tasks of each thread, and how often; the fastest counts.
const ROUNDS: usize = 5_000;
const TASKS_PER_THREAD: usize = 80;
const N_TRIES: usize = 100;

/// What some threads reach together.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// Bytes read from memory in a second, at best.
    pub read_bytes_per_s: f64,
    /// The same in the median: less where others share the memory.
    pub median_read_bytes_per_s: f64,
    /// Products of two bytes, each added to a sum, in a second.
    pub products_per_s: f64,
}

impl Limits {
    /// Of two measurements: the better, and the mean of medians.
    pub fn join(self, other: Self) -> Self {
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            median_read_bytes_per_s: (self.median_read_bytes_per_s + other.median_read_bytes_per_s) / 2.0,
            products_per_s: self.products_per_s.max(other.products_per_s),
        }
    }

    /// Bytes read in a second, in 10^9.
    pub fn read_gb_per_s(&self) -> f64 {
        self.read_bytes_per_s / 1e9
    }

    /// The median of that.
    pub fn median_read_gb_per_s(&self) -> f64 {
        self.median_read_bytes_per_s / 1e9
    }

    /// Integer operations in a second, in 10^9: a product and its addition are two.
    pub fn int8_gop_per_s(&self) -> f64 {
        2.0 * self.products_per_s / 1e9
    }
}

/// Measures with these kernels and each of these numbers of threads.
pub fn measure(kernels: &'static Kernels, thread_counts: &[usize]) -> Vec<Limits> {
    let mut words = AlignedVec::<u64>::zeroed(buffer_bytes() / size_of::<u64>());
    // Memory nobody wrote to is one page of zeros, and that is in the cache.
    let writers = ThreadPool::new(thread_counts.iter().copied().max().unwrap_or(1), Pinning::None);
    writers.run_pieces(&mut words, PIECE_WORDS, &|piece_idx, piece| piece.fill(piece_idx as u64));
    drop(writers);
    let limits = |n_threads: &usize| {
        let pool = ThreadPool::new(*n_threads, Pinning::None);
        let read = read_bytes_per_s(kernels, &pool, &words);
        Limits {
            read_bytes_per_s: read.max,
            median_read_bytes_per_s: read.median,
            products_per_s: products_per_s(kernels, &pool).max,
        }
    };
    thread_counts.iter().map(limits).collect()
}

fn read_bytes_per_s(kernels: &'static Kernels, pool: &ThreadPool, words: &[u64]) -> Spread {
    let pieces: Vec<&[u64]> = words.chunks(PIECE_WORDS).collect();
    let n_pieces = pieces.len() / STRETCHES;
    let read = |attempt: usize| {
        let stretch = &pieces[attempt % STRETCHES * n_pieces..][..n_pieces];
        pool.run(n_pieces, &|piece| {
            black_box(sum_words(kernels, stretch[piece]));
        })
    };
    per_second(n_pieces * PIECE_WORDS * size_of::<u64>(), N_SWEEPS * STRETCHES, read)
}

fn products_per_s(kernels: &'static Kernels, pool: &ThreadPool) -> Spread {
    let operands = DotOperands::new(|i| i as u8, |i| i as i8);
    let n_tasks = TASKS_PER_THREAD * pool.n_threads();
    let multiply = |_| {
        pool.run(n_tasks, &|_| {
            black_box(dot_rounds(kernels, &operands, ROUNDS));
        })
    };
    per_second(n_tasks * ROUNDS * PRODUCTS_PER_ROUND, N_TRIES, multiply)
}

/// How often something is done in a second that each try does `n` times.
fn per_second(n: usize, n_tries: usize, work: impl Fn(usize)) -> Spread {
    let tries = (0..n_tries).map(|attempt| {
        let started = Instant::now();
        work(attempt);
        n as f64 / started.elapsed().as_secs_f64()
    });
    Spread::of(&tries.collect::<Vec<_>>())
}

fn buffer_bytes() -> usize {
    let caches = (0..8).filter_map(|index| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        cache_bytes(fs::read_to_string(path).ok()?.trim())
    });
    MIN_BUFFER_BYTES.max(CACHES_READ * caches.max().unwrap_or(0))
}

/// A cache's size as Linux writes it, such as `32768K`.
fn cache_bytes(text: &str) -> Option<usize> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_sizes_are_read_with_their_unit() {
        let cases = [
            ("32768K", Some(32 << 20)),
            ("96M", Some(96 << 20)),
            ("512", Some(512)),
            ("", None),
            ("K", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(cache_bytes(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn a_product_with_its_addition_is_two_operations() {
        let slow = Limits { read_bytes_per_s: 3e9, median_read_bytes_per_s: 2e9, products_per_s: 1e9 };
        let limits =
            slow.join(Limits { read_bytes_per_s: 2e9, median_read_bytes_per_s: 1e9, products_per_s: 5e9 });
        assert_eq!(limits.median_read_gb_per_s(), 1.5);
        assert_eq!((limits.read_gb_per_s(), limits.int8_gop_per_s()), (3.0, 10.0));
    }
}
