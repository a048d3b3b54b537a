// From the product of the query, key and value matrices to the operands of attention: rotary embedding (Su et al. 2021) of
// queries and keys, queries as half, keys and values into the blocks of the KV cache.
#include "batch.cuh"
#include "layout.cuh"

struct RotateStoreArgs {
    const float *qkv;             // [n_rows][(n_heads + 2 * n_kv_heads) * head_dim]
    uint16_t *q;                  // half, [n_rows][n_heads][head_dim]
    uint16_t *keys;               // half, [block][n_kv_heads][16 * head_dim], as key_index says
    uint16_t *values;             // likewise, as value_index says
    const float2 *rotations;      // {cos, sin}, [position][head_dim / 2]
    const BatchHeader *header;
    const uint32_t *positions;    // [n_rows]
    const uint32_t *table_of_row; // [n_rows], where a row's block table begins in `tables`
    const uint32_t *tables;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;            // a multiple of 32
    uint32_t unused;
};

namespace rope {

struct Turned {
    uint32_t low, high;
};

// The greatest half: what the cache holds stays finite, so that a weight of zero hides it whatever it is.
constexpr float HALF_MAX = 65504.0f;
DEVICE float finite(float x) { return fminf(fmaxf(x, -HALF_MAX), HALF_MAX); }

// Elements i, i + 1 (`low`) and i + head_dim / 2, i + 1 + head_dim / 2 (`high`) of a head, turned.
DEVICE Turned turn(const float *head, const float2 *rotation, uint32_t i, uint32_t half_dim) {
    float2 a = *(const float2 *)(head + i), b = *(const float2 *)(head + i + half_dim);
    float2 first = rotation[i], second = rotation[i + 1];
    float low_x = fmaf(a.x, first.x, -__fmul_rn(b.x, first.y));
    float low_y = fmaf(a.y, second.x, -__fmul_rn(b.y, second.y));
    float high_x = fmaf(b.x, first.x, __fmul_rn(a.x, first.y));
    float high_y = fmaf(b.y, second.x, __fmul_rn(a.y, second.y));
    return {pack_half(finite(low_x), finite(low_y)), pack_half(finite(high_x), finite(high_y))};
}

DEVICE void turn_queries(const RotateStoreArgs &args, const float *row, const float2 *rotation) {
    uint32_t half_dim = args.head_dim / 2, pairs = half_dim / 2;
    uint16_t *q = args.q + (size_t)blockIdx.x * args.n_heads * args.head_dim;
    for (uint32_t j = threadIdx.x; j < args.n_heads * pairs; j += blockDim.x) {
        uint32_t head = j / pairs * args.head_dim, i = j % pairs * 2;
        Turned turned = turn(row + head, rotation, i, half_dim);
        *(uint32_t *)(q + head + i) = turned.low;
        *(uint32_t *)(q + head + i + half_dim) = turned.high;
    }
}

DEVICE void turn_keys(const RotateStoreArgs &args, const float *row, const float2 *rotation, uint16_t *keys, int slot) {
    uint32_t half_dim = args.head_dim / 2, pairs = half_dim / 2;
    for (uint32_t j = threadIdx.x; j < args.n_kv_heads * pairs; j += blockDim.x) {
        uint32_t head = j / pairs, i = j % pairs * 2;
        Turned turned = turn(row + head * args.head_dim, rotation, i, half_dim);
        uint16_t *to = keys + (size_t)head * BLOCK_POSITIONS * args.head_dim;
        *(uint32_t *)(to + key_index(slot, (int)i, (int)args.head_dim)) = turned.low;
        *(uint32_t *)(to + key_index(slot, (int)(i + half_dim), (int)args.head_dim)) = turned.high;
    }
}

DEVICE void store_values(const RotateStoreArgs &args, const float *row, uint16_t *values, int slot) {
    for (uint32_t j = threadIdx.x; j < args.n_kv_heads * args.head_dim; j += blockDim.x) {
        uint32_t head = j / args.head_dim, dim = j % args.head_dim;
        uint16_t *to = values + (size_t)head * BLOCK_POSITIONS * args.head_dim;
        to[value_index(slot, (int)dim)] = float_to_half(finite(row[j]));
    }
}

}  // namespace rope

// A block a row.
KERNEL(rotate_store, RotateStoreArgs, 256, 4) {
    uint32_t row = blockIdx.x;
    if (row >= args.header->n_rows) return;
    uint32_t position = args.positions[row], q_width = args.n_heads * args.head_dim;
    uint32_t kv_width = args.n_kv_heads * args.head_dim;
    const float *x = args.qkv + (size_t)row * (q_width + 2 * kv_width);
    const float2 *rotation = args.rotations + (size_t)position * (args.head_dim / 2);
    uint32_t block = args.tables[args.table_of_row[row] + position / BLOCK_POSITIONS];
    size_t at = (size_t)block * kv_width * BLOCK_POSITIONS;
    int slot = (int)(position % BLOCK_POSITIONS);
    rope::turn_queries(args, x, rotation);
    rope::turn_keys(args, x + q_width, rotation, args.keys + at, slot);
    rope::store_values(args, x + q_width + kv_width, args.values + at, slot);
}
