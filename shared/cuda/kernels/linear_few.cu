// Products with up to 8 rows of plain numbers: what decoding a few sequences waits for.
#include "linear.cuh"

namespace linear {

// Activations of the rows that are there, up to 8, in one unit: of each core matrix the first n_rows * 16 bytes. They
// pass through shared memory, not straight to registers: in a chain a product must not wait for a load from far away that
// went out with its operands.
struct FewX {
    const uint8_t *from;  // of the lane
    int n_rows;
    int row_bytes;        // of a group
    bool is_there;        // the lane copies a row

    DEVICE FewX(const LinearArgs &args, int lane)
        : from(reinterpret_cast<const uint8_t *>(args.x) + lane * 16), n_rows(args.n_rows), row_bytes(n_rows * 64),
          is_there(lane % 8 < args.n_rows) {}

    // Bytes of a unit.
    DEVICE int bytes() const { return 2 * row_bytes; }
    DEVICE void copy(uint8_t *unit_x, int unit, int group, int lane) const {
        const uint8_t *at = from + (size_t)unit * X_BYTES + group * 512;
        if (is_there) copy_async(unit_x + group * row_bytes + (lane / 8 * n_rows + lane % 8) * 16, at, true);
    }
    // The rows that are not there repeat the last: their products are not stored.
    DEVICE uint4 load(const uint8_t *unit_x, int group, int lane) const {
        const uint8_t *at = unit_x + group * row_bytes + min(lane / 4, n_rows - 1) * 16 + lane % 4 * 4;
        int core = n_rows * 16;
        return make_uint4(word_at(at, 0), word_at(at, core), word_at(at, 2 * core), word_at(at, 3 * core));
    }
};

// Up to 8 rows, plain numbers: a warp for each tile of 16 outputs. It is one chain of products, whose latency hides the
// copies that are issued between them: RING units of weights and activations are under way.
template <int RING> DEVICE void few_rows_plain(const LinearArgs &args, uint8_t *shared) {
    const int lane = threadIdx.x, n_units = args.matrix.n_units;
    const FewX x(args, lane);
    const uint8_t *const weights = args.matrix.tiles + blockIdx.x * args.matrix.tile_bytes + lane * 16;
    auto weights_at = [&](int unit) { return shared + unit % RING * Bf16::CODE_BYTES; };
    auto x_at = [&](int unit) { return shared + RING * Bf16::CODE_BYTES + unit % RING * x.bytes(); };
    auto copy_weights = [&](int unit, int s) {
        const uint8_t *from = weights + (size_t)unit * Bf16::CODE_BYTES + s * 512;
        if (unit < n_units) copy_async(weights_at(unit) + s * 512 + lane * 16, from, true);
    };
    auto copy_x = [&](int unit, int group) {
        if (unit < n_units) x.copy(x_at(unit), unit, group, lane);
    };
    // Weights do not depend on the kernels before: they are under way while those end.
#pragma unroll
    for (int unit = 0; unit < RING - 1; unit++) {
#pragma unroll
        for (int s = 0; s < 4; s++) copy_weights(unit, s);
    }
    grid_wait();
#pragma unroll
    for (int unit = 0; unit < RING - 1; unit++) {
        copy_x(unit, 0), copy_x(unit, 1);
        copy_commit();
    }
    float total[4] = {};
#pragma unroll 4
    for (int unit = 0; unit < n_units; unit++) {
        copy_wait<RING - 2>();
        sync_warp();
        const uint4 low = x.load(x_at(unit), 0, lane), high = x.load(x_at(unit), 1, lane);
        uint32_t a[4][4];
#pragma unroll
        for (int s = 0; s < 4; s++) Bf16::operand_a(a[s], Bf16::staged(weights_at(unit)), lane, s);
        const int next = unit + RING - 1;
        mma_bf16(total, a[0], low.x, low.y);
        copy_weights(next, 0), copy_weights(next, 1);
        mma_bf16(total, a[1], low.z, low.w);
        copy_weights(next, 2), copy_weights(next, 3);
        mma_bf16(total, a[2], high.x, high.y);
        copy_x(next, 0), copy_x(next, 1);
        mma_bf16(total, a[3], high.z, high.w);
        copy_commit();
    }
    store_tile(args, total, blockIdx.x, 0, lane);
}

}  // namespace linear

// Shapes of the kernels; src/kernels/linear.rs computes grids and shared memory from the same numbers.
KERNEL_AHEAD(linear_few_bf16, LinearArgs, 32, 6) {
    SHARED(uint8_t, shared);
    grid_release();
    linear::few_rows_plain<16>(args, shared);
}
