//! What the CPU says of its caches, as far as kernels depend on it for their speed; never for a bit.

use std::sync::LazyLock;

/// From this size on the nearest data cache holds what is fetched ahead beside what is worked on.
const ROOMY_BYTES: usize = 48 << 10;

/// Whether weights are best fetched into the nearest cache: it is roomy.
pub(crate) fn is_nearest_roomy() -> bool {
    static ROOMY: LazyLock<bool> = LazyLock::new(|| nearest_bytes().is_some_and(|n| n >= ROOMY_BYTES));
    *ROOMY
}

/// Size of a core's first-level data cache in bytes, as CPUID has it (AMD64 Architecture Programmer's Manual, function
/// 8000_001D; Intel Software Developer's Manual, leaf 04). `None` where it says nothing.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)]
fn nearest_bytes() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const DATA: u32 = 1;
    // SAFETY: each CPU of this architecture has the instruction; leaves that it lacks are not asked for.
    let (leaves, extended) = unsafe { (__cpuid(0).eax, __cpuid(0x8000_0000).eax) };
    let leaf_of = [(0x8000_001d, extended), (4, leaves)];
    let caches = leaf_of.into_iter().filter(|(leaf, last)| leaf <= last).map(|(leaf, _)| {
        // SAFETY: as above.
        unsafe { __cpuid_count(leaf, 0) }
    });
    let mut first = caches.filter(|cache| cache.eax & 0x1f == DATA && cache.eax >> 5 & 7 == 1);
    first.next().map(|cache| {
        let field = |word: u32, lowest: u32, width: u32| (word >> lowest & ((1 << width) - 1)) as usize + 1;
        let (line, partitions, ways) =
            (field(cache.ebx, 0, 12), field(cache.ebx, 12, 10), field(cache.ebx, 22, 10));
        line * partitions * ways * (cache.ecx as usize + 1)
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn nearest_bytes() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux reads it from the same place, in its own way.
    #[test]
    fn the_size_is_the_one_the_system_reports() {
        let Some(bytes) = nearest_bytes() else { return };
        assert!((4 << 10..=1 << 20).contains(&bytes), "{bytes}");
        let reported = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index0/size");
        if let Some(kib) = reported.ok().and_then(|size| size.trim().strip_suffix('K')?.parse::<usize>().ok())
        {
            assert_eq!(bytes, kib << 10);
        }
    }
}
