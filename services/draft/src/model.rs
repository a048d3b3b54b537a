//! A pass of the draft model over chunks of many sessions. It chooses no token.

use paceline_collectives::{Collective, Solo};
use paceline_domain::{BlockId, TokenId, group::BLOCK_POSITIONS};
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

    /// Called once, while nobody has a block: runs a pass of so many rows, at least one, for what memory and threads do the
    /// first time only. Else the first session would wait for that, longer than a coordinator's patience.
    ///
    /// # Errors
    /// As [`DraftModel::run`].
    fn warm_up(&mut self, _n_rows: usize) -> Result<(), ModelError> {
        Ok(())
    }
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
            copies: &[],
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

    fn warm_up(&mut self, n_rows: usize) -> Result<(), ModelError> {
        let blocks: Vec<_> = (0..n_rows.div_ceil(BLOCK_POSITIONS) as u32).map(BlockId).collect();
        let positions: Vec<_> = (0..n_rows as u32).collect();
        let batch = Batch {
            tokens: &vec![TokenId(0); n_rows],
            positions: &positions,
            sequence_of_row: &vec![0; n_rows],
            block_tables: &[&blocks],
            output_rows: &[n_rows - 1],
            copies: &[],
        };
        self.decoder.forward(&batch, self.collective.as_mut()).map(drop)
    }
}
