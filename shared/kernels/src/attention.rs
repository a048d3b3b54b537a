//! Paged attention: which queries are worked on together, by how many threads, and in which order partial results
//! are merged. The arithmetic is in `chunk`; nothing here changes a bit of a row.
//!
//! A row attends to the keys of its sequence at positions `0 ..= position`, or the last `window` of them. Positions
//! are cut into chunks of [`CHUNK`], counted from position 0. Each chunk gives a partial result (largest score, sum
//! of exponentials, weighted values) that depends on the row and its keys only; partial results are merged in order
//! of position (online softmax, Milakov and Gimelshein 2018; chunks as in FlashDecoding, Dao et al. 2023).
//!
//! # Layout
//! * this file – arguments, the plan of tasks, and running it
//! * `chunk` – scores, softmax and weighted values of one chunk, merging: scalar definitions
//! * `tiles` – the SIMD twins of a chunk

pub(crate) mod chunk;
mod tiles;

use std::cell::RefCell;
use std::ops::Range;

use paceline_domain::group::BLOCK_POSITIONS;

use crate::kv::{AnyKvBlocks, KvBlocks, KvLayer, KvRow};
use crate::pool::SharedSlice;
use crate::{Kernels, ThreadPool};
use chunk::{AttentionKernels, ChunkKernel, Partials, Query, Scores};

/// Positions of a chunk. Changing it changes results.
pub const CHUNK: usize = 256;
/// Most queries that share loads of keys and values.
const MAX_QUERIES: usize = 16;

/// What attention reads.
#[derive(Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// `[n_rows, n_heads, head_dim]`, rotated.
    pub q: &'a [f32],
    /// One per token row. Keys and values up to each row's position are stored already. Neighbours that share their
    /// block table (the same slice) are worked on together.
    pub rows: &'a [KvRow<'a>],
    /// The layer's keys and values.
    pub kv: &'a KvLayer,
    /// KV head (of this rank) of each query head (of this rank).
    pub kv_of_head: &'a [usize],
    /// Scores are multiplied by it: usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Positions a row sees at most, its own included.
    pub window: Option<u32>,
}

/// Memory attention needs while it runs; kept from call to call, so that nothing is allocated once it is large
/// enough.
#[derive(Default)]
pub struct AttentionScratch {
    heads: Vec<usize>,
    items: Vec<Item>,
    partials: Vec<f32>,
}

/// Queries that are worked on together: some rows of one sequence times some heads of one KV head.
#[derive(Clone, Debug)]
struct Item {
    rows: Range<usize>,
    /// Range in `AttentionScratch::heads`.
    heads: Range<usize>,
    kv_head: usize,
    n_chunks: usize,
}

/// Attention of all rows and heads: `out` is `[n_rows, n_heads, head_dim]`.
///
/// # Panics
/// When shapes do not fit each other, or a row's block table does not reach its position.
pub fn attention(
    kernels: &Kernels,
    pool: &ThreadPool,
    args: &AttentionArgs<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let (n_heads, head_dim) = (args.kv_of_head.len(), args.kv.shape().head_dim);
    assert_eq!(args.q.len(), args.rows.len() * n_heads * head_dim, "q is [n_rows, n_heads, head_dim]");
    assert_eq!(args.q.len(), out.len(), "the output has the shape of q");
    scratch.plan(args);
    let AttentionScratch { heads, items, partials } = scratch;
    match args.kv.blocks() {
        AnyKvBlocks::F16(blocks) => {
            let (attention, chunk) = (&kernels.attention, kernels.attention.chunk_f16);
            Run { args, blocks, chunk, attention, heads, items }.run(pool, partials, out);
        }
        AnyKvBlocks::F32(blocks) => {
            let (attention, chunk) = (&kernels.attention, kernels.attention.chunk_f32);
            Run { args, blocks, chunk, attention, heads, items }.run(pool, partials, out);
        }
        AnyKvBlocks::Q8(blocks) => {
            let (attention, chunk) = (&kernels.attention, kernels.attention.chunk_q8);
            Run { args, blocks, chunk, attention, heads, items }.run(pool, partials, out);
        }
    }
}

impl AttentionScratch {
    /// Groups rows and heads into items. Any grouping gives the same results.
    fn plan(&mut self, args: &AttentionArgs<'_>) {
        self.heads.clear();
        self.heads.extend(0..args.kv_of_head.len());
        self.heads.sort_by_key(|head| args.kv_of_head[*head]);
        self.items.clear();
        let same_kv_head = |a: &usize, b: &usize| args.kv_of_head[*a] == args.kv_of_head[*b];
        let same_table = |a: &KvRow<'_>, b: &KvRow<'_>| std::ptr::eq(a.block_table, b.block_table);
        let mut first_head = 0;
        for group in self.heads.chunk_by(same_kv_head).flat_map(|group| group.chunks(MAX_QUERIES)) {
            let heads = first_head..first_head + group.len();
            first_head = heads.end;
            let mut first_row = 0;
            let rows_together = MAX_QUERIES / group.len();
            for rows in args.rows.chunk_by(same_table).flat_map(|rows| rows.chunks(rows_together)) {
                let last = rows.iter().map(|row| row.position as usize).max().unwrap_or(0);
                self.items.push(Item {
                    rows: first_row..first_row + rows.len(),
                    heads: heads.clone(),
                    kv_head: args.kv_of_head[group[0]],
                    n_chunks: last / CHUNK + 1,
                });
                first_row += rows.len();
            }
        }
    }
}

impl Item {
    fn n_queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }
}

/// One call of attention for one type of KV elements.
struct Run<'a, E> {
    args: &'a AttentionArgs<'a>,
    blocks: KvBlocks<'a, E>,
    chunk: ChunkKernel<E>,
    attention: &'a AttentionKernels,
    heads: &'a [usize],
    items: &'a [Item],
}

/// Memory of one thread that works on items.
struct Workspace {
    scores: Box<Scores>,
    partials: Vec<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> =
        RefCell::new(Workspace { scores: Box::new([[0.0; CHUNK]; MAX_QUERIES]), partials: Vec::new() });
}

impl<E: Copy + Sync> Run<'_, E> {
    fn run(&self, pool: &ThreadPool, partials: &mut Vec<f32>, out: &mut [f32]) {
        let out = SharedSlice::new(out);
        let most_chunks = self.items.iter().map(|item| item.n_chunks).max().unwrap_or(0);
        if self.items.len() >= 2 * pool.n_threads() || pool.n_threads() == 1 || most_chunks < 2 {
            pool.run(self.items.len(), &|item| self.whole_item(&self.items[item], &out));
        } else {
            self.split_items(pool, most_chunks, partials, &out);
        }
    }

    /// All chunks of an item, one after the other.
    fn whole_item(&self, item: &Item, out: &SharedSlice<'_, f32>) {
        WORKSPACE.with_borrow_mut(|Workspace { scores, partials }| {
            let len = self.partials_len(item);
            if partials.len() < 2 * len {
                partials.resize(2 * len, 0.0);
            }
            let (state, part) = partials[..2 * len].split_at_mut(len);
            let mut state = self.partials(item, state);
            let mut part = self.partials(item, part);
            state.clear();
            for chunk in 0..item.n_chunks {
                self.chunk(item, chunk, scores, &mut part);
                // SAFETY: a table is only handed out when the CPU has its features.
                unsafe { (self.attention.merge)(&mut state, &part) };
            }
            self.finish(item, &state, out);
        });
    }

    /// Few items with many keys: every chunk of every item is a task, then every item is merged.
    fn split_items(
        &self,
        pool: &ThreadPool,
        n_chunks: usize,
        partials: &mut Vec<f32>,
        out: &SharedSlice<'_, f32>,
    ) {
        let len = self.items.iter().map(|item| self.partials_len(item)).max().unwrap_or(0);
        partials.resize(self.items.len() * n_chunks * len, 0.0);
        pool.run_pieces(partials, len, &|task, part| {
            let item = &self.items[task / n_chunks];
            let mut part = self.partials(item, part);
            WORKSPACE.with_borrow_mut(|workspace| {
                self.chunk(item, task % n_chunks, &mut workspace.scores, &mut part);
            });
        });
        pool.run_pieces(partials, n_chunks * len, &|item, parts| {
            let item = &self.items[item];
            let (first, others) = parts.split_at_mut(len);
            let mut state = self.partials(item, first);
            for part in others.chunks_exact_mut(len).take(item.n_chunks - 1) {
                let part = self.partials(item, part);
                // SAFETY: a table is only handed out when the CPU has its features.
                unsafe { (self.attention.merge)(&mut state, &part) };
            }
            self.finish(item, &state, out);
        });
    }

    fn partials_len(&self, item: &Item) -> usize {
        Partials::len(item.n_queries(), self.args.kv.shape().value_dim())
    }

    fn partials<'b>(&self, item: &Item, memory: &'b mut [f32]) -> Partials<'b> {
        Partials::new(memory, item.n_queries(), self.args.kv.shape().value_dim())
    }

    /// Partial results of an item's queries in one chunk.
    fn chunk(&self, item: &Item, chunk: usize, scores: &mut Scores, part: &mut Partials<'_>) {
        let mut queries = [Query::default(); MAX_QUERIES];
        for (i, query) in queries[..item.n_queries()].iter_mut().enumerate() {
            let row = item.rows.start + i / item.heads.len();
            let (start, end) = self.visible(row, chunk);
            *query = Query { q: &self.args.q[self.head_range(item, i)], start, end };
        }
        let table = self.args.rows[item.rows.start].block_table;
        let first_block = (chunk * CHUNK / BLOCK_POSITIONS).min(table.len());
        let args = chunk::ChunkArgs {
            queries: &queries[..item.n_queries()],
            blocks: self.blocks,
            block_table: &table[first_block..],
            kv_head: item.kv_head,
            scale: self.args.scale,
        };
        // SAFETY: a table is only handed out when the CPU has its features.
        unsafe { (self.chunk)(&args, scores, part) };
    }

    /// The positions of a chunk that a row sees, counted from the chunk's start.
    fn visible(&self, row: usize, chunk: usize) -> (usize, usize) {
        let end = self.args.rows[row].position as usize + 1;
        let start = self.args.window.map_or(0, |window| end.saturating_sub(window.max(1) as usize));
        let inside = |position: usize| position.saturating_sub(chunk * CHUNK).min(CHUNK);
        (inside(start), inside(end))
    }

    /// Where query i of an item lies in q and in the output.
    fn head_range(&self, item: &Item, i: usize) -> Range<usize> {
        let (n_heads, head_dim) = (self.args.kv_of_head.len(), self.args.kv.shape().head_dim);
        let row = item.rows.start + i / item.heads.len();
        let head = self.heads[item.heads.start + i % item.heads.len()];
        let start = (row * n_heads + head) * head_dim;
        start..start + head_dim
    }

    fn finish(&self, item: &Item, state: &Partials<'_>, out: &SharedSlice<'_, f32>) {
        for i in 0..item.n_queries() {
            // SAFETY: each row and head is in one item, and each item is finished once.
            let out = unsafe { out.range_mut(self.head_range(item, i)) };
            let sum = state.sum[i];
            out.iter_mut().zip(state.values(i)).for_each(|(out, value)| *out = value / sum);
        }
    }
}

#[cfg(test)]
#[path = "attention/tests.rs"]
mod tests;
