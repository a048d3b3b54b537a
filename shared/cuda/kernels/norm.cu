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

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Four columns of the row: of `hidden`, with `delta`.
DEVICE float4 columns(const AddNormArgs &args, size_t at) {
    float4 x = *(const float4 *)(args.hidden + at);
    if (!args.delta) return x;
    float4 d = *(const float4 *)(args.delta + at);
    return make_float4(x.x + d.x, x.y + d.y, x.z + d.z, x.w + d.w);
}

DEVICE float add_squares(float sum, float4 x) {
    return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}

// Sum over the block, in a fixed order, for every thread.
DEVICE float block_sum(float sum) {
    SHARED(float, of_warp);
    for (int mask = 16; mask > 0; mask /= 2) sum = __fadd_rn(sum, shuffle_xor(sum, mask));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    sync_block();
    float total = of_warp[0];
    for (int warp = 1; warp < WARPS; warp++) total = __fadd_rn(total, of_warp[warp]);
    return total;
}

DEVICE void store(const AddNormArgs &args, uint32_t slot, uint32_t k, float4 x) {
    size_t at = operand_b_index((int)slot, (int)k, (int)args.k_padded);
    *(uint2 *)(args.normed + at) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}

}  // namespace rms

// A block a row. Dynamic shared memory: a float for each warp.
KERNEL(add_norm, AddNormArgs, 256, 4) {
    uint32_t slot = blockIdx.x;
    if (slot >= (args.output_rows ? args.header->n_output_rows : args.header->n_rows)) return;
    size_t row = (size_t)(args.output_rows ? args.output_rows[slot] : slot) * args.n_embd;
    bool is_changed = args.delta && !args.output_rows;
    float sum = 0;
    for (uint32_t k = 4 * threadIdx.x; k < args.n_embd; k += 4 * rms::THREADS) {
        float4 x = rms::columns(args, row + k);
        if (is_changed) *(float4 *)(args.hidden + row + k) = x;
        sum = rms::add_squares(sum, x);
    }
    float mean = __fdiv_rn(rms::block_sum(sum), (float)args.n_embd);
    float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.epsilon)));
    for (uint32_t k = 4 * threadIdx.x; k < args.k_padded; k += 4 * rms::THREADS) {
        float4 y = make_float4(0, 0, 0, 0);
        if (k < args.n_embd) {
            // What this thread has written, or the same sum again.
            float4 x = is_changed ? *(const float4 *)(args.hidden + row + k) : rms::columns(args, row + k);
            float4 w = *(const float4 *)(args.weight + k);
            y = make_float4(x.x * scale * w.x, x.y * scale * w.y, x.z * scale * w.z, x.w * scale * w.w);
        }
        rms::store(args, slot, k, y);
    }
}
