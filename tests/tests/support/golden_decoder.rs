//! One process that runs a real model over whole sequences. It holds no expectations.

use std::path::Path;
use std::sync::Arc;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::{Collective, Solo};
use paceline_domain::group::BLOCK_POSITIONS;
use paceline_domain::{BlockId, KvType, TokenId};
use paceline_kernels::Kernels;
use paceline_model::{Batch, Capacity, Cpu, Decoder, LoadSpec, ModelConfig, SplitPlan};

const CHUNK: usize = 256;

pub struct GoldenDecoder {
    decoder: Decoder,
    n_blocks: usize,
}

impl GoldenDecoder {
    /// Room for `n_sequences` of `n_positions` each, on all cores.
    pub fn load(path: &Path, kv_type: KvType, n_sequences: usize, n_positions: usize) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(path).expect("a checkpoint"));
        let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let n_blocks = n_positions.div_ceil(BLOCK_POSITIONS);
        let spec = LoadSpec {
            checkpoint: &checkpoint,
            config: &config,
            plan: &SplitPlan::new(&config, 1).expect("a plan"),
            rank: 0,
            quantize: None,
            capacity: Capacity {
                kv_type,
                n_kv_blocks: n_sequences * n_blocks,
                max_rows: CHUNK.max(n_sequences),
                max_output_rows: CHUNK.max(n_sequences),
            },
            progress: &|_| (),
        };
        let decoder = Decoder::load(&spec, &Cpu { kernels: Kernels::detect(), n_threads });
        Self { decoder: decoder.expect("loads"), n_blocks }
    }

    /// The block table of a sequence.
    pub fn blocks(&self, sequence: usize) -> Vec<BlockId> {
        (0..self.n_blocks).map(|block| BlockId((sequence * self.n_blocks + block) as u32)).collect()
    }

    /// Runs a sequence from its start; `visit` gets each position with its row of logits.
    pub fn prefill(
        &mut self,
        table: &[BlockId],
        tokens: &[TokenId],
        collective: &mut dyn Collective,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) {
        for (chunk, tokens) in tokens.chunks(CHUNK).enumerate() {
            let positions: Vec<u32> = (0..tokens.len()).map(|row| (chunk * CHUNK + row) as u32).collect();
            let output_rows: Vec<usize> = (0..tokens.len()).collect();
            let batch = Batch {
                tokens,
                positions: &positions,
                sequence_of_row: &vec![0; tokens.len()],
                block_tables: &[table],
                output_rows: &output_rows,
                copies: &[],
            };
            let mut logits = self.decoder.forward(&batch, collective).expect("a forward pass");
            for row in 0..logits.n_rows() {
                visit(chunk * CHUNK + row, logits.row(row).expect("a row"));
            }
        }
    }

    /// One token of every sequence; `visit` gets each sequence with its row of logits.
    pub fn decode(
        &mut self,
        tables: &[Vec<BlockId>],
        tokens: &[TokenId],
        positions: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
    ) {
        let tables: Vec<&[BlockId]> = tables.iter().map(Vec::as_slice).collect();
        let sequence_of_row: Vec<u32> = (0..tokens.len() as u32).collect();
        let output_rows: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch {
            tokens,
            positions,
            sequence_of_row: &sequence_of_row,
            block_tables: &tables,
            output_rows: &output_rows,
            copies: &[],
        };
        let mut logits = self.decoder.forward(&batch, &mut Solo::new()).expect("a forward pass");
        for row in 0..logits.n_rows() {
            visit(row, logits.row(row).expect("a row"));
        }
    }
}
