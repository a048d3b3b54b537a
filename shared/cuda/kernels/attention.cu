// Attention over the paged KV cache: for few rows, one block a split and then a merge; for many rows, one block for all
// splits. Both give the same bits; whoever launches chooses.
#include "attention.cuh"

namespace attention {

// Chunks under way at once, of a warp that works alone: the whole split, as far as 64 KiB hold it.
template <int HD> constexpr int SPLIT_STAGES = HD <= 64 ? 4 : 2;

template <int HD>
DEVICE void write_partial(const AttendArgs &args, const Rows &rows, const Softmax<HD> &softmax, uint32_t split) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = rows.first + g + 8 * r;
        if (row >= rows.n_rows) continue;
        size_t at = (rows.global_row(row) * args.n_heads + rows.head(row)) * args.n_splits + split;
        if (t == 0) args.partial_sums[at] = make_float2(softmax.m[r], softmax.l[r]);
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            float2 o = make_float2(softmax.o[n][2 * r], softmax.o[n][2 * r + 1]);
            *(float2 *)(args.partial + at * HD + 8 * n + 2 * t) = o;
        }
    }
}

// Grid: (tiles * parts, KV heads, splits), a warp each for up to 16 rows.
// Shared: queries, then stages of chunks.
template <int HD> DEVICE void split(const AttendArgs &args) {
    uint32_t tile = blockIdx.x / args.parts, kv_head = blockIdx.y;
    if (tile >= *args.n_tiles) return;
    Rows rows = rows_of(args, tile, blockIdx.x % args.parts, kv_head, ROWS);
    if (rows.first >= rows.n_rows) return;
    Range seen = seen_by(args, rows, rows.first, rows.n_rows);
    int first_key = max((int)blockIdx.z * SPLIT, seen.first), end = min((int)(blockIdx.z + 1) * SPLIT, seen.end);
    if (first_key >= end) return;

    SHARED(uint4, queries);
    uint16_t *chunks = (uint16_t *)(queries + 32 * (HD / 16));
    constexpr int STAGES = SPLIT_STAGES<HD>;
    int chunk = first_key / CHUNK, end_chunk = (end + CHUNK - 1) / CHUNK;
    for (int i = 0; i < STAGES; i++) {
        uint16_t *to = chunks + i * CHUNK_ELEMENTS<HD>;
        if (chunk + i < end_chunk) copy_chunk<HD>(args, rows.tile.table, kv_head, chunk + i, seen.end, to, 32);
        copy_commit();
    }
    stage_queries<HD>(args, rows, rows.first, queries);
    Sight sight = sight_of(args, rows, rows.first);
    Range all = seen_by_all(args, rows, rows.first, rows.n_rows);
    Softmax<HD> softmax;
    softmax.clear();
    for (int stage = 0; chunk < end_chunk; chunk++, stage = (stage + 1) % STAGES) {
        copy_wait<STAGES - 1>();
        sync_warp();
        uint16_t *kv = chunks + stage * CHUNK_ELEMENTS<HD>;
        attend(softmax, queries, kv, sight, all, chunk * CHUNK, args.factor);
        sync_warp();
        int next = chunk + STAGES;
        if (next < end_chunk) copy_chunk<HD>(args, rows.tile.table, kv_head, next, seen.end, kv, 32);
        copy_commit();
    }
    close(softmax);
    write_partial(args, rows, softmax, blockIdx.z);
}

// Grid: (tiles, heads, tokens of a tile), a thread for each two dimensions, in whole warps.
template <int HD> constexpr int MERGE_THREADS = HD <= 64 ? 32 : 64;
template <int HD> DEVICE void merge(const AttendArgs &args) {
    if (blockIdx.x >= *args.n_tiles || threadIdx.x >= HD / 2) return;
    AttentionTile tile = args.tiles[blockIdx.x];
    if (blockIdx.z >= tile.n_tokens) return;
    size_t row = tile.first_row + blockIdx.z;
    int position = (int)(tile.last_position - tile.n_tokens + 1 + blockIdx.z), head = blockIdx.y;
    int first = args.window ? max(0, position - (int)args.window + 1) : 0;
    size_t at = (row * args.n_heads + head) * args.n_splits;
    float m = NONE, l = 0;
    float2 o = make_float2(0, 0);
#pragma unroll 4
    for (int split = first / SPLIT; split <= position / SPLIT; split++) {
        float2 sums = args.partial_sums[at + split];
        float2 next = *(const float2 *)(args.partial + (at + split) * HD + 2 * threadIdx.x);
        if (sums.x == NONE) continue;
        Shares shares = merge_sums(m, l, sums.x, sums.y);
        o = make_float2(merge_value(o.x, next.x, shares), merge_value(o.y, next.y, shares));
    }
    write_pair(args, row, head * HD + 2 * (int)threadIdx.x, o.x, o.y, __fdiv_rn(1.0f, l));
    if (head + 1 == (int)args.n_heads) write_padding(args, row, (head + 1) * HD, threadIdx.x, HD / 2);
}

constexpr int TILE_WARPS = 4;
constexpr int TILE_THREADS = 32 * TILE_WARPS;
constexpr int TILE_STAGES = 2;

// Adds the split to the total and begins another.
template <int HD> DEVICE void end_split(Softmax<HD> &total, Softmax<HD> &split) {
    close(split);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (split.m[r] == NONE) continue;
        Shares shares = merge_sums(total.m[r], total.l[r], split.m[r], split.l[r]);
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                total.o[n][i] = merge_value(total.o[n][i], split.o[n][i], shares);
            }
        }
    }
    split.clear();
}

template <int HD>
DEVICE void write_rows(const AttendArgs &args, const Rows &rows, int first, const Softmax<HD> &total) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first + g + 8 * r;
        if (row >= rows.n_rows) continue;
        size_t global_row = rows.global_row(row);
        int head = rows.head(row);
        float one_by_l = __fdiv_rn(1.0f, total.l[r]);
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            write_pair(args, global_row, head * HD + 8 * n + 2 * t, total.o[n][2 * r], total.o[n][2 * r + 1], one_by_l);
        }
        if (head + 1 == (int)args.n_heads) write_padding(args, global_row, (head + 1) * HD, t, 4);
    }
}

// Grid: (tiles * parts, KV heads), four warps that share what is copied, each for up to 16 rows.
// Shared: queries of each warp, then two chunks.
template <int HD> DEVICE void tiles(const AttendArgs &args) {
    // The last tiles see most keys: they begin first.
    uint32_t n_blocks = *args.n_tiles * args.parts;
    if (blockIdx.x >= n_blocks) return;
    uint32_t block = n_blocks - 1 - blockIdx.x, kv_head = blockIdx.y;
    Rows rows = rows_of(args, block / args.parts, block % args.parts, kv_head, ROWS * TILE_WARPS);
    if (rows.first >= rows.n_rows) return;
    Range seen = seen_by(args, rows, rows.first, rows.n_rows);

    SHARED(uint4, all_queries);
    int warp = threadIdx.x / 32, first = rows.first + ROWS * warp;
    uint4 *queries = all_queries + warp * 32 * (HD / 16);
    uint16_t *chunks = (uint16_t *)(all_queries + TILE_WARPS * 32 * (HD / 16));
    int chunk = seen.first / CHUNK, end_chunk = (seen.end + CHUNK - 1) / CHUNK;
    for (int i = 0; i < TILE_STAGES; i++) {
        uint16_t *to = chunks + i * CHUNK_ELEMENTS<HD>;
        if (chunk + i < end_chunk) {
            copy_chunk<HD>(args, rows.tile.table, kv_head, chunk + i, seen.end, to, TILE_THREADS);
        }
        copy_commit();
    }
    stage_queries<HD>(args, rows, first, queries);
    Sight sight = sight_of(args, rows, first);
    // A warp without rows sees nothing.
    int end_row = min(first + ROWS, rows.n_rows);
    Range any = {0, 0}, all = {0, 0};
    if (first < end_row) any = seen_by(args, rows, first, end_row), all = seen_by_all(args, rows, first, end_row);

    Softmax<HD> total, split;
    total.clear();
    split.clear();
    for (int stage = 0; chunk < end_chunk; chunk++, stage ^= 1) {
        copy_wait<TILE_STAGES - 1>();
        sync_block();
        uint16_t *kv = chunks + stage * CHUNK_ELEMENTS<HD>;
        int first_key = chunk * CHUNK;
        if (first_key < any.end && first_key + CHUNK > any.first) {
            attend(split, queries, kv, sight, all, first_key, args.factor);
        }
        sync_block();
        int next = chunk + TILE_STAGES;
        if (next < end_chunk) copy_chunk<HD>(args, rows.tile.table, kv_head, next, seen.end, kv, TILE_THREADS);
        copy_commit();
        if ((first_key + CHUNK) % SPLIT == 0 || chunk + 1 == end_chunk) end_split(total, split);
    }
    write_rows(args, rows, first, total);
}

}  // namespace attention

#define ATTENTION_KERNELS(HD)                                                                        \
    KERNEL(attend_split_##HD, AttendArgs, 32, 1) { attention::split<HD>(args); }                     \
    KERNEL(attend_merge_##HD, AttendArgs, attention::MERGE_THREADS<HD>, 1) { attention::merge<HD>(args); }                 \
    KERNEL(attend_tiles_##HD, AttendArgs, attention::TILE_THREADS, 2) { attention::tiles<HD>(args); }

ATTENTION_KERNELS(32)
ATTENTION_KERNELS(64)
ATTENTION_KERNELS(96)
ATTENTION_KERNELS(128)
