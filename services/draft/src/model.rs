//! A pass of the draft model over chunks of many sessions, and the tokens it expects. It chooses as the target does: with
//! the same function, parameters, history and noise.

use paceline_collectives::{Collective, Solo};
use paceline_domain::TokenId;
use paceline_model::{Batch, Decoder, ModelError};
use paceline_sampling::sample_row;

use crate::planner::Chunk;
use crate::sessions::Sessions;

/// A token the model expects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drafted {
    /// The token.
    pub token: TokenId,
    /// The model's probability of it, before temperature and filters.
    pub confidence: f32,
}

/// What drafts. A model that is split over ranks is another implementation: it hands each pass to its ranks as this one
/// runs it.
pub trait DraftModel: Send {
    /// Runs a pass; one token for each chunk that is the last of its session, in order. After an error nothing of the pass
    /// counts as computed.
    ///
    /// # Errors
    /// What the model or its device reports.
    fn run(&mut self, chunks: &[Chunk], sessions: &Sessions) -> Result<Vec<Drafted>, ModelError>;
}

/// A model in this process, on one device.
pub struct OneRank {
    decoder: Decoder,
    collective: Box<dyn Collective>,
    /// Ids from here on are padding and never proposed.
    n_usable: usize,
    row: Vec<f32>,
}

impl OneRank {
    /// Over a decoder that has the whole model.
    pub fn new(decoder: Decoder, n_usable: usize) -> Self {
        Self { decoder, collective: Box::new(Solo::new()), n_usable, row: Vec::new() }
    }
}

/// Chunks as flat rows.
#[derive(Default)]
struct Rows {
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    sequence_of_row: Vec<u32>,
    output_rows: Vec<usize>,
}

impl Rows {
    fn of(chunks: &[Chunk]) -> Self {
        let mut rows = Self::default();
        for (i, chunk) in chunks.iter().enumerate() {
            rows.tokens.extend_from_slice(&chunk.tokens);
            rows.positions.extend(chunk.start_pos as u32..chunk.end() as u32);
            rows.sequence_of_row.extend(std::iter::repeat_n(i as u32, chunk.tokens.len()));
            if chunk.is_last {
                rows.output_rows.push(rows.tokens.len() - 1);
            }
        }
        rows
    }
}

impl DraftModel for OneRank {
    fn run(&mut self, chunks: &[Chunk], sessions: &Sessions) -> Result<Vec<Drafted>, ModelError> {
        let rows = Rows::of(chunks);
        let block_tables: Vec<_> = chunks.iter().map(|chunk| chunk.blocks.as_slice()).collect();
        let batch = Batch {
            tokens: &rows.tokens,
            positions: &rows.positions,
            sequence_of_row: &rows.sequence_of_row,
            block_tables: &block_tables,
            output_rows: &rows.output_rows,
        };
        let mut logits = self.decoder.forward(&batch, self.collective.as_mut())?;
        let n_columns = logits.columns(self.n_usable).n_usable;
        let mut drafted = Vec::with_capacity(rows.output_rows.len());
        for (row, chunk) in chunks.iter().filter(|chunk| chunk.is_last).enumerate() {
            let session = sessions.get(chunk.key).expect("invariant: chunks are of live sessions");
            self.row.clear();
            self.row.extend_from_slice(&logits.row(row)?[..n_columns]);
            let position = chunk.end() as u32;
            let sampled = sample_row(session.sampling(), session.history(), position, &mut self.row);
            let probability = sampled.logprob.map_or(0.0, f32::exp);
            drafted.push(Drafted { token: sampled.token, confidence: probability.clamp(0.0, 1.0) });
        }
        Ok(drafted)
    }
}
