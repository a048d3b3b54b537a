//! Random faults in valid files: every one must end in a checkpoint that can be read through, or in an error. What
//! the errors say is tested elsewhere, and how much memory it takes.

mod samples;

use paceline_checkpoint::{Checkpoint, CheckpointError, GgufWriter, ValueType};
use paceline_domain::WeightType;
use proptest::prelude::*;
use samples::RawGguf;

/// One fault.
#[derive(Clone, Debug)]
enum Fault {
    FlipBit {
        place: prop::sample::Index,
        bit: u8,
    },
    SetByte {
        place: prop::sample::Index,
        byte: u8,
    },
    /// Overwrites eight bytes: lengths, counts, dimensions, starts.
    SetU64 {
        place: prop::sample::Index,
        value: u64,
    },
    SetU32 {
        place: prop::sample::Index,
        value: u32,
    },
    Truncate {
        place: prop::sample::Index,
    },
    Remove {
        place: prop::sample::Index,
        n_bytes: usize,
    },
    Insert {
        place: prop::sample::Index,
        bytes: Vec<u8>,
    },
    /// Swaps two fields of eight bytes.
    Swap {
        places: [prop::sample::Index; 2],
    },
    /// Copies a piece to another place.
    Repeat {
        places: [prop::sample::Index; 2],
        n_bytes: usize,
    },
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..70u64,
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..64u32).prop_map(|bit| (1 << bit) - 1),
        any::<u64>(),
        Just(u64::MAX - 31),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    use prop::sample::Index;
    prop_oneof![
        (any::<Index>(), 0..8u8).prop_map(|(place, bit)| Fault::FlipBit { place, bit }),
        (any::<Index>(), any::<u8>()).prop_map(|(place, byte)| Fault::SetByte { place, byte }),
        (any::<Index>(), number()).prop_map(|(place, value)| Fault::SetU64 { place, value }),
        (any::<Index>(), 0..40u32).prop_map(|(place, value)| Fault::SetU32 { place, value }),
        any::<Index>().prop_map(|place| Fault::Truncate { place }),
        (any::<Index>(), 1..24usize).prop_map(|(place, n_bytes)| Fault::Remove { place, n_bytes }),
        (any::<Index>(), prop::collection::vec(any::<u8>(), 1..24))
            .prop_map(|(place, bytes)| Fault::Insert { place, bytes }),
        any::<[Index; 2]>().prop_map(|places| Fault::Swap { places }),
        (any::<[Index; 2]>(), 1..64usize).prop_map(|(places, n_bytes)| Fault::Repeat { places, n_bytes }),
    ]
}

fn overwrite(file: &mut [u8], start: usize, bytes: &[u8]) {
    let end = (start + bytes.len()).min(file.len());
    file[start..end].copy_from_slice(&bytes[..end - start]);
}

fn apply(fault: &Fault, file: &mut Vec<u8>) {
    if file.len() < 9 {
        return;
    }
    let len = file.len();
    match fault {
        Fault::FlipBit { place, bit } => file[place.index(len)] ^= 1 << bit,
        Fault::SetByte { place, byte } => file[place.index(len)] = *byte,
        Fault::SetU64 { place, value } => overwrite(file, place.index(len), &value.to_le_bytes()),
        Fault::SetU32 { place, value } => overwrite(file, place.index(len), &value.to_le_bytes()),
        Fault::Truncate { place } => file.truncate(place.index(len)),
        Fault::Remove { place, n_bytes } => {
            let start = place.index(len);
            file.drain(start..(start + n_bytes).min(len));
        }
        Fault::Insert { place, bytes } => {
            let start = place.index(len);
            file.splice(start..start, bytes.iter().copied());
        }
        Fault::Swap { places } => {
            let [a, b] = places.map(|place| place.index(len - 8));
            let (from_a, from_b) = (file[a..a + 8].to_vec(), file[b..b + 8].to_vec());
            overwrite(file, a, &from_b);
            overwrite(file, b, &from_a);
        }
        Fault::Repeat { places, n_bytes } => {
            let [from, to] = places.map(|place| place.index(len));
            let piece = file[from..(from + n_bytes).min(len)].to_vec();
            file.splice(to..to, piece);
        }
    }
}

/// The file without the data behind its header, so that faults hit the header; valid when the data are put back.
fn damaged(header: &[u8], faults: &[Fault], data: &[u8]) -> Vec<u8> {
    let mut file = header.to_vec();
    faults.iter().for_each(|fault| apply(fault, &mut file));
    file.extend(data);
    file
}

fn outcome(opened: Result<Checkpoint, CheckpointError>) -> Result<(), TestCaseError> {
    match opened {
        Ok(checkpoint) => {
            samples::read_everything(&checkpoint);
        }
        Err(error) => prop_assert!(error.to_string().len() < 4096, "a long message"),
    }
    Ok(())
}

fn open_safetensors(file: Vec<u8>) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::from_safetensors_bytes(file, serde_json::json!({}))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_gguf_files_are_read_or_refused(faults in prop::collection::vec(fault(), 1..5)) {
        let file = samples::gguf().to_bytes().unwrap();
        let header = &file[..file.len() - 640];
        outcome(Checkpoint::from_gguf_bytes(damaged(header, &faults, &[1; 640])))?;
    }

    #[test]
    fn damaged_safetensors_files_are_read_or_refused(faults in prop::collection::vec(fault(), 1..5)) {
        let file = samples::valid_safetensors();
        let header = &file[..file.len() - 66];
        let mut file = damaged(header, &faults, &[]);
        outcome(open_safetensors(file.clone()))?;
        // With the length put right again, the faults reach the JSON.
        if file.len() > 8 {
            let header_len = (file.len() - 8) as u64;
            overwrite(&mut file, 0, &header_len.to_le_bytes());
        }
        file.extend([1; 66]);
        let taken = open_safetensors(file.clone());
        if taken.is_ok() {
            prop_assert!(safetensors::SafeTensors::deserialize(&file).is_ok(), "the crate refuses what we take");
        }
        outcome(taken)?;
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        outcome(Checkpoint::from_gguf_bytes(bytes.clone()))?;
        outcome(Checkpoint::from_gguf_bytes([&b"GGUF\x03\0\0\0"[..], &bytes].concat()))?;
        outcome(open_safetensors(bytes))?;
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let gguf = GgufWriter::new()
        .metadata("list.strings", vec!["a", "bc"])
        .metadata("k", true)
        .tensor("t", WeightType::F32, &[2, 4], vec![0; 32])
        .to_bytes()
        .unwrap();
    assert!(Checkpoint::from_gguf_bytes(gguf.clone()).is_ok());
    let safetensors = samples::valid_safetensors();
    assert!(open_safetensors(safetensors.clone()).is_ok());
    for len in 0..gguf.len() {
        assert!(Checkpoint::from_gguf_bytes(&gguf[..len]).is_err(), "{len} bytes");
    }
    for len in 0..safetensors.len() {
        assert!(open_safetensors(safetensors[..len].to_vec()).is_err(), "{len} bytes");
    }
}

#[test]
fn every_field_set_to_extremes_is_read_or_refused() {
    let file = samples::gguf().to_bytes().unwrap();
    for start in 0..file.len() - 8 {
        for value in [0, 1, u64::MAX, i64::MAX as u64, 1 << 32, file.len() as u64] {
            let mut damaged = file.clone();
            overwrite(&mut damaged, start, &value.to_le_bytes());
            outcome(Checkpoint::from_gguf_bytes(damaged)).unwrap();
        }
    }
}

/// Quadratic work on any of these would take hours.
#[test]
fn large_hostile_headers_end() {
    let many_keys = (0..1_000_000u32)
        .fold(RawGguf::new(0, 1_000_000), |raw, i| raw.entry(&format!("{i:07}"), ValueType::U8).raw(&[0]));
    assert_eq!(Checkpoint::from_gguf_bytes(many_keys.data(0)).unwrap().metadata().len(), 1_000_000);

    let prefix = "p".repeat(60_000);
    let long_keys = (0..500u32)
        .fold(RawGguf::new(0, 500), |raw, i| raw.entry(&format!("{prefix}{i:05}"), ValueType::U8).raw(&[0]));
    assert_eq!(Checkpoint::from_gguf_bytes(long_keys.data(0)).unwrap().metadata().len(), 500);

    let many_tensors = (0..500_000u32)
        .rev()
        .fold(RawGguf::new(500_000, 0), |raw, i| raw.tensor(&format!("{i:06}"), &[1], 0, u64::from(i) * 32));
    assert_eq!(Checkpoint::from_gguf_bytes(many_tensors.data(500_000 * 32)).unwrap().n_tensors(), 500_000);

    let empty_arrays = RawGguf::new(0, 1).entry("k", ValueType::Array).array(ValueType::Array, 2_000_000);
    let empty_arrays = (0..2_000_000).fold(empty_arrays, |raw, _| raw.array(ValueType::Array, 0));
    assert!(Checkpoint::from_gguf_bytes(empty_arrays.data(0)).is_ok());

    let entries: Vec<String> = (0..200_000u32)
        .map(|i| {
            format!(r#""{i:06}":{{"dtype":"F16","shape":[1],"data_offsets":[{},{}]}}"#, 2 * i, 2 * i + 2)
        })
        .collect();
    let file = samples::safetensors(&format!("{{{}}}", entries.join(",")), 400_000);
    assert_eq!(open_safetensors(file).unwrap().n_tensors(), 200_000);
}
