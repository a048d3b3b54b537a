// The residual stream grows by a partial result, and its norm (RMSNorm, Zhang and Sennrich 2019) becomes the input of
// the next matrix. A row's bits follow from the row alone.
#include "batch.cuh"
#include "layout.cuh"

struct AddNormArgs {
    float *hidden;               // [n_rows][n_embd]
    const float *delta;          // [n_rows][n_embd], added to `hidden`; or null
    const float *weight;         // [n_embd]
    uint16_t *normed;            // bf16 as operand B, [n_rows or n_output_rows][k_padded]
    const BatchHeader *header;
    const uint32_t *output_rows; // rows to norm, without a change of `hidden`; null for all rows
    uint32_t n_embd;             // a multiple of 4
    uint32_t k_padded;
    float epsilon;
    uint32_t unused;
};

namespace rms {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

// Pieces of four columns of a row that the thread has; zeros behind the row's end.
template <int N> struct Pieces {
    float4 of[N];

    DEVICE void load(const float *row, uint32_t n_columns) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t k = 4 * (i * THREADS + threadIdx.x);
            of[i] = k < n_columns ? *(const float4 *)(row + k) : make_float4(0, 0, 0, 0);
        }
    }
};

DEVICE float4 add(float4 x, float4 d) { return make_float4(x.x + d.x, x.y + d.y, x.z + d.z, x.w + d.w); }

DEVICE float add_squares(float sum, float4 x) {
    return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}

// Sum over the block, in a fixed order, for every thread.
DEVICE float block_sum(float sum) {
    SHARED(float, of_warp);
    for (int mask = 16; mask > 0; mask /= 2) sum = __fadd_rn(sum, shuffle_xor(sum, mask));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    sync_block();
    float4 four[WARPS / 4];
#pragma unroll
    for (int i = 0; i < WARPS / 4; i++) {
        four[i] = *(const float4 *)(of_warp + 4 * i);
        four[i].x = __fadd_rn(__fadd_rn(four[i].x, four[i].y), __fadd_rn(four[i].z, four[i].w));
    }
    return __fadd_rn(__fadd_rn(four[0].x, four[1].x), __fadd_rn(four[2].x, four[3].x));
}

DEVICE void store(const AddNormArgs &args, uint32_t slot, uint32_t k, float4 x) {
    size_t at = operand_b_index((int)slot, (int)k, (int)args.k_padded);
    *(uint2 *)(args.normed + at) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}

// A block a row, of which a thread has N pieces; everything is read once.
template <int N> DEVICE void add_norm(const AddNormArgs &args) {
    const uint32_t slot = blockIdx.x;
    if (slot >= (args.output_rows ? args.header->n_output_rows : args.header->n_rows)) return grid_wait();
    const size_t row = (size_t)(args.output_rows ? args.output_rows[slot] : slot) * args.n_embd;
    // Weights come while the kernels before end.
    Pieces<N> weight, x;
    weight.load(args.weight, args.n_embd);
    grid_wait();
    x.load(args.hidden + row, args.n_embd);
    if (args.delta) {
        Pieces<N> delta;
        delta.load(args.delta + row, args.n_embd);
#pragma unroll
        for (int i = 0; i < N; i++) x.of[i] = add(x.of[i], delta.of[i]);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum = add_squares(sum, x.of[i]);
    const float mean = __fdiv_rn(block_sum(sum), (float)args.n_embd);
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.epsilon)));
    const bool is_changed = args.delta && !args.output_rows;
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t k = 4 * (i * THREADS + threadIdx.x);
        if (k >= args.k_padded) break;
        // Behind the last column both are zero.
        float4 y = x.of[i], w = weight.of[i];
        store(args, slot, k, make_float4(y.x * scale * w.x, y.y * scale * w.y, y.z * scale * w.z, y.w * scale * w.w));
        if (is_changed && k < args.n_embd) *(float4 *)(args.hidden + row + k) = y;
    }
}

}  // namespace rms

// For rows of up to 4,096 and 16,384 columns: many registers would leave blocks that wait for others no room. Dynamic shared
// memory: a float for each warp.
KERNEL_AHEAD(add_norm, AddNormArgs, 512, 1) {
    grid_release();
    rms::add_norm<2>(args);
}
KERNEL_AHEAD(add_norm_wide, AddNormArgs, 512, 1) {
    grid_release();
    rms::add_norm<8>(args);
}
