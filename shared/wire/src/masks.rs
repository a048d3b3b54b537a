//! Masks of a step between protobuf and the domain.

use paceline_domain::{Epoch, SequenceId, SequenceMasks, StepMasks, StepNumber, TokenMask};

use crate::shard;

impl From<&StepMasks> for shard::Masks {
    fn from(masks: &StepMasks) -> Self {
        let of_sequence = |masks: &SequenceMasks| shard::SequenceMasks {
            sequence: masks.sequence.0,
            rows: masks.rows.iter().map(bytes).collect(),
        };
        Self {
            epoch: masks.epoch.0,
            step: masks.step.0,
            sequences: masks.sequences.iter().map(of_sequence).collect(),
        }
    }
}

impl From<shard::Masks> for StepMasks {
    fn from(masks: shard::Masks) -> Self {
        let of_sequence = |masks: shard::SequenceMasks| SequenceMasks {
            sequence: SequenceId(masks.sequence),
            rows: masks.rows.iter().map(|bytes| mask(bytes)).collect(),
        };
        Self {
            epoch: Epoch(masks.epoch),
            step: StepNumber(masks.step),
            sequences: masks.sequences.into_iter().map(of_sequence).collect(),
        }
    }
}

fn bytes(mask: &TokenMask) -> Vec<u8> {
    mask.words().iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The last word may be short.
fn mask(bytes: &[u8]) -> TokenMask {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    TokenMask::of_words(bytes.chunks(4).map(word).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_survive_the_wire() {
        let rows = vec![TokenMask::of_words(vec![0x8000_0001, 6]), TokenMask::default()];
        let sequences = vec![SequenceMasks { sequence: SequenceId(4), rows }];
        let masks = StepMasks { epoch: Epoch(7), step: StepNumber(9), sequences };
        assert_eq!(StepMasks::from(shard::Masks::from(&masks)), masks);
        assert_eq!(mask(&[0, 0, 0, 0, 2]), TokenMask::of_words(vec![0, 2]));
    }
}
