// Products of quantized weights with up to 8 rows.
#include "linear.cuh"

namespace linear {

// Up to 8 rows as operand B of group `group` of unit `unit`. Rows that are not there are zeros, and cost no traffic.
DEVICE void load_x(uint32_t (&b)[4], const LinearArgs &args, int unit, int group, int lane) {
    const uint8_t *x = reinterpret_cast<const uint8_t *>(args.x) + (size_t)unit * X_BYTES;
    bool is_there = lane / 4 < args.n_rows && unit < args.matrix.n_units;
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = is_there ? word_at(x, (group * 4 + i) * CORE_BYTES + lane * 4) : 0;
}

// Up to 8 rows, quantized: a block for each tile of 16 outputs. Its warps take chunks in turn, each with STAGES - 1 stages of
// UNITS units of weights under way; at the end the sums of all chunks are added in order.
// Shared: the stages of each warp; then the chunks' sums, [n_chunks][32 lanes][4].
template <class F, int WARPS, int STAGES, int UNITS> DEVICE void few_rows(const LinearArgs &args, uint8_t *shared) {
    constexpr int STAGE_BYTES = UNITS * F::STAGED_BYTES, STAGES_OF_CHUNK = CHUNK / UNITS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_units = args.matrix.n_units;
    const int n_chunks = (n_units + CHUNK - 1) / CHUNK;
    const int n_stages = (n_chunks - warp + WARPS - 1) / WARPS * STAGES_OF_CHUNK;
    uint8_t *const ring = shared + warp * STAGES * STAGE_BYTES;
    float4 *const sums = reinterpret_cast<float4 *>(shared + WARPS * STAGES * STAGE_BYTES);
    auto first_unit = [&](int stage) {
        return (stage / STAGES_OF_CHUNK * WARPS + warp) * CHUNK + stage % STAGES_OF_CHUNK * UNITS;
    };
    auto load = [&](int stage) {
        if (stage >= n_stages) return;
        uint8_t *to = ring + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, to += F::STAGED_BYTES) {
            int unit = first_unit(stage) + i;
            if (unit >= n_units) break;
            Unit from = F::unit_of(args.matrix, blockIdx.x, unit);
#pragma unroll
            for (int offset = 0; offset < F::STAGED_BYTES; offset += 512) {
                int at = offset + lane * 16;
                if (at < F::STAGED_BYTES) copy_async(to + at, F::source(from, at), true);
            }
        }
    };
    auto load_stage_x = [&](uint32_t (&b)[UNITS][2][4], int stage) {
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
#pragma unroll
            for (int group = 0; group < 2; group++) load_x(b[i][group], args, first_unit(stage) + i, group, lane);
        }
    };
    // Weights do not depend on the kernels before: they are under way while those end.
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        load(stage);
        copy_commit();
    }
    grid_wait();
    float sum[1][1][4] = {};
    float(&of_chunk)[4] = sum[0][0];
    uint32_t b[UNITS][2][4], next[UNITS][2][4];
    load_stage_x(b, 0);
    for (int stage = 0; stage < n_stages; stage++) {
        load_stage_x(next, stage + 1);
        copy_wait<STAGES - 2>();
        sync_warp();
        load(stage + STAGES - 1);
        copy_commit();
        const uint8_t *staged = ring + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < UNITS; i++, staged += F::STAGED_BYTES) {
            if (first_unit(stage) + i >= n_units) break;
#pragma unroll
            for (int group = 0; group < 2; group++) {
                const uint32_t(&one)[1][4] = reinterpret_cast<const uint32_t(&)[1][4]>(b[i][group]);
                multiply_group<F, 1, 1>(sum, staged, 0, one, group, lane);
            }
        }
#pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) b[i / 2][i % 2][j] = next[i / 2][i % 2][j];
        }
        if (stage % STAGES_OF_CHUNK == STAGES_OF_CHUNK - 1) {
            int chunk = stage / STAGES_OF_CHUNK * WARPS + warp;
            sums[chunk * 32 + lane] = make_float4(of_chunk[0], of_chunk[1], of_chunk[2], of_chunk[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) of_chunk[i] = 0.0f;
        }
    }
    sync_block();
    if (warp > 0) return;
    float total[4] = {};
#pragma unroll 8
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        float4 next_sum = sums[chunk * 32 + lane];
        total[0] = __fadd_rn(total[0], next_sum.x), total[1] = __fadd_rn(total[1], next_sum.y);
        total[2] = __fadd_rn(total[2], next_sum.z), total[3] = __fadd_rn(total[3], next_sum.w);
    }
    store_tile(args, total, blockIdx.x, 0, lane);
}

}  // namespace linear

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
#define FEW_ROWS(name, F, UNITS)                          \
    KERNEL_AHEAD(linear_few_##name, LinearArgs, 256, 3) { \
        SHARED(uint8_t, shared);                          \
        grid_release();                                   \
        linear::few_rows<F, 8, 4, UNITS>(args, shared);   \
    }

FEW_ROWS(q4_0, Q4_0, 2)
FEW_ROWS(q4_1, Q4_1, 2)
FEW_ROWS(q5_0, Q5_0, 2)
FEW_ROWS(q5_1, Q5_1, 2)
FEW_ROWS(q8_0, Q8_0, 1)
