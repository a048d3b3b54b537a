//! Launchers of the kernels: one module a kernel file, with the structs of arguments both sides share.

/// Name and bytes of arguments of every kernel.
pub fn signatures() -> Vec<(&'static str, usize)> {
    Vec::new()
}
