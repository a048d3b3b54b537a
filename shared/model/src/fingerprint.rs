//! What must be equal for two processes to compute the same bits.

use paceline_checkpoint::Checkpoint;
use paceline_domain::group::PROTOCOL_VERSION;
use paceline_domain::{Fingerprint, KvType};

/// The fingerprint of a process that runs this checkpoint on a backend with these numerics.
pub fn fingerprint(checkpoint: &Checkpoint, kv_type: KvType, numerics: u32) -> Fingerprint {
    Fingerprint { model: checkpoint.digest(), kv_type, numerics, protocol: PROTOCOL_VERSION }
}
