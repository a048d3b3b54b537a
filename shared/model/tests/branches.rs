//! Branches: rows beside others at the same positions, whose logits are bit for bit those of a sequence that goes on with them,
//! while the others' stay theirs.

mod support;

use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{BlockCopy, BlockId, ErrorKind, KvType, TokenId};
use paceline_kernels::Kernels;
use paceline_model::{Batch, Capacity, Cpu, Decoder, LoadSpec, ModelConfig, SplitPlan};
use support::{models, rig::tokens};

const N_ROWS: usize = 64;
const TABLE: [BlockId; 3] = [BlockId(4), BlockId(1), BlockId(6)];

fn decoder(kv_type: KvType) -> Decoder {
    let bytes = models::qwen2().to_gguf().expect("bytes");
    let checkpoint = Arc::new(Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let plan = SplitPlan::new(&config, 1).expect("a plan");
    let capacity = Capacity { kv_type, n_kv_blocks: 8, max_rows: N_ROWS, max_output_rows: N_ROWS };
    let (checkpoint, config, plan) = (&checkpoint, &config, &plan);
    let spec = LoadSpec { checkpoint, config, plan, rank: 0, quantize: None, capacity, progress: &|_| () };
    Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads: 2 }).expect("loads")
}

/// Runs tokens from a position on, and branches: each a token, its position and a block for it. Logits of all rows.
fn run(
    decoder: &mut Decoder,
    start: usize,
    chain: &[u32],
    branches: &[(u32, usize, BlockId)],
) -> Vec<Vec<f32>> {
    let place = |position: usize| position / 16;
    let of_branch = |(_, position, block): &(u32, usize, BlockId)| {
        TABLE[..place(*position)].iter().copied().chain([*block]).collect::<Vec<_>>()
    };
    let tables: Vec<Vec<BlockId>> =
        [TABLE.to_vec()].into_iter().chain(branches.iter().map(of_branch)).collect();
    let tables: Vec<&[BlockId]> = tables.iter().map(Vec::as_slice).collect();
    let copy =
        |(_, position, to): &(u32, usize, BlockId)| BlockCopy { from: TABLE[place(*position)], to: *to };
    let copies: Vec<BlockCopy> = branches.iter().map(copy).collect();
    let ids: Vec<TokenId> =
        chain.iter().chain(branches.iter().map(|branch| &branch.0)).map(|id| TokenId(*id)).collect();
    let positions = (start..start + chain.len()).chain(branches.iter().map(|branch| branch.1));
    let positions: Vec<u32> = positions.map(|position| position as u32).collect();
    let own = (1..=branches.len()).map(|branch| branch as u32);
    let sequence_of_row: Vec<u32> = std::iter::repeat_n(0, chain.len()).chain(own).collect();
    let output_rows: Vec<usize> = (0..ids.len()).collect();
    let batch = Batch {
        tokens: &ids,
        positions: &positions,
        sequence_of_row: &sequence_of_row,
        block_tables: &tables,
        output_rows: &output_rows,
        copies: &copies,
    };
    let mut logits = decoder.forward(&batch, &mut Solo::new()).expect("a forward pass");
    output_rows.iter().map(|row| logits.row(*row).expect("a row").to_vec()).collect()
}

/// The logits after the last of these tokens, read from the first on.
fn after(kv_type: KvType, ids: &[u32]) -> Vec<f32> {
    run(&mut decoder(kv_type), 0, ids, &[]).pop().expect("a row")
}

#[test]
fn a_branch_is_what_a_sequence_would_be_that_goes_on_with_it() {
    for kv_type in [KvType::F16, KvType::F32, KvType::Q8] {
        // The places of the branches around the edge of a block.
        for n_before in [3, 13, 14, 15, 16, 30] {
            let text = tokens(n_before as u32, n_before + 4, 320);
            let (prompt, chain) = text.split_at(n_before);
            let (first, second) = ((7, n_before + 1, BlockId(0)), (9, n_before + 2, BlockId(7)));
            let mut decoder = decoder(kv_type);
            run(&mut decoder, 0, prompt, &[]);
            let rows = run(&mut decoder, n_before, chain, &[first, second]);
            for (n, row) in (1..).zip(&rows[..chain.len()]) {
                assert!(*row == after(kv_type, &text[..n_before + n]), "{kv_type} {n_before}: proposal {n}");
            }
            for ((token, position, _), row) in [first, second].into_iter().zip(&rows[chain.len()..]) {
                let ids = [&text[..position], &[token]].concat();
                assert!(*row == after(kv_type, &ids), "{kv_type} {n_before}: the branch at {position}");
            }
            // The chain goes on as if there had been none.
            let next = run(&mut decoder, n_before + 4, &[5], &[]).pop().expect("a row");
            assert!(next == after(kv_type, &[&text[..], &[5]].concat()), "{kv_type} {n_before}: the chain");
        }
    }
}

#[test]
fn a_copy_of_a_block_beyond_the_pool_is_refused() {
    let copies = [BlockCopy { from: BlockId(8), to: BlockId(0) }];
    let batch = Batch {
        tokens: &[TokenId(1)],
        positions: &[0],
        sequence_of_row: &[0],
        block_tables: &[&TABLE],
        output_rows: &[0],
        copies: &copies,
    };
    let mut decoder = decoder(KvType::F16);
    let error = decoder.forward(&batch, &mut Solo::new()).map(drop).expect_err("block 8 of 8");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
