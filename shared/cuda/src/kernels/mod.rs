//! Arguments and launches of the kernels, a file each as in `kernels/`.

pub mod attention;
pub mod batch;
pub mod filter;
pub mod linear;
pub mod linear_super;
pub mod norm;
pub mod reduce;
pub mod rope;
pub mod sampling;
pub mod tiles;

/// Every kernel with the bytes of its arguments.
pub fn signatures() -> Vec<(&'static str, usize)> {
    [
        attention::SIGNATURES,
        filter::SIGNATURES,
        linear::SIGNATURES,
        linear_super::SIGNATURES,
        norm::SIGNATURES,
        reduce::SIGNATURES,
        rope::SIGNATURES,
        sampling::SIGNATURES,
    ]
    .concat()
}
