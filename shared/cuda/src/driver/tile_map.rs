//! Maps of tiles, as the driver encodes them for copies of whole boxes.

use std::ptr;

use cudarc::driver::sys;

use super::device::check;
use crate::CudaError;
use crate::runtime::{TileMap, Tiles};

/// Bytes of an element: the greatest there is, as a box has at most 256 along each side.
const ELEMENT_BYTES: u32 = 8;

/// The map of these tiles: elements of a piece, pieces, tiles.
pub(super) fn encode(tiles: &Tiles) -> Result<TileMap, CudaError> {
    let n_elements = tiles.piece_bytes / ELEMENT_BYTES;
    let sizes = [u64::from(n_elements), u64::from(tiles.n_pieces), u64::from(tiles.n_tiles)];
    let strides = [u64::from(tiles.piece_bytes), tiles.tile_bytes];
    let box_sizes = [n_elements, tiles.box_pieces, tiles.box_tiles];
    let steps = [1u32; 3];
    let mut map = TileMap([0; 16]);
    // SAFETY: the map has the size and alignment of a CUtensorMap, and the arrays three, two, three and three elements, as the
    // rank of 3 demands; the call reads and writes nothing else, and does not touch the device's memory.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            ptr::from_mut(&mut map).cast(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
            3,
            tiles.first as usize as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", result.result())?;
    Ok(map)
}
