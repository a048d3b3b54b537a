//! `model.safetensors.index.json`: which shard holds which tensor. It names the shards and confirms that they hold
//! what it says; it opens nothing.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::directory::Directory;
use crate::error::{CheckpointError, quoted};
use crate::limits::MAX_SHARDS;
use crate::safetensors::{Name, NameSeed, stream_json};

/// Receives tensor name and shard name.
type PairSink<'s> = dyn FnMut(&str, &str) -> Result<(), CheckpointError> + 's;

/// Names of the shards, sorted, each a plain file name.
pub(crate) fn shard_names(json: &[u8]) -> Result<Vec<String>, CheckpointError> {
    let mut names = BTreeSet::new();
    walk(json, &mut |tensor, shard| {
        if names.contains(shard) {
            return Ok(());
        }
        if !is_plain(shard) {
            return Err(CheckpointError::BadShardName { tensor: quoted(tensor), shard: quoted(shard) });
        }
        names.insert(shard.to_owned());
        if names.len() > MAX_SHARDS {
            let (size, limit) = (names.len() as u64, MAX_SHARDS as u64);
            return Err(CheckpointError::TooMuch { what: "number of shards", size, limit });
        }
        Ok(())
    })?;
    Ok(names.into_iter().collect())
}

/// Confirms that each tensor of the index is in the shard it names, and that no shard holds a tensor that the index
/// does not know.
pub(crate) fn confirm(json: &[u8], shards: &[String], directory: &Directory) -> Result<(), CheckpointError> {
    let mut is_named = vec![false; directory.len()];
    walk(json, &mut |tensor, shard| {
        let Some(i) = directory.position(tensor) else {
            return mismatch(tensor, format!("no shard holds it; the index names {}", quoted(shard)));
        };
        let holder = &shards[directory.entry(i).file_idx];
        if holder != shard {
            return mismatch(tensor, format!("{holder} holds it; the index names {}", quoted(shard)));
        }
        if std::mem::replace(&mut is_named[i], true) {
            return mismatch(tensor, "the index names it twice".to_owned());
        }
        Ok(())
    })?;
    match is_named.iter().position(|named| !named) {
        None => Ok(()),
        Some(i) => {
            let entry = directory.entry(i);
            mismatch(entry.name, format!("{} holds it; the index does not name it", shards[entry.file_idx]))
        }
    }
}

fn mismatch(tensor: &str, why: String) -> Result<(), CheckpointError> {
    Err(CheckpointError::IndexMismatch { tensor: quoted(tensor), why })
}

/// A name that cannot leave its directory.
fn is_plain(shard: &str) -> bool {
    shard.ends_with(".safetensors")
        && !shard.starts_with('.')
        && !shard.contains("..")
        && shard.len() <= 255
        && shard.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

fn walk(json: &[u8], sink: &mut PairSink<'_>) -> Result<(), CheckpointError> {
    let mut problem = None;
    let index = IndexVisitor { weights: WeightMap { sink, problem: &mut problem } };
    stream_json(json, 0, "model.safetensors.index.json", index).map_err(|error| problem.unwrap_or(error))
}

struct IndexVisitor<'a, 's> {
    weights: WeightMap<'a, 's>,
}

/// The object `weight_map`.
struct WeightMap<'a, 's> {
    sink: &'a mut PairSink<'s>,
    problem: &'a mut Option<CheckpointError>,
}

impl<'de> Visitor<'de> for IndexVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut weights = Some(self.weights);
        while let Some(Name(key)) = map.next_key_seed(NameSeed)? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let weights = weights.take().ok_or_else(|| A::Error::duplicate_field("weight_map"))?;
            map.next_value_seed(weights)?;
        }
        weights.map_or(Ok(()), |_| Err(A::Error::missing_field("weight_map")))
    }
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensor names and file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Name(tensor)) = map.next_key_seed(NameSeed)? {
            let Name(shard) = map.next_value_seed(NameSeed)?;
            if let Err(error) = (self.sink)(&tensor, &shard) {
                *self.problem = Some(error);
                return Err(A::Error::custom("an entry is refused"));
            }
        }
        Ok(())
    }
}
