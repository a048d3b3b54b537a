//! What must be equal for two processes to compute the same bits.

use paceline_checkpoint::Checkpoint;
use paceline_domain::group::PROTOCOL_VERSION;
use paceline_domain::{Fingerprint, KvType, Quantization};
use paceline_kernels::NUMERICS;

/// The fingerprint of a process that runs this checkpoint, so quantized, on a backend with these
/// [`device_numerics`](crate::Backend::device_numerics).
pub fn fingerprint(
    checkpoint: &Checkpoint,
    quantize: Option<Quantization>,
    kv_type: KvType,
    device_numerics: u32,
) -> Fingerprint {
    let (model, protocol) = (checkpoint.digest(), PROTOCOL_VERSION);
    Fingerprint { model, quantize, kv_type, numerics: NUMERICS, device_numerics, protocol }
}
