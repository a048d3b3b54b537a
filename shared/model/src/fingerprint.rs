//! What must be equal for two processes to compute the same bits.

use paceline_checkpoint::Checkpoint;
use paceline_domain::group::PROTOCOL_VERSION;
use paceline_domain::{Fingerprint, KvType};
use paceline_kernels::NUMERICS;

/// The fingerprint of a process that runs this checkpoint.
pub fn fingerprint(checkpoint: &Checkpoint, kv_type: KvType) -> Fingerprint {
    Fingerprint { model: checkpoint.digest(), kv_type, numerics: NUMERICS, protocol: PROTOCOL_VERSION }
}
