//! Tells the threads which weights come next, so that who waits for others fetches them into its caches. It guesses
//! the shares of the thread pool; a wrong guess costs time, never bits.

use super::GateUp;
use crate::packed::PackedMatrix;
use crate::pool::{N_UPCOMING, ThreadPool};

/// What is fetched at most for one thread: the second-level cache holds it beside everything else.
const FETCH_BYTES: usize = 64 * 1024;

/// Announces a [`super::matmul`] with these matrices.
pub fn announce(pool: &ThreadPool, matrices: &[&PackedMatrix]) {
    let n_threads = pool.n_threads();
    let n_tiles: usize = matrices.iter().map(|matrix| matrix.n_tiles()).sum();
    pool.announce(|thread| {
        let mut tile = thread * n_tiles / n_threads;
        for matrix in matrices {
            if tile < matrix.n_tiles() {
                return [stretch(matrix, tile, FETCH_BYTES), (0, 0)];
            }
            tile -= matrix.n_tiles();
        }
        [(0, 0); N_UPCOMING]
    });
}

/// Announces a [`super::gated_matmul`] with these matrices.
pub fn announce_gated(pool: &ThreadPool, weights: &GateUp) {
    let [gate, up] = match weights {
        GateUp::InTurns(both) => return announce(pool, &[both]),
        GateUp::Apart(matrices) => matrices,
    };
    let n_threads = pool.n_threads();
    pool.announce(|thread| {
        [gate, up].map(|matrix| stretch(matrix, thread * matrix.n_tiles() / n_threads, FETCH_BYTES / 2))
    });
}

/// Address and bytes of the matrix from a tile on.
fn stretch(matrix: &PackedMatrix, tile: usize, n_bytes: usize) -> (usize, usize) {
    if tile >= matrix.n_tiles() {
        return (0, 0);
    }
    let left = (matrix.n_tiles() - tile) * matrix.tile_bytes();
    (matrix.tile(tile).as_ptr().addr(), n_bytes.min(left))
}
