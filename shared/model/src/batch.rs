//! What goes into a forward pass. Everything a caller could get wrong is checked here, before
//! any buffer is touched.

use paceline_domain::group::BLOCK_POSITIONS;
use paceline_domain::{BlockCopy, BlockId, TokenId};

use crate::ModelError;

/// Token rows of any sequences, run together.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[n_rows]`.
    pub tokens: &'a [TokenId],
    /// Position of each row in its sequence, `[n_rows]`; rising within a sequence.
    pub positions: &'a [u32],
    /// Index into `block_tables` for each row, `[n_rows]`.
    pub sequence_of_row: &'a [u32],
    /// KV blocks of each sequence, in position order.
    pub block_tables: &'a [&'a [BlockId]],
    /// Rows whose logits are wanted, in the order of the result.
    pub output_rows: &'a [usize],
    /// One for each of the last rows, where these are branches: in each layer, when the keys and values of all other rows
    /// are written, the block becomes a copy, and then that row's are written.
    pub copies: &'a [BlockCopy],
}

/// What a decoder was made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimits {
    pub max_rows: usize,
    pub max_output_rows: usize,
    pub n_vocab: usize,
    pub context_length: usize,
    pub n_kv_blocks: usize,
}

impl Batch<'_> {
    /// Token rows.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Checks everything against the decoder's limits. `last_position` is kept by the caller between calls.
    pub(crate) fn check(
        &self,
        limits: &BatchLimits,
        last_position: &mut Vec<Option<u32>>,
    ) -> Result<(), ModelError> {
        let n_rows = self.n_rows();
        if n_rows == 0 || n_rows > limits.max_rows {
            return refuse(format!("{n_rows} rows; 1 to {} fit", limits.max_rows));
        }
        if self.positions.len() != n_rows || self.sequence_of_row.len() != n_rows {
            let (n_positions, n_sequences) = (self.positions.len(), self.sequence_of_row.len());
            return refuse(format!(
                "{n_rows} tokens, {n_positions} positions, {n_sequences} sequence indexes"
            ));
        }
        if self.output_rows.len() > limits.max_output_rows {
            let n_outputs = self.output_rows.len();
            return refuse(format!("{n_outputs} output rows; at most {} fit", limits.max_output_rows));
        }
        if let Some(row) = self.output_rows.iter().find(|row| **row >= n_rows) {
            return refuse(format!("output row {row} of {n_rows}"));
        }
        for (idx, table) in self.block_tables.iter().enumerate() {
            if let Some(block) = table.iter().find(|block| block.idx() >= limits.n_kv_blocks) {
                return refuse(format!("sequence {idx} names block {block} of {}", limits.n_kv_blocks));
            }
        }
        if self.copies.len() > n_rows {
            return refuse(format!("{} branches in {n_rows} rows", self.copies.len()));
        }
        let copied = self.copies.iter().flat_map(|copy| [copy.from, copy.to]);
        if let Some(block) = copied.into_iter().find(|block| block.idx() >= limits.n_kv_blocks) {
            return refuse(format!("block {block} of {} is copied", limits.n_kv_blocks));
        }
        last_position.clear();
        last_position.resize(self.block_tables.len(), None);
        (0..n_rows).try_for_each(|row| self.check_row(row, limits, last_position))
    }

    fn check_row(
        &self,
        row: usize,
        limits: &BatchLimits,
        last_position: &mut [Option<u32>],
    ) -> Result<(), ModelError> {
        let (token, position) = (self.tokens[row], self.positions[row]);
        if token.idx() >= limits.n_vocab {
            return refuse(format!("row {row} is token {token} of {}", limits.n_vocab));
        }
        if position as usize >= limits.context_length {
            return refuse(format!("row {row} is at position {position} of {}", limits.context_length));
        }
        let sequence = self.sequence_of_row[row] as usize;
        let (Some(table), Some(last)) = (self.block_tables.get(sequence), last_position.get_mut(sequence))
        else {
            let n_sequences = self.block_tables.len();
            return refuse(format!("row {row} belongs to sequence {sequence} of {n_sequences}"));
        };
        let n_positions = table.len() * BLOCK_POSITIONS;
        if position as usize >= n_positions {
            return refuse(format!("row {row} is at position {position}, its blocks hold {n_positions}"));
        }
        if let Some(last) = last.filter(|last| *last >= position) {
            return refuse(format!(
                "row {row} is at position {position} after position {last} of its sequence"
            ));
        }
        *last = Some(position);
        Ok(())
    }
}

fn refuse(problem: String) -> Result<(), ModelError> {
    Err(ModelError::Batch(problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_domain::ErrorKind;

    const LIMITS: BatchLimits =
        BatchLimits { max_rows: 4, max_output_rows: 2, n_vocab: 10, context_length: 40, n_kv_blocks: 8 };

    fn good() -> Batch<'static> {
        Batch {
            tokens: &[TokenId(1), TokenId(9), TokenId(0)],
            positions: &[15, 16, 0],
            sequence_of_row: &[0, 0, 1],
            block_tables: &[&[BlockId(7), BlockId(2)], &[BlockId(0)]],
            output_rows: &[1, 2],
            copies: &[BlockCopy { from: BlockId(7), to: BlockId(0) }],
        }
    }

    #[test]
    fn a_good_batch_passes() {
        good().check(&LIMITS, &mut Vec::new()).expect("passes");
    }

    #[test]
    fn each_wrong_value_is_named() {
        let cases = [
            (Batch { tokens: &[], positions: &[], sequence_of_row: &[], ..good() }, "0 rows"),
            (Batch { tokens: &[TokenId(1); 5], ..good() }, "5 rows"),
            (Batch { positions: &[15, 16], ..good() }, "2 positions"),
            (Batch { sequence_of_row: &[0, 0], ..good() }, "2 sequence indexes"),
            (Batch { output_rows: &[0, 1, 2], ..good() }, "3 output rows"),
            (Batch { output_rows: &[3], ..good() }, "output row 3"),
            (Batch { tokens: &[TokenId(1), TokenId(10), TokenId(0)], ..good() }, "token 10"),
            (Batch { positions: &[15, 40, 0], ..good() }, "position 40 of 40"),
            (Batch { positions: &[15, 32, 0], ..good() }, "its blocks hold 32"),
            (Batch { positions: &[16, 16, 0], ..good() }, "after position 16"),
            (Batch { sequence_of_row: &[0, 0, 2], ..good() }, "sequence 2 of 2"),
            (Batch { copies: &[BlockCopy { from: BlockId(8), to: BlockId(0) }], ..good() }, "block 8 of 8"),
            (Batch { copies: &[BlockCopy { from: BlockId(0), to: BlockId(1) }; 4], ..good() }, "4 branches"),
            (Batch { block_tables: &[&[BlockId(8), BlockId(2)], &[]], ..good() }, "block 8 of 8"),
            (Batch { block_tables: &[&[BlockId(7), BlockId(2)], &[]], ..good() }, "its blocks hold 0"),
        ];
        for (batch, named) in cases {
            let error = batch.check(&LIMITS, &mut Vec::new()).expect_err(named);
            assert!(error.to_string().contains(named), "{error} does not say {named}");
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
