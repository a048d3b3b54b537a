// Products with up to 8 rows of plain numbers: what decoding a few sequences waits for.
#include "linear.cuh"

namespace linear {

// Units of a stage, and the core matrices of 8 rows of activations in it: one for each lane.
constexpr int FEW_UNITS = 4;
constexpr int FEW_CORES = FEW_UNITS * UNIT_K / 8;
constexpr int FEW_WEIGHT_BYTES = FEW_UNITS * Bf16::CODE_BYTES;

// Of each core matrix of activations there are ROWS rows in shared memory: 1, 2, 4 or 8, at least those that the batch has. The
// others have any values: what becomes of them is not stored.
template <int ROWS> struct Few {
    static constexpr int CORE = ROWS * 16, X_STAGE_BYTES = FEW_CORES * CORE;
    // A stage and its two barriers.
    static constexpr int STAGE_BYTES = FEW_WEIGHT_BYTES + X_STAGE_BYTES + 16;

    const LinearArgs &args;
    int n_units, n_stages, n_slots;
    uint8_t *weights, *x;    // of the slots for stages, as many as fit
    uint64_t *full, *empty;  // of each slot

    DEVICE Few(const LinearArgs &args, uint8_t *shared)
        : args(args), n_units(args.matrix.n_units), n_stages((n_units + FEW_UNITS - 1) / FEW_UNITS),
          n_slots(shared_size() / STAGE_BYTES), weights(shared), x(weights + n_slots * FEW_WEIGHT_BYTES),
          full(reinterpret_cast<uint64_t *>(x + n_slots * X_STAGE_BYTES)), empty(full + n_slots) {}

    // Goes to the next slot, and changes the parity with every turn.
    DEVICE void advance(int &slot, int &parity) const {
        if (++slot == n_slots) slot = 0, parity ^= 1;
    }

    DEVICE void copy_weights(int stage, int slot, int lane) const {
        const uint8_t *from = args.matrix.tiles + blockIdx.x * args.matrix.tile_bytes + (size_t)stage * FEW_WEIGHT_BYTES;
        int n_bytes = min(FEW_UNITS, n_units - stage * FEW_UNITS) * Bf16::CODE_BYTES;
        copy_range(weights + slot * FEW_WEIGHT_BYTES, from, n_bytes, full + slot, lane);
    }
    DEVICE void copy_x(int stage, int slot, int lane) const {
        const uint8_t *from = reinterpret_cast<const uint8_t *>(args.x) + (size_t)stage * FEW_UNITS * X_BYTES;
        uint8_t *to = x + slot * X_STAGE_BYTES;
        int n_cores = min(FEW_UNITS, n_units - stage * FEW_UNITS) * (UNIT_K / 8);
        if constexpr (ROWS == 8) {
            copy_range(to, from, n_cores * CORE_BYTES, full + slot, lane);
        } else {
#pragma unroll
            for (int piece = lane; piece < FEW_CORES * ROWS; piece += 32) {
                int core = piece / ROWS, row = piece % ROWS;
                if (core < n_cores) copy_async(to + piece * 16, from + core * CORE_BYTES + row * 16, true);
            }
        }
        arrive_with_copies(full + slot);
    }
    // Weights do not depend on the kernels before: they are under way while those end.
    DEVICE void copy(int lane) const {
        const int n_first = min(n_slots, n_stages);
        for (int stage = 0; stage < n_first; stage++) copy_weights(stage, stage, lane);
        grid_wait();
        for (int stage = 0; stage < n_first; stage++) copy_x(stage, stage, lane);
        int slot = 0, parity = 0;
        for (int stage = n_slots; stage < n_stages; stage++) {
            await(empty + slot, parity);
            copy_weights(stage, slot, lane);
            copy_x(stage, slot, lane);
            advance(slot, parity);
        }
    }

    // Operands of a unit.
    struct Unit {
        uint32_t a[4][4];
        uint32_t b[2][4];

        DEVICE void load(const uint8_t *weights, const uint8_t *x, int lane) {
#pragma unroll
            for (int s = 0; s < 4; s++) Bf16::operand_a(a[s], Bf16::staged(weights), lane, s);
#pragma unroll
            for (int pair = 0; pair < 2; pair++) load_matrices(b[pair], x + pair * 4 * CORE, CORE, 2 * CORE, lane, ROWS - 1);
        }
        DEVICE void multiply(float (&total)[4], int s) const {
            mma_bf16(total, a[s], b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]);
        }
    };

    // One chain of products; operands of the next unit come from shared memory in the latency of this one's.
    DEVICE void multiply(float (&total)[4], int lane) const {
        Unit operands[2];
        await(full, 0);
        operands[0].load(weights, x, lane);
        int slot = 0, parity = 0;
        for (int stage = 0; stage < n_stages; stage++) {
            const int here = slot, count = n_units - stage * FEW_UNITS;
            const uint8_t *weights_here = weights + here * FEW_WEIGHT_BYTES, *x_here = x + here * X_STAGE_BYTES;
            advance(slot, parity);
#pragma unroll
            for (int unit = 0; unit < FEW_UNITS; unit++) {
                if (unit >= count) break;
                const Unit &now = operands[unit % 2];
                Unit &then = operands[(unit + 1) % 2];
                now.multiply(total, 0);
                if (unit < FEW_UNITS - 1) {
                    int next = unit + 1;
                    then.load(weights_here + next * Bf16::CODE_BYTES, x_here + next * (UNIT_K / 8) * CORE, lane);
                } else if (stage + 1 < n_stages) {
                    await(full + slot, parity);
                    then.load(weights + slot * FEW_WEIGHT_BYTES, x + slot * X_STAGE_BYTES, lane);
                }
#pragma unroll
                for (int s = 1; s < 4; s++) now.multiply(total, s);
            }
            // Products have begun with all operands of the stage: its slot may be filled.
            if (lane == 0) arrive(empty + here);
        }
    }
};

// A tile of 16 outputs; one warp multiplies, another copies.
template <int ROWS> DEVICE void few_rows_plain(const LinearArgs &args, uint8_t *shared) {
    const Few<ROWS> few(args, shared);
    const int lane = threadIdx.x % 32;
    const bool is_copying = threadIdx.x >= 32;
    if (is_copying) {
        set_barriers(few.full, few.n_slots, 32, lane);
        set_barriers(few.empty, few.n_slots, 1, lane);
    }
    sync_block();
    if (is_copying) return few.copy(lane);
    const TileBias bias(args, blockIdx.x, lane);
    float total[4] = {};
    grid_wait();
    few.multiply(total, lane);
    store_tile(args, total, bias, blockIdx.x, 0, lane);
}

}  // namespace linear

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
KERNEL_AHEAD(linear_few_bf16, LinearArgs, 64, 1) {
    SHARED(uint8_t, shared);
    grid_release();
    if (args.n_rows > 4) return linear::few_rows_plain<8>(args, shared);
    if (args.n_rows > 2) return linear::few_rows_plain<4>(args, shared);
    if (args.n_rows > 1) return linear::few_rows_plain<2>(args, shared);
    linear::few_rows_plain<1>(args, shared);
}
