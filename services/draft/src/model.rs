//! A pass of the draft model over chunks of many sessions. It chooses no token.

use paceline_collectives::{Collective, Solo};
use paceline_domain::TokenId;
use paceline_model::{Batch, Decoder, HeadTokens, ModelError};

use crate::choice::{Chooser, Drafted};
use crate::planner::Chunk;
use crate::sessions::Sessions;

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
    chooser: Chooser,
}

impl OneRank {
    /// Over a decoder that has the whole model, of which tokens from `n_usable` on are padding.
    pub fn new(decoder: Decoder, n_usable: usize) -> Self {
        Self::with_head(decoder, HeadTokens::first(n_usable))
    }

    /// Over a decoder with an output head for these tokens alone.
    pub fn with_head(decoder: Decoder, head: HeadTokens) -> Self {
        Self { decoder, collective: Box::new(Solo::new()), chooser: Chooser::new(head) }
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
        let mut drafted = Vec::with_capacity(rows.output_rows.len());
        for (row, chunk) in chunks.iter().filter(|chunk| chunk.is_last).enumerate() {
            let session = sessions.get(chunk.key).expect("invariant: chunks are of live sessions");
            let position = chunk.end() as u32;
            let row = logits.row(row)?;
            drafted.push(self.chooser.choose(session.sampling(), session.history(), position, row));
        }
        Ok(drafted)
    }
}
