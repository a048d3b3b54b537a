// Attention over the paged KV cache: for few rows, one block a split and then a merge; for many rows, one block for all
// splits. Both give the same bits; whoever launches chooses.
#include "attention.cuh"
#include "attention_split.cuh"

namespace attention {

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
    KERNEL_AHEAD(attend_split_##HD, AttendArgs, attention::SPLIT_THREADS, 1) {                       \
        grid_release();                                                                              \
        attention::split<HD>(args);                                                                  \
    }                                                                                                \
    KERNEL(attend_tiles_##HD, AttendArgs, attention::TILE_THREADS, 2) { attention::tiles<HD>(args); }

ATTENTION_KERNELS(32)
ATTENTION_KERNELS(64)
ATTENTION_KERNELS(96)
ATTENTION_KERNELS(128)
