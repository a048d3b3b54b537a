// Products of K-quants with up to 8 rows: what decoding a few sequences waits for.
#include "linear_super.cuh"

namespace linear {

// A block for TILES tiles of 16 outputs. Its warps take superblocks in turn; while one is multiplied, the weights of a warp's
// next one are on their way to registers, and its activations to shared memory.
// Shared: two superblocks of x for each warp, of each core matrix the rows that are there; then all sums of superblocks,
// [n_supers][TILES][8 g][(n_rows + 1) / 2] float4.
template <class F, int TILES, int WARPS> struct FewSuper {
    const LinearArgs &args;
    const int warp, lane, n_supers, n_rows;
    const uint8_t *records[TILES];
    uint8_t *ring;
    float4 *sums;
    // Where a lane has columns of x that are there, the place of its sums; else -1.
    int kept_at, n_kept;

    typename F::Codes codes[TILES][SUPER_UNITS];
    typename F::Scales next[TILES];

    DEVICE FewSuper(const LinearArgs &args, uint8_t *shared)
        : args(args), warp(threadIdx.x / 32), lane(threadIdx.x % 32), n_supers(args.matrix.n_supers), n_rows(args.n_rows),
          ring(shared + warp * 2 * x_bytes()), sums(reinterpret_cast<float4 *>(shared + WARPS * 2 * x_bytes())) {
        int n_columns = (n_rows + 1) / 2;
        kept_at = lane % 4 < n_columns ? lane / 4 * n_columns + lane % 4 : -1;
        n_kept = 8 * n_columns;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            // Tiles beyond the last are not stored: any will do.
            int tile = min((int)blockIdx.x * TILES + m, args.matrix.n_tiles - 1);
            records[m] = args.matrix.tiles + tile * args.matrix.tile_bytes;
        }
    }

    // Of a superblock.
    DEVICE int x_bytes() const { return n_rows * 512; }
    DEVICE const uint8_t *record(int m, int super) const { return records[m] + super * F::RECORD_BYTES; }

    DEVICE void copy_x(int super, int parity) const {
        const uint8_t *from = reinterpret_cast<const uint8_t *>(args.x) + lane * 16;
        uint8_t *to = ring + parity * x_bytes() + (lane / 8 * n_rows + lane % 8) * 16;
        if (super < n_supers && lane % 8 < n_rows) {
#pragma unroll
            for (int group = 0; group < 8; group++) {
                int at = group_of_x(args.matrix, super, group);
                copy_async(to + group * n_rows * 64, from + at * 4 * CORE_BYTES, true);
            }
        }
        copy_commit();
    }
    // In the place of rows that are not there, anything is read: their products are not stored.
    DEVICE void load_x(uint32_t (&b)[4], int parity, int group) const {
        load_matrices(b, ring + parity * x_bytes() + group * n_rows * 64, n_rows * 16, n_rows * 32, lane);
    }

    DEVICE void load_first() {
        if (warp >= n_supers) return;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
            for (int unit = 0; unit < SUPER_UNITS; unit++) codes[m][unit].load(record(m, warp), unit, lane, ReadOnce());
            next[m].load(record(m, warp), lane, ReadOnce());
        }
    }

    DEVICE void multiply(int super, int parity) {
        const bool is_more = super + WARPS < n_supers;
        typename F::Scales scales[TILES];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            scales[m] = next[m];
            if (is_more) next[m].load(record(m, super + WARPS), lane, ReadOnce());
        }
        float part[TILES][4] = {};
        SumsOfX<F::PER_HALF> of_x;
#pragma unroll
        for (int unit = 0; unit < SUPER_UNITS; unit++) {
            uint32_t b[2][4];
            load_x(b[0], parity, unit * 2);
            load_x(b[1], parity, unit * 2 + 1);
            if constexpr (F::MIN) {
#pragma unroll
                for (int s = 0; s < 4; s++) of_x.add(unit * 4 + s, b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1], lane);
            }
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                typename F::Factors factors;
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t a[4];
                    if (s % F::STEPS_OF_FACTORS == 0) factors = F::factors(scales[m], unit, s);
                    F::operand_a(a, codes[m][unit], factors, s);
                    mma_bf16(part[m], a, b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]);
                }
                if (is_more) codes[m][unit].load(record(m, super + WARPS), unit, lane, ReadOnce());
            }
        }
        uint32_t sums_of_x[SumsOfX<F::PER_HALF>::WORDS];
        if constexpr (F::MIN) of_x.operand_b(sums_of_x);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float q[4] = {}, scale[2] = {scales[m].scale(0), scales[m].scale(1)}, minimum[2] = {};
            if constexpr (F::MIN) {
                uint32_t a[4];
                F::minimums_a(a, scales[m]);
                multiply_minimums<F>(q, a, sums_of_x);
                minimum[0] = scales[m].minimum(0), minimum[1] = scales[m].minimum(1);
            }
            finish_part<F>(part[m], q, scale, minimum);
            float4 sum = make_float4(part[m][0], part[m][1], part[m][2], part[m][3]);
            if (kept_at >= 0) sums[(super * TILES + m) * n_kept + kept_at] = sum;
        }
    }

    // The sums of tile `m`, in their order.
    DEVICE void add_up(float (&total)[4], int m) const {
        const int quarter = quarter_of(n_supers);
        for (int first = 0; first < n_supers; first += quarter) {
            float of_quarter[4] = {};
            const int end = min(first + quarter, n_supers);
#pragma unroll 4
            for (int super = first; super < end; super++) {
                float4 sum = sums[(super * TILES + m) * n_kept + kept_at];
                of_quarter[0] = __fadd_rn(of_quarter[0], sum.x), of_quarter[1] = __fadd_rn(of_quarter[1], sum.y);
                of_quarter[2] = __fadd_rn(of_quarter[2], sum.z), of_quarter[3] = __fadd_rn(of_quarter[3], sum.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) total[i] = first == 0 ? of_quarter[i] : __fadd_rn(total[i], of_quarter[i]);
        }
    }

    DEVICE void run() {
        // Weights do not depend on the kernels before: they are under way while those end.
        load_first();
        grid_wait();
        copy_x(warp, 0);
        int parity = 0;
        for (int super = warp; super < n_supers; super += WARPS, parity ^= 1) {
            copy_x(super + WARPS, parity ^ 1);
            copy_wait<1>();
            sync_warp();
            multiply(super, parity);
        }
        sync_block();
        if (warp >= TILES || kept_at < 0) return;
        float total[4] = {};
        add_up(total, warp);
        int tile = blockIdx.x * TILES + warp;
        if (tile < args.matrix.n_tiles) store_tile(args, total, tile, 0, lane);
    }
};

}  // namespace linear

// Shapes of the kernels; src/kernels/linear_super.rs computes grids and shared memory from the same numbers.
#define FEW_SUPER(name, F)                                      \
    KERNEL_AHEAD(linear_few_##name, LinearArgs, 256, 2) {       \
        SHARED(uint8_t, shared);                                \
        grid_release();                                         \
        linear::FewSuper<F, 2, 8>(args, shared).run();          \
    }

FEW_SUPER(q2_k, Q2_K)
FEW_SUPER(q3_k, Q3_K)
FEW_SUPER(q4_k, Q4_K)
FEW_SUPER(q5_k, Q5_K)
FEW_SUPER(q6_k, Q6_K)
