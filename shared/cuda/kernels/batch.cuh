// What a batch is on the device. The buffers have fixed addresses, so that captured graphs find the batch of each replay;
// grids may be larger than the batch, and blocks beyond its counts do nothing.
#pragma once
#include "ptx.cuh"

struct BatchHeader {
    uint32_t n_rows;
    uint32_t n_output_rows;
    uint32_t n_split_tiles;
    uint32_t n_row_tiles;
};

// Consecutive rows of one sequence at consecutive positions.
struct AttentionTile {
    uint32_t first_row;
    uint32_t n_tokens;
    uint32_t table;          // offset of the sequence's block table
    uint32_t last_position;  // of the last row
    uint32_t first_new_row;  // of the batch: from there on rows have the positions before one after the other
};
