// Products of plain numbers with many rows on Hopper: a thread copies, two warpgroups multiply by wgmma. Its sums are the same
// chain of 16 columns as in the other kernels, and the instruction rounds as theirs does (tests/device/mma_bits.cu).
#include "hopper.cuh"
#include "linear.cuh"

namespace linear {

// Blocks stay: each takes tile after tile of 128 outputs by N rows, and the copies for the next one go on while results are
// written.
constexpr int WIDE_GROUPS = 2, WIDE_THREADS = 128 * (WIDE_GROUPS + 1);
constexpr int WIDE_M_TILES = 4 * WIDE_GROUPS;
constexpr int WIDE_WEIGHT_BYTES = WIDE_M_TILES * Bf16::CODE_BYTES;

// Arguments of the kernels; the maps' boxes are a unit of a block's tiles.
struct WideArgs {
    hopper::TileMap weights, x;
    LinearArgs linear;
    uint64_t unused[2];
};

template <int N> struct Wide {
    static constexpr int N_TILES = N / 8;
    static constexpr int STAGE_BYTES = WIDE_WEIGHT_BYTES + N_TILES * X_BYTES;
    static constexpr int STAGES = 200 * 1024 / STAGE_BYTES;

    const WideArgs &wide;
    const LinearArgs &args;
    uint8_t *stages;
    hopper::Barrier *full, *empty;
    int n_blocks_n, n_blocks;

    DEVICE Wide(const WideArgs &wide, uint8_t *shared)
        : wide(wide), args(wide.linear), stages(shared),
          full(reinterpret_cast<hopper::Barrier *>(shared + STAGES * STAGE_BYTES)), empty(full + STAGES),
          n_blocks_n((args.n_rows + N - 1) / N),
          n_blocks(n_blocks_n * ((args.matrix.n_tiles + WIDE_M_TILES - 1) / WIDE_M_TILES)) {}

    DEVICE int first_m(int block) const { return block / n_blocks_n * WIDE_M_TILES; }
    DEVICE int first_n(int block) const { return block % n_blocks_n * N_TILES; }
    DEVICE uint8_t *weights(int stage) const { return stages + stage * STAGE_BYTES; }
    DEVICE uint8_t *x(int stage) const { return weights(stage) + WIDE_WEIGHT_BYTES; }

    DEVICE void copy_weights(int block, int unit, int stage) const {
        hopper::arrive_expecting(&full[stage], STAGE_BYTES);
        hopper::copy_tiles(weights(stage), wide.weights, unit * (Bf16::CODE_BYTES / CORE_BYTES), first_m(block), &full[stage]);
    }
    DEVICE void copy_x(int block, int unit, int stage) const {
        hopper::copy_tiles(x(stage), wide.x, unit * (X_BYTES / CORE_BYTES), first_n(block), &full[stage]);
    }

    // One thread copies.
    DEVICE void copy() const {
        const int n_units = args.matrix.n_units, n_ahead = min(STAGES, n_units);
        // Weights do not depend on the kernels before: they are under way while those end.
        for (int unit = 0; unit < n_ahead; unit++) copy_weights(blockIdx.x, unit, unit);
        grid_wait();
        int stage = 0;
        uint32_t parity = 1;
        for (int block = blockIdx.x; block < n_blocks; block += gridDim.x) {
            for (int unit = 0; unit < n_units; unit++) {
                if (block != (int)blockIdx.x || unit >= n_ahead) {
                    // Of a barrier nobody has arrived at, the phase before counts as ended.
                    hopper::await(&empty[stage], parity);
                    copy_weights(block, unit, stage);
                }
                copy_x(block, unit, stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    }

    // Warpgroup `group` of those that multiply.
    DEVICE void multiply(int group, int warp, int lane) const {
        grid_wait();
        int stage = 0;
        uint32_t parity = 0;
        for (int block = blockIdx.x; block < n_blocks; block += gridDim.x) {
            float sums[N_TILES][4];
#pragma unroll
            for (int i = 0; i < N_TILES * 4; i++) sums[i / 4][i % 4] = 0.0f;
            int before = 0;
            for (int unit = 0; unit < args.matrix.n_units; unit++) {
                hopper::await(&full[stage], parity);
                hopper::Operand a = hopper::operand(weights(stage) + group * 4 * Bf16::CODE_BYTES, Bf16::CODE_BYTES / 2);
                hopper::Operand b = hopper::operand(x(stage), X_BYTES);
                hopper::begin_products();
#pragma unroll
                for (int s = 0; s < UNIT_K / 16; s++) {
                    hopper::multiply(sums, hopper::next_step(a, s), hopper::next_step(b, s));
                }
                hopper::commit_products();
                // The unit before has been read.
                hopper::products_wait<1>();
                if (unit > 0 && lane == 0) hopper::arrive(&empty[before]);
                before = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            hopper::products_wait<0>();
            if (lane == 0) hopper::arrive(&empty[before]);
            store(sums, first_m(block) + group * 4 + warp, first_n(block), lane);
        }
    }

    DEVICE void store(const float (&sums)[N_TILES][4], int tile, int first_n, int lane) const {
        if (tile >= args.matrix.n_tiles) return;
        if (args.gated) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                if ((first_n + n) * 8 < args.n_rows) store_gated_tile(args, sums[n], tile, first_n + n, lane);
            }
            return;
        }
        // As store_tile, with what all rows share read once.
        float bias[2];
#pragma unroll
        for (int high = 0; high < 2; high++) {
            int output = tile * TILE_ROWS + lane / 4 + 8 * high;
            bias[high] = args.bias && output < args.n_outputs ? args.bias[output] : 0.0f;
        }
        int output = tile * TILE_ROWS + lane / 4, row = first_n * 8 + lane % 4 * 2;
        float *out = args.out + (size_t)row * args.out_stride + output;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (row + 8 * n + i >= args.n_rows) continue;
                float *at = out + (size_t)(8 * n + i) * args.out_stride;
                if (output < args.n_outputs) at[0] = __fadd_rn(sums[n][i], bias[0]);
                if (output + 8 < args.n_outputs) at[8] = __fadd_rn(sums[n][2 + i], bias[1]);
            }
        }
    }

    DEVICE void run() const {
        const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                hopper::set_barrier(&full[i], 1);
                hopper::set_barrier(&empty[i], 4 * WIDE_GROUPS);
            }
            hopper::barriers_are_set();
        }
        sync_block();
        if (group == 0) {
            hopper::fewer_registers<40>();
            threadIdx.x == 0 ? copy() : grid_wait();
        } else {
            hopper::more_registers<232>();
            multiply(group - 1, warp, lane);
        }
    }
};

}  // namespace linear

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
#define WIDE(name, N)                                                \
    KERNEL_AHEAD(name, linear::WideArgs, linear::WIDE_THREADS, 1) {        \
        SHARED(uint8_t, shared);                                     \
        grid_release();                                              \
        linear::Wide<N>(args, shared).run();                         \
    }

WIDE(linear_wide_128_bf16, 128)
WIDE(linear_wide_192_bf16, 192)
WIDE(linear_wide_256_bf16, 256)
