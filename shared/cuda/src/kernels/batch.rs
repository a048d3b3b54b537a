//! What the kernels know of a batch: the structs of kernels/batch.cuh.

/// `BatchHeader` of kernels/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct BatchHeader {
    /// Token rows.
    pub n_rows: u32,
    /// Rows whose logits are wanted.
    pub n_output_rows: u32,
    /// Tiles for the attention kernel of splits.
    pub n_split_tiles: u32,
    /// Tiles for the attention kernel of many rows.
    pub n_row_tiles: u32,
}
