//! How many KV blocks a group has. Pure: what ranks have room for comes in, a number or the reasons against it go out.

use std::collections::BTreeMap;

use paceline_model::{DeviceFit, DeviceRoom};

/// Most blocks of any pool.
pub const MAX_BLOCKS: u32 = 1 << 24;

/// What a pool should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PoolWish {
    /// This many blocks, neither more nor fewer.
    Exactly(u32),
    /// As many as devices have room for.
    Fit(PoolBounds),
}

/// Bounds of a pool that is sized by what is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolBounds {
    /// Most tokens of one sequence, for messages.
    pub context: usize,
    /// Blocks of one sequence of the whole context.
    pub least: u32,
    /// Blocks of all sequences that may run at once, each of the whole context: more would be of no use.
    pub most: u32,
    /// Most blocks where a rank has them in the memory of its host, which is not asked.
    pub in_host_memory: u32,
}

/// Ranks that share one device.
struct Shared {
    ranks: Vec<usize>,
    usable_bytes: u64,
    fixed_bytes: u64,
    kv_block_bytes: u64,
}

/// The blocks of each rank's pool; `rooms` has an entry for each rank, `None` where it computes in the host's memory.
///
/// # Errors
/// One reason for each device that has not enough memory.
pub fn n_blocks(wish: PoolWish, rooms: &[Option<DeviceRoom>]) -> Result<u32, Vec<String>> {
    let devices = by_device(rooms);
    let least = match wish {
        PoolWish::Exactly(n_blocks) => n_blocks,
        PoolWish::Fit(bounds) => bounds.least,
    };
    let problems: Vec<String> = devices.iter().filter_map(|device| device.problem(wish, least)).collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    let PoolWish::Fit(bounds) = wish else { return Ok(least) };
    let most = if devices.is_empty() || rooms.contains(&None) { bounds.in_host_memory } else { bounds.most };
    let fit = devices.iter().map(|device| device.fit().n_kv_blocks).min().unwrap_or(u64::MAX);
    Ok(u32::try_from(fit).unwrap_or(u32::MAX).min(most).min(MAX_BLOCKS))
}

/// Ranks on one device have it together; of what they found free, the least counts.
fn by_device(rooms: &[Option<DeviceRoom>]) -> Vec<Shared> {
    let mut devices: BTreeMap<&str, Shared> = BTreeMap::new();
    for (rank, room) in rooms.iter().enumerate() {
        let Some(room) = room else { continue };
        let device = devices.entry(&room.memory).or_insert(Shared {
            ranks: Vec::new(),
            usable_bytes: u64::MAX,
            fixed_bytes: 0,
            kv_block_bytes: 0,
        });
        device.ranks.push(rank);
        device.usable_bytes = device.usable_bytes.min(room.usable_bytes);
        device.fixed_bytes = device.fixed_bytes.saturating_add(room.fixed_bytes);
        device.kv_block_bytes = device.kv_block_bytes.saturating_add(room.kv_block_bytes);
    }
    devices.into_values().collect()
}

impl Shared {
    fn fit(&self) -> DeviceFit {
        DeviceFit::new(self.usable_bytes, self.fixed_bytes, self.kv_block_bytes)
    }

    /// Why the device does not hold `least` blocks.
    fn problem(&self, wish: PoolWish, least: u32) -> Option<String> {
        if self.fit().n_kv_blocks >= u64::from(least) && self.fixed_bytes <= self.usable_bytes {
            return None;
        }
        let kv_bytes = self.kv_block_bytes.saturating_mul(u64::from(least));
        let (whose, remedy) = match wish {
            PoolWish::Exactly(n_blocks) => (format!("a KV pool of {n_blocks} blocks"), "fewer --kv-blocks"),
            PoolWish::Fit(bounds) => {
                (format!("the KV cache of one sequence of {} tokens", bounds.context), "a smaller --context")
            }
        };
        let ranks: Vec<String> = self.ranks.iter().map(ToString::to_string).collect();
        Some(format!(
            "the GPU of rank {} may use {}, the model needs {}: {} for weights and buffers, {} for {whose}; use more \
             ranks, {remedy}, quantized weights or a higher --gpu-memory",
            ranks.join(" and "),
            megabytes(self.usable_bytes),
            megabytes(self.fixed_bytes.saturating_add(kv_bytes)),
            megabytes(self.fixed_bytes),
            megabytes(kv_bytes),
        ))
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: PoolBounds = PoolBounds { context: 160, least: 10, most: 1_000, in_host_memory: 64 };

    fn room(memory: &str, usable_bytes: u64) -> Option<DeviceRoom> {
        Some(DeviceRoom {
            memory: memory.into(),
            usable_bytes,
            fixed_bytes: 5_000_000,
            kv_block_bytes: 100_000,
        })
    }

    #[test]
    fn the_pool_is_what_the_fullest_device_has_left() {
        let check = |rooms: &[Option<DeviceRoom>], expected| {
            assert_eq!(n_blocks(PoolWish::Fit(BOUNDS), rooms), Ok(expected), "{rooms:?}");
        };
        check(&[None, None], 64);
        check(&[room("a", 25_000_000)], 200);
        check(&[room("a", 25_000_000), room("b", 15_099_999)], 100);
        check(&[room("a", 1 << 40)], 1_000);
        // The host's memory is not asked, so it is not filled.
        check(&[room("a", 25_000_000), None], 64);
        check(&[room("a", 6_000_000), None], 10);
    }

    #[test]
    fn ranks_on_one_device_share_what_is_free() {
        let rooms = [room("a", 25_000_000), room("a", 24_000_000), room("b", 25_000_000)];
        assert_eq!(n_blocks(PoolWish::Fit(BOUNDS), &rooms), Ok(70));
    }

    #[test]
    fn a_pool_that_was_asked_for_is_held_or_refused() {
        let exactly = |n, rooms: &[Option<DeviceRoom>]| n_blocks(PoolWish::Exactly(n), rooms);
        assert_eq!(exactly(7, &[None]), Ok(7));
        assert_eq!(exactly(200, &[room("a", 25_000_000)]), Ok(200));
        let problems = exactly(201, &[room("a", 25_000_000), room("b", 1_000_000)]).unwrap_err();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("rank 0 may use 25.0 MB"), "{problems:?}");
        assert!(problems[0].contains("needs 25.1 MB"), "{problems:?}");
        assert!(problems[0].contains("pool of 201 blocks"), "{problems:?}");
    }

    #[test]
    fn one_sequence_of_the_context_must_fit() {
        assert_eq!(n_blocks(PoolWish::Fit(BOUNDS), &[room("a", 6_000_000)]), Ok(10));
        for rooms in [vec![room("a", 5_999_999)], vec![room("a", 11_000_000), room("a", 11_000_000)]] {
            let problems = n_blocks(PoolWish::Fit(BOUNDS), &rooms).unwrap_err().join("; ");
            for part in ["one sequence of 160 tokens", "--context", "more ranks", "--gpu-memory"] {
                assert!(problems.contains(part), "{part} in {problems}");
            }
        }
        // A rank without heads has no KV cache, but weights.
        let headless = DeviceRoom { memory: "a".into(), usable_bytes: 1, fixed_bytes: 2, kv_block_bytes: 0 };
        assert!(n_blocks(PoolWish::Fit(BOUNDS), &[Some(headless)]).is_err());
    }
}
