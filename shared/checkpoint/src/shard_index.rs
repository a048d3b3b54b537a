//! `model.safetensors.index.json`: which shard holds which tensor. It names the shards and confirms that they hold
//! what it says; it opens nothing.

use std::collections::BTreeSet;

use crate::directory::Directory;
use crate::error::{CheckpointError, quoted};
use crate::json::JsonReader;
use crate::limits::MAX_SHARDS;

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
    let mut json = JsonReader::new(json, 0, "the shard index")?;
    let mut has_weight_map = false;
    let mut members = json.begin(b'{')?;
    while let Some(key) = json.next_key(&mut members)? {
        if key.name != "weight_map" {
            json.skip_value()?;
            continue;
        }
        if std::mem::replace(&mut has_weight_map, true) {
            return Err(json.error("weight_map is there twice"));
        }
        let mut pairs = json.begin(b'{')?;
        while let Some(tensor) = json.next_key(&mut pairs)? {
            sink(&tensor.name, &json.name()?)?;
        }
    }
    json.end()?;
    if has_weight_map { Ok(()) } else { Err(json.error("weight_map is missing")) }
}
