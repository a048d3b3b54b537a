//! Arguments and launches of the kernels, a file each as in `kernels/`.

pub mod linear;

/// Every kernel with the bytes of its arguments.
pub fn signatures() -> Vec<(&'static str, usize)> {
    [linear::SIGNATURES].concat()
}
