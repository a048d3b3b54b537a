//! The kinds an error can have. Every crate's error enum answers `kind()`; `wire` turns it into a gRPC code.

/// What whoever caused or met an error can do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// The input is wrong; sending it again will not help.
    Invalid,
    /// The input is fine but does not fit this model or this cluster as it is configured.
    Unfit,
    /// There is no room now; later there may be.
    Busy,
    /// Something this needs is not there right now.
    Unavailable,
    /// Paceline itself is wrong.
    Bug,
}
