// From the product of the query, key and value matrices to the operands of attention: rotary embedding (Su et al. 2021) of
// queries and keys, queries as half, keys and values into the blocks of the KV cache.
#include "batch.cuh"
#include "layout.cuh"
#include "turn.cuh"

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
    uint32_t head_dim;            // a multiple of 32, at most 128
    uint32_t unused;
};

namespace rope {

constexpr int WARPS = 4;

}  // namespace rope

// Grid: (rows, heads of queries, keys and values by fours), a warp for each head; a lane has four of its elements at most.
KERNEL_AHEAD(rotate_store, RotateStoreArgs, 128, 4) {
    grid_release();
    const uint32_t row = blockIdx.x, head = blockIdx.y * rope::WARPS + threadIdx.x / 32, n_all = args.n_heads + 2 * args.n_kv_heads;
    const uint32_t half_dim = args.head_dim / 2, i = threadIdx.x % 32 * 2;
    if (row >= args.header->n_rows || head >= n_all || i >= half_dim) return grid_wait();
    // What does not depend on the kernels before.
    const uint32_t position = args.positions[row], slot = position % BLOCK_POSITIONS;
    const uint32_t block = args.tables[args.table_of_row[row] + position / BLOCK_POSITIONS];
    const float4 rotation = *(const float4 *)(args.rotations + (size_t)position * half_dim + i);
    const float *from = args.qkv + ((size_t)row * n_all + head) * args.head_dim + i;
    grid_wait();
    const float2 a = *(const float2 *)from, b = *(const float2 *)(from + half_dim);
    if (head < args.n_heads) {
        rope::Turned turned = rope::turn(a, b, rotation);
        uint16_t *q = args.q + ((size_t)row * args.n_heads + head) * args.head_dim + i;
        *(uint32_t *)q = turned.low;
        *(uint32_t *)(q + half_dim) = turned.high;
        return;
    }
    const bool is_key = head < args.n_heads + args.n_kv_heads;
    const uint32_t kv_head = head - args.n_heads - (is_key ? 0 : args.n_kv_heads);
    const size_t at = ((size_t)block * args.n_kv_heads + kv_head) * BLOCK_POSITIONS * args.head_dim;
    if (is_key) {
        rope::store_key(args.keys + at, (int)slot, (int)i, (int)half_dim, rope::turn(a, b, rotation));
    } else {
        rope::store_value(args.values + at, (int)slot, (int)i, (int)half_dim, a, b);
    }
}
