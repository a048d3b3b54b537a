//! Which group a request goes to. Pure: it knows who is up and what it has sent where; no clock, no IO. The longest
//! cached prefix wins, then the least load, then who was sent least so far, so that caches fill evenly.
//!
//! # What a group has cached
//! Groups are not asked. The router remembers the prefixes it has sent to each, as many as the group's pool has blocks, and
//! forgets those first that were sent longest ago. So requests that come together meet before the first of them is
//! computed. Where a group had to drop what is remembered here a prompt is read once more; no token depends on it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt,
};

use paceline_domain::group::BLOCK_POSITIONS;

use crate::{prefix::PrefixKey, scheduler::Scheduler};

/// Tokens of load that a cached token outweighs: a group may be so much fuller than the emptiest one for the sake of a
/// prefix. Beyond that the prefix is worth computing in another group, which has it from then on.
pub const HIT_WEIGHT: u64 = 4;

/// What the bits of a group depend on beside model and flags, which are the same for all groups.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numerics {
    version: u32,
    /// By rank; none on CPUs.
    devices: Vec<u32>,
}

/// What is known of a group since it was formed first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupFacts {
    /// Blocks of its KV pool.
    pub n_kv_blocks: u32,
    /// What its bits depend on.
    pub numerics: Numerics,
}

/// A group whose tokens could differ from those of another one.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
#[error(
    "{new} computes with {new_numerics}, {other} with {other_numerics}: their tokens could differ, so both cannot serve one \
     model; run the same version on the same kind of devices everywhere"
)]
pub struct OtherNumerics {
    new: String,
    new_numerics: Numerics,
    other: String,
    other_numerics: Numerics,
}

/// A request to be sent somewhere.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Names of the prefixes of all whole blocks of its prompt.
    pub keys: Vec<PrefixKey>,
    /// Tokens of its prompt.
    pub n_prompt: usize,
    /// Most tokens of each of its choices.
    pub max_tokens: usize,
    /// Its choices.
    pub n_choices: usize,
}

/// All groups.
#[derive(Debug)]
pub struct Router {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    /// For messages.
    name: String,
    is_up: bool,
    facts: Option<GroupFacts>,
    /// Tokens of requests that were sent there and have not ended.
    n_tokens: u64,
    /// Tokens of all requests that were ever sent there.
    n_sent: u64,
    sent: SentPrefixes,
}

/// Prefixes that were sent to a group.
#[derive(Debug, Default)]
struct SentPrefixes {
    moments: HashMap<PrefixKey, u64>,
    in_order: BTreeMap<u64, PrefixKey>,
    n_moments: u64,
}

impl Numerics {
    /// `devices` has what bits depend on for each rank. On CPUs it is 0, and then the number of ranks does not matter.
    pub fn new(version: u32, devices: Vec<u32>) -> Self {
        let are_cpus = devices.iter().all(|device| *device == 0);
        Self { version, devices: if are_cpus { Vec::new() } else { devices } }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "version {} of the numerics on ", self.version)?;
        if self.devices.is_empty() {
            return write!(formatter, "CPUs");
        }
        let devices: Vec<String> = self.devices.iter().map(|device| format!("{device:08x}")).collect();
        write!(formatter, "the devices {}", devices.join(", "))
    }
}

impl Wanted {
    /// Tokens that it counts for.
    pub fn n_tokens(&self) -> u64 {
        self.n_prompt as u64 + self.max_tokens as u64 * self.n_choices as u64
    }

    /// Blocks that a cache may save it: at least one token is left to run.
    fn usable(&self) -> &[PrefixKey] {
        let n_blocks = self.n_prompt.saturating_sub(1) / BLOCK_POSITIONS;
        &self.keys[..n_blocks.min(self.keys.len())]
    }
}

impl Router {
    /// Groups that were never formed, by their names for messages.
    pub fn new(names: Vec<String>) -> Self {
        let group = |name| Group {
            name,
            is_up: false,
            facts: None,
            n_tokens: 0,
            n_sent: 0,
            sent: SentPrefixes::default(),
        };
        Self { groups: names.into_iter().map(group).collect() }
    }

    /// How many groups there are.
    pub fn n_groups(&self) -> usize {
        self.groups.len()
    }

    /// A group was formed; its cache is empty.
    ///
    /// # Errors
    /// When it computes with other numerics than another group, now or when that was formed last: then it is not up.
    pub fn up(&mut self, group: usize, facts: GroupFacts) -> Result<(), OtherNumerics> {
        let others = self.groups.iter().enumerate().filter(|(other, _)| *other != group);
        let mut known = others.filter_map(|(_, other)| Some((&other.name, &other.facts.as_ref()?.numerics)));
        if let Some((other, numerics)) = known.find(|(_, known)| **known != facts.numerics) {
            return Err(OtherNumerics {
                new: self.groups[group].name.clone(),
                new_numerics: facts.numerics,
                other: other.clone(),
                other_numerics: numerics.clone(),
            });
        }
        let group = &mut self.groups[group];
        (group.is_up, group.facts, group.sent) = (true, Some(facts), SentPrefixes::default());
        Ok(())
    }

    /// A group is lost. Nothing new is sent there while another one is up.
    pub fn down(&mut self, group: usize) {
        let group = &mut self.groups[group];
        (group.is_up, group.sent) = (false, SentPrefixes::default());
    }

    /// Blocks of the largest pool, once a group was formed: what does not fit there never will.
    pub fn largest_pool(&self) -> Option<u32> {
        self.groups.iter().filter_map(|group| Some(group.facts.as_ref()?.n_kv_blocks)).max()
    }

    /// The group that a request goes to, which has its load from now on. Of the groups that can hold it those that are up,
    /// or where none is, those that will be again; of these the one with the longest cached prefix, then with the least
    /// load, then with the least that was ever sent there, then the first. A group whose load is more than [`HIT_WEIGHT`]
    /// times that prefix above the least is left out. `None` when it fits nowhere.
    pub fn route(&mut self, wanted: &Wanted) -> Option<usize> {
        let is_any_up = self.groups.iter().any(|group| group.is_up && group.fits(wanted));
        self.send(wanted, |group| group.is_up || !is_any_up)
    }

    /// The group that a request goes to from one that is down; `None` when no group that is up can hold it.
    pub fn reroute(&mut self, from: usize, wanted: &Wanted) -> Option<usize> {
        let group = self.send(wanted, |group| group.is_up)?;
        self.ended(from, wanted.n_tokens());
        Some(group)
    }

    fn send(&mut self, wanted: &Wanted, may_go: impl Fn(&Group) -> bool) -> Option<usize> {
        let candidates = || {
            let fitting = self.groups.iter().enumerate().filter(|(_, group)| group.fits(wanted));
            fitting.filter(|(_, group)| may_go(group))
        };
        let least = candidates().map(|(_, group)| group.n_tokens).min()?;
        let rated = candidates().map(|(i, group)| {
            let n_cached = (group.sent.run(wanted.usable()) * BLOCK_POSITIONS) as u64;
            (n_cached, Reverse(group.n_tokens), Reverse((group.n_sent, i)))
        });
        let is_fair = |(n_cached, Reverse(n_tokens), _): &(u64, Reverse<u64>, _)| {
            n_tokens - least <= n_cached.saturating_mul(HIT_WEIGHT)
        };
        let (_, _, Reverse((_, chosen))) = rated.filter(is_fair).max()?;
        self.groups[chosen].take(wanted);
        Some(chosen)
    }

    /// A request of so many tokens has ended.
    ///
    /// # Panics
    /// When it was not sent there.
    pub fn ended(&mut self, group: usize, n_tokens: u64) {
        let group = &mut self.groups[group];
        group.n_tokens = group.n_tokens.checked_sub(n_tokens).expect("invariant: it was sent there");
    }

    /// Tokens of requests that were sent to a group and have not ended.
    pub fn load(&self, group: usize) -> u64 {
        self.groups[group].n_tokens
    }
}

impl Group {
    fn fits(&self, wanted: &Wanted) -> bool {
        let n_each = wanted.n_prompt + wanted.max_tokens;
        self.facts.as_ref().is_some_and(|facts| Scheduler::could_fit(facts.n_kv_blocks, n_each))
    }

    fn take(&mut self, wanted: &Wanted) {
        self.n_tokens += wanted.n_tokens();
        self.n_sent += wanted.n_tokens();
        let n_kv_blocks = self.facts.as_ref().map_or(0, |facts| facts.n_kv_blocks);
        self.sent.add(&wanted.keys, n_kv_blocks as usize);
    }
}

impl SentPrefixes {
    /// Blocks from the first on that are here.
    fn run(&self, keys: &[PrefixKey]) -> usize {
        keys.iter().take_while(|key| self.moments.contains_key(key)).count()
    }

    /// Its end is forgotten before its beginning.
    fn add(&mut self, keys: &[PrefixKey], n_most: usize) {
        for key in keys.iter().rev() {
            self.n_moments += 1;
            if let Some(before) = self.moments.insert(*key, self.n_moments) {
                self.in_order.remove(&before);
            }
            self.in_order.insert(self.n_moments, *key);
        }
        while self.in_order.len() > n_most {
            let (_, oldest) = self.in_order.pop_first().expect("invariant: it is not empty");
            self.moments.remove(&oldest);
        }
    }
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod tests;
