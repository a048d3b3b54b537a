//! Which rows of a batch attention works on together. No choice made here changes a bit of a row.

use super::attention::{SPLIT, SPLIT_ROWS, TILE_ROWS};

/// `AttentionTile` of kernels/batch.cuh: consecutive rows of one sequence at consecutive positions.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttentionTile {
    /// Its first row.
    pub first_row: u32,
    /// Its rows.
    pub n_tokens: u32,
    /// Where the sequence's block table begins in `tables`.
    pub table: u32,
    /// Position of the last row.
    pub last_position: u32,
    /// First row of the run it was cut from: rows from there on have the positions before one after the other.
    pub first_new_row: u32,
}

impl AttentionTile {
    /// Splits that some row of the tile may see.
    pub fn n_splits(&self) -> usize {
        self.last_position as usize / SPLIT + 1
    }
}

/// The tiles of a batch, for each of the two ways.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tiles {
    /// For `attend_split`.
    pub few: Vec<AttentionTile>,
    /// For `attend_tiles`.
    pub many: Vec<AttentionTile>,
}

/// Tokens of a tile at most when a block has `rows` rows and a KV head at most `group` query heads.
pub fn tokens_of_tile(rows: usize, group: usize) -> usize {
    (rows / group).max(1)
}

/// Cuts a batch into tiles. Rows with the same table are of the same sequence. Runs of rows that fill a block of
/// `attend_tiles` are its; the others are cut into splits.
pub fn tiles(positions: &[u32], table_of_row: &[u32], group: usize) -> Tiles {
    let mut tiles = Tiles::default();
    for run in runs(positions, table_of_row) {
        let is_long = run.n_tokens as usize * group > TILE_ROWS;
        let (to, rows) = if is_long { (&mut tiles.many, TILE_ROWS) } else { (&mut tiles.few, SPLIT_ROWS) };
        cut(run, tokens_of_tile(rows, group) as u32, to);
    }
    tiles
}

/// Rows that follow each other in one sequence.
pub fn runs(positions: &[u32], table_of_row: &[u32]) -> Vec<AttentionTile> {
    assert_eq!(positions.len(), table_of_row.len(), "a position and a table for each row");
    let mut runs: Vec<AttentionTile> = Vec::new();
    for (row, (position, table)) in positions.iter().zip(table_of_row).enumerate() {
        match runs.last_mut() {
            Some(run) if run.table == *table && run.last_position + 1 == *position => {
                run.n_tokens += 1;
                run.last_position += 1;
            }
            _ => runs.push(AttentionTile {
                first_row: row as u32,
                n_tokens: 1,
                table: *table,
                last_position: *position,
                first_new_row: row as u32,
            }),
        }
    }
    runs
}

/// Whether rows of some sequence are in several runs.
pub fn is_scattered(runs: &[AttentionTile]) -> bool {
    let mut tables: Vec<u32> = runs.iter().map(|run| run.table).collect();
    tables.sort_unstable();
    tables.windows(2).any(|pair| pair[0] == pair[1])
}

/// Cuts a run into tiles of `max_tokens` at most.
pub fn cut(run: AttentionTile, max_tokens: u32, tiles: &mut Vec<AttentionTile>) {
    let first_position = run.last_position + 1 - run.n_tokens;
    for start in (0..run.n_tokens).step_by(max_tokens as usize) {
        let n_tokens = max_tokens.min(run.n_tokens - start);
        tiles.push(AttentionTile {
            first_row: run.first_row + start,
            n_tokens,
            table: run.table,
            last_position: first_position + start + n_tokens - 1,
            first_new_row: run.first_row,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(first_row: u32, n_tokens: u32, table: u32, last_position: u32) -> AttentionTile {
        AttentionTile { first_row, n_tokens, table, last_position, first_new_row: first_row }
    }

    /// Tiles of one run.
    fn of_run<const N: usize>(tiles: [AttentionTile; N]) -> [AttentionTile; N] {
        tiles.map(|tile| AttentionTile { first_new_row: tiles[0].first_row, ..tile })
    }

    #[test]
    fn rows_of_different_sequences_are_apart() {
        // Two sequences at the same position, one row each; then positions that follow each other by chance.
        assert_eq!(
            tiles(&[7, 7, 8], &[0, 4, 9], 4).few,
            [tile(0, 1, 0, 7), tile(1, 1, 4, 7), tile(2, 1, 9, 8)]
        );
        assert_eq!(tiles(&[], &[], 4), Tiles::default());
    }

    #[test]
    fn rows_that_do_not_follow_each_other_are_apart() {
        assert_eq!(
            runs(&[3, 4, 6, 5, 5], &[0; 5]),
            [tile(0, 2, 0, 4), tile(2, 1, 0, 6), tile(3, 1, 0, 5), tile(4, 1, 0, 5)]
        );
        assert!(is_scattered(&runs(&[3, 4, 6], &[0; 3])));
        assert!(!is_scattered(&runs(&[3, 4, 3], &[0, 0, 9])));
    }

    #[test]
    fn a_run_is_cut_where_a_block_is_full() {
        let positions: Vec<u32> = (100..109).collect();
        // 16 / 7 tokens a tile.
        let expected = of_run([
            tile(0, 2, 5, 101),
            tile(2, 2, 5, 103),
            tile(4, 2, 5, 105),
            tile(6, 2, 5, 107),
            tile(8, 1, 5, 108),
        ]);
        assert_eq!(tiles(&positions, &[5; 9], 7), Tiles { few: expected.to_vec(), many: vec![] });
        // 63 rows are few; 70 are many, and fill blocks of 9 tokens.
        let positions: Vec<u32> = (0..10).collect();
        assert_eq!(tiles(&positions, &[5; 10], 7).many, of_run([tile(0, 9, 5, 8), tile(9, 1, 5, 9)]));
        // More heads than rows of a block.
        assert_eq!(tiles(&[0, 1], &[0; 2], 20).few, of_run([tile(0, 1, 0, 0), tile(1, 1, 0, 1)]));
    }

    #[test]
    fn tiles_cover_every_row_once() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        for group in [1, 3, 7, 16, 40] {
            let (mut positions, mut tables) = (Vec::new(), Vec::new());
            for sequence in 0..6 {
                let (start, n) = (next() % 500, next() % 90);
                positions.extend(start..start + n);
                tables.extend((0..n).map(|_| sequence * 64));
            }
            let Tiles { few, many } = tiles(&positions, &tables, group);
            let mut seen = vec![0; positions.len()];
            for (tile, rows) in
                few.iter().map(|tile| (tile, SPLIT_ROWS)).chain(many.iter().map(|tile| (tile, TILE_ROWS)))
            {
                assert!(tile.n_tokens as usize <= tokens_of_tile(rows, group));
                for i in 0..tile.n_tokens {
                    let row = (tile.first_row + i) as usize;
                    seen[row] += 1;
                    assert_eq!(positions[row], tile.last_position + 1 - tile.n_tokens + i);
                    assert_eq!(tables[row], tile.table);
                }
            }
            assert!(seen.iter().all(|n| *n == 1));
        }
    }
}
