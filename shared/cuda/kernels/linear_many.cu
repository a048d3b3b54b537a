// Products with more rows by mma.sync, for all weights and devices: `some` for up to 64 rows, `many` beyond.
#include "linear.cuh"

namespace linear {

// Adds a chunk's sums and begins the next.
template <int MT, int NT> DEVICE void end_chunk(float (&total)[MT][NT][4], float (&sum)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[m][n][i] = __fadd_rn(total[m][n][i], sum[m][n][i]);
                sum[m][n][i] = 0.0f;
            }
        }
    }
}

// More rows: a block for BLOCK_M tiles of outputs by BLOCK_N tiles of rows, a warp of it for MT by NT of them. Weights and
// activations pass through STAGES stages of UNITS units in shared memory.
template <class F, int MT, int NT, int WARPS_M, int WARPS_N, int STAGES, int UNITS>
DEVICE void many_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int BLOCK_M = MT * WARPS_M, BLOCK_N = NT * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int WEIGHT_BYTES = BLOCK_M * F::STAGED_BYTES, UNIT_BYTES = WEIGHT_BYTES + BLOCK_N * X_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int first_n = blockIdx.x * BLOCK_N, first_m = blockIdx.y * BLOCK_M, n_units = args.matrix.n_units;
    // Each thread copies the same places of every unit, 16 bytes each.
    constexpr int TILE_PIECES = F::STAGED_BYTES / 16, PIECES = BLOCK_M * TILE_PIECES;
    constexpr int COPIES = (PIECES + THREADS - 1) / THREADS;
    constexpr int X_PIECES = BLOCK_N * X_BYTES / 16, X_COPIES = (X_PIECES + THREADS - 1) / THREADS;
    // Tiles beyond the last are not stored: any will do.
    auto source = [&](int piece, int unit) {
        int tile = min(first_m + piece / TILE_PIECES, args.matrix.n_tiles - 1);
        return F::source(F::unit_of(args.matrix, tile, unit), piece % TILE_PIECES * 16);
    };
    // Plain numbers follow each other in steps; the planes of quantized ones would take too many registers.
    const uint8_t *from[COPIES], *x_from[X_COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++) from[i] = F::QUANTIZED ? nullptr : source(i * THREADS + threadIdx.x, 0);
#pragma unroll
    for (int i = 0; i < X_COPIES; i++) {
        int piece = i * THREADS + threadIdx.x, tile = first_n + piece / (X_BYTES / 16);
        x_from[i] = reinterpret_cast<const uint8_t *>(args.x) + tile * args.x_tile_bytes + piece % (X_BYTES / 16) * 16;
    }
    auto load_weights = [&](int unit, uint8_t *to) {
        if (unit >= n_units) return;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int piece = i * THREADS + threadIdx.x;
            if (PIECES % THREADS != 0 && piece >= PIECES) break;
            const uint8_t *at = F::QUANTIZED ? source(piece, unit) : from[i] + (size_t)unit * F::CODE_BYTES;
            copy_async(to + piece * 16, at, true);
        }
    };
    auto load_x = [&](int unit, uint8_t *to) {
        if (unit >= n_units) return;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            int piece = i * THREADS + threadIdx.x;
            if (X_PIECES % THREADS != 0 && piece >= X_PIECES) break;
            bool is_there = (first_n + piece / (X_BYTES / 16)) * 8 < args.n_rows;
            copy_async(to + WEIGHT_BYTES + piece * 16, x_from[i] + (size_t)unit * X_BYTES, is_there);
        }
    };
    auto place = [&](int stage, int i) { return shared + (stage % STAGES * UNITS + i) * UNIT_BYTES; };
    float total[MT][NT][4] = {}, sum[MT][NT][4] = {};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        for (int i = 0; i < UNITS; i++) load_weights(stage * UNITS + i, place(stage, i));
    }
    grid_wait();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        for (int i = 0; i < UNITS; i++) load_x(stage * UNITS + i, place(stage, i));
        copy_commit();
    }
    for (int stage = 0; stage * UNITS < n_units; stage++) {
        copy_wait<STAGES - 2>();
        // Also: everybody is done with the stage that is filled next.
        sync_block();
        const int next = stage + STAGES - 1;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            int unit = stage * UNITS + i;
            if (UNITS > 1 && unit >= n_units) break;
            const uint8_t *weights = place(stage, i) + warp_m * MT * F::STAGED_BYTES;
            const uint8_t *x = place(stage, i) + WEIGHT_BYTES + warp_n * NT * X_BYTES;
#pragma unroll
            for (int group = 0; group < 2; group++) {
                uint32_t b[NT][4];
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    load_matrices(b[n], x + n * X_BYTES + group * 4 * CORE_BYTES, CORE_BYTES, 2 * CORE_BYTES, lane);
                }
                multiply_group<F, MT, NT>(sum, weights, F::STAGED_BYTES, b, group, lane);
                // Copies for the next stage go out between products, not in a burst that operands would wait behind.
                if (i > 0) continue;
#pragma unroll
                for (int j = 0; j < UNITS; j++) {
                    if (group == 0) load_weights(next * UNITS + j, place(next, j));
                    if (group == 1) load_x(next * UNITS + j, place(next, j));
                }
            }
            if (F::QUANTIZED && (unit % CHUNK == CHUNK - 1 || unit + 1 == n_units)) end_chunk(total, sum);
        }
        copy_commit();
    }
    auto result = [&](int m, int n) -> const float(&)[4] { return F::QUANTIZED ? total[m][n] : sum[m][n]; };
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int tile = first_m + warp_m * MT + m;
        if (tile >= args.matrix.n_tiles) break;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int n_tile = first_n + warp_n * NT + n;
            if (n_tile * 8 >= args.n_rows) continue;
            args.gated ? store_gated_tile(args, result(m, n), tile, n_tile, lane)
                       : store_tile(args, result(m, n), tile, n_tile * 8, lane);
        }
    }
}

}  // namespace linear

// For gates and ups that are held differently and so are two matrices.
struct SiluArgs {
    const float *gate;  // [n_rows][n_features]
    const float *up;    // [n_rows][n_features]
    uint16_t *gated;    // operand B, [n_rows][gated_k_padded]
    int32_t n_rows;
    int32_t n_features;
    int32_t gated_k_padded;
    int32_t unused;
};

KERNEL(silu_times_up, SiluArgs, 256, 4) {
    int row = blockIdx.x;
    for (int k = threadIdx.x; k < args.n_features; k += blockDim.x) {
        size_t at = (size_t)row * args.n_features + k;
        args.gated[operand_b_index(row, k, args.gated_k_padded)] =
            float_to_bf16(linear::silu_times(args.gate[at], args.up[at]));
    }
}

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
// A block for some rows has few tiles, so that narrow matrices fill the device.
constexpr int SOME_M = 2;
#define MORE_ROWS(name, F, NT, STAGES, UNITS)                            \
    KERNEL_AHEAD(linear_some_##name, LinearArgs, 32 * SOME_M, 3) {       \
        SHARED(uint8_t, shared);                                         \
        grid_release();                                                  \
        linear::many_rows<F, 1, 4, SOME_M, 1, 8, 1>(args, shared);       \
    }                                                                    \
    KERNEL_AHEAD(linear_many_##name, LinearArgs, 256, 1) {               \
        SHARED(uint8_t, shared);                                         \
        grid_release();                                                  \
        linear::many_rows<F, 4, NT, 2, 4, STAGES, UNITS>(args, shared);  \
    }

MORE_ROWS(bf16, Bf16, 8, 2, 2)
MORE_ROWS(q4_0, Q4_0, 4, 4, 1)
MORE_ROWS(q4_1, Q4_1, 4, 4, 1)
MORE_ROWS(q5_0, Q5_0, 4, 4, 1)
MORE_ROWS(q5_1, Q5_1, 4, 4, 1)
MORE_ROWS(q8_0, Q8_0, 4, 4, 1)
